"""LocoGen and LocoEdit against the known answer, over every style and every object. [--json]

- Localisation: the share of concepts for which the sweep returns exactly the planted layers.
- Editing: for every style, edited at the found layers, the judge's rate of that style on held-out
  prompts, of the other styles, and of the object of the same images; for each choice of tokens.
"""

import argparse
import inspect
import json
import sys
from random import Random

import pandas as pd
import torch

import loco_core as loco
from loco_core.editing.rows import TOKENS
from loco_core.shapeland import ATTRIBUTES, Scene, concept, describe, held_out_scenes, judge

FOUND_BAR, ERASED_BAR, SPARED_BAR = 0.95, 0.10, 0.03


def localise(
    pipe, truth: dict, kinds: tuple[str, ...], prompts: int, seeds: int, steps: int
) -> pd.DataFrame:
    """A row per concept: found and planted layers."""
    rows = []
    for kind in kinds:
        for name in ATTRIBUTES[kind]:
            asked = concept(kind, name, prompts)
            found = loco.localize(
                pipe, asked, window=2, seeds=range(seeds), steps=steps, batch_size=32
            )
            rows.append({"kind": kind, "name": name, "found": list(found.layers)})
            rows[-1]["exact"] = rows[-1]["found"] == truth[kind]
    return pd.DataFrame(rows)


def held_out(style: str | None, count: int) -> list[Scene]:
    """Held-out scenes with an object, painted by one artist; by all in turn if none is named."""
    rng = Random(f"edit {style}")
    scenes = [s for s in held_out_scenes(40 * count, seed=7) if s.object]
    if style:
        scenes = [s for s in scenes if s.style == style]
    return rng.sample(scenes, count)


def edit_style(
    pipe, style: str, layers: list[int], count: int, steps: int, lam: float
) -> list[dict]:
    """A row per choice of tokens: rates before and after removing `style`, on captions of its own
    and on as many of the other styles."""
    own = held_out(style, count)
    others = [s for s in held_out(None, 2 * count) if s.style != style][:count]
    scenes = own + others
    prompts = [describe(scene) for scene in scenes]

    def rates() -> dict[str, float]:
        seen = judge(loco.generate(pipe, prompts, steps=steps, batch_size=50))
        same = [seen["style"][i] == s.style for i, s in enumerate(scenes)]
        objects = [seen["object"][i] == s.object for i, s in enumerate(scenes)]
        return {
            "style": sum(same[:count]) / count,
            "others": sum(same[count:]) / len(others),
            "object": sum(objects[:count]) / count,
        }

    before, rows = rates(), []
    for tokens in TOKENS:
        edit = loco.locoedit(pipe, concept("style", style), layers, lam, tokens=tokens)
        with edit.applied(pipe):
            after = rates()
        row = {"style": style, "tokens": tokens}
        for name in before:
            row |= {f"{name} before": before[name], f"{name} after": after[name]}
        rows.append(row)
    return rows


def main() -> int:
    """Measure, print, and return 0 if all bars are held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini-sd", help="a mini (default: mini-sd)")
    parser.add_argument("--prompts", type=int, default=2, help="prompts per sweep")
    parser.add_argument("--seeds", type=int, default=4, help="seeds per prompt of a sweep")
    parser.add_argument("--steps", type=int, default=12, help="steps per image")
    parser.add_argument("--count", type=int, default=25, help="held-out captions per style")
    parser.add_argument("--lam", type=float, default=4.0, help="of the edit (squared key: 128)")
    parser.add_argument("--bf16", action="store_true", help="sample under bfloat16 autocast")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    loco.progress(not args.json)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        result = measure(args)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(pd.DataFrame(result["sweep"]).to_string())
        print(f"exactly the plant: {result['exact']:.1%} (bar {FOUND_BAR:.0%})")
        print(pd.DataFrame(result["edits"]).round(3).to_string())
        print(pd.DataFrame(result["means"]).T.round(3).to_string())
        print(f"default tokens: {result['default_tokens']}; passed: {result['passed']}")
    return 0 if result["passed"] else 1


def measure(args: argparse.Namespace) -> dict:
    """All figures, and whether the bars are held (editing: by the default tokens)."""
    pipe, truth = loco.load(args.model), loco.shapeland.truth(args.model)
    sweep = localise(pipe, truth, ("style", "object"), args.prompts, args.seeds, args.steps)
    where = sweep[sweep.kind == "style"].set_index("name").found
    edits = pd.DataFrame(
        row
        for style in ATTRIBUTES["style"]
        for row in edit_style(pipe, style, where[style], args.count, args.steps, args.lam)
    )
    default = inspect.signature(loco.locoedit).parameters["tokens"].default
    means = edits.drop(columns="style").groupby("tokens", sort=False).mean()
    best = means.loc[default]
    passed = (
        sweep.exact.mean() >= FOUND_BAR
        and edits[edits.tokens == default]["style after"].max() <= ERASED_BAR
        and best["others before"] - best["others after"] <= SPARED_BAR
        and best["object before"] - best["object after"] <= SPARED_BAR
    )
    return {
        "model": args.model,
        "lam": args.lam,
        "exact": float(sweep.exact.mean()),
        "sweep": sweep.to_dict("records"),
        "default_tokens": default,
        "edits": edits.to_dict("records"),
        "means": means.round(4).to_dict("index"),
        "passed": bool(passed),
    }


if __name__ == "__main__":
    sys.exit(main())
