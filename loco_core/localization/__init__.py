"""FIND the layers that a concept enters through."""

from .causal_trace import CausalTrace, threshold_from
from .localization import Localization
from .methods import METHODS, localize
from .sweep import Sweep
from .tracing import trace

__all__ = [
    "METHODS",
    "CausalTrace",
    "Localization",
    "Sweep",
    "localize",
    "threshold_from",
    "trace",
]
