"""Commands that find: the layers by which a concept enters, the sites that carry it."""

from functools import partial
from typing import Annotated, Any, Literal

from typer import Option

import loco_core as loco

from . import options as o
from . import read
from .command import Work, command
from .report import Report, rows_of, save_sheet


@command(
    'loco localize mini-sd --concept "style:Mira Holt" --prompts 6 --seeds 0 --steps 8 --out found',
    paints=True,
)
def localize(
    work: Work,
    concept: o.ConceptText,
    method: Annotated[
        Literal["locogen", "tracing"],
        Option(help="Windows read the neutral text, or drowned in noise have theirs restored."),
    ] = "locogen",
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
        Literal["keep", "swap"] | None,
        Option(help="The pooled embedding of SD-XL; by default it is kept."),
    ] = None,
    noise: Annotated[
        float | None, Option(help="Of tracing: standard deviation, by default as in loco trace.")
    ] = None,
    draws: Annotated[
        int | None, Option(help="Of tracing: of the noise, per prompt; by default 1.")
    ] = None,
    clip: o.ClipName = None,
    batch_size: o.Batch = "fit",
    height: o.Height = None,
    width: o.Width = None,
) -> Report:
    """Find the text layers by which a concept enters.

    LocoGen: windows of layers read the prompt without the concept; where it goes, it enters. It is
    found if the best window passes a test that knows how many there were; that takes 5 pictures
    (prompts x seeds) at least.

    Writes the localization, scores.png and images.png: a row per prompt, of its first seed: nothing
    replaced, each window replaced, everything replaced; of tracing the clean run, each window
    restored, the corrupted run.
    """
    asked = {"neutral": neutral, "pooled": pooled, "noise": noise, "draws": draws}
    takes = loco.localization.METHODS[method].__kwdefaults__ or ()
    found = loco.localize(
        work.pipe, read.concept_of(work.pipe, concept, prompts), read.window(window),
        read.numbers(seeds), method=method, steps=steps, guidance=guidance,
        size=read.size(height, width), batch_size=batch_size, score=_score(work.pipe, clip),
        folder=work.parts, map=work.map, **read.only_those(asked, takes, method),
    )  # fmt: skip
    found.save(work.folder)
    rows = [0, *range(2, 2 + len(found.items)), 1]
    places = [(row, p, 0, 0) for p in range(found.sheet.shape[1]) for row in rows]
    tiles = (pixels for at in places for pixels in found.sheet.rows(at).bytes())
    save_sheet(work.folder / "images.png", tiles, len(rows))
    low, high = found.interval.T
    marked = found.test.best if found.layers else None
    curve = loco.display.score_curve(found.scores, low, high, found=marked)
    curve.savefig(work.folder / "scores.png")
    return Report(_facts(work.pipe, found, method), {"windows": rows_of(found.to_frame())})


@command(
    "loco trace mini-sd --concept object:star --where text_encoder --prompts 1 --seeds 0 --steps 8 "
    "--out traced",
    paints=True,
)
def trace(
    work: Work,
    concept: o.ConceptText,
    where: Annotated[
        Literal["denoiser", "unet", "text_encoder"],
        Option(help="What is traced; unet is the denoiser."),
    ] = "denoiser",
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
    batch_size: o.Batch = "fit",
    height: o.Height = None,
    width: o.Width = None,
) -> Report:
    """Find the activations that carry a concept.

    Causal tracing: the concept is drowned in noise, and one activation at a time is restored.

    Writes the trace and effects.png. Prints the ten largest effects, and p of the largest, adjusted
    for all sites.
    """
    found = loco.trace(
        work.pipe, read.concept_of(work.pipe, concept, prompts), where, read.numbers(seeds),
        steps=steps, guidance=guidance, size=read.size(height, width), noise=noise, draws=draws,
        window=window, tokens=tokens, batch_size=batch_size, score=_score(work.pipe, clip),
        folder=work.parts, map=work.map,
    )  # fmt: skip
    found.save(work.folder)
    loco.display.effect_figure(found).savefig(work.folder / "effects.png")
    frame = found.to_frame()
    return Report(
        {
            "concept": found.concept.name,
            "where": found.where,
            **_tested(found),
            "largest effect": found.sites[found.test.best].name,
            "what the noise took": found.gap,
        },
        {"sites": rows_of(frame)},
        shown=rows_of(frame.nlargest(10, "effect")),
    )


def _facts(pipe: Any, found: Any, method: str) -> dict[str, Any]:
    """What a localization says, and between which scores its windows lie."""
    facts = {
        "concept": found.concept.name,
        **_tested(found),
        "layers": list(found.layers),
        "best window": list(found.best),
    }
    if (planted := read.planted(pipe, found.concept.kind)) is not None:
        facts["planted"] = planted
    ends = {
        "locogen": ("nothing replaced", "everything replaced"),
        "tracing": ("corrupted", "clean"),
    }[method]
    means = float(found.reference.mean()), float(found.goal.mean())
    return facts | dict(zip(ends, means, strict=True))


def _tested(found: Any) -> dict[str, Any]:
    """The verdict of the test, and p of the best item, adjusted for all."""
    test = found.test
    return {"verdict": test.verdict, "p": float(test.p[test.best])}


def _score(pipe: Any, clip: str | None) -> Any:
    """None, the library's own choice, if the model brings a CLIP and no other is named."""
    found = read.load_clip(pipe, clip)
    return None if clip is None else partial(loco.clip_score, clip=found)
