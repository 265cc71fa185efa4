"""A score: how much of what is asked for a picture shows, and who says so.

A score knows its name and the fingerprint of what it computes with, so a result can say what scored
it. It is given pictures as they are painted, some at a time, never all of a sweep.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..digests import fingerprint
from .clip_score import Clip, clip_for, clip_score

__all__ = ["Score", "score_of", "scores_of"]

Function = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Score:
    """A named score. function: (images [n, 3, H, W] in [0, 1], texts) -> [n] numbers. fingerprint:
    of the weights it computes with, None if they are not known.

        Score("brightness", None, lambda images, texts: images.mean((1, 2, 3)))
    """

    name: str
    fingerprint: str | None
    function: Function

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        return self.function(images, texts)

    def to_json(self) -> dict[str, str | None]:
        """What a provenance says of it."""
        return {"name": self.name, "fingerprint": self.fingerprint}


def score_of(pipe: Any, score: Function | Score | None) -> Score:
    """`score` by name: None is the CLIP-Score by the CLIP of a mini; any function will do.

    Raises ValueError for None if no CLIP comes with the model, TypeError for what is no function.

        score_of(pipe, None).name  # "CLIP-Score"
    """
    if score is None:
        return by_clip(clip_for(pipe))
    if isinstance(score, Score):
        return score
    if isinstance(score, partial) and score.func is clip_score and not score.args:
        if isinstance(clip := score.keywords.get("clip"), Clip):
            return Score("CLIP-Score", fingerprint(clip.model), score)
    if not callable(score):
        raise TypeError(
            f"score {score!r} is no function (images [n, 3, H, W], texts) -> [n]: leave it out for "
            "CLIP-Score"
        )
    return Score(getattr(score, "__qualname__", type(score).__qualname__), None, score)


def by_clip(clip: Clip) -> Score:
    """CLIP-Score with this CLIP."""
    return Score("CLIP-Score", fingerprint(clip.model), partial(clip_score, clip=clip))


def scores_of(score: Score, images: Tensor, texts: Sequence[str]) -> Tensor:
    """[n] float64 of images [n, 3, H, W], each by its text. Raises ValueError for a score that
    does not return a finite number for each."""
    found = torch.as_tensor(score(images, list(texts))).double().cpu()
    if found.shape != (len(texts),) or not bool(found.isfinite().all()):
        raise ValueError(
            f"score must return {len(texts)} finite numbers, one per image; {score.name!r} gave "
            f"{tuple(found.shape)}, finite: {bool(found.isfinite().all())}"
        )
    return found
