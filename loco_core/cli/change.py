"""Commands that change: make an edit, hand it on as a LoRA, and ask what it does."""

import inspect
import os
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Option

import loco_core as loco

from . import options as o
from . import read
from .command import Work, command
from .report import Report, rows_of, save_sheet

METHODS = {
    "locoedit": "locoedit",
    "uce": "uce",
    "time": "time_edit",
    "quickfix": "diff_quickfix",
}
RIVALS = ("random window", "all layers", "destroyer", "mean", "noise")
ASPECTS = ("efficacy", "generality", "specificity")

EditPath = Annotated[str, Argument(metavar="EDIT", help="The folder or file of an edit.")]


@command(
    'loco edit mini-sd --concept "style:Mira Holt" --window-from found --lam 20 '
    "--preserve-neutral --out gone"
)
def edit(
    work: Work,
    method: Annotated[
        Literal["locoedit", "uce", "time", "quickfix"], Option(help="How.")
    ] = "locoedit",
    concept: o.ConceptOrNone = None,
    layers: o.Layers = None,
    window_from: o.WindowFrom = None,
    lam: Annotated[float | None, Option(help="The smaller, the stronger; see the book.")] = None,
    lam_k: Annotated[float | None, Option(help="Of keys, in place of --lam.")] = None,
    lam_v: Annotated[float | None, Option(help="Of values, in place of --lam.")] = None,
    where: Annotated[
        Literal["k", "v"] | None, Option(help="Edit keys or values alone; by default both.")
    ] = None,
    layer: Annotated[
        int | None, Option(help="Of quickfix: the text encoder's layer, by default the first, 0.")
    ] = None,
    tokens: Annotated[
        Literal["last", "eos", "following", "all"] | None, Option(help="Which are edited.")
    ] = None,
    target: Annotated[
        list[str] | None,
        Option(help="Read instead: neutral (the twins), target (the concept's), or prompts."),
    ] = None,
    preserve: o.Preserve = None,
    preserve_neutral: Annotated[
        bool | None,
        Option(help="Keep the neutral twins too: by default of locoedit."),
    ] = None,
    preserve_name: Annotated[
        list[str] | None, Option(help="Keep the prompts with this name instead; repeatable.")
    ] = None,
    null_space: Annotated[
        list[str] | None,
        Option(help="A prompt to keep exactly, or a file with one a line; repeatable."),
    ] = None,
    as_published: o.AsPublished = False,
    scale: Annotated[float, Option(help="How much of the edit: 0.5 half, -1 the opposite.")] = 1.0,
    prompts: o.Prompts = 12,
) -> Report:
    """Make an edit that removes a concept.

    After it the model reads the concept as its neutral twin, or as the target. No image is made.

    locoedit, where nothing says otherwise: lam is a tenth of the mean squared length of the edited
    keys, and the neutral twins are kept. --as-published: lam 0.01, the subject's last token,
    nothing kept.

    Writes edit.safetensors, for `loco generate --edit`, `loco evaluate` and `loco lora`.
    """
    chosen, meant = read.located(work.pipe, layers, window_from)
    meant = meant if concept is None else read.concept_of(work.pipe, concept, prompts)
    if meant is None:
        raise BadParameter("name a --concept, or a --window-from whose concept is meant")
    if as_published and method != "locoedit":
        raise BadParameter(f"--as-published: {method} is as published already; leave it out")
    ours = method == "locoedit" and not as_published
    neutral = ours if preserve_neutral is None else preserve_neutral
    kept = read.lines(preserve or ()) + list(meant.neutral if neutral else ())
    kept += meant.renamed(preserve_name) if preserve_name else ()
    asked = {
        "layers": chosen,
        "lam": lam,
        "lam_k": lam_k,
        "lam_v": lam_v,
        "where": where and (where,),
        "layer": layer,
        "tokens": tokens,
        "preserve": kept or None,
        "null_space": null_space and read.lines(null_space),
        "target": target and (target[0] if target in (["neutral"], ["target"]) else target),
    }
    if as_published and tokens is None:
        asked["tokens"] = "last"
    function, asked = _fitting(method, asked)
    if ours and lam is None:
        asked["lam"] = _tenth(work.pipe, meant, asked)
    made = function(work.pipe, meant, **asked).scaled(scale)
    made.save(work.folder / "edit.safetensors")
    seen = loco.diagnose(work.pipe, made)
    weights = rows_of(seen.to_frame().reset_index())
    left = seen.rows_to_frame().groupby("role")["residual"].max().to_dict()
    return Report(
        {
            "edit": repr(made),
            "lam": made.provenance.settings["lam"],
            **{f"largest residual, {role}": left[role] for role in left},
        },
        {"weights": weights},
    )


@command("loco evaluate mini-sd gone --seeds 0 --steps 8 --no-rivals --out judged", paints=True)
def evaluate(
    work: Work,
    edit: Annotated[
        list[str], Argument(metavar="EDIT...", help="Folders or files of edits; one has rivals.")
    ],
    concept: o.ConceptOrNone = None,
    probes: Annotated[
        str | None, Option(help="JSON or YAML list of probes (loco_core.judging.probes.Probe).")
    ] = None,
    rivals: Annotated[
        bool, Option(help="Compare one edit with all layers and a random window.")
    ] = True,
    rival: Annotated[
        list[str] | None,
        Option(help=f"Compare it with this one instead: {', '.join(RIVALS)}; repeatable."),
    ] = None,
    seeds: o.Seeds = "0-1",
    steps: o.Steps = 25,
    guidance: o.Guidance = 7.5,
    prompts: o.Prompts = 12,
    clip: o.ClipName = None,
    batch_size: o.Batch = "fit",
    height: o.Height = None,
    width: o.Width = None,
) -> Report:
    """Measure what edits do and what they cost.

    On prompts that they were not made from.

    On a mini a judge says what is in a picture, elsewhere CLIP-Score. Writes the evaluation and
    images.png: a row per edit, the first without any, an image per group of probes.
    """
    edits = {_name(path): read.load_edit(path) for path in edit}
    if len(edits) < len(edit):
        raise ValueError(f"two of the edits have one name: {', '.join(edit)}; rename a folder")
    first = next(iter(edits.values()))
    meant = _concept_of(first) if concept is None else read.concept_of(work.pipe, concept, prompts)
    found = loco.evaluate(
        work.pipe, first if len(edits) == 1 else edits, meant,
        probes=None if probes is None else _probes(probes), rivals=rival or rivals,
        clip=None if clip is None else read.load_clip(work.pipe, clip),
        seeds=read.numbers(seeds), steps=steps, guidance=guidance, batch_size=batch_size,
        size=read.size(height, width), folder=work.parts, map=work.map,
    )  # fmt: skip
    found.save(work.folder)
    save_sheet(work.folder / "images.png", found.images[:].flatten(0, -4), found.images.shape[1])
    summary = rows_of(found.summary().reset_index())
    return Report(
        {"concept": meant.name, "measure": "share, judged" if found.judged else "CLIP-Score"},
        {"summary": summary, "groups": rows_of(found.to_frame())},
        shown=[_short(row) for row in summary],
    )


@command("loco compose mini-sd gone parts --out both")
def compose(
    work: Work,
    edit: Annotated[
        list[str], Argument(metavar="EDIT...", help="Folders or files, two or more, in order.")
    ],
    scale: Annotated[float, Option(help="How much of what they are together.")] = 1.0,
) -> Report:
    """Make one edit of several.

    It does what the first does, then the second, and so on: maps of one weight are multiplied,
    knock-outs united. All must be made on the same unedited model.

    Writes edit.safetensors.
    """
    if len(edit) < 2:
        raise BadParameter("name two edits or more")
    first, *others = map(read.load_edit, edit)
    made = reduce(loco.compose, others, first).scaled(scale)
    with made.applied(work.pipe):  # refuses edits of another model
        pass
    made.save(work.folder / "edit.safetensors")
    return Report({"edit": repr(made), "weights": len(made.changes)})


@command("loco lora mini-sd gone gone-lora")
def lora(
    work: Work,
    edit: EditPath,
    out: Annotated[Path, Argument(help="Folder for the results.")],
    rank: Annotated[
        int | None,
        Option(help="The largest rank; a knock-out needs one. What it leaves out is told."),
    ] = None,
) -> Report:
    """Write an edit as a LoRA.

    lora.safetensors, with the names that diffusers, ComfyUI, A1111, Forge and sd-scripts read.
    """
    made = read.load_edit(edit)
    error = made.to_lora(work.folder / "lora.safetensors", work.pipe, rank)
    told = {"edit": repr(made), "weights": len(made.changes), "file": "lora.safetensors"}
    return Report(told | {"left out of the change": error})


def _fitting(method: str, asked: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The library's function for `method`, and what to hand it; refuses what it does not take."""
    function = getattr(loco, METHODS[method])
    takes = inspect.signature(function).parameters
    asked = read.only_those(asked, takes, method)
    needed = "layers" in takes and takes["layers"].default is inspect.Parameter.empty
    if needed and "layers" not in asked:
        raise BadParameter(f"--method {method} needs --layers or --window-from")
    return function, asked


def _tenth(pipe: Any, meant: Any, asked: Mapping[str, Any]) -> float:
    """A tenth of the mean squared length of the keys that an edit moves, to three digits."""
    model = loco.family_of(pipe)
    keys, recipe = loco.closed_form.keys, loco.closed_form.recipe.recipe
    made = recipe(
        "locoedit", model.name, meant, {}, tokens=asked.get("tokens", "eos"),
        target=asked.get("target"),
    )  # fmt: skip
    return float(f"{keys.squared_length(model, made) / 10:.3g}")


def _name(path: str) -> str:
    return Path(path).stem if os.path.isfile(path) else Path(path).name


def _concept_of(made: Any) -> Any:
    """The concept that an edit was made from."""
    settings = made.provenance.settings
    named = [each for part in loco.edits.edit.parts_of(settings) for each in part["concepts"]]
    if not named:
        raise BadParameter(f"{made!r} does not say what it removes: name the --concept")
    return loco.Concept(**named[0])


def _probes(path: str) -> list[Any]:
    try:
        return [loco.judging.Probe(**row) for row in read.document(path)]
    except TypeError as error:
        raise ValueError(f"{path} is no list of probes: {error}") from None


def _short(row: dict[str, Any]) -> dict[str, str]:
    """A row of the summary, each aspect with its interval in one cell."""
    found = {"edit": row["edit"]}
    for aspect in ASPECTS:
        if aspect in row:
            low, high = row[f"{aspect} low"], row[f"{aspect} high"]
            found[aspect] = f"{row[aspect]:.3g} [{low:.3g}, {high:.3g}]"
    return found
