"""A concept is refused unless its prompts tell it from its twins."""

import dataclasses

import pytest

import loco_core as loco
from loco_core import concepts

GOOD = dict(
    name="Van Gogh", kind="style", prompts=["a house by Van Gogh", "Van Gogh: a tree"],
    neutral=["a house", "a tree"],
)  # fmt: skip
BAD = {
    "unknown kind": (dict(kind="mood"), "'mood'.*style, object, color, place, action, fact"),
    "no name": (dict(name=" "), "needs a name"),
    "no prompts": (dict(prompts=[]), "prompts of concept 'Van Gogh' is empty"),
    "no twins": (dict(neutral=[]), "neutral of concept 'Van Gogh' is empty"),
    "no targets": (dict(target=[]), "target of concept 'Van Gogh' is empty"),
    "a bare string": (dict(prompts="a house by Van Gogh"), r"pass \['a house by Van Gogh'\]"),
    "not a string": (dict(neutral=["a house", 3]), "holds 3"),
    "lengths differ": (dict(neutral=["a house"]), "2 prompts but 1 neutral"),
    "target lengths differ": (dict(target=["a"] * 3), "2 prompts but 3 targets"),
    "prompt without it": (dict(prompts=["a house", "by Van Gogh"]), "'a house' is without"),
    "only part of a word": (dict(prompts=["by Van Goghs", "Van Gogh"]), "'by Van Goghs'"),
    "twin with it": (dict(neutral=["a house", "a VAN GOGH tree"]), "'a VAN GOGH tree' still"),
    "fact without update": (dict(kind="fact"), "needs target="),
}


@pytest.mark.parametrize("change, reason", BAD.values(), ids=BAD.keys())
def test_a_bad_concept_is_refused_with_the_reason(change, reason):
    with pytest.raises(ValueError, match=reason):
        loco.Concept(**GOOD | change)


def test_a_concept_is_frozen_hashable_and_equal_to_its_copy():
    concept = loco.Concept(**GOOD)
    assert concept == loco.Concept(**dataclasses.asdict(concept))
    assert len({concept, loco.Concept(**GOOD)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        concept.name = "Monet"


def test_one_target_serves_all_prompts():
    assert loco.Concept(**GOOD, target=["a painting"]).target == ("a painting",) * 2


def test_the_papers_style_prompts_come_with_their_twins():
    van_gogh = concepts.style("Van Gogh")
    assert van_gogh.prompts[:2] == ("Van Gogh", "a painting in the style of Van Gogh")
    assert van_gogh.neutral[:2] == ("a painting", "a painting")
    assert concepts.style("Monet", ["a house"]).neutral == ("a painting of a house",)


def test_every_constructor_makes_a_concept_of_its_kind():
    assert concepts.object("house").prompts[1] == "an image of a house"
    assert concepts.color("red", ["car"]).neutral == ("a photo of a car",)
    assert concepts.action("running", ["a dog"]).kind == "action"
    assert concepts.fact("the British Monarch", "Prince Charles").target == (
        "a photo of Prince Charles",
    )


@pytest.mark.parametrize(
    "prompt, renamed",
    [
        ("a Monet by monet, Monets", "a X by X, Monets"),
        ("a Monet", "a X"),
        (r"Monet\1 and (Monet)", r"X\1 and (X)"),
    ],
)
def test_a_name_is_found_in_whole_words_whatever_its_case(prompt, renamed):
    assert concepts.with_name(prompt, "Monet", "X") == renamed
    assert concepts.mentions(prompt, "MONET") and not concepts.mentions(prompt, "Mone")
    assert concepts.with_name(prompt, "Monet", r"\g<0>") == renamed.replace("X", r"\g<0>")


def test_a_name_brings_its_article_unless_the_prompt_has_another():
    assert concepts.with_name("A car, a red car", "car", "egg cup") == "An egg cup, a red egg cup"
    assert concepts.with_name("an egg", "egg", "toy egg") == "a toy egg"
    assert concepts.with_name("a hour", "hour", "igloo") == "an igloo"
    assert concepts.with_name("a unicorn", "unicorn", "ibis") == "a ibis"
    assert concepts.object("apple").prompts[1] == "an image of an apple"
    assert concepts.object("hour", "an").renamed(["igloo"])[1] == "an image of an igloo"
