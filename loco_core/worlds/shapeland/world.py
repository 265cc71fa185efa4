"""Shapeland as one model knows it: the world, and what was planted in that model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...concepts import Concept
from ...judging.judge import Judge
from ...judging.probes import Probe
from .canvas import SIZE
from .concepts import concept, value_of
from .judge import judge, judge_fingerprint
from .planting import POOLED, Place
from .probes import probes
from .vocabulary import ATTRIBUTES, caption

__all__ = ["Shapeland"]


@dataclass(frozen=True)
class Shapeland:
    """A `World`. model: as its truth file calls it. truth: attribute -> the text layers it was
    planted in; empty for a model that nobody planted. pooled_truth: the attributes that were
    planted in the pooled path, in no text layer."""

    model: str
    truth: Mapping[str, Sequence[int]]
    pooled_truth: tuple[str, ...] = ()

    name: ClassVar[str] = "Shapeland"
    attributes: ClassVar[Mapping[str, tuple[str, ...]]] = ATTRIBUTES
    caption: ClassVar[Callable[..., str]] = staticmethod(caption)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Shapeland":
        """The world of the model whose truth file holds `record`."""
        plant: Mapping[str, Sequence[Place]] = record["planted"]
        layers = {
            k: [int(p) for p in places] for k, places in plant.items() if POOLED not in places
        }
        pooled = tuple(k for k, places in plant.items() if POOLED in places)
        return cls(str(record["model"]), layers, pooled)

    @property
    def judge(self) -> Judge:
        """The judge of Shapeland's pictures, with the fingerprint of its weights."""
        return Judge("loco.shapeland.judge", judge_fingerprint(), judge, (SIZE, SIZE))

    def concept(self, kind: str, name: str, prompts: int = 4) -> Concept:
        """`loco.shapeland.concept`; a fact may be called as its concept is, "the emblem of ..."."""
        return concept(kind, value_of(kind, name), prompts)

    def probes(self, kind: str, name: str, *, exclude: Iterable[str] = ()) -> tuple[Probe, ...]:
        """`loco.shapeland.probes`; a fact may be called as its concept is, "the emblem of ..."."""
        return probes(kind, value_of(kind, name), exclude=exclude)
