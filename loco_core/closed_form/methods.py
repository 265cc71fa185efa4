"""Closed-form edits: of the projections that read the encoded prompt, or of the text encoder.

Every text layer reads the same token embeddings, through its own to_k and to_v. An edit makes the
chosen layers read the tokens of a concept as the tokens of another prompt, its neutral twin say:
W' c_i = W g_i, for pairs (c_i, g_i) of embeddings. Only weights enter, never biases, so a bias is
not counted twice.

LocoEdit (arXiv 2405.01008), UCE (arXiv 2308.14761) and TIME (arXiv 2303.08084) are one solve with
different layers and rows: the layers that were located, all layers and preserved rows, all layers
and every token. Diff-QuickFix (arXiv 2310.13730) is the same solve inside the text encoder: causal
tracing finds there one state that decides the picture, the output of the first self-attention layer
at the last token of the subject. Its W is `self_attn.out_proj` of that layer, its keys are what
that projection is handed. A pipeline with several encoders has the same layer of each edited.

All take the same keywords. lam is a price against a sum over rows: with twice the prompts the same
lam holds half as much. (On mini-sd at lam = 20 the change of a weight grows from 0.18 of its norm
with 2 prompts over 0.30 with 12 to 0.36 with 48.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..concepts import Concept
from ..edits.edit import Edit
from ..edits.weights import chosen_layers, projections
from ..families import family_of
from .recipe import recipe
from .solve import solve

__all__ = ["diff_quickfix", "locoedit", "time_edit", "uce"]

Concepts = Concept | Sequence[Concept]


def locoedit(
    pipe: Any,
    concept: Concepts,
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
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
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
    erase_scale, preserve_scale: weights of the rows that are edited, and of those preserved.

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
        pipe, "locoedit", concept, layers, where, (lam, lam_k, lam_v), tokens=tokens, target=target,
        preserve=preserve, null_space=null_space, scales=(erase_scale, preserve_scale),
    )  # fmt: skip


def uce(
    pipe: Any,
    concept: Concepts,
    preserve: Sequence[str] = (),
    lam: float = 0.5,
    *,
    layers: Sequence[int] | None = None,
    lam_k: float | None = None,
    lam_v: float | None = None,
    tokens: str = "eos",
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    target: str | Sequence[str] | None = None,
    null_space: Sequence[str] | None = None,
    where: Sequence[str] = ("k", "v"),
) -> Edit:
    """UCE: an Edit after which all layers read `concept` as its target and `preserve` as before.

    Minimises sum_i s ||W' c_i - W g_i||^2 + sum_j r ||W' p_j - W p_j||^2 + lam ||W' - W||^2, with
    s and r the erase_scale and preserve_scale (arXiv 2308.14761), for to_k and to_v of every text
    layer, or of `layers`. Everything else is as in `locoedit`.

        gone = loco.uce(pipe, [concept_a, concept_b], preserve=["a house in the style of Monet"])
    """
    return _edit(
        pipe, "uce", concept, layers, where, (lam, lam_k, lam_v), tokens=tokens, target=target,
        preserve=preserve, null_space=null_space, scales=(erase_scale, preserve_scale),
    )  # fmt: skip


def time_edit(
    pipe: Any,
    concept: Concepts,
    lam: float = 0.1,
    *,
    layers: Sequence[int] | None = None,
    lam_k: float | None = None,
    lam_v: float | None = None,
    tokens: str = "all",
    preserve: Sequence[str] = (),
    target: str | Sequence[str] | None = None,
    null_space: Sequence[str] | None = None,
    where: Sequence[str] = ("k", "v"),
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
) -> Edit:
    """TIME: an Edit after which all layers read every token of a prompt as those of its target.

    Every token of the source prompt, padding included, is mapped to its counterpart in the target
    (arXiv 2303.08084; `rows` says which that is), in all text layers or in `layers`; the paper
    preserves nothing. Made to change an implicit assumption: source "a rose", target "a blue rose".
    Everything else is as in `locoedit`.

        edit = loco.time_edit(pipe, loco.Concept("rose", "color", ["a rose"], ["a thing"],
                                                 ["a blue rose"]), target="target")
    """
    return _edit(
        pipe, "time", concept, layers, where, (lam, lam_k, lam_v), tokens=tokens, target=target,
        preserve=preserve, null_space=null_space, scales=(erase_scale, preserve_scale),
    )  # fmt: skip


def diff_quickfix(
    pipe: Any,
    concept: Concepts,
    lam: float = 0.01,
    *,
    layer: int = 0,
    tokens: str = "last",
    preserve: Sequence[str] = (),
    target: str | Sequence[str] | None = None,
    null_space: Sequence[str] | None = None,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
) -> Edit:
    """Diff-QuickFix: an Edit of the text encoder(s) that reads `concept` as its target.

    Edits `self_attn.out_proj` of self-attention layer `layer` (the first, in the paper) of every
    text encoder of the pipeline, each with keys of its own. Several concepts are solved together.

    lam: >= 0, in units of the squared length of that layer's activations, which is not that of an
    encoded prompt; the paper uses 0.01. tokens: "last", the last token of the subject (the paper);
    "eos", and the end of text; "following", every later token too; "all". target: what it is read
    as, see `locoedit`; a whole object goes with target=["a"], say. The rest is as there.

    The pipeline is not changed. Raises ValueError as `locoedit`, and for a layer that no text
    encoder has.

        edit = loco.diff_quickfix(pipe, loco.concepts.style("Van Gogh"))
        with edit.applied(pipe):
            images = loco.generate(pipe, ["a house in the style of Van Gogh"])
    """
    model = family_of(pipe)
    names = model.text_projections(layer)
    asked = recipe(
        "diff_quickfix", model.name, concept, {"out": lam}, tokens=tokens, target=target,
        preserve=preserve, null_space=null_space, scales=(erase_scale, preserve_scale), layer=layer,
    )  # fmt: skip
    return solve(pipe, asked, names)


def _edit(
    pipe: Any,
    method: str,
    concept: Concepts,
    layers: Sequence[int] | None,
    where: Sequence[str],
    prices: tuple[float, float | None, float | None],
    **asked: Any,
) -> Edit:
    """An edit of to_k and to_v. layers: None is all. prices: lam, and what overrules it."""
    model, (lam, lam_k, lam_v) = family_of(pipe), prices
    known = model.text_layers
    chosen = [x.index for x in (known if layers is None else chosen_layers(known, layers))]
    lams = {"k": lam if lam_k is None else lam_k, "v": lam if lam_v is None else lam_v}
    made = recipe(method, model.name, concept, lams, layers=chosen, **asked)
    return solve(pipe, made, projections(pipe, chosen, where))
