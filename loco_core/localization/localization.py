"""What a localisation says: the layers, if there are any, and how sure that is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import records
from ..concepts import Concept
from ..families import Model
from ..judging.score import Score
from ..painting.images import Held, Images
from .sweep import Painting, Sweep

__all__ = ["Localization", "Scored", "made_by"]


class Scored(NamedTuple):
    """images: [..., prompt, seed, 3, H, W] in [0, 1], read when asked for. scores: [..., prompt,
    seed] float64."""

    images: Images
    scores: Tensor


@dataclass(frozen=True, eq=False)
class Localization(Sweep):
    """A sweep over groups of text layers.

    items: the layers of each group, such as a window. layer_names: of all text layers. tried:
    (window size, best mean score) of each size that was swept.
    """

    items: tuple[tuple[int, ...], ...]
    layer_names: tuple[str, ...]
    tried: tuple[tuple[int, float], ...]

    @property
    def window(self) -> int:
        """Layers in a group."""
        return len(self.items[0])

    @property
    def best(self) -> tuple[int, ...]:
        """The group with the largest effect, whatever the test says: LocoGen's argmin."""
        return self.items[self.test.best]

    @property
    def layers(self) -> tuple[int, ...]:
        """The located layers: `best`, if the test finds it; else none."""
        return self.best if self.test.verdict == "found" else ()

    @property
    def samples(self) -> Tensor:
        """Scores [window, prompt, seed] float64, draws averaged."""
        return self.scored.mean(2)

    @property
    def scores(self) -> Tensor:
        """Mean score of each window: [window] float64."""
        return self.scored.flatten(1).mean(1)

    @property
    def interval(self) -> Tensor:
        """95 % interval of each mean score as the test sees it, [window, 2] float64 (low, high):
        that of the paired difference to the baseline, put on the baseline's mean. NaN for a single
        picture."""
        ends = self.reference.mean() + self.sign * self.effects_interval
        return ends if self.sign > 0 else ends.flip(-1)

    @property
    def swept(self) -> Scored:
        """The pictures and scores of every window: [window, prompt, seed, ...]."""
        return Scored(self._of(slice(2, None)), self.samples)

    @property
    def images(self) -> Images:
        """[window, prompt, seed, 3, H, W] in [0, 1], read when asked for; [:] is all of it."""
        return self._of(slice(2, None))

    @property
    def baseline(self) -> Scored:
        """Nothing replaced: [prompt, seed, ...]."""
        return Scored(self._of(0), self.reference.mean(1))

    @property
    def neutral(self) -> Scored:
        """Every layer reads the neutral text: [prompt, seed, ...]."""
        return Scored(self._of(1), self.goal.mean(1))

    def to_frame(self) -> Any:
        """A pandas table, a row per window: layers, module of the first, score, low, high, its
        effect (the drop; for a fact the rise), p adjusted for all windows, and whether it is the
        one that was found."""
        import pandas

        test = self.test
        spans = ["-".join(map(str, sorted({item[0], item[-1]}))) for item in self.items]
        return pandas.DataFrame(
            {
                "window": range(len(self.items)),
                "layers": spans,
                "first module": [self.layer_names[item[0]] for item in self.items],
                "score": self.scores.tolist(),
                "low": self.interval[:, 0].tolist(),
                "high": self.interval[:, 1].tolist(),
                "effect": test.effects.tolist(),
                "p": test.p.tolist(),
                "found": [item == self.layers for item in self.items],
            }
        )

    def save(self, folder: str | Path) -> None:
        """Write `localization.safetensors`, pictures included, whole or not at all."""
        records.save(self, folder, "localization")

    @classmethod
    def load(cls, folder: str | Path) -> "Localization":
        """What `save` wrote, equal to what was saved, or what 0.3 wrote; its pictures are read when
        asked for. Refuses a damaged folder."""
        return records.load(cls, folder, "localization", older=_of_03)

    def _of(self, rows: Any) -> Images:
        return self.sheet.rows((rows, slice(None), 0))


def made_by(model: Model, painting: Painting, score: Score, **settings: Any) -> records.Provenance:
    """The provenance of a sweep."""
    sampling = painting.sampling
    return records.provenance(
        model.pipe, **settings, steps=sampling.steps, guidance=sampling.guidance,
        size=sampling.size, score=score.to_json(), scheduler=type(model.pipe.scheduler).__name__,
        dtype=str(model.dtype),
    )  # fmt: skip


def _of_03(header: dict[str, Any], tensors: dict[str, Tensor]) -> Localization:
    """A localization as 0.3 wrote it, in two files."""
    concept = Concept(**header["concept"])
    parts = ("baseline", "neutral", "swept")
    images = [tensors[f"{part}.images"] for part in parts]
    scores = [tensors[f"{part}.scores"] for part in parts]
    pixels = torch.cat([images[0][None], images[1][None], images[2]])[:, :, None]
    width, count = header["window"], len(scores[2])
    return Localization(
        concept=concept,
        items=tuple(tuple(range(j, j + width)) for j in range(count)),
        scored=scores[2][:, :, None],
        reference=scores[0][:, None],
        goal=scores[1][:, None],
        sign=1 if concept.kind == "fact" else -1,
        pixels=Held(pixels),
        cost=float("nan"),
        provenance=records.Provenance(**header["provenance"]),
        layer_names=tuple(header["layer_names"]),
        tried=tuple((size, best) for size, best in header["tried"]),
    )
