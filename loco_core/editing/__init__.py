"""CHANGE the weights: the closed-form solver, the Edit it makes, and the methods built on both."""

from . import closed_form
from .compose import compose
from .cross_attention import locoedit, time_edit, uce
from .diagnostics import diagnose
from .edit import Edit
from .quickfix import diff_quickfix

__all__ = [
    "Edit",
    "closed_form",
    "compose",
    "diagnose",
    "diff_quickfix",
    "locoedit",
    "time_edit",
    "uce",
]
