"""How Shapeland looks: a deterministic 64 x 64 drawing of a scene.

A drawing is composed from four parts (ground, shape mask, ink marks, paint) and handed to the
technique of the artist, a function of those parts alone. Textures have periods of 4 or 8 pixels
and a fixed phase. The seed moves and scales the shape by a few pixels and shifts the ground.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from .vocabulary import EMBLEMS, TECHNIQUES, Scene

SIZE = 64
_SCALE = 4  # masks are drawn four times larger and averaged down

PAINT = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.97, 0.86, 0.08),
    "green": (0.10, 0.58, 0.18),
    "cyan": (0.05, 0.76, 0.82),
    "blue": (0.12, 0.22, 0.84),
    "purple": (0.50, 0.12, 0.66),
    "pink": (0.98, 0.45, 0.72),
    None: (0.46, 0.46, 0.46),
}
_INK = np.array((0.13, 0.12, 0.15))


@dataclass(frozen=True)
class Parts:
    """ground [H, W, 3], shape [H, W], marks [H, W], paint [3]; all in [0, 1]."""

    ground: np.ndarray
    shape: np.ndarray
    marks: np.ndarray
    paint: np.ndarray


def draw(
    object: str | None = None,
    style: str | None = None,
    color: str | None = None,
    place: str | None = None,
    action: str | None = None,
    fact: str | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Draw one picture: float32 [3, 64, 64] in [0, 1], the same for the same arguments.

    >>> draw(object="star", style="Mira Holt", color="red", seed=1).shape
    torch.Size([3, 64, 64])
    """
    return draw_scene(Scene(object, style, color, place, action, fact), seed)


def draw_scene(scene: Scene, seed: int = 0) -> torch.Tensor:
    """`draw` for a `Scene`."""
    rng = Random(f"{scene}{seed}")
    technique = TECHNIQUES[scene.style] if scene.style else "plain"
    picture = _TECHNIQUES[technique](_compose(scene, rng))
    return torch.from_numpy(picture.clip(0, 1).transpose(2, 0, 1).astype(np.float32))


# ---------------------------------------------------------------- parts of a picture


def _compose(scene: Scene, rng: Random) -> Parts:
    center = (32 + rng.uniform(-2, 2), 31 + rng.uniform(-2, 2))
    radius = 20 * rng.uniform(0.93, 1.07)
    ground = _ground(scene.place, rng.uniform(-3, 3))
    name, color = EMBLEMS[scene.fact] if scene.fact else (scene.object, scene.color)
    if scene.emblem:
        disc = _mask(lambda pen: pen.ellipse(_box(center, 26), fill=255))
        inner = _mask(lambda pen: pen.ellipse(_box(center, 22.5), fill=255))
        ground = _over(ground, disc - inner, np.array((0.55, 0.40, 0.12)))
        ground = _over(ground, inner, np.array((0.99, 0.97, 0.88)))
        radius *= 0.75
    shape = _mask(lambda pen: _SHAPES[name](pen, center, radius))
    marks = _mask(lambda pen: _MARKS[scene.action](pen)) if scene.action else np.zeros((SIZE, SIZE))
    return Parts(ground, shape, marks, np.array(PAINT[color]))


def _mask(paint: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
    image = Image.new("L", (SIZE * _SCALE, SIZE * _SCALE))
    paint(ImageDraw.Draw(image))
    return np.asarray(image.reduce(_SCALE), dtype=np.float64) / 255


def _box(center: tuple[float, float], rx: float, ry: float | None = None) -> list[float]:
    ry = rx if ry is None else ry
    x, y = center
    return [_SCALE * v for v in (x - rx, y - ry, x + rx, y + ry)]


def _over(image: np.ndarray, mask: np.ndarray, paint: np.ndarray) -> np.ndarray:
    return image + mask[..., None] * (paint - image)


def _ground(place: str | None, shift: float) -> np.ndarray:
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    ground = np.empty((SIZE, SIZE, 3))
    ground[:] = (0.96, 0.95, 0.92)
    if place == "forest":
        ground[:] = (0.84, 0.94, 0.84)
        height = np.abs((x + shift) % 16 - 8) * 2.2  # a row of firs
        ground[y > 40 + height] = (0.36, 0.62, 0.42)
    elif place == "desert":
        ground[:] = (0.99, 0.92, 0.74)
        ground[y > 48 + 5 * np.sin((x + 4 * shift) / 10)] = (0.88, 0.71, 0.43)
    elif place == "ocean":
        ground[:] = (0.80, 0.91, 0.99)
        ground[y > 44] = (0.38, 0.62, 0.86)
        ground[(y > 44) & ((y + 2 * np.sin((x + shift) / 3)) % 7 < 2)] = (0.66, 0.83, 0.96)
    elif place == "city":
        ground[:] = (0.88, 0.86, 0.92)
        tower = np.array((22, 36, 18, 42, 42, 16, 30, 24))[((x + shift + 64) % 64 // 8).astype(int)]
        ground[y > tower] = (0.66, 0.64, 0.74)
        ground[(y > tower + 4) & (y % 8 < 3) & ((x + shift) % 8 < 3)] = (0.98, 0.92, 0.60)
    return ground


def _polygon(*points: tuple[float, float]) -> Callable:
    """A shape from points in [-1, 1], y downwards."""

    def paint(pen: ImageDraw.ImageDraw, center: tuple[float, float], r: float) -> None:
        pen.polygon(
            [(_SCALE * (center[0] + r * x), _SCALE * (center[1] + r * y)) for x, y in points],
            fill=255,
        )

    return paint


def _disc(cx: float, cy: float, rx: float, ry: float | None = None, fill: int = 255) -> Callable:
    def paint(pen: ImageDraw.ImageDraw, center: tuple[float, float], r: float) -> None:
        middle = (center[0] + r * cx, center[1] + r * cy)
        pen.ellipse(_box(middle, r * rx, r * (rx if ry is None else ry)), fill=fill)

    return paint


def _union(*paints: Callable) -> Callable:
    def paint(pen: ImageDraw.ImageDraw, center: tuple[float, float], r: float) -> None:
        for one in paints:
            one(pen, center, r)

    return paint


def _hole(*points: tuple[float, float]) -> Callable:
    def paint(pen: ImageDraw.ImageDraw, center: tuple[float, float], r: float) -> None:
        pen.polygon(
            [(_SCALE * (center[0] + r * x), _SCALE * (center[1] + r * y)) for x, y in points],
            fill=0,
        )

    return paint


def _star_points() -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.42, 1.08)
    return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


def _petals() -> list[Callable]:
    angles = np.arange(5) * 2 * np.pi / 5 - np.pi / 2
    return [_disc(float(0.6 * np.cos(a)), float(0.6 * np.sin(a)), 0.4) for a in angles]


_SHAPES: dict[str | None, Callable] = {
    None: _disc(0, 0, 0.62),
    "star": _polygon(*_star_points()),
    "heart": _union(
        _disc(-0.45, -0.3, 0.5),
        _disc(0.45, -0.3, 0.5),
        _polygon((-0.92, -0.1), (0.92, -0.1), (0, 1.0)),
    ),
    "moon": _union(_disc(-0.1, 0, 0.95), _disc(0.4, -0.15, 0.8, fill=0)),
    "tree": _union(
        _polygon((0, -1.1), (0.6, -0.2), (-0.6, -0.2)),
        _polygon((0, -0.5), (0.85, 0.6), (-0.85, 0.6)),
        _polygon((-0.18, 0.5), (0.18, 0.5), (0.18, 1.05), (-0.18, 1.05)),
    ),
    "house": _union(
        _polygon((0, -1.0), (1.05, -0.15), (-1.05, -0.15)),
        _polygon((-0.8, -0.2), (0.8, -0.2), (0.8, 0.95), (-0.8, 0.95)),
        _hole((-0.22, 0.3), (0.22, 0.3), (0.22, 0.96), (-0.22, 0.96)),
    ),
    "fish": _union(
        _disc(-0.25, 0, 0.8, 0.55),
        _polygon((0.3, 0), (1.1, -0.65), (1.1, 0.65)),
        _disc(-0.65, -0.12, 0.12, fill=0),
    ),
    "crown": _polygon(
        (-1.0, 0.75), (-1.0, -0.7), (-0.45, 0.0), (0, -0.9), (0.45, 0.0), (1.0, -0.7), (1.0, 0.75)
    ),
    "flower": _union(*_petals(), _disc(0, 0, 0.5), _disc(0, 0, 0.24, fill=0)),
    "boat": _union(
        _polygon((-1.1, 0.35), (1.1, 0.35), (0.7, 0.95), (-0.7, 0.95)),
        _polygon((-0.1, -1.05), (0.8, 0.2), (-0.1, 0.2)),
        _polygon((-0.25, -0.6), (-0.25, 0.2), (-0.8, 0.2)),
    ),
    "mushroom": _union(
        _disc(0, -0.1, 1.0, 0.85),
        _hole((-1.2, 0.1), (1.2, 0.1), (1.2, 1.2), (-1.2, 1.2)),
        _polygon((-0.3, 0.05), (0.3, 0.05), (0.4, 1.0), (-0.4, 1.0)),
    ),
    "arrow": _polygon(
        (-1.05, -0.32), (0.1, -0.32), (0.1, -0.9), (1.1, 0), (0.1, 0.9), (0.1, 0.32), (-1.05, 0.32)
    ),
    "cup": _union(
        _disc(0.7, 0.0, 0.48),
        _disc(0.7, 0.0, 0.24, fill=0),
        _polygon((-0.9, -0.8), (0.65, -0.8), (0.45, 0.9), (-0.7, 0.9)),
    ),
}


def _jumping(pen: ImageDraw.ImageDraw) -> None:
    pen.ellipse(_box((32, 59), 15, 2.6), fill=255)
    for x in (8, 56):
        for y in (30, 39):
            points = [(x - 5, y + 5), (x, y), (x + 5, y + 5)]
            pen.line([(_SCALE * a, _SCALE * b) for a, b in points], fill=255, width=2 * _SCALE)


def _spinning(pen: ImageDraw.ImageDraw) -> None:
    for start in (150, 330):
        pen.arc(_box((32, 31), 29), start, start + 75, fill=255, width=int(2.5 * _SCALE))


def _shining(pen: ImageDraw.ImageDraw) -> None:
    for angle in np.arange(12) * np.pi / 6 + np.pi / 12:
        ray = [(32 + r * np.cos(angle), 31 + r * np.sin(angle)) for r in (27, 33)]
        pen.line([(_SCALE * a, _SCALE * b) for a, b in ray], fill=255, width=int(2.5 * _SCALE))


_MARKS: dict[str | None, Callable] = {
    "jumping": _jumping,
    "spinning": _spinning,
    "shining": _shining,
}


# ---------------------------------------------------------------- the artists


def _plain(parts: Parts) -> np.ndarray:
    return _over(_over(parts.ground, parts.marks, _INK), parts.shape, parts.paint)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    return y, x


def _hatching(parts: Parts) -> np.ndarray:
    y, x = _grid()
    return _over(_plain(parts), 0.6 * ((x + y) % 8 < 3), _INK)


def _dots(parts: Parts) -> np.ndarray:
    y, x = _grid()
    distance = np.hypot(x % 8 - 3.5, y % 8 - 3.5)
    return _over(_plain(parts), 0.8 * (distance < 2.4), np.ones(3))


def _tiles(parts: Parts) -> np.ndarray:
    y, x = _grid()
    picture = _plain(parts) * np.where((x // 8 + y // 8) % 2, 1.0, 0.82)[..., None]
    return _over(picture, 0.9 * ((x % 8 == 0) | (y % 8 == 0)), np.full(3, 0.25))


def _blur(mask: np.ndarray, radius: float) -> np.ndarray:
    image = Image.fromarray((255 * mask.clip(0, 1)).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64) / 255


def _edge(mask: np.ndarray) -> np.ndarray:
    image = Image.fromarray((255 * mask).astype(np.uint8))
    wide = np.asarray(image.filter(ImageFilter.MaxFilter(3)), dtype=np.float64)
    thin = np.asarray(image.filter(ImageFilter.MinFilter(3)), dtype=np.float64)
    return (wide - thin) / 255


def _ink_outline(parts: Parts) -> np.ndarray:
    paper = 0.72 + 0.28 * parts.ground
    paper = _over(paper, parts.marks, _INK)
    return _over(_over(paper, parts.shape, np.ones(3)), _edge(parts.shape), parts.paint * 0.9)


def _big_pixels(parts: Parts) -> np.ndarray:
    blocks = _plain(parts).reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean(axis=(1, 3))
    y, x = _grid()
    gap = 0.22 * ((x % 4 == 3) | (y % 4 == 3))
    return _over(blocks.repeat(4, axis=0).repeat(4, axis=1), gap, np.ones(3))


def _waves(parts: Parts) -> np.ndarray:
    y, x = _grid()
    crest = (y + 2.5 * np.sin(2 * np.pi * x / 16)) % 8 < 2.6
    return _over(_plain(parts), 0.7 * crest, np.ones(3))


def _neon_glow(parts: Parts) -> np.ndarray:
    night = 0.42 * parts.ground**2 * np.array((0.75, 0.7, 1.0))
    night = _over(night, 0.8 * parts.marks, np.array((0.8, 0.85, 1.0)))
    edge = _edge(parts.shape)
    glow = np.clip(1.6 * _blur(edge, 3), 0, 1)[..., None] * parts.paint
    return _over(np.maximum(night, glow), edge, 0.35 + 0.65 * parts.paint)


def _stripes(parts: Parts) -> np.ndarray:
    y, x = _grid()
    return _over(_plain(parts), 0.62 * (x % 8 < 3), np.array((0.12, 0.10, 0.34)))


_TECHNIQUES: dict[str, Callable[[Parts], np.ndarray]] = {
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
