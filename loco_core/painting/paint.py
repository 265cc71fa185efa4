"""The one room that paints: a list of pictures in, pictures out, one by one.

    pictures  ->  those that the store has not  ->  batches  ->  map  ->  [3, H, W] uint8

What was painted before is read, what is missing is painted in batches, on this machine or, by
another `map`, on many. Nothing holds all pictures. A picture does not depend on what else is
painted, nor on how many at a time.
"""

import builtins
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._progress import bar
from ..families import Model, family_of
from ..families.checks import whole_number
from .batch import batches, donors
from .brush import painted
from .fit import USUAL, BatchSize, checked_batch_size, out_of_memory
from .picture import Picture, Sampling, checked_seeds
from .remote import Order, paint_there
from .state import state_of
from .store import Store, sealed
from .texts import Reader

__all__ = ["paint"]

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


def paint(
    pipe: Any,
    pictures: Iterable[Picture],
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    *,
    store: Store | str | Path | None = None,
    batch_size: int | str = "fit",
    map: Map = map,
    what: str = "sampling",
    state: Mapping[str, Any] | None = None,
) -> Iterator[Tensor]:
    """The pictures, [3, H, W] uint8 on the CPU, one by one and in order; each is painted once.

    pipe: a diffusers pipeline. store: a `Store` or its folder: what is there is read, what is
    painted is kept there at once. batch_size: rows of one call of the pipeline, the clean runs of
    restored pictures included; "fit" is what the memory holds (16 on a CPU). When memory runs out
    it is halved and the batch painted again. map: the builtin, or one of its shape that calls
    other processes, such as `ProcessPoolExecutor.map` or that of `engine("local:2")`: they load
    the pipeline by themselves, and write into the store. what: is said by the bar. state: of the
    model (`state_of`), if the caller knows it already.
    Raises ValueError at once for pictures and settings that do not fit the pipeline, and while it
    paints for those that are not finite. The pipeline is left as it was.

        stars = [Picture("a star", seed) for seed in range(100)]
        for pixels in paint(pipe, stars, Sampling(steps=8), store="stars"): ...
    """
    model = family_of(pipe)
    sampling, listed = sampling.checked(model), _checked(model, pictures)
    kept = Store.of(store)
    if map is not builtins.map and kept is None:
        kept = Store.temporary()
    if kept is not None and state is None:
        state = state_of(model, kept.tag)
    keys = {} if kept is None else _keys(kept, sealed(state or {}), sampling, listed)
    missing = [p for p in dict.fromkeys(listed) if kept is None or not kept.has(keys[p])]
    if not missing and batch_size == "fit":
        batch_size = 1  # nothing is to be measured
    if map is not builtins.map and batch_size == "fit":
        batch_size = USUAL
    rows = checked_batch_size(model, batch_size, sampling)
    if batch_size == 1 and any(donors([picture]) for picture in missing):
        raise ValueError(
            "batch_size 1 has no room for the clean run of a restored picture: pass 2 or more, or "
            '"fit"'
        )
    if map is not builtins.map:
        order = Order.of(pipe, sampling, kept, state) if missing else None
        stream = _elsewhere(map, order, list(batches(missing, rows)), keys, what)
    else:
        stream = _here(_Brush(model, sampling, kept, keys, rows), missing, what)
    return _in_order(listed, missing, stream, kept, keys)


@dataclass(frozen=True)
class _Brush:
    """What painting on this machine takes."""

    model: Model
    sampling: Sampling
    store: Store | None
    keys: dict[Picture, str]
    rows: BatchSize

    def __call__(
        self, reader: Reader, tick: Callable[[], object], batch: Sequence[Picture]
    ) -> list[Tensor]:
        """A batch, [3, H, W] uint8 each, and kept if there is a store. If it does not fit into
        memory it is painted in two halves, and all that follow are as small."""
        try:
            return painted(self.model, self.sampling, batch, self.store, self.keys, reader, tick)
        except Exception as error:
            if not out_of_memory(error):
                raise
            told = str(error)
        # only here, where the error and the tensors in its frames are gone, is their memory free
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            raise MemoryError(
                f"one picture does not fit into memory ({told}): pass a smaller size=, load the "
                'pipeline with dtype="bfloat16", or offload it, pipe.enable_model_cpu_offload()'
            )
        half = -(-len(batch) // 2)
        self.rows.rows = max(2, min(self.rows.rows, half))
        return [x for part in (batch[:half], batch[half:]) for x in self(reader, tick, part)]


def _here(brush: _Brush, missing: Sequence[Picture], what: str) -> Iterator[Tensor]:
    if not missing:
        return
    reader = Reader.of(brush.model, missing, brush.sampling)
    count = -(-len(missing) // brush.rows())
    with bar(count * brush.sampling.steps, what, "step") as progress:

        def tick() -> None:
            progress.update(min(1, progress.total - progress.n))

        for batch in batches(missing, brush.rows):
            yield from brush(reader, tick, batch)


def _elsewhere(
    map: Map, order: Order | None, listed: list[list[Picture]], keys: dict[Picture, str], what: str
) -> Iterator[Tensor]:
    if order is None:
        return
    with bar(len(listed), what, "batch") as progress:
        for batch, _ in zip(listed, map(partial(paint_there, order), listed), strict=True):
            progress.update()
            for picture in batch:
                yield order.store.read(keys[picture])


def _in_order(
    listed: Sequence[Picture],
    missing: Sequence[Picture],
    painted: Iterator[Tensor],
    store: Store | None,
    keys: dict[Picture, str],
) -> Iterator[Tensor]:
    """All pictures: painted now, or read; one that comes again without a store is held."""
    due, left = set(missing), Counter(listed)
    held: dict[Picture, Tensor] = {}
    for picture in listed:
        left[picture] -= 1
        if picture in due:
            due.discard(picture)
            pixels = next(painted)
            if left[picture] and store is None:
                held[picture] = pixels
        elif picture in held:
            pixels = held[picture] if left[picture] else held.pop(picture)
        else:
            assert store is not None  # only a store can have had it before
            pixels = store.read(keys[picture])
        yield pixels
    next(painted, None)  # so that the painter ends its bar and its contexts


def _keys(
    store: Store, state: str, sampling: Sampling, pictures: Sequence[Picture]
) -> dict[Picture, str]:
    return {p: store.key(state, sampling, p) for p in dict.fromkeys(pictures)}


def _checked(model: Model, pictures: Iterable[Picture]) -> list[Picture]:
    listed, layers = list(pictures), len(model.text_layers)
    for picture in listed:
        if not isinstance(picture, Picture):
            raise TypeError(f"{picture!r} is no picture: list loco.painting.Picture(prompt, seed)")
        checked_seeds([picture.seed])
        for layer, prompt in picture.reads:
            if whole_number(layer, 0, layers - 1) is None or not isinstance(prompt, str):
                raise ValueError(
                    f"{prompt!r} cannot be read at layer {layer!r}: this model has text layers 0 "
                    f"to {layers - 1}"
                )
        if picture.pooled is not None and not model.pooled:
            raise ValueError(
                f"{model.name} has no pooled text: its prompts enter only through the text layers; "
                "leave out pooled"
            )
    return listed
