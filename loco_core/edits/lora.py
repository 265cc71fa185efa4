"""An edit as a LoRA file, which other programs read and mix at any strength.

A LoRA adds (alpha / r) B A to a weight W, with A [r, in] and B [out, r]. An edit is
W' = W + (W D) R (`closed_form`), so B = W D and A = R would do. The singular value decomposition
of the same product,

    (W D) R = U S V^T,   B = U sqrt(S),   A = sqrt(S) V^T,   alpha = r,

has as few rows as possible and nothing in it cancels: rounded to float16, as in a pipeline of that
dtype, it keeps the edits of mini-sd to 3e-4 of their size, where W D and R lose up to 7e-3. A file
without alphas means alpha = r, a factor of exactly 1. W is the one thing that an edit does not
hold, so the pipeline is asked for it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic_write
from ..records import model_name
from .file import MANIFEST
from .low_rank import LowRankMap, check_maps
from .stack import original_of

__all__ = ["factors", "save_lora"]


@torch.no_grad()
def save_lora(edit: Any, path: str | Path, pipe: Any) -> None:
    """Write `edit` to `path`, a safetensors file for `pipe.load_lora_weights(path)`.

    pipe: the pipeline the edit was made for; the weights are taken as they are without any edit, so
    it may have edits applied. The file has every weight that the edit changes, of the denoiser and
    of the text encoders: "<component>.<module>.lora_A.weight" [r, in] and ".lora_B.weight"
    [out, r], in float32 (float64 if the pipeline is): diffusers rounds them to the dtype of the
    pipeline that loads them. The metadata say under "loco_core.edit" what the edit was made from;
    `Edit.load` refuses the file, so keep that of `edit.save` too. Whole or not at all.

    Raises ValueError for an edit that knocks out single weights, another model or other weights,
    projections that are fused, quantised or have a LoRA already, and a pipeline that cannot load
    one for these weights; OSError naming the path if the disk is full or read-only. While it loads
    the file, diffusers logs "No LoRA keys" for each component that the edit does not change, which
    is as it should be.

        save_lora(edit, "no_van_gogh.safetensors", pipe)
        pipe.load_lora_weights("no_van_gogh.safetensors", adapter_name="no_van_gogh")
        pipe.set_adapters("no_van_gogh", 0.5)       # the same images as edit.scaled(0.5)
        pipe.unload_lora_weights()
    """
    check_maps(edit, "a LoRA adds a matrix of low rank: use edit.save(path)")
    _check_loadable(edit, pipe)
    weights = {name: original_of(pipe, name) for name in edit.changes}
    edit.check_made_for(
        pipe,
        weights,
        f"a LoRA adds to the unedited weights, so load {edit.provenance.model}, or make the edit "
        "on this model while no other is applied",
    )
    tensors, ranks = {}, {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        change: Any = edit.changes[name]
        A, B = factors(change, weight)
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = A, B
        ranks[name] = len(A)
    _write(path, tensors, edit, ranks)


@torch.no_grad()
def factors(change: LowRankMap, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with B A = (W D) R, the change of `weight` W [out, in], on the CPU.

    Solved in float64 and returned in float32, or float64 for such a weight. r >= 1 is the rank of
    the change in that dtype: singular values below its eps times the largest are no more than what
    rounding moves. Raises ValueError unless W is a matrix with as many columns as the map.

    >>> import torch
    >>> swap = LowRankMap(torch.tensor([[-1.0], [1.0]]).double(), torch.eye(2)[:1].double())
    >>> A, B = factors(swap, torch.tensor([[5.0, 7.0]]))
    >>> torch.allclose(B @ A, torch.tensor([[2.0, 0.0]]))
    True
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    left, right = weight.to("cpu", torch.float64) @ change.D, change.R.T
    # As in LowRankMap.rank: two QR factorisations leave a small core.
    (Q, left), (P, right) = torch.linalg.qr(left), torch.linalg.qr(right)
    U, S, Vh = torch.linalg.svd(left @ right.T, full_matrices=False)
    r = max(1, int((S > torch.finfo(dtype).eps * S[0]).sum()))
    root = S[:r].sqrt()
    A, B = root[:, None] * (Vh[:r] @ P.T), Q @ U[:, :r] * root
    return A.to(dtype).contiguous(), B.to(dtype).contiguous()


def _check_loadable(edit: Any, pipe: Any) -> None:
    loadable = getattr(pipe, "_lora_loadable_modules", ())
    if not (loadable and hasattr(pipe, "load_lora_weights")):
        raise ValueError(
            f"{type(pipe).__name__} of diffusers has no load_lora_weights, so no pipeline of "
            f"{model_name(pipe)} could read the file: use edit.save(path)"
        )
    closed = {name for name in edit.changes if name.partition(".")[0] not in loadable}
    if closed:
        raise ValueError(
            f"{type(pipe).__name__} loads a LoRA only into {', '.join(loadable)}, but {edit!r} "
            f"changes {min(closed)}: use edit.save(path)"
        )


def _write(path: str | Path, tensors: dict[str, Tensor], edit: Any, ranks: dict[str, int]) -> None:
    from safetensors.torch import save

    manifest = {
        "format": "lora",
        "weights": ranks,
        "originals": dict(edit.originals),
        "provenance": dataclasses.asdict(edit.provenance),
    }
    text = json.dumps(manifest, ensure_ascii=False, sort_keys=True)
    atomic_write(path, save(tensors, metadata={MANIFEST: text}))
