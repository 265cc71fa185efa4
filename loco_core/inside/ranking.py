"""Units of a network in order of a score, and which of them come first.

A unit is an entry of a weight (CAD) or a whole row of one, an output of its layer (neurons). Which
come first is asked in three ways: of every row the same share, of every matrix, or of all together.
Ties are broken by index, so that exactly as many are taken as were asked for, of ours and of the
controls. Scores are made one matrix at a time, and never lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["QUOTAS", "Ranking", "share_of"]

QUOTAS = ("row", "matrix", "all")
PIECE = 1 << 20  # scores that are sorted at a time


@dataclass(frozen=True)
class Ranking:
    """Scores of units, and who comes first.

    scores: makes (name of a weight, its scores) one by one, the same at every call: [row, unit] of
    matrices, or of any other shape. quota: "row" compares the units of a row with each other (the
    first axis), "matrix" those of a weight, "all" those of all weights. above: only units with a
    larger score are taken.

    >>> ranking = Ranking(lambda: [("a", torch.tensor([[3.0, 1.0], [2.0, 2.0]]))], "matrix")
    >>> ranking.top(ranking.counts(0.5))
    {'a': tensor([0, 2])}
    """

    scores: Callable[[], Iterable[tuple[str, Tensor]]]
    quota: str = "all"
    above: float = -math.inf

    def counts(self, ratio: float) -> dict[str, Tensor]:
        """How many units are first, by weight and group of the quota: [group] int64.

        ratio: share of the units of a group, rounded up: rounded down, a quota of 0.001 takes
        nothing from a row of 640. Less where fewer can be taken. "all" has one group, named "".
        """
        takeable, sizes = {}, {}
        for name, x in self.scores():
            groups = _groups(x, self.quota)
            takeable[name], sizes[name] = (groups > self.above).sum(1), groups.shape[1]
        if self.quota == "all":
            every, size = sum(n.sum() for n in takeable.values()), sum(sizes.values())
            takeable, sizes = {"": torch.as_tensor(every).view(1)}, {"": size}
        return {
            name: found.clamp_max(share_of(ratio, sizes[name])) for name, found in takeable.items()
        }

    def top(self, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weight name -> sorted flat indices of the first units; names without any are left out.

        counts: see there; those of another ranking of the same weights take exactly as many.
        """
        if self.quota == "all":
            counts = self._shares(int(counts[""]))
        found = {}
        for name, x in self.scores():
            groups = _groups(x, self.quota)
            found[name] = (
                _first_of_rows(groups, counts[name])
                if len(groups) > 1
                else _first(groups[0], int(counts[name]))
            )
        return {name: indices for name, indices in found.items() if len(indices)}

    def _shares(self, count: int) -> dict[str, Tensor]:
        """How many of the `count` first of all weights lie in each: the earlier ones win ties."""
        best = torch.empty(0)
        for _, x in self.scores():
            best = _largest(x.flatten(), count, best.to(x.dtype))
        least = best[-1] if len(best) else math.inf
        above = {name: int((x > least).sum()) for name, x in self.scores()}
        left = count - sum(above.values())
        shares = {}
        for name, x in self.scores():
            level = min(left, int((x == least).sum()))
            left -= level
            shares[name] = torch.tensor([above[name] + level])
        return shares


def share_of(ratio: float, size: int) -> int:
    """How many of `size` units a share is, rounded up: 0.07 of 100 is 7, though 0.07 * 100 > 7."""
    return math.ceil(ratio * size - 1e-9)


def _groups(x: Tensor, quota: str) -> Tensor:
    """[group, unit] of the scores of one weight."""
    return x.flatten(1) if quota == "row" and x.ndim > 1 else x.flatten()[None]


def _first(x: Tensor, count: int) -> Tensor:
    """Sorted indices of the `count` largest entries of a vector, the earlier ones of equal ones."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    least = _largest(x, count, x.new_empty(0))[-1]
    above, level = (x > least).nonzero()[:, 0], (x == least).nonzero()[:, 0]
    return torch.cat([above, level[: count - len(above)]]).sort().values


def _largest(x: Tensor, count: int, known: Tensor) -> Tensor:
    """The `count` largest of `known` and of a vector, in descending order: a piece at a time, since
    topk takes 16 bytes an entry."""
    for piece in x.split(PIECE):
        piece = piece.topk(min(count, len(piece))).values
        known = torch.cat([known, piece])
        known = known.topk(min(count, len(known))).values
    return known


def _first_of_rows(x: Tensor, counts: Tensor) -> Tensor:
    """The same of every row of a matrix [row, unit], as flat indices; counts: [row]."""
    height = max(1, PIECE // x.shape[1])
    found = []
    for start in range(0, len(x), height):
        rows, count = x[start : start + height], counts[start : start + height, None]
        values = rows.topk(max(1, int(count.max())), dim=1).values
        least = values.gather(1, (count - 1).clamp_min(0))
        above, level = rows > least, rows == least
        level &= level.cumsum(1, dtype=torch.int32) <= count - above.sum(1, keepdim=True)
        chosen = (above | level) & (count > 0)
        found.append(chosen.flatten().nonzero()[:, 0] + start * x.shape[1])
    return torch.cat(found)
