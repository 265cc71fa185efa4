"""From a Recipe to an Edit: one path for every closed-form method.

A method (`methods`) says which weights change and how. Here the rows are gathered from the prompts,
solved once for all weights that read the same, and bound to the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..edits.edit import Edit, make_edit
from ..edits.low_rank import LowRankMap
from ..edits.weights import kind_of, linear_of
from ..families import family_of
from .diagnostics import warn_of
from .keys import rows_of, source_of
from .recipe import Recipe
from .rows import Rows
from .solver import fit

__all__ = ["solve"]


@torch.no_grad()
def solve(pipe: Any, recipe: Recipe, names: Sequence[str]) -> Edit:
    """The Edit of the weights `names` by which they read concepts as their targets.

    Raises ValueError for weights that cannot be edited, that read something else than the prompts,
    and for rows that the solver refuses. Warns as `diagnostics.warn_of`.
    """
    model = family_of(pipe)
    widths = {name: linear_of(pipe, name).in_features for name in names}  # or the reason why not
    rows: dict[str, Rows] = {}
    maps: dict[tuple[str, float], LowRankMap] = {}
    changes: dict[str, LowRankMap] = {}
    for name in names:
        source, price = source_of(model, name), recipe.lam[kind_of(name)]
        if source not in rows:
            rows[source] = rows_of(model, recipe, source)
        if widths[name] != rows[source].keys.shape[1]:
            raise ValueError(
                f"{name} reads {widths[name]} features, but the prompts are encoded to "
                f"{rows[source].keys.shape[1]}: its keys cannot be known from the prompt alone"
            )
        if (source, price) not in maps:
            maps[source, price] = _fit(rows[source], price, recipe.scales)
        changes[name] = maps[source, price]
    lam = {kind: float(recipe.lam[kind]) for kind in sorted({*map(kind_of, names)})}
    edit = make_edit(pipe, changes, **dataclasses.replace(recipe, lam=lam).to_settings())
    warn_of(edit, pipe, rows)
    return edit


def _fit(rows: Rows, lam: float, scales: tuple[float, float]) -> LowRankMap:
    counts = torch.tensor([len(rows.keys), len(rows.kept)])
    return fit(
        rows.keys,
        rows.targets,
        lam,
        weights=torch.tensor(scales, dtype=torch.float64).repeat_interleave(counts),
        preserve=rows.kept,
        null_space=rows.exact if len(rows.exact) else None,
    )
