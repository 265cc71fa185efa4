"""Which neurons tell a concept from its neutral twin: a t statistic for each (arXiv 2405.01008).

Over prompts with the concept (s) and neutral ones (n) the activations of a neuron have means mu,
standard deviations sd and counts n, and it is ranked by the size of Welch's t:

    z = (mu_s - mu_n) / sqrt(sd_s^2 / n_s + sd_n^2 / n_n)

Neurons of all layers and projections are ranked together. A projection is linear in the encoded
prompt, the same at every step of the denoising, so no image is made: activation = W c.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .. import records
from ..closed_form.rows import gather
from ..concepts import Concept
from ..edits.weights import fingerprint, linear_of, projections
from ..families import Model, TextStates, family_of
from ..families.tokens import checked_tokens, with_targets, words
from .neurons import Neurons

__all__ = ["rank_neurons", "welch_z"]


@torch.no_grad()
def rank_neurons(
    pipe: Any,
    concept: Concept,
    layers: Sequence[int],
    where: Sequence[str] = ("k", "v"),
    token: str = "padding",
    *,
    by: str = "z",
    neutral: Sequence[str] | None = None,
) -> Neurons:
    """The outputs of to_k and to_v of `layers`, ranked by how well they tell `concept`.

    By |z|, see above, of activations on concept.prompts against those on their neutral twins; ties
    by index. Computed in float64 on the CPU from the encoded prompts; no image is made. z says how
    surely a neuron differs, not how far: by="shift" ranks by |mu_s - mu_n| instead.

    layers: indices of text layers in execution order, such as `found.layers` of a Localization.
    where: "k" for to_k, "v" for to_v, or both (0.3 called them by their modules' names, which still
    do). token: where the activations are read, one number per prompt:
    "last", the last token of the subject (the paper; in a twin, of what stands in its place);
    "eos", the end of the text; "padding", the mean over the padding behind it, which a causal text
    encoder has let read everything and which is most of what a layer reads of a short prompt;
    "all", the mean over the words and the end of the text. The neutral mean is of the same tokens.
    neutral: other prompts to compare with, one for each, such as `concept.renamed(artists)`.
    On mini-sd "padding", to_v alone and by="shift" need the fewest neurons by far; with "last" and
    both projections (the paper) as many do nothing.
    Raises ValueError for a layer, projection, token or order that does not exist, fewer than two
    prompts, a concept that is cut off, and for "padding" a prompt that leaves none.

        neurons = loco.rank_neurons(pipe, loco.shapeland.concept("style", "Mira Holt", 12), [8, 9])
        neurons.to_frame().head()
        with neurons.ablated(pipe, top=50):
            images = loco.generate(pipe, concept.prompts)
    """
    model = family_of(pipe)
    if not isinstance(concept, Concept):
        raise TypeError(f"concept must be a loco.Concept, not {concept!r}: see loco.concepts")
    kinds = [] if isinstance(where, str) else [name.removeprefix("to_") for name in where]
    if not kinds or not set(kinds) <= {"k", "v"}:
        raise ValueError(f"where={where!r} matches no projection: choose from ('k', 'v')")
    checked_tokens(token, "reading")
    if by not in ("z", "shift"):
        raise ValueError(f'by={by!r}: choose "z" or "shift"')
    if len(concept.prompts) < 2:
        raise ValueError(
            f"concept {concept.name!r} has 1 prompt, of which there is no variance: give at least 2"
        )
    names = projections(pipe, layers, kinds)
    index = {layer.name: layer.index for layer in model.text_layers}
    modules = [linear_of(pipe, name) for name in names]
    pair = with_targets(concept, "neutral" if neutral is None else neutral)
    c, c_neutral = _read(model, pair, token)
    activations = [_activations(modules, states) for states in (c, c_neutral)]
    z, (mean, neutral_mean) = welch_z(*activations), (x.mean(0) for x in activations)
    size = z.abs() if by == "z" else (mean - neutral_mean).abs()
    return Neurons(
        concept=concept,
        weights=tuple(names),
        layers=tuple(index[name.split(".", 1)[1].rsplit(".", 2)[0]] for name in names),
        sizes=tuple(module.out_features for module in modules),
        originals=tuple(fingerprint(module.weight) for module in modules),
        z=z,
        concept_mean=mean,
        neutral_mean=neutral_mean,
        order=(-size).argsort(stable=True),
        provenance=records.provenance(
            pipe,
            layers=sorted({operator.index(layer) for layer in layers}),
            where=sorted(f"to_{kind}" for kind in kinds),
            token=token,
            by=by,
            neutral=pair.target,
        ),
    )


def welch_z(
    s: Float[Tensor, "prompt neuron"], n: Float[Tensor, "twin neuron"]
) -> Float64[Tensor, " neuron"]:
    """z of each neuron, [neuron] float64, of activations s, n: [prompt, neuron], two or more each.

    (mu_s - mu_n) / sqrt(sd_s^2 / n_s + sd_n^2 / n_n), with unbiased variances. The denominator is
    at least 1e-12 (|mu_s| + |mu_n|), below which it is rounding: a neuron that never varies scores
    0 if the means are equal, and otherwise a finite 1e12 at most, ahead of all that vary.

        welch_z(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]]))  # tensor([0.7071])
    """
    s, n = s.double(), n.double()
    difference = s.mean(0) - n.mean(0)
    error = (s.var(0) / len(s) + n.var(0) / len(n)).sqrt()
    error = error.maximum(1e-12 * (s.mean(0).abs() + n.mean(0).abs()))
    return torch.where(difference == 0, 0.0, difference / error)


def _read(model: Model, pair: Concept, token: str) -> tuple[Tensor, Tensor]:
    """What the projections read of the prompts and of their targets: [prompt, width] each."""
    for prompt in pair.prompts:
        model.subject_span(prompt, pair.name)  # refuses a concept that is cut off

    def encode(prompts: Sequence[str]) -> TextStates:
        return model.encode(list(prompts))

    if token == "last":
        rows = gather(model, encode, [pair], "last")
        return rows.keys, rows.targets
    tokenizer, target = model.tokenizer, pair.target or ()
    return (
        _pooled(tokenizer, pair.prompts, encode(pair.prompts), token),
        _pooled(tokenizer, target, encode(target), token),
    )


def _pooled(
    tokenizer: Any, prompts: Sequence[str], states: TextStates, token: str
) -> Float64[Tensor, "prompt width"]:
    """One text state per prompt, [prompt, width] float64: the mean over the tokens of `token`."""
    means = []
    for prompt, tokens, embeds in zip(prompts, states.tokens, states.embeds, strict=True):
        first, end = words(tokenizer, tokens)
        span = {"eos": slice(end, end + 1), "padding": slice(end + 1, None)}
        chosen = embeds[span.get(token, slice(first, end + 1))]
        if not len(chosen):
            raise ValueError(
                f'prompt {prompt!r} fills all {len(tokens)} tokens: with token="padding" a prompt '
                'must leave some, so shorten it or use token="eos"'
            )
        means.append(chosen.cpu().double().mean(0))
    return torch.stack(means)


def _activations(modules: Sequence[Any], states: Tensor) -> Tensor:
    """Outputs of all modules side by side, [prompt, neuron] float64 on the CPU."""
    outputs = []
    for module in modules:
        weight, bias = module.weight.cpu().double(), module.bias
        outputs.append(states.cpu().double() @ weight.T)
        if bias is not None:
            outputs[-1] += bias.cpu().double()
    return torch.cat(outputs, dim=1)
