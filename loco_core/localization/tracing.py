"""Causal tracing: which activations carry a concept (arXiv 2310.13730, sec. 3).

Three runs from the same start noise:
    clean      the prompt c, with classifier-free guidance
    corrupted  Gaussian noise is added to the word embeddings of the concept's tokens
    restored   the corrupted run, in which one site has its activation of the clean run
and the average indirect effect of a site, over prompts, draws of the noise and seeds,
    AIE(site) = E[ CLIPScore(x_restored, c) - CLIPScore(x_corrupted, c) ]
The second term is the same for all sites of a caption; `CausalTrace.scores` is the first alone.

The noise enters every text encoder, and only the prompt: the unconditional half of guidance reads
the same negative text in all three runs. What is restored in the denoiser is the conditional half;
the unconditional activations of a restored run stay its own, as its latents are.
"""

import builtins
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .._warn import warn
from ..concepts import Concept
from ..families import Model, family_of
from ..families.checks import refuse_compiled
from ..families.sites import adjacent, selected
from ..interventions.routing import windows
from ..judging.score import Score, score_of
from ..painting.paint import Map
from ..painting.picture import Noise, Picture, Sampling, checked_seeds
from ..painting.store import Store
from ..painting.texts import alike
from .causal_trace import CausalTrace, threshold_from
from .corruption import checked_calls, corruptions
from .localization import Localization, made_by
from .sweep import Cell, Painting, sweep

__all__ = ["CausalTrace", "threshold_from", "trace", "traced_layers"]

WHERE = {"denoiser": "denoiser", "unet": "denoiser", "text_encoder": "text_encoder"}


def trace(
    pipe: Any,
    concept: Concept,
    where: str = "denoiser",
    seeds: Iterable[int] = range(4),
    *,
    steps: int = 25,
    guidance: float = 7.5,
    size: tuple[int, int] | None = None,
    noise: float | None = None,
    draws: int = 1,
    window: int = 1,
    restore_steps: Iterable[int] | None = None,
    sites: Sequence[str] | None = None,
    tokens: str = "last",
    batch_size: int | str = "fit",
    score: Any = None,
    images: bool = False,
    folder: str | Path | Store | None = None,
    map: Map = map,
) -> CausalTrace:
    """The effect of restoring each site of the denoiser, or of the text encoders, alone.

    where: "denoiser" ("unet" will do; every resnets.*, attn1, attn2 and ff, in the order they run)
    or "text_encoder" (self-attention and MLP of every layer, token by token). noise: its standard
    deviation; by default 3 times that of all entries of the token embeddings of the concept's own
    words, for each text encoder its own. draws: of the noise, per prompt. window: adjacent sites
    restored together. restore_steps: the calls of the denoiser at which its sites are restored,
    0-based, one call a step with most schedulers; by default all. sites: names or labels of the
    only ones to trace. tokens: of the text encoder, "last" (of the subject) or "all". score, size,
    map: as in `localize`. images: whether the trace keeps them. folder: a store, in which every
    picture is kept, and a killed trace goes on from there with the same result.

    batch_size: rows of one call of the pipeline; in the denoiser one of them is the clean run of
    the others. No activation is cached: peak memory is that of plain sampling with as many rows,
    and a copy of one module's output.
    Raises ValueError for a concept that is not in a prompt or is cut off, zero noise, an unknown
    `where`, a site or a step that does not exist, a compiled denoiser and what `paint` refuses.
    The pipeline is left as it was.

        traced = loco.trace(pipe, loco.shapeland.concept("style", "Mira Holt"), steps=8)
        traced.to_frame().nlargest(3, "effect"), traced.causal(threshold_from([validation]))
    """
    model, seeds = family_of(pipe), checked_seeds(seeds)
    sampling = Sampling(steps, guidance, size=size).checked(model)
    if where not in WHERE:
        raise ValueError(f'where={where!r}: choose "denoiser" or "text_encoder"')
    where = WHERE[where]
    if where == "denoiser" and tokens != "last":
        raise ValueError(f'tokens={tokens!r} is for where="text_encoder": a denoiser has no tokens')
    calls = checked_calls(pipe, where, sampling.steps, restore_steps)
    stds, noises = corruptions(model, concept, noise, draws)
    if where == "denoiser":
        refuse_compiled(model.denoiser)
        found = model.sites
    else:
        found = model.text_sites(concept.prompts, concept.name, tokens)
    groups = adjacent(selected(found, sites), window)
    store = Store.of(folder)
    if store is None and (images or map is not builtins.map):
        store = Store.temporary()
    painting, judge = Painting(sampling, store, batch_size, map), score_of(pipe, score)
    labels = [tuple(site.label for site in group) for group in groups]
    cells, shape = _cells(model, concept, noises, labels, seeds, sampling, calls, where)
    swept = sweep(model, cells, shape, judge, painting, "tracing")
    traced = CausalTrace(
        concept=concept,
        items=groups,
        scored=swept.scores[2:],
        reference=swept.scores[1],
        goal=swept.scores[0],
        sign=1,
        pixels=swept.pixels if images else None,
        cost=swept.cost,
        provenance=made_by(
            model, painting, judge, method="tracing", where=where, seeds=seeds, noise=stds,
            draws=shape[2], restore_steps=None if calls is None else list(calls), tokens=tokens,
        ),
        where=where,
    )  # fmt: skip
    _warn_of_nothing(traced.gap, concept)
    return traced


def traced_layers(
    model: Model,
    concept: Concept,
    painting: Painting,
    score: Score,
    *,
    window: int | str,
    seeds: Sequence[int],
    noise: float | None = None,
    draws: int = 1,
) -> Localization:
    """Causal tracing read out per text layer: windows of cross-attentions are restored."""
    layers = model.text_layers
    if isinstance(window, str):
        raise ValueError(f"window {window!r}: with method='tracing' pass a number of layers")
    refuse_compiled(model.denoiser)
    items = [tuple(row.nonzero().flatten().tolist()) for row in windows(len(layers), window)]
    stds, noises = corruptions(model, concept, noise, draws)
    labels = [tuple(layers[index].name for index in item) for item in items]
    cells, shape = _cells(
        model, concept, noises, labels, seeds, painting.sampling, None, "denoiser", clean=1
    )
    swept = sweep(model, cells, shape, score, painting, "tracing")
    scores = swept.scores[2:]
    found = Localization(
        concept=concept,
        items=tuple(items),
        scored=scores,
        reference=swept.scores[0],
        goal=swept.scores[1],
        sign=1,
        pixels=swept.pixels,
        cost=swept.cost,
        provenance=made_by(
            model, painting, score, method="tracing", seeds=list(seeds), asked_window=window,
            noise=stds, draws=shape[2],
        ),
        layer_names=tuple(layer.name for layer in layers),
        tried=((len(items[0]), float(scores.flatten(1).mean(1).max())),),
    )  # fmt: skip
    _warn_of_nothing(found.gap, concept)
    return found


def _cells(
    model: Model,
    concept: Concept,
    noises: Sequence[Sequence[Noise]],
    labels: Sequence[tuple[str, ...]],
    seeds: Sequence[int],
    sampling: Sampling,
    calls: tuple[int, ...] | None,
    where: str,
    clean: int = 0,
) -> tuple[list[Cell], tuple[int, int, int, int]]:
    """The pictures of a trace, by prompt and seed, and the shape of its table: clean, corrupted and
    then restored rows, [row, prompt, draw, seed]. clean: 1 puts the corrupted row first."""
    draws = len(noises[0])
    shape = 2 + len(labels), len(concept.prompts), draws, len(seeds)

    def place(row: int, p: int, draw: int, k: int) -> int:
        return ((row * shape[1] + p) * draws + draw) * shape[3] + k

    places: dict[Picture, list[int]] = {}
    for p, prompt in enumerate(concept.prompts):
        for k, seed in enumerate(seeds):
            whole = Picture(prompt, seed)
            places.setdefault(whole, []).extend(place(clean, p, d, k) for d in range(draws))
            for d, noise in enumerate(noises[p]):
                for row, restored in zip(
                    [1 - clean, *range(2, shape[0])], [(), *labels], strict=True
                ):
                    own = calls if restored else None
                    picture = Picture(prompt, seed, noise=noise, restored=restored, calls=own)
                    places.setdefault(picture, []).append(place(row, p, d, k))
    if where == "text_encoder":
        merged: dict[Picture, list[int]] = {}
        for picture, first in alike(model, places, sampling).items():
            merged.setdefault(first, []).extend(places[picture])
        places = merged
    return [Cell(picture, picture.prompt, tuple(at)) for picture, at in places.items()], shape


def _warn_of_nothing(gap: float, concept: Concept) -> None:
    if not gap > 0:
        warn(
            f"the noise took nothing of {concept.name!r} (mean score clean - corrupted = "
            f"{gap:.3g}), so its effects mean nothing: pass more noise=, draws= or seeds="
        )
