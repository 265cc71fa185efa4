"""Probes of an edit in Shapeland, from scenes that no model has been trained on."""

from collections.abc import Iterable
from functools import cache
from itertools import product
from random import Random

from ...concepts import with_name
from ...judging.probes import Probe, misspellings
from .concepts import concept
from .vocabulary import ATTRIBUTES, STYLE_TEMPLATES, Scene, describe, is_held_out


def probes(
    kind: str,
    name: str,
    count: int = 12,
    seed: int = 0,
    held_out: bool = True,
    exclude: Iterable[str] = (),
) -> tuple[Probe, ...]:
    """Probes of an edit of the `kind` called `name`, `count` prompts a group.

    efficacy: captions in the template of the concept's own prompts. generality: other scenes, in
    the other templates of the training captions; in wordings that no caption has; with the name
    misspelled, which falls apart into letters and syllables that no caption has (the unedited
    model follows only some of these, so compare with it). specificity: other names of the kind;
    all that the images of efficacy should show besides; captions without the concept, by
    CLIP-Score.
    held_out: from combinations that no model has been trained on, or from the others. exclude:
    prompts the edit was made from; a scene they describe is not used.
    Raises ValueError for what is not in Shapeland, and for more scenes than there are.

        loco.evaluate(pipe, edit, concept, probes=loco.shapeland.probes("style", "Mira Holt"))
    """
    concept(kind, name, prompts=1)  # refuses what is not in Shapeland
    known = {prompt.lower() for prompt in exclude}

    def scenes(shown: str, purpose: str, count: int) -> list[Scene]:
        free = [s for s in _scenes(kind, shown, held_out) if not known & _captions(s, kind)]
        if isinstance(count, bool) or not 1 <= count <= len(free):
            raise ValueError(
                f"count={count!r}: {len(free)} scenes with {shown!r} are "
                f"{'held out' if held_out else 'trained on'}; choose from 1 to {len(free)}"
            )
        return Random(f"{kind} {shown} {purpose} {seed}").sample(free, count)

    gone = {"attribute": kind, "value": name, "wanted": False}
    own, found = scenes(name, "efficacy", count), []
    for scene in own:
        found.append(Probe(describe(scene), "efficacy", **gone))
    for i, scene in enumerate(scenes(name, "paraphrase", count)):
        found.append(Probe(_reworded(scene, i), "generality: paraphrase", **gone))
    wrong = misspellings(name)
    for i, scene in enumerate(scenes(name, "misspelling", count)):
        caption = describe(scene)
        slip = with_name(caption, name, wrong[i % len(wrong)])
        found.append(Probe(slip, "generality: misspelling", **gone, text=caption))
    for i, scene in enumerate(scenes(name, "template", count)):
        template = 1 + i % (len(STYLE_TEMPLATES) - 1)
        found.append(Probe(describe(scene, template), "generality: template", **gone))
    others = [other for other in ATTRIBUTES[kind] if other != name]
    for i, other in enumerate(others[:count]):
        for scene in scenes(other, "others", len(range(i, count, len(others)))):
            found.append(Probe(describe(scene), "specificity: others", kind, other))
    for scene in own:
        caption, twin = describe(scene), describe(scene.without(kind))
        found += [
            Probe(caption, "specificity: same image", attribute, scene.get(attribute), text=twin)
            for attribute in ATTRIBUTES
            if attribute != kind and scene.get(attribute)
        ]
    neutral = dict.fromkeys(describe(scene.without(kind)) for scene in own)
    found += [Probe(twin, "specificity: neutral") for twin in neutral]
    return tuple(found)


@cache
def _scenes(kind: str, name: str, held_out: bool) -> tuple[Scene, ...]:
    """All scenes on one side of the split that show `name` and name every other attribute, but
    perhaps no action; with an emblem only if a fact is asked for."""
    choices = {k: v for k, v in ATTRIBUTES.items() if k != "fact"}
    if kind == "fact":
        choices = {k: v for k, v in choices.items() if k not in ("object", "color")}
    choices |= {"action": (None, *ATTRIBUTES["action"]), kind: (name,)}
    rows = product(*choices.values())
    scenes = (Scene(**dict(zip(choices, row, strict=True))) for row in rows)
    return tuple(scene for scene in scenes if is_held_out(scene) == held_out)


def _captions(scene: Scene, kind: str) -> set[str]:
    own = {describe(scene, template) for template in range(len(STYLE_TEMPLATES))}
    return {caption.lower() for caption in own | {describe(scene.without(kind))}}


def _reworded(scene: Scene, wording: int) -> str:
    """The scene in words of the world but an order no caption has."""
    bare = Scene(object=scene.object, color=scene.color, fact=scene.fact)
    subject = " ".join(filter(None, (describe(bare), scene.action)))
    place, artist = f"in the {scene.place}", scene.style
    return (
        f"{place} {subject} by {artist}",
        f"{subject} by {artist} {place}",
        f"a picture by {artist} of {subject} {place}",
    )[wording % 3]
