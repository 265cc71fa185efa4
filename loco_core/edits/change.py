"""What every kind of change of a weight can do."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

__all__ = ["Change"]


class Change(Protocol):
    """What an edit does to one weight W: `low_rank.LowRankMap` or `knockout.Knockout`.

    A frozen dataclass of CPU tensors and JSON values, hashable, equal bit for bit.
    """

    def check(self, weight: Tensor) -> None:
        """Raise ValueError unless it is for weights of this shape."""

    def apply_to(self, weight: Tensor) -> Tensor:
        """W', in the dtype and on the device of W."""

    def part(self, weight: Tensor) -> Tensor:
        """What of a weight it replaces, in CPU memory: not a copy, if it lies there already."""

    def made(self, part: Tensor) -> Tensor:
        """What it puts in the place of that `part`."""

    def restore(self, weight: Tensor, part: Tensor) -> None:
        """Put a `part` back in place, bit for bit."""

    def relative_change(self, weight: Tensor) -> float:
        """||W' - W|| / ||W||."""

    def scaled(self, scale: float) -> Change:
        """The change W + scale (W' - W)."""

    def then(self, second: Any) -> Change:
        """This change and then another of the same kind."""
