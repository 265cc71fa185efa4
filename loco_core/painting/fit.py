"""How many pictures fit into memory at a time: measured at first, halved when it was too many."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from ..families import Model, family_of
from .batch import paint_batch
from .picture import Picture, Sampling

__all__ = ["BatchSize", "checked_batch_size", "fitting_batch", "images_in", "out_of_memory"]

USUAL = 16  # on a CPU


@dataclass
class BatchSize:
    """Rows of one call of the pipeline, from now on."""

    rows: int

    def __call__(self) -> int:
        return self.rows


def checked_batch_size(model: Model, batch_size: int | str, sampling: Sampling) -> BatchSize:
    """`batch_size` as a number; "fit" is measured. Raises ValueError for anything else."""
    if isinstance(batch_size, str) and batch_size == "fit":
        return BatchSize(_fitting(model, sampling, 64))
    number = isinstance(batch_size, Integral) and not isinstance(batch_size, bool)
    if not number or int(batch_size) < 1:
        raise ValueError(f'batch_size {batch_size!r} is not a whole number from 1 on, nor "fit"')
    return BatchSize(int(batch_size))


def fitting_batch(pipe: Any, guidance: float = 7.5, most: int = 64) -> int:
    """How many images one call of `pipe` can make in the memory that is free now.

    pipe: a diffusers pipeline, already on its device. guidance: as in `generate`; without it a
    batch holds twice as many. On a GPU one image and then two are sampled for one step: what the
    second adds is the price of each further one, and nine tenths of the free memory are spent, on
    at most `most` images. On a CPU it is 16, or `most`.

        images = loco.generate(pipe, prompts, batch_size=fitting_batch(pipe))
    """
    return _fitting(family_of(pipe), Sampling(guidance=guidance), most)


def _fitting(model: Model, sampling: Sampling, most: int) -> int:
    device = torch.device(model.device)
    if device.type != "cuda":
        return min(USUAL, most)
    once = Sampling(1, sampling.guidance, size=sampling.size)

    def peak(images: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        paint_batch(model, [Picture("", seed) for seed in range(images)], once)
        return torch.cuda.max_memory_allocated(device) - before

    try:
        one, two = peak(1), peak(2)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return 1
    finally:
        torch.cuda.empty_cache()
    return images_in(0.9 * torch.cuda.mem_get_info(device)[0], one, two, most)


def images_in(free: float, one: int, two: int, most: int) -> int:
    """The largest n from 1 to `most` with one + (n - 1) (two - one) <= free, all in bytes.

    >>> images_in(free=10, one=4, two=6, most=64)
    4
    """
    further = max(two - one, 1)
    return max(1, min(most, 1 + int((free - one) // further)))


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    told = str(error)
    return isinstance(error, RuntimeError) and (
        "allocate memory" in told or "out of memory" in told.lower()
    )
