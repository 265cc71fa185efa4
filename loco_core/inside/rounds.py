"""Attribute and erase in one call."""

from __future__ import annotations

from typing import Any

from ..concepts import Concept
from ..edits.edit import Edit
from ..families.checks import whole_number
from .attribution import attribute

__all__ = ["erase_in_rounds"]


def erase_in_rounds(
    pipe: Any,
    concept: Concept,
    ratio: float = 0.03,
    rounds: int = 2,
    *,
    quota: str = "matrix",
    **settings: Any,
) -> Edit:
    """`attribute(pipe, concept, **settings).erase(ratio, rounds=rounds, quota=quota, pipe=pipe)`.

    gone = erase_in_rounds(pipe, concept, layers=[6, 7], against="neutral", steps=10)
    """
    if whole_number(rounds, 1, 1000) is None:  # said before anything is computed
        raise ValueError(f"rounds={rounds!r}: choose a whole number, at least 1")
    parts = attribute(pipe, concept, **settings)
    return parts.erase(ratio, rounds=rounds, quota=quota, pipe=pipe)
