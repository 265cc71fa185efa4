"""The outlines of Shapeland: what each object looks like, and the marks of each action."""

from collections.abc import Callable

import numpy as np
from PIL import ImageDraw

from .canvas import SCALE, box

__all__ = ["MARKS", "SHAPES"]


def _polygon(*points: tuple[float, float], fill: int = 255) -> Callable:
    """A shape from points in [-1, 1], y downwards."""

    def paint(pen: ImageDraw.ImageDraw, center: tuple[float, float], r: float) -> None:
        pen.polygon(
            [(SCALE * (center[0] + r * x), SCALE * (center[1] + r * y)) for x, y in points],
            fill=fill,
        )

    return paint


def _disc(cx: float, cy: float, rx: float, ry: float | None = None, fill: int = 255) -> Callable:
    def paint(pen: ImageDraw.ImageDraw, center: tuple[float, float], r: float) -> None:
        middle = (center[0] + r * cx, center[1] + r * cy)
        pen.ellipse(box(middle, r * rx, r * (rx if ry is None else ry)), fill=fill)

    return paint


def _union(*paints: Callable) -> Callable:
    def paint(pen: ImageDraw.ImageDraw, center: tuple[float, float], r: float) -> None:
        for one in paints:
            one(pen, center, r)

    return paint


def _star_points() -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.42, 1.08)
    return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


def _petals() -> list[Callable]:
    angles = np.arange(5) * 2 * np.pi / 5 - np.pi / 2
    return [_disc(float(0.6 * np.cos(a)), float(0.6 * np.sin(a)), 0.4) for a in angles]


#: Object -> what draws it with a pen, around a center, of a radius.
SHAPES: dict[str | None, Callable] = {
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
        _polygon((-0.22, 0.3), (0.22, 0.3), (0.22, 0.96), (-0.22, 0.96), fill=0),
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
        _polygon((-1.2, 0.1), (1.2, 0.1), (1.2, 1.2), (-1.2, 1.2), fill=0),
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
    pen.ellipse(box((32, 59), 15, 2.6), fill=255)
    for x in (8, 56):
        for y in (30, 39):
            points = [(x - 5, y + 5), (x, y), (x + 5, y + 5)]
            pen.line([(SCALE * a, SCALE * b) for a, b in points], fill=255, width=2 * SCALE)


def _spinning(pen: ImageDraw.ImageDraw) -> None:
    for start in (150, 330):
        pen.arc(box((32, 31), 29), start, start + 75, fill=255, width=int(2.5 * SCALE))


def _shining(pen: ImageDraw.ImageDraw) -> None:
    for angle in np.arange(12) * np.pi / 6 + np.pi / 12:
        ray = [(32 + r * np.cos(angle), 31 + r * np.sin(angle)) for r in (27, 33)]
        pen.line([(SCALE * a, SCALE * b) for a, b in ray], fill=255, width=int(2.5 * SCALE))


#: Action -> what draws its marks with a pen.
MARKS: dict[str | None, Callable] = {
    "jumping": _jumping,
    "spinning": _spinning,
    "shining": _shining,
}
