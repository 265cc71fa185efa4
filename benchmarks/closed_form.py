"""Time and error of the closed-form edit on the shapes of Stable Diffusion 1.5: [--json].

Compares, in one process on one set of weights and keys, the released way (for every matrix, the
normal equations and a d x d inverse in float32) with `closed_form.fit` and its application, and
both with a plain copy of the weights. Errors are of the change W' - W against the released way's
equations in float64.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from loco_core.editing.closed_form import fit

WIDTH = 768
HEIGHTS = (320, 320, 640, 640, *[1280] * 6, 640, 640, 640, 320, 320, 320)  # execution order
LAM = 0.01


def clip_like(rows: int, seed: int) -> Tensor:
    """Rows as long (28) and as alike (cosine 0.8) as CLIP's last hidden states."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    return 0.8**0.5 * common + 0.2**0.5 * torch.randn(rows, WIDTH, generator=random)


def released(weights: list[Tensor], keys: Tensor, targets: Tensor) -> list[Tensor]:
    """W' = (lam W + sum (W g) c^T) (lam I + sum c c^T)^-1, every matrix on its own."""
    edited = []
    for W in weights:
        left, right = LAM * W, LAM * torch.eye(WIDTH, dtype=W.dtype)
        for c, g in zip(keys, targets, strict=True):
            left = left + torch.outer(W @ g, c)
            right = right + torch.outer(c, c)
        edited.append(left @ torch.inverse(right))
    return edited


def ours(weights: list[Tensor], keys: Tensor, targets: Tensor) -> list[Tensor]:
    change = fit(keys, targets, LAM)
    return [change.apply_to(W) for W in weights]


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall-clock time of `call` after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(rows: int, repeats: int) -> dict[str, float | int]:
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(h, WIDTH, generator=random) / WIDTH**0.5 for h in HEIGHTS * 2]
    keys, targets = clip_like(rows, seed=2), clip_like(rows, seed=3)
    exact = released([W.double() for W in weights], keys.double(), targets.double())

    def error(edited: list[Tensor]) -> float:
        changes = zip(edited, exact, weights, strict=True)
        return max(((e - x).norm() / (x - W).norm()).item() for e, x, W in changes)

    return {
        "matrices": len(weights),
        "rows": rows,
        "threads": torch.get_num_threads(),
        "released_s": seconds(lambda: released(weights, keys, targets), repeats),
        "factors_s": seconds(lambda: fit(keys, targets, LAM), repeats),
        "ours_s": seconds(lambda: ours(weights, keys, targets), repeats),
        "copy_s": seconds(lambda: [W.clone() for W in weights], repeats),
        "released_error": error(released(weights, keys, targets)),
        "ours_error": error(ours(weights, keys, targets)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rows", type=int, default=4, help="prompt pairs (default: 4)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default: 5)")
    options = parser.parse_args()
    found = measure(options.rows, options.repeats)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['matrices']} matrices, {found['rows']} rows, {found['threads']} threads")
    print("                         seconds   error of the change")
    print(f"released, d x d float32  {found['released_s']:.4f}    {found['released_error']:.1e}")
    print(f"ours, factors only       {found['factors_s']:.4f}")
    print(f"ours, weights edited     {found['ours_s']:.4f}    {found['ours_error']:.1e}")
    print(f"copying the weights      {found['copy_s']:.4f}")
    print(f"{found['released_s'] / found['ours_s']:.0f} times faster than released")


if __name__ == "__main__":
    main()
