"""What a causal trace found, and when an effect is large enough to call a site causal."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import records
from ..concepts import Concept
from ..statistics import t_interval, units
from .sites import Site


@dataclass(frozen=True, eq=False)
class CausalTrace:
    """Effects of restored sites. Everything lives on the CPU.

    where: "unet" or "text_encoder". groups: the sites restored together, one group per effect.
    restored [site, prompt, draw, seed], clean [prompt, seed], corrupted [prompt, draw, seed]:
    scores of the three runs, float64. images: [2 + site, prompt, draw, seed, 3, H, W] float32 in
    [0, 1] on the 8-bit grid, row 0 clean and row 1 corrupted; None if they were not kept.
    """

    concept: Concept
    where: str
    groups: tuple[tuple[Site, ...], ...]
    restored: Tensor
    clean: Tensor
    corrupted: Tensor
    images: Tensor | None
    provenance: records.Provenance

    @property
    def sites(self) -> tuple[Site, ...]:
        """The site of each effect; of several restored together, the first."""
        return tuple(group[0] for group in self.groups)

    @property
    def samples(self) -> Tensor:
        """Score restored minus score corrupted: [site, prompt, draw, seed] float64."""
        return self.restored - self.corrupted

    @property
    def effects(self) -> Tensor:
        """AIE of each site, the mean of its samples: [site] float64."""
        return self.samples.flatten(1).mean(1)

    @property
    def scores(self) -> Tensor:
        """AIE without the second term, the mean score of the restored images: [site] float64."""
        return self.restored.flatten(1).mean(1)

    @property
    def interval(self) -> Tensor:
        """95 % interval (Student's t) of each effect over prompts (draws of the noise and seeds are
        averaged), of a single prompt over its seeds: [site, 2] float64 (low, high); NaN for a
        single picture."""
        return t_interval(units(self.samples.mean(2)))

    @property
    def low(self) -> Tensor:
        """Lower ends of `interval`: [site]."""
        return self.interval[:, 0]

    @property
    def high(self) -> Tensor:
        """Upper ends of `interval`: [site]."""
        return self.interval[:, 1]

    @property
    def gap(self) -> float:
        """What the noise took: mean score clean minus mean score corrupted."""
        return float(self.clean.mean() - self.corrupted.mean())

    def causal(self, threshold: float) -> tuple[Site, ...]:
        """The sites whose effect is at least `threshold`, in their own order.

        Take the threshold from other prompts: `threshold_from`.
        """
        keep = (self.effects >= threshold).tolist()
        found = (
            site
            for group, is_causal in zip(self.groups, keep, strict=True)
            if is_causal
            for site in group
        )
        return tuple(dict.fromkeys(found))

    def to_frame(self) -> Any:
        """A pandas table, a row per effect: site, kind, token, effect, low, high, score."""
        import pandas

        return pandas.DataFrame(
            {
                "site": [site.name for site in self.sites],
                "kind": [site.kind for site in self.sites],
                "token": [site.token for site in self.sites],
                "effect": self.effects.tolist(),
                "low": self.low.tolist(),
                "high": self.high.tolist(),
                "score": self.scores.tolist(),
            }
        )

    def save(self, folder: str | Path) -> None:
        """Write `causal_trace.json` and `causal_trace.safetensors`, whole or not at all."""
        header: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "groups":
                header["groups"] = [[dataclasses.asdict(site) for site in g] for g in value]
            elif field.name == "images" and value is not None:
                tensors["images"] = (value * 255).round().to(torch.uint8)
            elif isinstance(value, Tensor):
                tensors[field.name] = value
            elif value is not None:
                is_record = dataclasses.is_dataclass(value)
                header[field.name] = dataclasses.asdict(value) if is_record else value
        records.save_record(folder, "causal_trace", header, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> "CausalTrace":
        """What `save` wrote, equal to what was saved; refuses a damaged folder."""
        header, tensors = records.load_record(folder, "causal_trace")
        images = tensors.get("images")
        try:
            return cls(
                concept=Concept(**header["concept"]),
                where=header["where"],
                groups=tuple(tuple(Site(**site) for site in group) for group in header["groups"]),
                **{name: tensors[name] for name in ("restored", "clean", "corrupted")},
                images=None if images is None else images.float() / 255,
                provenance=records.Provenance(**header["provenance"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the causal trace in {folder} is damaged ({error!r}): make it again"
            ) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CausalTrace) and records.same(self, other)


def threshold_from(traces: Sequence[CausalTrace], fraction: float = 0.2) -> float:
    """The effect from which on a site is called causal, from traces of validation prompts.

        threshold = fraction * mean over traces of (score clean - score corrupted)

    A site passes if it alone brings back at least this share of what the noise took. Only the gap
    of the validation prompts is used, not their sites, so that the number of sites does not
    matter, nor whether few or most of them carry the concept. The paper chose its threshold on 10
    prompts per attribute; take prompts that the trace to be judged does not hold, the same noise
    and the same score.
    Raises ValueError without a trace, on a fraction outside (0, 1], and if the noise took nothing.

        threshold = tracing.threshold_from([validation])
    """
    traces = [traces] if isinstance(traces, CausalTrace) else list(traces)
    if not traces:
        raise ValueError("no validation trace is given: trace about 10 prompts per attribute")
    if isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction!r} is not above 0 and at most 1")
    gap = sum(trace.gap for trace in traces) / len(traces)
    if not gap > 0:
        raise ValueError(
            f"the noise took nothing (mean score clean - corrupted = {gap:.3g}), so there is "
            "nothing to restore: trace with more noise=, or check the score"
        )
    return fraction * gap
