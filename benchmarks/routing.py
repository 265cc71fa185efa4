"""What routing costs, and whether a routed batch is exact.

    python benchmarks/routing.py [--json] [--model mini-sd]

Two figures, each with its bar: the time of a LocoGen sweep sampled as one routed batch over the
time of a plain batch of as many rows (at most 1.05), and the largest difference between the routed
batch and the same windows sampled one at a time (at most 1e-4, float32).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import loco_core as loco  # noqa: E402
from loco_core.interventions.routing import windows
from loco_core.records import model_name, versions

COST_BAR, DIFFERENCE_BAR = 1.05, 1e-4


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call: of the processor on a CPU, where other programs may run beside this one,
    and of the wall clock, idle at both ends, on a GPU."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def measure(
    model: str, prompts: list[str], window: int, steps: int, repeats: int, device: str | None
) -> dict[str, object]:
    """The two figures for `model` with the pair `prompts` (original, neutral)."""
    pipe = loco.load(model, device=device)
    layers = len(loco.text_layers(pipe))
    masks = windows(layers, window).long()
    src = torch.cat([torch.zeros(1, layers).long(), torch.ones(1, layers).long(), masks])
    rows = [prompts[0]] * len(src)
    run = dict(seeds=[0], steps=steps, batch_size=len(src))

    def routed() -> torch.Tensor:
        return loco.generate(pipe, rows, routes=src, sources=prompts, **run)

    def plain() -> torch.Tensor:
        return loco.generate(pipe, rows, **run)

    batch = routed()
    single = [
        loco.generate(pipe, rows[:1], routes=row[None], sources=prompts, **run)[0] for row in src
    ]
    plain()  # both have run once before the clock starts
    pairs = [(seconds(routed, pipe.device), seconds(plain, pipe.device)) for _ in range(repeats)]
    difference = float((batch - torch.stack(single)).abs().max())
    ratio = statistics.median(a / b for a, b in pairs)
    return {
        "model": model_name(pipe),
        "rows": len(src),
        "window": window,
        "steps": steps,
        "device": str(pipe.device),
        "threads": torch.get_num_threads(),
        "routed_seconds": min(a for a, _ in pairs),
        "plain_seconds": min(b for _, b in pairs),
        "cost_ratio": ratio,
        "cost_bar": COST_BAR,
        "max_abs_difference": difference,
        "difference_bar": DIFFERENCE_BAR,
        "passed": ratio <= COST_BAR and difference <= DIFFERENCE_BAR,
        "versions": versions(),
    }


def main() -> int:
    """Measure, print, and return 0 if both bars are held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini-sd", help="a mini, a folder or a Hub id")
    parser.add_argument("--prompt", default="a red star", help="the original prompt")
    parser.add_argument("--neutral", default="a star", help="its neutral twin")
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    loco.progress(False)
    found = measure(
        args.model, [args.prompt, args.neutral], args.window, args.steps, args.repeats, args.device
    )
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{found['model']}: {found['rows']} rows, {found['steps']} steps, {found['device']}")
        print(f"routed / plain     {found['cost_ratio']:.3f}  (bar {COST_BAR})")
        print(f"batch - one by one {found['max_abs_difference']:.1e}  (bar {DIFFERENCE_BAR:.0e})")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
