"""Shapeland's attributes as concepts to localise and edit."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from loco_core.concepts import Concept

from .vocabulary import ATTRIBUTES, Scene, describe


def _hosts(kind: str, count: int, seed: int) -> Iterator[Scene]:
    """Scenes for a concept to appear in: an object and a color, here and there a place."""
    rng = Random(seed)
    for index in range(count):
        yield Scene(
            object=None if kind in ("object", "fact") else rng.choice(ATTRIBUTES["object"]),
            color=None if kind in ("color", "fact") else rng.choice(ATTRIBUTES["color"]),
            place=rng.choice(ATTRIBUTES["place"]) if index % 2 and kind != "place" else None,
            emblem=kind == "fact",
        )


def value_of(kind: str, name: str) -> str:
    """The value of the attribute `kind` that a concept called `name` is about; `name` itself if it
    is a value already, or nothing that is in Shapeland.

    >>> value_of("fact", "the emblem of Norland")
    'Norland'
    """
    return next((v for v in ATTRIBUTES.get(kind, ()) if name == _words(kind, v)), name)


def _words(kind: str, value: str) -> str:
    """The words of a caption that carry a value, the name of its concept."""
    return describe(Scene(fact=value)) if kind == "fact" else value


def concept(kind: str, name: str, prompts: int = 4, seed: int = 0) -> Concept:
    """A concept of Shapeland with `prompts` prompts and their neutral twins.

    The twin is the same caption with the attribute left out. The target of a fact is the next
    country's emblem; the target of any other concept is its bare neutral ("a painting", "a thing").

    >>> concept("style", "Mira Holt", prompts=1).neutral
    ('a red house',)
    """
    if kind not in ATTRIBUTES:
        raise ValueError(f"unknown attribute {kind!r}; choose from {', '.join(ATTRIBUTES)}")
    values = ATTRIBUTES[kind]
    if name not in values:
        raise ValueError(f"unknown {kind} {name!r}; choose from {', '.join(values)}")
    hosts = list(_hosts(kind, prompts, seed))
    scenes = [replace(host, **{kind: name}) for host in hosts]
    bare = {"style": "a painting", "fact": None}.get(kind, "a thing")
    if bare is None:
        successor = values[(values.index(name) + 1) % len(values)]
        target = tuple(describe(replace(host, fact=successor)) for host in hosts)
    else:
        target = (bare,) * prompts
    return Concept(
        name=_words(kind, name),
        kind=kind,
        prompts=tuple(describe(scene) for scene in scenes),
        neutral=tuple(describe(host) for host in hosts),
        target=target,
    )
