"""What is on a weight now, and how it comes off again.

Each change leaves an entry on the module whose weight it changed. So copies of the module, pickles
of it and other pipelines that share it know of the change too, and what was replaced is gone with
the module. An entry keeps what the change replaced (`Change.part` of the weight, in CPU memory) and
a digest of what it put there: where that is something else by now, something else changed it since,
and is never overwritten.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..records import digest as digest_of
from ..records import model_name
from .change import Change
from .weights import editable, editables, is_of

__all__ = ["Undo", "before_edit", "entries", "original", "original_of", "put_on", "take_off"]

#: Two threads do not change weights at once.
LOCK = threading.RLock()
#: The attribute of a module that holds its entries, oldest first.
ATTRIBUTE = "_loco_edits"


@dataclass(frozen=True, eq=False)
class Undo:
    """One change that is on a weight. digest, label: of the edit it belongs to. saved: what it
    replaced. left: digest of what it put there."""

    digest: str
    label: str
    change: Change
    saved: Tensor
    left: str

    def __deepcopy__(self, memo: dict) -> Undo:
        return self  # nothing in it ever changes


def entries(module: nn.Module) -> list[Undo]:
    """What is on the weight of `module`, the newest last."""
    return vars(module).get(ATTRIBUTE, [])


@torch.inference_mode()
def put_on(modules: Mapping[str, nn.Module], changes: Mapping[str, Change], by: Any) -> bool:
    """Change the weights of `modules` (name -> module); whether a single bit changed.

    by: who does it, with a `digest` and a repr. Raises ValueError if a result overflows the dtype,
    and leaves the weights as they were, as on Ctrl-C.
    """
    done: list[nn.Module] = []
    changed = False
    try:
        for name, module in modules.items():
            weight: Any = module.weight
            after = changes[name].apply_to(weight)
            if not torch.stack(after.aminmax()).isfinite().all():  # of NaN: NaN
                raise ValueError(
                    f"the edited {name} overflows {after.dtype}: load the pipeline in float32 or "
                    "make the edit with a larger lam"
                )
            changed |= not torch.equal(weight, after)
            with torch.inference_mode(False), torch.no_grad():  # else a copy could not be pickled
                saved = changes[name].part(weight).clone()
            left = _digest(changes[name].part(after))
            entry = Undo(by.digest, repr(by), changes[name], saved, left)
            done.append(module)
            vars(module).setdefault(ATTRIBUTE, []).append(entry)
            weight.copy_(after)
        torch.clear_autocast_cache()  # or an outer autocast keeps using the weights before
    except BaseException:
        done = [m for m in done if entries(m) and entries(m)[-1].digest == by.digest]
        for module in done:
            _give_back(module)
        _forget_newest(done)
        raise
    return changed


@torch.inference_mode()
def take_off(modules: Mapping[str, nn.Module], by: Any, subtract: bool = False) -> None:
    """Give the weights back what the newest entry of each replaced: what they would be by now
    without it, bit for bit.

    by: whose entry it must be. subtract: where somebody else changed the weights since, take the
    change off and leave that. Raises ValueError, and changes nothing, if it is not on, not the
    newest, or if somebody else changed a weight. What was interrupted can be done again.
    """
    for name, module in modules.items():
        if not is_on(module, by):
            raise ValueError(
                f"{by!r} is not applied to this pipeline ({name} has no such edit): call "
                "edit.apply(pipe) first, or use `with edit.applied(pipe):`"
            )
        if entries(module)[-1].digest != by.digest:
            raise ValueError(
                f"{by!r} is below {entries(module)[-1].label} on {name}: revert that edit first"
            )
        if module.weight.device.type == "meta":
            raise ValueError(
                f"{name} was offloaded since {by!r} was applied: call pipe.remove_all_hooks() first"
            )
    through = {name: _through(module) for name, module in modules.items()}
    foreign = [n for n, dtype in through.items() if dtype is None and not _undone(modules[n])]
    if foreign and not subtract:
        raise ValueError(
            f"{len(foreign)} of {len(modules)} weights, such as {foreign[0]}, were changed by "
            f"something else since {by!r} was applied, and giving back what was there before would "
            "undo that too. Undo it first (pipe.unfuse_lora(), say), or call "
            "edit.revert(pipe, subtract=True), which takes the edit's own change off, up to "
            "rounding; where other weights were loaded in their place, load the pipeline again"
        )
    _subtract([modules[name] for name in foreign])
    for name, module in modules.items():
        if name not in foreign:
            _give_back(module, through[name])
    _forget_newest(modules.values())


def is_on(module: nn.Module, by: Any) -> bool:
    """Whether a change by `by` is on the weight of `module`."""
    return any(entry.digest == by.digest for entry in entries(module))


@torch.inference_mode()
def settle(modules: Iterable[nn.Module]) -> None:
    """Forget entries whose weight was given back by somebody else, by `load_state_dict` say."""
    for module in modules:
        while entries(module) and not _through(module) and _undone(module):
            entries(module).pop()


def original(module: nn.Module) -> Tensor:
    """The weight of `module` as it was before any edit."""
    return list(_lineage(module))[-1]


def original_of(pipe: Any, name: str) -> Tensor:
    """The weight `name` of a pipeline as it was before any edit."""
    return original(editable(pipe, name))


@contextmanager
def before_edit(edit: Any, pipe: Any) -> Iterator[dict[str, Tensor]]:
    """Puts the weights that `edit` was made for into `pipe` for the length of a `with` block, and
    gives them by name. Raises ValueError if the pipeline has not had them."""
    modules = editables(pipe, edit.changes)
    weights: dict[str, Tensor] = {}
    now: dict[str, Tensor] = {}
    for name, module in modules.items():
        known = (w for w in _lineage(module) if is_of(w, edit.originals[name]))
        weight = next(known, None)
        if weight is None:
            raise ValueError(
                f"{edit!r} was made for other weights than those of this {model_name(pipe)} "
                f"({name} differs): load {edit.provenance.model}"
            )
        weights[name] = weight
        if not torch.equal(weight, module.weight):
            now[name] = module.weight.detach().clone()
    try:
        _put(modules, {name: weights[name] for name in now})
        yield weights
    finally:
        _put(modules, now)


def _lineage(module: nn.Module) -> Iterator[Tensor]:
    """The weight of `module`, and what it was below each of its entries; just the weight, if
    somebody else changed it."""
    weight: Any = module.weight.detach()
    yield weight
    if not entries(module) or not (dtype := _through(module)):
        return
    for entry in reversed(entries(module)):
        with torch.inference_mode(False), torch.no_grad():
            weight = weight.clone()
            entry.change.restore(weight, entry.saved.to(dtype))
        yield weight


def _through(module: nn.Module) -> torch.dtype | None:
    """The dtype to which a weight was rounded since its newest entry, its own if it was not; None
    for one that something else changed."""
    entry = entries(module)[-1]
    now: Any = entry.change.part(module.weight)
    own = entry.saved.dtype
    if now.dtype == own and _digest(now) == entry.left:
        return own
    moved = (own,) if now.dtype != own else ()
    for dtype in (*moved, torch.float16, torch.bfloat16):
        rounded = now.to(dtype)
        if torch.equal(rounded.to(now.dtype), now):
            put = entry.change.made(entry.saved).to(dtype)
            step = 2 * torch.finfo(dtype).eps  # it was made on another device, perhaps
            if torch.allclose(rounded.double(), put.double(), rtol=step, atol=1e-30):
                return dtype
    return None


def _undone(module: nn.Module) -> bool:
    """Whether a weight has by now what its newest entry replaced."""
    entry = entries(module)[-1]
    now: Any = entry.change.part(module.weight)
    return torch.equal(now, entry.saved.to(now.dtype))


def _give_back(module: nn.Module, through: torch.dtype | None = None) -> None:
    """Put back what the newest entry replaced. through: a dtype that the weight was rounded to."""
    entry = entries(module)[-1]
    entry.change.restore(module.weight, entry.saved.to(through))


def _subtract(modules: Sequence[nn.Module]) -> None:
    """W - (W_after - W_before) of the newest entry of each; of all, or on Ctrl-C of none."""
    found: list[tuple[nn.Module, Tensor, Tensor]] = []
    for module in modules:
        entry, weight = entries(module)[-1], module.weight
        before: Any = weight.detach().to("cpu", torch.float64, copy=True)
        now = before.clone()
        entry.change.restore(before, entry.saved)
        found.append((module, now, now - (entry.change.apply_to(before) - before)))
    try:
        for module, _, result in found:
            module.weight.copy_(result)
    except BaseException:
        for module, now, _ in found:
            module.weight.copy_(now)
        raise


def _forget_newest(modules: Iterable[nn.Module]) -> None:
    torch.clear_autocast_cache()
    for module in modules:  # only now: an interrupted restore can be repeated
        entries(module).pop()


@torch.inference_mode()
def _put(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        modules[name].weight.copy_(weight)
    torch.clear_autocast_cache()  # or an outer autocast keeps using the weights before


def _digest(x: Tensor) -> str:
    return digest_of([("", x.detach())], exact=True)
