"""Whether every "95 %" holds its level, and how often a silent model is said to do something.

    python benchmarks/intervals.py [--worlds 2000] [--json] [--record results/intervals.json]

In worlds whose truth is known, at the numbers of prompts that sweeps and tables have:

    covered   the share of intervals that hold the truth, for n = 2, 3, 4, 8, 20. The bar is 93 to
              97 %; an interval of shares may cover more, as outcomes are few. Shares of prompts
              with several seeds are simulated, coins of one seed are summed over all outcomes and
              the least of a grid of truths is shown.
    silent    sweeps in which no window or site does anything: how often `max_t` finds one (at most
              5 %, give or take three standard errors), beside how often the plain interval of the
              best item lies above 0.
    planted   how often the item with an effect is found and is the best one (at least 90 %), and
              that no other is found.
    smallest  how often a window that removes some share of a concept passes for the neutral text.

Rows without a bar say where a level is not held: strong skewness, leaving out one unit at a time,
and items that shift each prompt its own way, which is an effect on these prompts but not on others.
"""

import math
import sys
from collections.abc import Callable

import pandas as pd
import torch
from common import arguments, finish
from torch import Tensor

from loco_core.statistics import (
    max_t,
    paired_shares,
    pearson,
    reaches_neutral,
    t_interval,
    units_of,
    wilson,
)

NS = (2, 3, 4, 8, 20)
CELLS = ((4, 2), (4, 4), (6, 2))  # prompts x seeds
SWEEPS = [(items, cell) for items in (15, 66) for cell in CELLS] + [(227, (4, 4))]
LOW, HIGH, LEVEL, EXACT = 0.93, 0.97, 0.05, 0.9
random = torch.Generator()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def coins(chance: Tensor) -> Tensor:
    return (torch.rand(chance.shape, generator=random, dtype=torch.float64) < chance).double()


def held(ends: Tensor, truth: Tensor | float) -> float:
    """The share of intervals [world, 2] that hold the truth."""
    inside = (ends[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= ends[:, 1])
    return inside.double().mean().item()


# covered


def means(worlds: int, n: int) -> dict[str, float]:
    """Student's t on numbers of several shapes."""
    each = {
        "normal": normal(worlds, n),
        "shared baseline": normal(worlds, n) + 3 * normal(worlds, n),
        "prompts and seeds": normal(worlds, n) + normal(worlds, n, 2).mean(-1),
        "skewness 0.5": -(1 - normal(worlds, n, 32).square()).sum(-1),
        "skewness 1": -(1 - normal(worlds, n, 8).square()).sum(-1),
        "skewness 2": -(1 - normal(worlds, n, 2).square()).sum(-1),
    }
    return {f"t, {name}": held(t_interval(x), 0.0) for name, x in each.items()}


def coin_shares(n: int) -> dict[str, float]:
    """The least of 199 true shares, and of 231 true gains and losses, one seed per prompt."""
    truth = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    total = torch.zeros_like(truth)
    for seen in range(n + 1):
        low, high = wilson(seen / n, n)
        chance = math.comb(n, seen) * truth**seen * (1 - truth) ** (n - seen)
        total += chance * ((low <= truth) & (truth <= high))
    grid = torch.linspace(0, 1, 21, dtype=torch.float64)
    gain, loss = torch.meshgrid(grid, grid, indexing="ij")
    gain, loss = gain[gain + loss <= 1 + 1e-9], loss[gain + loss <= 1 + 1e-9]
    stay, paired = (1 - gain - loss).clamp(min=0), torch.zeros_like(gain)
    for up in range(n + 1):
        for down in range(n + 1 - up):
            same = n - up - down
            low, high = paired_shares(torch.tensor([1.0] * up + [-1.0] * down + [0.0] * same))
            inside = (low <= gain - loss + 1e-12) & (gain - loss - 1e-12 <= high)
            ways = math.comb(n, up) * math.comb(n - up, down)
            paired += ways * gain**up * loss**down * stay**same * inside
    return {"wilson, worst coin": total.min().item(), "paired, worst coin": paired.min().item()}


def seed_shares(worlds: int, n: int) -> dict[str, float]:
    """Means over prompts of shares over 4 seeds; the chance of a picture varies with the prompt."""
    found = {}
    for mean in (0.05, 0.5, 0.9):
        for name, spread in (("alike", 0.0), ("unlike", 1.0)):
            own = torch.rand(worlds, n, generator=random, dtype=torch.float64) < mean
            chance = (1 - spread) * mean + spread * (0.1 * mean + 0.9 * own)
            shares = coins(chance[..., None].expand(-1, -1, 4)).mean(-1)
            ends = torch.tensor([wilson(x, n) for x in shares.mean(1).clamp(0, 1).tolist()])
            found[f"wilson, {mean:.0%}, prompts {name}"] = held(ends, mean)
            after = coins((0.3 * chance)[..., None].expand(-1, -1, 4)).mean(-1)
            ends = torch.tensor([paired_shares(x) for x in after - shares])
            found[f"paired, {mean:.0%} to {0.3 * mean:.0%}, prompts {name}"] = held(
                ends, -0.7 * mean
            )
    return found


def correlations(worlds: int, n: int) -> dict[str, float]:
    """Fisher's interval of normal pairs."""
    found = {}
    for rho in (0.0, 0.5, 0.9):
        x, e = normal(worlds, n), normal(worlds, n)
        y = rho * x + math.sqrt(1 - rho**2) * e
        ends = torch.tensor([pearson(a, b)[1:] for a, b in zip(x, y, strict=True)])
        found[f"pearson, r = {rho}"] = held(ends, rho)
    return found


def halves(d: Tensor) -> Tensor:
    """[world, first and second choice, unit] of [world, item, unit], chosen by the other half."""
    even = torch.arange(d.shape[2]) % 2 == 0
    choice = [d[:, :, half].mean(2).topk(2, 1).indices[:, :, None] for half in (even, ~even)]
    return torch.where(even, choice[1], choice[0])


def others(d: Tensor) -> Tensor:
    """As `halves`, chosen by all other units."""
    return (d.sum(2, keepdim=True) - d).topk(2, 1).indices


def picked(worlds: int, n: int) -> dict[str, float]:
    """Effect and margin of the best of 66 items: of what was chosen, on average over units."""
    found = {}
    for name, effect in (("silent", 0.0), ("weak", 3.0), ("planted", 8.0)):
        truth = torch.zeros(66, dtype=torch.float64)
        truth[5], truth[6] = effect, effect / 2
        d = 2 * (normal(worlds, 1, n) - normal(worlds, 66, n)) + truth[:, None]
        d[:, 5] += 0.375 * effect * normal(worlds, n)
        for way, choose in (("", halves), (", leave one out", others)):
            choice = choose(d)
            read, true = d.gather(1, choice), truth[choice].mean(2)
            if choose is halves:
                ours = torch.tensor([[max_t(x).held_back, max_t(x).margin] for x in d[:20]])
                theirs = torch.stack([read[:20, 0], read[:20, 0] - read[:20, 1]], 1).mean(2)
                torch.testing.assert_close(ours[..., 0].double(), theirs, rtol=1e-5, atol=1e-5)
            margin = held(t_interval(read[:, 0] - read[:, 1]), true[:, 0] - true[:, 1])
            found[f"held back, {name}{way}"] = held(t_interval(read[:, 0]), true[:, 0])
            found[f"margin, {name}{way}"] = margin
    return found


def coverage(worlds: int) -> list[dict]:
    """A row per interval and kind of world: what it covers at each n, and whether that will do."""
    rows: dict[str, dict] = {}
    for n in NS:
        found = means(10 * worlds, n) | coin_shares(n) | seed_shares(worlds, n)
        found |= correlations(5 * worlds, n) if n >= 4 else {}
        for name, share in (found | picked(2 * worlds, n)).items():
            rows.setdefault(name, {"interval": name})[f"n = {n}"] = round(share, 4)
    for name, row in rows.items():
        shares = [share for key, share in row.items() if key != "interval"]
        no_bar = name.endswith(("skewness 1", "skewness 2", "leave one out"))
        most = 1.0 if name.startswith(("wilson", "paired")) else HIGH
        row["passed"] = None if no_bar else all(LOW <= share <= most for share in shares)
    return list(rows.values())


# silent and planted


def sweep(items: int, cell: tuple[int, int], kind: str) -> Tensor:
    """Scores baseline minus scores of items, [item, prompt, seed], where no item does anything."""
    noise, base = 2 * normal(items, *cell), 2 * normal(1, *cell)
    if kind == "prompt levels":
        level = 5 * normal(1, cell[0], 1)
        noise, base = noise + level, base + level
    if kind == "uneven noise":
        noise = noise * torch.exp(0.7 * normal(items, 1, 1))
    if kind.startswith("skewness"):  # minus chi-square of k degrees: a few low scores
        k = round(8 / float(kind.split()[1]) ** 2)
        noise, base = (
            -2 * (normal(*x.shape, k).square() - 1).sum(-1) / math.sqrt(2 * k)
            for x in (noise, base)
        )
    if kind == "own baselines":
        base = 2 * normal(items, *cell)
    if kind == "items shift prompts":
        noise = noise + 2 * normal(items, cell[0], 1)
    return base - noise


KINDS = ("shared baseline", "own baselines", "prompt levels", "uneven noise", "skewness -1",
         "skewness -2", "items shift prompts")  # fmt: skip


def silent(worlds: int) -> list[dict]:
    """How often anything is found in sweeps where nothing is."""
    rows, most = [], LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / worlds)
    for kind in KINDS:
        for items, cell in SWEEPS:
            found = plain = means = 0
            for _ in range(worlds):
                d, unit = units_of(sweep(items, cell, kind))
                test = max_t(d, unit=unit)
                found += test.verdict == "found"
                plain += bool(t_interval(d[test.best])[0] > 0)
                if d.shape[1] <= 8:
                    means += max_t(d, pooled=1).verdict == "found"
            row = {"world": kind, "items": items, "prompts x seeds": f"{cell[0]} x {cell[1]}"}
            row |= {"unit": unit, "found": found / worlds, "plain interval": plain / worlds}
            row["found by means"] = means / worlds if d.shape[1] <= 8 else None
            barred = kind != "skewness -2" and (kind != "items shift prompts" or unit == "prompt")
            rows.append({**row, "passed": found / worlds <= most if barred else None})
            print(row, file=sys.stderr)
    return rows


def planted(worlds: int) -> list[dict]:
    """How often window 5, of effect 8 (sd 3 between pictures), is found and is the best."""
    rows = []
    for name, beside, uneven in (
        ("alone", 0.0, "shared baseline"),
        ("beside halves of it", 4.0, "shared baseline"),
        ("alone, uneven noise", 0.0, "uneven noise"),
    ):
        for items, cell in SWEEPS:
            exact, only = {0.0: 0, 1 / 3: 0, 1.0: 0}, 0
            for _ in range(worlds):
                d = sweep(items, cell, uneven)
                d[5] += 8 + 3 * normal(*cell)
                d[4], d[6] = d[4] + beside, d[6] + beside
                values, unit = units_of(d)
                for pooled in exact if values.shape[1] <= 8 else (1 / 3,):
                    test = max_t(values, unit=unit, pooled=pooled)
                    exact[pooled] += test.verdict == "found" and test.best == 5
                    if pooled == 1 / 3:
                        only += bool((test.p <= LEVEL).sum() == 1 and test.p[5] <= LEVEL)
            row = {"world": name, "items": items, "prompts x seeds": f"{cell[0]} x {cell[1]}"}
            row |= {"unit": unit, "exact": exact[1 / 3] / worlds}
            row["no other"] = None if beside else only / worlds
            for way, pooled in (("by t", 0.0), ("by means", 1.0)):
                row[f"exact {way}"] = exact[pooled] / worlds if values.shape[1] <= 8 else None
            passed = exact[1 / 3] / worlds >= EXACT if uneven == "shared baseline" else None
            rows.append({**row, "passed": passed})
            print(row, file=sys.stderr)
    return rows


def traced(worlds: int) -> list[dict]:
    """227 sites, 4 prompts x 4 seeds: 20 with effects up to 60, as uneven as they are large."""
    effects = torch.zeros(227, dtype=torch.float64)
    effects[:20] = torch.linspace(3, 60, 20)
    wrong, hits = 0, torch.zeros(20, dtype=torch.float64)
    for _ in range(worlds):
        d = sweep(227, (4, 4), "shared baseline")
        d += effects[:, None, None] * (1 + 0.4 * normal(227, 4, 4))
        values, unit = units_of(d)
        clear = max_t(values, unit=unit).p <= LEVEL
        wrong, hits = wrong + bool(clear[20:].any()), hits + clear[:20]
    by_effect = {
        f"effect {e:.0f}": h / worlds for e, h in zip(effects.tolist(), hits, strict=False)
    }
    shown = {key: round(float(by_effect[key]), 3) for key in list(by_effect)[::4]}
    most = LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / worlds)
    passed = wrong / worlds <= most and float(hits[2:].min()) / worlds >= 0.95
    return [{"a silent site found": wrong / worlds, **shown, "passed": passed}]


def smallest(worlds: int) -> list[dict]:
    """How often the best of 15 windows, which removes a share of an effect of 8, passes."""
    rows = []
    for n in (6, 8, 16):
        for effect, share in ((0, 0.0), (8, 0.0), (8, 0.25), (8, 0.5), (8, 0.75), (8, 1.0)):
            said = 0
            for _ in range(worlds):
                level, size = 25 + 5 * normal(n), effect * (1 + 0.375 * normal(n))
                scores = level + 2 * normal(15, n)
                scores[4] -= share * size
                said += reaches_neutral(scores, level - size + 2 * normal(n), level + 2 * normal(n))
            row = {"units": n, "neutral removes": effect, "window removes": f"{share:.0%}"}
            bar = {0.0: said / worlds <= LEVEL, 1.0: said / worlds >= 0.9}.get(share)
            rows.append({**row, "passes": said / worlds, "passed": bar})
    return rows


def main() -> int:
    """Measure, print, and return 0 if all bars are held."""
    parser = arguments(__doc__)
    parser.add_argument("--worlds", type=int, default=2000, help="of each kind (default: 2000)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict = {}
    parts: tuple[Callable[[int], list[dict]], ...] = (coverage, silent, planted, traced, smallest)
    for part in parts:
        random.manual_seed(0)
        result[part.__name__] = part(args.worlds)
    rows = [row for table in result.values() for row in table]
    result["passed"] = all(row["passed"] is not False for row in rows)
    with pd.option_context("display.width", 200, "display.max_columns", 20):
        tables = [f"{part.__name__}\n{pd.DataFrame(result[part.__name__])}" for part in parts]
    text = "\n\n".join(tables) + f"\n\npassed: {result['passed']}"
    return finish(args, result, n={"worlds": args.worlds}, text=text)


if __name__ == "__main__":
    sys.exit(main())
