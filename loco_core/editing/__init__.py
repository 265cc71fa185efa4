"""CHANGE the weights: the closed-form solver, the Edit it makes, and the methods built on both."""

from . import closed_form
from .cross_attention import locoedit
from .edit import Edit

__all__ = ["Edit", "closed_form", "locoedit"]
