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
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

from ..concepts import Concept
from ..families import TextLayer, family_of
from .edit import Edit, make_edit
from .reading import kind_of
from .solve import solve

__all__ = ["locoedit", "projections", "relocated", "time_edit", "uce"]


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


def projections(pipe: Any, layers: Sequence[int], where: Sequence[str] = ("k", "v")) -> list[str]:
    """Names of the weights by which `layers` read text: to keys ("k"), to values ("v").

    Raises ValueError for a layer that does not exist and for a choice that matches no weight.

    projections(pipe, [8])  # ["unet.up_blocks. ... .attn2.to_k.weight", "... .to_v.weight"]
    """
    family = family_of(pipe)
    if isinstance(where, str) or not set(where) <= {"k", "v"} or not len(where):
        raise ValueError(f"where={where!r} matches no weight: choose from ('k', 'v')")
    denoiser = family.denoiser(pipe)
    component = next(name for name, part in pipe.components.items() if part is denoiser)
    return [
        name
        for layer in _chosen_layers(family.text_layers(pipe), layers)
        for projection in family.kv(pipe, layer)
        if kind_of(name := f"{component}.{layer.name}.{projection}.weight") in where
    ]


def relocated(pipe: Any, edit: Edit, layers: Sequence[int]) -> Edit:
    """The same edit in other text layers: what it does there is a test of where it was put.

    The map of an edit depends on the text alone, not on the weights, so it is put on the keys and
    values of `layers` as it stands, those for keys on keys and those for values on values.
    Raises ValueError for a layer that does not exist, and for an edit that is not one of whole
    text layers (of a text encoder, composed, or for another model).

        everywhere = relocated(pipe, edit, range(len(loco.text_layers(pipe))))
    """
    settings = edit.provenance.settings
    maps = {kind_of(name): change for name, change in edit.changes.items()}
    own = settings.get("layers")
    if (
        not own
        or not maps.keys() <= {"k", "v"}
        or set(edit.changes) != set(projections(pipe, own, tuple(maps)))
        or any(maps[kind_of(name)] is not change for name, change in edit.changes.items())
    ):
        raise ValueError(
            f"{edit!r} is no edit of the keys and values of some text layers of this pipeline: "
            "only one made by locoedit, uce or time_edit can be put in others"
        )
    with edit.applied(pipe):  # refuses one that was made for other weights
        pass
    chosen = [x.index for x in _chosen_layers(family_of(pipe).text_layers(pipe), layers)]
    changes = {name: maps[kind_of(name)] for name in projections(pipe, chosen, tuple(maps))}
    return make_edit(pipe, changes, **{**settings, "layers": chosen})


def _edit(
    pipe: Any,
    concept: Concept | Sequence[Concept],
    layers: Sequence[int],
    where: Sequence[str] = ("k", "v"),
    **settings: Any,
) -> Edit:
    chosen = _chosen_layers(family_of(pipe).text_layers(pipe), layers)
    indices = [layer.index for layer in chosen]
    return solve(pipe, projections(pipe, indices, where), concept, layers=indices, **settings)


def _all_layers(pipe: Any) -> list[int]:
    return [layer.index for layer in family_of(pipe).text_layers(pipe)]


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
