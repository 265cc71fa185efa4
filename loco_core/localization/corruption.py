"""The noise that drowns a concept, and the steps at which an activation is restored."""

import copy
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch

from ..concepts import Concept
from ..families import Model
from ..families.checks import refuse_compiled, whole_number
from ..painting.picture import Noise

__all__ = ["NOISE_SEED", "STDS", "checked_calls", "corruptions"]

#: Far from the seeds that people choose: those draw the start noise.
NOISE_SEED = 2310_13730
#: The default noise, in standard deviations of the concept's token embeddings.
STDS = 3


def corruptions(
    model: Model, concept: Concept, std: float | None, draws: int
) -> tuple[list[float], list[list[Noise]]]:
    """(std of the noise by text encoder, the draws of the noise of each prompt).

    std None: `STDS` times that of all entries of the embeddings of the subject's tokens in the
    concept's prompts. Raises ValueError for a std that corrupts nothing, and for no draws.
    """
    if (count := whole_number(draws, 1, 2**31)) is None:
        raise ValueError(f"draws {draws!r} is not a whole number from 1 on")
    spans = [model.subject_span(prompt, concept.name) for prompt in concept.prompts]
    ids = model.tokenize(concept.prompts)
    subject = torch.cat([row[a : b + 1] for row, (a, b) in zip(ids, spans, strict=True)]).unique()
    tables = model.embeddings
    for component in tables:
        refuse_compiled(getattr(model.pipe, component))
    stds = [std for _ in tables] if std is not None else [
        STDS * float(x.weight[subject.to(x.weight.device)].detach().double().std(correction=0))
        for x in tables.values()
    ]  # fmt: skip
    for value in stds:
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise ValueError(
                f"noise {value!r} corrupts nothing: pass a standard deviation above 0, or None for "
                f"{STDS} times that of the embeddings of {concept.name!r}"
            )
    stds = [float(value) for value in stds]
    return stds, [
        [Noise(first, last, tuple(stds), NOISE_SEED + p, draw) for draw in range(count)]
        for p, (first, last) in enumerate(spans)
    ]


def checked_calls(
    pipe: Any, where: str, steps: int, restore_steps: Iterable[int] | None
) -> tuple[int, ...] | None:
    """`restore_steps`, sorted; refuses what is not a call of the denoiser."""
    if restore_steps is None:
        return None
    if where != "denoiser":
        raise ValueError(
            'restore_steps is for where="denoiser": the text encoder runs once, before the first '
            "step"
        )
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    most, calls = len(scheduler.timesteps), list(restore_steps)
    wrong = [c for c in calls if whole_number(c, 0, most - 1) is None]
    if wrong or not calls:
        raise ValueError(
            f"restore_steps {wrong or calls}: choose from the calls 0 to {most - 1} of this run"
        )
    return tuple(sorted({int(c) for c in calls}))
