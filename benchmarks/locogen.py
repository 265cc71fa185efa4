"""LocoGen against the known answer, over every style and every object.

    python benchmarks/locogen.py --record results/locogen.json

The share of concepts for which the sweep finds exactly the planted layers: the lowest window is the
plant, and it passes the test of all windows. The window is as wide as the plant.
"""

import argparse
import sys

import pandas as pd
import torch
from common import arguments, finish

import loco_core as loco
from loco_core.statistics import wilson
from loco_core.worlds.shapeland import ATTRIBUTES, concept

BARS = {"mini-sd": 0.95, "mini-sdxl": 0.90}


def localise(
    pipe, truth: dict, kinds: tuple[str, ...], prompts: int, seeds: int, steps: int
) -> pd.DataFrame:
    """A row per concept: what was found, the lowest window, its adjusted p."""
    rows = []
    for kind in kinds:
        for name in ATTRIBUTES[kind]:
            asked = concept(kind, name, prompts)
            window = len(truth[kind])
            found = loco.localize(
                pipe, asked, window=window, seeds=range(seeds), steps=steps, batch_size=32
            )
            rows.append(
                {
                    "kind": kind,
                    "name": name,
                    "found": list(found.layers),
                    "best": list(found.best),
                    "p": float(found.test.p[found.test.best]),
                }
            )
            rows[-1]["exact"] = rows[-1]["found"] == truth[kind]
    return pd.DataFrame(rows)


def main() -> int:
    """Measure, print, and return 0 if the bar is held."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="mini-sd", choices=BARS, help="default: mini-sd")
    parser.add_argument("--prompts", type=int, default=4, help="prompts per sweep")
    parser.add_argument("--seeds", type=int, default=2, help="seeds per prompt of a sweep")
    parser.add_argument("--steps", type=int, default=12, help="steps per image")
    parser.add_argument("--bf16", action="store_true", help="sample under bfloat16 autocast")
    args = parser.parse_args()
    loco.progress(not args.json)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        result = measure(args)
    n = {"concepts": len(result["sweep"]), "prompts": args.prompts, "seeds": args.seeds}
    text = f"{pd.DataFrame(result['sweep']).to_string()}\nexactly the plant: {result['exact']:.1%}"
    return finish(args, result, n=n, text=f"{text} (bar {result['bar']:.0%})")


def measure(args: argparse.Namespace) -> dict:
    """All figures, and whether the bar is held."""
    pipe, truth = loco.load(args.model), loco.shapeland.truth(args.model)
    sweep = localise(pipe, truth, ("style", "object"), args.prompts, args.seeds, args.steps)
    exact = float(sweep.exact.mean())
    low, high = wilson(exact, len(sweep))
    return {
        "model": args.model,
        "exact": exact,
        "interval": [round(float(low), 4), round(float(high), 4)],
        "bar": BARS[args.model],
        "sweep": sweep.to_dict("records"),
        "passed": exact >= BARS[args.model],
    }


if __name__ == "__main__":
    sys.exit(main())
