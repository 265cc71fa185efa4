"""SHOW it: figures, the window slider and explorers. No kernel of the library imports this wing."""

from .edits import interference_map, trade_off
from .live.choices import any_of, one_of
from .live.explore import Explorer, explore
from .live.explorers import edit_explorer, routing_matrix
from .pixels import contact_sheet
from .plots import effect_figure, image_grid, score_curve
from .widgets import WindowSlider, window_slider

__all__ = [
    "Explorer",
    "WindowSlider",
    "any_of",
    "contact_sheet",
    "edit_explorer",
    "effect_figure",
    "explore",
    "image_grid",
    "interference_map",
    "one_of",
    "routing_matrix",
    "score_curve",
    "trade_off",
    "window_slider",
]
