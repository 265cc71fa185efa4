"""An edit on disk: one safetensors file, with a readable manifest in its metadata.

A change is a frozen dataclass of tensors and JSON values, so its fields are what is written: the
tensors as "<number>.<field>", the rest in the manifest, with the kind of change. Indices of more
than every 32nd entry take less room as a bit for each: "<number>.<field>.bits". A SHA-256 over
manifest and tensors refuses a file that was damaged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ..files import atomic_write
from ..records import Provenance
from .knockout import Knockout
from .low_rank import LowRankMap

__all__ = ["MANIFEST", "read", "write"]

FORMAT = 3
OLDER = (2,)  # held low-rank maps only
MANIFEST = "loco_core.edit"
KINDS = {"low-rank": LowRankMap, "knockout": Knockout}


Told = tuple[dict[str, Any], dict[str, Tensor]]


def write(
    path: str | Path,
    changes: Mapping[str, Any],
    originals: Mapping[str, str],
    provenance: Provenance,
) -> None:
    """Write the fields of an edit to `path`, whole or not at all.

    Weights that share a change share it in the file. Raises OSError naming the path.
    """
    from safetensors.torch import save

    manifest, tensors = _told(changes, originals, provenance)
    manifest["sha256"] = _seal(manifest, tensors)
    text = json.dumps(manifest, ensure_ascii=False, sort_keys=True)
    atomic_write(path, save(tensors, metadata={MANIFEST: text}))


def digest(changes: Mapping[str, Any], originals: Mapping[str, str], provenance: Provenance) -> str:
    """SHA-256 of what `write` writes: equal for equal edits, saved and loaded or not."""
    return _seal(*_told(changes, originals, provenance))


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, str], Provenance]:
    """Changes, originals and provenance of the edit saved at `path`, equal to what was saved.

    The file is read whole: what becomes of it later does not matter. Raises FileNotFoundError if
    there is none, and ValueError with the path and the reason if it is damaged or no edit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no edit is saved at {path}: write one with edit.save(path)")
    try:
        return _parsed(path.read_bytes())
    except OSError:
        raise
    except Exception as error:  # whatever a made-up file brings about
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"cannot load an edit from {path}: {reason}; make the edit again and save it"
        ) from error


def _parsed(blob: bytes) -> tuple[dict[str, Any], dict[str, str], Provenance]:
    from safetensors.torch import load

    tensors = load(blob)
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    metadata = header.get("__metadata__", {})
    if MANIFEST not in metadata:
        raise ValueError(f"it has no {MANIFEST!r} in its metadata, so it is no edit")
    manifest = json.loads(metadata[MANIFEST])
    if manifest["format"] not in (FORMAT, *OLDER):
        raise ValueError(f"its format is {manifest['format']!r}, this version reads {FORMAT}")
    if manifest.pop("sha256") != _seal(manifest, tensors):
        raise ValueError("its contents do not match their checksum")
    maps = [{"kind": "low-rank"}] * (len(tensors) // 2)
    made = [_made(i, kind, tensors) for i, kind in enumerate(manifest.get("changes", maps))]
    changes = {name: made[i] for name, i in manifest["weights"].items()}
    originals, provenance = manifest["originals"], Provenance(**manifest["provenance"])
    if originals.keys() != changes.keys() or not changes:
        raise ValueError("its weights and its originals are not the same, or there are none")
    if not all(isinstance(mark, str) for mark in originals.values()):
        raise ValueError("its originals are no fingerprints")
    if not isinstance(provenance.settings, dict) or not isinstance(provenance.model, str):
        raise ValueError("its provenance has no settings or no model")
    return changes, originals, provenance


def _told(changes: Mapping[str, Any], originals: Mapping[str, str], provenance: Provenance) -> Told:
    """A manifest without its seal, and the tensors that it describes."""
    changes = dict(sorted(changes.items()))  # in one order: the digest is of what the edit is
    distinct = {change: i for i, change in enumerate(dict.fromkeys(changes.values()))}
    tensors: dict[str, Tensor] = {}
    kinds = []
    for change, i in distinct.items():
        fields = {f.name: getattr(change, f.name) for f in dataclasses.fields(change)}
        held = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        for name, value in held.items():
            of = math.prod(fields["shape"]) if name == "indices" else 0
            dense = of and len(value) > of / 32
            key = f"{i}.{name}.bits" if dense else f"{i}.{name}"
            tensors[key] = _bits(value, of) if dense else _narrow(value)
        kind = next(kind for kind, made in KINDS.items() if isinstance(change, made))
        kinds.append({"kind": kind} | {n: v for n, v in fields.items() if n not in held})
    manifest = {
        "format": FORMAT,
        "changes": kinds,
        "weights": {name: distinct[change] for name, change in changes.items()},
        "originals": dict(originals),
        "provenance": dataclasses.asdict(provenance),
    }
    return manifest, tensors


def _made(number: int, kind: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The change that was written as `number`."""
    values = {k: v for k, v in kind.items() if k != "kind"}
    own = [name for name in tensors if name.startswith(f"{number}.")]
    held = {name.partition(".")[2]: _widen(tensors[name]) for name in own}
    for name in [name for name in held if name.endswith(".bits")]:
        held[name.removesuffix(".bits")] = _set_bits(held.pop(name))
    return KINDS[kind["kind"]](**values, **held)


def _narrow(tensor: Tensor) -> Tensor:
    """Whole numbers in half the bytes, if they fit."""
    fits = tensor.dtype == torch.int64 and tensor.abs().max() < 2**31
    return tensor.to(torch.int32) if fits else tensor


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int64) if tensor.dtype == torch.int32 else tensor


def _bits(indices: Tensor, size: int) -> Tensor:
    """A bit for each of `size` entries, 1 for those at `indices`: [ceil(size / 8)] uint8."""
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[indices] = 1
    return torch.from_numpy(numpy.packbits(mask.numpy()))


def _set_bits(bits: Tensor) -> Tensor:
    """Where they are 1: [n] int64."""
    return torch.from_numpy(numpy.unpackbits(bits.numpy())).nonzero()[:, 0]


def _seal(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a manifest without its seal and of the tensors it describes."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
