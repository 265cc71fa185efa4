"""What an edited weight reads: the encoded prompt, or what a text encoder hands it on the way.

Every projection of the denoiser that reads text reads the same encoded prompts. A projection inside
a text encoder reads an activation there, recorded while the prompts are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..concepts import Concept
from ..edits.weights import linear_of
from ..families import Model, TextStates, family_of
from ..families.running import plain
from ..interventions.recording import recording
from .rows import Rows, gather

__all__ = ["PROMPT", "rows_of", "source_of"]

#: The source of a weight that reads the encoded prompt; any other source is the weight itself.
PROMPT = "prompt"


def source_of(pipe: Any, name: str) -> str:
    """What the weight `name` reads: weights with one source share their keys, and their map."""
    part = getattr(pipe, name.partition(".")[0])
    return PROMPT if plain(part) is plain(family_of(pipe).denoiser) else name


def rows_of(pipe: Any, settings: Mapping[str, Any], source: str) -> Rows:
    """The rows for weights with `source` of an edit made with `settings` (see `solve`)."""
    model = family_of(pipe)
    return gather(
        model,
        _reader(model, source),
        [Concept(**concept) for concept in settings["concepts"]],
        settings["tokens"],
        settings["preserve"],
        settings["null_space"],
    )


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
