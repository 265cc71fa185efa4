"""SHOW it: figures and the window slider. No kernel of the library imports this wing."""

from .edits import interference_map, trade_off
from .plots import contact_sheet, effect_figure, image_grid, score_curve
from .widgets import WindowSlider, window_slider

__all__ = [
    "WindowSlider",
    "contact_sheet",
    "effect_figure",
    "image_grid",
    "interference_map",
    "score_curve",
    "trade_off",
    "window_slider",
]
