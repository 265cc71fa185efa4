"""Edit: a change of some weights of one model that can be put on, taken off, saved and loaded.

An edit holds, for every weight it touches, the change it makes there, never the changed weight: a
file of a few KB for maps. A change is a `LowRankMap` (one for all layers that read the same, see
`closed_form`) or a `Knockout` of single entries. An edit belongs to the weights it was made for and
refuses others. While it is applied, the modules keep what it replaced (`stack`), so that taking it
off gives the originals back bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .._warn import warn
from ..interventions.active import closed, opened
from ..records import Provenance, model_name, revision, versions
from . import file as edit_file
from . import stack
from .change import Change
from .lora import save_lora
from .stack import LOCK
from .weights import bare_module_of, editables, fingerprint, is_of

__all__ = ["Edit"]


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of the weights of one model, made by `loco_core.locoedit` and its kin.

    changes: weight name, from the pipeline down ("unet. ... .attn2.to_k.weight") -> its
    change. originals: weight name -> fingerprint of the weight that it is for. provenance: model,
    fingerprint of all of them, settings of the method, versions.
    Edits are equal when all three are, bit for bit.

        edit = loco.locoedit(pipe, concept, layers=[8, 9])
        with edit.applied(pipe):
            images = loco.generate(pipe, concept.prompts)
    """

    changes: Mapping[str, Change]
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
        return self is other or self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: dict) -> Edit:
        return self  # nothing in it ever changes

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

    @cached_property
    def digest(self) -> str:
        """64 hex digits that tell this edit from any other: the SHA-256 of what is saved."""
        return edit_file.digest(self.changes, self.originals, self.provenance)

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
        scaled = {change: change.scaled(scale) for change in set(self.changes.values())}
        settings = {**self.provenance.settings, "scale": self.scale * float(scale)}
        return Edit(
            {name: scaled[change] for name, change in self.changes.items()},
            self.originals,
            dataclasses.replace(self.provenance, settings=settings),
        )

    @contextmanager
    def applied(self, pipe: Any, scale: float = 1.0) -> Iterator[Any]:
        """The edited pipeline for the length of a `with` block, then exactly the one before.

        scale: see `scaled`. Restores also on an exception or Ctrl-C, which goes on as it came;
        where the edit cannot be taken off, it carries a note that says why. Errors as `apply` and
        `revert`.
        """
        edit = self.scaled(scale)
        edit.apply(pipe)
        try:
            yield pipe
        except BaseException as error:
            try:
                edit.revert(pipe)
            except Exception as left:
                error.add_note(f"and the edit is still on: {left}")
            raise
        edit.revert(pipe)

    def to_lora(self, path: str | Path, pipe: Any, rank: int | None = None) -> float:
        """Write the edit as a LoRA file, which diffusers and other programs read.

        pipe: the pipeline the edit was made for, edited or not; a LoRA holds W D, an edit only D.
        rank: at most so many rows for each weight; None keeps the whole change, which a knock-out
        has no room for. Returns the share of the change that the file leaves out, 0 for none.
        Errors as `lora.save_lora`, which says what is in the file.

            edit.to_lora("no_van_gogh.safetensors", pipe)
        """
        return save_lora(self, path, pipe, rank)

    def apply(self, pipe: Any) -> None:
        """Edit the weights of `pipe` in place, keeping what `revert` needs.

        Each new weight has the pipeline's dtype and device; see the `apply_to` of its change for
        how exactly it is computed. What is replaced is kept on the module, in CPU memory: of a map
        the weight, of a knock-out the entries. Another pipeline that shares the module is edited
        too, and copies and pickles of an edited pipeline can be reverted.
        Raises ValueError, and leaves the pipeline as it was, if the edit is already applied, was
        made for other weights, meets a fused, quantised, offloaded or adapter-wrapped projection,
        or if a result overflows the dtype. Warns if no weight changes by a single bit.
        """
        with LOCK:
            modules = editables(pipe, self.changes)
            stack.settle(modules.values())
            on = {e.digest: e.label for m in modules.values() for e in stack.entries(m)}
            if self.digest in on:
                raise ValueError(
                    f"{self!r} is already applied to this pipeline: call edit.revert(pipe) first"
                )
            fix = (
                f"they are changed by {sorted(on.values())}: revert that and apply "
                "loco.compose(that, this), or make this edit on the edited pipeline"
                if on
                else f"load {self.provenance.model}, or make the edit again on this model"
            )
            self.check_made_for(pipe, {name: m.weight for name, m in modules.items()}, fix)
            changed = stack.put_on(modules, self.changes, self)
            try:
                opened(pipe, _Applied(self))
                if not changed:
                    warn(
                        f"{self!r} changes nothing: its prompts and targets have the same "
                        "embeddings, its scale is 0, lam is too large for the dtype of the "
                        "pipeline, or the weights it knocks out are 0 already",
                    )
            except BaseException:  # Ctrl-C, or a warning made an error
                self.revert(pipe)
                raise

    def revert(self, pipe: Any, *, subtract: bool = False) -> None:
        """Give the weights of `pipe` back bit for bit, as they were before `apply`.

        Also through a LoRA that was loaded since. subtract: take off what the edit changed from
        weights that something else changed too, up to rounding: W - (W_after - W_before).
        Raises ValueError, and leaves the pipeline as it is, if the edit is not applied, if another
        edit was applied on top of it, or if something else changed a weight since (a fused LoRA,
        load_state_dict) and subtract is False.
        """
        with LOCK:
            modules = {name: bare_module_of(pipe, name) for name in self.changes}
            stack.take_off(modules, self, subtract)
            closed(pipe, _Applied(self))

    def save(self, path: str | Path) -> None:
        """Write the edit to `path`: safetensors, with a readable manifest in its metadata.

        Whole or not at all; raises OSError naming the path if the disk is full or read-only.
        """
        edit_file.write(path, self.changes, self.originals, self.provenance)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """The edit saved at `path`, equal to the one that was saved.

        Raises FileNotFoundError if there is none, and ValueError with the path and the reason if
        the file is damaged or no edit.
        """
        return cls(*edit_file.read(path))

    def check_made_for(self, pipe: Any, weights: Mapping[str, Tensor], fix: str) -> None:
        """Raise ValueError, which ends in `fix`, unless the edit was made for these `weights`."""
        self._check_fits(pipe, weights)
        wrong = [n for n, w in weights.items() if not is_of(w, self.originals[n])]
        if wrong:
            raise ValueError(
                f"{self!r} was made for other weights than those of this {model_name(pipe)} "
                f"({len(wrong)} of {len(weights)} differ, such as {wrong[0]}): {fix}"
            )

    def _check_fits(self, pipe: Any, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            try:
                self.changes[name].check(weight)
            except ValueError as error:
                raise ValueError(
                    f"{self!r} does not fit {name} of this {model_name(pipe)}: {error}"
                ) from None


@dataclass(frozen=True)
class _Applied:
    """`Edit.applied`, to be entered again on another pipeline."""

    edit: Edit

    def __call__(self, pipe: Any) -> Any:
        return self.edit.applied(pipe)

    def still_on(self, pipe: Any) -> bool:
        """Whether it is: a pipeline that shares the modules may have taken it off."""
        return all(stack.is_on(bare_module_of(pipe, n), self.edit) for n in self.edit.changes)


def make_edit(pipe: Any, changes: Mapping[str, Change], **settings: Any) -> Edit:
    """An Edit of `changes` (weight name -> change) that belongs to the weights `pipe` has now.

    settings: how it was made (JSON values). Raises ValueError for a name that is no plain weight
    of the pipeline, for a weight that its change does not fit, or that holds NaN or infinite
    values.
    """
    weights = {name: module.weight for name, module in editables(pipe, changes).items()}
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
    edit = Edit(dict(changes), originals, made)
    edit._check_fits(pipe, weights)
    return edit


def parts_of(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of the solves an edit was made from: of each part, if it was composed."""
    if "parts" in settings:
        return [leaf for part in settings["parts"] for leaf in parts_of(part)]
    return [settings] if "concepts" in settings else []


def joint(originals: Mapping[str, str]) -> str:
    """One fingerprint of the fingerprints of several weights."""
    text = json.dumps(sorted(originals.items()))
    return hashlib.sha256(text.encode()).hexdigest()
