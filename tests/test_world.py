"""A model is known by its weights: wherever it lies, whatever it is called, edited or not."""

import json
import os
import shutil

import pytest
import torch
from conftest import build_tiny_sd

import loco_core as loco
from loco_core.judging.judge import Judge, judge_of
from loco_core.worlds import world_of
from loco_core.worlds.shapeland import planting
from loco_core.worlds.world import TRUTH, identity

CHECKPOINTS = loco.zoo.CHECKPOINTS
FAST = dict(seeds=[0], steps=1)


@pytest.fixture(scope="module")
def mini():
    return loco.load("mini-sd")


def copied(folder, model="mini-sd"):
    """A mini with all its components, in a folder of another name."""
    shutil.copytree(CHECKPOINTS / model, folder)
    return folder


@pytest.mark.parametrize("model", loco.zoo.minis())
def test_a_mini_is_known_with_what_was_planted_in_it(model):
    world = world_of(loco.load(model))
    assert (world.name, world.model) == ("Shapeland", model)
    assert world.truth == loco.shapeland.truth(model)
    assert list(world.pooled_truth) == loco.shapeland.pooled_truth(model)
    assert world.attributes == loco.shapeland.ATTRIBUTES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_mini_is_known_in_every_precision(dtype):
    assert world_of(loco.load("mini-sd", dtype=dtype)).model == "mini-sd"


def test_a_copy_is_known_and_a_folder_that_only_has_the_name_is_not(tmp_path):
    world = world_of(loco.load(copied(tmp_path / "mine")))
    assert (world.model, world.truth) == ("mini-sd", loco.shapeland.truth("mini-sd"))
    build_tiny_sd().save_pretrained(tmp_path / "mini-sd")
    shutil.copy(CHECKPOINTS / "mini-sd" / TRUTH, tmp_path / "mini-sd")
    other = loco.load(tmp_path / "mini-sd")
    assert loco.records.model_name(other) == "mini-sd" and world_of(other) is None


def test_other_weights_of_the_same_shapes_are_no_mini():
    pipe = loco.load("mini-sd")
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] += 0.5
    assert world_of(pipe) is None


def test_a_mini_that_is_shipped_nowhere_is_known_by_the_truth_file_of_its_folder(tmp_path):
    folder = copied(tmp_path / "trained")
    pipe = loco.load(folder)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    pipe.unet.save_pretrained(folder / "unet")
    record = json.loads((folder / TRUTH).read_text())
    record |= {"model": "trained", **identity(pipe.unet), "planted": {"style": [3], "fact": [4]}}
    (folder / TRUTH).write_text(json.dumps(record))
    world = world_of(loco.load(folder))
    assert (world.model, world.truth) == ("trained", {"style": [3], "fact": [4]})
    (folder / TRUTH).unlink()
    assert world_of(loco.load(folder)) is None


def test_a_pipeline_that_diffusers_made_is_known_too():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        CHECKPOINTS / "mini-sd", safety_checker=None, local_files_only=True
    )
    assert world_of(pipe).model == "mini-sd"


def test_it_stays_known_when_the_working_directory_changes(tmp_path, monkeypatch):
    folder = copied(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    pipe = loco.load("mine")
    os.chdir(folder.parent.parent)
    assert world_of(pipe).model == "mini-sd"


@pytest.mark.parametrize("asked_before", [True, False])
def test_a_mini_stays_in_its_world_while_an_edit_is_applied(asked_before):
    pipe = loco.load("mini-sd")
    concept = loco.shapeland.concept("style", "Mira Holt", 2)
    first = loco.locoedit(pipe, concept, [8, 9])
    if asked_before:
        assert world_of(pipe) is not None
    with first.applied(pipe):
        second = loco.locoedit(pipe, concept, [9])
        with second.applied(pipe):
            assert world_of(pipe).model == "mini-sd"


def test_another_denoiser_is_asked_anew():
    pipe = loco.load("mini-sd")
    assert world_of(pipe).model == "mini-sd"
    pipe.unet = loco.load("mini-sd-natural").unet
    assert world_of(pipe).model == "mini-sd-natural"
    pipe.unet = build_tiny_sd().unet
    assert world_of(pipe) is None


@pytest.mark.parametrize(
    "text", ["{", '{"world": "Shapeland"}', '{"world": "Shapeland", "planted"']
)
def test_a_damaged_truth_file_is_refused_by_name(text, tmp_path):
    folder = copied(tmp_path / "mine")
    (folder / TRUTH).write_text(text)
    with pytest.raises(ValueError, match=r"mine.truth\.json is damaged"):
        world_of(loco.load(folder))


def test_a_truth_file_of_something_else_says_nothing(tmp_path):
    folder = copied(tmp_path / "mine")
    (folder / TRUTH).write_text('{"world": "ours", "planted": 3}')
    assert world_of(loco.load(folder)).model == "mini-sd"  # by the file that is shipped


def test_the_shipped_truth_files_say_whose_they_are():
    for model in loco.zoo.minis():
        record = json.loads((CHECKPOINTS / model / TRUTH).read_text())
        assert record.items() >= identity(loco.load(model).unet).items()
        assert {k: tuple(v) for k, v in record["planted"].items()} == planting.PLANTS[model]


def test_a_world_knows_a_fact_by_its_value_and_by_the_name_of_its_concept(mini):
    world = world_of(mini)
    for name in ("Norland", "the emblem of Norland"):
        assert world.concept("fact", name, 2) == loco.shapeland.concept("fact", "Norland", 2)
        assert world.probes("fact", name) == loco.shapeland.probes("fact", "Norland")
    assert world.caption(object="star", color="red") == "a red star"


def test_a_judge_says_who_it_is(mini):
    judge, image = world_of(mini).judge, loco.shapeland.draw(object="star")
    assert judge(image[None])["object"] == ["star"]
    assert judge.to_json() == {
        "name": "loco.shapeland.judge",
        "fingerprint": loco.shapeland.seen("object", "star").fingerprint,
    }
    assert judge_of(loco.shapeland.judge, judge) is judge and judge_of(judge) is judge
    assert judge_of(len) == Judge("len", None, len)
    with pytest.raises(TypeError, match="'strict' is no function"):
        judge_of("strict")
