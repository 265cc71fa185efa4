"""What an evaluation found: tables with 95 % intervals, and a sheet of images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import records
from ..concepts import Concept
from ..judging.probes import ASPECTS, Probe
from ..statistics import paired_shares, t_interval, wilson

UNEDITED = "no edit"
SEEN, CLIP = "share seen", "CLIP-Score"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the probes found, on the CPU.

    edits: names, the first is "no edit". judged: whether a judge answered the probes that have an
    attribute. outcomes: [edit, probe, seed] float64, 1 where the judge saw what the probe asks and
    0 where not; or a CLIP-Score. images: [edit, group, 3, H, W] float32 in [0, 1], the first image
    of every group, in the order of `groups`.
    """

    concept: Concept
    edits: tuple[str, ...]
    probes: tuple[Probe, ...]
    judged: bool
    outcomes: Tensor
    images: Tensor
    provenance: records.Provenance

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of probes, in order."""
        return tuple(dict.fromkeys(probe.group for probe in self.probes))

    def to_frame(self) -> Any:
        """A pandas table, a row per edit and group.

        measure: "share seen", the share of images in which the judge saw what is asked for, or
        "CLIP-Score". should be: "gone" or "kept". value, low, high: its mean over prompts and 95 %
        interval. no edit: that of the unedited model. change, change low, change high: paired
        difference to it, prompt by prompt, and its interval. prompts, images: how many.
        """
        import pandas

        rows = []
        for edit, name in enumerate(self.edits):
            for group in self.groups:
                chosen = [i for i, probe in enumerate(self.probes) if probe.group == group]
                before, after = (_by_prompt(self, self.outcomes[e], chosen) for e in (0, edit))
                shares = self.probes[chosen[0]].asks(self.judged)
                low, high = _interval(after, shares)
                change = (after - before).mean().item() if edit else float("nan")
                ends = _change(after - before, shares) if edit else (float("nan"),) * 2
                rows.append(
                    {
                        "edit": name,
                        "group": group,
                        "measure": SEEN if shares else CLIP,
                        "should be": "kept" if self.probes[chosen[0]].wanted else "gone",
                        "value": after.mean().item(),
                        "low": low,
                        "high": high,
                        UNEDITED: before.mean().item(),
                        "change": change,
                        "change low": ends[0],
                        "change high": ends[1],
                        "prompts": len(after),
                        "images": len(after) * self.outcomes.shape[2],
                    }
                )
        return pandas.DataFrame(rows)

    def summary(self) -> Any:
        """A pandas table, a row per edit: efficacy, generality, specificity, each with its ends.

        By a judge: the share of images without what should be gone, and with what should be kept;
        higher is better. The row "no edit" tells how much of it takes no edit at all. Probes that
        a judge was not asked have a column of their own, "specificity CLIP-Score". Without a judge
        every column is a mean CLIP-Score, and a good edit is low in efficacy and generality.
        """
        import pandas

        wanted = torch.tensor([[float(probe.wanted)] for probe in self.probes])
        rows: dict[str, dict[str, float]] = {name: {} for name in self.edits}
        for aspect in ASPECTS:
            for shares in (self.judged, False) if self.judged else (False,):
                chosen = [
                    i
                    for i, probe in enumerate(self.probes)
                    if probe.aspect == aspect and probe.asks(self.judged) == shares
                ]
                column = aspect if shares == self.judged else f"{aspect} {CLIP}"
                for row, outcomes in zip(rows.values(), self.outcomes, strict=True):
                    right = 1 - (outcomes - wanted).abs() if shares else outcomes
                    if chosen:
                        values = _by_prompt(self, right, chosen)
                        low, high = _interval(values, shares)
                        ends = {f"{column} low": low, f"{column} high": high}
                        row |= {column: values.mean().item(), **ends}
        return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("edit")

    def save(self, folder: str | Path) -> None:
        """Write `evaluation.safetensors`, whole or not at all."""
        images = (self.images * 255).round().to(torch.uint8)
        records.save(replace(self, images=images), folder, "evaluation")

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """What `save` wrote, equal to what was saved; refuses a damaged file."""
        found = records.load(cls, folder, "evaluation", older=_of_two_files)
        return replace(found, images=found.images.float() / 255)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Evaluation) and records.same(self, other)


def _of_two_files(header: dict[str, Any], tensors: dict[str, Tensor]) -> Evaluation:
    """From a record of 0.3."""
    return Evaluation(
        concept=Concept(**header["concept"]),
        edits=tuple(header["edits"]),
        probes=tuple(Probe(**probe) for probe in header["probes"]),
        judged=header["judged"],
        provenance=records.Provenance(**header["provenance"]),
        **tensors,
    )


def _by_prompt(found: Evaluation, outcomes: Tensor, chosen: list[int]) -> Tensor:
    """The mean outcome of every prompt of the chosen probes, [prompt], of [probe, seed]."""
    rows: dict[str, list[int]] = {}
    for i in chosen:
        rows.setdefault(found.probes[i].prompt, []).append(i)
    return torch.stack([outcomes[row].mean() for row in rows.values()])


def _interval(values: Tensor, shares: bool) -> tuple[float, float]:
    # a mean of shares may overshoot 1 by a rounding
    return wilson(values.mean().clamp(0, 1).item(), len(values)) if shares else _student(values)


def _change(differences: Tensor, shares: bool) -> tuple[float, float]:
    return paired_shares(differences) if shares else _student(differences)


def _student(values: Tensor) -> tuple[float, float]:
    low, high = t_interval(values).tolist()
    return low, high
