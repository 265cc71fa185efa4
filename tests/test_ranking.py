"""Exactly as many as were asked for come first, by score and then by index."""

import math

import pytest
import torch

from loco_core.inside.kept import Kept, Scores
from loco_core.inside.ranking import Ranking

SHAPES = {"a": (6, 40), "b": (3, 7), "c": (5, 4, 3, 3), "d": (1, 1)}


def scores(seed: int, levels: int = 0) -> dict[str, torch.Tensor]:
    """Random scores; levels: few distinct values, so that most are ties."""
    generator = torch.Generator().manual_seed(seed)
    found = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
    return {n: (x * levels).round() / levels if levels else x for n, x in found.items()}


def slow(given: dict[str, torch.Tensor], ratio: float, quota: str) -> dict[str, list[int]]:
    """By sorting (score, place) of every group by hand."""
    groups: dict[object, list[tuple[float, int, str, int]]] = {}
    for order, (name, x) in enumerate(given.items()):
        width = x[0].numel()
        for i, value in enumerate(x.flatten().tolist()):
            group = {"row": (name, i // width), "matrix": name, "all": "all"}[quota]
            groups.setdefault(group, []).append((-value, order, name, i))
    found: dict[str, list[int]] = {}
    for group in groups.values():
        count = math.ceil(ratio * len(group) - 1e-9)
        for value, _, name, i in sorted(group)[:count]:
            if value < math.inf:
                found.setdefault(name, []).append(i)
    return {name: sorted(at) for name, at in found.items()}


@pytest.mark.parametrize("quota", ["row", "matrix", "all"])
@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("ratio", [1e-3, 0.1, 0.37, 1.0])
def test_the_first_are_those_of_a_sort_by_hand(quota, levels, ratio):
    for seed in range(3):
        given = scores(seed, levels)
        given["a"][2] = -math.inf  # a row that is never taken
        given["c"].view(-1)[::2] = -math.inf
        ranking = Ranking(given.items, quota)
        found = ranking.top(ranking.counts(ratio))
        assert {name: at.tolist() for name, at in found.items()} == slow(given, ratio, quota)


@pytest.mark.parametrize("quota", ["row", "matrix", "all"])
def test_a_control_takes_as_many_of_every_group(quota):
    given, control = scores(0), scores(1, levels=1)
    given["b"].fill_(-math.inf)
    counts = Ranking(given.items, quota).counts(0.2)
    own, other = (Ranking(x.items, quota).top(counts) for x in (given, control))
    if quota == "all":
        assert sum(map(len, own.values())) == sum(map(len, other.values()))
    else:
        assert {n: len(x) for n, x in own.items()} == {n: len(x) for n, x in other.items()}


@pytest.mark.parametrize("share", [0.07, 0.12, 0.28, 0.5])
def test_what_was_not_kept_is_never_passed_over(share):
    """Of all together, the best that are kept are the best of all, or said not to be known."""
    refused = 0
    for seed in range(60):
        given = {n: x.abs() for n, x in scores(seed).items()}
        given["a"] *= seed % 7  # one matrix holds most of the best, or none
        given["e"] = torch.arange(1, 101.0).view(1, 100) + 1000 * (seed % 2)
        kept = Kept.of(given, share)
        for ratio in (0.01, 0.04, 0.05, 0.06, 0.2):
            some, whole = (Ranking(x.items, "all", above=0.0) for x in (Scores(kept), given))
            found, wanted = (ranking.top(ranking.counts(ratio)) for ranking in (some, whole))
            if kept.covers(ratio, "all", found, 1.0):
                assert {n: x.tolist() for n, x in found.items()} == {
                    n: x.tolist() for n, x in wanted.items()
                }
            else:
                refused += 1
    assert 0 < refused < 300


def test_half_precision_ties_take_no_more_than_asked():
    """By the value of the last one taken, bfloat16 took up to four times the share."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16().abs()
    for quota in ("matrix", "all"):
        ranking = Ranking(lambda: [("w", x)], quota)
        assert len(ranking.top(ranking.counts(0.01))["w"]) == math.ceil(0.01 * x.numel())
