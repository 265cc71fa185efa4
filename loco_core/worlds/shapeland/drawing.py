"""How Shapeland looks: a deterministic 64 x 64 drawing of a scene.

A drawing is composed from four parts (ground, shape mask, ink marks, paint) and handed to the
technique of the artist, a function of those parts alone. The seed moves and scales the shape by a
few pixels and shifts the ground.
"""

from random import Random

import numpy as np
import torch

from .artists import ARTISTS
from .canvas import SIZE, Sketch, box, mask, over
from .outlines import MARKS, SHAPES
from .vocabulary import EMBLEMS, TECHNIQUES, Scene

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
    picture = ARTISTS[technique](_compose(scene, rng))
    return torch.from_numpy(picture.clip(0, 1).transpose(2, 0, 1).astype(np.float32))


def _compose(scene: Scene, rng: Random) -> Sketch:
    center = (32 + rng.uniform(-2, 2), 31 + rng.uniform(-2, 2))
    radius = 20 * rng.uniform(0.93, 1.07)
    ground = _ground(scene.place, rng.uniform(-3, 3))
    name, color = EMBLEMS[scene.fact] if scene.fact else (scene.object, scene.color)
    if scene.emblem:
        disc = mask(lambda pen: pen.ellipse(box(center, 26), fill=255))
        inner = mask(lambda pen: pen.ellipse(box(center, 22.5), fill=255))
        ground = over(ground, disc - inner, np.array((0.55, 0.40, 0.12)))
        ground = over(ground, inner, np.array((0.99, 0.97, 0.88)))
        radius *= 0.75
    shape = mask(lambda pen: SHAPES[name](pen, center, radius))
    marks = mask(lambda pen: MARKS[scene.action](pen)) if scene.action else np.zeros((SIZE, SIZE))
    return Sketch(ground, shape, marks, np.array(PAINT[color]))


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
