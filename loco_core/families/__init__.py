"""KNOW a pipeline: one file a family, found by `family_of(pipe)`."""

from typing import Any

from ..records import weights as values
from .base import Model
from .sites import Site
from .stable_diffusion import StableDiffusion
from .stable_diffusion_xl import StableDiffusionXL
from .text import TextLayer, TextStates

FAMILIES: tuple[type[Model], ...] = (
    StableDiffusion,
    StableDiffusionXL,
)


def family_of(pipe: Any) -> Model:
    """The family that knows `pipe`, a diffusers pipeline, bound to it: its `Model`.

    Raises TypeError for a pipeline that no family knows.

    loco.families.family_of(loco.load("mini-sd")).name  # "stable-diffusion"
    """
    for family in FAMILIES:
        if family.owns(pipe):
            return family(pipe)
    known = ", ".join(family.name for family in FAMILIES)
    raise TypeError(
        f"no family knows {type(pipe).__name__}; known families: {known}. Pass a diffusers "
        "pipeline of one of them, for example loco.load('mini-sd')"
    )


def text_layers(pipe: Any) -> tuple[TextLayer, ...]:
    """Text layers of a diffusers pipeline, in the order they run (arXiv 2405.01008, C_0..C_{M-1}).

    The order is recorded by running the denoiser's architecture once without weights, because
    `named_modules()` lists up-blocks before the mid-block.

        [layer.name for layer in loco.text_layers(loco.load("mini-sd"))]
    """
    return family_of(pipe).text_layers


__all__ = [
    "FAMILIES",
    "Model",
    "Site",
    "TextLayer",
    "TextStates",
    "family_of",
    "text_layers",
    "values",
]
