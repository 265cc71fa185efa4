"""A picture as a value: everything that says what is painted, and how it is sampled.

A localiser lists pictures and folds their scores; `paint` paints them. A picture is JSON and can be
hashed, so it can be kept under a key, shared between methods and handed to another machine.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from ..families import Model

__all__ = ["Noise", "Picture", "Sampling", "checked_seeds"]


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the word embeddings of a prompt's tokens (arXiv 2310.13730, sec. 3).

    first, last: the tokens, both inclusive. stds: its standard deviation in each text encoder.
    seed, draw: the noise is draw number `draw` of a CPU generator with this seed, and so does not
    depend on how many draws are made.
    """

    first: int
    last: int
    stds: tuple[float, ...]
    seed: int
    draw: int = 0


@dataclass(frozen=True)
class Picture:
    """One picture. Hashable, and JSON by `to_json`.

    prompt: what is read wherever nothing else is said. seed: of its start noise. reads: (layer,
    prompt) of each text layer that reads another prompt (LocoGen, arXiv 2405.01008). pooled: the
    prompt whose pooled embedding it gets, by default its own. noise: on the words of `prompt`.
    restored: labels of the sites that have the activation of the clean run, the same picture
    without noise. calls: the calls of the denoiser, from 0, at which its sites are restored; None:
    all of them.

        Picture("a star by Mira Holt", seed=3, reads=((8, "a star"), (9, "a star")))
    """

    prompt: str
    seed: int = 0
    reads: tuple[tuple[int, str], ...] = ()
    pooled: str | None = None
    noise: Noise | None = None
    restored: tuple[str, ...] = ()
    calls: tuple[int, ...] | None = None

    @property
    def clean(self) -> "Picture":
        """The picture whose activations the restored sites have."""
        return replace(self, noise=None, restored=(), calls=None)

    def to_json(self) -> dict[str, Any]:
        """The fields that are not as by default."""
        return _said(self)


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled, all alike.

    steps: of the scheduler. guidance: the scale of classifier-free guidance; 1 or less is without.
    negative: the negative prompt; None is the pipeline's own default. eta: of DDIM. size: (height,
    width) in pixels; None is that of the pipeline's config.

        Sampling(steps=8, size=(512, 768))
    """

    steps: int = 25
    guidance: float = 7.5
    negative: str | None = None
    eta: float = 0.0
    size: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that are not as by default."""
        return _said(self)

    def checked(self, model: Model) -> "Sampling":
        """These settings in plain numbers; ValueError for what `model` cannot sample."""
        most = model.pipe.scheduler.config.num_train_timesteps
        steps, size = self.steps, self.size
        if isinstance(steps, bool) or not isinstance(steps, Integral) or not 1 <= steps <= most:
            raise ValueError(f"steps {steps!r} is not a whole number from 1 to {most}")
        for name, least in (("guidance", "; 7.5 is usual"), ("eta", "")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
                raise ValueError(f"{name} {value!r} is not a number from 0 on{least}")
        if not isinstance(self.negative, str | None):
            raise ValueError(f"negative prompt {self.negative!r} is no string: pass one, or None")
        return Sampling(
            int(steps), float(self.guidance), self.negative, float(self.eta),
            None if size is None else _checked_size(size),
        )  # fmt: skip


def checked_seeds(seeds: Iterable[int]) -> list[int]:
    """`seeds` as a list; refuses none at all, one given twice, and what is no whole number."""
    seeds = list(seeds)
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed!r} is not a whole number from 0 on")
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise ValueError("no seed is given: pass for example seeds=range(4)")
    if twice := [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
        raise ValueError(f"seeds {twice} are given twice: an image would be counted twice")
    return seeds


def _checked_size(size: Any) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, tuple | list) else (size,)
    good = [isinstance(x, Integral) and not isinstance(x, bool) and int(x) > 0 for x in pair]
    if len(pair) != 2 or not all(good):
        raise ValueError(f"size {size!r} is not (height, width), two whole numbers of pixels")
    return int(pair[0]), int(pair[1])


def _said(value: Any) -> dict[str, Any]:
    as_default = {f.name: f.default for f in fields(value)}
    return {k: v for k, v in asdict(value).items() if as_default[k] != v}
