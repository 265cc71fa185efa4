"""What is looked for and changed: a concept, with and without.

A concept is known by pairs of prompts. `prompts` carry it, `neutral` are their twins without it,
and `target` says what should stand in its place: bare prompts ("a painting"), or for a fact the
updated one ("Prince Charles").
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("style", "object", "color", "place", "action", "fact")

STYLE_TEMPLATES = (
    ("{}", "a painting"),
    ("a painting in the style of {}", "a painting"),
    ("a photo in the style of {}", "a photo"),
    ("a picture in the style of {}", "a picture"),
)
OBJECT_TEMPLATES = (
    ("{}", "an image"),
    ("an image of {}", "an image"),
    ("a photo of {}", "a photo"),
    ("a picture of {}", "a picture"),
)


@dataclass(frozen=True)
class Concept:
    """A concept and the prompts that tell it from everything else.

    name: the words that carry it, found in every prompt and in no neutral twin (whole words,
    case ignored). kind: one of `KINDS`. prompts, neutral: pairwise. target: one prompt per pair,
    or one for all; a fact needs it.
    Raises ValueError on an unknown kind, an empty list, lists of different lengths, a prompt
    without the name or a neutral twin with it.

        Concept("Van Gogh", "style", ["a house in the style of Van Gogh"], ["a house"])
    """

    name: str
    kind: str
    prompts: Sequence[str]
    neutral: Sequence[str]
    target: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"unknown kind {self.kind!r} of concept {self.name!r}: "
                f"choose one of {', '.join(KINDS)}"
            )
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"a concept needs a name, got {self.name!r}")
        for label in ("prompts", "neutral", "target"):
            value = getattr(self, label)
            if label != "target" or value is not None:
                super().__setattr__(label, self._listed(label, value))  # it is frozen
        if len(self.neutral) != len(self.prompts):
            raise ValueError(
                f"concept {self.name!r} has {len(self.prompts)} prompts but {len(self.neutral)} "
                "neutral twins: give one twin per prompt, in the same order"
            )
        if self.target is not None:
            if len(self.target) not in (1, len(self.prompts)):
                raise ValueError(
                    f"concept {self.name!r} has {len(self.prompts)} prompts but "
                    f"{len(self.target)} targets: give one per prompt, or one for all"
                )
            if len(self.target) == 1:
                super().__setattr__("target", tuple(self.target) * len(self.prompts))
        elif self.kind == "fact":
            raise ValueError(f"fact {self.name!r} needs target=: prompts of the updated fact")
        for prompt in self.prompts:
            if not mentions(prompt, self.name):
                raise ValueError(
                    f"prompt {prompt!r} is without the concept {self.name!r}: every "
                    "prompt must contain it, word for word"
                )
        for prompt in self.neutral:
            if mentions(prompt, self.name):
                raise ValueError(
                    f"neutral twin {prompt!r} still contains the concept {self.name!r}: take it out"
                )

    def renamed(self, others: Sequence[str]) -> tuple[str, ...]:
        """The prompts with other names in the concept's place, taken in turn.

        What an edit of this concept should leave alone: `loco.locoedit(..., preserve=...)`.
        Raises ValueError for an empty list and for a name that is the concept's own.

            gogh.renamed(["Monet", "Hokusai"])  # ("a house in the style of Monet", ...)
        """
        others = self._listed("others", others)
        if any(mentions(other, self.name) for other in others):
            raise ValueError(f"others {others} hold the concept {self.name!r} itself: leave it out")
        return tuple(
            with_name(prompt, self.name, others[i % len(others)])
            for i, prompt in enumerate(self.prompts)
        )

    def _listed(self, label: str, value: Sequence[str]) -> tuple[str, ...]:
        if isinstance(value, str):
            raise ValueError(
                f"{label} of concept {self.name!r} must be a list, got the string "
                f"{value!r}: pass [{value!r}]"
            )
        value = tuple(value)
        if not value:
            raise ValueError(f"{label} of concept {self.name!r} is empty: give at least one prompt")
        for prompt in value:
            if not isinstance(prompt, str):
                raise ValueError(
                    f"{label} of concept {self.name!r} holds {prompt!r}, which is not a string"
                )
        return value


def word(name: str) -> re.Pattern[str]:
    """What finds `name` in a prompt: whole words, case ignored.

    concepts.word("red").search("a bored Red panda").span()  # (8, 11)
    """
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)


def mentions(prompt: str, name: str) -> bool:
    """Whether `name` stands in `prompt` as whole words, case ignored."""
    return word(name).search(prompt) is not None


def with_article(name: str) -> str:
    """`name` after "a", or "an" before a vowel."""
    return f"{'an' if name[:1].lower() in tuple('aeiou') else 'a'} {name}"


def with_name(prompt: str, name: str, other: str) -> str:
    """`prompt` with `other` in the place of `name`, a whole word or several.

    An article right before the name goes with it, if it is the one that its first letter asks for.

        concepts.with_name("a house, a red house", "house", "igloo")  # "an igloo, a red igloo"
    """
    either = f"{word(with_article(name)).pattern}|{word(name).pattern}"

    def put(match: re.Match[str]) -> str:
        found = match[0]
        return other if found.lower() == name.lower() else found[0] + with_article(other)[1:]

    return re.sub(either, put, prompt, flags=re.IGNORECASE)


def style(artist: str, scenes: Sequence[str] = ()) -> Concept:
    """An artist's style, by the prompts of the papers (arXiv 2405.01008).

    With `scenes` ("a house", ...) the prompts are scene-preserving: "a painting of a house in the
    style of Monet" with the twin "a painting of a house".

        concepts.style("Van Gogh").prompts[1]  # "a painting in the style of Van Gogh"
    """
    pairs = [(f"a painting of {s} in the style of {artist}", f"a painting of {s}") for s in scenes]
    return _from_pairs(artist, "style", pairs or _filled(STYLE_TEMPLATES, artist), "a painting")


def object(name: str, article: str | None = None) -> Concept:
    """An object, by the prompts of the papers (arXiv 2405.01008).

    article: by default "a" or "an".

    concepts.object("house").prompts[1]  # "an image of a house"
    """
    words = with_article(name) if article is None else f"{article} {name}".strip()
    pairs = _filled(OBJECT_TEMPLATES, words)
    return _from_pairs(name, "object", pairs, "an image")


def color(name: str, things: Sequence[str]) -> Concept:
    """A color of some things; the twins name no color.

    concepts.color("red", ["car"]).prompts  # ("a photo of a red car",)
    """
    pairs = [(f"a photo of a {name} {thing}", f"a photo of a {thing}") for thing in things]
    return _from_pairs(name, "color", pairs, "a photo")


def action(name: str, actors: Sequence[str]) -> Concept:
    """An action of some actors; the twins leave them at rest.

    concepts.action("running", ["a dog"]).prompts  # ("a photo of a dog running",)
    """
    pairs = [(f"a photo of {actor} {name}", f"a photo of {actor}") for actor in actors]
    return _from_pairs(name, "action", pairs, "a photo")


def fact(subject: str, updated: str, neutral: str = "a person") -> Concept:
    """A fact that has changed: what `subject` shows now is `updated`.

    concepts.fact("the British Monarch", "Prince Charles").target  # ("a photo of Prince Charles",)
    """
    return Concept(
        subject,
        "fact",
        [f"a photo of {subject}"],
        [f"a photo of {neutral}"],
        [f"a photo of {updated}"],
    )


def _filled(templates: Sequence[tuple[str, str]], words: str) -> list[tuple[str, str]]:
    return [(template.format(words), twin) for template, twin in templates]


def _from_pairs(name: str, kind: str, pairs: Sequence[tuple[str, str]], target: str) -> Concept:
    prompts, neutral = [p for p, _ in pairs], [n for _, n in pairs]
    return Concept(name, kind, prompts, neutral, [target])
