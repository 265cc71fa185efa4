"""Edit: a change of some weights of one model that can be put on, taken off, saved and loaded.

An edit holds, for every weight it touches, the map that changes it (one shared map for all layers,
see `closed_form`), never the changed weights: a file of a few KB. It belongs to the weights it was
made for and refuses others. While it is applied, the originals are kept here, keyed by the module
they came from, so that taking it off gives them back bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..records import Provenance, atomic_write, model_name, revision, same, versions
from .closed_form import LowRankMap
from .weights import fingerprint, linear_of, module_of

__all__ = ["Edit"]

FORMAT = 1
MANIFEST = "loco_core.edit"

# Every edited module with its edits, newest last, each with the weight as it was before.
_applied: WeakKeyDictionary[nn.Module, list[tuple[Edit, Tensor]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of the weights of one model, made by `loco_core.locoedit` and its kin.

    changes: weight name, from the pipeline down ("unet. ... .attn2.to_k.weight") -> its map.
    provenance: model, fingerprint of the touched weights, settings of the method, versions.
    Edits are equal when both are, bit for bit.

        edit = loco.locoedit(pipe, concept, layers=[8, 9])
        with edit.applied(pipe):
            images = loco.generate(pipe, concept.prompts)
    """

    changes: Mapping[str, LowRankMap]
    provenance: Provenance

    def __post_init__(self) -> None:
        if not self.changes:
            raise ValueError("an edit must change at least one weight, but `changes` is empty")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edit):
            return NotImplemented
        return self is other or same(self, other)

    def __hash__(self) -> int:
        return hash((self.provenance.fingerprint, *sorted(self.changes)))

    def __repr__(self) -> str:
        made = self.provenance
        what = {k: made.settings[k] for k in ("concept", "layers") if k in made.settings}
        method = made.settings.get("method", "edit")
        told = "".join(f", {name}={value!r}" for name, value in what.items())
        return f"<Edit: {method} of {len(self.changes)} weights of {made.model}{told}>"

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[Any]:
        """The edited pipeline for the length of a `with` block, then exactly the one before.

        Restores also on an exception or Ctrl-C. Errors as `apply`.
        """
        self.apply(pipe)
        try:
            yield pipe
        finally:
            self.revert(pipe)

    @torch.inference_mode()
    def apply(self, pipe: Any) -> None:
        """Edit the weights of `pipe` in place, keeping the originals for `revert`.

        Each new weight is computed in float64 and rounded to the pipeline's dtype on its device.
        Raises ValueError, and leaves the pipeline as it was, if the edit is already applied, was
        made for other weights, meets a fused, quantised or adapter-wrapped projection, or if a
        result overflows the dtype. Warns if no weight changes by a single bit.
        """
        modules = {name: linear_of(pipe, name) for name in self.changes}
        self._check_made_for(pipe, modules)
        changed = False
        try:
            for name, module in modules.items():
                before, after = module.weight.clone(), self.changes[name].apply_to(module.weight)
                if not after.isfinite().all():
                    raise ValueError(
                        f"the edited {name} overflows {after.dtype}: load the pipeline in float32 "
                        "or make the edit with a larger lam"
                    )
                changed |= not torch.equal(before, after)
                _applied.setdefault(module, []).append((self, before))
                module.weight.copy_(after)
        except BaseException:  # Ctrl-C too: no half-applied edit
            self._restore([module for module in modules.values() if _newest(module) == self])
            raise
        if not changed:
            warnings.warn(
                f"{self!r} changes nothing: its prompts and targets have the same embeddings, or "
                "lam is too large for the dtype of the pipeline",
                stacklevel=3,  # past the decorator
            )

    @torch.inference_mode()
    def revert(self, pipe: Any) -> None:
        """Give the weights of `pipe` back bit for bit, as they were before `apply`.

        Raises ValueError if the edit is not applied, or if another edit was applied on top of it.
        """
        modules = {name: module_of(pipe, name) for name in self.changes}
        for name, module in modules.items():
            if not any(edit == self for edit, _ in _applied.get(module, [])):
                raise ValueError(
                    f"{self!r} is not applied to this pipeline ({name} has no such edit): call "
                    "edit.apply(pipe) first, or use `with edit.applied(pipe):`"
                )
            if _newest(module) != self:
                raise ValueError(
                    f"{self!r} is below {_newest(module)!r} on {name}: revert that edit first"
                )
        self._restore(list(modules.values()))

    def save(self, path: str | Path) -> None:
        """Write the edit to `path`: safetensors, with a readable manifest in its metadata.

        Whole or not at all; raises OSError naming the path if the disk is full or read-only.
        """
        from safetensors.torch import save

        maps: list[LowRankMap] = []
        for change in self.changes.values():
            if not any(change == known for known in maps):
                maps.append(change)
        tensors = {f"{i}.{part}": getattr(m, part) for i, m in enumerate(maps) for part in "DR"}
        manifest = {
            "format": FORMAT,
            "weights": {name: maps.index(change) for name, change in self.changes.items()},
            "provenance": dataclasses.asdict(self.provenance),
        }
        manifest["sha256"] = _seal(manifest, tensors)
        text = json.dumps(manifest, ensure_ascii=False, sort_keys=True)
        atomic_write(path, save(tensors, metadata={MANIFEST: text}))

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """The edit saved at `path`, equal to the one that was saved.

        Raises FileNotFoundError if there is none, and ValueError with the path and the reason if
        the file is damaged or no edit.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no edit is saved at {path}: write one with edit.save(path)")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if MANIFEST not in metadata:
                raise ValueError(f"it has no {MANIFEST!r} in its metadata, so it is no edit")
            manifest = json.loads(metadata[MANIFEST])
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']!r}, this version reads 1")
            if manifest.pop("sha256") != _seal(manifest, tensors):
                raise ValueError("its contents do not match their checksum")
            maps = [
                LowRankMap(tensors[f"{i}.D"], tensors[f"{i}.R"]) for i in range(len(tensors) // 2)
            ]
            changes = {name: maps[i] for name, i in manifest["weights"].items()}
            return cls(changes, Provenance(**manifest["provenance"]))
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"cannot load an edit from {path}: {error}; save the edit again"
            ) from error

    def _check_made_for(self, pipe: Any, modules: Mapping[str, nn.Linear]) -> None:
        others = {edit for module in modules.values() for edit, _ in _applied.get(module, [])}
        if self in others:
            raise ValueError(
                f"{self!r} is already applied to this pipeline: call edit.revert(pipe) first"
            )
        for name, module in modules.items():
            if module.in_features != self.changes[name].width:
                raise ValueError(
                    f"{self!r} edits weights with {self.changes[name].width} columns, but {name} "
                    f"of this {model_name(pipe)} has {module.in_features}: it is another model"
                )
        if fingerprint({n: m.weight for n, m in modules.items()}) != self.provenance.fingerprint:
            reason = (
                f"they are changed by {sorted(map(repr, others))}: revert that, or make this edit "
                "on the edited pipeline"
                if others
                else f"load {self.provenance.model}, or make the edit again on this model"
            )
            raise ValueError(
                f"{self!r} was made for other weights than those of this {model_name(pipe)}: "
                f"{reason}"
            )

    def _restore(self, modules: list[nn.Module]) -> None:
        for module in modules:
            module.weight.copy_(_applied[module][-1][1])
        for module in modules:  # only now: an interrupted restore can be repeated
            _applied[module].pop()


def make_edit(pipe: Any, changes: Mapping[str, LowRankMap], **settings: Any) -> Edit:
    """An Edit of `changes` (weight name -> map) that belongs to the weights `pipe` has now.

    settings: how it was made (JSON values). Raises ValueError for a name that is no plain linear
    weight of the pipeline, or whose weight holds NaN or infinite values.
    """
    weights = {name: linear_of(pipe, name).weight for name in changes}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinite values: the checkpoint is damaged, load it again"
            )
    made = Provenance(
        model=model_name(pipe),
        revision=revision(pipe),
        fingerprint=fingerprint(weights),
        settings=json.loads(json.dumps(settings)),
        versions=versions(),
    )
    return Edit(dict(changes), made)


def _newest(module: nn.Module) -> Edit | None:
    stack = _applied.get(module)
    return stack[-1][0] if stack else None


def _seal(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a manifest without its seal and of the tensors it describes."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
