"""Figures and the slider: what a reader sees, with and without a kernel."""

import base64
import io
import re
import subprocess
import sys
import tracemalloc
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from loco_core.concepts import Concept
from loco_core.display import contact_sheet, effect_figure, image_grid, score_curve, window_slider
from loco_core.display.pixels import eight_bit
from loco_core.display.widgets import data_uri
from loco_core.families.sites import KINDS, PARTS, Site
from loco_core.localization.causal_trace import CausalTrace
from loco_core.painting.images import Held, Images
from loco_core.records import Provenance
from loco_core.worlds.shapeland import draw

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


def decoded(uri: str) -> np.ndarray:
    raw = base64.b64decode(uri.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).transpose(2, 0, 1)


def test_frames_decode_to_the_images_that_went_in():
    x, y = np.meshgrid(np.linspace(0, 1, 32), np.linspace(0, 1, 32))
    image = np.stack([x, y, 1 - x])
    assert np.abs(decoded(data_uri(image)) / 255 - image).mean() < 0.02


def test_a_drawing_is_embedded_without_loss_and_a_photograph_in_a_quarter_of_its_bytes():
    drawing = eight_bit(draw(object="star", style="Mira Holt", seed=0))
    assert np.array_equal(decoded(data_uri(drawing)), drawing)
    noise = np.fft.fft2(np.random.default_rng(0).random((3, 256, 256)))
    frequency = np.hypot(*np.ix_(*[np.fft.fftfreq(256)] * 2))
    waves = np.fft.ifft2(noise / np.maximum(frequency, 1 / 256)).real
    waves = waves[:1] + 0.2 * waves
    photograph = eight_bit((waves - waves.min()) / np.ptp(waves))
    assert len(data_uri(photograph)) < photograph.nbytes / 4
    assert np.abs(decoded(data_uri(photograph)) - photograph.astype(float)).mean() < 255 * 0.02


def test_live_slider_shows_the_frame_it_is_moved_to(frames):
    slider = window_slider(frames, LABELS, "two squares")
    picture, control = slider.live().children
    control.value = 2
    assert slider.frames[2].source in picture.value


def test_slider_names_the_rows_and_columns_of_its_sheets(frames):
    named = window_slider(frames, LABELS, "squares", rows=["one"], columns=["left", "<right>"])
    plain = window_slider(frames, LABELS, "squares", columns=2)
    assert [f.source for f in named.frames] == [f.source for f in plain.frames]
    for text in (named.to_html(), named.live().children[0].value):
        assert all(f"<span>{name}</span>" in text for name in ("one", "left", "&lt;right&gt;"))
    assert "<span>left" not in plain.to_html()


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
        ({"frames": np.zeros((3, 4, 4))}, r"pictures are \[..., 3, H, W\]"),
        ({"frames": np.zeros((3, 3, 4, 4), int)}, "floats in .0, 1. or uint8, not int64"),
    ],
)
def test_slider_refuses_what_it_cannot_show(frames, change, message):
    with pytest.raises(ValueError, match=message):
        window_slider(**{"frames": frames, "labels": LABELS, "alt": "x", **change})


def test_contact_sheet_puts_every_image_in_its_place():
    tiles = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1) * np.ones((6, 3, 4, 4), np.uint8)
    sheet = contact_sheet(tiles, columns=3, gap=1)
    assert sheet.shape == (3, 9, 14) and sheet.dtype == np.uint8
    assert [sheet[0, 5 * (k // 3), 5 * (k % 3)] for k in range(6)] == list(range(6))
    assert (sheet[:, 4] == 255).all() and (sheet[:, :, 4] == 255).all()


BYTES = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 4, 4), dtype=np.uint8)
SAME = {
    "float64": BYTES / 255,
    "float32": torch.from_numpy(BYTES).float() / 255,
    "uint8 tensor": torch.from_numpy(BYTES),
    "list of tensors": [torch.from_numpy(row) for row in BYTES],
    "read when asked for": Images(Held(torch.from_numpy(BYTES))),
}


@pytest.mark.parametrize("pictures", SAME.values(), ids=SAME)
def test_a_picture_looks_the_same_as_bytes_and_as_numbers(pictures):
    assert np.array_equal(eight_bit(pictures), BYTES)
    assert np.array_equal(contact_sheet(pictures, 3), contact_sheet(BYTES, 3))
    shown = window_slider(pictures, ["a", "b"], "noise", scale=np.int64(2))
    assert shown == window_slider(BYTES, ["a", "b"], "noise")
    grids = [image_grid(x) for x in (pictures, BYTES)]
    ours, theirs = ([axis.images[0].get_array() for axis in grid.axes] for grid in grids)
    assert np.array_equal(ours, theirs)


def test_bytes_are_shown_without_a_copy_and_numbers_are_rounded_and_cut():
    assert np.shares_memory(eight_bit(BYTES), BYTES)
    grey = [[[-1.0, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 7.0]]] * 3
    assert eight_bit(grey)[0, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_of_many_large_pictures_one_at_a_time_is_held():
    pictures = np.zeros((12, 3, 512, 512), np.uint8)
    tracemalloc.start()
    window_slider(pictures, [str(k) for k in range(12)], "black")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * pictures[0].nbytes


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


def causal_trace(where: str, names: list[str], tokens: list[int | None]) -> CausalTrace:
    """A trace of made-up scores: three prompts, two seeds."""
    groups = tuple((Site(name, kind_of(name), token),) for name in names for token in tokens)
    scores = torch.rand(len(groups), 3, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    concept = Concept("Monet", "style", ["a house by Monet"], ["a house"])
    clean, corrupted = torch.ones(3, 2).double(), torch.full((3, 1, 2), 0.5).double()
    made = Provenance("made up", None, "0")
    goal = clean[:, None].expand_as(corrupted)
    return CausalTrace(concept, groups, scores, corrupted, goal, 1, None, 0, made, where)


def kind_of(name: str) -> str:
    return {**KINDS, **PARTS}[next(p for p in name.split(".")[::-1] if not p.isdigit())]


def encoder_sites(layers: dict[str, int]) -> list[str]:
    return [
        f"{path}.encoder.layers.{layer}.{part}"
        for path, count in layers.items()
        for layer in range(count)
        for part in PARTS
    ]


def unet_sites(blocks: dict[str, int]) -> list[str]:
    return [
        f"{block}.{site}"
        for block, count in blocks.items()
        for k in range(count)
        for site in (f"resnets.{k}", f"attentions.{k}.attn1", f"attentions.{k}.attn2")
    ]


def text_boxes(figure, axis) -> list[list]:
    """Of each axis, the boxes of the labels that are drawn."""
    figure.canvas.draw()
    return [
        [label.get_window_extent() for label in labels if label.get_text()]
        for labels in (axis.get_xticklabels(), axis.get_yticklabels())
    ]


@pytest.mark.parametrize(
    ("layers", "tokens"),
    [({"text_encoder": 4}, 9), ({"text_encoder": 12, "text_encoder_2.text_model": 32}, 30)],
    ids=["mini", "SD-XL"],
)
def test_maps_of_a_text_trace_stand_below_each_other_with_labels_that_do_not_touch(layers, tokens):
    trace = causal_trace("text_encoder", encoder_sites(layers), list(range(-3, tokens - 3)))
    figure = effect_figure(trace, threshold=0.1)
    *maps, _ = figure.axes
    assert [axis.get_title() for axis in maps] == ["self-attention", "MLP"]
    above, below = (axis.get_position() for axis in maps)
    assert above.y0 > below.y1 and above.x0 == pytest.approx(below.x0)
    for axis in maps:
        for boxes in text_boxes(figure, axis):
            assert len(boxes) >= 4
            assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    marks = sum(text.get_text() == "*" for axis in maps for text in axis.texts)
    assert marks == len(trace.causal(0.1)) > 0


def test_a_text_trace_of_one_token_is_one_map_of_layer_and_kind():
    trace = causal_trace("text_encoder", encoder_sites({"text_encoder": 4}), [0])
    one, _ = effect_figure(trace, threshold=0.1).axes
    kinds = [label.get_text() for label in one.get_xticklabels()]
    assert kinds == ["self-attention", "MLP"] and "at token 0" in one.get_xlabel()
    drawn = one.collections[0].get_array().reshape(4, 2).T.flatten()
    by_kind = [i for kind in kinds for i, site in enumerate(trace.sites) if site.kind == kind]
    assert drawn.tolist() == pytest.approx(trace.effects[by_kind].tolist())


@pytest.mark.parametrize(
    "blocks",
    [
        {"down_blocks.0": 3, "mid_block": 2, "up_blocks.0": 3},
        {f"{b}_blocks.{i}": 12 for b in ("down", "up") for i in range(3)} | {"mid_block": 3},
    ],
    ids=["24 sites", "225 sites"],
)
def test_bars_of_a_trace_of_the_denoiser_name_every_block_without_touching_and_draw_every_site(
    blocks,
):
    names = unet_sites(blocks)
    figure = effect_figure(causal_trace("denoiser", names, [None]), threshold=0.4)
    (axis,) = figure.axes
    heights = sorted(
        (bar.get_x(), bar.get_height())
        for c in axis.containers
        if hasattr(c, "patches")
        for bar in c
    )
    trace = causal_trace("denoiser", names, [None])
    assert [height for _, height in heights] == pytest.approx(trace.effects.tolist())
    boxes, _ = text_boxes(figure, axis)
    assert len(boxes) == len(blocks) and not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_score_curve_of_seventy_layers_has_labels_that_do_not_touch():
    figure = score_curve(np.arange(69.0), found=40)
    boxes, _ = text_boxes(figure, figure.axes[0])
    assert len(boxes) >= 10 and not any(a.overlaps(b) for a, b in pairwise(boxes))


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
