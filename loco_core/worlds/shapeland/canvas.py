"""The canvas of Shapeland: 64 x 64 pixels, masks drawn on it, and the parts of a picture."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["SCALE", "SIZE", "Sketch", "box", "grid", "mask", "over"]

SIZE = 64
SCALE = 4  # masks are drawn four times larger and averaged down


@dataclass(frozen=True)
class Sketch:
    """The parts of a picture: ground [H, W, 3], shape [H, W], marks [H, W], paint [3]; all in
    [0, 1]."""

    ground: np.ndarray
    shape: np.ndarray
    marks: np.ndarray
    paint: np.ndarray


def mask(paint: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
    """What `paint` draws in white, as shares [H, W] of each pixel."""
    image = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    paint(ImageDraw.Draw(image))
    return np.asarray(image.reduce(SCALE), dtype=np.float64) / 255


def box(center: tuple[float, float], rx: float, ry: float | None = None) -> list[float]:
    """The corners of an ellipse or square around a point, as a pen takes them."""
    ry = rx if ry is None else ry
    x, y = center
    return [SCALE * v for v in (x - rx, y - ry, x + rx, y + ry)]


def over(image: np.ndarray, mask: np.ndarray, paint: np.ndarray) -> np.ndarray:
    """`image` [H, W, 3] under `paint`, as thick as `mask` [H, W]."""
    return image + mask[..., None] * (paint - image)


def grid() -> tuple[np.ndarray, np.ndarray]:
    """(y, x) of every pixel."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    return y, x
