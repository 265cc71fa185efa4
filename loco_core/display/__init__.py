"""SHOW it: figures and the window slider. No kernel of the library imports this wing."""

from .plots import contact_sheet, image_grid, score_curve
from .widgets import WindowSlider, window_slider

__all__ = ["WindowSlider", "contact_sheet", "image_grid", "score_curve", "window_slider"]
