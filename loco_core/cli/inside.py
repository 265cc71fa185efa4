"""Commands that look inside of layers: at single neurons, at single weights."""

from typing import Annotated, Literal

from typer import BadParameter, Option

import loco_core as loco

from . import options as o
from . import read
from .command import Work, command
from .report import Report, rows_of, save_sheet


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
        Literal["both", "to_k", "to_v"], Option(help="Projections whose outputs are ranked.")
    ] = "both",
    token: Annotated[
        Literal["last", "eos", "all"], Option(help="Where activations are read.")
    ] = "eos",
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

    Outputs of to_k and to_v, by Welch's t of prompts with the concept against their neutral twins.
    Writes the ranking and images.png: a row without, a row with the first of them held. With --mode
    zero that is a change of weights, and edit.safetensors is written, too.
    """
    chosen, meant = read.located(work.pipe, layers, window_from)
    meant = meant if concept is None else read.concept_of(work.pipe, concept, prompts)
    if meant is None or chosen is None:
        raise BadParameter("name a --concept and --layers, or a --window-from that has both")
    projections = ("to_k", "to_v") if where == "both" else (where,)
    ranked = loco.rank_neurons(work.pipe, meant, chosen, projections, token)
    read.size(height, width)
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
    facts = {"concept": meant.name, "layers": chosen, "ranked": len(ranked), "held": top}
    return Report(facts, {"neurons": rows_of(ranked.to_frame())})


@command("loco attribute mini-sd --concept object:star --prompts 2 --steps 8 --out parts")
def attribute(
    work: Work,
    concept: o.ConceptText,
    objective: Annotated[
        Literal["erase", "amplify"], Option(help="What the edit does to the concept.")
    ] = "erase",
    ratio: Annotated[float, Option(help="Share of the weights that it zeroes.")] = 1e-3,
    where: Annotated[
        Literal["ff", "attention", "cross-attention", "conv"], Option(help="Weights to score.")
    ] = "ff",
    against: Annotated[
        Literal["empty", "neutral"], Option(help="What a prompt is compared with, to erase.")
    ] = "empty",
    preserve: o.Preserve = None,
    image: Annotated[
        list[str] | None,
        Option(help="To amplify: a picture of the concept for each prompt, in order; repeatable."),
    ] = None,
    quota: Annotated[
        Literal["row", "matrix", "all"], Option(help="Within which the share is taken.")
    ] = "row",
    seeds: o.Seeds = "0",
    steps: o.Steps = 25,
    guidance: o.Guidance = 3.0,
    prompts: o.Prompts = 4,
    batch_size: Annotated[int, Option(help="Images at a time.")] = 4,
    keep: Annotated[
        bool, Option("--keep", help="Save all scores, too: as large as the weights, twice.")
    ] = False,
) -> Report:
    """Score the weights that serve a concept.

    CAD: to first order, what zeroing each weight does. Writes edit.safetensors, which zeroes those
    that serve the concept most, or to amplify it those that hold it back.
    """
    parts = loco.attribute(
        work.pipe, read.concept_of(work.pipe, concept, prompts), where=where, objective=objective,
        against=against, preserve=read.lines(preserve or ()), images=image and read.pictures(image),
        seeds=read.numbers(seeds), steps=steps, guidance=guidance, batch_size=batch_size,
    )  # fmt: skip
    made = getattr(parts, objective)(ratio, quota=quota)
    made.save(work.folder / "edit.safetensors")
    if keep:
        parts.save(work.folder)
    zeroed = sum(len(change.indices) for change in made.changes.values())
    frame = parts.to_frame().reset_index()
    column = "positive" if objective == "erase" else "negative"
    largest = frame.loc[frame[column].abs().sort_values(ascending=False).index[:10]]
    return Report(
        {"edit": repr(made), "scored": len(parts), "zeroed": zeroed},
        {"weights": rows_of(frame)},
        shown=rows_of(largest),
    )
