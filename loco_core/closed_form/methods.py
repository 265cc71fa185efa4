"""Closed-form edits of the projections that read the encoded prompt.

Every text layer reads the same token embeddings, through its own to_k and to_v. An edit makes the
chosen layers read the tokens of a concept as the tokens of another prompt, its neutral twin say:
W' c_i = W g_i, for pairs (c_i, g_i) of embeddings. Only weights enter, never biases, so a bias is
not counted twice.

LocoEdit (arXiv 2405.01008), UCE (arXiv 2308.14761) and TIME (arXiv 2303.08084) are one solve with
different layers and rows: the layers that were located, all layers and preserved rows, all layers
and every token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from ..concepts import Concept
from ..edits.edit import Edit
from ..edits.weights import chosen_layers, projections
from ..families import family_of
from .solve import solve

__all__ = ["locoedit", "time_edit", "uce"]


def locoedit(
    pipe: Any,
    concept: Concept | Sequence[Concept],
    layers: Sequence[int],
    lam: float = 0.01,
    *,
    lam_k: float | None = None,
    lam_v: float | None = None,
    tokens: str = "eos",
    preserve: Sequence[str] = (),
    target: str | Sequence[str] | None = None,
    null_space: Sequence[str] | None = None,
    where: Sequence[str] = ("k", "v"),
) -> Edit:
    """LocoEdit: an Edit after which `layers` read `concept` as its target. No weight changes yet.

    Minimises sum_i ||W' c_i - W g_i||^2 + lam ||W' - W||^2 for to_k and to_v of the layers
    (arXiv 2405.01008; `closed_form` has the solution), with one solve for all of them. Several
    concepts are solved together.

    layers: indices of text layers in execution order, such as `found.layers` of a Localization.
    lam: >= 0, the smaller the stronger, in units of squared key length: at the paper's 0.01 every
    row is met all but exactly, and concepts with similar keys are dragged along; a tenth of the
    squared length, with preserve, spares them. lam_k and lam_v overrule it for keys and values.
    tokens: "last", the last token of the subject (the paper); "eos", and the end-of-text token;
    "following", the last token of the subject and every later one, padding included; "all". On
    mini-sd "last" erases least; the book's chapter on LocoEdit measures each.
    preserve: prompts whose words and end-of-text (with "following" also padding) keep being read
    as they are, as far as the edit allows; null_space: prompts that keep being read exactly as they
    are, and with them the start token and the empty prompt of guidance (SPEED); None holds nothing,
    () only those two. target: "neutral" (the concept's neutral twins), "target" (its target
    prompts), or prompts, one per prompt of the concept or one for all; None is "target" for a fact
    and "neutral" for everything else. where: "k" for to_k, "v" for to_v (SPEED edits only these).

    The pipeline may be of any dtype, on any device, and is not changed. Raises ValueError for a
    layer, lam, token choice, target or prompt that does not exist or fit, and for projections that
    are fused, quantised, wrapped by an adapter or hold NaN. Warns of an edit larger than its weight
    and of rows that nearly coincide but shall be read differently.

        concept = loco.concepts.style("Van Gogh")
        edit = loco.locoedit(pipe, concept, layers=[8, 9], lam=0.01)
        with edit.applied(pipe):
            images = loco.generate(pipe, concept.prompts, seeds=range(4))
    """
    return _edit(
        pipe,
        concept,
        layers,
        where,
        method="locoedit",
        lam={"k": lam if lam_k is None else lam_k, "v": lam if lam_v is None else lam_v},
        tokens=tokens,
        target=target,
        preserve=preserve,
        null_space=null_space,
    )


def uce(
    pipe: Any,
    concept: Concept | Sequence[Concept],
    preserve: Sequence[str] = (),
    lam: float = 0.5,
    *,
    layers: Sequence[int] | None = None,
    tokens: str = "eos",
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    target: str | Sequence[str] | None = None,
) -> Edit:
    """UCE: an Edit after which all layers read `concept` as its target and `preserve` as before.

    Minimises sum_i s ||W' c_i - W g_i||^2 + sum_j r ||W' p_j - W p_j||^2 + lam ||W' - W||^2, with
    s and r the erase_scale and preserve_scale (arXiv 2308.14761), for to_k and to_v of every text
    layer, or of `layers`. Everything else is as in `locoedit`.

        gone = loco.uce(pipe, [concept_a, concept_b], preserve=["a house in the style of Monet"])
    """
    for name, scale in (("erase_scale", erase_scale), ("preserve_scale", preserve_scale)):
        if not (isinstance(scale, Real) and math.isfinite(scale) and scale >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, not {scale!r}; 1 is usual")
    return _edit(
        pipe,
        concept,
        _all_layers(pipe) if layers is None else layers,
        method="uce",
        lam={"k": lam, "v": lam},
        tokens=tokens,
        target=target,
        preserve=preserve,
        scales=(erase_scale, preserve_scale),
    )


def time_edit(
    pipe: Any,
    concept: Concept | Sequence[Concept],
    lam: float = 0.1,
    *,
    layers: Sequence[int] | None = None,
    target: str | Sequence[str] | None = None,
) -> Edit:
    """TIME: an Edit after which all layers read every token of a prompt as those of its target.

    Every token of the source prompt, padding included, is mapped to its counterpart in the target
    (arXiv 2303.08084; `rows` says which that is), in all text layers or in `layers`; nothing is
    preserved. Made to change an implicit assumption: source "a rose", target "a blue rose".

        edit = loco.time_edit(pipe, loco.Concept("rose", "color", ["a rose"], ["a thing"],
                                                 ["a blue rose"]), target="target")
    """
    return _edit(
        pipe,
        concept,
        _all_layers(pipe) if layers is None else layers,
        method="time",
        lam={"k": lam, "v": lam},
        tokens="all",
        target=target,
    )


def _edit(
    pipe: Any,
    concept: Concept | Sequence[Concept],
    layers: Sequence[int],
    where: Sequence[str] = ("k", "v"),
    **settings: Any,
) -> Edit:
    chosen = chosen_layers(family_of(pipe).text_layers, layers)
    indices = [layer.index for layer in chosen]
    return solve(pipe, projections(pipe, indices, where), concept, layers=indices, **settings)


def _all_layers(pipe: Any) -> list[int]:
    return [layer.index for layer in family_of(pipe).text_layers]
