"""Figures and the slider: what a reader sees, with and without a kernel."""

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from loco_core.display import contact_sheet, image_grid, score_curve, window_slider
from loco_core.display.widgets import data_uri

LABELS = ["layers 0, 1", "layers 1, 2", 'layers "2", 3']


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).random((3, 2, 3, 8, 8))


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {k: v or "" for k, v in attrs}))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_static_slider_has_a_range_input_with_one_position_per_frame(frames):
    page = Elements(window_slider(frames, LABELS, "two squares", start=1).to_html())
    (slider,) = page.all("input")
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", "2")
    assert slider["value"] == "1" and slider["aria-valuetext"] == LABELS[1]
    assert slider["oninput"]


def test_static_slider_shows_exactly_the_starting_frame(frames):
    images = Elements(window_slider(frames, LABELS, "two squares", start=1).to_html()).all("img")
    assert ["display:block" in image["style"] for image in images] == [False, True, False]


def test_every_frame_has_alt_text_and_keeps_its_colors_in_the_dark_theme(frames):
    images = Elements(window_slider(frames, LABELS, "two squares").to_html()).all("img")
    assert [image["alt"] for image in images] == [f"two squares: {label}" for label in LABELS]
    assert all("dark-light" in image["class"] for image in images)


def test_static_slider_needs_neither_network_nor_script_element(frames):
    text = window_slider(frames, LABELS, "two squares").to_html()
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", text)
    assert not Elements(text).all("script") and not re.search(r"\bid=", text)


def test_static_slider_is_the_same_in_every_process(frames):
    code = (
        "import numpy as np; from loco_core.display import window_slider as w;"
        "f = np.random.default_rng(0).random((3, 2, 3, 8, 8));"
        "print(w(f, ['a', 'b', 'c'], 'x').to_html())"
    )
    twice = [subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)]
    assert twice[0] == twice[1]


def test_frames_decode_to_the_images_that_went_in():
    x, y = np.meshgrid(np.linspace(0, 1, 32), np.linspace(0, 1, 32))
    image = np.stack([x, y, 1 - x])
    raw = base64.b64decode(data_uri(image).split(",")[1])
    decoded = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).transpose(2, 0, 1) / 255
    assert np.abs(decoded - image).mean() < 0.02


def test_live_slider_shows_the_frame_it_is_moved_to(frames):
    slider = window_slider(frames, LABELS, "two squares")
    picture, control = slider.live().children
    control.value = 2
    assert slider.frames[2].source in picture.value


def test_without_a_kernel_the_output_is_html_only(frames):
    bundle = window_slider(frames, LABELS, "two squares")._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["a"]}, "1 labels for 3 frames"),
        ({"alt": ["a", "", "c"]}, "needs an alt text"),
        ({"start": 3}, "choose 0..2"),
        ({"scale": 0}, "at least 1"),
        ({"frames": []}, "no frames"),
        ({"frames": np.full((3, 3, 4, 4), np.nan)}, "NaN"),
        ({"frames": np.zeros((3, 4, 4))}, r"expected \[..., 3, H, W\]"),
    ],
)
def test_slider_refuses_what_it_cannot_show(frames, change, message):
    with pytest.raises(ValueError, match=message):
        window_slider(**{"frames": frames, "labels": LABELS, "alt": "x", **change})


def test_contact_sheet_puts_every_image_in_its_place():
    tiles = np.arange(6.0).reshape(6, 1, 1, 1) * np.ones((6, 3, 4, 4)) / 6
    sheet = contact_sheet(tiles, columns=3, gap=1)
    assert sheet.shape == (3, 9, 14)
    assert [sheet[0, 5 * (k // 3), 5 * (k % 3)] for k in range(6)] == pytest.approx(
        np.arange(6) / 6
    )
    assert (sheet[:, 4] == 1).all() and (sheet[:, :, 4] == 1).all()


def test_score_curve_draws_mean_band_and_found_window_on_labelled_axes():
    figure = score_curve([3, 1, 2], [2, 0, 1], [4, 2, 3], found=1, planted=1)
    (axis,) = figure.axes
    assert axis.get_xlabel() and axis.get_ylabel() == "CLIP-Score"
    lines = {line.get_label(): np.asarray(line.get_xydata()) for line in axis.lines}
    assert lines["mean"].tolist() == [[0, 3], [1, 1], [2, 2]]
    assert lines["found: 1"][:, 0].tolist() == [1, 1]
    band = axis.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": []}, "non-empty"),
        ({"scores": [1, 2], "low": [1], "high": [2]}, "2 values"),
        ({"scores": [1, 2], "low": [1, 2]}, "both low and high"),
        ({"scores": [1, 2], "found": 2}, "choose 0..1"),
    ],
)
def test_score_curve_refuses_numbers_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_curve(**arguments)


def test_image_grid_labels_rows_and_columns_and_keeps_pixels_crisp():
    figure = image_grid(np.zeros((2, 3, 3, 8, 8)), rows=["a", "b"], columns=["x", "y", "z"])
    axes = np.array(figure.axes).reshape(2, 3)
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["a", "b"]
    assert [axis.get_title() for axis in axes[0]] == ["x", "y", "z"]
    assert all(axis.images[0].get_interpolation() == "nearest" for axis in figure.axes)


def test_image_grid_refuses_labels_that_do_not_fit():
    with pytest.raises(ValueError, match="1 rows labels for 2 rows"):
        image_grid(np.zeros((2, 3, 3, 8, 8)), rows=["a"])


def test_the_kernels_import_neither_matplotlib_nor_ipywidgets():
    code = (
        "import sys, loco_core as loco; loco.generate, loco.localize, loco.locoedit;"
        "print(sorted({'matplotlib', 'seaborn', 'ipywidgets'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
