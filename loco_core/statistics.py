"""95 % intervals over prompts.

Several images of one prompt are not independent: what an edit does to one it mostly does to all.
So the unit is the prompt. Its images are averaged first, and the interval is that of `n` averages:
it says what other prompts would give, with the seeds that were used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share in [0, 1], the mean over n prompts: (low, high).

        (p + z^2/2n  +-  z sqrt(p (1-p) / n + z^2/4n^2)) / (1 + z^2/n)

    (Wilson 1927), as if each prompt were one coin toss. An average over the images of a prompt
    varies at most as much as a toss, Var <= p (1-p), so the interval errs on the long side; and it
    stays open when all prompts agree.

        wilson(1.0, 10)  # (0.722, 1.0)
    """
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"share {share!r} of {n!r} prompts: pass a mean in [0, 1] and n >= 1")
    middle = share + Z**2 / (2 * n)
    reach = Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    low, high = ((middle + sign * reach) / (1 + Z**2 / n) for sign in (-1, 1))
    return low if share > 0 else 0.0, high if share < 1 else 1.0  # which rounding may miss


def paired_shares(differences: Tensor) -> tuple[float, float]:
    """The interval of the mean difference of two shares on the same prompts: (low, high).

    differences: [n] in [-1, 1], after minus before, one per prompt. Bonett and Price (2012): Wald's
    interval after one prompt that gained and one that lost are added, so that it stays open when
    all prompts change alike, or none does.

        paired_shares(torch.zeros(10))  # (-0.231, 0.231)
    """
    d = differences.double()
    if d.ndim != 1 or not len(d) or not bool((d.abs() <= 1).all()):
        raise ValueError(f"differences {d.tolist()}: pass one number in [-1, 1] per prompt")
    d = torch.cat([d, d.new_tensor([1.0, -1.0])])
    mean, reach = d.mean().item(), Z * math.sqrt(d.var(correction=0).item() / len(d))
    return max(mean - reach, -1.0), min(mean + reach, 1.0)


def units(samples: Tensor) -> Tensor:
    """The independent numbers among samples [..., prompt, seed]: [..., n], one per prompt, its
    seeds averaged. Of a single prompt the seeds are the numbers, and say nothing of other prompts.
    """
    return samples.mean(-1) if samples.shape[-2] > 1 else samples.flatten(-2)


def bootstrap(values: Tensor, draws: int = 2000, seed: int = 0) -> Tensor:
    """Percentile interval of the mean of any numbers, such as CLIP-Scores, or paired differences,
    one per prompt: [..., n] -> [..., 2], float64. One number tells nothing of others: NaN.

        bootstrap(torch.tensor([27.1, 29.4, 28.0]))  # tensor([27.1000, 29.4000])
    """
    n = values.shape[-1]
    if n < 2:
        return torch.full((*values.shape[:-1], 2), math.nan, dtype=torch.float64)
    pick = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(draws, n, dtype=torch.float64)
    weights.scatter_add_(1, pick, torch.ones_like(weights)).div_(n)
    means = values.double() @ weights.T
    return means.quantile(means.new_tensor([0.025, 0.975]), dim=-1).movedim(0, -1)


def pearson(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """(r, low, high): Pearson's correlation of [n], n >= 4, with Fisher's 95 % interval.

        tanh( artanh r  +-  z / sqrt(n - 3) )

    >>> import torch
    >>> pearson(torch.arange(5.0), torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0]))[0] > 0.98
    True
    """
    r = torch.corrcoef(torch.stack([x, y]).double())[0, 1].clamp(-1, 1).item()
    reach = Z / math.sqrt(len(x) - 3)
    middle = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, r)))
    return r, math.tanh(middle - reach), math.tanh(middle + reach)
