"""Look around: choices, pictures that follow them, and a Cancel.

An explorer is a function from choices to pictures. With a kernel, its choices are ipywidgets: what
was painted before is shown at once, what was not is painted in the background, with a bar and a
Cancel. Without a kernel it is a slider over the pictures that were painted when it was made.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from ..pixels import contact_sheet
from ..widgets import Frame, WindowSlider, data_uri, kernel_is_there, labelled
from .choices import Choice, Labels, one_of
from .jobs import take_turns_with_cells
from .painter import Painter
from .results import Made, Results


@dataclass(frozen=True, eq=False)
class Explorer:
    """What `explore` and its kin return; a notebook shows it. results: every picture so far."""

    name: str
    results: Results
    static: str
    build: Callable[[], Any]

    def to_html(self) -> str:
        """The static twin, self-contained."""
        return self.static

    def live(self) -> Any:
        """The ipywidgets twin, a VBox whose `painter` paints; needs a kernel to be seen."""
        return self.build()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self.to_html()}
        if not kernel_is_there():
            return bundle
        take_turns_with_cells()
        return self.live()._repr_mimebundle_() | bundle

    def __repr__(self) -> str:
        return f"Explorer({self.name})"


def explore(
    compute: Callable[..., ArrayLike],
    choices: Mapping[str, Any],
    alt: str,
    *,
    pipe: Any = None,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    stills: bool = True,
    scale: int = 2,
    inputs: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
) -> Explorer:
    """Pictures that follow choices: compute(**values) -> [row, column, 3, H, W] in [0, 1].

    choices: name -> `one_of` or `any_of` options, or just a list of values. alt: what the pictures
    show; the choices are added. pipe: the pipeline that `compute` uses; pictures are remembered for
    the weights it has. rows, columns: names of those of the pictures. stills: paint at once for all
    values of the first `one_of` choice, the others as they start, for a page without a kernel;
    False paints the start alone. scale: CSS pixels per image pixel. folder: pictures are also kept
    there, with `inputs` (JSON): everything else that `compute` depends on.

    `compute` may change the pipeline only within contexts, such as `edit.applied(pipe)`: a Cancel
    unwinds them at the next step of the library's work.
    Raises ValueError for a choice without options, pictures of another shape, and labels that do
    not fit them. Warnings of `compute` are shown with the picture they belong to.

        def paint(scale):
            with edit.applied(pipe, scale):
                return loco.generate(pipe, ["a star"], range(4))
        explore(paint, {"scale": [0.5, 1.0, 1.5]}, "stars under part of an edit", pipe=pipe)
    """
    if not choices:
        raise ValueError('explore: no choices; give for example {"k": [0, 5, 10]}')
    choices = {k: c if isinstance(c, Choice) else one_of(c) for k, c in choices.items()}
    start = {name: choice.start for name, choice in choices.items()}
    results = Results(compute, pipe, inputs=inputs, folder=folder)

    def made(chosen: Mapping[str, Labels]) -> Made:
        values = {name: choices[name].value(labels) for name, labels in chosen.items()}
        made = results(dict(chosen), **values)
        for label, given, axis in (("rows", rows, 0), ("columns", columns, 1)):
            if given and len(given) != made.pixels.shape[axis]:
                raise ValueError(
                    f"explore: {len(given)} {label} labels for {made.pixels.shape[axis]} {label}"
                )
        return made

    def frame(chosen: Mapping[str, Labels], made: Made) -> Frame:
        said = "; ".join(f"{k}: {choices[k].worded(labels)}" for k, labels in chosen.items())
        return frame_of(made, " - ".join([said, *made.notes]), f"{alt}; {said}")

    def shown(chosen: Mapping[str, Labels], made: Made) -> str:
        found = frame(chosen, made)
        return figure(labelled(found.to_html(width), rows, columns, width), found.label)

    along = next((k for k, c in choices.items() if not c.many), None) if stills else None
    path = [start] if along is None else [start | {along: (o,)} for o in choices[along].options]
    stills_made = [made(chosen) for chosen in path]
    width = contact_sheet(stills_made[0].pixels, stills_made[0].pixels.shape[1]).shape[-1] * scale
    frames, at = tuple(map(frame, path, stills_made)), path.index(start)
    if along is not None and len(frames) > 1:
        static = WindowSlider(frames, along, at, width, tuple(rows), tuple(columns)).to_html()
    else:
        static = shown(start, stills_made[0])

    def build() -> Any:
        import ipywidgets

        painter = Painter(made, shown)
        painter.show(start, stills_made[at])
        controls = {name: choice.control(name) for name, choice in choices.items()}

        def follow(_: Any) -> None:
            painter.request({name: read() for name, (_, read) in controls.items()})

        widgets = {name: widget for name, (widget, _) in controls.items()}
        for name, choice in choices.items():
            for part in widgets[name].children[1:] if choice.many else [widgets[name]]:
                part.observe(follow, "value")
        box = ipywidgets.VBox([*widgets.values(), painter.box])
        box.painter, box.controls = painter, widgets
        return box

    return Explorer(", ".join(choices), results, static, build)


def frame_of(made: Made, label: str, alt: str) -> Frame:
    """The contact sheet of a result as one image."""
    sheet = contact_sheet(made.pixels, made.pixels.shape[1])
    return Frame(data_uri(sheet), label, alt)


def figure(content: str, caption: str) -> str:
    """HTML of pictures and what is chosen in them."""
    return (
        f'<figure class="loco-pictures" role="group" style="margin:1em 0;text-align:left">{content}'
        f'<figcaption style="text-align:left">{html.escape(caption)}</figcaption></figure>'
    )
