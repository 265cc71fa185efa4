"""The orders in which an attribution's weights can be taken: its own, and those of controls.

Each makes (name of a weight, scores of its entries) one weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..edits.weights import editable, is_of

__all__ = ["chance", "signed", "sizes", "slopes"]

Scores = Iterator[tuple[str, Tensor]]


def signed(alpha: Mapping[str, Tensor], sign: float) -> Scores:
    """By alpha (+1: what serves the concept is positive) or by -alpha (-1: what holds it back)."""
    for name, scores in alpha.items():
        yield name, scores if sign > 0 else -scores


def chance(alpha: Mapping[str, Tensor], seed: int) -> Scores:
    """By chance."""
    generator = torch.Generator().manual_seed(seed)
    for name, scores in alpha.items():
        yield name, torch.rand(scores.shape, generator=generator)


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
