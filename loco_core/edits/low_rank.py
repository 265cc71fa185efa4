"""A change of low rank: one map T = I + D R for every weight that reads the same.

A closed-form edit moves what a layer reads along a few directions, whatever its weight:

    W' = W T = W + (W D) R,    D: [d, n],  R: [n, d]

`closed_form.solver` says where D and R come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import torch
from jaxtyping import Float, Float64
from torch import Tensor

__all__ = ["LowRankMap"]

BLOCK = 256  # rows of a weight edited at a time: they stay in the cache
LAST_BIT = torch.eye(32) * (1 + 2**-23)


@dataclass(frozen=True, eq=False)
class LowRankMap:
    """The map T = I + D R that edits a weight W [out, d] to W T = W + (W D) R.

    D: [d, n], R: [n, d], both float64 on the CPU and finite. Two maps are equal when their factors
    are, bit for bit.

    >>> import torch
    >>> D, R = torch.tensor([[-1.0], [1.0], [0.0]]), torch.eye(3)[:1]  # read token 0 as token 1
    >>> swap = LowRankMap(D.double(), R.double())
    >>> swap.apply_to(torch.tensor([[5.0, 7.0, 9.0]]))
    tensor([[7., 7., 9.]])
    """

    D: Float64[Tensor, "d n"]
    R: Float64[Tensor, "n d"]

    def __post_init__(self) -> None:
        for name, factor in (("D", self.D), ("R", self.R)):
            if factor.ndim != 2 or factor.dtype != torch.float64 or factor.device.type != "cpu":
                raise ValueError(
                    f"LowRankMap: {name} must be a float64 matrix on the CPU, but is "
                    f"{factor.dtype} {list(factor.shape)} on {factor.device}"
                )
            if not factor.isfinite().all():
                raise ValueError(f"LowRankMap: {name} holds NaN or infinite values")
        if self.D.shape != self.R.T.shape:
            raise ValueError(
                f"LowRankMap: D [d, n] and R [n, d] must agree, but D is {list(self.D.shape)} "
                f"and R is {list(self.R.shape)}"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LowRankMap):
            return NotImplemented
        return torch.equal(self.D, other.D) and torch.equal(self.R, other.R)

    def __hash__(self) -> int:
        return hash((self.D.shape, self.R.sum().item()))

    @property
    def width(self) -> int:
        """d, the number of columns of the weights that this map edits."""
        return self.D.shape[0]

    @property
    def rank(self) -> int:
        """The numerical rank of D R = T - I: at most n, the number of edited rows.

        Singular values below max(d, n) * eps of the largest count as zero. 0 is the identity.
        """
        return int(torch.linalg.matrix_rank(self._balanced[0], rtol=cutoff(self.D)))

    @cached_property
    def _balanced(self) -> tuple[Tensor, Tensor]:
        """D L and Q with D R = (D L) Q, the rows of Q orthonormal: nothing cancels in (D L) Q.

        Keys that nearly coincide make rows of R that are long and nearly opposite.
        """
        Q, upper = torch.linalg.qr(self.R.T)
        return self.D @ upper.T, Q.T.contiguous()

    @cached_property
    def _balanced_float32(self) -> tuple[Tensor, Tensor]:
        """(D L)^T and Q in float32."""
        D, Q = self._balanced
        return D.T.float().contiguous(), Q.float()

    def check(self, weight: Float[Tensor, "out d"]) -> None:
        """Raise ValueError unless `weight` is a matrix with `width` columns."""
        if weight.ndim != 2 or weight.shape[1] != self.width:
            raise ValueError(
                f"this map edits weights of shape [out, {self.width}], not {list(weight.shape)}: "
                "it was fitted to embeddings of another width"
            )

    @torch.no_grad()
    def delta(self, weight: Float[Tensor, "out d"]) -> Float64[Tensor, "out d"]:
        """The change (W D) R [out, d] of a weight W [out, d], in float64 on the weight's device.

        A device without float64 gets it from the CPU. Raises ValueError unless W is a matrix with
        `width` columns.
        """
        weight, D, R = self._aligned(weight)
        return weight.double() @ D @ R

    @torch.no_grad()
    def apply_to(
        self, weight: Float[Tensor, "out d"], out: Float[Tensor, "out d"] | None = None
    ) -> Float[Tensor, "out d"]:
        """The edited weight W + (W D) R: a new tensor of W's shape, dtype and device, or `out`.

        A float32 weight on the CPU is edited in float32, from factors balanced in float64: on top
        of the rounding of W' itself, the change is off by about 3e-7 of its norm. Any other weight,
        and this one too where float32 products lose digits (autocast, bfloat16 matmuls), is edited
        in float64 and rounded once.

        out: where to write, of W's shape; W itself to edit it in place. Raises ValueError for
        another shape, and unless W is a matrix with `width` columns.
        """
        edited = torch.empty_like(weight) if out is None else out
        if edited.shape != weight.shape:
            raise ValueError(f"out must be {list(weight.shape)}, not {list(edited.shape)}")
        in_float32 = all(t.dtype == torch.float32 and t.is_cpu for t in (weight, edited))
        weight, D, R = self._aligned(weight)
        blocks = zip(weight.split(BLOCK), edited.split(BLOCK), strict=True)
        if in_float32 and _multiplies_in_float32():
            D_T, Q = self._balanced_float32
            for old, new in blocks:  # D^T W^T is up to 3 times faster than W D for a thin D
                new.copy_(old).addmm_((D_T @ new.T).T, Q)
            return edited
        for old, new in blocks:
            exact = old.to(torch.float64, copy=True)
            new.copy_(exact.addmm_(exact @ D, R))
        return edited

    def part(self, weight: Tensor) -> Tensor:
        """What of a weight it replaces, in CPU memory: all of it."""
        return weight.detach().cpu()

    def made(self, part: Tensor) -> Tensor:
        """What it puts in the place of that `part`."""
        return self.apply_to(part)

    def restore(self, weight: Tensor, part: Tensor) -> None:
        """Put a `part` back in place."""
        weight.copy_(part)

    @torch.no_grad()
    def relative_change(self, weight: Float[Tensor, "out d"]) -> float:
        """||W' - W|| / ||W|| (Frobenius) of a weight W [out, d], from the factors alone.

        Above 1 the edit is larger than what it edits. Raises ValueError unless W is a matrix with
        `width` columns.
        """
        weight = self._aligned(weight)[0].double()
        # ||A Q|| = ||A||, the rows of Q being orthonormal
        return float((weight @ self._balanced[0].to(weight.device)).norm() / weight.norm())

    def scaled(self, scale: float) -> LowRankMap:
        """I + scale D R: at 0 the identity, at 1 this map.

        Raises ValueError for a scale that is not finite.
        """
        if not (isinstance(scale, Real) and math.isfinite(scale)):
            raise ValueError(f"scale must be a finite number, not {scale!r}; 1 is the whole edit")
        return LowRankMap(float(scale) * self.D, self.R)

    def then(self, second: LowRankMap) -> LowRankMap:
        """The map that first this one and then `second` make of a weight: (W T) T'.

        T T' = I + D R + (T D') R': the ranks add up. Raises ValueError for maps of different width.

        >>> import torch
        >>> a, b, c = torch.eye(3).split(1)
        >>> both = fit(a, b, lam=0.0).then(fit(b, c, lam=0.0))
        >>> both.apply_to(torch.tensor([[5.0, 7.0, 9.0]]))
        tensor([[7., 9., 9.]])
        """
        if second.width != self.width:
            raise ValueError(
                f"a map of width {self.width} cannot be followed by one of width {second.width}: "
                "they were fitted to embeddings of different models"
            )
        moved = second.D + self.D @ (self.R @ second.D)
        return LowRankMap(torch.cat([self.D, moved], dim=1), torch.cat([self.R, second.R]))

    def _aligned(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weight and the factors on one device that has float64."""
        self.check(weight)
        if weight.device.type == "mps":
            weight = weight.cpu()
        return weight, self.D.to(weight.device), self.R.to(weight.device)


def cutoff(A: Tensor) -> float:
    """The share of the largest singular value of A below which one counts as zero."""
    return max(A.shape) * torch.finfo(A.dtype).eps


def _multiplies_in_float32() -> bool:
    """Whether a float32 product on this CPU keeps the last bit: under autocast it does not, nor
    after `torch.set_float32_matmul_precision("medium")`."""
    return (LAST_BIT @ LAST_BIT)[0, 0].item() == 1 + 2**-22
