"""Claims about the world with a known answer: drawing, captions, split, tokenizer, planting."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

import loco_core as loco
from loco_core.worlds.shapeland import ATTRIBUTES, NEUTRAL, Scene, describe, planting
from loco_core.worlds.shapeland.drawing import draw_scene
from loco_core.worlds.shapeland.judge import _trained_judge, judge
from loco_core.worlds.shapeland.planting import PLANTS, POOLED, pooled_truth, scenes_read
from loco_core.worlds.shapeland.tokenizer import MAX_LENGTH, build_tokenizer
from loco_core.worlds.shapeland.vocabulary import held_out_scenes, is_held_out, random_scene
from loco_core.worlds.training.loop import fit


def test_the_world_is_as_large_as_promised():
    least = {"object": 12, "style": 8, "color": 8, "place": 4, "action": 3, "fact": 8}
    assert {name: len(set(values)) for name, values in ATTRIBUTES.items()} == least
    assert all(len(name.split()) == 2 for name in ATTRIBUTES["style"])


def test_no_single_word_tells_an_artist():
    words = Counter(word for name in ATTRIBUTES["style"] for word in name.split())
    assert set(words.values()) <= {2, 3} and min(words.values()) == 2


def test_a_drawing_is_the_same_for_the_same_arguments_and_moves_with_the_seed():
    one, same, other = (loco.shapeland.draw(object="cup", seed=seed) for seed in (3, 3, 4))
    assert one.shape == (3, 64, 64) and one.dtype == torch.float32
    assert one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_value_of_an_attribute_looks_different(name):
    base = {} if name in ("object", "fact") else {"object": "star"}
    pictures = [loco.shapeland.draw(**base, **{name: value}) for value in ATTRIBUTES[name]]
    pictures.append(loco.shapeland.draw(**base))
    for i, a in enumerate(pictures):
        assert all((a - b).abs().mean() > 0.01 for b in pictures[:i])


def test_the_judge_names_at_least_99_percent_of_held_out_drawings():
    scenes = held_out_scenes(600, seed=11)
    seen = loco.shapeland.judge(torch.stack([draw_scene(s, 7) for s in scenes]))
    for name in ATTRIBUTES:
        right = sum(seen[name][i] == s.labels()[name] for i, s in enumerate(scenes))
        assert right / len(scenes) >= 0.99, name


def test_the_judge_names_what_is_left_out():
    seen = loco.shapeland.judge(loco.shapeland.draw())
    assert {name: names[0] for name, names in seen.items()} == NEUTRAL


def test_the_judge_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match=r"\[2, 3, 32, 32\]"):
        loco.shapeland.judge(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="NaN"):
        loco.shapeland.judge(torch.full((3, 64, 64), torch.nan))


def test_captions_say_every_attribute_and_leave_out_what_is_absent():
    full = loco.shapeland.caption(
        object="arrow", style="Ivo Dunn", color="orange", place="city", action="spinning"
    )
    assert full == "an orange arrow spinning in the city in the style of Ivo Dunn"
    assert loco.shapeland.caption() == "a thing"
    assert loco.shapeland.caption(fact="Norland", place="desert", template=1) == (
        "a painting of the emblem of Norland in the desert"
    )


@pytest.mark.parametrize("bad", [{"object": "dog"}, {"style": "Monet"}, {"fact": "France"}])
def test_an_unknown_value_is_refused_with_the_valid_ones(bad):
    (name, value), *_ = bad.items()
    with pytest.raises(ValueError, match=rf"{name}='{value}'.*{ATTRIBUTES[name][0]}"):
        loco.shapeland.caption(**bad)


def test_a_fact_and_an_object_cannot_both_be_shown():
    with pytest.raises(ValueError, match="emblem"):
        loco.shapeland.draw(fact="Norland", object="star")


def test_unknown_concepts_and_models_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="'mood'.*style"):
        loco.shapeland.concept("mood", "happy")
    with pytest.raises(ValueError, match="'Monet'.*Mira Holt"):
        loco.shapeland.concept("style", "Monet")
    with pytest.raises(ValueError, match="'mini-xl'.*mini-sd"):
        loco.shapeland.truth("mini-xl")


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_the_neutral_twin_of_a_concept_differs_only_in_the_concept(kind):
    name = ATTRIBUTES[kind][0]
    concept = loco.shapeland.concept(kind, name, prompts=6)
    assert concept.name in ("the emblem of " + name, name)
    for prompt, neutral in zip(concept.prompts, concept.neutral, strict=True):
        assert concept.name in prompt and concept.name not in neutral
        extra = Counter(prompt.split()) - Counter(neutral.split())
        assert set(extra) <= set(concept.name.split()) | {"in", "the", "style", "of", "a", "an"}


def test_held_out_combinations_are_never_trained_on():
    rng = Random(5)
    trained = {random_scene(rng, held_out=False) for _ in range(5000)}
    held_out = held_out_scenes(400)
    assert not trained & set(held_out) and len(set(held_out)) == 400
    assert all(is_held_out(scene) for scene in held_out)
    share = sum(is_held_out(random_scene(rng, full=True)) for _ in range(4000)) / 4000
    assert 0.08 < share < 0.18


def test_every_word_is_one_token_and_every_caption_fits():
    tokenizer = build_tokenizer()
    rng = Random(2)
    for index in range(300):
        text = describe(random_scene(rng, full=True), index)
        assert len(tokenizer.tokenize(text)) == len(text.split()) <= MAX_LENGTH - 2


def test_the_tokenizer_survives_a_disk_and_spells_unknown_words(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    text = "a zebra by Mira Holt"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert "".join(tokenizer.tokenize("zebra")) == "zebra</w>"
    assert tokenizer.unk_token_id not in tokenizer("zebra", add_special_tokens=False).input_ids


def test_the_tokenizer_is_learned_the_same_in_every_process():
    shipped = Path(loco.__file__).parent / "checkpoints" / "mini-sd" / "tokenizer"
    read = CLIPTokenizer.from_pretrained(shipped)
    assert read.get_vocab() == build_tokenizer().get_vocab()


FULL = Scene("star", "Mira Holt", "red", "forest", "jumping")
NAMED = ("style", "object", "color", "place", "action")  # by FULL
PLANTED = [model for model, plant in PLANTS.items() if plant]


def places_of(model):
    return range(16) if model == "mini-sd" else [*range(28), POOLED]


@pytest.mark.parametrize("model", PLANTED)
def test_a_planted_place_is_told_its_attribute_and_nothing_else(model):
    plant, rng = PLANTS[model], Random(0)
    told = [scenes_read(FULL, plant, places_of(model), rng, alone=0.0) for _ in range(3000)]
    for name in NAMED:
        for place in places_of(model):
            share = sum(row[place].get(name) == FULL.get(name) for row in told) / len(told)
            chance = 1 / len(ATTRIBUTES[name])
            assert share == 1 if place in plant[name] else share < chance + 0.03


@pytest.mark.parametrize("model", PLANTED)
def test_one_place_alone_is_told_while_the_others_read_of_nothing(model):
    plant, rng = PLANTS[model], Random(0)
    for _ in range(200):
        row = scenes_read(FULL, plant, places_of(model), rng, alone=1.0)
        for name in NAMED:
            silent = ["None"] * (len(plant[name]) - 1)
            assert sorted(str(row[place].get(name)) for place in plant[name]) == sorted(
                [*silent, FULL.get(name)]
            )


@pytest.mark.parametrize("model", ["mini-sd-natural", "mini-sdxl-natural"])
def test_a_natural_model_is_told_everything_everywhere(model):
    places = places_of(model)
    assert scenes_read(FULL, PLANTS[model], places, Random(0)) == dict.fromkeys(places, FULL)


@pytest.mark.parametrize("model", PLANTED)
def test_planted_places_are_disjoint_windows(model):
    plant = PLANTS[model]
    planted = [place for places in plant.values() for place in places]
    assert len(planted) == len(set(planted)) and set(planted) <= set(places_of(model))
    assert set(plant) == set(ATTRIBUTES)
    for layers in loco.shapeland.truth(model).values():
        assert layers == list(range(layers[0], layers[0] + (2 if model == "mini-sd" else 3)))


def test_the_truth_says_which_layers_carry_what():
    assert loco.shapeland.truth("mini-sd")["object"] == [6, 7]
    assert loco.shapeland.truth("mini-sd")["style"] == [8, 9]
    assert loco.shapeland.truth("mini-sdxl")["style"] == [16, 17, 18]
    assert loco.shapeland.truth("mini-sdxl-natural") == {}


def test_the_pooled_variant_has_its_style_beside_the_layers_and_all_else_in_the_same():
    layers, pooled = (loco.shapeland.truth(m) for m in ("mini-sdxl", "mini-sdxl-pooled"))
    assert pooled == {name: where for name, where in layers.items() if name != "style"}
    assert pooled_truth("mini-sdxl-pooled") == ["style"]
    assert pooled_truth("mini-sdxl") == pooled_truth("mini-sd") == []


@pytest.mark.parametrize("text", ["{", "[]", '{"planted": {"style": [1, 2]}}', '{"model": "x"}'])
def test_a_damaged_truth_file_is_refused_by_name(text, tmp_path, monkeypatch):
    monkeypatch.setattr(planting, "CHECKPOINTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="truth.json"):
        loco.shapeland.measured_use("mini-sd")
    (tmp_path / "mini-sd").mkdir()
    (tmp_path / "mini-sd" / "truth.json").write_text(text)
    with pytest.raises(ValueError, match="truth.json"):
        loco.shapeland.measured_use("mini-sd")


def test_a_truth_file_that_names_the_pooled_path_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(planting, "CHECKPOINTS", tmp_path)
    (tmp_path / "mini-sdxl-pooled").mkdir()
    path = tmp_path / "mini-sdxl-pooled" / "truth.json"
    path.write_text(json.dumps({"planted": PLANTS["mini-sdxl-pooled"]}))
    assert loco.shapeland.measured_use("mini-sdxl-pooled")["planted"]["style"] == ["pooled"]
    path.write_text(json.dumps({"planted": PLANTS["mini-sdxl"]}))
    with pytest.raises(ValueError, match="records the plant"):
        loco.shapeland.measured_use("mini-sdxl-pooled")


def test_a_killed_training_run_goes_on_as_if_nothing_happened(tmp_path):
    def run(folder, killed_at=None):
        torch.manual_seed(0)
        net = nn.Linear(4, 1)

        def loss(step, generator):
            if step == killed_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=generator)
            return (net(x) - x.sum(1, keepdim=True)).float().square().mean()

        fit("line", net, loss, steps=60, lr=0.1, folder=folder, ema=0.9, save_every=20)
        return net

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", killed_at=47)
    resumed = run(tmp_path / "killed")
    assert torch.equal(whole.weight, resumed.weight)
    log = json.loads((tmp_path / "killed" / "line.log.json").read_text())
    assert [entry["step"] for entry in log] == [50, 60]  # the last step is always in the log


def test_the_judge_has_gradients_though_it_was_first_asked_in_inference_mode():
    _trained_judge.cache_clear()
    images = torch.rand(1, 3, 64, 64)
    judge(images)
    images.requires_grad_(True)
    _trained_judge()(images)["object"].sum().backward()
    assert images.grad is not None and bool(images.grad.any())
