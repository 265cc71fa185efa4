"""Commands that look: which models there are, what they are made of, what they paint."""

from typing import Annotated, Any

from typer import Option

import loco_core as loco

from . import options as o
from .command import Work, command, register_as, show
from .report import Report, save_image, save_sheet


def models(as_json: o.Json = False, debug: o.Debug = False) -> None:
    """List the models that come with the library.

    With the text layers in which each attribute was planted.
    """
    from ..worlds.shapeland.planting import PLANTS, RARE

    rows = []
    for name in loco.zoo.minis():
        files = [path for path in (loco.zoo.CHECKPOINTS / name).rglob("*") if path.is_file()]
        plant = PLANTS.get(name, {})
        told = "; ".join(f"{kind} {','.join(map(str, places))}" for kind, places in plant.items())
        size = round(sum(path.stat().st_size for path in files) / 1e6, 1)
        rare = f"nothing; rarely shown: {', '.join(RARE[name])}" if name in RARE else "nothing"
        rows.append({"model": name, "MB": size, "planted": told or rare})
    show(Report(tables={"models": rows}), as_json)


register_as("models", models.__doc__, "loco models")(models)


@command("loco layers mini-sd", keeps=False)
def layers(work: Work) -> Report:
    """List the layers that read text.

    In the order they run, and on a planted mini with what was planted in them.
    """
    kinds = loco.shapeland.ATTRIBUTES if o.on_shapeland(work.pipe) else ()
    plant = {kind: o.planted(work.pipe, kind) or () for kind in kinds}
    rows = []
    for layer in loco.text_layers(work.pipe):
        row: dict[str, Any] = {"layer": layer.index, "width": layer.width}
        if plant:
            row["planted"] = [kind for kind, places in plant.items() if layer.index in places]
        rows.append(row | {"module": layer.name})
    return Report(tables={"layers": rows})


@command(
    'loco generate mini-sd --edit gone --prompt "a red star by Mira Holt" --steps 8 --out pictures',
    sweeps=True,
)
def generate(
    work: Work,
    prompt: Annotated[list[str], Option(help="A prompt, or a file with one a line; repeatable.")],
    edit: Annotated[str | None, Option(help="An edit to apply: its folder or file.")] = None,
    scale: Annotated[float, Option(help="How much of the edit: 0 none, 1 all.")] = 1.0,
    seeds: o.Seeds = "0-3",
    steps: o.Steps = 25,
    guidance: o.Guidance = 7.5,
    negative_prompt: Annotated[str | None, Option(help="What to steer away from.")] = None,
    batch_size: o.Batch = 16,
) -> Report:
    """Paint prompts, with an edit or without.

    Writes images/, a PNG per prompt and seed, and images.png, a row per prompt.
    """
    from contextlib import nullcontext

    change = None if edit is None else o.load_edit(edit)
    prompts, numbers = o.lines(prompt), o.numbers(seeds)
    with nullcontext() if change is None else change.applied(work.pipe, scale):
        images = loco.generate(
            work.pipe, prompts, numbers, steps, guidance,
            negative_prompt=negative_prompt, batch_size=batch_size, folder=work.parts,
        )  # fmt: skip
    save_sheet(work.folder / "images.png", images, len(numbers))
    rows = []
    for p, text in enumerate(prompts):
        for image, seed in zip(images[p], numbers, strict=True):
            file = f"images/{p:03d}-seed-{seed}.png"
            save_image(work.folder / file, image)
            rows.append({"file": file, "seed": seed, "prompt": text})
    return Report({} if change is None else {"edit": repr(change.scaled(scale))}, {"images": rows})
