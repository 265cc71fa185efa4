"""Does a mini draw what it is told, and use the layers it was planted in? [--json]

Agreement of images with held-out captions, and, over half as many for every planted attribute,
whether the plant holds, is followed, and is removed by its neutral twin; see
`loco_core/worlds/training/measure.py`.
"""

import argparse
import json
import sys

import pandas as pd
import torch

import loco_core as loco
from loco_core.worlds.shapeland.planting import PLANTS
from loco_core.worlds.training.measure import agreement, plant_use

AGREEMENT_BARS = {"style": 0.95, "object": 0.95, "color": 0.95, "place": 0.90, "fact": 0.90}
LEAST_FOLLOWED, MOST_DROPPED = 0.90, 0.03


def measure(model: str, captions: int) -> dict:
    pipe = loco.load(model)
    agrees = agreement(pipe, captions)
    use = plant_use(pipe, PLANTS[model], max(1, captions // 2))
    passed = all(agrees[name] >= bar for name, bar in AGREEMENT_BARS.items()) and all(
        found["follows"] >= LEAST_FOLLOWED and found["agrees"] - found["holds"] <= MOST_DROPPED
        for found in use.values()
    )
    return {"model": model, "captions": captions, "agreement": agrees, "use": use, "passed": passed}


def main() -> int:
    """Measure, print, and return 0 if all bars are held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini-sd", help="a mini (default: mini-sd)")
    parser.add_argument("--captions", type=int, default=200, help="held-out captions")
    parser.add_argument("--bf16", action="store_true", help="sample under bfloat16 autocast")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    loco.progress(not args.json)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        found = measure(args.model, args.captions)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        table = pd.DataFrame({"agreement": found["agreement"]})
        table["bar"] = pd.Series(AGREEMENT_BARS)
        print(table.to_string(na_rep=""), "\n")
        if found["use"]:
            shares = pd.DataFrame(found["use"]).T
            print(shares.drop(columns="layers").to_string(), "\n")
            print(pd.concat({k: pd.DataFrame(v["layers"]).T for k, v in found["use"].items()}))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
