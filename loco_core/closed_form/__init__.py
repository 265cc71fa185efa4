"""CHANGE by an equation: which embedding is read as which, solved once for all layers."""

from .diagnostics import diagnose
from .methods import diff_quickfix, locoedit, time_edit, uce
from .rivals import rivals
from .solver import fit

__all__ = ["diagnose", "diff_quickfix", "fit", "locoedit", "rivals", "time_edit", "uce"]
