"""Shapeland: a small world with a known answer. Drawings, captions, a judge, a plant.

import loco_core as loco
image = loco.shapeland.draw(object="star", style="Mira Holt", color="red", seed=0)
loco.shapeland.judge(image)["style"]                    # ['Mira Holt']
loco.shapeland.truth("mini-sd")["style"]                # [8, 9]
"""

from .concepts import concept
from .drawing import draw, draw_scene
from .judge import judge, seen
from .planting import measured_use, pooled_truth, truth
from .probes import probes
from .vocabulary import (
    ATTRIBUTES,
    EMBLEMS,
    NEUTRAL,
    TECHNIQUES,
    Scene,
    caption,
    describe,
    held_out_scenes,
)

__all__ = [
    "ATTRIBUTES",
    "EMBLEMS",
    "NEUTRAL",
    "TECHNIQUES",
    "Scene",
    "caption",
    "concept",
    "describe",
    "draw",
    "draw_scene",
    "held_out_scenes",
    "judge",
    "measured_use",
    "pooled_truth",
    "probes",
    "seen",
    "truth",
]
