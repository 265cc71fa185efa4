"""How many neurons carry a concept, by the judge, on held-out captions.

    python benchmarks/neurons.py --record results/neurons.json

First a way to rank them is chosen, on captions of the training split: of all in `RANKINGS` the one
with which a tenth of the neurons leaves least of a few styles; objects are ranked by it, too. Only
it, and the paper's, is then asked of held-out captions, none of which had a part in the choice.

For every style and a few objects: the judge's rate of the concept, of the other names of its kind,
and of what else the same pictures show, with the first k neurons of the planted layers held at
their neutral mean. From that, the smallest k that brings the concept to 15 % or less while the rest
of the picture loses no more than 5 points. Beside it, at 10 % of the neurons of the located layers:
the paper's ranking, zero instead of the mean, as many random ones, the same ranking in layers that
were not planted; and the whole layers, by LocoGen's swap and by LocoEdit. Bar: every style needs no
more than 10 % of the neurons.
"""

import argparse
import sys
from dataclasses import replace
from random import Random

import pandas as pd
import torch
from common import arguments, finish, settings_of

import loco_core as loco
from loco_core.statistics import paired_shares, wilson
from loco_core.worlds.shapeland import ATTRIBUTES, Scene, concept, describe, held_out_scenes, judge
from loco_core.worlds.shapeland.vocabulary import is_held_out, random_scene

SHARE_BAR, ERASED_BAR, SPARED_BAR = 0.10, 0.15, 0.05
BESIDE = {"style": "object", "object": "style"}  # what else the same pictures show
OBJECTS = ("star", "fish", "house")
WRONG = {"style": [6, 7], "object": [8, 9]}  # planted for the other kind

#: Ways to rank, as keyword arguments of `rank_neurons`; "artists" has other names as neutral.
RANKINGS = {
    "as in the paper": {"token": "last"},
    "mean of the words": {"token": "all"},
    "end of the text": {"token": "eos"},
    "padding": {},
    "to_v": {"where": ["to_v"]},
    "to_v, against other names": {"where": ["to_v"], "neutral": "others"},
    "to_v, by shift, end of the text": {"where": ["to_v"], "by": "shift", "token": "eos"},
    "to_v, by shift": {"where": ["to_v"], "by": "shift"},
}
PAPER = "as in the paper"


def choose(pipe, args: argparse.Namespace) -> tuple[str, list[dict]]:
    """The way to rank that leaves least of some styles, by captions of the training split."""
    layers, rng = loco.shapeland.truth(args.model)["style"], Random("neurons, to choose")
    tenth = int(SHARE_BAR * located(pipe, layers))
    rows = []
    for name in args.choose:
        one = concept("style", name, args.prompts)
        known, scenes = {p.lower() for p in one.prompts}, list[Scene]()
        while len(scenes) < args.choose_count:
            scene = replace(random_scene(rng, full=True), style=name)
            told = describe(scene).lower()
            if scene.object and not is_held_out(scene) and told not in known:
                scenes.append(scene)
        for ranking in RANKINGS:
            with ranked(pipe, one, layers, ranking).ablated(pipe, tenth):
                left = answers(pipe, scenes, args)["style"].count(name) / len(scenes)
            rows.append({"ranking": ranking, "name": name, "left": left})
    means = pd.DataFrame(rows).groupby("ranking", sort=False)["left"].mean()
    return str(means.idxmin()), rows


def captions(kind: str, names: list[str], args: argparse.Namespace) -> dict[str, list[Scene]]:
    """Held-out scenes of every name of a kind, of which no ranking has seen a prompt."""
    known = {p.lower() for name in names for p in concept(kind, name, args.prompts).prompts}
    pool = [s for s in held_out_scenes(1200, seed=8) if s.object and s.style]
    pool = [s for s in pool if describe(s).lower() not in known]
    pick = Random(f"neurons {kind}").sample
    return {
        name: pick([s for s in pool if s.get(kind) == name], args.count)
        for name in ATTRIBUTES[kind]
    }


def ranked(pipe, one: loco.Concept, layers: list[int], ranking: str) -> loco.Neurons:
    """The neurons of `layers`, ranked in one of the ways of `RANKINGS`."""
    settings = dict(RANKINGS[ranking])
    if settings.get("neutral") == "others":
        settings["neutral"] = one.renamed([x for x in ATTRIBUTES[one.kind] if x != one.name])
    return loco.rank_neurons(pipe, one, layers, **settings)


def swapped(pipe, scenes: list[Scene], kind: str, layers: list[int], args) -> dict:
    """The judge's answers after LocoGen's swap: `layers` read the captions without the concept."""
    texts = [describe(s, i) for i, s in enumerate(scenes)]
    twins = [describe(s.without(kind), i) for i, s in enumerate(scenes)]
    routes = torch.arange(len(texts))[:, None].repeat(1, len(loco.text_layers(pipe)))
    routes[:, layers] += len(texts)
    made = loco.generate(pipe, texts, steps=args.steps, routes=routes, sources=[*texts, *twins])
    return judge(made)


def answers(pipe, scenes: list[Scene], args: argparse.Namespace) -> dict:
    """What the judge sees in pictures of `scenes`."""
    return judge(
        loco.generate(pipe, [describe(s, i) for i, s in enumerate(scenes)], steps=args.steps)
    )


def rates(seen: dict, before: dict, scenes: list[Scene], kind: str, own: int) -> dict:
    """Of the first `own` scenes, those of the concept, and of the others: what is still shown."""
    beside = BESIDE[kind]

    def hits(found: dict, attribute: str) -> torch.Tensor:
        right = [name == scenes[i].get(attribute) for i, name in enumerate(found[attribute])]
        return torch.tensor(right, dtype=torch.float64)

    shown, kept, was = hits(seen, kind), hits(seen, beside), hits(before, beside)[: len(seen[kind])]
    row = {"shown": shown[:own].mean().item(), "kept": kept.mean().item()}
    row["shown low"], row["shown high"] = wilson(row["shown"], own)
    row["lost"] = (was - kept).mean().item()
    low, high = paired_shares(was - kept)
    row["lost low"], row["lost high"] = low, high
    if len(shown) > own:
        others = hits(before, kind)[own:]
        row["others before"], row["others"] = others.mean().item(), shown[own:].mean().item()
    return row


def one_concept(
    pipe, kind: str, name: str, scenes: list[Scene], chosen: str, args: argparse.Namespace
) -> list[dict]:
    """A row for every number of neurons, and for every control, of one concept."""
    layers = loco.shapeland.truth(args.model)[kind]
    one = concept(kind, name, args.prompts)
    others = [x for x in ATTRIBUTES[kind] if x != name]
    before = answers(pipe, scenes, args)
    rows = []

    def note(what: str, k: int | None, seen: dict) -> None:
        told = rates(seen, before, scenes, kind, args.count)
        rows.append({"kind": kind, "name": name, "what": what, "k": k, **told})

    def held(what: str, neurons: loco.Neurons, k: int, mode: str = "neutral_mean") -> None:
        with neurons.ablated(pipe, k, mode):
            note(what, k, answers(pipe, scenes, args))

    note("unedited", 0, before)
    best = ranked(pipe, one, layers, chosen)
    for k in args.tops:
        held("chosen", best, k)
    if args.controls:
        tenth = int(SHARE_BAR * located(pipe, layers))
        held(PAPER, ranked(pipe, one, layers, PAPER), tenth)
        held("at zero", best, tenth, "zero")
        held("random", best.shuffled(), tenth)
        held("other layers", ranked(pipe, one, WRONG[kind], chosen), tenth)
        note("swap (LocoGen)", None, swapped(pipe, scenes[: args.count], kind, layers, args))
        spare = [*one.neutral, *one.renamed(others)]
        with loco.locoedit(pipe, one, layers, lam=20, preserve=spare).applied(pipe):
            note("LocoEdit", None, answers(pipe, scenes, args))
    return rows


def located(pipe, layers: list[int]) -> int:
    """How many neurons the to_k and to_v of `layers` have."""
    model = loco.family_of(pipe)
    known = model.text_layers
    return sum(m.out_features for j in layers for m in model.kv(known[j]).values())


def smallest(rows: pd.DataFrame, neurons: int) -> dict:
    """The smallest k that erases and spares, with what it was measured by; None if none does."""
    good = rows[(rows.shown <= ERASED_BAR) & (rows.lost <= SPARED_BAR)].sort_values("k")
    least = good.iloc[0].to_dict() if len(good) else {"k": None}
    return {**least, "share": least["k"] / neurons if least["k"] else None}


def measure(args: argparse.Namespace) -> dict:
    """All figures, and whether the bar is held."""
    pipe = loco.load(args.model)
    truth = loco.shapeland.truth(args.model)
    wanted = {"style": list(args.styles), "object": list(args.objects)}
    chosen, choice = choose(pipe, args)
    rows, needed = [], []
    for kind, names in wanted.items():
        scenes = captions(kind, names, args)
        for number, name in enumerate(names):
            rest = [x for x in ATTRIBUTES[kind] if x != name]
            # as many captions of the other names, from all of them in turn
            more = [
                scenes[rest[i % len(rest)]][(i + number) % args.count] for i in range(args.count)
            ]
            found = one_concept(pipe, kind, name, scenes[name] + more, chosen, args)
            rows += found
            curve = pd.DataFrame(found).query("what == 'chosen'")
            needed.append(
                {**smallest(curve, located(pipe, truth[kind])), "kind": kind, "name": name}
            )
    shares = [one["share"] for one in needed if one["kind"] == "style"]
    return {
        "model": args.model,
        "settings": settings_of(args),
        "chosen": chosen,
        "choice": choice,
        "rows": rows,
        "needed": needed,
        "bar": {"figure": None if None in shares else max(shares, default=None), "bar": SHARE_BAR},
        "passed": bool(shares) and all(s is not None and s <= SHARE_BAR for s in shares),
    }


def main() -> int:
    """Measure, print, and return 0 if the bar is held."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="mini-sd", help="a planted mini (default: mini-sd)")
    parser.add_argument("--prompts", type=int, default=12, help="prompts a ranking is made from")
    parser.add_argument("--count", type=int, default=20, help="held-out captions with the concept")
    parser.add_argument(
        "--tops", type=int, nargs="+", default=[5, 10, 20, 30, 40, 51, 77, 128, 256]
    )
    parser.add_argument("--styles", nargs="*", default=ATTRIBUTES["style"])
    parser.add_argument("--objects", nargs="*", default=OBJECTS)
    parser.add_argument("--choose", nargs="+", default=ATTRIBUTES["style"][:3], help="styles")
    parser.add_argument("--choose-count", type=int, default=12, help="training captions of each")
    parser.add_argument("--no-controls", dest="controls", action="store_false")
    parser.add_argument("--steps", type=int, default=8, help="steps per picture")
    parser.add_argument("--bf16", action="store_true", help="sample under bfloat16 autocast")
    args = parser.parse_args()
    loco.progress(not args.json)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        result = measure(args)
    n = {"styles": len(args.styles), "objects": len(args.objects), "captions each": args.count}
    means = pd.DataFrame(result["rows"]).drop(columns="name")
    tables = [
        pd.DataFrame(result["choice"]).pivot_table(index="ranking", values="left", sort=False),
        pd.DataFrame(result["needed"]),
        means.groupby(["kind", "what", "k"], dropna=False).mean(),
    ]
    text = "\n".join(table.round(3).to_string() for table in tables)
    n |= {"seeds": 1, "prompts of a ranking": args.prompts}
    n |= {"styles to choose by": len(args.choose), "training captions each": args.choose_count}
    return finish(args, result, n=n, text=f"{text}\n{result['bar']}")


if __name__ == "__main__":
    sys.exit(main())
