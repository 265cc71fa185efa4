"""What a number says of a claim: one rule for every row of "Paper versus here".

The rule of a claim is written before the number is there: a range in which it must lie. An interval
wholly inside reproduces the claim, wholly outside refutes it, and one that reaches across an end
says nothing yet. Where the claim is one about a method, doing it must also be better than the best
control, which did not know what to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..statistics import Interval

__all__ = ["ENOUGH", "Claim", "Verdict", "verdict"]

Verdict = Literal[
    "reproduced", "not reproduced", "undecided", "differs by construction", "not attempted"
]

#: Pictures that a number has to rest on before it decides.
ENOUGH = 100


@dataclass(frozen=True)
class Claim:
    """What a paper says, as a range of one number.

    text: the claim. number: what is measured, in words. holds: (low, high), where it has to lie;
    infinite ends are open. given: why it cannot fail on the models that are here, if it cannot.
    missing: why nothing was measured, if nothing was.

        Claim("other prompts are spared", "share of the rest kept", (0.95, 1.0))
    """

    text: str
    number: str
    holds: tuple[float, float] = (-math.inf, math.inf)
    given: str | None = None
    missing: str | None = None

    def __post_init__(self) -> None:
        low, high = self.holds
        if not low <= high:
            raise ValueError(f"holds={self.holds!r} of {self.text!r} is no range (low, high)")


def verdict(
    claim: Claim, interval: Interval | None, control: Interval | None = None, n: int = 0
) -> Verdict:
    """Whether a number bears a claim out.

        not attempted            the claim says why, or there is no interval
        differs by construction  the claim says why it cannot fail here
        undecided                n < 100 pictures, or an interval reaches across an end, or a number
                                 is NaN
        reproduced               the interval lies inside `claim.holds`, and, with a control, that
                                 of the difference to the best one lies above 0
        not reproduced           the interval lies outside, or the difference lies below 0

    interval: (value, low, high) of the number. control: (value, low, high) of its difference to the
    best control on the same pictures, positive = better than the control. n: pictures it rests on;
    a number that does not say decides nothing.
    Raises ValueError for an interval whose ends do not hold its value.

    >>> verdict(Claim("it erases", "share gone", (0.9, 1.0)), (0.97, 0.93, 0.99), n=200)
    'reproduced'
    """
    for part in (interval, control):
        if (
            part is not None
            and not any(map(math.isnan, part))
            and not part[1] <= part[0] <= part[2]
        ):
            raise ValueError(f"{part!r} is no (value, low, high) of {claim.text!r}")
    if claim.missing is not None or interval is None:
        return "not attempted"
    if claim.given is not None:
        return "differs by construction"
    if n < ENOUGH or any(math.isnan(x) for part in (interval, control) if part for x in part):
        return "undecided"
    (_, low, high), (least, most) = interval, claim.holds
    if high < least or low > most or (control is not None and control[2] < 0):
        return "not reproduced"
    inside = least <= low and high <= most
    return "reproduced" if inside and (control is None or control[1] > 0) else "undecided"
