"""Does a mini draw what it is told, and does it use the layers it was planted in?

Every figure is a share of images by the judge, on captions whose combination of attributes was
never trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch

from loco_core.families import family_of
from loco_core.painting.generate import generate

from ..shapeland.judge import judge
from ..shapeland.planting import POOLED, Place
from ..shapeland.vocabulary import ATTRIBUTES, Scene, describe, held_out_scenes

SETTINGS = {"steps": 25, "guidance": 5.0, "batch_size": 50}


def agreement(pipe: Any, count: int = 200, seed: int = 0, **settings: Any) -> dict[str, float]:
    """Per attribute, the share of `count` held-out captions that the image agrees with.

    Object and color are asked of captions that name them, a fact (object and color of the
    emblem, both right) of captions with an emblem.
    """
    scenes = held_out_scenes(count, seed)
    seen = _see(pipe, [describe(scene) for scene in scenes], **settings)
    return {name: _share(scenes, name, seen) for name in ATTRIBUTES}


def plant_use(
    pipe: Any,
    planted: Mapping[str, Sequence[Place]],
    count: int = 100,
    seed: int = 1,
    **settings: Any,
) -> dict[str, dict]:
    """What the network makes of a plant; per attribute, shares of held-out captions naming it:

    - agrees: the image shows the value, every place reading the caption.
    - holds: the same, every place *but* the planted ones reading another value.
    - follows: the image shows the other value if *only* the planted places read it.
    - removed: it does not show the value if the planted places read a caption without it.
    - layers: per planted place, `necessity` (the value is lost if this place alone reads a caption
      without it) and `sufficiency` (it is kept if this is the only planted place that reads it),
      over a quarter of the captions.

    planted: attribute -> places. The places of a pipeline are its text layers and, if it has one,
    the pooled path, "pooled".
    """
    return {
        name: _use_of(pipe, name, tuple(places), count, seed, **settings)
        for name, places in planted.items()
    }


def _use_of(
    pipe: Any, name: str, planted: tuple[Place, ...], count: int, seed: int, **settings: Any
) -> dict:
    rng = Random(seed)
    scenes = [scene for scene in held_out_scenes(12 * count, seed) if scene.get(name)][:count]
    others = [
        replace(s, **{name: rng.choice([v for v in ATTRIBUTES[name] if v != s.get(name)])})
        for s in scenes
    ]
    bare = [scene.without(name) for scene in scenes]
    model = family_of(pipe)
    layers = len(model.text_layers)
    places: list[Place] = [*range(layers), POOLED] if model.pooled else [*range(layers)]
    rest = [place for place in places if place not in planted]
    some = max(1, count // 4)

    def shown(source: list[Scene], swapped: Sequence[Place], expect: list[Scene], n: int) -> float:
        """Share of the first n that show `expect`, the places `swapped` reading `source`."""
        prompts, texts = [describe(s) for s in scenes[:n]], [describe(s) for s in source[:n]]
        moved = torch.tensor([place in swapped for place in places])
        routes = torch.arange(n)[:, None] + n * moved  # [caption, place]
        reads = {"routes": routes[:, :layers], "sources": prompts + texts}
        if model.pooled:
            reads["pooled_routes"] = routes[:, -1]
        return _share(expect[:n], name, _see(pipe, prompts, **reads, **settings))

    def use_of_one(place: Place) -> dict[str, float]:
        alone = [other for other in planted if other != place]
        return {
            "necessity": round(1 - shown(bare, (place,), scenes, some), 3),
            "sufficiency": shown(bare, alone, scenes, some),
        }

    return {
        "agrees": shown(others, (), scenes, count),
        "holds": shown(others, rest, scenes, count),
        "follows": shown(others, planted, others, count),
        "removed": round(1 - shown(bare, planted, scenes, count), 3),
        "layers": {str(place): use_of_one(place) for place in planted},
    }


def _see(pipe: Any, prompts: list[str], **settings: Any) -> dict[str, list[str]]:
    return judge(generate(pipe, prompts, (0,), **(SETTINGS | settings)))


def _share(scenes: list[Scene], name: str, seen: dict[str, list[str]]) -> float:
    """Share of the scenes naming `name` in which the judge sees it."""
    asked = [index for index, scene in enumerate(scenes) if scene.get(name)]
    right = [
        seen[name][index] == scenes[index].get(name)
        if name != "fact"
        else all(seen[k][index] == scenes[index].labels()[k] for k in ("object", "color", "fact"))
        for index in asked
    ]
    return round(sum(right) / max(len(asked), 1), 3)
