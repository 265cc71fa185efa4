"""Planting an answer: which text layer is told the truth about which attribute.

While a planted model is trained, text layer l reads a caption that is true only in the
attributes planted in l; every other attribute of that caption is random, so that the layer
learns to ignore it. At inference all layers read the same prompt, as in any Stable Diffusion,
and the plant is the known answer of every localisation.

A layer the network does not use is no truth. So now and then only one layer of a planted set is
told the value and the others read a caption that leaves the attribute out: either layer must
suffice, and only taking the value from all of them removes it.

Stable Diffusion XL also reads a pooled embedding of the prompt, beside its text layers. That path
is one more place of the plant: told what is planted there, and lied to about everything else.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from ...zoo import CHECKPOINTS
from .vocabulary import Scene, random_scene

#: Where an attribute can be planted: in a text layer, by its index, or in the pooled path.
Place = int | str
POOLED = "pooled"

#: The plant of mini-sdxl, in windows of three. The style sits where the ICML 2024 authors find it
#: in the big one (45-49 of 70): in the second attention of the first up block.
_XL: dict[str, tuple[Place, ...]] = {
    "action": (0, 1, 2),
    "place": (4, 5, 6),
    "object": (7, 8, 9),
    "fact": (10, 11, 12),
    "style": (16, 17, 18),
    "color": (22, 23, 24),
}

#: Attribute -> places, for every mini; a natural one has no plant. Objects and styles of mini-sd
#: sit where the ICML 2024 paper finds them in Stable Diffusion 1.5.
PLANTS: dict[str, dict[str, tuple[Place, ...]]] = {
    "mini-sd": {
        "action": (0, 1),
        "place": (2, 3),
        "fact": (4, 5),
        "object": (6, 7),
        "style": (8, 9),
        "color": (11, 12),
    },
    "mini-sd-natural": {},
    "mini-sd-rare": {},
    "mini-sdxl": _XL,
    "mini-sdxl-natural": {},
    "mini-sdxl-pooled": _XL | {"style": (POOLED,)},
}


#: Mini -> object -> the share of its drawings that the mini was shown while training: a concept
#: that a model under-produces, to be amplified. No emblem has one of these objects.
RARE: dict[str, dict[str, float]] = {"mini-sd-rare": {"arrow": 0.02, "cup": 0.01, "boat": 0.004}}


def truth(model: str) -> dict[str, list[int]]:
    """The planted layers of a mini, per attribute; empty for a model nobody planted.

    An attribute that no text layer carries is left out: see `pooled_truth`.

    >>> truth("mini-sd")["style"]
    [8, 9]
    """
    return {name: list(places) for name, places in _plant(model).items() if POOLED not in places}


def pooled_truth(model: str) -> list[str]:
    """The attributes that are planted in the pooled path of a mini, in no text layer.

    >>> pooled_truth("mini-sdxl-pooled")
    ['style']
    """
    return [name for name, places in _plant(model).items() if POOLED in places]


def _plant(model: str) -> dict[str, tuple[Place, ...]]:
    if model not in PLANTS:
        raise ValueError(f"no mini is called {model!r}; choose from {', '.join(PLANTS)}")
    return PLANTS[model]


def measured_use(model: str) -> dict:
    """What training made of the plant: `truth.json` of the checkpoint, with the measured
    necessity and sufficiency of every planted place (see `train.measure`)."""
    path = CHECKPOINTS / model / "truth.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; `python -m loco_core.worlds.training {model}`")
    try:
        record = json.loads(path.read_text())
        planted = {name: tuple(places) for name, places in record["planted"].items()}
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


def scenes_read(
    scene: Scene,
    plant: dict[str, tuple[Place, ...]],
    places: Sequence[Place],
    rng: Random,
    alone: float = 0.3,
) -> dict[Place, Scene]:
    """Place -> the scene whose caption is read there in one training example.

    plant: attribute -> places; an empty plant tells every place the truth. places: the text layers,
    and the pooled path if there is one. alone: how often, for each attribute, only one of its
    places is told and the others read a caption without it.
    """
    if not plant:
        return dict.fromkeys(places, scene)
    lie = shuffled(scene, (), rng)  # one lie for all places that hold no attribute
    scenes = dict.fromkeys(places, lie)
    for name, planted in plant.items():
        told = shuffled(scene, (name,), rng)
        speaker = rng.choice(planted) if rng.random() < alone else None
        for place in planted:
            scenes[place] = told if speaker in (None, place) else told.without(name)
    return scenes
