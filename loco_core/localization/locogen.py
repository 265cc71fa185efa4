"""LocoGen: which text layers carry a concept (arXiv 2405.01008, algorithm 1).

    for j in 0..M-m:   layers C_j .. C_{j+m-1} read c', all others c, at every step
        a_j = mean over prompts and seeds of CLIPScore(image_j, original prompt)
    layers of the concept: argmin_j a_j; for a fact argmax_j CLIPScore(image_j, updated fact)

c is the prompt with the concept and c' its neutral twin (or, by choice, the bare target; for a
fact always the updated one). Only the conditional half of classifier-free guidance is touched.

The paper takes the argmin. Where no window does anything there is one, too: so here the best window
is *found* only if its drop passes a test that knows how many windows there were, else none is.

SD-XL hands its denoiser a pooled embedding of the prompt too, beside all text layers. By default it
stays that of c, so that what a window does is what its layers do; then even the row in which every
layer reads c' may still show some of the concept. With pooled="swap" a row whose window reads c'
gets the pooled embedding of c' as well.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..concepts import Concept
from ..families import Model
from ..interventions.routing import windows
from ..judging.score import Score
from ..painting.picture import Picture
from ..statistics import reaches_neutral, units_of
from .localization import Localization, made_by
from .sweep import Cell, Painting, sweep

__all__ = ["locogen"]


def locogen(
    model: Model,
    concept: Concept,
    painting: Painting,
    score: Score,
    *,
    window: int | str,
    seeds: Sequence[int],
    neutral: str | None = None,
    pooled: str = "keep",
    threshold: float | None = None,
) -> Localization:
    """The sweep over windows, see `loco.localize`."""
    names = tuple(layer.name for layer in model.text_layers)
    if isinstance(window, str) and window != "smallest":
        raise ValueError(f'window {window!r}: pass a number of layers or "smallest"')
    sizes = range(1, len(names) + 1) if isinstance(window, str) else [window]
    masks = [windows(len(names), size) for size in sizes]
    _check_pooled(model, pooled)
    for prompt in concept.prompts:
        model.subject_span(prompt, concept.name)
    instead = _replacement(concept, neutral)
    judged = list((concept.target or ()) if concept.kind == "fact" else concept.prompts)
    sign, tried = (1 if concept.kind == "fact" else -1), []
    for mask in masks:
        rows = [torch.zeros_like(mask[0]), torch.ones_like(mask[0]), *mask]
        shape = len(rows), len(judged), 1, len(seeds)
        cells = [
            Cell(
                Picture(
                    prompt, seed, tuple((layer, instead[p]) for layer in replaced),
                    instead[p] if pooled == "swap" and replaced else None,
                ),
                judged[p],
                ((r * len(judged) + p) * len(seeds) + k,),
            )
            for r, replaced in enumerate(row.nonzero().flatten().tolist() for row in rows)
            for p, prompt in enumerate(concept.prompts)
            for k, seed in enumerate(seeds)
        ]  # fmt: skip
        swept = sweep(model, cells, shape, score, painting, "sampling")
        baseline, floor, scores = swept.scores[0], swept.scores[1], swept.scores[2:]
        means = scores.flatten(1).mean(1)
        tried.append((int(mask[0].sum()), float(means.max() if sign > 0 else means.min())))
        if not isinstance(window, str):
            break
        if threshold is None:
            if _ends(scores, baseline, floor, sign):
                break
        elif sign * (tried[-1][1] - threshold) >= 0:
            break
    else:
        raise ValueError(
            f"no window brings the score of {concept.name!r} to {threshold} (size, best score: "
            f"{tried}): leave threshold=None to compare with the neutral images"
        )
    return Localization(
        concept=concept,
        items=tuple(tuple(row.nonzero().flatten().tolist()) for row in mask),
        scored=scores,
        reference=baseline,
        goal=floor,
        sign=sign,
        pixels=swept.pixels,
        cost=swept.cost,
        provenance=made_by(
            model, painting, score, method="locogen", seeds=list(seeds), asked_window=window,
            neutral=list(instead), judged=judged, threshold=threshold,
            pooled=pooled if model.pooled else None,
        ),
        layer_names=names,
        tried=tuple(tried),
    )  # fmt: skip


def _ends(scores: Tensor, baseline: Tensor, floor: Tensor, sign: int) -> bool:
    """Whether the search for the smallest window is over: the concept is removed, or the neutral
    text does not remove it either, or the window is all layers."""
    (windows_, _), (floor_, _), (baseline_, _) = (
        units_of(-sign * x.mean(-2)) for x in (scores, floor, baseline)
    )
    nothing = not reaches_neutral(floor_[None], floor_, baseline_)
    return nothing or len(scores) == 1 or reaches_neutral(windows_, floor_, baseline_)


def _check_pooled(model: Model, pooled: str) -> None:
    if pooled not in ("keep", "swap"):
        raise ValueError(f'pooled={pooled!r}: choose "keep" or "swap"')
    if pooled == "swap" and not model.pooled:
        raise ValueError(
            f'pooled="swap": {model.name} has no pooled text to swap, its prompts enter only '
            'through the text layers; leave pooled="keep"'
        )


def _replacement(concept: Concept, neutral: str | None) -> Sequence[str]:
    """The prompts that windows read instead of the concept's."""
    if neutral is None:
        neutral = "target" if concept.kind == "fact" else "twin"
    if neutral not in ("twin", "target"):
        raise ValueError(f'neutral={neutral!r}: choose "twin" or "target"')
    if neutral == "twin":
        return concept.neutral
    if concept.target is None:
        raise ValueError(
            f"concept {concept.name!r} has no target prompts: make it with target=[...], or use "
            'neutral="twin"'
        )
    return concept.target
