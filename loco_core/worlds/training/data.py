"""Pictures to train on: many random scenes, drawn once and kept."""

from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import torch
from tqdm.auto import tqdm

from ..shapeland.drawing import draw_scene
from ..shapeland.vocabulary import Scene, random_scene

COUNT = 40000  # drawings to train on


@dataclass(frozen=True)
class Drawings:
    """Scenes and their drawings, uint8 [n, 3, 64, 64]."""

    scenes: list[Scene]
    images: torch.Tensor

    def __len__(self) -> int:
        return len(self.scenes)

    def floats(self, rows: torch.Tensor) -> torch.Tensor:
        """Drawings of these rows, float32 in [0, 1]."""
        return self.images[rows].float() / 255


def _draw_bytes(job: tuple[Scene, int]) -> np.ndarray:
    return (draw_scene(*job) * 255).round().byte().numpy()  # tensors would travel by file handle


def drawings(count: int, folder: Path, *, seed: int = 0, held_out: bool = False) -> Drawings:
    """`count` random drawings from one side of the split, from `folder` if they are there.

    The picture of a row depends only on `seed` and the row, not on how many are drawn.
    """
    rng = Random(f"drawings {seed} {held_out}")
    scenes = [random_scene(rng, held_out=held_out) for _ in range(count)]
    path = folder / f"drawings-{'held-out' if held_out else 'train'}-{seed}-{count}.pt"
    if path.exists():
        return Drawings(scenes, torch.load(path))
    folder.mkdir(parents=True, exist_ok=True)
    with get_context("fork").Pool() as pool:
        jobs = ((scene, seed * count + row) for row, scene in enumerate(scenes))
        drawn = list(tqdm(pool.imap(_draw_bytes, jobs, 256), "drawing", count, unit="picture"))
    images = torch.from_numpy(np.stack(drawn))
    torch.save(images, path)
    return Drawings(scenes, images)
