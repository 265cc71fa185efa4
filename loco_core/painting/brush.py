"""A batch as bytes: painted, put on the 8-bit grid, and kept if there is a store."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..families import Model
from ..records import model_name
from .batch import paint_batch
from .meter import metered
from .picture import Picture, Sampling
from .store import Store
from .texts import Reader

__all__ = ["painted"]


def painted(
    model: Model,
    sampling: Sampling,
    batch: Sequence[Picture],
    store: Store | None,
    keys: Mapping[Picture, str],
    reader: Reader | None = None,
    tick: Callable[[], object] = lambda: None,
) -> list[Tensor]:
    """The pictures of a batch, [3, H, W] uint8 each; with a store, each is kept under its key with
    what it is and the rows of the denoiser that it took. Errors as `paint_batch`."""
    with metered(model) as cost:
        images = paint_batch(model, batch, sampling, reader, tick)
    pixels = [image.mul(255).round().to(torch.uint8) for image in images]
    del images  # 12 MB for each of 1024 pixels
    if store is not None:
        for picture, x in zip(batch, pixels, strict=True):
            store.write(
                keys[picture], x, model=model_name(model.pipe), prompt=picture.prompt,
                seed=picture.seed, picture=picture.to_json(), sampling=sampling.to_json(),
                rows=cost.rows / len(batch),
            )  # fmt: skip
    return pixels
