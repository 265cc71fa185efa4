"""The rows of a closed-form edit: which embedding shall be read as which.

Prompts and their twins are paired token by token, see `families.tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..concepts import Concept
from ..families import Model, TextStates
from ..families.text import checked_prompts
from ..families.tokens import (
    aligned,
    checked_tokens,
    label,
    readable,
    several,
    with_targets,
    words,
)

__all__ = ["Rows", "gather", "joined", "several", "with_targets"]


@dataclass(frozen=True, eq=False)
class Rows:
    """What one solve is made from; every row has a label, "prompt | token".

    keys, targets: [n, d], row i of keys shall be read as row i of targets. kept: [p, d], held as
    far as the others allow. exact: [r, d], held whatever happens.
    """

    keys: Tensor
    targets: Tensor
    kept: Tensor
    exact: Tensor
    labels: tuple[str, ...]
    kept_labels: tuple[str, ...]


def gather(
    model: Model,
    read: Callable[[Sequence[str]], TextStates],
    concepts: Sequence[Concept],
    tokens: str,
    preserve: Sequence[str] = (),
    null_space: Sequence[str] | None = None,
) -> Rows:
    """The rows by which `concepts` are read as their `target` prompts (see `with_targets`).

    read: what the edited weights are handed for some prompts, [prompt, token, d]: the encoded
    prompts, say. preserve: prompts whose words and end-of-text (with "following" and "all" padding
    too) are kept. null_space: prompts of which the same is held exactly, and with them the start
    token and the empty prompt; None holds nothing.
    """
    checked_tokens(tokens, "edit")
    tokenizer = model.tokenizer
    keys, targets, labels = [], [], []
    for concept in concepts:
        now, then = read(concept.prompts), read(concept.target or ())
        for i, prompt in enumerate(concept.prompts):
            first, last = model.subject_span(prompt, concept.name)
            pairs = aligned(now.tokens[i], then.tokens[i], first, last, tokenizer, tokens)
            for key, target in pairs:
                if readable(now, i, key) and readable(then, i, target):
                    keys.append(now.embeds[i, key])
                    targets.append(then.embeds[i, target])
                    labels.append(label(tokenizer, prompt, now.tokens[i], key))
    kept, kept_labels = _held(read, tokenizer, preserve, tokens)
    exact: list[Tensor] = []
    if null_space is not None:
        empty = read([""])
        exact, _ = _held(read, tokenizer, null_space, tokens)
        exact += [x for t, x in enumerate(empty.embeds[0]) if readable(empty, 0, t)]
    nothing = keys[0].new_empty(0, len(keys[0]))
    return Rows(
        torch.stack(keys),
        torch.stack(targets),
        torch.stack(kept) if kept else nothing,
        torch.stack(exact) if exact else nothing,
        tuple(labels),
        tuple(kept_labels),
    )


def joined(parts: Sequence[Rows]) -> Rows:
    """All rows of several solves."""
    keys, targets, kept, exact = (
        torch.cat([getattr(p, x) for p in parts]) for x in ("keys", "targets", "kept", "exact")
    )
    labels = tuple(label for p in parts for label in p.labels)
    kept_labels = tuple(label for p in parts for label in p.kept_labels)
    return Rows(keys, targets, kept, exact, labels, kept_labels)


def _held(
    read: Callable[[Sequence[str]], TextStates], tokenizer: Any, prompts: Sequence[str], tokens: str
) -> tuple[list[Tensor], list[str]]:
    """What is read of the words and EOS of `prompts`, and of padding if that is edited too."""
    rows: list[Tensor] = []
    labels: list[str] = []
    if not len(prompts):
        return rows, labels
    prompts = checked_prompts(prompts)
    states = read(prompts)
    for i, prompt in enumerate(prompts):
        first, end = words(tokenizer, states.tokens[i])
        stop = states.embeds.shape[1] if tokens in ("following", "all") else end + 1
        for t in range(first, stop):
            if readable(states, i, t):
                rows.append(states.embeds[i, t])
                labels.append(label(tokenizer, prompt, states.tokens[i], t))
    return rows, labels
