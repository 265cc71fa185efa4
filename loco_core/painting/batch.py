"""One batch: pictures as the rows of one call of the pipeline.

A row reads at each text layer what its picture says (`interventions.routing`). A picture whose
sites are restored needs the clean run beside it: that row is in the batch, among the pictures or in
front of them, and its activations are copied while both are computed (`interventions.patching`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from ..families import Model, Site
from ..interventions.patching import copies, rewriting
from ..interventions.routing import routed
from .picture import Picture, Sampling
from .texts import Reader, own, plain

__all__ = ["batches", "paint_batch"]


@torch.no_grad()
def paint_batch(
    model: Model,
    pictures: Sequence[Picture],
    sampling: Sampling,
    reader: Reader | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Float32[Tensor, "row 3 height width"]:
    """The pictures, [row, 3, H, W] float32 in [0, 1] on the CPU, not rounded to 8 bits.

    reader: has encoded what they read; by default that is done here. tick: called after each step.
    Raises ValueError for pictures that are not finite, and what `Model.call` refuses. The pipeline
    is left as it was.

        paint_batch(family_of(pipe), [Picture("a star", seed) for seed in range(4)], Sampling())
    """
    reader = Reader.of(model, pictures, sampling) if reader is None else reader
    rows = [*donors(pictures), *pictures]
    readings = [own(p) for p in rows]
    readings += [plain(prompt) for p in rows for _, prompt in p.reads]
    readings += [plain(p.pooled) for p in rows if p.pooled is not None]
    number = {reading: i for i, reading in enumerate(dict.fromkeys(readings))}
    texts = reader.table(list(number))
    states = texts[[number[own(p)] for p in rows]]
    if texts.pooled is not None:
        at = [number[own(p) if p.pooled is None else plain(p.pooled)] for p in rows]
        states = dataclasses.replace(states, pooled=texts.pooled[at])
    places = model.conditional_rows(len(rows), sampling.guidance)
    routing: Any = nullcontext()
    patching: Any = nullcontext()
    if any(p.reads for p in rows):
        src = torch.tensor([[number[own(p)]] * len(model.text_layers) for p in rows])
        for b, picture in enumerate(rows):
            for layer, prompt in picture.reads:
                src[b, layer] = number[plain(prompt)]
        routing = routed(model.pipe, texts, src, places)
    if patched := {b: _sites(p) for b, p in enumerate(rows) if _sites(p)}:
        at = places.tolist()
        gets = {
            at[b]: [(at[rows.index(rows[b].clean)], model.module_of(s), None) for s in sites]
            for b, sites in patched.items()
        }
        (calls,) = {rows[b].calls for b in patched}  # see `batches`
        patching = rewriting(copies(gets), model.denoiser, calls)
    with routing, patching:
        images = model.call(
            states,
            reader.negative[[0] * len(rows)],
            [p.seed for p in rows],
            steps=sampling.steps,
            guidance=sampling.guidance,
            eta=sampling.eta,
            size=sampling.size,
            tick=tick,
        )
    return images[len(rows) - len(pictures) :]


def donors(pictures: Sequence[Picture]) -> list[Picture]:
    """The clean runs that pictures of one batch need and that are not among them."""
    wanted = dict.fromkeys(p.clean for p in pictures if _sites(p))
    return [clean for clean in wanted if clean not in pictures]


def batches(pictures: Sequence[Picture], size: Callable[[], int]) -> Iterator[list[Picture]]:
    """The pictures in order, cut in batches of at most size() rows, their clean runs included.

    Where sites are restored, a batch has one clean run and restores at the same calls of the
    denoiser; where words are noised, it has one prompt, whose clean reading is encoded once.
    """
    restored = any(map(_sites, pictures))
    noised = any(picture.noise for picture in pictures)

    def group(picture: Picture) -> object:
        return picture.clean if restored else picture.prompt if noised else None

    batch: list[Picture] = []
    for picture in pictures:
        more = [*batch, picture]
        alike = len({group(p) for p in more}) == 1 and len({p.calls for p in more if _sites(p)}) < 2
        if batch and (not alike or len(more) + len(donors(more)) > size()):
            yield batch
            more = [picture]
        batch = more
    if batch:
        yield batch


def _sites(picture: Picture) -> list[Site]:
    """The sites of the denoiser that are restored."""
    return [site for label in picture.restored if (site := Site.of(label)).token is None]
