"""What a closed-form edit is made from: its prompts, its prices, where it goes.

A Recipe is all that an edit's rows depend on. It is written into the edit's provenance, so that an
edit can be examined, scaled and compared with rivals long after it was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

from ..concepts import Concept
from ..edits.edit import Edit, parts_of
from ..families.tokens import several, with_targets

__all__ = ["Recipe", "recipe", "recipes_of"]


@dataclass(frozen=True)
class Recipe:
    """What one solve is made from.

    method: its name. family: of the pipeline. concepts: each with the prompts that it is read as.
    lam: by kind of weight ("k", "v", "out"). tokens: which of a prompt are edited, see
    `families.tokens`. preserve, null_space: prompts that are held as far as possible, and exactly.
    scales: weights of edited and of preserved rows. place: {"layers": [...]} of text layers, or
    {"layer": i} of a text encoder. weights: the names of those it changes; None: all of the edit's.
    """

    method: str
    family: str
    concepts: tuple[Concept, ...]
    lam: Mapping[str, float]
    tokens: str
    preserve: tuple[str, ...] = ()
    null_space: tuple[str, ...] | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    place: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[str, ...] | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """All that the edit was made from: prompts of the concepts, preserved and held ones."""
        own = [prompt for concept in self.concepts for prompt in concept.prompts]
        return (*own, *self.preserve, *(self.null_space or ()))

    def to_settings(self) -> dict[str, Any]:
        """As JSON values, for the provenance of an edit."""
        return {
            "method": self.method,
            "family": self.family,
            "concepts": [asdict(concept) for concept in self.concepts],
            "tokens": self.tokens,
            "preserve": list(self.preserve),
            "null_space": None if self.null_space is None else list(self.null_space),
            "scales": list(self.scales),
            **self.place,
            "lam": dict(self.lam),
        }


def recipe(
    method: str,
    family: str,
    concept: Concept | Sequence[Concept],
    lam: Mapping[str, float],
    *,
    tokens: str,
    target: str | Sequence[str] | None = None,
    preserve: Sequence[str] = (),
    null_space: Sequence[str] | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    **place: Any,
) -> Recipe:
    """A Recipe of what a user asks for.

    target: see `families.tokens.with_targets`. Raises ValueError for prompts that are no list, for
    one list of targets for several concepts, and for a scale that is negative or not finite.
    """
    concepts = several(concept)
    if len(concepts) > 1 and target is not None and not isinstance(target, str):
        raise ValueError(
            "one list of target prompts cannot serve several concepts: give each its own, "
            "loco.Concept(..., target=[...]), and pass target='target'"
        )
    for name, scale in zip(("erase_scale", "preserve_scale"), scales, strict=True):
        if not (isinstance(scale, Real) and math.isfinite(scale) and scale >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, not {scale!r}; 1 is usual")
    return Recipe(
        method,
        family,
        tuple(with_targets(item, target) for item in concepts),
        lam,
        tokens,
        _prompts("preserve", preserve),
        None if null_space is None else _prompts("null_space", null_space),
        (float(scales[0]), float(scales[1])),
        place,
    )


def recipes_of(edit: Edit) -> list[Recipe]:
    """What an edit was made from: of a composed one every part, none of what was not solved."""
    return [_read(part) for part in parts_of(edit.provenance.settings) if "lam" in part]


def _read(part: Mapping[str, Any]) -> Recipe:
    null_space, weights = part.get("null_space"), part.get("weights")
    erase, preserve = part.get("scales", (1.0, 1.0))
    return Recipe(
        part["method"],
        part.get("family", ""),
        tuple(Concept(**concept) for concept in part["concepts"]),
        part["lam"],
        part["tokens"],
        tuple(part.get("preserve", ())),
        None if null_space is None else tuple(null_space),
        (erase, preserve),
        {name: part[name] for name in ("layers", "layer") if name in part},
        None if weights is None else tuple(weights),
    )


def _prompts(name: str, prompts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(prompts, str):
        raise ValueError(f"{name} must be a list of prompts: pass [{prompts!r}]")
    return tuple(prompts)
