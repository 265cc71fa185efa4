"""A sweep: many things are done to the same pictures, one at a time, and scored.

    LocoGen            an item is a window of layers that read the neutral text;
                       reference: nothing is replaced, goal: everything is
    causal tracing     an item is a site that is restored;
                       reference: the corrupted run, goal: the clean run

Either way an item is judged by its paired difference to the reference, picture by picture, and the
best of many by a test that knows how many there were (`statistics.max_t`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import records
from ..concepts import Concept
from ..families import Model
from ..judging.score import Score, scores_of
from ..painting.images import Images, Stored
from ..painting.meter import metered
from ..painting.paint import Map, paint
from ..painting.picture import Picture, Sampling
from ..painting.state import state_of
from ..painting.store import Store, sealed
from ..statistics import MaxT, max_t, t_interval, units, units_of

__all__ = ["Cell", "Painting", "Sweep", "Swept", "sweep"]

AT_ONCE = 32  # pictures that a score is given at most
NUMBERS = 2**24  # and in them: 64 MB, five pictures of 1024 pixels


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a localiser painted, and how it scored. Everything lives on the CPU.

    items: what was done, item by item. scored: [item, prompt, draw, seed] float64; reference,
    goal: [prompt, draw, seed], see above. sign: 1 if an item that carries the concept scores
    higher than the reference, -1 if lower. pixels: [2 + item, prompt, draw, seed, 3, H, W] uint8,
    read when asked for, or None. cost: rows of the denoiser that painting takes, a row backward
    counted twice.
    """

    concept: Concept
    items: tuple[tuple[Any, ...], ...]
    scored: Tensor
    reference: Tensor
    goal: Tensor
    sign: int
    pixels: Any
    cost: float = field(compare=False)
    provenance: records.Provenance

    @property
    def paired(self) -> Tensor:
        """Difference to the reference, larger = carries more: [item, prompt, draw, seed]."""
        return self.sign * (self.scored - self.reference)

    @property
    def effects(self) -> Tensor:
        """Mean paired difference of each item: [item] float64."""
        return self.paired.flatten(1).mean(1)

    @property
    def effects_interval(self) -> Tensor:
        """95 % t interval of each effect over prompts (draws and seeds are averaged), of a single
        prompt over its seeds: [item, 2] float64 (low, high), NaN for a single picture. Each holds
        for its item alone, not for the largest of many: that is `test`."""
        return t_interval(units(self.paired.mean(2)))

    @property
    def test(self) -> MaxT:
        """Whether any item has an effect, and which: see `statistics.max_t`.

        found.test.verdict, found.test.p, found.test.held_back
        """
        values, unit = units_of(self.paired.mean(2))
        return max_t(values, unit=unit)

    @property
    def gap(self) -> float:
        """How far goal and reference are apart, in the direction of an effect."""
        return self.sign * float(self.goal.mean() - self.reference.mean())

    @property
    def images(self) -> Images:
        """Pictures of the items, in [0, 1], read when asked for: [item, ...]."""
        return self.sheet.rows(slice(2, None))

    @property
    def sheet(self) -> Images:
        """All pictures, in [0, 1], read when asked for: the two ends, then the items."""
        if self.pixels is None:
            raise ValueError("the pictures were not kept: paint again with images=True")
        return Images(self.pixels)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and records.same(self, other)


@dataclass(frozen=True)
class Painting:
    """How the pictures of a sweep are painted: as the arguments of `painting.paint`."""

    sampling: Sampling
    store: Store | None
    batch_size: int | str
    map: Map


@dataclass(frozen=True)
class Cell:
    """One picture of a sweep, the text it is scored by, and its places in the flat table."""

    picture: Picture
    text: str
    at: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Swept:
    """scores: [...] float64. pixels: of the same places, or None. cost: rows of the denoiser."""

    scores: Tensor
    pixels: Any
    cost: float


def sweep(
    model: Model,
    cells: Sequence[Cell],
    shape: tuple[int, ...],
    score: Score,
    painting: Painting,
    what: str,
) -> Swept:
    """Paint the cells and score them as they come: a table of `shape`, filled by `Cell.at`.

    No more than `AT_ONCE` pictures are scored at a time; with a store they are kept there.
    """
    store = painting.store
    state = None if store is None else state_of(model, store.tag)
    table = torch.full(shape, float("nan"), dtype=torch.float64).flatten()
    stream = paint(
        model.pipe, (cell.picture for cell in cells), painting.sampling, store=store,
        batch_size=painting.batch_size, map=painting.map, what=what, state=state,
    )  # fmt: skip
    due: list[tuple[Cell, Tensor]] = []
    size: tuple[int, ...] = ()

    def fold() -> None:
        images = torch.stack([pixels for _, pixels in due]).float().div(255)
        values = scores_of(score, images, [cell.text for cell, _ in due])
        for (cell, _), value in zip(due, values, strict=True):
            table[list(cell.at)] = value
        due.clear()

    with metered(model) as cost:
        for cell, pixels in zip(cells, stream, strict=True):
            size = tuple(pixels.shape)
            due.append((cell, pixels))
            if len(due) >= min(AT_ONCE, max(1, NUMBERS // pixels.numel())):
                fold()
    if due:
        fold()
    if store is None or state is None:
        return Swept(table.reshape(shape), None, cost.rows)
    sampling, keys = painting.sampling.checked(model), [""] * len(table)
    rows = 0.0
    for cell in cells:
        key = store.key(sealed(state), sampling, cell.picture)
        rows += float(store.facts(key)["rows"])
        for at in cell.at:
            keys[at] = key
    return Swept(table.reshape(shape), Stored(store, tuple(keys), (*shape, *size)), rows)
