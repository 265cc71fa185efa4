"""The state of a model: everything but the picture and its sampling that decides what is painted.

    weights      a digest of the bytes of every tensor of every network
    dtype, class names, configs and plain attributes of modules (FreeU, an adapter's scale, ...)
    scheduler    class and config
    tokenizers   a digest of their vocabularies
    hooks        what contexts of ours (`routed`, `Neurons.ablated`, ...) say that they do

What a hook of somebody else does cannot be known: then there is no state without a tag.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..families import Model, values
from ..interventions.active import foreign_hooks, said
from ..records import digest

__all__ = ["differences", "state_of"]

#: Plain attributes of modules that change no picture.
IDLE = ("use_slicing", "gradient_checkpointing", "layer_idx")
PLAIN = (bool, int, float, str, type(None))


def state_of(model: Model, tag: str | None = None) -> dict[str, Any]:
    """The state of `model` as JSON. It takes one pass over the weights: ask once, hand it down.

    tag: stands for the hooks that are not ours. Raises ValueError for such hooks without a tag.
    """
    pipe = model.pipe
    networks = {k: v for k, v in sorted(pipe.components.items()) if isinstance(v, nn.Module)}
    foreign = [f"{k}.{name}" for k, net in networks.items() for name in foreign_hooks(net)]
    if foreign and tag is None:
        raise ValueError(
            f"a hook that is not of this library is on {foreign[0] or 'the model'}"
            + (f" and {len(foreign) - 1} other modules" if len(foreign) > 1 else "")
            + ": what it does to a picture cannot be known, so pictures cannot be kept. Remove it, "
            'or say what it is, folder=loco.painting.Store(folder, tag="what my hook does")'
        )
    weights = ((f"{k}.{n}", x) for k, net in networks.items() for n, x in values(net))
    return {
        "pipeline": type(pipe).__name__,
        "config": _config(pipe),
        "weights": digest(weights, exact=True),
        "networks": {k: [type(net).__name__, _sha(_config(net))] for k, net in networks.items()},
        "attributes": _sha([list(_attributes(net)) for net in networks.values()]),
        "scheduler": [type(pipe.scheduler).__name__, _config(pipe.scheduler)],
        "tokenizers": {k: _words(v) for k, v in sorted(pipe.components.items()) if _is_tokens(v)},
        "hooks": [said(net) for net in networks.values() if said(net)],
        "autocast": str(torch.get_autocast_dtype(model.device.type))
        if torch.is_autocast_enabled(model.device.type)
        else None,
        "tag": tag,
    }


def differences(state: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between two states, by name."""
    return sorted(k for k in state.keys() | other.keys() if state.get(k) != other.get(k))


def _attributes(network: nn.Module) -> Iterator[list[Any]]:
    """[module, attribute, value] of plain values, also of attention processors."""
    for name, module in network.named_modules():
        yield [name, "training", module.training]
        for holder in (module, getattr(module, "processor", None)):
            if holder is None:
                continue
            if holder is not module:
                yield [name, "processor", type(holder).__qualname__]
            for key, value in sorted(vars(holder).items()):
                if not key.startswith("_") and key not in IDLE and _plain(value):
                    yield [name, key, value]
        if hasattr(module, "lora_A"):  # the tensors are weights; what mixes them is not
            mix = {k: getattr(module, k, None) for k in ("scaling", "active_adapters", "merged")}
            yield [name, "adapters", {**mix, "off": getattr(module, "disable_adapters", None)}]


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, PLAIN)


def _config(part: Any) -> dict[str, Any]:
    config = getattr(part, "config", None) or {}
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    hidden = ("architectures", "transformers_version", "dtype", "torch_dtype")  # of who saved it
    return {
        k: v if _plain(v) else str(v)
        for k, v in sorted(config.items())
        if not k.startswith("_") and k not in hidden
    }


def _is_tokens(part: Any) -> bool:
    return hasattr(part, "get_vocab")


def _words(tokenizer: Any) -> str:
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    return _sha([sorted(tokenizer.get_vocab().items()), special, tokenizer.model_max_length])


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
