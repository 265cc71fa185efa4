"""Edit: a change of some weights of one model that can be put on, taken off, saved and loaded.

An edit holds, for every weight it touches, the map that changes it (one shared map for all layers,
see `closed_form`), never the changed weights: a file of a few KB. It belongs to the weights it was
made for and refuses others. While it is applied, `applied` keeps the originals, so that taking it
off gives them back bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._warn import warn
from ..records import Provenance, atomic_write, model_name, revision, same, versions
from .applied import newest, stacks
from .closed_form import LowRankMap
from .weights import fingerprint, linear_of, module_of

__all__ = ["Edit"]

FORMAT = 2
MANIFEST = "loco_core.edit"


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of the weights of one model, made by `loco_core.locoedit` and its kin.

    changes: weight name, from the pipeline down ("unet. ... .attn2.to_k.weight") -> its map.
    originals: weight name -> fingerprint of the weight that the map is for. provenance: model,
    fingerprint of all of them, settings of the method, versions.
    Edits are equal when all three are, bit for bit.

        edit = loco.locoedit(pipe, concept, layers=[8, 9])
        with edit.applied(pipe):
            images = loco.generate(pipe, concept.prompts)
    """

    changes: Mapping[str, LowRankMap]
    originals: Mapping[str, str]
    provenance: Provenance

    def __post_init__(self) -> None:
        if not self.changes:
            raise ValueError("an edit must change at least one weight, but `changes` is empty")
        if self.originals.keys() != self.changes.keys():
            raise ValueError("`originals` must name the same weights as `changes`")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edit):
            return NotImplemented
        return self is other or same(self, other)

    def __hash__(self) -> int:
        return hash((self.provenance.fingerprint, *sorted(self.changes)))

    def __repr__(self) -> str:
        made = self.provenance
        names = [c["name"] for part in parts_of(made.settings) for c in part["concepts"]]
        told = f", concept={', '.join(names)}" if names else ""
        if "layers" in made.settings:
            told += f", layers={made.settings['layers']}"
        if self.scale != 1:
            told += f", scale={self.scale:g}"
        method = made.settings.get("method", "edit")
        return f"<Edit: {method} of {len(self.changes)} weights of {made.model}{told}>"

    @property
    def scale(self) -> float:
        """How much of the edit as it was made this is: see `scaled`."""
        return self.provenance.settings.get("scale", 1.0)

    def scaled(self, scale: float) -> Edit:
        """The edit with `scale` times its change of every weight: 0 is none, 1 this one, 0.5 half.

        Raises ValueError for a scale that is not finite.

            with edit.scaled(0.5).applied(pipe): ...
        """
        if scale == 1:
            return self
        scaled = {m: m.scaled(scale) for m in set(self.changes.values())}
        settings = {**self.provenance.settings, "scale": self.scale * float(scale)}
        return Edit(
            {name: scaled[change] for name, change in self.changes.items()},
            self.originals,
            dataclasses.replace(self.provenance, settings=settings),
        )

    @contextmanager
    def applied(self, pipe: Any, scale: float = 1.0) -> Iterator[Any]:
        """The edited pipeline for the length of a `with` block, then exactly the one before.

        scale: see `scaled`. Restores also on an exception or Ctrl-C. Errors as `apply`.
        """
        edit = self.scaled(scale)
        edit.apply(pipe)
        try:
            yield pipe
        finally:
            edit.revert(pipe)

    def to_lora(self, path: str | Path, pipe: Any) -> None:
        """Write the edit as a LoRA file that `pipe.load_lora_weights(path)` reads.

        pipe: the pipeline the edit was made for, edited or not; a LoRA holds W D, an edit only D.
        Errors as `lora.save_lora`, which says what is in the file.

            edit.to_lora("no_van_gogh.safetensors", pipe)
        """
        from .lora import save_lora

        save_lora(self, path, pipe)

    @torch.inference_mode()
    def apply(self, pipe: Any) -> None:
        """Edit the weights of `pipe` in place, keeping the originals for `revert`.

        Each new weight has the pipeline's dtype and device; see `LowRankMap.apply_to` for how
        exactly it is computed.
        Raises ValueError, and leaves the pipeline as it was, if the edit is already applied, was
        made for other weights, meets a fused, quantised or adapter-wrapped projection, or if a
        result overflows the dtype. Warns if no weight changes by a single bit.
        """
        modules = {name: linear_of(pipe, name) for name in self.changes}
        others = {edit for module in modules.values() for edit, _ in stacks.get(module, [])}
        if self in others:
            raise ValueError(
                f"{self!r} is already applied to this pipeline: call edit.revert(pipe) first"
            )
        fix = (
            f"they are changed by {sorted(map(repr, others))}: revert that and apply "
            "loco.compose(that, this), or make this edit on the edited pipeline"
            if others
            else f"load {self.provenance.model}, or make the edit again on this model"
        )
        self.check_made_for(pipe, {name: m.weight for name, m in modules.items()}, fix)
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
                stacks.setdefault(module, []).append((self, before))
                module.weight.copy_(after)
            torch.clear_autocast_cache()  # or an outer autocast keeps using the old weights
            if not changed:
                warn(
                    f"{self!r} changes nothing: its prompts and targets have the same embeddings, "
                    "its scale is 0, or lam is too large for the dtype of the pipeline",
                )
        except BaseException:  # Ctrl-C too, and a warning made an error: no half-applied edit
            self._restore([module for module in modules.values() if newest(module) == self])
            raise

    @torch.inference_mode()
    def revert(self, pipe: Any) -> None:
        """Give the weights of `pipe` back bit for bit, as they were before `apply`.

        Raises ValueError if the edit is not applied, or if another edit was applied on top of it.
        """
        modules = {name: module_of(pipe, name) for name in self.changes}
        for name, module in modules.items():
            if not any(edit == self for edit, _ in stacks.get(module, [])):
                raise ValueError(
                    f"{self!r} is not applied to this pipeline ({name} has no such edit): call "
                    "edit.apply(pipe) first, or use `with edit.applied(pipe):`"
                )
            if newest(module) != self:
                raise ValueError(
                    f"{self!r} is below {newest(module)!r} on {name}: revert that edit first"
                )
        self._restore(list(modules.values()))

    def save(self, path: str | Path) -> None:
        """Write the edit to `path`: safetensors, with a readable manifest in its metadata.

        Whole or not at all; raises OSError naming the path if the disk is full or read-only.
        """
        from safetensors.torch import save

        maps = list(dict.fromkeys(self.changes.values()))
        tensors = {f"{i}.{part}": getattr(m, part) for i, m in enumerate(maps) for part in "DR"}
        manifest = {
            "format": FORMAT,
            "weights": {name: maps.index(change) for name, change in self.changes.items()},
            "originals": dict(self.originals),
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
                raise ValueError(
                    f"its format is {manifest['format']!r}, this version reads {FORMAT}"
                )
            if manifest.pop("sha256") != _seal(manifest, tensors):
                raise ValueError("its contents do not match their checksum")
            maps = [
                LowRankMap(tensors[f"{i}.D"], tensors[f"{i}.R"]) for i in range(len(tensors) // 2)
            ]
            changes = {name: maps[i] for name, i in manifest["weights"].items()}
            return cls(changes, manifest["originals"], Provenance(**manifest["provenance"]))
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"cannot load an edit from {path}: {error}; make the edit again and save it"
            ) from error

    def check_made_for(self, pipe: Any, weights: Mapping[str, Tensor], fix: str) -> None:
        """Raise ValueError, which ends in `fix`, unless the edit was made for these `weights`."""
        for name, weight in weights.items():
            if weight.shape[1] != self.changes[name].width:
                raise ValueError(
                    f"{self!r} edits weights with {self.changes[name].width} columns, but {name} "
                    f"of this {model_name(pipe)} has {weight.shape[1]}: it is another model"
                )
        found = {name: fingerprint(weight) for name, weight in weights.items()}
        wrong = [name for name, mark in self.originals.items() if found[name] != mark]
        if wrong:
            raise ValueError(
                f"{self!r} was made for other weights than those of this {model_name(pipe)} "
                f"({len(wrong)} of {len(found)} differ, such as {wrong[0]}): {fix}"
            )

    def _restore(self, modules: list[nn.Module]) -> None:
        for module in modules:
            module.weight.copy_(stacks[module][-1][1])
        torch.clear_autocast_cache()
        for module in modules:  # only now: an interrupted restore can be repeated
            stacks[module].pop()


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
    originals = {name: fingerprint(weight) for name, weight in weights.items()}
    made = Provenance(
        model=model_name(pipe),
        revision=revision(pipe),
        fingerprint=joint(originals),
        settings=json.loads(json.dumps(settings)),
        versions=versions(),
    )
    return Edit(dict(changes), originals, made)


def parts_of(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of the solves an edit was made from: of each part, if it was composed."""
    if "parts" in settings:
        return [leaf for part in settings["parts"] for leaf in parts_of(part)]
    return [settings] if "concepts" in settings else []


def joint(originals: Mapping[str, str]) -> str:
    """One fingerprint of the fingerprints of several weights."""
    text = json.dumps(sorted(originals.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _seal(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a manifest without its seal and of the tensors it describes."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
