"""Claims about the rule by which a number speaks for a claim."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loco_core.studies.verdict import ENOUGH, Claim, verdict

CLAIM = Claim("it erases", "share gone", (0.9, 1.0))
INSIDE, OUTSIDE, ACROSS = (0.96, 0.92, 0.99), (0.5, 0.4, 0.6), (0.92, 0.8, 0.97)
BETTER, SAME, WORSE = (0.3, 0.1, 0.5), (0.02, -0.1, 0.1), (-0.3, -0.5, -0.1)


@pytest.mark.parametrize(
    ("interval", "control", "says"),
    [
        (INSIDE, None, "reproduced"),
        (INSIDE, BETTER, "reproduced"),
        (INSIDE, SAME, "undecided"),
        (INSIDE, WORSE, "not reproduced"),
        (OUTSIDE, None, "not reproduced"),
        (OUTSIDE, BETTER, "not reproduced"),
        (ACROSS, None, "undecided"),
        (ACROSS, BETTER, "undecided"),
        (ACROSS, WORSE, "not reproduced"),
        ((math.nan,) * 3, None, "undecided"),
        (INSIDE, (math.nan,) * 3, "undecided"),
        (None, None, "not attempted"),
    ],
)
def test_an_interval_speaks_only_from_one_side_and_only_against_its_control(
    interval, control, says
):
    assert verdict(CLAIM, interval, control, n=ENOUGH) == says


def test_few_pictures_decide_nothing():
    assert verdict(CLAIM, INSIDE, n=99) == verdict(CLAIM, OUTSIDE, n=99) == "undecided"
    assert verdict(CLAIM, INSIDE) == verdict(CLAIM, OUTSIDE) == "undecided"  # of how many?


def test_what_cannot_fail_and_what_was_not_tried_is_said():
    planted = Claim("a style has one window", "share found", (0.9, 1.0), given="it was planted")
    people = Claim("viewers see it", "rating", missing="needs people")
    assert verdict(planted, INSIDE) == "differs by construction"
    assert verdict(people, INSIDE) == verdict(people, None) == "not attempted"
    assert verdict(planted, None) == "not attempted"


def test_what_is_no_range_or_no_interval_is_refused():
    with pytest.raises(ValueError, match="no range"):
        Claim("x", "y", (1.0, 0.0))
    with pytest.raises(ValueError, match="no .value, low, high."):
        verdict(CLAIM, (0.5, 0.6, 0.7))


@given(st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 1), st.floats(0, 1))
def test_a_claim_and_its_opposite_are_never_both_reproduced(value, reach, a, b):
    low, high = min(a, b), max(a, b)
    interval = (value, value - reach, value + reach)
    inside = verdict(Claim("in", "x", (low, high)), interval, n=ENOUGH)
    for opposite in ((-math.inf, low), (high, math.inf)):
        other = verdict(Claim("out", "x", opposite), interval, n=ENOUGH)
        if inside == other == "reproduced":
            assert value - reach == value + reach in (low, high)  # on the very end
        if inside == "not reproduced" and value - reach > high:
            above = Claim("above", "x", (high, math.inf))
            assert verdict(above, interval, n=ENOUGH) == "reproduced"
