"""What is kept of scores that are as many as the weights of a model: the best, and sums of all.

An edit zeroes a few weights in a hundred, so of 1.2 billion scores (the feed-forward layers of
SD-XL, 4.9 GB) a few are ever asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .ranking import Ranking, share_of

__all__ = ["BEST", "Kept"]

#: The share of each sign that is kept unless asked: four times what `erase` is best asked for.
BEST = 0.12


@dataclass(frozen=True, eq=False)
class Kept:
    """Signed scores of some weights, on the CPU.

    share: of each sign, the best of every matrix and of every row of it; 1: all. shapes: of the
    weights. values: weight name -> its kept scores, all of them [out, ...] or the best [n].
    at: weight name -> where the best are, sorted flat indices [n], int32 where they fit; empty with
    share = 1. sums: weight name -> sums of all positive and of all negative scores.
    """

    share: float
    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, Tensor]
    at: Mapping[str, Tensor]
    sums: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, scores: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]], share: float) -> Kept:
        """Of scores that may come one weight after the other, and are not held longer."""
        shapes, values, at, sums = {}, {}, {}, {}
        for name, x in scores.items() if isinstance(scores, Mapping) else scores:
            shapes[name] = tuple(x.shape)
            sums[name] = (_total(x.clamp_min(0)), _total(x.clamp_max(0)))
            values[name] = x
            if share < 1:
                best = _best(x, share)
                values[name] = x.take(best)
                at[name] = best.int() if x.numel() < 2**31 else best
        return cls(float(share), shapes, values, at, sums)

    def __getitem__(self, name: str) -> Tensor:
        """The scores of one weight in its shape; 0 where they were not kept."""
        if self.share == 1:
            return self.values[name]
        dense = self.values[name].new_zeros(math.prod(self.shapes[name]))
        dense[self.at[name].long()] = self.values[name]
        return dense.view(self.shapes[name])

    def covers(self, ratio: float, quota: str, chosen: Mapping[str, Tensor], sign: float) -> bool:
        """Whether the first `ratio` by a quota, `chosen`, are so among all scores for sure."""
        if self.share == 1 or quota != "all":
            return ratio <= self.share
        for name, indices in chosen.items():
            sure = share_of(self.share, math.prod(self.shapes[name]))
            if len(indices) >= sure and int((sign * self.values[name] > 0).sum()) >= sure:
                return False  # there may be more that were not kept
        return True


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """`Kept` as a mapping: weight name -> its scores, made when they are asked for."""

    kept: Kept

    def __getitem__(self, name: str) -> Tensor:
        return self.kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept.shapes)

    def __len__(self) -> int:
        return len(self.kept.shapes)


def _best(x: Tensor, share: float) -> Tensor:
    """Sorted flat indices of the best of each sign, by row and by matrix."""
    found: list[Tensor] = []
    for signed in (x, -x):
        for quota in ("row", "matrix"):
            ranking = Ranking(partial(_one, signed), quota, above=0.0)
            found += ranking.top(ranking.counts(share)).values()
    return torch.cat(found).unique() if found else torch.empty(0, dtype=torch.int64)


def _one(x: Tensor) -> list[tuple[str, Tensor]]:
    return [("", x)]


def _total(x: Tensor) -> float:
    return x.sum(dtype=torch.float64).item()
