"""What a CHANGE of weights is: put on, taken off, saved, composed. Knows no prompt, no method."""

from .compose import compose
from .edit import Edit
from .knockout import Knockout
from .low_rank import LowRankMap

__all__ = ["Edit", "Knockout", "LowRankMap", "compose"]
