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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._warn import warn
from ..records import Provenance, atomic_write, model_name, revision, same, versions
from .closed_form import LowRankMap
from .weights import fingerprint, linear_of, module_of

__all__ = ["Edit", "compose"]

FORMAT = 2
MANIFEST = "loco_core.edit"

# Every edited module with its edits, newest last, each with the weight as it was before.
_applied: WeakKeyDictionary[nn.Module, list[tuple[Edit, Tensor]]] = WeakKeyDictionary()


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
        edit = self if scale == 1 else self.scaled(scale)
        edit.apply(pipe)
        try:
            yield pipe
        finally:
            edit.revert(pipe)

    def to_lora(self, path: str | Path, pipe: Any) -> None:
        """Write the edit as a LoRA file that `pipe.load_lora_weights(path)` reads.

        See `lora.save_lora`: the pipeline is asked for the weights W of B = W D.
        """
        from .lora import save_lora

        save_lora(self, path, pipe)

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
            torch.clear_autocast_cache()  # or an outer autocast keeps using the old weights
        except BaseException:  # Ctrl-C too: no half-applied edit
            self._restore([module for module in modules.values() if _newest(module) == self])
            raise
        if not changed:
            warn(
                f"{self!r} changes nothing: its prompts and targets have the same embeddings, or "
                "lam is too large for the dtype of the pipeline",
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
        found = {name: fingerprint(module.weight) for name, module in modules.items()}
        wrong = [name for name, mark in self.originals.items() if found[name] != mark]
        if wrong:
            reason = (
                f"they are changed by {sorted(map(repr, others))}: revert that and apply "
                "loco.compose(that, this), or make this edit on the edited pipeline"
                if others
                else f"load {self.provenance.model}, or make the edit again on this model"
            )
            raise ValueError(
                f"{self!r} was made for other weights than those of this {model_name(pipe)} "
                f"({len(wrong)} of {len(found)} differ, such as {wrong[0]}): {reason}"
            )

    def _restore(self, modules: list[nn.Module]) -> None:
        for module in modules:
            module.weight.copy_(_applied[module][-1][1])
        torch.clear_autocast_cache()
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
    originals = {name: fingerprint(weight) for name, weight in weights.items()}
    made = Provenance(
        model=model_name(pipe),
        revision=revision(pipe),
        fingerprint=_joint(originals),
        settings=json.loads(json.dumps(settings)),
        versions=versions(),
    )
    return Edit(dict(changes), originals, made)


def compose(first: Edit, second: Edit) -> Edit:
    """One edit that does what `first` does and then `second`: W' = W T_first T_second.

    A map depends on the text alone, not on the weights, so this equals, up to rounding, applying
    `first` and then making and applying `second` on the edited pipeline. Both must be for the same
    weights. The order matters where both move the same directions. Ranks add up.
    Raises ValueError for edits of different models or weights.

        both = loco.compose(no_van_gogh, no_monet)
    """
    for edit, other in ((first, second), (second, first)):
        clash = [n for n, mark in edit.originals.items() if other.originals.get(n, mark) != mark]
        if clash or edit.provenance.model != other.provenance.model:
            raise ValueError(
                f"{first!r} and {second!r} are not for the same weights"
                + (f" ({clash[0]} differs)" if clash else "")
                + ": make both on the same unedited pipeline"
            )
    originals = {**first.originals, **second.originals}
    joined: dict[tuple[LowRankMap | None, LowRankMap | None], LowRankMap] = {}
    for name in originals:
        a, b = pair = first.changes.get(name), second.changes.get(name)
        joined[pair] = a.then(b) if a and b else a or b  # type: ignore[assignment]
    changes = {n: joined[first.changes.get(n), second.changes.get(n)] for n in originals}
    parts = [p for edit in (first, second) for p in parts_of(edit.provenance.settings)]
    made = dataclasses.replace(
        first.provenance,
        fingerprint=_joint(originals),
        settings={"method": "compose", "parts": parts},
    )
    return Edit(changes, originals, made)


def parts_of(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of the solves an edit was made from: of each part, if it was composed."""
    return [p for p in settings.get("parts", [settings]) if "concepts" in p]


def original_of(pipe: Any, name: str) -> Tensor:
    """The weight `name` as it was before any edit was applied."""
    module = linear_of(pipe, name)
    stack = _applied.get(module)
    return stack[0][1] if stack else module.weight.detach()


def _joint(originals: Mapping[str, str]) -> str:
    text = json.dumps(sorted(originals.items()))
    return hashlib.sha256(text.encode()).hexdigest()


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
