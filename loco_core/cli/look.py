"""Commands that look: which models there are, what they are made of, what they paint."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Annotated, Any

from typer import Option

import loco_core as loco

from . import options as o
from . import read
from .command import Work, command, register_as, show
from .report import Report, save_image, save_sheet


def models(as_json: o.Json = False, debug: o.Debug = False) -> None:
    """List the models that come with the library.

    With the text layers in which each attribute was planted.
    """
    rows, rare = [], loco.shapeland.planting.RARE
    for name in loco.zoo.minis():
        files = [path for path in (loco.zoo.CHECKPOINTS / name).rglob("*") if path.is_file()]
        plant = loco.shapeland.planting.PLANTS.get(name, {})
        told = "; ".join(f"{kind} {','.join(map(str, places))}" for kind, places in plant.items())
        size = round(sum(path.stat().st_size for path in files) / 1e6, 1)
        none = f"nothing; rarely shown: {', '.join(rare[name])}" if name in rare else "nothing"
        rows.append({"model": name, "MB": size, "planted": told or none})
    show(Report(tables={"models": rows}), as_json)


register_as("models", models.__doc__, "loco models")(models)


@command("loco layers mini-sd", keeps=False)
def layers(work: Work) -> Report:
    """List the layers that read text.

    In the order they run, and on a planted mini with what was planted in them.
    """
    kinds = loco.shapeland.ATTRIBUTES if read.on_shapeland(work.pipe) else ()
    plant = {kind: read.planted(work.pipe, kind) or () for kind in kinds}
    rows = []
    for layer in loco.text_layers(work.pipe):
        row: dict[str, Any] = {"layer": layer.index, "width": layer.width}
        if plant:
            row["planted"] = [kind for kind, places in plant.items() if layer.index in places]
        rows.append(row | {"module": layer.name})
    return Report(tables={"layers": rows})


@command(
    'loco generate mini-sd --edit gone --prompt "a red star by Mira Holt" --steps 8 --out pictures',
    paints=True,
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
    batch_size: o.Batch = "fit",
    height: o.Height = None,
    width: o.Width = None,
) -> Report:
    """Paint prompts, with an edit or without.

    Writes images/, a PNG per prompt and seed, and images.png, a row per prompt.
    """
    change = None if edit is None else read.load_edit(edit)
    prompts = loco.families.base.checked_prompts(read.lines(prompt))
    numbers = loco.painting.picture.checked_seeds(read.numbers(seeds))
    rows: list[dict[str, Any]] = [
        {"file": f"images/{p:03d}-seed-{seed}.png", "seed": seed, "prompt": text}
        for p, text in enumerate(prompts)
        for seed in numbers
    ]
    sampling = loco.painting.Sampling(
        steps, guidance, negative_prompt, size=read.size(height, width)
    )

    def painted() -> Iterator[Any]:
        wanted = [loco.painting.Picture(row["prompt"], row["seed"]) for row in rows]
        stream = loco.painting.paint(
            work.pipe, wanted, sampling, store=work.parts, batch_size=batch_size, map=work.map
        )
        for row, pixels in zip(rows, stream, strict=True):
            save_image(work.folder / row["file"], pixels)
            yield pixels

    with nullcontext() if change is None else change.applied(work.pipe, scale):
        save_sheet(work.folder / "images.png", painted(), len(numbers))
    return Report({} if change is None else {"edit": repr(change.scaled(scale))}, {"images": rows})
