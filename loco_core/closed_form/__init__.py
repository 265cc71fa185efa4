"""CHANGE by an equation: which embedding is read as which, solved once for all layers."""

from .diagnostics import diagnose
from .methods import locoedit, time_edit, uce
from .quickfix import diff_quickfix
from .solver import fit

__all__ = ["diagnose", "diff_quickfix", "fit", "locoedit", "time_edit", "uce"]
