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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from .plots import contact_sheet

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


@dataclass(frozen=True)
class WindowSlider:
    """What `window_slider` returns; a notebook shows it. `width` is in CSS pixels."""

    frames: tuple[Frame, ...]
    name: str
    start: int
    width: int

    def to_html(self) -> str:
        """The static twin, self-contained."""
        images = "".join(self._image(k, hidden=k != self.start) for k in range(len(self.frames)))
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

        picture = ipywidgets.HTML(self._image(self.start))
        slider = ipywidgets.SelectionSlider(
            options=[(frame.label, k) for k, frame in enumerate(self.frames)],
            value=self.start,
            description=self.name,
            layout={"width": f"{max(self.width, 360)}px"},
        )
        slider.observe(lambda change: setattr(picture, "value", self._image(change.new)), "value")
        return ipywidgets.VBox([picture, slider])

    def _image(self, index: int, hidden: bool = False) -> str:
        frame = self.frames[index]
        shown = "none" if hidden else "block"
        return (
            f'<img class="dark-light" src="{frame.source}" alt="{html.escape(frame.alt)}" '
            f'data-label="{html.escape(frame.label)}" style="display:{shown};'
            f'margin:0;width:{self.width}px;max-width:100%;image-rendering:pixelated">'
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self.to_html()}
        return self.live()._repr_mimebundle_() | bundle if _kernel_is_there() else bundle

    def __repr__(self) -> str:
        return f"WindowSlider({len(self.frames)} frames, {self.name!r})"


def window_slider(
    frames: Sequence[ArrayLike],
    labels: Sequence[str],
    alt: str | Sequence[str],
    *,
    name: str = "window",
    start: int = 0,
    columns: int | None = None,
    scale: int = 2,
) -> WindowSlider:
    """A slider over images, one per window: live with a kernel, static without.

    frames: per position an image [3, H, W] in [0, 1], or several [..., 3, H, W], shown as a contact
    sheet of `columns`. labels: what each position is called. alt: what each image shows, or one
    text for all, to which the label is added. start: position shown first. scale: CSS pixels per
    image pixel, crisp.

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
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"window_slider: scale={scale!r}; give a whole number, at least 1")
    sheets = [contact_sheet(frame, columns) for frame in frames]
    positions = zip(sheets, labels, texts, strict=True)
    return WindowSlider(
        frames=tuple(Frame(data_uri(sheet), label, text) for sheet, label, text in positions),
        name=name,
        start=start,
        width=max(sheet.shape[-1] for sheet in sheets) * scale,
    )


def data_uri(image: ArrayLike) -> str:
    """An image [3, H, W] in [0, 1] as a data URI: WebP, or PNG where that is smaller."""
    pixels = np.asarray(image, dtype=np.float64).transpose(1, 2, 0)
    if not np.isfinite(pixels).all():
        raise ValueError("data_uri: the image holds NaN or infinite values")
    picture = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    encoded = {
        "webp": _encode(picture, "WEBP", quality=90, method=6),
        "png": _encode(picture, "PNG", optimize=True),
    }
    kind = min(encoded, key=lambda k: len(encoded[k]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def _encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _kernel_is_there() -> bool:
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ModuleNotFoundError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None
