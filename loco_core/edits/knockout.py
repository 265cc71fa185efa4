"""A sparse change of a weight: single entries are scaled, to zero unless asked otherwise.

Where a closed-form edit (`closed_form`) moves what a layer reads along a few directions, a
knock-out takes single parameters out of the network: W'_i = factor_i W_i. CAD (arXiv 2412.02542)
and the neurons of LocoGen (arXiv 2405.01008) are changed this way.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ..records import same

__all__ = ["Knockout"]


@dataclass(frozen=True, eq=False)
class Knockout:
    """W'_i = factor W_i at some entries of a weight; every other entry stays as it is, bit for bit.

    shape: of the weight, any number of dimensions. indices: [n] int64 on the CPU, into the
    weight laid out row by row, sorted, each once. factor: a finite number for all of them (0
    knocks them out), or one for each, [n] float64 on the CPU. Equal when all three are.
    Raises ValueError otherwise.

    >>> import torch
    >>> Knockout((2, 2), torch.tensor([1, 2])).apply_to(torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    tensor([[5., 0.],
            [0., 8.]])
    """

    shape: tuple[int, ...]
    indices: Tensor
    factor: float | Tensor = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        i = self.indices
        if i.ndim != 1 or i.dtype != torch.int64 or i.device.type != "cpu" or not len(i):
            raise ValueError(
                "Knockout: indices must be a vector of at least one int64 on the CPU, but is "
                f"{i.dtype} {list(i.shape)} on {i.device}"
            )
        if (i.diff() <= 0).any():
            raise ValueError(
                "Knockout: indices must be sorted and each once: pass indices.unique()"
            )
        if i[0] < 0 or i[-1] >= math.prod(self.shape):
            raise ValueError(
                f"Knockout: indices go from {i[0]} to {i[-1]}, but a weight of shape "
                f"{list(self.shape)} has entries 0 to {math.prod(self.shape) - 1}"
            )
        factor = torch.as_tensor(self.factor, dtype=torch.float64)
        if isinstance(self.factor, Tensor) and (
            factor.shape != i.shape or self.factor.dtype != torch.float64 or not factor.is_cpu
        ):
            raise ValueError(
                f"Knockout: factor must be a number or [{len(i)}] float64 on the CPU, but is "
                f"{self.factor.dtype} {list(self.factor.shape)} on {self.factor.device}"
            )
        if not factor.isfinite().all():
            raise ValueError("Knockout: factor holds NaN or infinite values")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Knockout):
            return NotImplemented
        return same(self, other)

    def __hash__(self) -> int:
        return hash((self.shape, len(self.indices), self.indices.sum().item()))

    def __len__(self) -> int:
        return len(self.indices)

    def check(self, weight: Tensor) -> None:
        """Raise ValueError unless this knock-out is for weights of the shape of `weight`."""
        if weight.shape != self.shape:
            raise ValueError(
                f"this knock-out is for weights of shape {list(self.shape)}, "
                f"not {list(weight.shape)}"
            )

    @torch.no_grad()
    def apply_to(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """The edited weight: a new tensor of W's shape, dtype and device, or `out`.

        out: where to write, of W's shape; W itself to edit it in place. Raises ValueError for
        another shape.
        """
        self.check(weight)
        edited = torch.empty_like(weight) if out is None else out
        if edited.shape != weight.shape:
            raise ValueError(f"out must be {list(weight.shape)}, not {list(edited.shape)}")
        indices, factor = self._on(weight)
        chosen = (weight.take(indices).to(factor.dtype) * factor).to(edited.dtype)
        if edited is not weight:
            edited.copy_(weight)
        return edited.put_(indices, chosen)

    def part(self, weight: Tensor) -> Tensor:
        """What of a weight it replaces, in CPU memory: the entries, [n]."""
        return weight.detach().take(self.indices.to(weight.device)).cpu()

    def made(self, part: Tensor) -> Tensor:
        """What it puts in the place of that `part`."""
        return (part.double() * self.factor).to(part.dtype)

    def restore(self, weight: Tensor, part: Tensor) -> None:
        """Put a `part` back in place."""
        weight.put_(self.indices.to(weight.device), part.to(weight))

    @torch.no_grad()
    def relative_change(self, weight: Tensor) -> float:
        """||W' - W|| / ||W|| (Frobenius). Raises ValueError for another shape."""
        self.check(weight)
        indices, factor = self._on(weight)
        total = torch.linalg.vector_norm(weight, dtype=torch.float64)
        return float(((1 - factor) * weight.take(indices)).norm() / total)

    def scaled(self, scale: float) -> Knockout:
        """W + scale (W' - W): at 0 nothing is changed, at 1 it is this knock-out.

        Raises ValueError for a scale that is not finite.
        """
        if not (isinstance(scale, Real) and math.isfinite(scale)):
            raise ValueError(f"scale must be a finite number, not {scale!r}; 1 is the whole edit")
        return dataclasses.replace(self, factor=1 - float(scale) * (1 - self.factor))

    def then(self, second: Knockout) -> Knockout:
        """This knock-out and then `second`: entries of either, where they meet with both factors.

        Raises ValueError for knock-outs of weights of different shapes.

        >>> import torch
        >>> Knockout((4,), torch.tensor([0])).then(Knockout((4,), torch.tensor([0, 2]))).indices
        tensor([0, 2])
        """
        if second.shape != self.shape:
            raise ValueError(
                f"a knock-out in a weight of shape {list(self.shape)} cannot be followed by one "
                f"in a weight of shape {list(second.shape)}: they are for different weights"
            )
        indices = torch.cat([self.indices, second.indices]).unique()
        factor = torch.ones(len(indices), dtype=torch.float64)
        for part in (self, second):
            factor[torch.searchsorted(indices, part.indices)] *= part.factor
        alike = bool((factor == factor[0]).all())
        return Knockout(self.shape, indices, factor[0].item() if alike else factor)

    def _on(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and factor [] or [n] on the device of a weight, the factor float64 if it can."""
        exact = torch.float32 if weight.device.type == "mps" else torch.float64
        factor = torch.as_tensor(self.factor, dtype=torch.float64).to(exact)
        return self.indices.to(weight.device), factor.to(weight.device)
