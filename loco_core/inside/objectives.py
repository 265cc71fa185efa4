"""How strongly a denoiser shows a concept, as one number J, and its gradient (arXiv 2412.02542).

    erase      J =   E_t || sg[eps(x_t, c')] - eps(x_t, c) ||^2    x_t: a guided trajectory
    amplify    J = - E_t || eps - eps(x_t, c) ||^2                 x_t: noised images of the concept

Both grow with the concept, so whatever lowers J removes it. c' is the empty prompt, as in the
paper, or a neutral twin of c: then what both share is not asked to go. E_t is the mean over the
time steps of the sampler and over rows (a prompt and a seed each); sg: its argument is constant.

A trajectory is sampled once, by the pipeline itself, away from c' and towards c, and every call of
its denoiser is recorded with its own time step: T calls. The half of a recorded call that reads c'
*is* the constant, so each time step takes one more call, of the rows with c alone: 2 T calls, where
sampling anew up to each time step takes T (T + 1) / 2 of them, and then one more each.

From x_t = a x_0 + s eps a model predicts eps, x_0 or v = a eps - s x_0. At one x_t, differences of
the three are in the ratio a : s : 1, so J can be measured in any of them, whatever the model
predicts. In eps, as in the paper, the late steps weigh most, which paint details; in x_0 the early
ones, which decide what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families import TextStates, family_of
from ..families.running import plain
from ..interventions.recording import recording

__all__ = ["MEASURES", "OBJECTIVES", "Row", "Step", "gradients", "only", "recorded", "value"]

OBJECTIVES = ("erase", "amplify")
MEASURES = ("epsilon", "v_prediction", "sample")  # as a scheduler calls what a model predicts


@dataclass(frozen=True)
class Row:
    """A trajectory of `prompt` c away from `other` c', and its weight in the mean over rows."""

    prompt: str
    other: str
    seed: int
    weight: float


@dataclass(frozen=True, eq=False)
class Step:
    """One call of the denoiser on the conditional rows, and what its output is held against.

    args, kwargs: of the call. target: [row, ...], what the output is compared with. price: [row],
    what a squared difference counts in J.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor
    price: Tensor

    def J(self, denoiser: nn.Module) -> Tensor:
        """sum_row price ||output - target||^2, at least float32."""
        output = denoiser(*self.args, **self.kwargs)[0]
        wide = torch.promote_types(output.dtype, torch.float32)
        squares = (output.to(wide) - self.target.to(wide)).square().flatten(1).sum(1)
        return squares @ self.price.to(squares)


def recorded(
    pipe: Any,
    rows: Sequence[Row],
    *,
    objective: str,
    measure: str,
    steps: int,
    guidance: float,
    images: Tensor | None = None,
    tick: Callable[[], Any] = lambda: None,
) -> list[Step]:
    """The T calls whose `Step.J` add up to J of `rows`, with T calls of the denoiser.

    images: [row, 3, H, W] in [0, 1], of the concept, for "amplify"; None: those that end the
    trajectory. tick: called after every call. Raises ValueError for a pipeline without guidance, a
    compiled denoiser (which cannot be recorded), and a scheduler that is no diffusion of the known
    kinds.
    """
    model = family_of(pipe)
    guided = 2 * len(rows)
    places = model.conditional_rows(len(rows), guidance)
    if places[0] == 0:
        raise ValueError(
            f"guidance {guidance!r} does not run the denoiser without the prompt, or this "
            "pipeline never does (it is distilled): pass guidance > 1; the paper uses 3"
        )
    kind = pipe.scheduler.config.get("prediction_type")
    if not hasattr(pipe.scheduler, "alphas_cumprod") or kind not in MEASURES:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} predicts {kind!r}: this objective knows diffusions "
            f"that predict {', '.join(MEASURES)}; set pipe.scheduler to one, such as DDIM"
        )
    texts = model.encode([row.prompt for row in rows])
    held = model.encode([row.other for row in rows])
    nothing = [i for i, row in enumerate(rows) if not row.other]
    if nothing:  # each by itself: J may not depend on which rows are in one batch
        none = model.unprompted(held[nothing])
        parts = [none[[nothing.index(i)]] if i in nothing else held[[i]] for i in range(len(rows))]
        held = TextStates.joined(parts)
    generators = [torch.Generator("cpu").manual_seed(row.seed) for row in rows]

    def keep(args: tuple, kwargs: Mapping[str, Any], output: Any) -> tuple:
        tick()
        return _rows(args, places, guided), _rows(kwargs, places, guided), output[0]

    with recording(plain(model.denoiser), keep) as calls:
        final = model.latents(texts, held, generators, steps=steps, guidance=guidance)
    if not calls:
        raise ValueError(
            "no call of the denoiser was recorded: torch.compile bypasses it; load the pipeline "
            "again and do not compile it"
        )
    if objective == "amplify":
        clean = final if images is None else model.encoded(images)
        shape = clean.shape[1:]
        fresh = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(clean)
    rest = [row for row in range(guided) if row not in places.tolist()]
    weights = torch.tensor([row.weight for row in rows], dtype=torch.float64) / len(calls)
    made = []
    for args, kwargs, output in calls:
        time = args[1] if len(args) > 1 else kwargs["timestep"]
        signal = pipe.scheduler.alphas_cumprod[round(float(time))].item()
        a, s = math.sqrt(signal), math.sqrt(1 - signal)
        size = {"epsilon": a, "v_prediction": 1.0, "sample": s}
        price = weights * (1.0 if kind == measure else size[measure] / size[kind]) ** 2
        if objective == "erase":
            made.append(Step(args, kwargs, output[rest].detach(), price))
        else:
            told = {"epsilon": fresh, "v_prediction": a * fresh - s * clean, "sample": clean}
            noised = a * clean + s * fresh
            made.append(Step((noised, *args[1:]), kwargs, told[kind], -price))
    return made


def value(denoiser: nn.Module, steps: Sequence[Step]) -> float:
    """J of recorded calls, under the weights that `denoiser` has now."""
    with torch.no_grad():
        return sum(step.J(denoiser).item() for step in steps)


def gradients(
    denoiser: nn.Module,
    steps: Iterable[Step],
    weights: Mapping[str, nn.Parameter],
    tick: Callable[[], Any] = lambda: None,
) -> tuple[float, dict[str, Tensor]]:
    """(J, weight name -> dJ/dw), with one backward pass per step; at least float32.

    steps: recorded calls, which may be recorded while it runs, a batch of rows after the other.
    Only `weights` hold gradients while it runs; `requires_grad` and `.grad` of every parameter stay
    as they were, also after an exception.
    """
    total, unit = 0.0, 1.0
    sums = {
        name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
        for name, w in weights.items()
    }

    def consumes(held: Tensor) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            grad: Any = weight.grad
            weight.grad = None  # so that no two matrices have theirs at once
            held.add_(grad.to(held), alpha=unit)

        return hook

    with only(denoiser, weights.values()), torch.enable_grad(), ExitStack() as hooks:
        for name, weight in weights.items():
            handle = weight.register_post_accumulate_grad_hook(consumes(sums[name]))
            hooks.callback(handle.remove)
        for step in steps:
            J = step.J(denoiser)
            # half precision would round the gradients of a small share of a mean to zero
            unit = step.price.abs().max().item() or 1.0
            if J.requires_grad:
                (J / unit).backward()
            total += J.item()
            tick()
    return total, sums


def _rows(value: Any, places: Tensor, guided: int) -> Any:
    """The conditional rows of every tensor in the arguments of a guided call."""
    if isinstance(value, Tensor):
        batched = value.ndim and len(value) == guided
        return value[places.to(value.device)] if batched else value
    if isinstance(value, Mapping):
        return {name: _rows(part, places, guided) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_rows(part, places, guided) for part in value)
    return value


@contextmanager
def only(module: nn.Module, chosen: Any) -> Iterator[None]:
    """Only the chosen parameters of a module hold gradients, for the length of a `with` block."""
    before = {p: (p.requires_grad, p.grad) for p in module.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, (flag, grad) in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = grad
