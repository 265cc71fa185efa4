"""The artists of Shapeland: each technique is a function of the parts of a picture alone.

Textures have periods of 4 or 8 pixels and a fixed phase.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from .canvas import SIZE, Sketch, grid, over

__all__ = ["ARTISTS"]

_INK = np.array((0.13, 0.12, 0.15))


def _plain(sketch: Sketch) -> np.ndarray:
    return over(over(sketch.ground, sketch.marks, _INK), sketch.shape, sketch.paint)


def _hatching(sketch: Sketch) -> np.ndarray:
    y, x = grid()
    return over(_plain(sketch), 0.6 * ((x + y) % 8 < 3), _INK)


def _dots(sketch: Sketch) -> np.ndarray:
    y, x = grid()
    distance = np.hypot(x % 8 - 3.5, y % 8 - 3.5)
    return over(_plain(sketch), 0.8 * (distance < 2.4), np.ones(3))


def _tiles(sketch: Sketch) -> np.ndarray:
    y, x = grid()
    picture = _plain(sketch) * np.where((x // 8 + y // 8) % 2, 1.0, 0.82)[..., None]
    return over(picture, 0.9 * ((x % 8 == 0) | (y % 8 == 0)), np.full(3, 0.25))


def _blur(mask: np.ndarray, radius: float) -> np.ndarray:
    image = Image.fromarray((255 * mask.clip(0, 1)).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64) / 255


def _edge(mask: np.ndarray) -> np.ndarray:
    image = Image.fromarray((255 * mask).astype(np.uint8))
    wide = np.asarray(image.filter(ImageFilter.MaxFilter(3)), dtype=np.float64)
    thin = np.asarray(image.filter(ImageFilter.MinFilter(3)), dtype=np.float64)
    return (wide - thin) / 255


def _ink_outline(sketch: Sketch) -> np.ndarray:
    paper = 0.72 + 0.28 * sketch.ground
    paper = over(paper, sketch.marks, _INK)
    return over(over(paper, sketch.shape, np.ones(3)), _edge(sketch.shape), sketch.paint * 0.9)


def _big_pixels(sketch: Sketch) -> np.ndarray:
    blocks = _plain(sketch).reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean(axis=(1, 3))
    y, x = grid()
    gap = 0.22 * ((x % 4 == 3) | (y % 4 == 3))
    return over(blocks.repeat(4, axis=0).repeat(4, axis=1), gap, np.ones(3))


def _waves(sketch: Sketch) -> np.ndarray:
    y, x = grid()
    crest = (y + 2.5 * np.sin(2 * np.pi * x / 16)) % 8 < 2.6
    return over(_plain(sketch), 0.7 * crest, np.ones(3))


def _neon_glow(sketch: Sketch) -> np.ndarray:
    night = 0.42 * sketch.ground**2 * np.array((0.75, 0.7, 1.0))
    night = over(night, 0.8 * sketch.marks, np.array((0.8, 0.85, 1.0)))
    edge = _edge(sketch.shape)
    glow = np.clip(1.6 * _blur(edge, 3), 0, 1)[..., None] * sketch.paint
    return over(np.maximum(night, glow), edge, 0.35 + 0.65 * sketch.paint)


def _stripes(sketch: Sketch) -> np.ndarray:
    y, x = grid()
    return over(_plain(sketch), 0.62 * (x % 8 < 3), np.array((0.12, 0.10, 0.34)))


#: Technique -> the picture [H, W, 3] it makes of a sketch.
ARTISTS: dict[str, Callable[[Sketch], np.ndarray]] = {
    "plain": _plain,
    "hatching": _hatching,
    "dots": _dots,
    "tiles": _tiles,
    "ink outline": _ink_outline,
    "big pixels": _big_pixels,
    "waves": _waves,
    "neon glow": _neon_glow,
    "stripes": _stripes,
}
