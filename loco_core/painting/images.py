"""Pictures of a result: where they are kept, and how they are read when they are asked for."""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .store import Store

__all__ = ["Held", "Images", "Pixels", "Stored"]


class Pixels(Protocol):
    """Pictures [..., 3, H, W] uint8 that are read one by one: `Stored`, or `records.Stack`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, index: int) -> Tensor: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True, eq=False)
class Stored:
    """Pictures of a store: those with `keys`, in order, as [..., 3, H, W] uint8 of `shape`."""

    store: Store
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype = torch.uint8

    def __getitem__(self, index: int) -> Tensor:
        return self.store.read(self.keys[operator.index(index)])

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.store.read, self.keys)


class Held:
    """Pictures in memory, [..., 3, H, W] uint8."""

    dtype = torch.uint8

    def __init__(self, pixels: Tensor) -> None:
        self.shape, self._flat = tuple(pixels.shape), pixels.flatten(0, -4)

    def __getitem__(self, index: int) -> Tensor:
        return self._flat[index]

    def __len__(self) -> int:
        return len(self._flat)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._flat)


class Images:
    """Pictures as numbers in [0, 1], read when they are asked for: a lazy [..., 3, H, W].

    images[i, j] reads these pictures and no others, as a float32 tensor on the 8-bit grid; slices
    and lists choose along the leading axes as they do in a tensor; images[:] is all of them.

        found.images[8, :, 0]    # window 8, every prompt, the first seed: [prompt, 3, H, W]
    """

    def __init__(self, pixels: Pixels, at: Tensor | None = None) -> None:
        self.pixels = pixels
        lead = pixels.shape[:-3]
        self._at = torch.arange(math.prod(lead)).reshape(lead) if at is None else at

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that images[:] is."""
        return torch.Size([*self._at.shape, *self.pixels.shape[-3:]])

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def rows(self, index: Any) -> "Images":
        """A part along the leading axes, still unread."""
        return Images(self.pixels, self._at[index])

    def bytes(self) -> Iterator[Tensor]:
        """The pictures one by one, [3, H, W] uint8."""
        return (self.pixels[i] for i in self._at.flatten().tolist())

    def __getitem__(self, index: Any) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        lead, inside = index, ()
        if Ellipsis not in index:
            lead, inside = index[: self._at.ndim], index[self._at.ndim :]
        chosen = self._at[lead]
        read = [self.pixels[i] for i in chosen.flatten().tolist()]
        empty = torch.empty(0, *self.pixels.shape[-3:], dtype=torch.uint8)
        whole = torch.stack(read) if read else empty
        images = whole.float().div(255).reshape(*chosen.shape, *whole.shape[1:])
        return images[(*[slice(None)] * chosen.ndim, *inside)] if inside else images

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self[:].numpy(), dtype=dtype)

    def __repr__(self) -> str:
        return f"<Images: {list(self.shape)}, read when asked for>"
