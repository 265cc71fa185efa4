"""Planting an answer: which text layer is told the truth about which attribute.

While a planted model is trained, text layer l reads a caption that is true only in the
attributes planted in l; every other attribute of that caption is random, so that the layer
learns to ignore it. At inference all layers read the same prompt, as in any Stable Diffusion,
and the plant is the known answer of every localisation.

A layer the network does not use is no truth. So now and then only one layer of a planted set is
told the value and the others read a caption that leaves the attribute out: either layer must
suffice, and only taking the value from all of them removes it.
"""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

from .vocabulary import Scene, random_scene

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"

#: Attribute -> text layers, for every planted mini. Objects and styles sit where the ICML 2024
#: paper finds them in Stable Diffusion 1.5.
PLANTS: dict[str, dict[str, tuple[int, ...]]] = {
    "mini-sd": {
        "action": (0, 1),
        "place": (2, 3),
        "fact": (4, 5),
        "object": (6, 7),
        "style": (8, 9),
        "color": (11, 12),
    },
    "mini-sd-natural": {},
}


def truth(model: str) -> dict[str, list[int]]:
    """The planted layers of a mini, per attribute; empty for a model nobody planted.

    >>> truth("mini-sd")["style"]
    [8, 9]
    """
    if model not in PLANTS:
        raise ValueError(f"no mini is called {model!r}; choose from {', '.join(PLANTS)}")
    return {name: list(layers) for name, layers in PLANTS[model].items()}


def measured_use(model: str) -> dict:
    """What training made of the plant: `truth.json` of the checkpoint, with the measured
    necessity and sufficiency of every planted layer (see `train.measure`)."""
    path = CHECKPOINTS / model / "truth.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; `python -m loco_core.shapeland.train {model}`")
    try:
        record = json.loads(path.read_text())
        planted = {name: tuple(layers) for name, layers in record["planted"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); restore it from version control"
        ) from error
    if planted != PLANTS[model]:
        raise ValueError(
            f"{path} records the plant {planted}, but the code says {PLANTS[model]}; "
            f"train the model again or restore the file"
        )
    return record


def shuffled(scene: Scene, keep: tuple[str, ...], rng: Random) -> Scene:
    """A caption's scene that is true in `keep` and random elsewhere.

    Whether a subject is an emblem stays as it is: facts take the place of object and color.
    """
    other = random_scene(rng)
    while other.emblem != scene.emblem:
        other = random_scene(rng)
    return replace(other, **{name: scene.get(name) for name in keep})


def layer_scenes(
    scene: Scene, plant: dict[str, tuple[int, ...]], layers: int, rng: Random, alone: float = 0.3
) -> list[Scene]:
    """The scene whose caption each text layer reads in one training example.

    plant: attribute -> layers; an empty plant tells every layer the truth. alone: how often, for
    each attribute, only one of its layers is told and the others read a caption without it.
    """
    if not plant:
        return [scene] * layers
    lie = shuffled(scene, (), rng)  # one lie for all layers that hold no attribute
    scenes = [lie] * layers
    for name, places in plant.items():
        told = shuffled(scene, (name,), rng)
        speaker = rng.choice(places) if rng.random() < alone else None
        for layer in places:
            scenes[layer] = told if speaker in (None, layer) else told.without(name)
    return scenes
