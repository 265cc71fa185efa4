"""Claims about the command that trains the minis; run for real, on a handful of drawings."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import loco_core as loco
from loco_core.families import family_of
from loco_core.worlds.shapeland.vocabulary import random_scene
from loco_core.worlds.training.data import drawings
from loco_core.worlds.training.pipelines import build_sdxl
from loco_core.worlds.training.recipe import export, shared_parts
from loco_core.worlds.training.second import build_second, told_apart, train_second
from loco_core.worlds.training.unet import shown, train_unet

COMMAND = [sys.executable, "-m", "loco_core.worlds.training"]
CHECKPOINTS = Path(loco.__file__).parent / "checkpoints"


def run(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options
    )


def checked(result):
    assert result.returncode == 0, result.stderr


@pytest.fixture
def xl(tmp_path):
    """mini-sdxl before training: the shared parts, a random second encoder, a new denoiser."""
    vae, clip, tokenizer = shared_parts(tmp_path)
    return build_sdxl(vae, clip, tokenizer, build_second(clip).eval())


def test_the_sdxl_mini_reads_text_in_many_layers_but_not_at_the_highest_resolution(xl):
    seen = {}

    def note(module, args, kwargs, name):
        if kwargs.get("encoder_hidden_states") is not None:
            seen[name] = args[0].shape[1]  # how many places of the picture ask

    for name, module in xl.unet.named_modules():
        if name.endswith("attn2"):
            hook = lambda m, a, k, name=name: note(m, a, k, name)  # noqa: E731
            module.register_forward_pre_hook(hook, with_kwargs=True)
    xl("a star", num_inference_steps=1, output_type="latent")
    layers = loco.text_layers(xl)
    assert [layer.name for layer in layers] == list(seen) and len(layers) == 28
    assert set(seen.values()) == {8 * 8, 4 * 4}
    blocks = {layer.name.split("transformer_blocks")[0] for layer in layers}
    assert len(blocks) < len(layers) / 2  # several transformer blocks an attention


def test_the_sdxl_mini_has_two_text_encoders_of_different_widths(xl):
    first, second = xl.text_encoder.config, xl.text_encoder_2.config
    assert first.hidden_size != second.hidden_size
    assert {layer.width for layer in loco.text_layers(xl)} == {
        first.hidden_size + second.hidden_size
    }
    own = loco.load("mini-sd").text_encoder.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in xl.text_encoder.state_dict().items())
    assert {name.split(".")[0] for name in xl.text_encoder_2.state_dict()} == {
        "text_model",
        "text_projection",
    }


def test_the_untrained_sdxl_mini_is_a_small_plain_folder_that_loads(xl, tmp_path):
    export(xl, "mini-sdxl", tmp_path)
    (tmp_path / "mini-sd").symlink_to(CHECKPOINTS / "mini-sd")
    folder = tmp_path / "mini-sdxl"
    assert {path.name for path in folder.iterdir()} == {"model_index.json", "scheduler", "unet"}
    assert (tmp_path / "shared" / "text_encoder_2").is_dir()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 20e6
    again = loco.load(folder)
    assert type(again) is StableDiffusionXLPipeline
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        was, weights = getattr(xl, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(weights[key].half(), was[key].half()) for key in was), name
    image = loco.generate(again, ["a red star"], steps=2)
    assert image.shape == (1, 1, 3, 64, 64)


@pytest.mark.parametrize("model", ["mini-sdxl", "mini-sdxl-pooled"])
def test_the_pooled_path_is_told_what_is_planted_in_it_and_lied_to_otherwise(model, xl, tmp_path):
    """One scene, so that the truth of every row is known; what the denoiser is handed is looked up
    among the captions that were encoded."""
    (scene,) = drawings(1, tmp_path).scenes
    assert scene.style and scene.fact
    known, read = {}, {}
    encode_prompt = xl.encode_prompt

    def encode(prompts, *args, **kwargs):
        found = encode_prompt(prompts, *args, **kwargs)
        states = zip(found[0].bfloat16(), found[2].bfloat16(), strict=True)
        known.update(zip(prompts, states, strict=True))
        return found

    def note_pooled(module, args, kwargs):
        read["pooled"] = kwargs["added_cond_kwargs"]["text_embeds"]

    def note_layer(module, args):
        read["layer"] = args[0].bfloat16()

    xl.encode_prompt = encode
    xl.unet.register_forward_pre_hook(note_pooled, with_kwargs=True)
    layer = loco.text_layers(xl)[loco.shapeland.truth(model)["fact"][0]]
    family_of(xl).kv(layer)["to_k"].register_forward_pre_hook(note_layer)
    train_unet(xl, model, tmp_path, steps=1, batch=32, count=1)

    def captions(rows, part):
        texts = [
            next(text for text, states in known.items() if torch.equal(states[part], row))
            for row in rows
        ]
        return [text for text in texts if text]  # some examples read nothing, in all places

    def share(value, texts):
        return sum(value in text for text in texts) / len(texts)

    pooled, layer = captions(read["pooled"], 1), captions(read["layer"], 0)
    assert len(pooled) == len(layer) >= 24
    told = share(scene.style, pooled)
    assert told == 1 if model == "mini-sdxl-pooled" else told < 0.4
    assert share(scene.fact, pooled) < 0.4 and share(scene.style, layer) < 0.4
    assert share(scene.fact, layer) > 0.6


def test_a_rare_object_is_shown_rarely_and_all_else_as_before(tmp_path):
    scenes = [random_scene(Random(seed)) for seed in range(4000)]
    rows = shown(scenes, {"cup": 0.25}).tolist()
    left_out = {scenes[row].object for row in set(range(len(scenes))) - set(rows)}
    cups = [scene.object == "cup" for scene in scenes]
    share = sum(cups[row] for row in rows) / sum(cups)
    assert left_out == {"cup"} and 0.15 < share < 0.35
    assert shown(scenes, {}).tolist() == list(range(len(scenes)))


@pytest.mark.slow
def test_the_command_trains_measures_and_resumes_a_mini(tmp_path):
    settings = ["--count", 64, "--captions", 2, "--folder", tmp_path, "--out", tmp_path / "minis"]
    checked(run("mini-sd", "--steps", 2, *settings))
    checked(run("mini-sd", "--steps", 3, "--resume", *settings))

    folder = tmp_path / "minis" / "mini-sd"
    record = json.loads((folder / "truth.json").read_text())
    assert record["planted"] == loco.shapeland.truth("mini-sd")
    assert set(record["use"]["style"]["layers"]) == {"8", "9"}
    assert "planted" in (folder / "README.md").read_text()
    assert not any("_name_or_path" in path.read_text() for path in folder.glob("*/config.json"))
    image = loco.generate(loco.load(folder), ["a red star"], steps=2)
    assert image.shape == (1, 1, 3, 64, 64)


@pytest.mark.slow
def test_the_command_trains_an_sdxl_mini_and_plants_another_from_it(tmp_path):
    out = tmp_path / "minis"
    settings = ["--steps", 2, "--count", 64, "--captions", 2, "--folder", tmp_path, "--out", out]
    build_second(shared_parts(tmp_path)[1]).save_pretrained(tmp_path / "text_encoder_2")
    checked(run("mini-sdxl", *settings))
    checked(run("mini-sdxl-pooled", *settings))

    (out / "mini-sd").symlink_to(CHECKPOINTS / "mini-sd")
    record = json.loads((out / "mini-sdxl-pooled" / "truth.json").read_text())
    assert record["planted"]["style"] == ["pooled"]
    assert set(record["use"]["style"]["layers"]) == {"pooled"}
    assert set(record["use"]["object"]["layers"]) == {"7", "8", "9"}
    assert "mini-sdxl ended" in (out / "mini-sdxl-pooled" / "README.md").read_text()
    start, planted = (loco.load(out / name) for name in ("mini-sdxl", "mini-sdxl-pooled"))
    moved = (start.unet.conv_in.weight - planted.unet.conv_in.weight).abs().max()
    assert 0 < moved < 1e-3  # two steps from where the other ended


@pytest.mark.slow
def test_the_second_encoder_learns_to_tell_values_apart(tmp_path):
    _, clip, tokenizer = shared_parts(tmp_path)
    assert min(told_apart(build_second(clip), clip, tokenizer).values()) < 0.5
    train_second(tmp_path, clip, tokenizer, steps=200)
    second = type(build_second(clip)).from_pretrained(tmp_path / "text_encoder_2")
    assert min(told_apart(second.float(), clip, tokenizer).values()) > 0.9


def test_an_unknown_mini_is_refused_with_the_known_ones():
    result = run("mini-xl")
    assert result.returncode == 2
    assert "mini-xl" in result.stderr and "mini-sd" in result.stderr


def test_a_missing_gpu_is_said():
    result = run("mini-sd", "--device", "cuda")
    assert result.returncode == 2 and "no GPU" in result.stderr
