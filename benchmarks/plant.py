"""Does a mini draw what it is told, and use the layers it was planted in?

    python benchmarks/plant.py --record results/plant.json

Agreement of images with held-out captions, and, over half as many for every planted attribute,
whether the plant holds, is followed, and is removed by its neutral twin; see
`loco_core/worlds/training/measure.py`.
"""

import sys

import pandas as pd
import torch
from common import arguments, finish

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
    parser = arguments(__doc__)
    parser.add_argument("--model", default="mini-sd", help="a mini (default: mini-sd)")
    parser.add_argument("--captions", type=int, default=200, help="held-out captions")
    parser.add_argument("--bf16", action="store_true", help="sample under bfloat16 autocast")
    args = parser.parse_args()
    loco.progress(not args.json)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        found = measure(args.model, args.captions)
    return finish(args, found, n={"captions": args.captions}, text=_text(found))


def _text(found: dict) -> str:
    """Tables for a reader."""
    table = pd.DataFrame({"agreement": found["agreement"]})
    table["bar"] = pd.Series(AGREEMENT_BARS)
    parts = [table.to_string(na_rep="")]
    if found["use"]:
        parts.append(pd.DataFrame(found["use"]).T.drop(columns="layers").to_string())
        layers = {k: pd.DataFrame(v["layers"]).T for k, v in found["use"].items()}
        parts.append(pd.concat(layers).to_string())
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
