"""What routing costs, and whether a routed batch is exact.

    python benchmarks/routing.py [--json] [--record results/routing.json] [--model mini-sd]

Two figures, each with its bar: the time of a LocoGen sweep sampled as one routed batch over the
time of a plain batch of as many rows (at most 1.05), and the largest difference between the routed
batch and the same windows sampled one at a time (at most 1e-4, float32).
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import arguments, finish

import loco_core as loco
from loco_core.families import family_of
from loco_core.interventions.routing import windows
from loco_core.painting import Picture, Sampling
from loco_core.painting.batch import paint_batch
from loco_core.records import model_name

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
) -> dict[str, Any]:
    """The two figures for `model` with the pair `prompts` (original, neutral)."""
    pipe = loco.load(model, device=device)
    masks = windows(len(loco.text_layers(pipe)), window).long()
    src = torch.cat([torch.zeros_like(masks[:1]), torch.ones_like(masks[:1]), masks])
    rows = [prompts[0]] * len(src)
    run: dict[str, Any] = dict(seeds=[0], steps=steps, batch_size=len(src))

    def routed() -> torch.Tensor:
        return loco.generate(pipe, rows, routes=src, sources=prompts, **run)

    def plain() -> torch.Tensor:
        seeds = range(len(src))  # a picture that is asked for twice is painted once
        return loco.generate(pipe, rows[:1], **run | {"seeds": seeds})

    pictures = [
        Picture(prompts[0], reads=tuple((layer, prompts[1]) for layer in layers))
        for layers in (row.nonzero().flatten().tolist() for row in src)
    ]
    once = partial(paint_batch, family_of(pipe), sampling=Sampling(steps))  # not on the 8-bit grid
    batch, single = once(pictures), torch.cat([once([picture]) for picture in pictures])
    routed()
    plain()  # both have run once before the clock starts
    pairs = [(seconds(routed, pipe.device), seconds(plain, pipe.device)) for _ in range(repeats)]
    difference = float((batch - single).abs().max())
    ratio = statistics.median(a / b for a, b in pairs)
    return {
        "model": model_name(pipe),
        "rows": len(src),
        "window": window,
        "steps": steps,
        "device": str(pipe.device),
        "routed_seconds": min(a for a, _ in pairs),
        "plain_seconds": min(b for _, b in pairs),
        "cost_ratio": ratio,
        "cost_bar": COST_BAR,
        "max_abs_difference": difference,
        "difference_bar": DIFFERENCE_BAR,
        "passed": ratio <= COST_BAR and difference <= DIFFERENCE_BAR,
    }


def main() -> int:
    """Measure, print, and return 0 if both bars are held."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="mini-sd", help="a mini, a folder or a Hub id")
    parser.add_argument("--prompt", default="a red star", help="the original prompt")
    parser.add_argument("--neutral", default="a star", help="its neutral twin")
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    loco.progress(False)
    found = measure(
        args.model, [args.prompt, args.neutral], args.window, args.steps, args.repeats, args.device
    )
    text = (
        f"{found['model']}: {found['rows']} rows, {found['steps']} steps, {found['device']}\n"
        f"routed / plain     {found['cost_ratio']:.3f}  (bar {COST_BAR})\n"
        f"batch - one by one {found['max_abs_difference']:.1e}  (bar {DIFFERENCE_BAR:.0e})"
    )
    return finish(args, found, n={"rows": found["rows"], "repeats": args.repeats}, text=text)


if __name__ == "__main__":
    sys.exit(main())
