"""What an edited weight reads: the encoded prompt, or what a text encoder hands it on the way.

Every projection of the denoiser that reads text reads the same encoded prompts. A projection inside
a text encoder reads an activation there, recorded while the prompts are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..edits.weights import linear_of
from ..families import Model, TextStates
from ..interventions.recording import recording
from .recipe import Recipe
from .rows import Rows, gather

__all__ = ["PROMPT", "rows_of", "source_of", "squared_length"]

#: The source of a weight that reads the encoded prompt; any other source is the weight itself.
PROMPT = "prompt"


def source_of(model: Model, name: str) -> str:
    """What the weight `name` reads: weights with one source share their keys, and their map.

    Raises ValueError for a weight that reads what was made of an image.
    """
    reads = model.reads(name)
    if reads == "step":
        raise ValueError(
            f"{name} reads what is made of an image, other for each one and at every step: its "
            "keys cannot be known from the prompt alone"
        )
    return PROMPT if reads == "prompt" else name


def rows_of(model: Model, recipe: Recipe, source: str) -> Rows:
    """The rows for weights with `source` of an edit made from `recipe`."""
    return gather(
        model,
        _reader(model, source),
        recipe.concepts,
        recipe.tokens,
        recipe.preserve,
        recipe.null_space,
    )


def squared_length(model: Model, recipe: Recipe, source: str = PROMPT) -> float:
    """Mean |c|^2 of the keys that an edit of weights with `source` moves: the unit of its lam."""
    return float(rows_of(model, recipe, source).keys.double().square().sum(1).mean())


def _reader(model: Model, source: str) -> Callable[[Sequence[str]], TextStates]:
    if source == PROMPT:
        return lambda prompts: model.encode(list(prompts))
    return lambda prompts: _recorded(model, linear_of(model.pipe, source), list(prompts))


@torch.no_grad()
def _recorded(model: Model, module: nn.Module, prompts: list[str]) -> TextStates:
    """What `module` is handed while `prompts` are encoded: [prompt, token, d]."""
    with recording(module, lambda args, kwargs, output: args[0].detach()) as seen:
        states = model.encode(prompts)
    if not seen:
        raise ValueError(
            f"{type(module).__name__} was not run while the prompts were encoded: the text encoder "
            "bypasses it, by a compiled or fused layer; load the pipeline again"
        )
    embeds = torch.cat(seen)
    if embeds.shape[:2] != states.tokens.shape:
        raise ValueError(
            f"the text encoder read {tuple(embeds.shape[:2])} tokens for prompts of "
            f"{tuple(states.tokens.shape)}: shorten the prompts"
        )
    return TextStates(embeds, states.tokens, states.mask)
