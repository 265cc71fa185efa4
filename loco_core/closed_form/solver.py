"""The closed-form edit: one small linear solve, one map for every layer that reads the text.

A text layer reads a token embedding c through a projection W (``to_k`` or ``to_v``). To make it
read c as if it were g, LocoEdit (arXiv 2405.01008) and UCE (arXiv 2308.14761) minimise, over the
rows (c_i, g_i) with weights s_i,

    sum_i s_i ||W' c_i - W g_i||^2 + lam ||W' - W||^2                                           (1)

whose textbook solution inverts a d x d matrix for every W. The push-through identity gives the
same minimum from a k x k matrix, k the number of rows:

    W' = W + (W D) R,    D = (G - C)^T,    R = M C,    M = (lam S^-1 + C C^T)^-1                (2)

D and R do not depend on W: the map T = I + D R is the same for every layer. A row to be preserved
is mapped to itself (g = c), so its column of D is zero and is dropped: the rank is at most the
number of *edited* rows.

A row to be preserved *exactly*, whatever lam, is taken out of the space in which W may move, as in
SPEED (ICLR 2026): with P the projection on the complement of these rows, the keys of (2) are C P,

    R = M C P,    M = (lam S^-1 + C P C^T)^-1                                                   (3)

With more rows than features, k > d, the d x d form of the same minimum is the smaller one,

    R = S C (lam I + C^T S C)^-1                                                                (4)

and its moment C^T S C is a sum over rows, which need never be held at once.

All of it is linear algebra and knows nothing about diffusers. It is solved in float64; a float32
weight is edited in float32, see `LowRankMap.apply_to`.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ..edits.low_rank import LowRankMap, cutoff

__all__ = ["fit", "fit_moments"]

BLOCK = 1024  # rows of a moment that are added at a time


@torch.no_grad()
def fit(
    keys: Float[Tensor, "n d"],
    targets: Float[Tensor, "n d"],
    lam: float,
    weights: Tensor | None = None,
    preserve: Float[Tensor, "p d"] | None = None,
    null_space: Float[Tensor, "r d"] | None = None,
) -> LowRankMap:
    """The map that makes every layer read `keys` as `targets`: equations (1) to (4) above.

    keys C and targets G: [n, d]; row i of G is what row i of C shall be read as. lam >= 0 is the
    price of moving the weight, in units of squared key length, against a *sum* over rows: twice the
    rows make the same lam half as dear. At lam = 0 every row is met exactly, by the smallest
    possible change. weights s: [n], or [n + p] to weigh the preserved rows too
    (default: 1); >= 0, and a weight of 2 equals the row twice. preserve: [p, d], rows held where
    they are as far as the others allow. null_space: [r, d], rows held exactly. Any dtype and
    device; the solve is k x k, k = n + p, or d x d if that is smaller, in float64 on the CPU.

    Raises ValueError for shapes that do not match, NaN or infinite values, a negative lam or
    weight, a null_space that holds every key, and for lam = 0 when linearly dependent keys ask for
    contradicting targets.

    >>> import torch
    >>> keys, targets = torch.randn(2, 8), torch.randn(2, 8)
    >>> edit = fit(keys, targets, lam=0.0)
    >>> W = torch.randn(4, 8)
    >>> torch.allclose(edit.apply_to(W) @ keys.T, W @ targets.T, atol=1e-4)
    True
    """
    if not (isinstance(lam, Real) and math.isfinite(lam) and lam >= 0):
        raise ValueError(f"lam must be a finite number >= 0, not {lam!r}; the papers use 0.01")
    C, G = _rows("keys", keys), _rows("targets", targets)
    if C.shape != G.shape:
        raise ValueError(
            f"keys and targets must pair row by row, but keys is {list(C.shape)} and targets "
            f"is {list(G.shape)}"
        )
    n, d = C.shape
    if n == 0:
        raise ValueError("keys is empty: give at least one row to edit")
    D = (G - C).T.contiguous()
    if preserve is not None:
        C = torch.cat([C, _same_width("preserve", preserve, d)])
    if null_space is not None:
        C = _outside(C, _same_width("null_space", null_space, d), edited=n)
    # Row weights enter as A = sqrt(S) C: M C = sqrt(S) (lam I + A A^T)^-1 A, which allows s = 0.
    root = _row_weights(weights, n, len(C)).sqrt()[:, None]
    if len(C) <= d:
        R = (root * _regularised_inverse(root * C, float(lam)))[:n].contiguous()
    else:
        R = _by_moments(C, root, float(lam), n)
    if lam == 0:
        _check_interpolates(D, R, C, counted=root[:, 0] > 0)
    return LowRankMap(D, R)


def _regularised_inverse(A: Float64[Tensor, "k d"], lam: float) -> Float64[Tensor, "k d"]:
    """(lam I + A A^T)^-1 A; at lam = 0, the transposed pseudo-inverse of A."""
    factor = _factor(A @ A.T, lam)
    if factor is not None:
        return torch.cholesky_solve(A, factor)
    U, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
    return (U * _gain(sigma, A, lam)) @ Vh


def _factor(gram: Float64[Tensor, "m m"], lam: float) -> Float64[Tensor, "m m"] | None:
    """The Cholesky factor of gram + lam I, which it overwrites; None if that loses digits."""
    gram.diagonal().add_(lam)
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal()
    # The squared ratio of pivots bounds the condition from below. Beyond 1e8 the Gram matrix has
    # lost half of float64's digits; the SVD of A has not squared the condition: a quarter.
    sound = not failed and lam > 0 and pivots.min() > 1e-4 * pivots.max()
    return factor if sound else None


def _gain(sigma: Tensor, A: Tensor, lam: float) -> Tensor:
    """sigma / (sigma^2 + lam) of the singular values of A that are not rounding."""
    known = sigma > cutoff(A) * sigma.max()
    return torch.where(known, sigma / (sigma.square() + lam), 0.0)


def _by_moments(
    C: Float64[Tensor, "k d"], root: Float64[Tensor, "k 1"], lam: float, n: int
) -> Float64[Tensor, "n d"]:
    """The first n rows of equation (4), with S = root^2."""
    moment = torch.zeros(C.shape[1], C.shape[1], dtype=torch.float64)
    for rows, weight in zip(C.split(BLOCK), root.split(BLOCK), strict=True):
        part = weight * rows
        moment.addmm_(part.T, part)
    factor = _factor(moment, lam)
    if factor is not None:
        return torch.cholesky_solve((root.square() * C)[:n].T, factor).T.contiguous()
    U, sigma, Vh = torch.linalg.svd(root * C, full_matrices=False)
    return (root[:n] * U[:n] * _gain(sigma, C, lam)) @ Vh


@torch.no_grad()
def fit_moments(
    moment: Float[Tensor, "d d"], change: Float[Tensor, "d d"], lam: float
) -> LowRankMap:
    """The map of equation (1) from sums over its rows, however many there were.

    moment: C^T S C, of all rows, the preserved ones too. change: (G - C)^T S C, of the edited ones.
    T = I + change (lam I + moment)^-1, whose rank is that of `change`: D are its left singular
    vectors times the singular values. lam > 0. Any dtype and device; solved in float64 on the CPU.
    Raises ValueError for shapes that do not match, NaN or infinite values, lam <= 0, and a moment
    that is not positive semi-definite.

    >>> C, G = torch.randn(40, 8).double(), torch.randn(40, 8).double()
    >>> W, whole = torch.randn(4, 8).double(), fit(C, G, lam=0.5)
    >>> summed = fit_moments(C.T @ C, (G - C).T @ C, lam=0.5)
    >>> torch.allclose(summed.apply_to(W), whole.apply_to(W))
    True
    """
    if not (isinstance(lam, Real) and math.isfinite(lam) and lam > 0):
        raise ValueError(f"lam must be a finite number > 0, not {lam!r}; the papers use 0.01")
    M, N = _rows("moment", moment), _rows("change", change)
    if M.shape != N.shape or M.shape[0] != M.shape[1]:
        raise ValueError(
            f"moment and change must be d x d alike, not {list(M.shape)} and {list(N.shape)}"
        )
    U, sigma, Vh = torch.linalg.svd(N)
    known = sigma > cutoff(N) * sigma.max().clamp_min(1e-300)
    known[0] = True  # the identity has rank 0, but a map at least one row
    values, vectors = torch.linalg.eigh((M + M.T) / 2)
    if values[0] < -1e-9 * values[-1].abs():
        raise ValueError("moment is no C^T S C: it has a negative eigenvalue")
    inverse = (vectors / (values.clamp_min(0) + float(lam))) @ vectors.T
    return LowRankMap((U * sigma)[:, known].contiguous(), (Vh[known] @ inverse).contiguous())


def _outside(
    C: Float64[Tensor, "k d"], held: Float64[Tensor, "r d"], edited: int
) -> Float64[Tensor, "k d"]:
    """C P: the rows without their part in the span of the rows `held`."""
    _, sigma, Vh = torch.linalg.svd(held, full_matrices=False)
    basis = Vh[sigma > cutoff(held) * sigma.max()] if len(held) else held
    free = C - C @ basis.T @ basis
    free -= free @ basis.T @ basis  # again: what rounding has left of the held span
    lengths, before = free.norm(dim=1), C.norm(dim=1)
    if (lengths[:edited] <= 1e-8 * before[:edited]).all():
        raise ValueError(
            f"null_space holds {len(basis)} of {C.shape[1]} directions, every key among them: "
            "nothing is left to edit; hold fewer rows, or pass them as preserve"
        )
    return free


def _check_interpolates(
    D: Float64[Tensor, "d n"],
    R: Float64[Tensor, "n d"],
    C: Float64[Tensor, "k d"],
    counted: Bool[Tensor, " k"],
) -> None:
    """Raise unless T c_i = g_i: (D R) c_i is g_i - c_i for edited rows and 0 for preserved ones."""
    n = D.shape[1]
    wanted = torch.zeros_like(C)
    wanted[:n] = D.T
    missed = (C @ R.T @ D.T - wanted).norm(dim=1) * counted
    worst = int(missed.argmax())
    if missed[worst] > 1e-6 * max(wanted.norm(dim=1).max().item(), 1e-300):
        kind = f"keys[{worst}]" if worst < n else f"preserve[{worst - n}]"
        raise ValueError(
            f"lam=0 asks for every row exactly, but {kind} is a linear combination of other rows "
            f"(or of the null space) whose targets contradict it (missed by {missed[worst]:.3g}): "
            "drop the row or use lam > 0, such as 0.01"
        )


def _rows(name: str, rows: Float[Tensor, "row d"]) -> Float64[Tensor, "row d"]:
    if rows.ndim != 2:
        raise ValueError(
            f"{name} must be a matrix, one row a token, but has shape {list(rows.shape)}"
        )
    rows = rows.detach().to("cpu", torch.float64)
    bad = (~rows.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{name} holds NaN or infinite values in rows {bad}")
    return rows


def _same_width(name: str, rows: Float[Tensor, "row d"], d: int) -> Float64[Tensor, "row d"]:
    rows = _rows(name, rows)
    if rows.shape[1] != d:
        raise ValueError(f"{name} must have the keys' width {d}, but is {list(rows.shape)}")
    return rows


def _row_weights(weights: Tensor | None, n: int, k: int) -> Float64[Tensor, " k"]:
    """The k row weights; preserved rows weigh 1 unless given."""
    if weights is None:
        return torch.ones(k, dtype=torch.float64)
    s = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    if s.ndim != 1 or len(s) not in (n, k):
        choices = f"[{n}]" if n == k else f"[{n}] (keys) or [{k}] (keys, then preserve)"
        raise ValueError(f"weights must have shape {choices}, not {list(s.shape)}")
    if not (s.isfinite() & (s >= 0)).all():
        raise ValueError(f"weights must be finite and >= 0, not {s.tolist()}")
    return torch.cat([s, torch.ones(k - len(s), dtype=torch.float64)])
