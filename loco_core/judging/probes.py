"""What is asked of an edit: prompts, and what their images should and should not show.

Efficacy: is the concept gone on prompts that the edit was not made from? Generality: also when it
is worded otherwise, misspelled, or put in other templates? Specificity: is everything else still
there: other concepts of the kind, what else the same image shows, images that never had it?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..concepts import Concept, mentions, with_article, with_name

ASPECTS = ("efficacy", "generality", "specificity")

_SCENES = ("a house by a lake", "a cat on a sofa", "a bowl of fruit", "a street", "a mountain")
_PLACES = ("on a beach", "in a forest", "on a city street", "in the snow", "on a stage")
_THINGS = ("car", "bird", "chair", "flower", "door")
_ACTORS = ("a dog", "a child", "a horse", "a woman", "a robot")

#: Per kind: (prompt with the name, its twin without), the phrase for the name, frames around it.
_EVERYDAY = {
    "style": [(f"{x} in the style of {{}}", x) for x in _SCENES],
    "object": [(f"a {{}} {x}", f"a view {x}") for x in _PLACES],
    "fact": [(f"{{}} {x}", f"a person {x}") for x in _PLACES],
    "color": [(f"a {{}} {x}", f"a {x}") for x in _THINGS],
    "place": [(f"{x} in the {{}}", x) for x in _ACTORS],
    "action": [(f"{x} {{}}", x) for x in _ACTORS],
}
_PHRASES = {
    "style": "art by {}",
    "object": "a {}",
    "fact": "{}",
    "color": "something {}",
    "place": "the {}",
    "action": "someone {}",
}
_FRAMES = ("a poster of {}", "a close-up of {}", "{} on a screen", "a sketch of {}", "{}, framed")
_REWORDED = ("an artwork that shows {}", "{}, printed on a postcard", "what a child calls {}")


@dataclass(frozen=True)
class Probe:
    """One question about the images of one prompt.

    group: "efficacy", or "generality: ..." or "specificity: ..." and what is varied. attribute,
    value: a judge is asked whether the image's `attribute` is `value`; without them, or without a
    judge, the CLIP-Score of the image and `text` (by default the prompt) answers. wanted: True if
    it should still be seen after the edit, False if it should be gone.

        Probe("a star by Mira Holt", "efficacy", "style", "Mira Holt", wanted=False)
    """

    prompt: str
    group: str
    attribute: str | None = None
    value: str | None = None
    wanted: bool = True
    text: str | None = None

    def __post_init__(self) -> None:
        if self.aspect not in ASPECTS:
            raise ValueError(
                f"group {self.group!r} must begin with one of {', '.join(ASPECTS)}: "
                f'write "specificity: {self.group}", say'
            )
        if (self.attribute is None) != (self.value is None):
            raise ValueError(
                f"attribute {self.attribute!r} and value {self.value!r} belong together: give both "
                "for a judge, or neither for CLIP-Score"
            )

    @property
    def aspect(self) -> str:
        """What the group belongs to: one of `ASPECTS`."""
        return self.group.partition(":")[0]

    def asks(self, judged: bool) -> bool:
        """Whether a judge, if there is one, answers; otherwise CLIP-Score does."""
        return judged and self.attribute is not None


def probes_of(
    concept: Concept,
    prompts: Sequence[str] = (),
    neutral: Sequence[str] = (),
    others: Sequence[str] = (),
) -> tuple[Probe, ...]:
    """Probes of any concept, for any model.

    prompts: prompts with the concept's name that the edit was not made from; by default five
    everyday ones of its kind. neutral: their twins without it, one per prompt; without them
    nothing is asked of the same image and of neutral prompts. others: names of other concepts of
    the kind, each put in the place of the concept in the prompts.
    Raises ValueError for a prompt without the name or one of the concept's own prompts, for twins
    that do not pair, and for the concept among the others.

        probes_of(loco.concepts.style("Van Gogh"), others=["Monet", "Cezanne"])
    """
    name, kind = concept.name, concept.kind
    if not prompts:
        pairs = [(_filled(p, name), twin) for p, twin in _EVERYDAY[kind]]
        pairs = [pair for pair in pairs if pair[0] not in concept.prompts]
        prompts, neutral = [p for p, _ in pairs], [twin for _, twin in pairs]
    _check(concept, prompts, neutral, others)
    gone: dict[str, Any] = {"attribute": kind, "value": name, "wanted": False}
    phrase = _filled(_PHRASES[kind], name)
    found = [Probe(p, "efficacy", **gone) for p in prompts]
    for i, prompt in enumerate(prompts):
        reworded = _REWORDED[i % len(_REWORDED)].format(prompt)
        found.append(Probe(reworded, "generality: paraphrase", **gone))
    wrong = misspellings(name)
    for i, prompt in enumerate(prompts):
        slip = with_name(prompt, name, wrong[i % len(wrong)])
        found.append(Probe(slip, "generality: misspelling", **gone, text=prompt))
    for frame in _FRAMES:
        if (framed := frame.format(phrase)) not in concept.prompts:
            found.append(Probe(framed, "generality: template", **gone))
    for other in others:
        for prompt in prompts:
            asked = with_name(prompt, name, other)
            found.append(Probe(asked, "specificity: others", kind, other))
    for prompt, twin in zip(prompts, neutral, strict=bool(neutral)):
        found.append(Probe(prompt, "specificity: same image", text=twin))
    found += [Probe(twin, "specificity: neutral") for twin in dict.fromkeys(neutral)]
    return tuple(found)


def misspellings(name: str) -> tuple[str, ...]:
    """`name` with one slip inside its longest word: a letter dropped, doubled, or swapped.

    misspellings("Mira Holt")[:3]  # ('Mira Hlt', 'Mira Hoolt', 'Mira Hlot')
    """
    word = max(reversed(name.split()), key=len)
    start = name.rindex(word)
    slips: list[str] = []
    for i in range(1, len(word) - 1) or range(len(word)):
        before, letter, after = word[:i], word[i], word[i + 1 :]
        slips += [before + after, before + 2 * letter + after]
        slips.append(before + after[:1] + letter + after[1:])
    wrong = [slip for slip in dict.fromkeys(slips) if slip and slip != word]
    return tuple(name[:start] + slip + name[start + len(word) :] for slip in wrong)


def _filled(template: str, name: str) -> str:
    """`template` with the name in it, and the article that the name asks for."""
    return template.replace("a {}", with_article(name)).replace("{}", name)


def _check(
    concept: Concept, prompts: Sequence[str], neutral: Sequence[str], others: Sequence[str]
) -> None:
    for label, value in (("prompts", prompts), ("neutral", neutral), ("others", others)):
        if isinstance(value, str):
            raise ValueError(f"{label} must be a list, got the string {value!r}: pass [{value!r}]")
    for prompt in prompts:
        if not mentions(prompt, concept.name):
            raise ValueError(
                f"prompt {prompt!r} is without {concept.name!r}: a probe of efficacy needs it"
            )
        if prompt in concept.prompts:
            raise ValueError(
                f"prompt {prompt!r} is one of the concept's own: efficacy is asked of others"
            )
    if neutral and len(neutral) != len(prompts):
        raise ValueError(
            f"{len(neutral)} neutral twins for {len(prompts)} prompts: give one per prompt, or none"
        )
    if concept.name in others:
        raise ValueError(f"others holds the concept {concept.name!r} itself: take it out")
