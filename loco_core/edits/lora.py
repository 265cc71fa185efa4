"""An edit as a LoRA file, which other programs read and mix at any strength.

A LoRA adds (alpha / r) B A to a weight W, with A [r, in] and B [out, r]: `factors` makes them of
the change of each weight. W is the one thing that an edit does not hold, so the pipeline is asked
for it.

Programs differ in how they call a weight, in whether alpha may be missing, and in what r is where
the weights of a file have several. Ours has the names that all of them read (kohya's), one r for
all, filled up with rows of zeros, and alpha = r beside each: a factor of 1 however it is reckoned.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._warn import warn
from ..families import FAMILIES
from ..families.checks import whole_number
from ..files import atomic_write
from ..records import model_name
from .factors import Factors, factors, left_out
from .file import MANIFEST
from .low_rank import LowRankMap
from .stack import original_of

__all__ = ["save_lora"]

COMMON = 32  # the rank at which a refused knock-out is told what a LoRA of it would leave out


@torch.no_grad()
def save_lora(edit: Any, path: str | Path, pipe: Any, rank: int | None = None) -> float:
    """Write `edit` to `path`, a safetensors file for `pipe.load_lora_weights(path)`.

    pipe: the pipeline the edit was made for; the weights are taken as they are without any edit, so
    it may have edits applied. rank: the largest r; of an edit that needs a larger one, the nearest
    of this rank is written. None keeps all of it.

    The file has every weight that the edit changes, of the denoiser and of the text encoders, by
    kohya's names, which diffusers, ComfyUI, A1111, Forge and sd-scripts read:
    "lora_unet_<module>", "lora_te_<module>" (of SD-XL "lora_te1_<module>", "lora_te2_<module>"),
    its dots as underscores; each with ".lora_down.weight" [r, in], ".lora_up.weight" [out, r] and
    ".alpha" = r. A convolution has [r, in, height, width] and [out, r, 1, 1]. A few weights without
    which one of these programs overlooks another are there as well, as zeros. If there is no such
    name for one, as for the weights of other families, all have those of diffusers,
    "<component>.<module>.lora_A.weight" and ".lora_B.weight". All in float32 (float64 if the
    pipeline is): who loads the file rounds it to the dtype of the pipeline. The metadata say under
    "loco_core.edit" what the edit was made from and what is left out of each weight; `Edit.load`
    refuses the file, so keep that of `edit.save` too. Whole or not at all.

    Returns what the file leaves out, ||change - B A|| / ||change|| over all weights (Frobenius),
    and warns of it if the rank cut anything off. Without a rank it is below 1e-6.

    Raises ValueError for a rank below 1, an edit that knocks out single weights if no rank is
    given, another model or other weights, projections that are fused, quantised or have a LoRA
    already, and a pipeline that cannot load one for these weights; OSError naming the path if the
    disk is full or read-only. While it loads the file, diffusers logs "No LoRA keys" for each
    component that the edit does not change, which is as it should be.

        save_lora(edit, "no_van_gogh.safetensors", pipe)
        pipe.load_lora_weights("no_van_gogh.safetensors", adapter_name="no_van_gogh")
        pipe.set_adapters("no_van_gogh", 0.5)       # the same images as edit.scaled(0.5)
        pipe.unload_lora_weights()
    """
    if rank is not None and whole_number(rank, 1, 2**31) is None:
        raise ValueError(f"rank={rank!r} must be a whole number from 1 on, or None to keep all")
    _check_loadable(edit, pipe)
    weights = {name: original_of(pipe, name) for name in edit.changes}
    edit.check_made_for(
        pipe,
        weights,
        f"a LoRA adds to the unedited weights, so load {edit.provenance.model}, or make the edit "
        "on this model while no other is applied",
    )
    if rank is None:
        _check_low_rank(edit, weights)
    parts = {name: factors(edit.changes[name], W, rank) for name, W in weights.items()}
    _write(path, _tensors(parts, pipe), edit, parts)
    error = left_out(parts.values())
    if any(part.cut for part in parts.values()):
        warn(
            f"the LoRA {Path(path).name} leaves out {error:.1%} of what {edit!r} changes: it is "
            f"the nearest of rank {rank}, and a larger rank leaves out less"
        )
    return error


def _tensors(parts: Mapping[str, Factors], pipe: Any) -> dict[str, Tensor]:
    """What the file holds: the factors of each weight, filled up with zeros to one rank."""
    kohya = _kohya(parts, pipe)
    keys = kohya or {name: name.removesuffix(".weight") for name in parts}
    first, second = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    rank = max(len(part.A) for part in parts.values())
    dtype = next(iter(parts.values())).A.dtype
    found: dict[str, Tensor] = {}
    for name, key in keys.items():
        out, *rest = original_of(pipe, name).shape
        A, B = (
            torch.zeros(*shape, dtype=dtype) for shape in ((rank, math.prod(rest)), (out, rank))
        )
        if part := parts.get(name):
            A[: len(part.A)], B[:, : len(part.A)] = part.A, part.B
        found[f"{key}.{first}.weight"] = A.reshape(rank, *rest)
        found[f"{key}.{second}.weight"] = B.reshape(out, rank, *(1 for _ in rest[1:]))
        if kohya:
            found[f"{key}.alpha"] = torch.tensor(float(rank), dtype=dtype)
    return found


def _kohya(weights: Collection[str], pipe: Any) -> dict[str, str]:
    """Kohya's names of these weights and of those without which a program overlooks one of them,
    or none if one of them has no such name."""
    family = next((family(pipe) for family in FAMILIES if family.owns(pipe)), None)
    if family is None:
        return {}
    keys = {name: family.lora_key(name) for name in (*weights, *sorted(family.lora_also(weights)))}
    named = {name: key for name, key in keys.items() if key is not None}
    return named if len(named) == len(keys) else {}


def _check_low_rank(edit: Any, weights: Mapping[str, Tensor]) -> None:
    sparse = [name for name, c in edit.changes.items() if not isinstance(c, LowRankMap)]
    if not sparse:
        return
    name = sparse[0]
    error = left_out([factors(edit.changes[name], weights[name], COMMON)])
    raise ValueError(
        f"{edit!r} knocks out single entries of {len(sparse)} weights, such as {name}, and a LoRA "
        f"adds a matrix of low rank: use edit.save(path), or write the nearest of a rank, with "
        f"rank={COMMON} for example, which leaves out {error:.1%} of the change of that weight"
    )


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


def _write(
    path: str | Path, tensors: dict[str, Tensor], edit: Any, parts: Mapping[str, Factors]
) -> None:
    from safetensors.torch import save

    manifest = {
        "format": "lora",
        "weights": {name: len(part.A) for name, part in parts.items()},
        "left_out": {name: left_out([part]) for name, part in parts.items()},
        "originals": dict(edit.originals),
        "provenance": dataclasses.asdict(edit.provenance),
    }
    text = json.dumps(manifest, ensure_ascii=False, sort_keys=True)
    atomic_write(path, save(tensors, metadata={MANIFEST: text}))
