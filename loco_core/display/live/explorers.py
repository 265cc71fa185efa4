"""Two explorers of a pipeline: which layer reads which prompt, and what an edit's settings do."""

import html
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...closed_form.methods import locoedit
from ...concepts import Concept
from ...families import family_of
from ...families.text import checked_prompts
from ...interventions.routing import checked_map
from ...painting.generate import generate
from ..widgets import labelled
from .choices import Choice, any_of, one_of
from .explore import Explorer, explore, figure, frame_of
from .painter import Painter
from .results import Made, Results

Reads = tuple[int, ...]  # per text layer the prompt it reads; at the end that of the pooled text


def routing_matrix(
    pipe: Any,
    prompts: Sequence[str],
    start: Sequence[int] | None = None,
    *,
    seeds: Sequence[int] = (0,),
    steps: int = 25,
    guidance: float = 7.5,
    scale: int = 2,
    folder: str | Path | None = None,
) -> Explorer:
    """A matrix to click: each text layer (row) reads one of the prompts (column); Paint shows what
    comes out, beside what each prompt alone gives (LocoGen's experiment, arXiv 2405.01008, sec. 3).

    prompts: called A, B, ... start: the prompt each layer reads at first, [layer] whole numbers,
    0 is the first prompt, which all read by default. A family with a pooled embedding (SD-XL) has
    one more row, which starts at the first prompt. Live, a whole window of layers is set at once,
    or all. Without a kernel it is the starting matrix with its pictures, which are painted when
    this is called. scale, folder: as in `explore`.
    Raises ValueError for more than 26 prompts, a start that does not fit the pipeline, and what
    `generate` refuses.

        routing_matrix(pipe, ["a star in the style of Mira Holt", "a star"], [0] * 8 + [1] * 8)
    """
    prompts, layers = checked_prompts(prompts), family_of(pipe).text_layers
    if len(prompts) > 26:
        raise ValueError(f"routing_matrix: {len(prompts)} prompts, but 26 letters to name them")
    letters, pooled = [chr(ord("A") + k) for k in range(len(prompts))], family_of(pipe).pooled
    first = [0] * len(layers) if start is None else list(start)
    first = checked_map([first], len(layers), len(prompts))[0].tolist() + [0] * pooled
    names = [f"layer {layer.index}" for layer in layers] + ["pooled text"] * pooled
    settings: dict[str, Any] = dict(seeds=list(seeds), steps=steps, guidance=guidance)

    def paint(reads: Reads) -> torch.Tensor:
        """[seed, 1, 3, H, W]"""
        images = generate(
            pipe, [prompts[0]], **settings, routes=[reads[: len(layers)]], sources=prompts,
            pooled_routes=[reads[-1]] if pooled else None,
        )  # fmt: skip
        return images[0][:, None]

    results = Results(paint, pipe, inputs={"prompts": prompts, **settings}, folder=folder)
    columns = [f"all read {letter}" for letter in letters] + ["as routed"]
    rows = [f"seed {seed}" for seed in seeds] if len(seeds) > 1 else []

    def make(reads: Reads) -> Made:
        """What each prompt alone gives, and the routing: [seed, prompt + 1, 3, H, W]."""
        alone = [(k,) * len(names) for k in range(len(prompts))]
        made = [results({"reads": each}, reads=each) for each in (*alone, reads)]
        return Made(np.concatenate([m.pixels for m in made], 1), made[-1].notes)

    def shown(reads: Reads, made: Made) -> str:
        said = worded(reads[: len(layers)], letters)
        said += f", pooled text {letters[reads[-1]]}" if pooled else ""
        alt = f"pictures of each prompt alone, and as routed: {said}"
        frame = frame_of(made, " - ".join([said, *made.notes]), alt)
        width = scale * made.pixels.shape[-1] * len(columns)
        return figure(labelled(frame.to_html(width), rows, columns, width), frame.label)

    begun = make(tuple(first))
    legend = _legend(letters, prompts)
    static = f"<div>{legend}{shown(tuple(first), begun)}{_table(first, names, letters)}</div>"

    def build() -> Any:
        painter = Painter(make, shown)
        painter.show(tuple(first), begun)
        return _matrix(painter, first, names, letters, legend, len(layers))

    return Explorer("layers x prompts", results, static, build)


def edit_explorer(
    pipe: Any,
    concept: Concept,
    layers: Sequence[int],
    show: Mapping[str, str],
    preserve: Mapping[str, Sequence[str]],
    *,
    lam: Choice | Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0),
    seed: int = 0,
    steps: int = 25,
    guidance: float = 7.5,
    scale: int = 2,
    folder: str | Path | None = None,
    **settings: Any,
) -> Explorer:
    """Prompts before and after a LocoEdit, by its price lam and by what it preserves.

    show: label -> prompt that is painted, some with the concept and some without it. preserve:
    label -> prompts, a checkbox each, or `any_of` with those checked at first; all of them are by
    default. lam: a list of prices or `one_of`, on a slider. settings: of `loco.locoedit`.
    Without a kernel it is a slider over lam, painted when this is called. Errors as `locoedit`,
    `generate` and `explore`.

        edit_explorer(pipe, concept, [8, 9], {"the style": concept.prompts[0], "none": "a star"},
                      {"neutral twins": concept.neutral}, steps=8)
    """
    asked: dict[str, Any] = dict(seeds=[seed], steps=steps, guidance=guidance)
    before = Results(lambda: generate(pipe, list(show.values()), **asked)[:, 0], pipe)

    def paint(lam: float, preserve: tuple[Sequence[str], ...]) -> np.ndarray:
        """[before and after, prompt, 3, H, W]"""
        unedited = before({}).images
        edit = locoedit(
            pipe, concept, layers, lam, preserve=sum(map(list, preserve), []), **settings
        )
        with edit.applied(pipe):
            edited = generate(pipe, list(show.values()), **asked)[:, 0]
        return np.concatenate([unedited, edited[None]])

    kept = preserve if isinstance(preserve, Choice) else any_of(preserve, list(preserve))
    return explore(
        paint,
        {"lam": lam if isinstance(lam, Choice) else one_of(lam), "preserve": kept},
        f"{', '.join(show)}, before and after an edit that takes out {concept.name}",
        pipe=pipe,
        rows=["before", "after"],
        columns=list(show),
        scale=scale,
        inputs={"concept": repr(concept), "layers": list(layers), "show": dict(show), **asked}
        | {"preserve": {k: list(v) for k, v in kept.options.items()}, **settings},
        folder=folder,
    )


def worded(reads: Sequence[int], letters: Sequence[str]) -> str:
    """A routing in words: "layers 0 to 7 read A, 8 to 9 B, 10 to 15 A"."""
    runs: list[str] = []
    at = 0
    for k, run in groupby(reads):
        last = at + len(list(run)) - 1
        span = str(at) if at == last else f"{at} to {last}"
        runs.append(f"{span} {'' if runs else 'read '}{letters[k]}")
        at = last + 1
    return "layers " + ", ".join(runs)


def _legend(letters: Sequence[str], prompts: Sequence[str]) -> str:
    pairs = (f"<b>{a}</b> {html.escape(p)}" for a, p in zip(letters, prompts, strict=True))
    return f'<div style="margin:.3em 0">{"<br>".join(pairs)}</div>'


def _table(reads: Sequence[int], names: Sequence[str], letters: Sequence[str]) -> str:
    """The matrix lying on its side, prompts x layers, to be read and not clicked."""
    head = "".join(
        f'<th scope="col" style="padding:0 .3em">{name.removeprefix("layer ")}</th>'
        for name in names
    )
    body = "".join(
        f'<tr><th scope="row">{letter}</th>'
        + "".join(f'<td style="padding:0 .3em">{"●" if k == read else "·"}</td>' for read in reads)
        + "</tr>"
        for k, letter in enumerate(letters)
    )
    return (
        '<div style="overflow-x:auto"><table style="font-size:.8em;text-align:center">'
        f'<thead><tr><th scope="col">layer</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _matrix(
    painter: Painter,
    first: Sequence[int],
    names: Sequence[str],
    letters: Sequence[str],
    legend: str,
    layers: int,
) -> Any:
    """The clicks: a row of radio buttons per layer, and a whole window of rows at once."""
    import ipywidgets

    options = [(letter, k) for k, letter in enumerate(letters)]
    line = dict(display="flex", align_items="center", width="max-content", margin="0")
    rows = [
        ipywidgets.RadioButtons(
            options=options, value=read, description=name, orientation="horizontal",
            style={"description_width": "6em"}, layout=line,
        )
        for name, read in zip(names, first, strict=True)
    ]  # fmt: skip
    window = ipywidgets.IntRangeSlider(
        value=(0, layers - 1), min=0, max=layers - 1, description="layers"
    )
    prompt = ipywidgets.Dropdown(options=options, description="read", layout={"width": "10em"})
    put = ipywidgets.Button(description="Set", tooltip="Let these layers read this prompt")
    paint = ipywidgets.Button(
        description="Paint", button_style="primary", tooltip="Paint a picture as routed"
    )

    def set_window(_: Any) -> None:
        for row in rows[window.value[0] : window.value[1] + 1]:
            row.value = prompt.value

    put.on_click(set_window)
    paint.on_click(lambda _: painter.request(tuple(row.value for row in rows)))
    matrix = ipywidgets.VBox(rows, layout={"max_height": "36em", "overflow": "auto"})
    tools = ipywidgets.HBox([window, prompt, put], layout={"flex_flow": "row wrap"})
    side = ipywidgets.VBox([paint, painter.box], layout={"flex": "1 1 22em", "min_width": "0"})
    content = ipywidgets.HBox([matrix, side], layout={"flex_flow": "row wrap"})
    box = ipywidgets.VBox([ipywidgets.HTML(legend), tools, content])
    box.painter, box.rows, box.window = painter, rows, window
    box.prompt, box.put, box.paint = prompt, put, paint
    return box
