"""From what is asked to an Edit: one path for every closed-form method.

A method (`cross_attention`, `quickfix`) says which weights change and with which settings. Here the
rows are gathered from the prompts, solved once for all weights that read the same, and bound to the
model. The settings alone determine the rows, so an edit can be examined long after it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..concepts import Concept
from ..edits.edit import Edit, make_edit
from ..edits.low_rank import LowRankMap
from ..edits.weights import kind_of, linear_of
from ..families import family_of
from .diagnostics import warn_of
from .keys import rows_of, source_of
from .rows import Rows, several, with_targets
from .solver import fit

__all__ = ["solve"]


@torch.no_grad()
def solve(
    pipe: Any,
    names: Sequence[str],
    concept: Concept | Sequence[Concept],
    *,
    method: str,
    lam: dict[str, float],
    tokens: str,
    target: str | Sequence[str] | None = None,
    preserve: Sequence[str] = (),
    null_space: Sequence[str] | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    **more: Any,
) -> Edit:
    """The Edit of the weights `names` by which they read `concept` as its target.

    lam: by kind of weight, "k", "v" or "out". scales: weights of edited and of preserved rows.
    more: settings to record. Several concepts are solved together, with all their rows.
    """
    concepts = several(concept)
    if len(concepts) > 1 and target is not None and not isinstance(target, str):
        raise ValueError(
            "one list of target prompts cannot serve several concepts: give each its own, "
            "loco.Concept(..., target=[...]), and pass target='target'"
        )
    settings = {
        "method": method,
        "family": family_of(pipe).name,
        "concepts": [asdict(with_targets(item, target)) for item in concepts],
        "tokens": tokens,
        "preserve": _prompts("preserve", preserve),
        "null_space": None if null_space is None else _prompts("null_space", null_space),
        "scales": [float(scale) for scale in scales],
        **more,
    }
    widths = {name: linear_of(pipe, name).in_features for name in names}  # or the reason why not
    rows: dict[str, Rows] = {}
    maps: dict[tuple[str, float], LowRankMap] = {}
    changes: dict[str, LowRankMap] = {}
    for name in names:
        source, price = source_of(pipe, name), lam[kind_of(name)]
        if source not in rows:
            rows[source] = rows_of(pipe, settings, source)
        if widths[name] != rows[source].keys.shape[1]:
            raise ValueError(
                f"{name} reads {widths[name]} features, but the prompts are encoded to "
                f"{rows[source].keys.shape[1]}: its keys cannot be known from the prompt alone"
            )
        if (source, price) not in maps:
            maps[source, price] = _fit(rows[source], price, scales)
        changes[name] = maps[source, price]
    settings["lam"] = {kind: float(lam[kind]) for kind in sorted({*map(kind_of, names)})}
    edit = make_edit(pipe, changes, **settings)
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


def _prompts(name: str, prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        raise ValueError(f"{name} must be a list of prompts: pass [{prompts!r}]")
    return list(prompts)
