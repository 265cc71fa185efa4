"""A denoiser run once: the order in which its text layers and its sites come.

`named_modules()` lists the up-blocks of a UNet before its mid-block, and sorted names put block 10
before block 2. So the order is recorded by running the architecture, on the meta device, where
neither weights nor products cost anything.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .sites import Site, site_kind
from .text import TextLayer

__all__ = ["Run", "config_key", "plain", "record"]


@dataclass(frozen=True)
class Run:
    """What ran. text_layers, sites: in the order in which they did."""

    text_layers: tuple[TextLayer, ...]
    sites: tuple[Site, ...]


def record(denoiser: nn.Module, *args: Any, **kwargs: Any) -> Run:
    """Call `denoiser` once: attention modules that are handed text are numbered as they run, and so
    are the sites. Its own hooks stay, those set here are gone after.

        with torch.device("meta"):
            record(UNet2DConditionModel(), torch.empty(1, 4, 8, 8), 0, torch.empty(1, 77, 1280))
    """
    from diffusers.models.attention_processor import Attention

    layers: dict[str, int] = {}
    sites: dict[str, str] = {}

    def note(name: str, kind: str | None, reads: bool) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            text = kwargs.get("encoder_hidden_states")
            if reads and text is not None:
                layers.setdefault(name, text.shape[-1])
            if kind is not None:
                sites.setdefault(name, kind)

        return hook

    handles = []
    for name, module in denoiser.named_modules():
        kind, reads = site_kind(name), isinstance(module, Attention)
        if kind is not None or reads:
            hook = note(name, kind, reads)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            denoiser(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return Run(
        tuple(TextLayer(i, name, width) for i, (name, width) in enumerate(layers.items())),
        tuple(Site(name, kind) for name, kind in sites.items()),
    )


def config_key(module: Any, **instead: Any) -> str:
    """A diffusers config as JSON: hashable, and enough to build the architecture again.

    instead: entries that the architecture is to have in place of its own.
    """
    config = {k: v for k, v in module.config.items() if not k.startswith("_")} | instead
    return json.dumps(config, sort_keys=True, default=str)


def plain(module: nn.Module) -> Any:
    """The module below `torch.compile`, if it was compiled."""
    return getattr(module, "_orig_mod", module)
