"""One slider over the windows of a sweep, live in a notebook and alive in a static page.

With a kernel it is an ipywidgets slider. Its static twin needs neither a kernel nor a network: an
`<input type=range>` over images embedded in the page, moved by mouse, finger or arrow keys, each
image with its own alt text. Both are in the same cell output, and a front end shows the one it can.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from numpy.typing import ArrayLike
from PIL import Image

from ..painting import Images
from .pixels import contact_sheet, eight_bit

# An attribute, not a <script>: it needs no id, works wherever the HTML is inserted, and two sliders
# on one page cannot meet.
_ON_INPUT = (
    "const s=this.closest('.loco-slider'),i=s.querySelectorAll('img');"
    "i.forEach((e,k)=>{e.style.display=k==this.value?'block':'none'});"
    "const t=i[this.value].dataset.label;s.querySelector('output').value=t;"
    "this.setAttribute('aria-valuetext',t)"
)


@dataclass(frozen=True)
class Frame:
    """One position of the slider: image as a data URI, what it is called, what it shows."""

    source: str
    label: str
    alt: str

    def to_html(self, width: int, hidden: bool = False) -> str:
        """The image, `width` CSS pixels wide where there is room for it."""
        shown = "none" if hidden else "block"
        return (
            f'<img class="dark-light" src="{self.source}" alt="{html.escape(self.alt)}" '
            f'data-label="{html.escape(self.label)}" style="display:{shown};'
            f'margin:0;width:{width}px;max-width:100%;image-rendering:pixelated">'
        )


@dataclass(frozen=True)
class WindowSlider:
    """What `window_slider` returns; a notebook shows it. `width` is in CSS pixels. rows, columns:
    what stands beside and above every image, or nothing."""

    frames: tuple[Frame, ...]
    name: str
    start: int
    width: int
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def to_html(self) -> str:
        """The static twin, self-contained."""
        images = "".join(self._image(k, hidden=k != self.start) for k in range(len(self.frames)))
        images = labelled(images, self.rows, self.columns, self.width)
        first = self.frames[self.start]
        name, label = html.escape(self.name), html.escape(first.label)
        return (
            f'<figure class="loco-slider" role="group" aria-label="{name}" '
            f'style="margin:1em 0;text-align:left;max-width:{max(self.width, 320)}px">'
            f"{images}"
            '<label style="display:flex;gap:.6em;align-items:center">'
            f"<span>{name}</span>"
            f'<input type="range" min="0" max="{len(self.frames) - 1}" step="1" '
            f'value="{self.start}" autocomplete="off" aria-valuetext="{label}" '
            f'style="flex:1" oninput="{html.escape(_ON_INPUT)}"></label>'
            f'<figcaption style="text-align:left"><output aria-live="polite">{label}</output>'
            "</figcaption></figure>"
        )

    def live(self) -> Any:
        """The ipywidgets twin (a VBox); needs a kernel. ModuleNotFoundError without ipywidgets."""
        import ipywidgets

        def picture_of(index: int) -> str:
            return labelled(self._image(index), self.rows, self.columns, self.width)

        picture = ipywidgets.HTML(picture_of(self.start))
        slider = ipywidgets.SelectionSlider(
            options=[(frame.label, k) for k, frame in enumerate(self.frames)],
            value=self.start,
            description=self.name,
            layout={"width": f"{max(self.width, 360)}px"},
        )
        slider.observe(lambda change: setattr(picture, "value", picture_of(change.new)), "value")
        return ipywidgets.VBox([picture, slider])

    def _image(self, index: int, hidden: bool = False) -> str:
        return self.frames[index].to_html(self.width, hidden)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self.to_html()}
        return self.live()._repr_mimebundle_() | bundle if kernel_is_there() else bundle

    def __repr__(self) -> str:
        return f"WindowSlider({len(self.frames)} frames, {self.name!r})"


def window_slider(
    frames: Sequence[ArrayLike] | Images,
    labels: Sequence[str],
    alt: str | Sequence[str],
    *,
    name: str = "window",
    start: int = 0,
    columns: int | Sequence[str] | None = None,
    rows: Sequence[str] = (),
    scale: int = 2,
) -> WindowSlider:
    """A slider over images, one per window: live with a kernel, static without.

    frames: per position an image [3, H, W], uint8 or in [0, 1], or several [..., 3, H, W], shown as
    a contact sheet of `columns`, a number or their headings; rows: names of its rows. labels: what
    each position is called. alt: what each image shows, or one text for all, and the label is
    added. start: position shown first. scale: CSS pixels per image pixel, crisp.

        slider = window_slider(np.random.rand(15, 4, 3, 64, 64), [f"layers {j}, {j + 1}"
                               for j in range(15)], alt="four stars with one window swapped")
    """
    if not len(frames):
        raise ValueError("window_slider: no frames; give one image per label")
    if len(labels) != len(frames):
        raise ValueError(f"window_slider: {len(labels)} labels for {len(frames)} frames")
    texts = [f"{alt}: {label}" for label in labels] if isinstance(alt, str) else list(alt)
    if len(texts) != len(frames) or not all(text.strip() for text in texts):
        raise ValueError(
            f"window_slider: every one of {len(frames)} frames needs an alt text, got {texts!r}"
        )
    if not 0 <= start < len(frames):
        raise ValueError(f"window_slider: start={start}; choose 0..{len(frames) - 1}")
    if not isinstance(scale, Integral) or scale < 1:
        raise ValueError(f"window_slider: scale={scale!r}; give a whole number, at least 1")
    headings = () if columns is None or isinstance(columns, Integral) else tuple(columns)
    count = len(headings) or columns
    positions, width = [], 0
    parts = map(frames.rows, range(len(frames))) if isinstance(frames, Images) else frames
    for frame, label, text in zip(parts, labels, texts, strict=True):
        sheet = contact_sheet(frame, count)
        positions.append(Frame(data_uri(sheet), label, text))
        width = max(width, sheet.shape[-1] * scale)
    return WindowSlider(tuple(positions), name, start, width, tuple(rows), headings)


def labelled(
    content: str, rows: Sequence[str] = (), columns: Sequence[str] = (), width: int = 320
) -> str:
    """HTML of a contact sheet, `width` CSS pixels wide, with names of its rows and columns."""
    if not rows and not columns:
        return content
    heads, sides = ("".join(f"<span>{html.escape(t)}</span>" for t in x) for x in (columns, rows))
    return (
        f'<div style="display:grid;grid-template-columns:auto minmax(0,{width}px);'
        'justify-content:start;gap:.3em .6em;font-size:.8em;line-height:1.25">'
        f'<span></span><div style="display:grid;grid-template-columns:repeat({len(columns) or 1},'
        f'minmax(0,1fr));gap:4px;text-align:center;align-items:end">{heads}</div>'
        f'<div style="display:grid;grid-auto-rows:1fr;align-items:center;text-align:right">{sides}'
        f"</div><div>{content}</div></div>"
    )


def data_uri(image: ArrayLike) -> str:
    """An image [3, H, W], uint8 or in [0, 1], as a data URI: WebP, of quality 90, or lossless where
    it has as few colors as a drawing."""
    picture = Image.fromarray(eight_bit(image).transpose(1, 2, 0))
    drawn = picture.getcolors(picture.width * picture.height // 8) is not None
    how: dict[str, Any] = {"lossless": True} if drawn else {"quality": 90}
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", method=4, **how)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def kernel_is_there() -> bool:
    """Whether a notebook's kernel shows what is displayed, and can show widgets."""
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ModuleNotFoundError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None
