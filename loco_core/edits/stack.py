"""Which edits are on which modules, and the weights below them.

The originals of an applied edit are kept here, keyed by the module they came from, so that taking
the edit off gives them back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..records import model_name
from .weights import editable, fingerprint

#: Every edited module with its edits, newest last, each with the weight as it was before.
stacks: WeakKeyDictionary[nn.Module, list[tuple[Any, Tensor]]] = WeakKeyDictionary()


def newest(module: nn.Module) -> Any:
    """The edit on top of `module`, or None."""
    stack = stacks.get(module)
    return stack[-1][0] if stack else None


def original_of(pipe: Any, name: str) -> Tensor:
    """The weight `name` as it was before any edit was applied."""
    module = editable(pipe, name)
    stack = stacks.get(module)
    return stack[0][1] if stack else module.weight.detach()


@contextmanager
def before_edit(edit: Any, pipe: Any) -> Iterator[dict[str, Tensor]]:
    """Puts the weights that `edit` was made for into `pipe` for the length of a `with` block, and
    gives them by name. Raises ValueError if the pipeline has not had them."""
    modules = {name: editable(pipe, name) for name in edit.changes}
    now = {name: module.weight.detach().clone() for name, module in modules.items()}
    made_for = {}
    for name, module in modules.items():
        known = [*(weight for _, weight in stacks.get(module, [])), now[name]]
        same_mark = [w for w in known if fingerprint(w) == edit.originals[name]]
        if not same_mark:
            raise ValueError(
                f"{edit!r} was made for other weights than those of this {model_name(pipe)} "
                f"({name} differs): load {edit.provenance.model}"
            )
        made_for[name] = same_mark[0]
    try:
        _put(modules, made_for)
        yield made_for
    finally:
        _put(modules, now)


@torch.no_grad()
def _put(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    for name, module in modules.items():
        module.weight.copy_(weights[name])
    torch.clear_autocast_cache()
