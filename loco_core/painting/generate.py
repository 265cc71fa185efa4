"""Seeded images of a pipeline, under any routing of its text: the thin door to `paint`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from ..families import Model, family_of
from ..families.base import checked_prompts
from ..interventions.routing import checked_map
from .paint import Map, paint
from .picture import Picture, Sampling, checked_seeds
from .store import Store

__all__ = ["generate"]


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Iterable[int] = (0,),
    steps: int = 25,
    guidance: float = 7.5,
    *,
    routes: Int[Tensor, "prompt layer"] | Sequence[Sequence[int]] | None = None,
    sources: Sequence[str] | None = None,
    pooled_routes: Int[Tensor, " prompt"] | Sequence[int] | None = None,
    negative_prompt: str | None = None,
    eta: float = 0.0,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | str = "fit",
    folder: str | Path | Store | None = None,
    map: Map = map,
) -> Float32[Tensor, "prompt seed 3 height width"]:
    """Images [prompt, seed, 3, H, W], float32 in [0, 1] on the 8-bit grid of PNG files, on the CPU.

    pipe: a diffusers pipeline. guidance: the CFG scale; 1 or less is without guidance.
    routes: [prompt, layer] long: the image of prompt p reads, at text layer l, the text
    sources[routes[p, l]], where `sources` are the prompts unless named; only the conditional half
    of the batch is routed. pooled_routes: [prompt] long, for a family with a pooled embedding
    beside its text layers (SD-XL): prompt p gets that of sources[pooled_routes[p]]; None: its own.
    negative_prompt: None is the pipeline's own default: SD-XL zeroes the negative embeddings if its
    config says so (the published one does), other pipelines encode ""; "" is encoded by all.
    eta: of DDIM. height, width: in pixels, both or neither; by default the pipeline's own.
    batch_size: images per call of the pipeline (with guidance the denoiser sees twice as many
    rows); "fit" is what the memory holds. folder: a store, in which every image is kept by all that
    it depends on: what is there is not painted again, so a run that was killed goes on where it
    was. map: as in `paint`.
    Raises ValueError on an empty list of prompts, a seed given twice, bad steps or guidance, routes
    that do not fit, and pictures that are not finite. The pipeline is left as it was.

        images = loco.generate(loco.load("mini-sd"), ["a star"], seeds=range(4), steps=25)
    """
    model, prompts, seeds = family_of(pipe), checked_prompts(prompts), checked_seeds(seeds)
    if (height is None) != (width is None):
        raise ValueError(f"height={height!r}, width={width!r}: give both, or neither")
    size = None if height is None or width is None else (height, width)
    sampling = Sampling(steps, guidance, negative_prompt, eta, size).checked(model)
    sources = prompts if sources is None else checked_prompts(sources)
    reads: list[tuple[tuple[int, str], ...]] = [()] * len(prompts)
    if routes is not None:
        rows = checked_map(routes, len(model.text_layers), len(sources))
        if len(rows) != len(prompts):
            raise ValueError(
                f"routes has {len(rows)} rows for {len(prompts)} prompts: give one row each"
            )
        reads = [
            tuple((layer, sources[k]) for layer, k in enumerate(row) if sources[k] != prompt)
            for prompt, row in zip(prompts, rows.tolist(), strict=True)
        ]
    pooled: list[str | None] = [None] * len(prompts)
    if pooled_routes is not None:
        chosen = _checked_pooled(model, pooled_routes, len(prompts), len(sources)).tolist()
        pooled = [
            None if sources[k] == p else sources[k] for p, k in zip(prompts, chosen, strict=True)
        ]
    pictures = [
        Picture(prompt, seed, read, own)
        for prompt, read, own in zip(prompts, reads, pooled, strict=True)
        for seed in seeds
    ]
    made = paint(pipe, pictures, sampling, store=folder, batch_size=batch_size, map=map)
    return torch.stack(list(made)).float().div(255).unflatten(0, (len(prompts), len(seeds)))


def _checked_pooled(model: Model, routes: Any, prompts: int, sources: int) -> Tensor:
    """`pooled_routes` as [prompt] long; refuses one that does not fit, and a family without."""
    if not model.pooled:
        raise ValueError(
            f"{model.name} has no pooled text: its prompts enter only through the text layers; "
            "leave out pooled_routes"
        )
    routes = torch.as_tensor(routes)
    if routes.shape != (prompts,) or routes.is_floating_point():
        raise ValueError(
            f"pooled_routes is [prompt] of whole numbers for {prompts} prompts; got "
            f"{routes.dtype} {tuple(routes.shape)}"
        )
    if routes.min() < 0 or routes.max() >= sources:
        raise ValueError(
            f"pooled_routes names sources {int(routes.min())} to {int(routes.max())}, but there "
            f"are 0 to {sources - 1}"
        )
    return routes.long()
