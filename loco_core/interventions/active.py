"""What is hooked onto a network now: our own hooks, which say in JSON what they do, and others'.

A hook of ours carries its description with it, on the module where it works. So whoever must know
what a network does at this moment reads it off the network: also on a copy, and also when another
pipeline shares the module.
"""

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..records import digest

__all__ = ["closed", "foreign_hooks", "opened", "ours", "reopened", "said", "says_tensor"]

#: Where hooks come from that only look.
HARMLESS = ("transformers.utils.output_capturing",)

#: Pipeline -> the contexts that are open on it, oldest first: each is entered again elsewhere by
#: calling it with another pipeline (see `painting.remote`).
_open: WeakKeyDictionary[Any, list[Callable[[Any], Any]]] = WeakKeyDictionary()


def ours(hook: Callable, says: Any = None) -> Callable:
    """`hook`, marked as one of this library. says: what it does (JSON), or a function that tells
    it when somebody asks; None: it changes nothing.

    module.register_forward_hook(ours(hook, {"held": [3, 7]}))
    """
    hook.says = says  # type: ignore[attr-defined]
    return hook


def says_tensor(x: Tensor) -> str:
    """A tensor inside of a description: the digest of its bytes."""
    return digest([("", x)], exact=True)


def said(network: nn.Module) -> list[list[Any]]:
    """[name of the module, what the hook says] of every hook of ours that changes something."""
    return [
        [name, hook.says() if callable(hook.says) else hook.says]
        for name, hook in _hooks(network)
        if getattr(hook, "says", None) is not None
    ]


def foreign_hooks(network: nn.Module) -> list[str]:
    """Names of the modules with a hook, or a forward of their own, that is not ours.

    accelerate's offload replaces `forward`, and transformers notes hidden states by hooks of its
    own; both change no result and are not counted.
    """
    found = [
        name
        for name, hook in _hooks(network)
        if not hasattr(hook, "says") and getattr(hook, "__module__", "") not in HARMLESS
    ]
    found += [
        name
        for name, module in network.named_modules()
        if "forward" in vars(module) and not hasattr(module, "_hf_hook")
    ]
    everywhere = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    if any(everywhere):
        found.append("every module (a global hook)")
    return list(dict.fromkeys(found))


def _hooks(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in network.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            yield name, hook


def opened(pipe: Any, context: Callable[[Any], Any]) -> None:
    """Note that `context(pipe)`, a context manager that can be pickled, is open on `pipe`."""
    _open.setdefault(pipe, []).append(context)


def closed(pipe: Any, context: Callable[[Any], Any]) -> None:
    """Note that `context`, as it was given to `opened`, is open no more."""
    contexts = _open.get(pipe, [])
    if context in contexts:
        contexts.reverse()
        contexts.remove(context)  # the newest of equal ones
        contexts.reverse()


def reopened(pipe: Any) -> tuple[Callable[[Any], Any], ...]:
    """The contexts that are open on `pipe`, oldest first, without those that say by `still_on` that
    they are so no more."""
    contexts = _open.get(pipe, [])
    contexts[:] = [c for c in contexts if getattr(c, "still_on", lambda pipe: True)(pipe)]
    return tuple(contexts)
