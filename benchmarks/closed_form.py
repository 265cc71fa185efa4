"""What the closed-form edit costs, against the released algorithm and one pass over the weights.

    python benchmarks/closed_form.py --record results/closed_form.json [--only sd15] [--estimate]

On the shapes of three models, in one process, on the same weights and CLIP-like rows:

    released      every matrix its own float32 normal equations, row by row, and d x d inverse
    hoisted       the same loop with the inverse, which no matrix changes, computed once
    factors       ours, `fit` alone: the map that all matrices share
    materialised  ours, `fit` and then `LowRankMap.apply_to` on every weight
    floor         `copy_` of every weight: the cheapest pass that reads it and writes a new one

All of them write into tensors that exist before the clock starts, so no one pays for fresh memory.
Each fast way is timed --repeats times in turn with the floor and the minimum counts; the released
loop is timed once and the hoisted one twice. Both are timed whole, for up to 8 rows. For more rows
they take up to an hour: --estimate times one matrix of each shape instead, times their number.
Seconds are of the wall clock; the processor's, summed over threads, is shown beside them: where the
released loop took much more of the wall than of the processor, another program was in its way.

Peak memory is the growth of the resident set, from the kernel's high-water mark (Linux only). The
error is that of W' - W against the d x d normal equations in float64, on one matrix of each shape.
The exit status is 0 only if every bar was measured and holds; all of them are of SD-XL.
"""

import os

# A thread that waits spins for a moment only: beside another program it holds the core of the one
# it waits for.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import sys  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterable  # noqa: E402

import torch  # noqa: E402
from common import arguments, finish, seconds, settings_of, with_peak  # noqa: E402
from safetensors.torch import save  # noqa: E402
from torch import Tensor  # noqa: E402

from loco_core.closed_form.solver import fit  # noqa: E402

# Width of the text embedding, and out width of to_k (and of to_v) by layer in execution order.
SD = [320] * 2 + [640] * 2 + [1280] * 6 + [640] * 3 + [320] * 3
SHAPES = {
    "sd15": (768, SD),
    "sd21": (1024, SD),
    "sdxl": (2048, [640] * 4 + [1280] * 60 + [640] * 6),
}
ROWS = [(4, 4), (40, 40), (400, 400), (100, 900)]  # edited, preserved: 1, 10, 100 concepts of 4
WHOLE = 8  # rows up to which the slow ways are timed on every matrix
LAM = 0.01
BARS = [  # name, the largest or smallest allowed figure
    ("sdxl, 4 rows: released / materialised", ">=", 100.0),
    ("sdxl, 4 rows: hoisted / materialised", ">=", 20.0),
    ("sdxl, 4 rows: materialised / floor", "<=", 3.0),
    ("sdxl, 4 rows: relative error of W' - W", "<=", 1e-5),
    ("sdxl, 100 + 900 rows: seconds of factors", "<=", 1.5),
    ("width 768, 48 + 8000 rows: seconds of factors", "<=", 1.0),
    ("width 768, 48 + 8000 rows: MiB of factors", "<=", 200.0),
]


def clip_like(rows: int, width: int, seed: int) -> Tensor:
    """Rows as long (28 at width 768) and as alike (cosine 0.8) as CLIP's last hidden states."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    return 0.8**0.5 * common + 0.2**0.5 * torch.randn(rows, width, generator=random)


def released(W: Tensor, C: Tensor, G: Tensor, inverse: Tensor | None = None) -> Tensor:
    """W' = (lam W + sum (W g) c^T) (lam I + sum c c^T)^-1; C, G: [row, d]."""
    left = LAM * W
    for c, g in zip(C, G, strict=True):
        left = left + torch.outer(W @ g, c)
    return left @ (inverse_of(C) if inverse is None else inverse)


def inverse_of(C: Tensor) -> Tensor:
    right = LAM * torch.eye(C.shape[1])
    for c in C:
        right = right + torch.outer(c, c)
    return torch.inverse(right)


def exact_change(W: Tensor, C: Tensor, G: Tensor) -> Tensor:
    """W' - W = W (G - C)^T C (lam I + C^T C)^-1 with the d x d matrix, in float64."""
    W, C, G = W.double(), C.double(), G.double()
    right = LAM * torch.eye(C.shape[1], dtype=torch.float64) + C.T @ C
    return torch.linalg.solve(right, (W @ (G - C).T) @ C, left=False)


def measure(model: str, n: int, p: int, repeats: int, estimate: bool, weights, new) -> dict:
    """One case: n edited and p preserved rows on the weights of `model`, written into `new`."""
    width = SHAPES[model][0]
    keys, targets, preserve = (clip_like(k, width, s) for k, s in ((n, 1), (n, 2), (p, 3)))
    C, G = torch.cat([keys, preserve]), torch.cat([targets, preserve])
    heights = Counter(len(W) for W in weights)
    sample = [next(i for i, W in enumerate(weights) if len(W) == h) for h in heights]
    changes = [exact_change(weights[i], C, G) for i in sample]

    def factors():
        return fit(keys, targets, LAM, preserve=preserve)

    def materialised():
        change = factors()
        for W, out in zip(weights, new, strict=True):
            change.apply_to(W, out=out)

    def floor():
        for W, out in zip(weights, new, strict=True):
            out.copy_(W)

    def error() -> float:
        pairs = zip(sample, changes, strict=True)
        return max(
            float((new[i].double() - weights[i].double() - dW).norm() / dW.norm())
            for i, dW in pairs
        )

    def loop(inverse: Tensor | None, chosen: Iterable[int]) -> None:
        for i in chosen:
            new[i].copy_(released(weights[i], C, G, inverse))

    took: dict[str, list[tuple[float, float]]] = {}
    peak: dict[str, float | None] = {}
    errors: dict[str, float] = {}

    def once(name: str, call: Callable[[], object]) -> None:
        first, peak[name] = with_peak(call)
        took.setdefault(name, []).append(first)

    fast = {"floor": floor, "factors": factors, "materialised": materialised}
    for name, call in fast.items():
        once(name, call)
    errors["materialised"] = error()
    if len(C) <= WHOLE:
        every = range(len(weights))
        for _ in range(2):
            once("hoisted", lambda: loop(inverse_of(C), every))
        errors["hoisted"] = error()
        once("released", lambda: loop(None, every))
        errors["released"] = error()
    elif estimate:
        inverse = inverse_of(C)
        alone = seconds(lambda: inverse_of(C))
        for name, known, extra in (("hoisted", inverse, alone), ("released", None, (0.0, 0.0))):
            parts = [extra]
            for i in sample:
                once(name, lambda i=i, known=known: loop(known, [i]))
                parts.append([t * heights[len(weights[i])] for t in took[name].pop()])
            took[name] = [tuple(map(sum, zip(*parts, strict=True)))]
            errors[name] = error()
    for _ in range(repeats):
        for name, call in fast.items():
            took[name].append(seconds(call))
    change = factors()
    return {
        "model": model,
        "matrices": len(weights),
        "weights": sum(W.numel() for W in weights),
        "width": width,
        "edited": n,
        "preserved": p,
        "seconds": {name: min(wall for wall, _ in runs) for name, runs in took.items()},
        "processor_seconds": {name: min(cpu for _, cpu in runs) for name, runs in took.items()},
        "estimated": [name for name in ("released", "hoisted") if name in took and len(C) > WHOLE],
        "peak_mib": peak,
        "error": errors,
        "bytes": {
            "factors": len(save({"D": change.D, "R": change.R})),
            "weights": sum(W.nbytes for W in weights),
        },
    }


def many_rows(repeats: int) -> dict:
    """`fit` where rows outnumber features: by d x d moments."""
    keys, targets, preserve = (clip_like(k, 768, s) for k, s in ((48, 1), (48, 2), (8000, 3)))

    def factors() -> None:
        fit(keys, targets, LAM, preserve=preserve)

    runs = [with_peak(factors) for _ in range(max(1, repeats // 3))]
    peaks = [peak for _, peak in runs if peak is not None]
    return {"seconds": min(took[0] for took, _ in runs), "peak_mib": max(peaks, default=None)}


def bars(cases: list[dict], many: dict) -> list[dict]:
    """Every bar with its figure; None where the case was not run."""
    found = {(c["model"], c["edited"], c["preserved"]): c for c in cases}
    figures: list[float | None] = [None] * len(BARS)
    if few := found.get(("sdxl", 4, 4)):
        s = few["seconds"]
        ratios = (s["released"], s["materialised"]), (s["hoisted"], s["materialised"])
        figures[:2] = [a / b for a, b in ratios]
        figures[2] = s["materialised"] / s["floor"]
        figures[3] = few["error"]["materialised"]
    if thousand := found.get(("sdxl", 100, 900)):
        figures[4] = thousand["seconds"]["factors"]
    figures[5:] = [many["seconds"], many["peak_mib"]]
    return [
        {
            "name": name,
            "figure": figure,
            "bar": f"{sign} {bar:g}",
            "passed": figure is not None and (figure >= bar if sign == ">=" else figure <= bar),
        }
        for (name, sign, bar), figure in zip(BARS, figures, strict=True)
    ]


def show(case: dict) -> str:
    """One case as a small table."""
    lines = [
        f"\n{case['model']}: {case['matrices']} matrices, {case['weights'] / 1e6:.1f} M weights, "
        f"{case['edited']} edited + {case['preserved']} preserved rows",
        "                 seconds  processor s  peak MiB  error of W' - W",
    ]
    for name in ("released", "hoisted", "factors", "materialised", "floor"):
        if name not in case["seconds"]:
            lines.append(f"  {name:12} not measured beyond {WHOLE} rows, see --estimate")
            continue
        peak, error = case["peak_mib"][name], case["error"].get(name)
        lines.append(
            f"  {name:12} {case['seconds'][name]:9.4f}  {case['processor_seconds'][name]:11.4f}"
            f" {'' if peak is None else peak:>9}"
            f"  {'' if error is None else f'{error:.1e}':9}"
            f"{'estimated' if name in case['estimated'] else ''}".rstrip()
        )
    size = case["bytes"]
    lines.append(
        f"  on disk      {size['factors']:,} bytes of factors for {size['weights']:,} of weights, "
        f"{size['weights'] / size['factors']:.0f} to 1"
    )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and return 0 if every bar was measured and holds."""
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=SHAPES, help="one model; the bars need sdxl")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds (default: 9)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument(
        "--estimate",
        action="store_true",
        help=f"beyond {WHOLE} rows, time the slow ways on one matrix of each shape",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    many, cases = many_rows(args.repeats), []
    for model in [args.only] if args.only else SHAPES:
        width, heights = SHAPES[model]
        random = torch.Generator().manual_seed(4)
        weights = [
            torch.randn(h, width, generator=random) / width**0.5 for h in heights for _ in "kv"
        ]
        new = [torch.zeros_like(W) for W in weights]
        for n, p in ROWS:
            cases.append(measure(model, n, p, args.repeats, args.estimate, weights, new))
    held = bars(cases, many)
    result = {"settings": settings_of(args) | {"lam": LAM}, "cases": cases, "many_rows": many}
    result |= {"bars": held, "passed": all(bar["passed"] for bar in held)}
    lines = [show(case) for case in cases] + [""]
    for bar in held:
        figure = "not measured" if bar["figure"] is None else f"{bar['figure']:.3g}"
        verdict = "passed" if bar["passed"] else "FAILED"
        lines.append(f"{bar['name']:46} {figure:>12}  (bar {bar['bar']})  {verdict}")
    n = {"repeats": args.repeats, "repeats of many rows": max(1, args.repeats // 3)}
    return finish(args, result, n=n, text="\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
