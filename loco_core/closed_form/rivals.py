"""What an edit is compared with: itself somewhere else, and changes that ask nothing of the text.

An edit that erases a concept has shown something only against what erases it without knowing it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch

from .._warn import warn
from ..edits.edit import Edit, make_edit
from ..edits.low_rank import LowRankMap
from ..edits.stack import before_edit
from ..edits.weights import chosen_layers, kind_of, projections
from ..families import family_of
from ..families.checks import whole_number
from .keys import rows_of, source_of
from .recipe import recipes_of

__all__ = ["ELSEWHERE", "RIVALS", "relocated", "rivals"]

#: The edit itself, in other text layers.
ELSEWHERE = ("random window", "all layers")
RIVALS = (*ELSEWHERE, "destroyer", "mean", "noise")


def rivals(
    pipe: Any,
    edit: Edit,
    among: Sequence[str] = RIVALS,
    *,
    seed: int = 0,
    windows: int = 1,
    equal_norm: bool = True,
) -> dict[str, Edit]:
    """Edits that an edit has to be better than, by name.

    among: which of them:
        "random window"  the edit in adjacent text layers without any of its own, scaled so that its
                         change is as large, ||W' - W|| over all weights (unless equal_norm=False)
        "all layers"     the edit in every text layer
        "destroyer"      W' = 0: its weights read every token as nothing
        "mean"           its weights read every token as its part along the mean of the keys that
                         the edit was made from: W' = W m m^T / |m|^2
        "noise"          a random map of the same rank: every weight changes as much as by the edit
    seed: of the windows and of the noise. windows: how many random ones, none twice; the second is
    "random window 2". The first two are for edits of whole text layers: of others they are left
    out, as is a random window where none is free of the edit's layers (which warns).
    Raises ValueError for a name that is none of these, for an edit that knocks out single weights
    (see the `by` of `Attribution.erase`), for another model, and for more windows than there are.

        for name, rival in loco.rivals(pipe, edit).items():
            with rival.applied(pipe): ...
    """
    among = [among] if isinstance(among, str) else list(among)
    if wrong := [name for name in among if name not in RIVALS]:
        raise ValueError(f"no rival is called {wrong[0]!r}: choose from {', '.join(RIVALS)}")
    changes: Mapping[str, Any] = edit.changes
    sparse = [name for name, change in changes.items() if not isinstance(change, LowRankMap)]
    if sparse:
        raise ValueError(
            f"{edit!r} knocks out single entries, such as of {sparse[0]}: its rivals are "
            'parts.erase(by="random" | "weight" | "gradient")'
        )
    if _norm(pipe, edit) == 0:
        raise ValueError(f"{edit!r} changes nothing: there is nothing to be as large as")
    found: dict[str, Edit] = {}
    if own := layers_of(edit):
        if "random window" in among:
            found |= _random_windows(pipe, edit, seed, windows, equal_norm)
        every = range(len(family_of(pipe).text_layers))
        if "all layers" in among and len(own) < len(every):
            found["all layers"] = relocated(pipe, edit, every)
    with before_edit(edit, pipe) as weights:
        makers = {"destroyer": _destroyer, "mean": _mean, "noise": _noise}
        made = {name: makers[name](pipe, edit, weights, seed) for name in among if name in makers}
    return found | {name: _instead(edit, name, changes) for name, changes in made.items()}


def relocated(pipe: Any, edit: Edit, layers: Sequence[int]) -> Edit:
    """The same edit in other text layers: what it does there is a test of where it was put.

    The map of an edit depends on the text alone, not on the weights, so it is put on the keys and
    values of `layers` as it stands, those for keys on keys and those for values on values.
    Raises ValueError for a layer that does not exist, and for an edit that is not one of whole
    text layers (of a text encoder, composed, or for another model).

        everywhere = relocated(pipe, edit, range(len(loco.text_layers(pipe))))
    """
    maps = {kind_of(name): change for name, change in edit.changes.items()}
    own = layers_of(edit)
    if (
        not own
        or not maps.keys() <= {"k", "v"}
        or set(edit.changes) != set(projections(pipe, own, tuple(maps)))
        or any(maps[kind_of(name)] is not change for name, change in edit.changes.items())
    ):
        raise ValueError(
            f"{edit!r} is no edit of the keys and values of some text layers of this pipeline: "
            "only one made by locoedit, uce or time_edit can be put in others"
        )
    with edit.applied(pipe):  # refuses one that was made for other weights
        pass
    chosen = [x.index for x in chosen_layers(family_of(pipe).text_layers, layers)]
    changes = {name: maps[kind_of(name)] for name in projections(pipe, chosen, tuple(maps))}
    return make_edit(pipe, changes, **{**edit.provenance.settings, "layers": chosen})


def _random_windows(
    pipe: Any, edit: Edit, seed: int, windows: int, equal_norm: bool
) -> dict[str, Edit]:
    own, count = set(layers_of(edit)), len(family_of(pipe).text_layers)
    every = [range(j, j + len(own)) for j in range(count - len(own) + 1)]
    free = [window for window in every if not own & set(window)]
    if not free:
        warn(
            f"no window of {len(own)} adjacent layers of {count} is without layers of {edit!r}: it "
            "is compared with no random window"
        )
        return {}
    draws = whole_number(windows, 1, len(free))
    if draws is None:
        raise ValueError(
            f"windows={windows!r}: {len(free)} windows have none of the layers of {edit!r}; "
            f"choose from 1 to {len(free)}"
        )
    rng, found = Random(seed), {}
    for draw in range(draws):
        window = rng.choice(free)
        free.remove(window)
        rival = relocated(pipe, edit, window)
        if equal_norm:
            rival = rival.scaled(_norm(pipe, edit) / _norm(pipe, rival))
        found[f"random window {draw + 1}" if draw else "random window"] = rival
    return found


def layers_of(edit: Edit) -> list[int]:
    """The text layers that an edit was solved for; none for one of something else, or composed."""
    parts = recipes_of(edit)
    return list(parts[0].place.get("layers") or ()) if len(parts) == 1 else []


def _norm(pipe: Any, edit: Edit) -> float:
    """||W' - W|| over all weights of an edit."""
    with before_edit(edit, pipe) as weights:
        squares = [
            (change.relative_change(weights[name]) * weights[name].double().norm().item()) ** 2
            for name, change in edit.changes.items()
        ]
    return sum(squares) ** 0.5


def _destroyer(pipe: Any, edit: Edit, weights: Any, seed: int) -> dict[str, LowRankMap]:
    nothing = {d: LowRankMap(-_eye(d), _eye(d)) for d in {w.shape[1] for w in weights.values()}}
    return {name: nothing[weight.shape[1]] for name, weight in weights.items()}


def _mean(pipe: Any, edit: Edit, weights: Any, seed: int) -> dict[str, LowRankMap]:
    model, parts, maps = family_of(pipe), recipes_of(edit), {}
    if not parts:
        raise ValueError(f"{edit!r} does not say which prompts it was made from: it has no mean")
    for name in weights:
        source = source_of(model, name)
        if source not in maps:
            rows = [rows_of(model, part, source) for part in parts]
            keys = torch.cat([torch.cat([each.keys, each.kept]) for each in rows])
            m = torch.nn.functional.normalize(keys.double().cpu().mean(0), dim=0)
            maps[source] = LowRankMap(torch.outer(m, m) - _eye(len(m)), _eye(len(m)))
    return {name: maps[source_of(model, name)] for name in weights}


def _noise(pipe: Any, edit: Edit, weights: Any, seed: int) -> dict[str, LowRankMap]:
    generator, changes = torch.Generator().manual_seed(seed), {}
    for name, weight in weights.items():
        own: Any = edit.changes[name]
        D, R = (
            torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (own.D, own.R)
        )
        drawn = LowRankMap(D, R)
        changes[name] = drawn.scaled(own.relative_change(weight) / drawn.relative_change(weight))
    return changes


def _instead(edit: Edit, name: str, changes: dict[str, LowRankMap]) -> Edit:
    """An edit of the same weights with other changes, which says whose rival it is."""
    settings = {**edit.provenance.settings, "method": f"{name}, a rival"}
    made = dataclasses.replace(edit.provenance, settings=settings)
    return Edit(changes, edit.originals, made)


def _eye(width: int) -> torch.Tensor:
    return torch.eye(width, dtype=torch.float64)
