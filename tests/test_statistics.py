"""Intervals hold their level at every n, and a localisation says "none" where nothing is there.

The slow formulas are loops over flips, tables and numeric integrals; the worlds are simulated.
"""

import doctest
import itertools
import math

import numpy as np
import pytest
import torch

from loco_core import statistics
from loco_core.statistics import (
    max_t,
    paired_shares,
    pearson,
    reaches_neutral,
    t_interval,
    t_quantile,
    units,
    units_of,
    wilson,
)

NS = (2, 3, 4, 8, 20)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def covered(ends, truth):
    """The share of intervals [world, 2] that hold the truth."""
    return ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).double().mean().item()


# Student's t


@pytest.mark.parametrize(
    "df, t", [(1, 12.706204736), (2, 4.302652730), (3, 3.182446305), (4, 2.776445105),
              (7, 2.364624252), (10, 2.228138852), (19, 2.093024054), (30, 2.042272456),
              (120, 1.979930405), (100_000, 1.959987708)],
)  # fmt: skip
def test_the_quantile_of_t_is_the_published_one(df, t):
    assert t_quantile(df) == pytest.approx(t, abs=1e-9)
    assert t_quantile(np.int64(df)) == t_quantile(df)


@pytest.mark.parametrize("df", [1, 2, 3, 6, 9, 40])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_the_density_of_t_between_its_quantiles_integrates_to_the_level(df, level):
    """With t = tan a the density is smooth on a bounded range: Simpson's rule."""
    a = np.linspace(0, math.atan(t_quantile(df, level)), 40_001)
    log = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    f = math.exp(log) * (1 + np.tan(a) ** 2 / df) ** (-(df + 1) / 2) / np.cos(a) ** 2
    inside = 2 * (a[1] / 3) * (f[0] + 4 * f[1:-1:2].sum() + 2 * f[2:-1:2].sum() + f[-1])
    assert inside == pytest.approx(level, abs=1e-9)


def test_the_interval_is_the_mean_and_t_standard_errors_of_each_row():
    values = normal(2, 3, 5).float()
    found = t_interval(values)
    assert found.shape == (2, 3, 2) and found.dtype == torch.float64
    for i, j in itertools.product(range(2), range(3)):
        x = values[i, j].tolist()
        mean = math.fsum(x) / 5
        reach = 2.776445105 * math.sqrt(math.fsum((v - mean) ** 2 for v in x) / 4 / 5)
        assert found[i, j].tolist() == pytest.approx([mean - reach, mean + reach], abs=1e-8)


def test_one_number_tells_nothing_of_others():
    assert t_interval(torch.ones(3, 1)).isnan().all() and t_interval(torch.ones(3, 0)).isnan().all()


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("name", ["normal", "shared baseline", "skewed"])
def test_t_covers_95_percent_at_every_n(n, name):
    """Skewed: a gamma of shape 4, skewness 1; a longer tail covers less (benchmarks)."""
    x = normal(20_000, n)
    if name == "shared baseline":
        x = x + normal(20_000, n, seed=2) * 3  # of each unit, shared by all items
    if name == "skewed":
        gamma = torch.distributions.Gamma(4.0, 1.0)
        torch.manual_seed(3)
        x = gamma.sample((20_000, n)).double() - 4
    low = 0.915 if name == "skewed" else 0.944
    assert low <= covered(t_interval(x), 0) <= 0.956


# Shares


@pytest.mark.parametrize(
    "seen, n, low, high",  # Newcombe (1998), table I, method 4
    [
        (81, 263, 0.2535, 0.3682),
        (15, 148, 0.0598, 0.1644),
        (0, 20, 0, 0.2005),
        (1, 29, 0.0018, 0.1963),
    ],
)
def test_wilsons_interval_has_the_published_values(seen, n, low, high):
    assert wilson(seen / n, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_wilsons_interval_holds_the_shares_that_a_test_would_not_reject(share):
    n, grid = 9, torch.linspace(0, 1, 200001, dtype=torch.float64)
    away = ((share - grid).abs() - 1 / 18).clamp(min=0)
    kept = grid[away <= 1.959964 * (grid * (1 - grid) / n).sqrt() + 1e-12]
    assert wilson(share, np.int64(n)) == pytest.approx(
        (kept.min().item(), kept.max().item()), abs=1e-4
    )


@pytest.mark.parametrize("n", NS)
def test_wilsons_interval_covers_every_share(n):
    """The exact probability, summed over all outcomes, of 999 true shares."""
    truth = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    total = torch.zeros_like(truth)
    for seen in range(n + 1):
        low, high = wilson(seen / n, n)
        chance = math.comb(n, seen) * truth**seen * (1 - truth) ** (n - seen)
        total += chance * ((low <= truth) & (truth <= high))
    assert total.min() >= 0.945


def test_an_interval_over_prompts_covers_where_one_over_images_does_not():
    """Eight images of a prompt that all show the same: 20 prompts tell no more than 20 images."""
    rng = torch.Generator().manual_seed(0)
    shares = (torch.rand(2000, 20, generator=rng) < 0.7).double().mean(1).tolist()
    holds = [sum(low <= 0.7 <= high for low, high in (wilson(s, n) for s in shares)) / 2000
             for n in (20, 160)]  # fmt: skip
    assert holds[0] > 0.93 and holds[1] < 0.6


@pytest.mark.parametrize("gained, lost, same", [(0, 0, 6), (0, 6, 0), (3, 1, 8), (2, 9, 1)])
def test_the_paired_interval_adds_one_prompt_that_gained_and_one_that_lost(gained, lost, same):
    n = gained + lost + same
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    reach = t_quantile(n + 1) * math.sqrt((p + q - (p - q) ** 2) / (n + 1))
    found = paired_shares(torch.tensor([1.0] * gained + [-1.0] * lost + [0.0] * same))
    assert found == pytest.approx((max(p - q - reach, -1), min(p - q + reach, 1)), abs=1e-6)
    assert found[0] < found[1]


@pytest.mark.parametrize("n", NS)
def test_the_paired_interval_covers_every_gain_and_loss(n):
    """The exact probability of a grid of true gains and losses, summed over all outcomes."""
    grid = torch.linspace(0, 1, 41, dtype=torch.float64)
    gain, loss = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))
    gain, loss = gain[gain + loss <= 1], loss[gain + loss <= 1]
    stay, total = (1 - gain - loss).clamp(min=0), torch.zeros_like(gain)
    for up in range(n + 1):
        for down in range(n + 1 - up):
            same = n - up - down
            ends = paired_shares(torch.tensor([1.0] * up + [-1.0] * down + [0.0] * same))
            holds = (ends[0] <= gain - loss + 1e-12) & (gain - loss - 1e-12 <= ends[1])
            ways = math.comb(n, up) * math.comb(n - up, down)
            total += ways * gain**up * loss**down * stay**same * holds
    assert total.min() >= 0.93


@pytest.mark.parametrize(
    "bad", [lambda: wilson(1.2, 3), lambda: wilson(0.5, 0), lambda: wilson(math.nan, 3),
            lambda: paired_shares(torch.tensor([2.0])), lambda: paired_shares(torch.zeros(0)),
            lambda: paired_shares(torch.tensor([math.nan]))],
)  # fmt: skip
def test_intervals_of_what_are_no_shares_are_refused(bad):
    with pytest.raises(ValueError, match="pass"):
        bad()


# Correlation


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_fishers_interval_covers_from_four_pairs_on(rho):
    for n in (4, 8, 20):
        x, e = normal(2000, n, seed=n), normal(2000, n, seed=n + 1)
        y = rho * x + math.sqrt(1 - rho**2) * e
        ends = torch.tensor([pearson(a, b)[1:] for a, b in zip(x, y, strict=True)])
        assert 0.935 <= covered(ends, rho) <= 0.97, n


def test_a_constant_has_no_correlation_and_three_pairs_no_interval():
    assert all(math.isnan(v) for v in pearson(torch.ones(5), torch.arange(5.0)))
    for x, y in ((torch.ones(3), torch.ones(3)), (torch.ones(5), torch.ones(4))):
        with pytest.raises(ValueError, match="at least 4"):
            pearson(x, y)


# Units


def test_few_prompts_are_tested_by_pictures_and_said_so():
    samples = normal(3, 5, 2)
    values, unit = units_of(samples)
    assert unit == "picture" and torch.equal(values, samples.reshape(3, 10))
    values, unit = units_of(normal(3, 6, 2))
    assert unit == "prompt" and torch.equal(values, normal(3, 6, 2).mean(-1))
    assert units(samples).shape == (3, 5) and units(samples[:, :1]).shape == (3, 2)


# max-T


def slow(differences, pooled=1 / 3):
    """Adjusted p of Westfall and Young, by loops over flips and items, in pure Python."""
    rows = [[float(x) for x in row] for row in differences]
    n = len(rows[0])
    own = [math.fsum(x * x for x in row) / n for row in rows]
    typical = sorted(own)[(len(own) - 1) // 2]
    rows = [[x / math.sqrt((1 - pooled) * m + pooled * typical) for x in row]
            for row, m in zip(rows, own, strict=True)]  # fmt: skip
    seen = [math.fsum(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -seen[i])
    counts = [0] * len(rows)
    for signs in itertools.product((1, -1), repeat=n):
        flipped = [math.fsum(s * x for s, x in zip(signs, row, strict=True)) for row in rows]
        for rank, i in enumerate(order):
            counts[i] += max(flipped[j] for j in order[rank:]) >= seen[i] - 1e-9
    p, above = [0.0] * len(rows), 0.0
    for i in order:
        above = p[i] = max(above, counts[i] / 2**n)
    return p


@pytest.mark.parametrize("pooled", [0, 1 / 3, np.float64(0.5), 1])
@pytest.mark.parametrize("items, n", [(1, 3), (4, 5), (6, 8), (3, 10)])
def test_p_is_that_of_all_sign_flips_one_by_one(items, n, pooled):
    differences = normal(items, n, seed=items) + torch.linspace(0, 2, items)[:, None]
    found = max_t(differences, pooled=pooled)
    assert found.p.tolist() == pytest.approx(slow(differences, pooled), abs=1e-12)
    assert found.effects.tolist() == pytest.approx(differences.mean(1).tolist())
    assert found.best == int(differences.mean(1).argmax()) and found.n == n


def test_p_does_not_depend_on_units_of_measure_nor_on_the_order_of_items():
    differences = normal(7, 8) + torch.linspace(0, 3, 7)[:, None]
    p = max_t(differences).p
    assert torch.equal(max_t(differences * 1e6).p, p)
    assert torch.equal(max_t(differences * 1e-6).p, p)
    assert torch.equal(max_t(differences.flip(0)).p, p.flip(0))


def test_drawn_flips_agree_with_all_flips_and_repeat():
    """13 units are flipped 4,096 times of 8,192; the same data with all of them."""
    differences = normal(3, 13) * 2 + torch.tensor([[0.2], [0.9], [1.3]])
    found = max_t(differences)
    assert torch.equal(found.p, max_t(differences).p)
    assert found.p.tolist() == pytest.approx(slow(differences), abs=0.02)
    assert max_t(torch.ones(2, 13)).p.min() == pytest.approx(1 / 4096, abs=1.5 / 4096)


def test_three_verdicts():
    strong = torch.ones(1, 8) * 5 + normal(1, 8).float()
    silent = normal(6, 8, seed=3)
    assert max_t(torch.cat([silent, strong])).verdict == "found"
    assert max_t(silent).verdict == "none" and max_t(torch.zeros(4, 8)).verdict == "none"
    assert max_t(-strong).verdict == "none"  # larger means more
    for n in (1, 2, 3, 4):  # 1 / 2^4 is above 0.05
        assert max_t(torch.ones(2, n)).verdict == "undecided"
    assert max_t(torch.ones(2, 4), level=0.1).verdict == "found"
    assert max_t(torch.ones(2, 5)).verdict == "found"


def test_the_effect_is_read_where_the_other_half_chose():
    differences = torch.tensor(
        [[9.0, 1.0, 9.0, 1.0, 9.0, 1.0], [2.0, 5.0, 2.0, 5.0, 2.0, 5.0], [0.0] * 6]
    )
    found = max_t(differences)
    read = torch.tensor([2.0, 1.0] * 3)  # even units at item 1, odd at item 0
    second = torch.tensor([9.0, 5.0] * 3)
    for ends, x in ((found.held_back, read), (found.margin, read - second)):
        assert ends == pytest.approx((x.mean().item(), *t_interval(x).tolist()))
    assert found.best == 0 and found.effects[0] == 5


def test_a_single_item_has_no_margin_and_a_single_unit_nothing_held_back():
    alone = max_t(normal(1, 8))
    assert all(map(math.isnan, alone.margin)) and not any(map(math.isnan, alone.held_back))
    once = max_t(normal(3, 1))
    assert all(map(math.isnan, once.margin + once.held_back))


def silent_world(items, n, seed):
    """Differences to a shared baseline where no item does anything: all share its noise."""
    return (normal(1, n, seed=10_000 + seed) - normal(items, n, seed=seed)) * 2


@pytest.mark.parametrize("pooled", [0, 1 / 3, 1])
@pytest.mark.parametrize("items, n", [(15, 8), (66, 10), (66, 6)])
def test_nothing_is_found_where_nothing_is(items, n, pooled):
    """500 worlds at level 0.05: up to 38 (two and a half standard errors above 25)."""
    worlds = [max_t(silent_world(items, n, s), pooled=pooled) for s in range(500)]
    assert sum(world.verdict == "found" for world in worlds) <= 38
    ends = torch.tensor([world.held_back[1:] for world in worlds])
    assert 0.92 <= covered(ends, 0) <= 0.975


def test_the_plain_interval_of_the_picked_item_would_find_what_is_not_there():
    """So the test above can fail: the same worlds, read as before."""
    lows = [
        t_interval(d[d.mean(1).argmax()])[0] for d in (silent_world(66, 8, s) for s in range(200))
    ]
    assert sum(low > 0 for low in lows) > 40


def planted(items, n, seed, effect=8.0, spread=3.0):
    """A silent world in which item 5 has an effect that varies from unit to unit."""
    differences = silent_world(items, n, seed)
    differences[5] += effect + spread * normal(n, seed=20_000 + seed)
    return differences


@pytest.mark.parametrize("items, n", [(15, 8), (66, 8), (227, 10)])
def test_a_planted_item_is_found_with_its_effect_and_margin(items, n):
    worlds = [max_t(planted(items, n, seed)) for seed in range(100)]
    assert sum(w.verdict == "found" and w.best == 5 for w in worlds) >= 97
    assert sum(bool((w.p[5] <= 0.05) and (w.p <= 0.05).sum() == 1) for w in worlds) >= 85
    assert 0.88 <= covered(torch.tensor([w.held_back[1:] for w in worlds]), 8) <= 1
    assert sum(w.margin[1] > 0 for w in worlds) >= 70


def test_the_typical_scale_finds_more_than_t_where_effects_vary_and_units_are_few():
    found = [sum(max_t(planted(66, 8, s), pooled=p).verdict == "found" for s in range(100))
             for p in (0, 1 / 3)]  # fmt: skip
    assert found[1] >= found[0] + 15


def test_the_own_scale_finds_more_than_means_where_one_item_is_noisy():
    worlds = [planted(15, 8, seed) for seed in range(100)]
    for world in worlds:
        world[9] *= 8
    found = [sum(bool(max_t(w, pooled=p).p[5] <= 0.05) for w in worlds) for p in (1, 1 / 3)]
    assert found[1] >= found[0] + 15


def test_items_that_never_vary_do_not_count_as_typical():
    differences = torch.cat([torch.zeros(9, 8), planted(6, 8, 0)])
    assert max_t(differences).p[:9].tolist() == [1.0] * 9
    assert max_t(differences, pooled=1).verdict == "found"


def test_smaller_effects_are_found_below_larger_ones():
    """Step-down: a site of effect 60 does not hide one of effect 8, which one step would."""
    differences = silent_world(40, 8, 0)
    differences[3] += 60
    differences[7] += 8
    for pooled in (1 / 3, 1):
        p = max_t(differences, pooled=pooled).p
        assert (p <= 0.05).nonzero().flatten().tolist() == [3, 7]
    flips = torch.tensor(list(itertools.product((1.0, -1.0), repeat=8)), dtype=torch.float64)
    one_step = ((differences @ flips.T).amax(0) >= differences[7].sum()).double().mean()
    assert one_step > 0.05


@pytest.mark.parametrize(
    "bad, level", [(torch.zeros(3), 0.05), (torch.zeros(0, 3), 0.05), (torch.zeros(3, 0), 0.05),
                   (torch.tensor([[math.nan, 1.0]]), 0.05), (torch.tensor([[math.inf]]), 0.05),
                   (torch.zeros(2, 2, 2), 0.05), (torch.ones(2, 6), 0.0), (torch.ones(2, 6), 1.0)],
)  # fmt: skip
def test_what_is_no_table_of_finite_numbers_is_refused(bad, level):
    with pytest.raises(ValueError, match="pass"):
        max_t(bad, level)


# The smallest window


def sweep(effect, removed, seed, n=8, windows=6):
    """Scores [window, unit], neutral and baseline: prompt levels, and window 2 removes a share."""
    level, e = 25 + 4 * normal(n, seed=seed), effect + 0.3 * effect * normal(n, seed=seed + 1)
    noise = normal(windows + 2, n, seed=seed + 2)
    scores = level + noise[2:]
    scores[2] -= removed * e
    return scores, level - e + noise[0], level + noise[1]


@pytest.mark.parametrize(
    "effect, removed, low, high",
    [(8, 1.0, 0.9, 1), (8, 0.0, 0, 0.02), (8, 0.4, 0, 0.05), (0, 0.0, 0, 0.05)],
    ids=["all is removed", "no window does anything", "a part", "neutral text does nothing"],
)
def test_the_smallest_window_is_one_that_removes_all(effect, removed, low, high):
    said = [reaches_neutral(*sweep(effect, removed, 10 * s)) for s in range(200)]
    assert low <= sum(said) / 200 <= high


def test_prompt_levels_do_not_pass_for_a_removal():
    """Three prompts of levels 20, 25, 30, neutral 4 lower, and no window changes anything."""
    baseline = torch.tensor([20.0, 25.0, 30.0]).repeat_interleave(3)
    assert reaches_neutral(baseline.repeat(5, 1), baseline - 4, baseline) is False


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(statistics).failed == 0
