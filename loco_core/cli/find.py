"""Commands that find: the layers by which a concept enters, the sites that carry it."""

from functools import partial
from typing import Annotated, Any, Literal

from typer import Option

import loco_core as loco

from . import options as o
from .command import Work, command
from .report import Report, rows_of, save_sheet


@command(
    'loco localize mini-sd --concept "style:Mira Holt" --prompts 2 --seeds 0 --steps 8 --out found',
    sweeps=True,
)
def localize(
    work: Work,
    concept: o.ConceptText,
    window: Annotated[str, Option(help='Layers in a window, or "smallest".')] = "2",
    seeds: o.Seeds = "0-3",
    steps: o.Steps = 25,
    guidance: o.Guidance = 7.5,
    prompts: o.Prompts = 4,
    neutral: Annotated[
        Literal["twin", "target"] | None,
        Option(help="What a window reads instead: the default is the twin, for a fact the target."),
    ] = None,
    pooled: Annotated[
        Literal["keep", "swap"], Option(help="The pooled embedding of SD-XL.")
    ] = "keep",
    clip: o.ClipName = None,
    batch_size: o.Batch = 16,
) -> Report:
    """Find the text layers by which a concept enters.

    LocoGen: windows of layers read the prompt without the concept; where it goes, it enters.

    Writes the localization, scores.png and images.png: a row per prompt, of its first seed: nothing
    replaced, each window replaced, everything replaced.
    """
    from torch import cat

    found = loco.localize(
        work.pipe, o.concept_of(work.pipe, concept, prompts), o.window(window), o.numbers(seeds),
        neutral=neutral, pooled=pooled, steps=steps, guidance=guidance, batch_size=batch_size,
        score=_score(work.pipe, clip), folder=work.parts,
    )  # fmt: skip
    found.save(work.folder)
    first, last = (each.images[None, :, 0] for each in (found.baseline, found.neutral))
    sheet = cat([first, found.images[:, :, 0], last]).transpose(0, 1)
    save_sheet(work.folder / "images.png", sheet, sheet.shape[1])
    planted = o.planted(work.pipe, found.concept.kind)
    low, high = found.interval.T
    curve = loco.display.score_curve(found.scores, low, high, found=found.layers[0])
    curve.savefig(work.folder / "scores.png")
    facts: dict[str, Any] = {"concept": found.concept.name, "layers": list(found.layers)}
    if planted is not None:
        facts["planted"] = planted
    facts["nothing replaced"] = float(found.baseline.scores.mean())
    facts["everything replaced"] = float(found.neutral.scores.mean())
    return Report(facts, {"windows": rows_of(found.to_frame())})


@command(
    "loco trace mini-sd --concept object:star --where text_encoder --prompts 1 --seeds 0 --steps 8 "
    "--out traced",
    sweeps=True,
)
def trace(
    work: Work,
    concept: o.ConceptText,
    where: Annotated[Literal["unet", "text_encoder"], Option(help="What is traced.")] = "unet",
    seeds: o.Seeds = "0-3",
    steps: o.Steps = 25,
    guidance: o.Guidance = 7.5,
    prompts: o.Prompts = 4,
    noise: Annotated[
        float | None, Option(help="Standard deviation; by default 3 times that of the name.")
    ] = None,
    draws: Annotated[int, Option(help="Of the noise, per prompt.")] = 1,
    window: Annotated[int, Option(help="Adjacent sites restored together.")] = 1,
    tokens: Annotated[
        Literal["last", "all"], Option(help="Of a text encoder: the last of the name, or all.")
    ] = "last",
    clip: o.ClipName = None,
    batch_size: o.Batch = 16,
) -> Report:
    """Find the activations that carry a concept.

    Causal tracing: the concept is drowned in noise, and one activation at a time is restored.

    Writes the trace and effects.png. Prints the ten largest effects.
    """
    found = loco.trace(
        work.pipe, o.concept_of(work.pipe, concept, prompts), where, o.numbers(seeds),
        steps=steps, guidance=guidance, noise=noise, draws=draws, window=window, tokens=tokens,
        batch_size=batch_size, score=_score(work.pipe, clip), folder=work.parts,
    )  # fmt: skip
    found.save(work.folder)
    loco.display.effect_figure(found).savefig(work.folder / "effects.png")
    frame = found.to_frame()
    return Report(
        {"concept": found.concept.name, "where": where, "what the noise took": found.gap},
        {"sites": rows_of(frame)},
        shown=rows_of(frame.nlargest(10, "effect")),
    )


def _score(pipe: Any, clip: str | None) -> Any:
    """None, the library's own choice, if the model brings a CLIP and no other is named."""
    found = o.load_clip(pipe, clip)
    return None if clip is None else partial(loco.clip_score, clip=found)
