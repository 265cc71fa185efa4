"""How well an edit does what it was asked, and what it costs: measured in the space of keys.

The map T of an edit should read every key as its target and every preserved row as itself. What
is left, |T c - g| / |g - c| for an edited row and |T p - p| / |p| for a preserved one, is the
residual: for an edited row 0 is done and 1 is nothing done. Interference has two causes that can be
seen before any image is made: keys that point the same way (the Gram matrix of their directions),
and a solve that is badly conditioned, so that it takes a large change to tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from .._warn import warn
from ..edits.edit import Edit
from ..edits.low_rank import LowRankMap
from ..edits.stack import before_edit
from ..edits.weights import kind_of, linear_of
from ..families import family_of
from .keys import rows_of, source_of
from .recipe import recipes_of
from .rows import Rows, joined

__all__ = ["Diagnostics", "Solve", "diagnose", "warn_of"]

NEAR = 0.05  # keys closer than this part of their length nearly coincide


@dataclass(frozen=True, eq=False)
class Solve:
    """One map of an edit against the rows it was made from.

    residual: [n], |T c - g| / |g - c| of the edited rows, or / |c| for one with g = c.
    kept_residual: [p], |T p - p| / |p| of the preserved ones. directions: [n + p, d], all rows at
    length 1. condition: of lam I + C C^T, C all of these rows; how large it
    is at lam = 0 says how hard they are to tell apart. rank: of the map's change.
    labels: "prompt | token" for every row. Everywhere, edited rows come first.
    """

    residual: Tensor
    kept_residual: Tensor
    directions: Tensor
    condition: float
    rank: int
    labels: tuple[str, ...]

    @property
    def gram(self) -> Tensor:
        """[n + p, n + p], cosines between all rows: the interference map."""
        return self.directions @ self.directions.T


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """An edit, examined.

    solves: source and kind of weight ("prompt k", "prompt v") -> Solve; a composed edit whose parts
    touch different layers has several maps of one kind, and "prompt k 2" is the second.
    changes: weight name -> ||W' - W|| / ||W||. ranks: weight name -> rank of the change.
    """

    solves: Mapping[str, Solve]
    changes: Mapping[str, float]
    ranks: Mapping[str, int]

    def to_frame(self) -> pd.DataFrame:
        """A row per weight: relative change and rank."""
        return pd.DataFrame({"change": self.changes, "rank": self.ranks}).rename_axis("weight")

    def rows_to_frame(self) -> pd.DataFrame:
        """A row per edited and preserved row: prompt and token, role, residual."""
        table: list[tuple] = []
        for name, solve in self.solves.items():
            roles = ["edited"] * len(solve.residual) + ["preserved"] * len(solve.kept_residual)
            residual = torch.cat([solve.residual, solve.kept_residual]).tolist()
            table += zip([name] * len(roles), solve.labels, roles, residual, strict=True)
        return pd.DataFrame(table, columns=["solve", "row", "role", "residual"])


@torch.no_grad()
def diagnose(pipe: Any, edit: Edit) -> Diagnostics:
    """Examine `edit` on the pipeline it belongs to, applied or not; nothing is changed.

    The rows are read again from the prompts in the edit's manifest, so a loaded, scaled or composed
    edit can be examined too; if another edit changed the text encoder when this one was made, it
    must be applied now as it was then. Raises ValueError for an edit that belongs to another model,
    and for one that knocks out single weights, which was solved from no rows.

        found = loco.diagnose(pipe, edit)
        found.rows_to_frame().groupby("role").residual.max()
    """
    sparse = [n for n, change in edit.changes.items() if not isinstance(change, LowRankMap)]
    if sparse:
        raise ValueError(
            f"{edit!r} knocks out single entries of {len(sparse)} weights, such as {sparse[0]}, "
            "and there are no rows to measure: see loco.evaluate for what it does to images"
        )
    with before_edit(edit, pipe) as weights:
        maps: Mapping[str, Any] = edit.changes
        ranks = {change: change.rank for change in set(maps.values())}
        return Diagnostics(
            _solves(pipe, edit),
            {name: change.relative_change(weights[name]) for name, change in maps.items()},
            {name: ranks[change] for name, change in maps.items()},
        )


def _solves(pipe: Any, edit: Edit) -> dict[str, Solve]:
    """A Solve for every source and kind of weight, and every map that serves them."""
    model, parts = family_of(pipe), recipes_of(edit)

    @cache
    def rows(part: int, source: str) -> Rows:
        return rows_of(model, parts[part], source)

    solves: dict[str, Solve] = {}
    maps: dict[str, list[LowRankMap]] = {}
    change: Any  # a LowRankMap: `diagnose` has refused the others
    for name, change in edit.changes.items():
        source, kind = source_of(model, name), kind_of(name)
        known = maps.setdefault(f"{source} {kind}", [])
        made = [i for i, part in enumerate(parts) if name in (part.weights or edit.changes)]
        if made and change not in known:
            known.append(change)
            number = f" {len(known)}" if len(known) > 1 else ""
            lam = min(parts[i].lam[kind] for i in made)
            found = joined([rows(i, source) for i in made])
            solves[f"{source} {kind}{number}"] = examine(change, found, lam)
    return solves


def examine(change: LowRankMap, rows: Rows, lam: float) -> Solve:
    """One map against its rows."""
    C, G, K = rows.keys.double().cpu(), rows.targets.double().cpu(), rows.kept.double().cpu()
    every = torch.cat([C, K])
    left = (C + _moved(change, C) - G).norm(dim=1)
    asked = (G - C).norm(dim=1)
    # a row that is its own target has nothing to do: measured against its length instead
    floor = torch.where(asked > 0, asked, C.norm(dim=1).clamp_min(1e-300))
    return Solve(
        residual=left / floor,
        kept_residual=_moved(change, K).norm(dim=1) / K.norm(dim=1).clamp_min(1e-300),
        directions=every / every.norm(dim=1, keepdim=True).clamp_min(1e-300),
        condition=_condition(every, lam),
        rank=change.rank,
        labels=(*rows.labels, *rows.kept_labels),
    )


def warn_of(edit: Edit, pipe: Any, rows: Mapping[str, Rows]) -> None:
    """Warn of a change larger than its weight, and of rows that nearly coincide but disagree.

    rows: source -> what the maps of the edit were solved from.
    """
    large = {
        name: ratio
        for name, change in edit.changes.items()
        if (ratio := change.relative_change(linear_of(pipe, name).weight)) > 1
    }
    if large:
        worst = max(large, key=large.__getitem__)
        warn(
            f"{edit!r} changes {len(large)} of {len(edit.changes)} weights by more than "
            f"themselves, {worst} {large[worst]:.3g} times: the model will read everything "
            "differently; use a larger lam, fewer rows, or a target closer to the prompts",
        )
    for found in rows.values():
        if pair := _contradiction(found):
            warn(
                f"two rows of {edit!r} nearly coincide but shall be read differently: "
                f"{pair[0]!r} and {pair[1]!r}; drop one of the prompts, or expect neither to hold",
            )


def _contradiction(rows: Rows) -> tuple[str, str] | None:
    """The labels of two keys that nearly coincide while their changes differ much more."""
    every = torch.cat([rows.keys, rows.kept]).double().cpu()
    change = torch.zeros_like(every)
    change[: len(rows.keys)] = (rows.targets - rows.keys).double().cpu()
    near = torch.cdist(rows.keys.double().cpu(), every)
    near.diagonal().fill_(torch.inf)
    apart = torch.cdist(change[: len(rows.keys)], change)
    length = every.norm(dim=1)[: len(rows.keys), None]
    bad = (near < NEAR * length) & (apart > NEAR * length) & (apart > 10 * near)
    if not bad.any():
        return None
    i, j = bad.nonzero()[0].tolist()
    labels = (*rows.labels, *rows.kept_labels)
    return labels[i], labels[j]


def _condition(C: Tensor, lam: float) -> float:
    """Of lam I + C C^T, from the singular values of C: [row, d]."""
    squares = torch.linalg.svdvals(C).square()
    least = squares.min() if len(C) <= C.shape[1] else 0.0
    return float((squares.max() + lam) / torch.as_tensor(least + lam, dtype=C.dtype))


def _moved(change: LowRankMap, rows: Tensor) -> Tensor:
    """(T - I) of every row: [row, d]."""
    return rows @ change.R.T @ change.D.T
