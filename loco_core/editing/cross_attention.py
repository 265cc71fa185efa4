"""Closed-form edits of the projections that read text: LocoEdit (arXiv 2405.01008, section 5).

Every text layer reads the same token embeddings, through its own to_k and to_v. The edit makes the
chosen layers read the tokens of a concept as the tokens of another prompt, its neutral twin say:
W' c_i = W g_i, for pairs (c_i, g_i) of embeddings. Only weights enter, never biases, so a bias is
not counted twice.

**Which tokens are paired.** Prompt and twin differ in length. Take "a red star by Ann Bo in the
sea" and the twin "a red star in the sea":

    [BOS] a red star by Ann  Bo  in the sea [EOS] [pad] [pad] ...
                              |   |  |   |    |     |
    [BOS] a red        star------ in the sea [EOS] ... [pad] ...

- The tail is what follows the subject in the prompt, as far as the twin ends in the same words.
  Its tokens are paired one to one; "[EOS]" is paired with "[EOS]".
- The last token of the subject is paired with the token in front of the tail of the twin: the last
  of the words that replace the subject, or, if none do, the last word the two prompts share. It has
  not read the tail either, so the target tells nothing that the key could not know. (A twin that is
  nothing but the tail gives its first word: BOS, which every prompt shares, is never a target.)
- Words behind the subject that the twin does not have are read like the subject.
- Padding is paired at equal positions, where the position embeddings cancel; padding that the twin
  has used up for words is paired with its first padding.

A causal text encoder lets every token behind the subject know the concept: see `tokens`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..concepts import Concept
from ..families import Family, TextLayer, TextStates, family_of
from ..families.base import checked_prompts
from .closed_form import fit
from .edit import Edit, make_edit

__all__ = ["TOKENS", "locoedit"]

#: Which tokens of a prompt are edited, from the fewest to the most.
TOKENS = ("last", "eos", "following")


@torch.no_grad()
def locoedit(
    pipe: Any,
    concept: Concept,
    layers: Sequence[int],
    lam: float = 0.01,
    *,
    lam_k: float | None = None,
    lam_v: float | None = None,
    tokens: str = "eos",
    preserve: Sequence[str] = (),
    target: str | Sequence[str] | None = None,
) -> Edit:
    """LocoEdit: an Edit after which `layers` read `concept` as its target. No weight changes yet.

    Minimises sum_i ||W' c_i - W g_i||^2 + lam ||W' - W||^2 for to_k and to_v of the layers
    (arXiv 2405.01008; `closed_form` has the solution), with one solve for all of them.

    layers: indices of text layers in execution order, such as `found.layers` of a Localization.
    lam: >= 0, the smaller the stronger, in units of squared key length: at the paper's 0.01 every
    row is met all but exactly, and concepts with similar keys are dragged along; a few percent of
    the squared length spares them. lam_k and lam_v overrule it for keys and values.
    tokens: "last", the last token of the subject (the paper); "eos", and the end-of-text token;
    "following", the last token of the subject and every later one, padding included. On
    mini-sd "last" erased nothing, "following" most and at the highest cost to other styles.
    preserve: prompts whose words and end-of-text (with "following" also padding) keep being read
    as they are. target: "neutral" (the concept's neutral twins), "target" (its target prompts), or
    prompts, one per prompt of the concept or one for all; None is "target" for a fact and
    "neutral" for everything else.

    The pipeline may be of any dtype, on any device, and is not changed. Raises ValueError for a
    layer, lam, token choice, target or prompt that does not exist or fit, and for projections that
    are fused, quantised, wrapped by an adapter or hold NaN.

        concept = loco.concepts.style("Van Gogh")
        edit = loco.locoedit(pipe, concept, layers=[8, 9], lam=0.01)
        with edit.applied(pipe):
            images = loco.generate(pipe, concept.prompts, seeds=range(4))
    """
    if not isinstance(concept, Concept):
        raise TypeError(f"concept must be a loco.Concept, not {concept!r}: see loco.concepts")
    family = family_of(pipe)
    chosen = _chosen_layers(family.text_layers(pipe), layers)
    if tokens not in TOKENS:
        raise ValueError(f"unknown tokens {tokens!r}: choose one of {', '.join(TOKENS)}")
    targets = _target_prompts(concept, target)
    kept = checked_prompts(preserve) if preserve else []

    C, G = _pairs(pipe, family, concept, targets, tokens)
    P = _preserved(pipe, family, kept, tokens) if kept else None
    lams = {"k": lam if lam_k is None else lam_k, "v": lam if lam_v is None else lam_v}
    maps = {"k": fit(C, G, lams["k"], preserve=P)}
    maps["v"] = maps["k"] if lams["v"] == lams["k"] else fit(C, G, lams["v"], preserve=P)

    changes = {}
    for layer in chosen:
        if layer.width != C.shape[1]:
            raise ValueError(
                f"text layer {layer.index} ({layer.name}) reads {layer.width} features, but "
                f"{family.name} encodes prompts to {C.shape[1]}: its keys cannot be known from "
                "the prompt alone"
            )
        for projection in family.kv(pipe, layer):
            kind = "k" if "k" in projection.split("_") else "v"  # to_k, add_k_proj; to_v, ...
            name = f"{_component(pipe, family)}.{layer.name}.{projection}.weight"
            changes[name] = maps[kind]
    return make_edit(
        pipe,
        changes,
        method="locoedit",
        family=family.name,
        concept=concept.name,
        kind=concept.kind,
        layers=[layer.index for layer in chosen],
        prompts=list(concept.prompts),
        targets=targets,
        tokens=tokens,
        lam_k=float(lams["k"]),
        lam_v=float(lams["v"]),
        preserve=kept,
    )


def _pairs(
    pipe: Any, family: Family, concept: Concept, targets: Sequence[str], tokens: str
) -> tuple[Tensor, Tensor]:
    """Keys C and targets G, [row, width]: embeddings of the paired tokens of all prompts."""
    read, meant = family.encode(pipe, concept.prompts), family.encode(pipe, targets)
    tokenizer = family.tokenizer(pipe)
    keys, goals = [], []
    for i, prompt in enumerate(concept.prompts):
        _, last = family.subject_span(pipe, prompt, concept.name)
        for key, goal in _aligned(read.tokens[i], meant.tokens[i], last, tokenizer, tokens):
            if _readable(read, i, key) and _readable(meant, i, goal):
                keys.append(read.embeds[i, key])
                goals.append(meant.embeds[i, goal])
    return torch.stack(keys), torch.stack(goals)


def _words(tokenizer: Any, ids: Tensor) -> tuple[int, int]:
    """(position of the first word, position of EOS); equal if the prompt has no words."""
    first = int(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    return first, first + int((ids[first:] == tokenizer.eos_token_id).nonzero()[0])


def _aligned(
    prompt: Tensor, twin: Tensor, last: int, tokenizer: Any, tokens: str
) -> Iterator[tuple[int, int]]:
    """(position in the prompt, position in the twin) of the paired tokens, as the module says.

    prompt, twin: token ids [token], padded to one length. last: position of the subject's end.
    """
    _, end = _words(tokenizer, prompt)
    first, twin_end = _words(tokenizer, twin)
    tail = 0
    while tail < min(end - last - 1, twin_end - first):
        if prompt[end - 1 - tail] != twin[twin_end - 1 - tail]:
            break
        tail += 1
    instead = max(twin_end - tail - 1, first)  # first == twin_end, EOS, if the twin is empty
    yield last, instead
    if tokens == "following":
        for position in range(last + 1, end):
            shared = position >= end - tail
            yield position, position - end + twin_end if shared else instead
    if tokens in ("eos", "following"):
        yield end, twin_end
    if tokens == "following":
        for position in range(end + 1, len(prompt)):
            yield position, min(max(position, twin_end + 1), len(twin) - 1)


def _preserved(pipe: Any, family: Family, prompts: Sequence[str], tokens: str) -> Tensor:
    """Embeddings [row, width] of the words and EOS of `prompts`, and of padding if edited too."""
    states, tokenizer = family.encode(pipe, prompts), family.tokenizer(pipe)
    rows = []
    for i in range(len(states)):
        first, end = _words(tokenizer, states.tokens[i])
        stop = states.embeds.shape[1] if tokens == "following" else end + 1
        rows += [states.embeds[i, t] for t in range(first, stop) if _readable(states, i, t)]
    return torch.stack(rows)


def _readable(states: TextStates, row: int, token: int) -> bool:
    return states.mask is None or bool(states.mask[row, token])


def _chosen_layers(known: Sequence[TextLayer], layers: Sequence[int]) -> list[TextLayer]:
    try:
        indices = sorted({operator.index(layer) for layer in layers})
    except TypeError:
        raise ValueError(
            f"layers must be a list of indices of text layers, not {layers!r}: pass [8, 9], say, "
            "or the .layers of a Localization"
        ) from None
    wrong = [index for index in indices if not 0 <= index < len(known)]
    if wrong or not indices:
        raise ValueError(
            f"layers {wrong if wrong else 'is empty, but'} must be among the text layers 0 to "
            f"{len(known) - 1} of this pipeline: see loco.text_layers(pipe)"
        )
    return [known[index] for index in indices]


def _target_prompts(concept: Concept, target: str | Sequence[str] | None) -> list[str]:
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
        return list(prompts)
    prompts = checked_prompts(target)
    if len(prompts) == 1:
        prompts *= len(concept.prompts)
    if len(prompts) != len(concept.prompts):
        raise ValueError(
            f"concept {concept.name!r} has {len(concept.prompts)} prompts, but target has "
            f"{len(prompts)}: give one per prompt, or one for all"
        )
    return prompts


def _component(pipe: Any, family: Family) -> str:
    denoiser: nn.Module = family.denoiser(pipe)
    return next(name for name, part in pipe.components.items() if part is denoiser)
