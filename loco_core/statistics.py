"""Every interval and every decision: Student's t, shares, correlation, and max-T by sign flips.

Several images of one prompt are not independent: what an edit does to one it mostly does to all.
So the unit is the prompt: its images are averaged, and the interval is that of `n` averages. It
says what other prompts would give, with the seeds that were used.

A localisation asks two questions of many items (windows, sites) at once: does any of them do
anything, and how much does the best one do. The largest of many means was picked for being large,
so its own interval promises too much. `max_t` answers with a test of the maximum, and with the
effect of the pick among units that had no say in it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
EXACT = 12  # units up to which all sign flips are tried
DRAWN = 4096  # flips for more units: the identity and 4,095 drawn ones
ENOUGH = 6  # prompts from which on the prompt is the unit of a test
Interval = tuple[float, float, float]  # value, low, high


@lru_cache(maxsize=1024)
def t_quantile(df: int, level: float = 0.95) -> float:
    """The t with P(|T| <= t) = level, for Student's T of df = 1, 2, ... degrees of freedom.

    With a = arctan(t / sqrt(df)) the probability is a finite sum (Abramowitz and Stegun 1964,
    26.7.3 and 26.7.4),

        df even:  sin a (1 + 1/2 cos^2 a + (1 3)/(2 4) cos^4 a + ... up to cos^(df-2) a)
        df odd:   2/pi (a + sin a cos a (1 + 2/3 cos^2 a + (2 4)/(3 5) cos^4 a + ... cos^(df-3) a))

    and a is found by bisection, to the last digits of float64.

    >>> round(t_quantile(1), 4), round(t_quantile(9), 4)
    (12.7062, 2.2622)
    """
    odd, terms = df % 2, df // 2
    k = torch.arange(1, max(terms, 1), dtype=torch.float64)
    weights = torch.cat([k.new_ones(1), ((2 * k - 1 + odd) / (2 * k + odd)).cumprod(0)])[:terms]
    powers = 2 * torch.arange(terms, dtype=torch.float64)
    low, high = 0.0, math.pi / 2
    for _ in range(64):
        a = (low + high) / 2
        series = float((weights * math.cos(a) ** powers).sum())
        part = math.sin(a) * series
        inside = (a + math.cos(a) * part) * 2 / math.pi if odd else part
        low, high = (a, high) if inside < level else (low, a)
    return math.tan(low) * math.sqrt(df)


def t_interval(values: Tensor) -> Tensor:
    """95 % interval of a mean of any numbers, one per unit: [..., n] -> [..., 2] float64.

        mean  +-  t(n - 1) s / sqrt(n),    s^2 = sum (x - mean)^2 / (n - 1)

    (Student 1908): exact for normal numbers at every n, and close to it for numbers that are not
    strongly skewed. One number tells nothing of others: NaN for n < 2.

    >>> t_interval(torch.tensor([27.0, 29.0, 28.0])).round(decimals=2).tolist()
    [25.52, 30.48]
    """
    values, n = values.double(), values.shape[-1]
    if n < 2:
        return values.new_full((*values.shape[:-1], 2), math.nan)
    reach = t_quantile(n - 1) * values.std(-1) / math.sqrt(n)
    return values.mean(-1, keepdim=True) + torch.stack([-reach, reach], -1)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share in [0, 1], the mean over n prompts: (low, high).

        W(p, n) = (p + z^2/2n  +-  z sqrt(p (1-p) / n + z^2/4n^2)) / (1 + z^2/n)
        low  = lower end of W(p - 1/2n, n),      high = upper end of W(p + 1/2n, n)

    Wilson's score interval (1927) with the correction for continuity (Newcombe 1998, method 4), as
    if each prompt were one coin toss. Without the correction it covers as little as 82 to 85 % of
    shares near 0 or 1, where good edits lie; with it at least 94.9 % (n = 2 to 100). A mean over
    the images of a prompt varies at most as much as a toss, Var <= p (1-p): it covers more.
    Raises ValueError on a share outside [0, 1], and on less than one prompt.

    >>> round(wilson(1.0, 10)[0], 3)
    0.655
    """
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"share {share!r} of {n!r} prompts: pass a mean in [0, 1] and n >= 1")
    ends = []
    for sign in (-1, 1):
        p = min(max(share + sign / (2 * n), 0.0), 1.0)
        reach = Z * math.sqrt(p * (1 - p) / n + (Z / (2 * n)) ** 2)
        end = (p + Z**2 / (2 * n) + sign * reach) / (1 + Z**2 / n)
        ends.append(end if 0 < p < 1 else p)  # 0 or 1, which rounding may miss
    return ends[0], ends[1]


def paired_shares(differences: Tensor) -> tuple[float, float]:
    """95 % interval of the mean difference of two shares on the same prompts: (low, high).

        t_interval of  d_1 ... d_n, 1, -1,      cut to [-1, 1]

    differences: [n] in [-1, 1], after minus before, one per prompt. One prompt that gained and one
    that lost are added (Bonett and Price 2012), so that it stays open when all prompts change
    alike, or none does. They take the normal quantile and divide the variance by n + 2; that covers
    87 to 93 % in the worst worlds of n = 2 to 20, Student's t at least 93.7 % in all.
    Raises ValueError on anything but one number in [-1, 1] per prompt.

    >>> round(paired_shares(torch.zeros(10))[1], 3)
    0.271
    """
    d = differences.double()
    if d.ndim != 1 or not len(d) or not bool((d.abs() <= 1).all()):
        raise ValueError(f"differences {d.tolist()}: pass one number in [-1, 1] per prompt")
    low, high = t_interval(torch.cat([d, d.new_tensor([1.0, -1.0])])).clamp(-1, 1).tolist()
    return low, high


def pearson(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """(r, low, high): Pearson's correlation of [n], n >= 4, with Fisher's (1921) 95 % interval.

        tanh( artanh r  +-  z / sqrt(n - 3) )

    NaN if x or y is constant. Raises ValueError unless both are [n] with n >= 4.

    >>> pearson(torch.arange(5.0), torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0]))[0] > 0.98
    True
    """
    if x.ndim != 1 or x.shape != y.shape or len(x) < 4:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)}: pass two of one length, of at least 4"
        )
    r = torch.corrcoef(torch.stack([x, y]).double())[0, 1].clamp(-1, 1).item()
    if math.isnan(r):
        return r, r, r
    reach = Z / math.sqrt(len(x) - 3)
    middle = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, r)))
    return r, math.tanh(middle - reach), math.tanh(middle + reach)


def units(samples: Tensor) -> Tensor:
    """The numbers of an interval, [..., n], of samples [..., prompt, seed]: one per prompt, its
    seeds averaged. Of a single prompt the seeds are the numbers, and say nothing of others."""
    return samples.mean(-1) if samples.shape[-2] > 1 else samples.flatten(-2)


def units_of(samples: Tensor) -> tuple[Tensor, str]:
    """The units that a sign flip turns, of samples [..., prompt, seed]: ([..., n], their name).

    "prompt" from 6 prompts on, seeds averaged: the test speaks of prompts like these. Fewer have
    too few flips (2^5 = 32) to find much, so the unit is each "picture", prompt x seed: the test
    then speaks of other seeds of these very prompts, and says nothing of other prompts.

    >>> [(tuple(x.shape), u) for x, u in map(units_of, (torch.zeros(6, 2), torch.zeros(4, 2)))]
    [((6,), 'prompt'), ((8,), 'picture')]
    """
    if samples.shape[-2] >= ENOUGH:
        return samples.mean(-1), "prompt"
    return samples.flatten(-2), "picture"


@dataclass(frozen=True, eq=False)
class MaxT:
    """What `max_t` found among items, on the CPU.

    effects: mean difference of each item, [item] float64. p: of each item, adjusted for all, [item]
    float64. best: the item with the largest effect. margin: (value, low, high), the best item minus
    the second best, and held_back: (value, low, high), the effect of the best item; both from units
    that did not choose the items, with Student's 95 % interval, NaN where there is no other item or
    unit. unit: what was flipped, n of them. level: of the test.
    """

    effects: Tensor
    p: Tensor
    best: int
    margin: Interval
    held_back: Interval
    unit: str
    n: int
    level: float

    @property
    def verdict(self) -> str:
        """Of the best item: "found" if p <= level; else "undecided" if no outcome of n units could
        have been found, as even one flip of all (1 / 2^n) is above the level; else "none"."""
        if float(self.p[self.best]) <= self.level:
            return "found"
        return "undecided" if 1 / min(2**self.n, DRAWN) > self.level else "none"


def max_t(
    differences: Tensor, level: float = 0.05, unit: str = "prompt", pooled: float = 1 / 3
) -> MaxT:
    """Which of many items have an effect, by joint sign flips of the units (max-T, one-sided).

        T_i(s) = sum over units u of s_u d_iu / scale_i,      s in {-1, +1}^n
        p_i    = share of the flips s with  max over items j of T_j(s)  >=  T_i(identity)
        scale_i^2 = (1 - pooled) m_i + pooled (median of m),      m_i = mean over u of d_iu^2

    and step-down: the maximum runs over the items j with T_j(identity) <= T_i(identity), and p
    never falls from a larger T to a smaller one (Westfall and Young 1993). A flip turns all items
    of a unit at once, so what they share, such as one baseline or one corrupted run, they share
    under every flip. If the differences of the items without an effect are symmetric about 0,
    jointly, the chance to find any of them is at most `level`, whatever the others do.

    differences: [item, unit], larger = more effect, such as baseline minus window (`units_of`). All
    2^n flips up to 12 units, for more the identity and 4,095 flips of a fixed seed. pooled: 0 is
    each item's own t, 1 compares plain means; between them the scale leans on the typical item (as
    in Tusher et al. 2001). Effects vary over few units, so t misses them among many silent items;
    means miss them where items are unlike in noise, and find too much where skewed scores share a
    baseline. A third holds the level and finds nearly what means do (benchmarks/intervals.py).

    margin and held_back come from halves: the units 0, 2, ... are read at the item (and the second
    item) with the largest means over the units 1, 3, ..., and the other way round. Were one unit
    left out at a time, it would decide between near ties: the 95 % interval then holds in 94 to
    75 % of silent worlds (n = 2 to 20), that of halves in 93 to 96 % of all.
    Raises ValueError on what is not finite [item, unit], or a level or `pooled` out of range.

    >>> found = max_t(torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0], [4.0] * 6]))
    >>> found.verdict, found.best, found.p.tolist()
    ('found', 1, [0.65625, 0.015625])
    """
    d = differences.detach().double().cpu()
    if d.ndim != 2 or not d.numel() or not bool(d.isfinite().all()):
        raise ValueError(f"differences {tuple(d.shape)}: pass finite numbers [item, unit]")
    if not 0 < level < 1 or not 0 <= pooled <= 1:
        raise ValueError(f"level {level!r}, pooled {pooled!r}: pass 0.05 and 1 / 3, say")
    own = d.square().mean(1, keepdim=True)
    typical = torch.where(own > 0, own, math.nan).nanmedian()  # of the items that vary at all
    scale = ((1 - pooled) * own + pooled * typical).sqrt()
    scaled = torch.where(scale > 0, d / scale, 0.0)
    order = scaled.mean(1).argsort(descending=True, stable=True)
    margin, held_back = _held_back(d)
    p, effects = _step_down(scaled[order])[order.argsort()], d.mean(1)
    return MaxT(effects, p, int(effects.argmax()), margin, held_back, unit, d.shape[1], level)


def _step_down(ordered: Tensor) -> Tensor:
    """Adjusted p of scaled items [item, unit] in falling order of their sums: [item]."""
    flips, seen = _flips(ordered.shape[1]), (ordered.sum(1) - 1e-9).tolist()
    reached = torch.zeros(len(ordered), dtype=torch.float64)
    for some in flips.split(max(1, 2**22 // len(ordered))):  # 32 MB at a time
        sums = ordered @ some.T
        largest = sums[-1]
        for i in reversed(range(len(ordered))):
            largest = torch.maximum(largest, sums[i])  # of this item and all below
            reached[i] += (largest >= seen[i]).sum()
    return (reached / len(flips)).cummax(0).values


@lru_cache(maxsize=8)
def _flips(n: int) -> Tensor:
    """Signs [flip, unit], the identity first."""
    if n <= EXACT:
        return torch.tensor(list(itertools.product((1.0, -1.0), repeat=n)), dtype=torch.float64)
    drawn = torch.randint(2, (DRAWN, n), generator=torch.Generator().manual_seed(0)).double()
    return torch.cat([drawn.new_ones(1, n), drawn[1:] * 2 - 1])


def _held_back(d: Tensor) -> tuple[Interval, Interval]:
    """Margin and effect of [item, unit], each half of the units read where the other half chose."""
    items, n = d.shape
    chosen = d.new_full((2, n), math.nan)  # [first and second choice, unit]
    for half, other in ((slice(0, n, 2), slice(1, n, 2)), (slice(1, n, 2), slice(0, n, 2))):
        if n > 1:
            choice = d[:, other].mean(1).topk(min(2, items)).indices
            chosen[: len(choice), half] = d[choice, half]
    read = torch.stack([chosen[0] - chosen[1], chosen[0]])
    margin, effect = torch.cat([read.mean(1, keepdim=True), t_interval(read)], 1).tolist()
    return tuple(margin), tuple(effect)


def reaches_neutral(scores: Tensor, neutral: Tensor, baseline: Tensor, level: float = 0.05) -> bool:
    """Whether the best of some windows does what the neutral text in every layer does.

    scores [window, unit], neutral, baseline [unit]: paired, lower = less of the concept (turn the
    sign for a fact). True if all of
        1. neutral text does something: baseline - neutral is found by `max_t`, as its only item
        2. some window does: baseline - scores is found by `max_t`
        3. no difference is seen: the 95 % interval of best window - neutral begins at or below 0
    So the answer is no where nothing removes anything, or units are too few to tell. What is not
    seen may still be there: of 8 pictures (sd 2, effect 8) a window that removes half passes in
    11 % of worlds, three quarters in 59 %; of 16 in 1 % and 28 %.
    Raises ValueError as `max_t`.

    >>> baseline, neutral = torch.linspace(20, 30, 8), torch.linspace(15, 25, 8)
    >>> one = torch.stack([baseline, neutral])
    >>> reaches_neutral(one, neutral, baseline), reaches_neutral(one[:1], neutral, baseline)
    (True, False)
    """
    everywhere, drops = max_t((baseline - neutral)[None], level), max_t(baseline - scores, level)
    if not everywhere.verdict == drops.verdict == "found":
        return False
    return bool(t_interval(scores[drops.best].double() - neutral.double())[0] <= 0)
