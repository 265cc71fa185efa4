"""The rows of a closed-form edit: which embedding shall be read as which.

Prompt and twin differ in length. Take "a red star by Ann Bo in the sea" and the twin "a red star in
the sea":

    [BOS] a red star by   Ann  Bo  in the sea [EOS] [pad] [pad] ...
                                |   |  |   |    |     |
    [BOS] a red          star------ in the sea [EOS] ... [pad] ...

- The tail is what follows the subject in the prompt, as far as the twin ends in the same words.
  Its tokens are paired one to one; "[EOS]" is paired with "[EOS]".
- The last token of the subject is paired with the token in front of the tail of the twin: the last
  of the words that replace the subject, or, if none do, the last word the two prompts share. It has
  not read the tail either, so the target tells nothing that the key could not know. (A twin that is
  nothing but the tail gives its first word: BOS, which every prompt shares, is never a target.)
- Words behind the subject that the twin does not have are read like the subject, and so are the
  words of the subject and in front of it that the twin does not have; the words in front that both
  have are paired one to one.
- Padding is paired at equal positions, where the position embeddings cancel; padding that the twin
  has used up for words is paired with its first padding.

A causal text encoder lets every token behind the subject know the concept: see `TOKENS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..concepts import Concept
from ..families import Model, TextStates
from ..families.base import checked_prompts

__all__ = ["TOKENS", "Rows", "gather", "joined", "several", "with_targets"]

#: Which tokens of a prompt are edited, from the fewest to the most: the last token of the subject;
#: that and the end of the text; the subject's last and every later one, padding included; all.
TOKENS = ("last", "eos", "following", "all")


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
    if tokens not in TOKENS:
        raise ValueError(f"unknown tokens {tokens!r}: choose one of {', '.join(TOKENS)}")
    tokenizer = model.tokenizer
    keys, targets, labels = [], [], []
    for concept in concepts:
        now, then = read(concept.prompts), read(concept.target or ())
        for i, prompt in enumerate(concept.prompts):
            first, last = model.subject_span(prompt, concept.name)
            pairs = _aligned(now.tokens[i], then.tokens[i], first, last, tokenizer, tokens)
            for key, target in pairs:
                if _readable(now, i, key) and _readable(then, i, target):
                    keys.append(now.embeds[i, key])
                    targets.append(then.embeds[i, target])
                    labels.append(_label(tokenizer, prompt, now.tokens[i], key))
    kept, kept_labels = _held(read, tokenizer, preserve, tokens)
    exact: list[Tensor] = []
    if null_space is not None:
        empty = read([""])
        exact, _ = _held(read, tokenizer, null_space, tokens)
        exact += [x for t, x in enumerate(empty.embeds[0]) if _readable(empty, 0, t)]
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


def several(concept: Concept | Sequence[Concept]) -> list[Concept]:
    """`concept` as a list. Raises TypeError for anything that is no Concept."""
    listed: list[Any] = list(concept) if isinstance(concept, list | tuple) else [concept]
    for item in listed:
        if not isinstance(item, Concept):
            raise TypeError(f"concept must be a loco.Concept, not {item!r}: see loco.concepts")
    if not listed:
        raise ValueError("the list of concepts is empty: give at least one")
    if twice := {c.name for c in listed if sum(c.name == o.name for o in listed) > 1}:
        raise ValueError(f"concepts {sorted(twice)} are given twice: give each once")
    return listed


def with_targets(concept: Concept, target: str | Sequence[str] | None) -> Concept:
    """The concept with one target prompt a prompt: what it shall be read as.

    target: "neutral", its neutral twins; "target", its target prompts; or prompts, one per prompt
    of the concept or one for all. None is "target" for a fact, else "neutral".
    """
    if target is None:
        target = "target" if concept.kind == "fact" else "neutral"
    if isinstance(target, str):
        if target not in ("neutral", "target"):
            raise ValueError(
                f"unknown target {target!r}: choose 'neutral' or 'target', or pass a list of "
                f"prompts such as [{target!r}]"
            )
        prompts = getattr(concept, target)
        if prompts is None:
            raise ValueError(f"concept {concept.name!r} has no target prompts: pass target=[...]")
    else:
        prompts = checked_prompts(target)
    if len(prompts) == 1:
        prompts = list(prompts) * len(concept.prompts)
    if len(prompts) != len(concept.prompts):
        raise ValueError(
            f"concept {concept.name!r} has {len(concept.prompts)} prompts, but target has "
            f"{len(prompts)}: give one per prompt, or one for all"
        )
    return replace(concept, target=tuple(prompts))


def _words(tokenizer: Any, ids: Tensor) -> tuple[int, int]:
    """(position of the first word, position of EOS); equal if the prompt has no words."""
    first = int(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    return first, first + int((ids[first:] == tokenizer.eos_token_id).nonzero()[0])


def _aligned(
    prompt: Tensor, twin: Tensor, subject: int, last: int, tokenizer: Any, tokens: str
) -> Iterator[tuple[int, int]]:
    """(position in the prompt, position in the twin) of the paired tokens, as the module says.

    prompt, twin: token ids [token], padded to one length. subject, last: positions of the
    subject's first and last token.
    """
    start, end = _words(tokenizer, prompt)
    first, twin_end = _words(tokenizer, twin)
    tail = 0
    while tail < min(end - last - 1, twin_end - first):
        if prompt[end - 1 - tail] != twin[twin_end - 1 - tail]:
            break
        tail += 1
    instead = max(twin_end - tail - 1, first)  # first == twin_end, EOS, if the twin is empty
    if tokens == "all":
        head = 0
        while head < min(subject - start, instead + 1 - first):
            if prompt[start + head] != twin[first + head]:
                break
            head += 1
        yield from ((start + i, first + i) for i in range(head))
        yield from ((position, instead) for position in range(start + head, last))
    yield last, instead
    if tokens in ("following", "all"):
        for position in range(last + 1, end):
            shared = position >= end - tail
            yield position, position - end + twin_end if shared else instead
    if tokens != "last":
        yield end, twin_end
    if tokens in ("following", "all"):
        for position in range(end + 1, len(prompt)):
            yield position, min(max(position, twin_end + 1), len(twin) - 1)


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
        first, end = _words(tokenizer, states.tokens[i])
        stop = states.embeds.shape[1] if tokens in ("following", "all") else end + 1
        for t in range(first, stop):
            if _readable(states, i, t):
                rows.append(states.embeds[i, t])
                labels.append(_label(tokenizer, prompt, states.tokens[i], t))
    return rows, labels


def _label(tokenizer: Any, prompt: str, ids: Tensor, position: int) -> str:
    _, end = _words(tokenizer, ids)
    if position == end:
        return f"{prompt} | end"
    if position > end:
        return f"{prompt} | padding {position - end}"
    return f"{prompt} | {tokenizer.decode(ids[position : position + 1]).strip()}"


def _readable(states: TextStates, row: int, token: int) -> bool:
    return states.mask is None or bool(states.mask[row, token])
