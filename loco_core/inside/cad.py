"""CAD: which single weights make a concept, and which hold it back (arXiv 2412.02542).

J says how strongly the model shows the concept (`objectives`). Knocking a weight out, w_i -> 0,
changes J to first order by

    J(w) - J(w with w_i = 0)  ~  alpha_i = w_i dJ/dw_i                                          (1)

so one gradient scores every weight. Positive components (alpha > 0) serve the concept: zeroing the
largest erases it. Negative ones hold it back: zeroing those amplifies it. Effects add up to first
order only; `fidelity` measures how far that is true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .. import records
from .._progress import bar
from ..concepts import Concept
from ..edits.edit import Edit, make_edit
from ..edits.weights import editable
from ..families import family_of
from ..families.checks import PLAIN
from ..families.running import plain
from ..families.sites import kind_around
from ..painting.fit import checked_batch_size
from ..painting.picture import Sampling, checked_seeds
from . import objectives
from .attribution import Attribution

__all__ = ["attribute", "erase_in_rounds"]

AGAINST = ("empty", "neutral")
#: Sets of weights of a denoiser: the modules that hold them, and the kinds of sites those lie in.
WHERE: dict[str, tuple[Any, tuple[str, ...] | None]] = {
    "ff": (nn.Linear, ("feed-forward",)),
    "attention": (nn.Linear, ("self-attention", "cross-attention")),
    "cross-attention": (nn.Linear, ("cross-attention",)),
    "conv": (PLAIN[1:], None),
}


def attribute(
    pipe: Any,
    concept: Concept,
    *,
    where: str | Sequence[str] = "ff",
    layers: Iterable[int] | None = None,
    objective: str = "erase",
    against: str = "empty",
    preserve: Sequence[str] = (),
    measure: str = "epsilon",
    images: Tensor | None = None,
    seeds: Iterable[int] = (0,),
    steps: int = 25,
    guidance: float = 3.0,
    batch_size: int = 4,
) -> Attribution:
    """Score weights of the denoiser by what they do for `concept`: equation (1) above.

    where: "ff" (the matrices of the feed-forward layers, as in the paper), "attention",
    "cross-attention", "conv", or names of weights. layers: only in the transformer blocks of these
    text layers, such as those that `localize` found and the next ones.
    objective: "erase", how far the prompt moves the prediction along trajectories of the concept's
    prompts and `seeds`; or "amplify", how well the model restores noised `images`,
    [prompt, 3, H, W] in [0, 1], which show what the concept's prompts say. For a concept that the
    model rarely makes they must come from elsewhere; without any, the model's own pictures are
    taken. against: what the prompt is compared with, the "empty" prompt, as in the paper, or its
    "neutral" twin. preserve: prompts whose own J is subtracted, so that what serves them too is
    spared (for "erase"; against "neutral", each is compared with the twin of the prompt in its
    place). measure: "epsilon", as in the paper, "v_prediction" or "sample", see `objectives`.
    seeds: of the noise. guidance: of the trajectories, > 1.
    batch_size: rows (a prompt and a seed) of one backward pass.

    Cost per batch of rows: `steps` guided calls of the denoiser and `steps` of the conditional
    rows, with a backward pass each. Peak memory beside the model: the activations of one such pass,
    one gradient of the scored weights, and their float32 sum; of a trajectory only its T states are
    kept. What is returned, alpha and a copy of the scored weights, lies on the CPU. `pipe` is left
    as it was: weights, gradients and every `requires_grad`, also on an exception.
    Raises ValueError for a selection that matches nothing, what `generate` refuses, images that do
    not fit, and guidance or a scheduler that the objective is not made for.

        parts = loco.attribute(pipe, loco.shapeland.concept("object", "star"))
        with parts.erase(ratio=1e-3).applied(pipe): ...
    """
    for label, choice, choices in (
        ("objective", objective, objectives.OBJECTIVES),
        ("against", against, AGAINST),
        ("measure", measure, objectives.MEASURES),
    ):
        if choice not in choices:
            raise ValueError(f"{label}={choice!r}: choose from {', '.join(choices)}")
    seeds = checked_seeds(seeds)
    sampling = Sampling(steps, guidance).checked(family_of(pipe))
    steps = sampling.steps
    batch_size = checked_batch_size(family_of(pipe), batch_size, sampling).rows
    layers = None if layers is None else sorted(set(layers))
    weights = scored(pipe, where, layers)
    settings = {
        "objective": objective,
        "against": against,
        "measure": measure,
        "preserve": list(preserve),
        "family": family_of(pipe).name,
        "where": where if isinstance(where, str) else list(where),
        "text_layers": layers,
        "seeds": seeds,
        "steps": steps,
        "guidance": float(guidance),
        "images": images is not None,
        "dtype": str(next(iter(weights.values())).dtype),
        "scheduler": type(pipe.scheduler).__name__,
    }
    denoiser = plain(family_of(pipe).denoiser)
    rows = rows_of(concept, settings)
    _check_images(concept, images, objective, preserve)
    calls = 2 * steps * -(-len(rows) // batch_size)
    with torch.inference_mode(False), bar(calls, "attributing", "call") as progress:
        made = batches(pipe, rows, settings, images, batch_size, progress.update)
        each = (step for part in made for step in part)
        J, sums = objectives.gradients(denoiser, each, weights, progress.update)
    held = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    return Attribution(
        concept=concept,
        alpha={n: g.mul_(weights[n].detach().to(g.dtype)).cpu() for n, g in sums.items()},
        weights=held,
        J=J,
        layer_names=tuple(layer.name for layer in family_of(pipe).text_layers),
        provenance=records.provenance(pipe, **settings),
    )


def erase_in_rounds(
    pipe: Any,
    concept: Concept,
    ratio: float = 0.03,
    rounds: int = 2,
    *,
    quota: str = "matrix",
    **settings: Any,
) -> Edit:
    """Zero a few weights, attribute anew with these at zero, zero more: one Edit of all rounds.

    Equation (1) holds near the weights as they are. Far from them the next best weights are others
    than it says, so several small steps erase what a large one does not.
    ratio: share of the weights in each round. rounds: at least 1; with one it is
    `attribute(...).erase(ratio)`. quota: as in `Attribution.erase`. settings: of `attribute`, whose
    cost is paid in every round. `pipe` is left bit for bit as it was. Errors as theirs.

        gone = erase_in_rounds(pipe, concept, layers=[6, 7], against="neutral", steps=10)
        with gone.applied(pipe): ...
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds={rounds!r}: choose a whole number, at least 1")
    knocked: dict[str, Any] = {}  # Knockouts
    with ExitStack() as stack:
        for _ in range(rounds):
            edit = attribute(pipe, concept, **settings).erase(ratio, quota=quota)
            stack.enter_context(edit.applied(pipe))
            for name, change in edit.changes.items():
                knocked[name] = knocked[name].then(change) if name in knocked else change
    return make_edit(pipe, knocked, **edit.provenance.settings, rounds=rounds)


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
    return {name: editable(pipe, name).weight for name in dict.fromkeys(names)}


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


def _check_images(
    concept: Concept, images: Tensor | None, objective: str, preserve: Sequence[str]
) -> None:
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
