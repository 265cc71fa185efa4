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

    def saved(self, weight: Tensor) -> Tensor:
        """What of a weight has to be kept so that `restore` can undo the change, in CPU memory."""

    def restore(self, weight: Tensor, saved: Tensor) -> None:
        """Put back in place what `saved` kept of the weight: bit for bit as it was."""

    def relative_change(self, weight: Tensor) -> float:
        """||W' - W|| / ||W||."""

    def scaled(self, scale: float) -> Change:
        """The change W + scale (W' - W)."""

    def then(self, second: Any) -> Change:
        """This change and then another of the same kind."""
