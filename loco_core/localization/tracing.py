"""Causal tracing: which activations carry a concept (arXiv 2310.13730, sec. 3).

Three runs from the same start noise:
    clean      the prompt c, with classifier-free guidance
    corrupted  Gaussian noise is added to the word embeddings of the concept's tokens
    restored   the corrupted run, in which one site has its activation of the clean run
and the average indirect effect of a site, over prompts, draws of the noise and seeds,
    AIE(site) = E[ CLIPScore(x_restored, c) - CLIPScore(x_corrupted, c) ]
The second term is the same for all sites of a caption; `CausalTrace.scores` is the first alone.

The noise enters every text encoder, and only the prompt: the unconditional half of guidance reads
the same negative text in all three runs. What is restored in the UNet is the conditional half; the
unconditional activations of a restored run stay its own, as its latents are.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import records
from .._progress import bar
from .._warn import warn
from ..concepts import Concept
from ..families import family_of
from ..judging.clip_score import clip_for, clip_score
from ..painting import paint as sampling
from .causal_trace import CausalTrace, threshold_from
from .locogen import Score, scores_of
from .runs import checked_calls, corruptions, plan, run
from .sites import adjacent, selected, text_sites, unet_sites

__all__ = ["CausalTrace", "threshold_from", "trace"]


@torch.no_grad()
def trace(
    pipe: Any,
    concept: Concept,
    where: str = "unet",
    seeds: Iterable[int] = range(4),
    *,
    steps: int = 25,
    guidance: float = 7.5,
    noise: float | None = None,
    draws: int = 1,
    window: int = 1,
    restore_steps: Iterable[int] | None = None,
    sites: Sequence[str] | None = None,
    tokens: str = "last",
    batch_size: int = 16,
    score: Score | None = None,
    images: bool = False,
    folder: str | Path | None = None,
) -> CausalTrace:
    """The effect of restoring each site of the UNet, or of the text encoders, alone.

    where: "unet" (every resnets.*, attn1, attn2 and ff, in the order they run) or "text_encoder"
    (self-attention and MLP of every layer, token by token). noise: its standard deviation; by
    default 3 times that of all entries of the token embeddings of the concept's own words, for
    each text encoder its own. draws: of the noise, per prompt. window: adjacent sites restored
    together. restore_steps: the calls of the denoiser at which the UNet's sites are restored,
    0-based, one call a step with most schedulers; by default all. sites: names or labels of the
    only ones to trace. tokens: of the text encoder, "last" (of the subject) or "all". score:
    (images [n, 3, H, W] in [0, 1], prompts) -> [n]; by default CLIP-Score with the CLIP of a mini.
    images: whether the trace keeps them. folder: finished batches are kept there, and a killed
    trace goes on from them with the same result.

    batch_size: rows of one call of the pipeline; in the UNet one of them is the clean run of the
    others. Nothing is cached: peak memory is that of plain sampling with as many rows, and a copy
    of one module's output.
    Raises ValueError for a concept that is not in a prompt or is cut off, zero noise, an unknown
    `where`, a site or a step that does not exist, a compiled denoiser and what `generate` refuses.
    The pipeline is left as it was.

        traced = loco.trace(pipe, loco.shapeland.concept("style", "Mira Holt"), steps=8)
        traced.to_frame().nlargest(3, "effect"), traced.causal(threshold_from([validation]))
    """
    model, seeds = family_of(pipe), sampling.checked_seeds(seeds)
    sampling.check_settings(pipe, steps, guidance, batch_size)
    if batch_size < 2:
        raise ValueError("batch_size 1 has no room for the clean run beside a restored one: use 2")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws {draws!r} is not a whole number from 1 on")
    if where not in ("unet", "text_encoder"):
        raise ValueError(f'where={where!r}: choose "unet" or "text_encoder"')
    if where == "unet" and tokens != "last":
        raise ValueError(f'tokens={tokens!r} is for where="text_encoder": a UNet has no tokens')
    calls = checked_calls(pipe, where, steps, restore_steps)
    stds, noises = corruptions(pipe, concept, noise, draws)
    score_name = "CLIP-Score" if score is None else getattr(score, "__name__", type(score).__name__)
    score = partial(clip_score, clip=clip_for(pipe)) if score is None else score
    if where == "unet":
        found = unet_sites(pipe)
    else:
        found = text_sites(pipe, concept.prompts, concept.name, tokens)
    groups = adjacent(selected(found, sites), window)
    settings = {
        "concept": concept.name,
        "where": where,
        "sites": [[site.label for site in group] for group in groups],
        "seeds": seeds,
        "steps": steps,
        "guidance": guidance,
        "noise": stds,
        "draws": draws,
        "restore_steps": calls,
        "batch_size": batch_size,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(model.denoiser.dtype),
    }
    rows = [(r, d) for d in range(draws) for r in range(1, 2 + len(groups))]
    scores = torch.full((2 + len(groups), len(noises), draws, len(seeds)), math.nan).double()
    kept: Tensor | None = None
    negative = model.unprompted(model.encode([""]))
    with sampling.own_scheduler(pipe):
        for p, (prompt, noised) in enumerate(zip(concept.prompts, noises, strict=True)):
            texts, jobs = plan(pipe, prompt, noised, groups, where, rows, seeds, batch_size)
            parts = None
            if folder is not None:
                cells = [job.cells for job in jobs]
                parts = records.Parts.of(
                    Path(folder) / f"prompt-{p}", pipe, prompt=prompt, cells=cells, **settings
                )
            what = f"tracing prompt {p + 1} of {len(noises)}"
            with bar(len(jobs) * steps, what, "step") as progress:
                for number, job in enumerate(jobs):
                    made = None if parts is None else parts.read(number)
                    if made is None:
                        made = run(pipe, texts, negative, job, steps, guidance, calls, progress)
                        made = made.mul(255).round().to(torch.uint8)
                        if parts is not None:
                            parts.write(number, made)
                    else:
                        progress.update(steps)
                    scored = scores_of(
                        score, made.float().div(255)[:, None, None], [prompt]
                    ).flatten()
                    if images and kept is None:
                        kept = torch.zeros(*scores.shape, *made.shape[1:], dtype=torch.uint8)
                    for b, (r, d), k in job.cells:
                        at = (r, p, slice(None) if r == 0 else d, k)
                        scores[at] = scored[b]
                        if kept is not None:
                            kept[at] = made[b]
    traced = CausalTrace(
        concept, where, groups, scores[2:], scores[0, :, 0], scores[1],
        None if kept is None else kept.float().div(255),
        records.provenance(pipe, **settings, score=score_name),
    )  # fmt: skip
    if not traced.gap > 0:
        warn(
            f"the noise took nothing of {concept.name!r} (mean score clean - corrupted = "
            f"{traced.gap:.3g}), so its effects mean nothing: pass more noise=, draws= or seeds="
        )
    return traced
