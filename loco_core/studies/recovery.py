"""Is a concept gone, or only hidden? Search a text embedding that brings it back.

An edit changes what some weights make of some texts. The concept may still be in the others, and a
text that no caption has may still reach it (Pham et al. 2023, arXiv 2308.01508). So search one, by
gradient, on the edited pipeline:

    e* = argmin over e of  E_{x, t, eps} || target(x_t) - f(x_t, e) ||^2

x: images of the concept; f: the denoiser, all of whose text layers read e; target: what it is
trained to predict. It starts at the text of a prompt. What a few steps bring back was not removed;
what they do not may still be there, for a longer search or another start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from .._progress import bar
from ..families import TextStates, family_of
from ..families.checks import whole_number
from ..families.running import plain
from ..inside.objectives import Row, only, recorded
from ..interventions.routing import routed

__all__ = ["painted_from", "search"]


def search(
    pipe: Any,
    prompt: str,
    images: Float[Tensor, "image 3 height width"],
    *,
    steps: int = 60,
    lr: float = 0.05,
    times: int = 25,
    seed: int = 0,
) -> TextStates:
    """The text e* [1, token, width], as the text layers read it, found from `prompt`.

    pipe: with the edit in force. images: of the concept, [n, 3, H, W] in [0, 1], of the pipeline's
    own size. steps: of AdamW at rate lr, each on all images at one of `times` steps of the sampler,
    drawn by `seed` as is the noise. The weights of the pipeline are left as they were, and so is a
    pooled embedding beside the text layers (SD-XL), which is the prompt's own.
    Raises ValueError for images of another size, a number of steps that is none, and a scheduler
    that is no diffusion (`objectives.recorded`).

        with edit.applied(pipe):
            states = search(pipe, "a red star", drawings_by_mira_holt)
            images = painted_from(pipe, states, seeds=range(8))
    """
    if (count := whole_number(steps, 1, 100_000)) is None:
        raise ValueError(f"steps={steps!r}: choose a whole number of steps, at least 1")
    model = family_of(pipe)
    kind = pipe.scheduler.config.get("prediction_type")
    rows = [Row(prompt, "", seed + i, 1 / len(images)) for i in range(len(images))]
    calls = recorded(
        pipe, rows, objective="amplify", measure=kind, steps=times, guidance=2.0, images=images
    )
    start = model.encode([prompt])
    e = start.embeds.detach().float().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([e], lr, weight_decay=0.0)
    denoiser, src = plain(model.denoiser), torch.zeros(len(rows), len(model.text_layers)).long()
    draw = torch.Generator().manual_seed(seed)
    with only(denoiser, ()), bar(count, "searching", "step") as progress:
        for _ in range(count):
            call = calls[int(torch.randint(len(calls), (), generator=draw))]
            text = dataclasses.replace(start, embeds=e.to(start.embeds))
            with torch.enable_grad(), routed(pipe, text, src):
                (-call.J(denoiser)).backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.update()
    return dataclasses.replace(start, embeds=e.detach().to(start.embeds))


def painted_from(
    pipe: Any, states: TextStates, seeds: Sequence[int], steps: int = 25, guidance: float = 7.5
) -> Float32[Tensor, "seed 3 height width"]:
    """Pictures of one text that no prompt has, [seed, 3, H, W] in [0, 1] on the CPU."""
    model, seeds = family_of(pipe), list(seeds)
    negative = model.unprompted(model.encode([""]))
    return model.call(states[[0] * len(seeds)], negative, seeds, steps=steps, guidance=guidance)
