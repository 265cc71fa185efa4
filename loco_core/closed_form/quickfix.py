"""Diff-QuickFix (arXiv 2310.13730): edit the text encoder, where causal tracing points.

Causal tracing finds one causal state in a CLIP text encoder: the first self-attention layer, at the
last token of the subject. Its output projection W_out maps k, the attention's mixture of values, to
v = W_out k + b. With k_i the input for the source prompt and v_i the output for the target prompt,
minus the bias,

    W' = (lam W + sum_i v_i k_i^T) (lam I + sum_i k_i k_i^T)^-1

which is the solve of `closed_form` with keys k_i and targets g_i, the input for the target prompt,
because v_i - b = W g_i. The bias stays where it is and is counted once. Every layer of every
denoiser that reads this text encoder sees the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..concepts import Concept
from ..edits.edit import Edit
from ..families import family_of
from .solve import solve

__all__ = ["diff_quickfix"]


def diff_quickfix(
    pipe: Any,
    concept: Concept | Sequence[Concept],
    lam: float = 0.01,
    *,
    layer: int = 0,
    tokens: str = "last",
    preserve: Sequence[str] = (),
    target: str | Sequence[str] | None = None,
    null_space: Sequence[str] | None = None,
) -> Edit:
    """Diff-QuickFix: an Edit of the text encoder(s) that reads `concept` as its target.

    Edits `self_attn.out_proj` of self-attention layer `layer` (the first, in the paper) of every
    text encoder of the pipeline, each with keys of its own. Several concepts are solved together.

    lam: >= 0, in units of the squared length of that layer's activations, which is not that of an
    encoded prompt; the paper uses 0.01. tokens: "last", the last token of the subject (the paper);
    "eos", and the end of text; "following", every later token too; "all". target: what it is read
    as, see `locoedit`; a whole object goes with target=["a"], say. preserve, null_space: as there.

    The pipeline is not changed. Raises ValueError as `locoedit`, and for a layer that no text
    encoder has.

        edit = loco.diff_quickfix(pipe, loco.concepts.style("Van Gogh"))
        with edit.applied(pipe):
            images = loco.generate(pipe, ["a house in the style of Van Gogh"])
    """
    return solve(
        pipe,
        family_of(pipe).text_projections(layer),
        concept,
        method="diff_quickfix",
        lam={"out": lam},
        tokens=tokens,
        target=target,
        preserve=preserve,
        null_space=null_space,
        layer=layer,
    )
