"""What tells one set of weights from another: a SHA-256 of every tensor, byte by byte.

Weights are read one at a time, wherever they are, and rounded in pieces, so that nothing of them is
held twice.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["digest", "fingerprint", "weights"]


def weights(owner: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and buffer of a network, or of all networks of a pipeline.

    Tensors stay where they are; those that accelerate keeps elsewhere are read one by one.
    Raises ValueError for one that is nowhere.
    """
    if not isinstance(owner, nn.Module):
        for component, part in owner.components.items():
            if isinstance(part, nn.Module):
                yield from ((f"{component}.{name}", x) for name, x in weights(part))
        return
    for path, module in owner.named_modules():
        own = (*module.named_parameters("", False), *module.named_buffers("", False))
        for name, x in own:
            full = f"{path}.{name}" if path else name
            yield full, _offloaded(module, full, name) if x.device.type == "meta" else x


def _offloaded(module: nn.Module, full: str, name: str) -> Tensor:
    """A tensor that accelerate put aside, from the map of the module's hook."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            return kept[name]
    raise ValueError(
        f"{full} is on the meta device and has no values: load the weights before they are read"
    )


#: Entries that are rounded and hashed at a time: what stays in a cache of the processor.
CHUNK = 1 << 18


@torch.no_grad()
def digest(named: nn.Module | Iterable[tuple[str, Tensor]], exact: bool = False) -> str:
    """SHA-256 (hex) of weights: of the name, shape and bytes of every tensor, in order of names.

    named: a network, or (name, tensor) pairs in any order, which may be made one by one, as
    `weights` does. exact=True takes dtypes and bytes as they are. exact=False first rounds
    floating point to float16: the same for a model loaded in float16, float32 or float64.
    bfloat16 has fewer bits than float16, so a model loaded in it has a digest of its own, the same
    again when it is widened. Integers and booleans are never rounded. Devices do not matter.
    Raises ValueError for a name given twice and for a tensor without values.

    records.digest(pipe.unet, exact=True)
    """
    pairs = weights(named) if isinstance(named, nn.Module) else named
    found: dict[str, str] = {}
    for name, x in pairs:
        if name in found:
            raise ValueError(f"two tensors are named {name!r}: every weight needs its own name")
        found[name] = _digest(name, x.detach(), rounded=not exact and x.is_floating_point())
    return hashlib.sha256("\n".join(found[name] for name in sorted(found)).encode()).hexdigest()


def _digest(name: str, x: Tensor, rounded: bool) -> str:
    if x.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and has no values: pass records.weights")
    kind = "rounded to float16" if rounded else str(x.dtype)
    found = hashlib.sha256(json.dumps([name, kind, list(x.shape)]).encode())
    for piece in x.contiguous().view(-1).split(CHUNK):
        if rounded:
            piece = piece.to(torch.float16)
        found.update(piece.cpu().view(torch.uint8).numpy())
    return found.hexdigest()


def fingerprint(named: nn.Module | Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits that tell one set of weights from another: the start of `digest`.

    The same whether the model was loaded in float16, float32 or float64, on a CPU or a GPU.
    """
    return digest(named)[:16]
