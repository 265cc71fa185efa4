"""The orders in which an attribution's weights can be taken: its own, and those of controls.

Each makes (name of a weight, scores of its entries) one weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..edits.weights import editable, is_of
from .ranking import QUOTAS, Ranking

__all__ = ["BY", "chance", "first", "signed", "sizes", "slopes"]

BY = ("attribution", "random", "weight", "gradient")
Scores = Iterator[tuple[str, Tensor]]


def first(
    parts: Any, sign: float, ratio: float, *, by: str, quota: str, seed: int, pipe: Any
) -> dict[str, Tensor]:
    """Weight name -> the entries that an edit of an Attribution zeroes; see `Attribution.erase`."""
    for label, choice, choices in (("by", by, BY), ("quota", quota, QUOTAS)):
        if choice not in choices:
            raise ValueError(f"{label}={choice!r}: choose from {', '.join(choices)}")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(
            f"ratio {ratio!r} is not in (0, 1]: it is a share of the weights; the paper's is 0.001"
        )
    kept = parts.kept
    orders = {
        "attribution": lambda: signed(parts.alpha, sign),
        "random": lambda: chance(kept.shapes, seed),
        "weight": lambda: sizes(parts, pipe),
        "gradient": lambda: slopes(parts, pipe),
    }
    if by == "gradient":
        parts.whole('by="gradient"')
    counts = Ranking(orders["attribution"], quota, above=0.0).counts(ratio)
    own = Ranking(orders["attribution"], quota).top(counts)
    if not kept.covers(ratio, quota, own, sign):
        raise ValueError(
            f"ratio={ratio!r} by quota={quota!r} may need alphas that were not kept: the best "
            f"{kept.share:g} of each sign were; attribute with a larger keep="
        )
    return own if by == "attribution" else Ranking(orders[by], quota).top(counts)


def signed(alpha: Mapping[str, Tensor], sign: float) -> Scores:
    """By alpha (+1: what serves the concept is positive) or by -alpha (-1: what holds it back)."""
    for name, scores in alpha.items():
        yield name, scores if sign > 0 else -scores


def chance(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Scores:
    """By chance."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        yield name, torch.rand(shape, generator=generator)


def sizes(parts: Any, pipe: Any) -> Scores:
    """By |w| of the weights that an Attribution scored, which `pipe` has."""
    for name in parts.alpha:
        yield name, _weight(parts, pipe, name).float().abs()


def slopes(parts: Any, pipe: Any) -> Scores:
    """By |dJ/dw| = |alpha / w|; a weight of 0 tells none."""
    for name, size in sizes(parts, pipe):
        yield name, torch.nan_to_num(parts.alpha[name].abs() / size, nan=0)


def _weight(parts: Any, pipe: Any, name: str) -> Tensor:
    if pipe is None:
        raise ValueError('by="weight" and by="gradient" ask the weights: pass pipe=pipe')
    weight: Any = editable(pipe, name).weight
    if not is_of(weight, parts.marks[name]):
        raise ValueError(f"{parts!r} is of other weights than those of this pipeline ({name})")
    return weight.detach().cpu()
