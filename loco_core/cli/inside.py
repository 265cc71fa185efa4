"""Commands that look inside of layers: at single neurons, at single weights."""

from typing import Annotated, Any, Literal

from typer import BadParameter, Option

import loco_core as loco

from . import options as o
from . import read
from .command import Work, command
from .report import Report, rows_of, save_sheet

#: What works on the minis (chapters 8 and 9), and the papers' settings.
WORKING_NEURONS = {"where": "v", "token": "padding", "by": "shift"}
WORKING_CAD = {"ratio": 0.03, "rounds": 2, "against": "neutral", "quota": "matrix"}
PUBLISHED_CAD = {
    "ratio": 1e-3, "rounds": 1, "measure": "epsilon", "against": "empty", "quota": "row",
}  # fmt: skip


@command(
    'loco neurons mini-sd --concept "style:Mira Holt" --window-from found --top 30 --prompts 4 '
    "--steps 8 --out neurons",
    paints=True,
)
def neurons(
    work: Work,
    concept: o.ConceptOrNone = None,
    layers: o.Layers = None,
    window_from: o.WindowFrom = None,
    where: Annotated[
        Literal["both", "k", "v", "to_k", "to_v"] | None,
        Option(help="Projections whose outputs are ranked: by default v."),
    ] = None,
    token: Annotated[
        Literal["last", "eos", "padding", "all"] | None,
        Option(help="Where activations are read: by default at the padding."),
    ] = None,
    by: Annotated[
        Literal["z", "shift"] | None,
        Option(help="How surely a neuron differs, or how far: by default how far, shift."),
    ] = None,
    as_published: o.AsPublished = False,
    top: Annotated[int, Option(help="How many of the first are held.")] = 50,
    mode: Annotated[
        Literal["neutral_mean", "zero"], Option(help="The value at which they are held.")
    ] = "neutral_mean",
    seeds: o.Seeds = "0",
    steps: o.Steps = 25,
    guidance: o.Guidance = 7.5,
    prompts: o.Prompts = 12,
    batch_size: o.Batch = "fit",
    height: o.Height = None,
    width: o.Width = None,
) -> Report:
    """Rank the neurons that tell a concept.

    Outputs of to_k and to_v, by how they differ between prompts with the concept and their neutral
    twins. --as-published: of both, at the subject's last token, by Welch's t.

    Writes the ranking and images.png: a row without, a row with the first of them held. With --mode
    zero that is a change of weights, and edit.safetensors is written, too.
    """
    chosen, meant = read.located(work.pipe, layers, window_from)
    meant = meant if concept is None else read.concept_of(work.pipe, concept, prompts)
    if meant is None or chosen is None:
        raise BadParameter("name a --concept and --layers, or a --window-from that has both")
    published = {"where": "both", "token": "last", "by": "z"}
    asked = {"where": where, "token": token, "by": by}
    asked = read.filled(asked, published if as_published else WORKING_NEURONS)
    read.size(height, width)
    projections = ("k", "v") if asked["where"] == "both" else (asked["where"],)
    ranked = loco.rank_neurons(
        work.pipe, meant, chosen, projections, asked["token"], by=asked["by"]
    )
    images = loco.inside.neurons.ablation_curve(
        work.pipe, ranked, meant.prompts, [0, top], mode=mode,
        seeds=read.numbers(seeds), steps=steps, guidance=guidance, height=height, width=width,
        batch_size=batch_size, folder=work.parts, map=work.map,
    )  # fmt: skip
    ranked.save(work.folder)
    columns = images.shape[1] * images.shape[2]
    save_sheet(work.folder / "images.png", images.flatten(0, -4), columns)
    if mode == "zero" and top:
        ranked.edit(work.pipe, top).save(work.folder / "edit.safetensors")
    facts = {"concept": meant.name, "layers": chosen, "ranked": len(ranked), "held": top, **asked}
    return Report(facts, {"neurons": rows_of(ranked.to_frame())})


@command(
    "loco attribute mini-sd --concept object:star --layers 6,7 --prompts 4 --steps 8 --out parts"
)
def attribute(
    work: Work,
    concept: o.ConceptOrNone = None,
    layers: o.Layers = None,
    window_from: o.WindowFrom = None,
    objective: Annotated[
        Literal["erase", "amplify"], Option(help="What the edit does to the concept.")
    ] = "erase",
    ratio: Annotated[
        float | None, Option(help="Share of the weights that each round zeroes: by default 0.03.")
    ] = None,
    rounds: Annotated[
        int | None, Option(help="Attribute anew with what fell at zero: 2 rounds to erase.")
    ] = None,
    where: Annotated[
        Literal["ff", "attention", "cross-attention", "conv"], Option(help="Weights to score.")
    ] = "ff",
    measure: Annotated[
        Literal["epsilon", "v_prediction", "sample"] | None,
        Option(help="In what the objective is measured: by default in what the model predicts."),
    ] = None,
    against: Annotated[
        Literal["empty", "neutral"] | None,
        Option(help="What a prompt is compared with: to erase, by default its neutral twin."),
    ] = None,
    preserve: o.Preserve = None,
    image: Annotated[
        list[str] | None,
        Option(help="To amplify: a picture of the concept for each prompt, in order; repeatable."),
    ] = None,
    quota: Annotated[
        Literal["row", "matrix", "all"] | None,
        Option(help="Within which the share is taken: by default matrix."),
    ] = None,
    by: Annotated[
        Literal["attribution", "random", "weight", "gradient"],
        Option(help="A control: as many by chance, by size, by gradient; in one round."),
    ] = "attribution",
    control_seed: Annotated[int, Option(help="Of --by random.")] = 0,
    fidelity: Annotated[
        int, Option(help="Random knock-outs by which the scores are checked; 0: none.")
    ] = 0,
    as_published: o.AsPublished = False,
    seeds: o.Seeds = "0",
    steps: o.Steps = 25,
    guidance: o.Guidance = 3.0,
    prompts: o.Prompts = 4,
    batch_size: Annotated[int, Option(help="Images at a time.")] = 4,
    keep: Annotated[
        bool, Option("--keep", help="Save all scores, too: as large as the weights.")
    ] = False,
) -> Report:
    """Score the weights that serve a concept.

    CAD: to first order, what zeroing each weight does. --layers: only in their transformer blocks.
    --as-published: one round of 0.001 of every row, against the empty prompt, measured in epsilon,
    of all layers unless some are named.

    Writes edit.safetensors, which zeroes those that serve the concept most, or to amplify it those
    that hold it back.
    """
    chosen, meant = read.located(work.pipe, layers, window_from)
    meant = meant if concept is None else read.concept_of(work.pipe, concept, prompts)
    if meant is None:
        raise BadParameter("name a --concept, or a --window-from whose concept is meant")
    asked: dict[str, Any] = {"ratio": ratio, "rounds": rounds, "measure": measure}
    asked |= {"against": against, "quota": quota}
    asked = read.filled(asked, PUBLISHED_CAD if as_published else _working(work, objective, by))
    _refuse(asked, objective, by, fidelity)
    images = image and read.pictures(image)
    whole = keep or fidelity or by == "gradient" or asked["quota"] == "all"
    parts = loco.attribute(
        work.pipe, meant, where=where, layers=chosen, objective=objective, images=images,
        measure=asked["measure"], against=asked["against"], preserve=read.lines(preserve or ()),
        seeds=read.numbers(seeds), steps=steps, guidance=guidance, batch_size=batch_size,
        keep="all" if whole else min(1.0, 4 * asked["ratio"]),
    )  # fmt: skip
    how = {"by": by, "quota": asked["quota"], "seed": control_seed, "pipe": work.pipe}
    if objective == "erase":
        how["rounds"] = asked["rounds"]
    made = getattr(parts, objective)(asked["ratio"], **how)
    made.save(work.folder / "edit.safetensors")
    if keep:
        parts.save(work.folder)
    facts = {"edit": repr(made), "scored": len(parts), "layers": chosen, **asked}
    facts["zeroed"] = sum(len(change.indices) for change in made.changes.values())
    if fidelity:
        seen = loco.inside.fidelity(work.pipe, parts, fidelity, images=images)
        facts |= {"fidelity r": seen.r, "fidelity low": seen.low, "fidelity high": seen.high}
    frame = parts.to_frame().reset_index()
    column = "positive" if objective == "erase" else "negative"
    largest = frame.loc[frame[column].abs().sort_values(ascending=False).index[:10]]
    return Report(facts, {"weights": rows_of(frame)}, shown=rows_of(largest))


def _refuse(asked: dict[str, Any], objective: str, by: str, fidelity: int) -> None:
    """What would be refused only after the attribution, which takes its time."""
    if not 0 < asked["ratio"] <= 1:
        raise BadParameter(f"--ratio {asked['ratio']} is not in (0, 1]: a share of the weights")
    if asked["rounds"] < 1:
        raise BadParameter(f"--rounds {asked['rounds']}: choose a whole number, at least 1")
    if asked["rounds"] > 1 and objective != "erase":
        raise BadParameter("--rounds is for --objective erase: leave it out")
    if asked["rounds"] > 1 and by != "attribution":
        raise BadParameter(f"--by {by} has no rounds: leave --rounds out")
    if fidelity and fidelity < 4:
        raise BadParameter(f"--fidelity {fidelity}: a correlation needs 4 knock-outs or more")


def _working(work: Work, objective: str, by: str) -> dict[str, Any]:
    """What works on the minis: erasing in rounds, in what the model predicts."""
    known = WORKING_CAD | {"measure": work.pipe.scheduler.config.get("prediction_type", "epsilon")}
    if objective == "amplify":
        return known | {"rounds": 1, "against": "empty"}
    return known if by == "attribution" else known | {"rounds": 1}
