"""The change of a weight as a product of two thin matrices, whole or as near as a rank allows.

An edit is W' = W + (W D) R (`closed_form`), so B = W D and A = R would do. The singular value
decomposition of the same product,

    (W D) R = U S V^T,   B = U sqrt(S),   A = sqrt(S) V^T,

has as few rows as possible and nothing in it cancels: rounded to float16, as in a pipeline of that
dtype, it keeps the edits of mini-sd to 3e-4 of their size, where W D and R lose up to 7e-3. Cut
after its first rows it is the nearest change of that rank (Eckart and Young, 1936). So a knock-out,
whose change W' - W may have any rank, has a nearest one as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .change import Change
from .low_rank import LowRankMap

__all__ = ["Factors", "factors", "left_out"]


class Factors(NamedTuple):
    """B A, the nearest change of rank r to a change of a weight W [out, in].

    A: [r, in], B: [out, r] on the CPU. A convolution's W [out, in, ...] counts as [out, in * ...].
    size: ||change||. missed: ||change - B A|| (Frobenius). cut: whether rows were cut off.
    """

    A: Tensor
    B: Tensor
    size: float
    missed: float
    cut: bool


@torch.no_grad()
def factors(change: Change, weight: Tensor, rank: int | None = None) -> Factors:
    """The change of `weight` W [out, in, ...] in two factors of its own rank, at most `rank`.

    Solved in float64 and returned in float32, or float64 for such a weight. The own rank is that in
    this dtype, at least 1: singular values below its eps times the largest are no more than what
    rounding moves. Raises ValueError for a W of another shape than the change is for.

    >>> import torch
    >>> swap = LowRankMap(torch.tensor([[-1.0], [1.0]]).double(), torch.eye(2)[:1].double())
    >>> A, B, *_ = factors(swap, torch.tensor([[5.0, 7.0]]))
    >>> torch.allclose(B @ A, torch.tensor([[2.0, 0.0]]))
    True
    """
    change.check(weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    U, S, Vh = _decomposed(change, weight.to("cpu", torch.float64))
    own = max(1, int((S > torch.finfo(dtype).eps * S[0]).sum()))
    r = own if rank is None else min(own, rank)
    root = S[:r].sqrt()
    A, B = root[:, None] * Vh[:r], U[:, :r] * root
    size, missed = float(S.norm()), float(S[r:].norm())
    return Factors(A.to(dtype).contiguous(), B.to(dtype).contiguous(), size, missed, r < own)


def left_out(parts: Iterable[Factors]) -> float:
    """||change - B A|| / ||change|| over several weights, 0 if nothing changes."""
    sizes, missed = zip(*((part.size, part.missed) for part in parts), strict=True)
    return math.hypot(*missed) / math.hypot(*sizes) if any(sizes) else 0.0


def _decomposed(change: Change, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of the change of a float64 weight, laid out as a matrix."""
    if not isinstance(change, LowRankMap):
        return _thin_svd((change.apply_to(weight) - weight).flatten(1))
    # As in LowRankMap.rank: two QR factorisations leave a small core.
    (Q, left), (P, right) = torch.linalg.qr(weight @ change.D), torch.linalg.qr(change.R.T)
    U, S, Vh = torch.linalg.svd(left @ right.T, full_matrices=False)
    return Q @ U, S, Vh @ P.T


def _thin_svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of M [n, m], from the eigenvectors of the smaller of M M^T and M^T M.

    Ten times faster than `torch.linalg.svd` for the matrices of a UNet. Rows of V^T whose S is
    below 1e-8 of the largest are not quite orthogonal; (U S) V^T is M all the same.
    """
    if len(M) > M.shape[1]:
        U, S, Vh = _thin_svd(M.T)
        return Vh.T, S, U.T
    U = torch.linalg.eigh(M @ M.T).eigenvectors.flip(1)
    Vh = U.T @ M
    S = Vh.norm(dim=1)
    return U, S, Vh / S.clamp(min=torch.finfo(S.dtype).tiny)[:, None]
