"""What single weights do for a concept, and the edits that follow from it (arXiv 2412.02542).

alpha_i = w_i dJ/dw_i is, to first order, how much J falls when w_i is zeroed (`cad` computes it).
Zeroing the most positive erases the concept, zeroing the most negative amplifies it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import records
from ..concepts import Concept
from ..edits.edit import Edit, joint
from ..edits.knockout import Knockout
from ..edits.weights import fingerprint

__all__ = ["Attribution"]

BY = ("attribution", "random", "weight", "gradient")
QUOTAS = ("row", "matrix", "all")


@dataclass(frozen=True, eq=False)
class Attribution:
    """What every scored weight does for a concept. Everything lives on the CPU.

    alpha: weight name -> w dJ/dw, at least float32, in the shape of the weight: positive where it
    serves the concept, negative where it holds it back. weights: the weights themselves. J: the
    objective, of the model as it is. layer_names: of the text layers, in order.
    """

    concept: Concept
    alpha: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    J: float
    layer_names: tuple[str, ...]
    provenance: records.Provenance

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attribution) and records.same(self, other)

    def __len__(self) -> int:
        return sum(scores.numel() for scores in self.alpha.values())

    def __repr__(self) -> str:
        made = self.provenance
        return (
            f"<Attribution: {made.settings['objective']} {self.concept.name}, {len(self):,} "
            f"entries of {len(self.alpha)} weights of {made.model}>"
        )

    def erase(
        self, ratio: float = 1e-3, *, by: str = "attribution", quota: str = "row", seed: int = 0
    ) -> Edit:
        """Zero the most positive weights: an Edit that takes the concept away.

        ratio: share of the weights to zero, in (0, 1], rounded up within the quota: "row" takes the
        same number from every row of a matrix (an output channel of a convolution) and at least
        one, "matrix" the same share of every matrix, "all" the best of all. Only weights with
        alpha > 0 are taken.
        by: controls take as many by chance ("random", with `seed`), by |w| ("weight") or by
        |dJ/dw| ("gradient"). Raises ValueError for anything else.

            with parts.erase(ratio=1e-3).applied(pipe): ...
        """
        return self._zeroed("erase", 1.0, ratio, by, quota, seed)

    def amplify(
        self, ratio: float = 1e-3, *, by: str = "attribution", quota: str = "row", seed: int = 0
    ) -> Edit:
        """Zero the most negative weights: an Edit that lets the concept through.

        Best after attribute(..., objective="amplify", images=...). Parameters as `erase`.
        """
        return self._zeroed("amplify", -1.0, ratio, by, quota, seed)

    def to_frame(self) -> Any:
        """A pandas table, a row per weight: the text layer that it follows in its transformer block
        (-1: none), entries, sums of positive and negative attributions and their net."""
        import pandas

        table = []
        for name, scores in self.alpha.items():
            wide = scores.double()
            up, down = wide.clamp_min(0).sum().item(), wide.clamp_max(0).sum().item()
            entries = [name, self._layer(name), scores.numel(), up, down, up + down]
            table.append(entries)
        columns = ["weight", "layer", "entries", "positive", "negative", "net"]
        frame = pandas.DataFrame(table, columns=columns)
        return frame.sort_values("layer", kind="stable").set_index("weight")

    def save(self, folder: str | Path) -> None:
        """Write `attribution.safetensors`, whole or not at all.

        Two numbers an entry: `Edit.save` of what `erase` makes is a thousandth of it.
        """
        records.save(self, folder, "attribution")

    @classmethod
    def load(cls, folder: str | Path) -> Attribution:
        """What `save` wrote, equal to what was saved; refuses a damaged file."""
        return records.load(cls, folder, "attribution", older=_of_two_files)

    def _zeroed(
        self, method: str, sign: float, ratio: float, by: str, quota: str, seed: int
    ) -> Edit:
        for label, choice, choices in (("by", by, BY), ("quota", quota, QUOTAS)):
            if choice not in choices:
                raise ValueError(f"{label}={choice!r}: choose from {', '.join(choices)}")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ValueError(
                f"ratio {ratio!r} is not in (0, 1]: it is a share of the weights; the paper's "
                "is 0.001"
            )
        found = _top(self._ranked(sign, by, seed), ratio, quota)
        if not found:
            raise ValueError(f"no weight has the sign that {method} zeroes: every alpha is 0")
        shapes = {name: tuple(scores.shape) for name, scores in self.alpha.items()}
        changes = {name: Knockout(shapes[name], indices) for name, indices in found.items()}
        settings = self.provenance.settings | {
            "method": f"cad {method}",
            "concepts": [asdict(self.concept)],
            "ratio": float(ratio),
            "by": by,
            "quota": quota,
        }
        if by == "random":
            settings |= {"seed": seed}
        originals = {name: self._marks[name] for name in changes}
        made = dataclasses.replace(self.provenance, fingerprint=joint(originals), settings=settings)
        return Edit(changes, originals, made)

    @cached_property
    def _marks(self) -> dict[str, str]:
        return {name: fingerprint(weight) for name, weight in self.weights.items()}

    def _ranked(self, sign: float, by: str, seed: int) -> dict[str, Tensor]:
        """Weight name -> what its entries are ranked by; -inf: never taken."""
        if by == "attribution":
            signed = {name: sign * scores for name, scores in self.alpha.items()}
            return {name: torch.where(x > 0, x, -math.inf) for name, x in signed.items()}
        if by == "random":
            generator = torch.Generator().manual_seed(seed)
            return {n: torch.rand(x.shape, generator=generator) for n, x in self.alpha.items()}
        sizes = {name: weight.float().abs() for name, weight in self.weights.items()}
        if by == "weight":
            return sizes
        return {n: torch.nan_to_num(x.abs() / sizes[n], nan=0) for n, x in self.alpha.items()}

    def _layer(self, name: str) -> int:
        """The text layer in the transformer block of a weight, or -1."""
        path = name.partition(".")[2]
        blocks = [layer.rpartition(".")[0] + "." for layer in self.layer_names]
        return next((i for i, block in enumerate(blocks) if path.startswith(block)), -1)


def _of_two_files(header: dict[str, Any], tensors: dict[str, Tensor]) -> Attribution:
    """From a record of 0.3."""
    return Attribution(
        concept=Concept(**header["concept"]),
        alpha={name: tensors[f"alpha.{name}"] for name in header["names"]},
        weights={name: tensors[f"weight.{name}"] for name in header["names"]},
        J=header["J"],
        layer_names=tuple(header["layer_names"]),
        provenance=records.Provenance(**header["provenance"]),
    )


def _top(ranked: Mapping[str, Tensor], ratio: float, quota: str) -> dict[str, Tensor]:
    """Weight name -> sorted flat indices of the best, by quota; names without any are left out."""
    if quota == "all":
        flat = torch.cat([x.flatten() for x in ranked.values()])
        (best,) = _top({"all": flat}, ratio, "matrix").values() or [flat.new_empty(0)]
        least = flat[best].min() if len(best) else math.inf
        found = {name: (x >= least).flatten().nonzero()[:, 0] for name, x in ranked.items()}
    else:
        found = {}
        for name, x in ranked.items():
            rows = x.flatten(1) if quota == "row" and x.ndim > 1 else x.flatten()[None]
            width = rows.shape[1]
            # rounded up: rounded down, a quota of 0.001 takes nothing from a row of 640
            values, columns = rows.topk(math.ceil(ratio * width - 1e-9), dim=1)
            starts = width * torch.arange(len(rows))[:, None]
            found[name] = (columns + starts)[values > -math.inf].sort().values
    return {name: indices for name, indices in found.items() if len(indices)}
