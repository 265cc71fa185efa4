"""Which token of a prompt stands for which: what `tokens` means, and prompts paired with twins.

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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..concepts import Concept
from .text import TextStates, checked_prompts

__all__ = [
    "TOKENS", "aligned", "checked_tokens", "label", "readable", "several", "with_targets", "words",
]  # fmt: skip

#: What a choice of tokens means. To an edit it is a set of them, from the fewest to the most; a
#: reading is one number a prompt, the mean over them.
TOKENS: Mapping[str, Mapping[str, str]] = {
    "edit": {
        "last": "the last token of the subject",
        "eos": "that and the end of the text",
        "following": "the last token of the subject and every later one, padding included",
        "all": "every token but the start, padding included",
    },
    "reading": {
        "last": "the last token of the subject; in a twin, of what stands in its place",
        "eos": "the end of the text",
        "padding": "the padding behind the end of the text",
        "all": "every word and the end of the text",
    },
}


def checked_tokens(tokens: str, use: str) -> str:
    """`tokens`, if an "edit" or a "reading" knows it. Raises ValueError with the choices."""
    if tokens not in TOKENS[use]:
        said = "tokens" if use == "edit" else "token"
        choices = ", ".join(TOKENS[use])
        raise ValueError(f"unknown {said} {tokens!r}: choose one of {choices}")
    return tokens


def words(tokenizer: Any, ids: Tensor) -> tuple[int, int]:
    """(position of the first word, position of EOS); equal if the prompt has no words."""
    first = int(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    return first, first + int((ids[first:] == tokenizer.eos_token_id).nonzero()[0])


def aligned(
    prompt: Tensor, twin: Tensor, subject: int, last: int, tokenizer: Any, tokens: str
) -> Iterator[tuple[int, int]]:
    """(position in the prompt, position in the twin) of the paired tokens, as the module says.

    prompt, twin: token ids [token], padded to one length. subject, last: positions of the
    subject's first and last token. tokens: of an edit, see `TOKENS`.
    """
    start, end = words(tokenizer, prompt)
    first, twin_end = words(tokenizer, twin)
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


def label(tokenizer: Any, prompt: str, ids: Tensor, position: int) -> str:
    """How a row is called: "prompt | token"."""
    _, end = words(tokenizer, ids)
    if position == end:
        return f"{prompt} | end"
    if position > end:
        return f"{prompt} | padding {position - end}"
    return f"{prompt} | {tokenizer.decode(ids[position : position + 1]).strip()}"


def readable(states: TextStates, row: int, token: int) -> bool:
    """Whether the mask lets this token be read."""
    return states.mask is None or bool(states.mask[row, token])


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
