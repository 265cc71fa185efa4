"""Pictures that are made once: remembered by everything they depend on."""

import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ... import records
from ...families import family_of
from ...painting.state import state_of
from ..pixels import eight_bit


@dataclass(frozen=True, eq=False)
class Made:
    """One result. images: [row, column, 3, H, W], on the 8-bit grid of [0, 1]. notes: the warnings
    that came with it."""

    pixels: NDArray  # uint8
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> NDArray:
        return self.pixels / np.float64(255)


class Results:
    """compute(**values) -> images, made once per key and state of the model.

    A result is known by its key (JSON), `inputs` (JSON: all else that `compute` depends on) and,
    with `pipe`, its weights, dtype, scheduler and libraries. The `size` results used last are kept
    in memory; with `folder` all of them, there. Not for two threads at once.
    Raises ValueError for images that are not [row, column, 3, H, W] (leading axes may be left out)
    and for a file in `folder` that is damaged.

        results = Results(lambda seed: loco.generate(pipe, ["a star"], [seed])[0], pipe)
        results({"seed": 0}, seed=0).images
    """

    def __init__(
        self,
        compute: Callable[..., ArrayLike],
        pipe: Any = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        size: int = 32,
        folder: str | Path | None = None,
    ) -> None:
        if folder is not None and (pipe is None or not inputs):
            raise ValueError(
                "a folder outlives this notebook: name with pipe= and inputs= what the pictures "
                'depend on besides the choices, such as inputs={"prompt": prompt, "steps": 25}'
            )
        self.compute, self.pipe, self.inputs = compute, pipe, dict(inputs or {})
        self.size, self.folder = size, None if folder is None else Path(folder)
        self.kept: OrderedDict[str, Made] = OrderedDict()

    def __call__(self, key: Mapping[str, Any], **values: Any) -> Made:
        digest = self._digest(key)
        made = self.kept.get(digest) or self._read(digest)
        if made is None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pixels = grid_of(self.compute(**values))
            notes = tuple(dict.fromkeys(str(warning.message) for warning in caught))
            made = Made(pixels, notes)
            self._write(digest, made)
        self.kept[digest] = made
        self.kept.move_to_end(digest)
        while len(self.kept) > self.size:
            self.kept.popitem(last=False)
        return made

    def _digest(self, key: Mapping[str, Any]) -> str:
        state = None
        if self.pipe is not None:  # what stays in memory need not outlive a hook of somebody else
            state = state_of(family_of(self.pipe), None if self.folder else "in memory")
        known = [key, self.inputs, state, records.versions()]
        text = json.dumps(known, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _read(self, digest: str) -> Made | None:
        if self.folder is None or not (self.folder / f"{digest}.safetensors").is_file():
            return None
        kept = records.load(_Kept, self.folder, digest)
        return Made(kept.pixels.numpy(), kept.notes)

    def _write(self, digest: str, made: Made) -> None:
        if self.folder is not None:
            kept = _Kept(torch.from_numpy(made.pixels), tuple(made.notes))
            records.save(kept, self.folder, digest)


@dataclass(frozen=True, eq=False)
class _Kept:
    """A result as it lies in a folder."""

    pixels: torch.Tensor
    notes: tuple[str, ...]


def grid_of(images: ArrayLike) -> NDArray[np.uint8]:
    """[row, column, 3, H, W] uint8 of pictures whose leading axes may be left out."""
    pixels = eight_bit(images)
    if pixels.ndim > 5:
        raise ValueError(f"pictures are at most [row, column, 3, H, W]; got {pixels.shape}")
    return pixels.reshape((1,) * (5 - pixels.ndim) + pixels.shape)
