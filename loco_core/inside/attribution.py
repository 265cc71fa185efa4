"""What single weights do for a concept, and the edits that follow from it (arXiv 2412.02542).

alpha_i = w_i dJ/dw_i is, to first order, how much J falls when w_i is zeroed (`cad` computes it).
Zeroing the most positive erases the concept, zeroing the most negative amplifies it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import records
from ..concepts import Concept
from ..edits.edit import Edit, joint
from ..edits.knockout import Knockout
from ..edits.weights import fingerprint
from ..families import family_of
from ..families.checks import whole_number
from ..painting.fit import checked_batch_size
from ..painting.picture import Sampling, checked_seeds
from . import cad, objectives
from .kept import BEST, Kept, Scores
from .orders import first

__all__ = ["Attribution", "attribute"]


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
    keep: float | str = BEST,
) -> Attribution:
    """Score weights of the denoiser by what they do for `concept`: alpha = w dJ/dw (see `cad`).

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
    batch_size: rows (a prompt and a seed) of one backward pass. keep: the share of each sign whose
    alphas are kept, the largest of every matrix and row, as `erase` may be asked for; "all" for
    `fidelity`, the gradient control, and quota="all" where one matrix holds most. Sums are of all.

    Cost per batch of rows: `steps` guided calls of the denoiser and `steps` of the conditional
    rows, with a backward pass each. Peak memory beside the model: the activations of one such pass,
    the gradient of one matrix, and the float32 sums of all; of a trajectory only its T states are
    kept. What is returned, alpha, lies on the CPU. `pipe` is left
    as it was: weights, gradients and every `requires_grad`, also on an exception.
    Raises ValueError for a selection that matches nothing, what `generate` refuses, images that do
    not fit, guidance or a scheduler that the objective is not made for, and attributions that are
    not finite.

        parts = loco.attribute(pipe, loco.shapeland.concept("object", "star"))
        with parts.erase(ratio=1e-3).applied(pipe): ...
    """
    for label, choice, choices in (
        ("objective", objective, objectives.OBJECTIVES),
        ("against", against, cad.AGAINST),
        ("measure", measure, objectives.MEASURES),
    ):
        if choice not in choices:
            raise ValueError(f"{label}={choice!r}: choose from {', '.join(choices)}")
    share = 1.0 if keep == "all" else keep
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f'keep={keep!r}: choose "all", or a share of the weights in (0, 1]')
    seeds = checked_seeds(seeds)
    sampling = Sampling(steps, guidance).checked(family_of(pipe))
    steps = sampling.steps
    batch_size = checked_batch_size(family_of(pipe), batch_size, sampling).rows
    layers = None if layers is None else sorted(set(layers))
    weights = cad.scored(pipe, where, layers)
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
    cad.check_images(concept, images, objective, preserve)
    J, kept = cad.alphas(pipe, concept, settings, images, batch_size, share)
    return Attribution(
        concept=concept,
        kept=kept,
        marks={name: fingerprint(weight) for name, weight in weights.items()},
        J=J,
        layer_names=tuple(layer.name for layer in family_of(pipe).text_layers),
        provenance=records.provenance(pipe, **settings),
    )


@dataclass(frozen=True, eq=False)
class Attribution:
    """What every scored weight does for a concept. Everything lives on the CPU.

    kept: of alpha, w dJ/dw, at least float32: positive where a weight serves the concept, negative
    where it holds it back (see `Kept`). marks: weight name -> fingerprint of the
    weight that was scored. J: the objective, of the model as it is. layer_names: of the text
    layers, in order.
    """

    concept: Concept
    kept: Kept
    marks: Mapping[str, str]
    J: float
    layer_names: tuple[str, ...]
    provenance: records.Provenance

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attribution) and records.same(self, other)

    def __len__(self) -> int:
        return sum(map(math.prod, self.kept.shapes.values()))

    @property
    def alpha(self) -> Mapping[str, Tensor]:
        """Weight name -> alpha in the shape of the weight; 0 where it was not kept."""
        return Scores(self.kept)

    def __repr__(self) -> str:
        made = self.provenance
        return (
            f"<Attribution: {made.settings['objective']} {self.concept.name}, {len(self):,} "
            f"entries of {len(self.alpha)} weights of {made.model}>"
        )

    def erase(
        self,
        ratio: float = 1e-3,
        *,
        by: str = "attribution",
        quota: str = "row",
        seed: int = 0,
        rounds: int = 1,
        pipe: Any = None,
    ) -> Edit:
        """Zero the most positive weights: an Edit that takes the concept away.

        ratio: share of the weights to zero, in (0, 1], rounded up within the quota: "row" takes the
        same number from every row of a matrix (an output channel of a convolution) and at least
        one, "matrix" the same share of every matrix, "all" the best of all. Only weights with
        alpha > 0 are taken; ties by index.
        by: controls take exactly as many by chance ("random", with `seed`), by |w| ("weight") or by
        |dJ/dw| ("gradient"); the last two ask `pipe` for the weights.
        rounds: knock out `ratio`, attribute again with that at zero, and so on; all that fell in
        any round are zeroed. Attributions are first-order effects: what remains does more than it
        says, so several small steps erase what a large one does not. Each round after the first
        costs what `attribute` did on `pipe`, which is left bit for bit as it was.
        Raises ValueError for anything else, and for a pipeline with other weights.

            with parts.erase(ratio=1e-3).applied(pipe): ...
            gone = parts.erase(0.03, quota="matrix", rounds=2, pipe=pipe)
        """
        count = whole_number(rounds, 1, 1000)
        if count is None:
            raise ValueError(f"rounds={rounds!r}: choose a whole number, at least 1")
        made = self._zeroed("erase", 1.0, ratio, by, quota, seed, pipe)
        return made if count == 1 else self._again(made, ratio, by, quota, count, pipe)

    def amplify(
        self,
        ratio: float = 1e-3,
        *,
        by: str = "attribution",
        quota: str = "row",
        seed: int = 0,
        pipe: Any = None,
    ) -> Edit:
        """Zero the most negative weights: an Edit that lets the concept through.

        Best after attribute(..., objective="amplify", images=...). Parameters as `erase`.
        """
        return self._zeroed("amplify", -1.0, ratio, by, quota, seed, pipe)

    def to_frame(self) -> Any:
        """A pandas table, a row per weight: the text layer that it follows in its transformer block
        (-1: none), entries, sums of positive and negative attributions and their net."""
        import pandas

        table = []
        for name, (up, down) in self.kept.sums.items():
            size = math.prod(self.kept.shapes[name])
            table.append([name, self._layer(name), size, up, down, up + down])
        columns = ["weight", "layer", "entries", "positive", "negative", "net"]
        frame = pandas.DataFrame(table, columns=columns)
        return frame.sort_values("layer", kind="stable").set_index("weight")

    def save(self, folder: str | Path) -> None:
        """Write `attribution.safetensors`, whole or not at all.

        Two numbers for each alpha that was kept, one with keep="all".
        """
        records.save(self, folder, "attribution")

    @classmethod
    def load(cls, folder: str | Path) -> Attribution:
        """What `save` wrote, equal to what was saved; refuses a damaged file."""
        return records.load(cls, folder, "attribution", older=_of_two_files)

    def whole(self, what: str) -> None:
        """Raise ValueError unless all alphas are kept, which `what` needs."""
        if self.kept.share < 1:
            raise ValueError(f'{what} needs every alpha: attribute(..., keep="all")')

    def _zeroed(
        self, method: str, sign: float, ratio: float, by: str, quota: str, seed: int, pipe: Any
    ) -> Edit:
        found = first(self, sign, ratio, by=by, quota=quota, seed=seed, pipe=pipe)
        if not found:
            raise ValueError(f"no weight has the sign that {method} zeroes: every alpha is 0")
        shapes = self.kept.shapes
        settings = {"method": f"cad {method}", "ratio": float(ratio), "by": by, "quota": quota}
        settings |= {"seed": seed} if by == "random" else {}
        return self._edit({n: Knockout(shapes[n], at) for n, at in found.items()}, settings)

    def _edit(self, changes: Mapping[str, Any], settings: Mapping[str, Any]) -> Edit:
        told = self.provenance.settings | {"concepts": [asdict(self.concept)], **settings}
        originals = {name: self.marks[name] for name in changes}
        made = dataclasses.replace(self.provenance, fingerprint=joint(originals), settings=told)
        return Edit(changes, originals, made)

    def _again(
        self, first: Edit, ratio: float, by: str, quota: str, rounds: int, pipe: Any
    ) -> Edit:
        """The edit of `first` and of the rounds after it."""
        made = self.provenance.settings
        if pipe is None or by != "attribution" or made["images"]:
            raise ValueError(
                f"rounds={rounds} attributes again: pass pipe=pipe, leave by= out, and use parts "
                "of objective='erase'"
            )
        asked = {k: made[k] for k in ("objective", "against", "measure", "preserve", "where",
                                      "seeds", "steps", "guidance")}  # fmt: skip
        knocked: dict[str, Any] = dict(first.changes)  # Knockouts
        with ExitStack() as stack:
            stack.enter_context(first.applied(pipe))
            for _ in range(rounds - 1):
                parts = attribute(
                    pipe, self.concept, layers=made["text_layers"], keep=self.kept.share, **asked
                )
                edit = parts.erase(ratio, quota=quota)
                stack.enter_context(edit.applied(pipe))
                for name, change in edit.changes.items():
                    knocked[name] = knocked[name].then(change) if name in knocked else change
        return self._edit(knocked, {**first.provenance.settings, "rounds": rounds})

    def _layer(self, name: str) -> int:
        """The text layer in the transformer block of a weight, or -1."""
        path = name.partition(".")[2]
        blocks = [layer.rpartition(".")[0] + "." for layer in self.layer_names]
        return next((i for i, block in enumerate(blocks) if path.startswith(block)), -1)


def _of_two_files(header: dict[str, Any], tensors: dict[str, Tensor]) -> Attribution:
    """From a record of 0.3."""
    return Attribution(
        concept=Concept(**header["concept"]),
        kept=Kept.of({name: tensors[f"alpha.{name}"] for name in header["names"]}, 1.0),
        marks={name: fingerprint(tensors[f"weight.{name}"]) for name in header["names"]},
        J=header["J"],
        layer_names=tuple(header["layer_names"]),
        provenance=records.Provenance(**header["provenance"]),
    )
