"""What a causal trace found, and when an effect is large enough to call a site causal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import records
from ..concepts import Concept
from ..families import Site
from ..painting.images import Held, Images
from .sweep import Sweep

__all__ = ["CausalTrace", "threshold_from"]


@dataclass(frozen=True, eq=False)
class CausalTrace(Sweep):
    """Effects of restored sites: a sweep whose goal is the clean run, its reference the corrupted.

    items: the sites restored together, one group per effect. where: "denoiser" or "text_encoder".
    """

    items: tuple[tuple[Site, ...], ...]
    where: str

    @property
    def groups(self) -> tuple[tuple[Site, ...], ...]:
        """The sites restored together."""
        return self.items

    @property
    def sites(self) -> tuple[Site, ...]:
        """The site of each effect; of several restored together, the first."""
        return tuple(group[0] for group in self.items)

    @property
    def restored(self) -> Tensor:
        """Scores of the restored runs: [site, prompt, draw, seed] float64."""
        return self.scored

    @property
    def clean(self) -> Tensor:
        """Scores of the clean run: [prompt, seed] float64."""
        return self.goal[:, 0]

    @property
    def corrupted(self) -> Tensor:
        """Scores of the corrupted runs: [prompt, draw, seed] float64."""
        return self.reference

    @property
    def samples(self) -> Tensor:
        """Score restored minus score corrupted: [site, prompt, draw, seed] float64."""
        return self.paired

    @property
    def scores(self) -> Tensor:
        """AIE without the second term, the mean score of the restored images: [site] float64."""
        return self.scored.flatten(1).mean(1)

    @property
    def interval(self) -> Tensor:
        """`effects_interval`: [site, 2] float64 (low, high)."""
        return self.effects_interval

    @property
    def low(self) -> Tensor:
        """Lower ends of `interval`: [site]."""
        return self.interval[:, 0]

    @property
    def high(self) -> Tensor:
        """Upper ends of `interval`: [site]."""
        return self.interval[:, 1]

    @property
    def images(self) -> Images:
        """[2 + site, prompt, draw, seed, 3, H, W] in [0, 1], row 0 clean and row 1 corrupted, read
        when asked for. Raises ValueError if they were not kept."""
        return self.sheet

    def causal(self, threshold: float | None = None) -> tuple[Site, ...]:
        """The causal sites, in their own order: those whose effect is at least `threshold`, or by
        default those that the test finds, p <= 0.05 adjusted for all sites.

        Take the threshold from other prompts: `threshold_from`.
        """
        test = self.test
        keep = test.p <= test.level if threshold is None else self.effects >= threshold
        found = (
            site
            for group, is_causal in zip(self.items, keep.tolist(), strict=True)
            if is_causal
            for site in group
        )
        return tuple(dict.fromkeys(found))

    def to_frame(self) -> Any:
        """A pandas table, a row per effect: site, kind, token, effect, low, high, p (adjusted for
        all sites), score."""
        import pandas

        return pandas.DataFrame(
            {
                "site": [site.name for site in self.sites],
                "kind": [site.kind for site in self.sites],
                "token": [site.token for site in self.sites],
                "effect": self.effects.tolist(),
                "low": self.low.tolist(),
                "high": self.high.tolist(),
                "p": self.test.p.tolist(),
                "score": self.scores.tolist(),
            }
        )

    def save(self, folder: str | Path) -> None:
        """Write `causal_trace.safetensors`, whole or not at all."""
        records.save(self, folder, "causal_trace")

    @classmethod
    def load(cls, folder: str | Path) -> "CausalTrace":
        """What `save` wrote, equal to what was saved, or what 0.3 wrote; refuses a damaged
        folder."""
        return records.load(cls, folder, "causal_trace", older=_of_03)


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


def _of_03(header: dict[str, Any], tensors: dict[str, Tensor]) -> CausalTrace:
    """A causal trace as 0.3 wrote it, in two files."""
    images, corrupted = tensors.get("images"), tensors["corrupted"]
    return CausalTrace(
        concept=Concept(**header["concept"]),
        items=tuple(tuple(Site(**site) for site in group) for group in header["groups"]),
        scored=tensors["restored"],
        reference=corrupted,
        goal=tensors["clean"][:, None].expand_as(corrupted).contiguous(),
        sign=1,
        pixels=None if images is None else Held(images),
        cost=float("nan"),
        provenance=records.Provenance(**header["provenance"]),
        where={"unet": "denoiser"}.get(header["where"], header["where"]),
    )
