"""CAD: which single weights make a concept, and which hold it back (arXiv 2412.02542).

J says how strongly the model shows the concept (`objectives`). Knocking a weight out, w_i -> 0,
changes J to first order by

    J(w) - J(w with w_i = 0)  ~  alpha_i = w_i dJ/dw_i                                          (1)

so one gradient scores every weight. Positive components (alpha > 0) serve the concept: zeroing the
largest erases it. Negative ones hold it back: zeroing those amplifies it. Effects add up to first
order only; `fidelity` measures how far that is true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._progress import bar
from ..concepts import Concept
from ..edits.weights import editable
from ..families import family_of
from ..families.checks import PLAIN
from ..families.running import plain
from ..families.sites import kind_around
from . import objectives
from .kept import Kept

__all__ = ["AGAINST", "WHERE", "alphas", "batches", "check_images", "rows_of", "scored"]

AGAINST = ("empty", "neutral")
#: Sets of weights of a denoiser: the modules that hold them, and the kinds of sites those lie in.
WHERE: dict[str, tuple[Any, tuple[str, ...] | None]] = {
    "ff": (nn.Linear, ("feed-forward",)),
    "attention": (nn.Linear, ("self-attention", "cross-attention")),
    "cross-attention": (nn.Linear, ("cross-attention",)),
    "conv": (PLAIN[1:], None),
}


def alphas(
    pipe: Any,
    concept: Concept,
    settings: Mapping[str, Any],
    images: Tensor | None,
    batch_size: int,
    share: float,
) -> tuple[float, Kept]:
    """J, and of w dJ/dw what `share` keeps, of the weights and the objective that `settings` name.

    Raises ValueError if J is not finite, or an alpha, by the name of its weight.
    """
    weights = scored(pipe, settings["where"], settings["text_layers"])
    denoiser, rows = plain(family_of(pipe).denoiser), rows_of(concept, settings)
    calls = 2 * settings["steps"] * -(-len(rows) // batch_size)
    with torch.inference_mode(False), bar(calls, "attributing", "call") as progress:
        made = batches(pipe, rows, settings, images, batch_size, progress.update)
        steps = (step for part in made for step in part)
        J, sums = objectives.gradients(denoiser, steps, weights, progress.update)

    def each() -> Iterator[tuple[str, Tensor]]:
        for name in list(sums):
            alpha = _times(sums.pop(name), weights[name]).cpu()
            if not alpha.isfinite().all():
                raise ValueError(_overflow(f"alpha of {name}", settings))
            yield name, alpha

    if not math.isfinite(J):
        raise ValueError(_overflow(f"J = {J}", settings))
    return J, Kept.of(each(), share)


def _times(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.mul_(weight.detach().to(grad))


def _overflow(what: str, settings: Mapping[str, Any]) -> str:
    return (
        f"{what} is not finite in {settings['dtype']}: load the pipeline, or the part of it that "
        "overflows, in bfloat16 or float32"
    )


def scored(
    pipe: Any, where: str | Sequence[str], layers: Sequence[int] | None = None
) -> dict[str, nn.Parameter]:
    """Weight name -> parameter of the selection; refuses one that matches nothing."""
    model = family_of(pipe)
    denoiser, component = model.denoiser, model.component
    names = [] if isinstance(where, str) else list(where)
    if isinstance(where, str) and where in WHERE:
        holders, kinds = WHERE[where]
        names = [
            f"{component}.{name}.weight"
            for name, module in plain(denoiser).named_modules()
            if isinstance(module, holders) and (kinds is None or kind_around(name) in kinds)
        ]
    if layers is not None:
        known = model.text_layers
        if wrong := [layer for layer in layers if layer not in range(len(known))]:
            raise ValueError(f"layers {wrong}: choose from 0 to {len(known) - 1}")
        blocks = [f"{component}.{known[i].name}".rpartition(".")[0] + "." for i in layers]
        names = [name for name in names if name.startswith(tuple(blocks))]
    outside = [name for name in names if not name.startswith(f"{component}.")]
    if not names or outside:
        raise ValueError(
            f"where={where!r}, layers={layers} names no weight of the {component}"
            + (f" ({outside[0]} is elsewhere)" if outside else "")
            + f": choose from {', '.join(WHERE)}, or pass names such as "
            f"{component}. ... .weight"
        )
    weights: dict[str, Any] = {n: editable(pipe, n).weight for n in dict.fromkeys(names)}
    if frozen := [name for name, weight in weights.items() if weight.is_inference()]:
        raise ValueError(
            f"{frozen[0]} was made under torch.inference_mode() and can have no gradient: load the "
            "pipeline outside of it"
        )
    return weights


def rows_of(concept: Concept, settings: Mapping[str, Any]) -> list[objectives.Row]:
    """The rows that J is a mean over; those to preserve weigh negatively."""
    rows = []
    for prompts, sign in ((concept.prompts, 1.0), (settings["preserve"], -1.0)):
        weight = sign / max(1, len(prompts) * len(settings["seeds"]))
        for i, prompt in enumerate(prompts):
            twin = concept.neutral[i % len(concept.neutral)]
            other = twin if settings["against"] == "neutral" else ""
            rows += [objectives.Row(prompt, other, seed, weight) for seed in settings["seeds"]]
    return rows


def batches(
    pipe: Any,
    rows: Sequence[objectives.Row],
    settings: Mapping[str, Any],
    images: Tensor | None,
    batch_size: int,
    tick: Callable[[], Any],
) -> Iterator[list[objectives.Step]]:
    """The recorded calls of a few rows after the other; `Step.J` of all adds up to J."""
    asked = {name: settings[name] for name in ("objective", "measure", "steps", "guidance")}
    if images is not None:
        images = images.repeat_interleave(len(settings["seeds"]), dim=0)
    for i in range(0, len(rows), batch_size):
        part = slice(i, i + batch_size)
        shown = None if images is None else images[part]
        yield objectives.recorded(pipe, rows[part], **asked, images=shown, tick=tick)


def check_images(
    concept: Concept, images: Tensor | None, objective: str, preserve: Sequence[str]
) -> None:
    """Raise ValueError unless `images` fit the concept, and they and `preserve` the objective."""
    if isinstance(preserve, str):
        raise ValueError(f"preserve must be a list of prompts: pass [{preserve!r}]")
    if objective == "amplify" and preserve:
        raise ValueError("preserve is for objective='erase': leave it out")
    if images is None:
        return
    if objective != "amplify":
        raise ValueError("images are what objective='amplify' restores: leave them out")
    count = len(concept.prompts)
    if images.ndim != 4 or images.shape[:2] != (count, 3):
        raise ValueError(
            f"images are [prompt, 3, H, W] for the {count} prompts of {concept.name!r}, not "
            f"{list(images.shape)}"
        )
    if not (images.isfinite().all() and images.min() >= 0 and images.max() <= 1):
        raise ValueError("images must be finite and in [0, 1]")
