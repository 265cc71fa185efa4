"""Claims about the search for a text that brings a concept back."""

import pytest
import torch
from conftest import build_tiny_sd

import loco_core as loco
from loco_core.studies.recovery import painted_from, search

PROMPT = "a red star"


@pytest.fixture(scope="module")
def mini():
    return loco.load("mini-sd")


@pytest.fixture(scope="module")
def drawn():
    """What the artist draws, of other things and in other colors than the prompt says."""
    things = [("fish", "blue"), ("cup", "green"), ("moon", "pink"), ("house", "cyan")]
    scenes = [dict(object=thing, color=color) for thing, color in things]
    return torch.stack([loco.shapeland.draw(style="Mira Holt", seed=3, **x) for x in scenes])


def seen(pipe, states):
    images = painted_from(pipe, states, range(8), steps=10, guidance=5.0)
    return loco.shapeland.judge(images)["style"].count("Mira Holt") / 8


def test_a_search_finds_what_the_model_can_draw_from_a_prompt_that_does_not_say_it(mini, drawn):
    start = loco.family_of(mini).encode([PROMPT])
    found = search(mini, PROMPT, drawn, steps=80, lr=0.05)
    assert seen(mini, start) == 0 and seen(mini, found) >= 0.75
    assert not found.embeds.requires_grad and found.embeds.shape == start.embeds.shape


def test_what_no_layer_can_read_no_text_brings_back(mini, drawn):
    concept = loco.shapeland.concept("style", "Mira Holt")
    edit = loco.locoedit(mini, concept, range(16), 20)
    with loco.rivals(mini, edit, "destroyer")["destroyer"].applied(mini):
        start, found = loco.family_of(mini).encode([PROMPT]), search(mini, PROMPT, drawn, steps=20)
        assert torch.equal(found.embeds, start.embeds)  # no gradient comes through
        other = loco.family_of(mini).encode(["a blue cup by Mira Holt"])
        one, two = (painted_from(mini, x, range(2), steps=4) for x in (start, other))
        assert torch.equal(one, two)


def test_the_pipeline_is_left_as_it_was_and_the_seed_decides():
    pipe, images = build_tiny_sd(), torch.rand(2, 3, 16, 16)
    before = {n: x.clone() for n, x in pipe.unet.state_dict().items()}
    frozen = [p.requires_grad for p in pipe.unet.parameters()]
    one, same, other = (
        search(pipe, "a house", images, steps=2, times=3, seed=seed).embeds for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert all(torch.equal(x, before[n]) for n, x in pipe.unet.state_dict().items())
    assert [p.requires_grad for p in pipe.unet.parameters()] == frozen
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps=0: choose a whole number"):
        search(build_tiny_sd(), "a house", torch.rand(1, 3, 16, 16), steps=0)
