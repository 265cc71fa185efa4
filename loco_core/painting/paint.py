"""Seeded images of a pipeline, in batches, under any routing of its text.

The pipeline itself is called, with its own scheduler, image size and decoder, so one that was
subclassed keeps working. Row by row the noise comes from a CPU generator of its own: an image does
not depend on the batch it was made in, nor on the device or the dtype its noise is used in.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from .. import records
from .._progress import bar
from ..families import Model, TextStates, family_of
from ..families.latent import own_scheduler
from ..families.text import checked_prompts
from ..interventions.routing import checked_map, routed


@torch.no_grad()
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
    batch_size: int = 16,
    folder: str | Path | None = None,
) -> Float32[Tensor, "prompt seed 3 height width"]:
    """Images [prompt, seed, 3, H, W], float32 in [0, 1], on the CPU.

    pipe: a diffusers pipeline. guidance: the CFG scale; 1 or less is without guidance.
    routes: [prompt, layer] long: the image of prompt p reads, at text layer l, the text
    sources[routes[p, l]], where `sources` are the prompts unless named; only the conditional half
    of the batch is routed. pooled_routes: [prompt] long, for a family with a pooled embedding
    beside its text layers (SD-XL): prompt p gets that of sources[pooled_routes[p]]; None: its own.
    negative_prompt: None is the pipeline's own default: SD-XL zeroes the negative embeddings if its
    config says so (the published one does), other pipelines encode ""; "" is encoded by all.
    eta: of DDIM. batch_size: images per call of the pipeline (with guidance the denoiser sees
    twice as many rows). folder: each finished batch is kept there, and a run that was killed goes
    on where it was; the result is the same.
    Raises ValueError on an empty list of prompts, a seed given twice, bad steps or guidance, routes
    that do not fit, and a folder that holds another run. The pipeline is left as it was.

        images = loco.generate(loco.load("mini-sd"), ["a star"], seeds=range(4), steps=25)
    """
    model = family_of(pipe)
    prompts, seeds = checked_prompts(prompts), checked_seeds(seeds)
    check_settings(pipe, steps, guidance, batch_size)
    sources = prompts if sources is None else checked_prompts(sources)
    unique = list(dict.fromkeys([*prompts, *sources]))
    texts = model.encode([*unique, "" if negative_prompt is None else negative_prompt])
    negative = model.unprompted(texts[-1:]) if negative_prompt is None else texts[-1:]
    place = torch.tensor([unique.index(p) for p in prompts])
    pooled = place
    if routes is not None:
        routes = checked_map(routes, len(model.text_layers), len(sources))
        if len(routes) != len(prompts):
            raise ValueError(
                f"routes has {len(routes)} rows for {len(prompts)} prompts: give one row each"
            )
        routes = torch.tensor([unique.index(p) for p in sources])[routes]
    if pooled_routes is not None:
        pooled = _checked_pooled(model, pooled_routes, len(prompts), len(sources))
        pooled = torch.tensor([unique.index(p) for p in sources])[pooled]
    cells = [(p, s) for p in range(len(prompts)) for s in seeds]
    batches = [cells[i : i + batch_size] for i in range(0, len(cells), batch_size)]
    settings = {
        "texts": unique,
        "prompts": place.tolist(),
        "routes": None if routes is None else torch.as_tensor(routes).tolist(),
        "pooled_routes": None if pooled_routes is None else pooled.tolist(),
        "seeds": seeds,
        "steps": steps,
        "guidance": guidance,
        "negative_prompt": negative_prompt,
        "eta": eta,
        "batch_size": batch_size,
        "dtype": str(texts.embeds.dtype),
        "scheduler": type(pipe.scheduler).__name__,
    }
    parts = None if folder is None else records.Parts.of(folder, pipe, **settings)
    images = []
    with own_scheduler(pipe), bar(len(batches) * steps, "sampling", "step") as progress:
        for number, batch in enumerate(batches):
            made = None if parts is None else parts.read(number)
            if made is None:
                index = torch.tensor([p for p, _ in batch])
                src = None if routes is None else routes[index]
                rows = texts[place[index]]
                if texts.pooled is not None:
                    rows = dataclasses.replace(rows, pooled=texts.pooled[pooled[index]])
                made = sample_batch(
                    pipe, texts, rows, negative, [s for _, s in batch], src, steps, guidance, eta,
                    progress,
                )  # fmt: skip
                if parts is not None:
                    parts.write(number, made)
            else:
                progress.update(steps)
            images.append(made)
    return torch.cat(images).unflatten(0, (len(prompts), len(seeds)))


def sample_batch(
    pipe: Any,
    texts: TextStates,
    rows: TextStates,
    negative: TextStates,
    seeds: list[int],
    src: Int[Tensor, "row layer"] | None,
    steps: int,
    guidance: float,
    eta: float,
    progress: Any,
) -> Float32[Tensor, "row 3 height width"]:
    """One batch: rows[b] with seeds[b], where src[b] routes it to `texts`."""
    model = family_of(pipe)
    places = model.conditional_rows(len(seeds), guidance)
    routing = nullcontext() if src is None else routed(pipe, texts, src, places)
    with routing:
        return model.call(
            rows,
            negative,
            seeds,
            steps=steps,
            guidance=guidance,
            eta=eta,
            tick=lambda: progress.update(min(1, progress.total - progress.n)),
        )


def fitting_batch(pipe: Any, guidance: float = 7.5, most: int = 64) -> int:
    """How many images one call of `pipe` can make in the memory that is free now.

    pipe: a diffusers pipeline, already on its device. guidance: as in `generate`; without it a
    batch holds twice as many. On a GPU one image and then two are sampled for one step: what the
    second adds is the price of each further one, and nine tenths of the free memory are spent, on
    at most `most` images. On a CPU it is 16, or `most`.

        images = loco.generate(pipe, prompts, batch_size=fitting_batch(pipe))
    """
    device = torch.device(pipe._execution_device)
    if device.type != "cuda":
        return min(16, most)

    def peak(images: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        generate(pipe, [""] * images, steps=1, guidance=guidance, batch_size=images)
        return torch.cuda.max_memory_allocated(device) - before

    one, two = peak(1), peak(2)
    torch.cuda.empty_cache()
    return images_in(0.9 * torch.cuda.mem_get_info(device)[0], one, two, most)


def images_in(free: float, one: int, two: int, most: int) -> int:
    """The largest n from 1 to `most` with one + (n - 1) (two - one) <= free, all in bytes.

    >>> images_in(free=10, one=4, two=6, most=64)
    4
    """
    further = max(two - one, 1)
    return max(1, min(most, 1 + int((free - one) // further)))


def checked_seeds(seeds: Iterable[int]) -> list[int]:
    """`seeds` as a list; refuses none at all, one given twice, and what is no whole number."""
    seeds = list(seeds)
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed!r} is not a whole number from 0 on")
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise ValueError("no seed is given: pass for example seeds=range(4)")
    if twice := [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
        raise ValueError(f"seeds {twice} are given twice: an image would be counted twice")
    return seeds


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


def check_settings(pipe: Any, steps: int, guidance: float, batch_size: int) -> None:
    """Raises ValueError for settings of a sampling that the pipeline cannot do."""
    most = pipe.scheduler.config.num_train_timesteps
    if isinstance(steps, bool) or not isinstance(steps, Integral) or not 1 <= steps <= most:
        raise ValueError(f"steps {steps!r} is not a whole number from 1 to {most}")
    if not isinstance(guidance, int | float) or not 0 <= guidance < math.inf:
        raise ValueError(f"guidance {guidance!r} is not a number from 0 on; 7.5 is usual")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size {batch_size!r} is not a whole number from 1 on")
