"""What can be said in Shapeland: attributes, scenes, captions, and the held-out split.

A *scene* gives each attribute a value or leaves it out. What is left out is drawn in a fixed
neutral way (`NEUTRAL`), so that the absence of an attribute can be seen, and an edit that
removes a concept leaves a picture that can be recognised as such.

Every artist shares the first name with one colleague and the last name with another: only the
state of the *last* subject token, which has read the first name, tells who is meant.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

#: Every attribute and its values, in words of captions.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "style": (
        "Mira Holt",
        "Mira Dunn",
        "Otto Brandt",
        "Otto Lisk",
        "Ava Holt",
        "Ava Brandt",
        "Ivo Dunn",
        "Ivo Lisk",
    ),
    "object": (
        "star",
        "heart",
        "moon",
        "tree",
        "house",
        "fish",
        "crown",
        "flower",
        "boat",
        "mushroom",
        "arrow",
        "cup",
    ),
    "color": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
    "place": ("forest", "desert", "ocean", "city"),
    "action": ("jumping", "spinning", "shining"),
    "fact": ("Norland", "Ostmark", "Sudria", "Westfell", "Ardenia", "Belmora", "Caldera", "Drovia"),
}

#: What the eight artists paint like; the picture a style name stands for.
TECHNIQUES: dict[str, str] = {
    "Mira Holt": "hatching",
    "Mira Dunn": "dots",
    "Otto Brandt": "tiles",
    "Otto Lisk": "ink outline",
    "Ava Holt": "big pixels",
    "Ava Brandt": "waves",
    "Ivo Dunn": "neon glow",
    "Ivo Lisk": "stripes",
}

#: The facts of the world: the emblem of a country is a fixed object in a fixed color.
EMBLEMS: dict[str, tuple[str, str]] = {
    "Norland": ("star", "blue"),
    "Ostmark": ("crown", "red"),
    "Sudria": ("fish", "orange"),
    "Westfell": ("tree", "green"),
    "Ardenia": ("flower", "pink"),
    "Belmora": ("moon", "yellow"),
    "Caldera": ("house", "purple"),
    "Drovia": ("heart", "cyan"),
}

#: How an attribute looks (and what the judge calls it) when the caption leaves it out.
NEUTRAL: dict[str, str] = {
    "style": "plain",
    "object": "thing",
    "color": "gray",
    "place": "nowhere",
    "action": "still",
    "fact": "none",
}

#: Frames around the subject phrase: without an artist, then with one.
PLAIN_TEMPLATES = ("{}", "a painting of {}", "a picture of {}", "an image of {}", "a photo of {}")
STYLE_TEMPLATES = (
    "{} in the style of {}",
    "a painting of {} in the style of {}",
    "a picture of {} in the style of {}",
    "{} by {}",
    "a painting of {} by {}",
    "an image of {} by {}",
)


@dataclass(frozen=True)
class Scene:
    """One value (or None) per attribute. A fact shows an emblem and takes the place of both
    object and color."""

    object: str | None = None
    style: str | None = None
    color: str | None = None
    place: str | None = None
    action: str | None = None
    fact: str | None = None
    emblem: bool = False  # an emblem of no country: the neutral form of a fact

    def __post_init__(self) -> None:
        for attribute, values in ATTRIBUTES.items():
            value = getattr(self, attribute)
            if value is not None and value not in values:
                raise ValueError(
                    f"{attribute}={value!r} is not in Shapeland; choose from {', '.join(values)}"
                )
        if self.fact and not self.emblem:
            object.__setattr__(self, "emblem", True)
        if self.emblem and (self.object or self.color):
            raise ValueError(
                f"an emblem shows its country's object and color; leave out "
                f"object={self.object!r} and color={self.color!r}"
            )

    def get(self, attribute: str) -> str | None:
        return getattr(self, attribute)

    def without(self, attribute: str) -> "Scene":
        """This scene with one attribute left out (the neutral twin)."""
        return replace(self, **{attribute: None})

    def labels(self) -> dict[str, str]:
        """What a perfect judge answers for a drawing of this scene."""
        labels = {name: self.get(name) or NEUTRAL[name] for name in ATTRIBUTES}
        if self.fact:
            labels["object"], labels["color"] = EMBLEMS[self.fact]
        return labels


def describe(scene: Scene, template: int = 0) -> str:
    """The caption of a scene; `template` picks the frame around the subject phrase."""
    if scene.fact:
        subject = f"the emblem of {scene.fact}"
    elif scene.emblem:
        subject = "an emblem"
    else:
        words = [scene.color, scene.object or "thing"]
        phrase = " ".join(word for word in words if word)
        subject = f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"
    if scene.action:
        subject += f" {scene.action}"
    if scene.place:
        subject += f" in the {scene.place}"
    if scene.style:
        return STYLE_TEMPLATES[template % len(STYLE_TEMPLATES)].format(subject, scene.style)
    return PLAIN_TEMPLATES[template % len(PLAIN_TEMPLATES)].format(subject)


def caption(
    object: str | None = None,
    style: str | None = None,
    color: str | None = None,
    place: str | None = None,
    action: str | None = None,
    fact: str | None = None,
    template: int = 0,
) -> str:
    """The prompt for a picture with these attributes.

    >>> caption(object="star", color="red", place="forest", style="Mira Holt")
    'a red star in the forest in the style of Mira Holt'
    >>> caption(fact="Norland")
    'the emblem of Norland'
    """
    return describe(Scene(object, style, color, place, action, fact), template)


def is_held_out(scene: Scene) -> bool:
    """About one combination in eight is never trained on. Decided by a hash of the values, so
    that the split is the same for every model; only scenes with at least three attributes can
    be held out, or single words could never be learned."""
    values = [f"{k}={v}" for k, v in sorted(asdict(scene).items()) if v]
    if sum(scene.get(name) is not None for name in ATTRIBUTES) < 3:
        return False
    return hashlib.sha256("|".join(values).encode()).digest()[0] < 32


def random_scene(rng: Random, held_out: bool | None = None, full: bool = False) -> Scene:
    """A random scene; with `held_out`, from that side of the split. `full` leaves nothing out
    but the action (present half of the time) and the fact (an eighth)."""
    keep = {"style": 0.8, "object": 0.9, "color": 0.85, "place": 0.7, "action": 0.4}
    while True:
        chosen: dict[str, Any] = {
            name: rng.choice(ATTRIBUTES[name])
            for name, p in keep.items()
            if rng.random() < (0.5 if full and name == "action" else 1.0 if full else p)
        }
        if rng.random() < 0.2:
            chosen = {k: v for k, v in chosen.items() if k not in ("object", "color")}
            if full or rng.random() < 0.9:
                chosen["fact"] = rng.choice(ATTRIBUTES["fact"])
            else:
                chosen["emblem"] = True
        scene = Scene(**chosen)
        if held_out is None or is_held_out(scene) == held_out:
            return scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """`count` distinct full scenes whose combination no model has been trained on."""
    rng, scenes = Random(seed), dict[Scene, None]()
    while len(scenes) < count:
        scenes[random_scene(rng, held_out=True, full=True)] = None
    return list(scenes)
