"""Claims about the shipped minis: real diffusers folders, small, used where they were planted."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import loco_core as loco
from loco_core.worlds.shapeland.planting import PLANTS, RARE
from loco_core.worlds.training.measure import agreement

CHECKPOINTS = Path(loco.__file__).parent / "checkpoints"


@pytest.fixture(scope="module")
def mini():
    return loco.load("mini-sd")


def test_the_second_text_encoder_is_stored_once():
    found = [path.parent.name for path in CHECKPOINTS.glob("*/text_encoder_2")]
    assert found == ["shared"]


def test_diffusers_loads_the_mini_by_itself():
    pipe = StableDiffusionPipeline.from_pretrained(
        CHECKPOINTS / "mini-sd", safety_checker=None, local_files_only=True
    )
    image = pipe("a red star", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_checkpoints_stay_small():
    size = {path: path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file()}
    for mini in loco.zoo.minis():
        own = sum(n for path, n in size.items() if path.is_relative_to(CHECKPOINTS / mini))
        assert own <= 24e6, f"{mini}: {own / 1e6:.1f} MB"
    assert sum(size.values()) <= 120e6


def test_the_mini_has_the_layers_of_stable_diffusion(mini):
    names = [layer.name for layer in loco.text_layers(mini)]
    assert len(names) == 16
    assert names[6].startswith("mid_block") and names[7].startswith("up_blocks.0")


def test_the_natural_twin_shares_all_but_its_denoiser(mini):
    twin = loco.load("mini-sd-natural")
    assert loco.shapeland.truth("mini-sd-natural") == {}
    for name in ("vae", "text_encoder"):
        mine, other = getattr(mini, name).state_dict(), getattr(twin, name).state_dict()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert not (CHECKPOINTS / "mini-sd-natural" / "vae").exists()
    assert not torch.equal(mini.unet.conv_in.weight, twin.unet.conv_in.weight)


def test_a_mini_that_was_rarely_shown_an_object_rarely_paints_it():
    pipe, world = loco.load("mini-sd-rare"), loco.shapeland
    shown = {}
    for name in (*RARE["mini-sd-rare"], "star", "house"):
        asked = world.concept("object", name, 8).prompts
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            images = loco.generate(pipe, asked, steps=6)
        shown[name] = sum(x == name for x in world.judge(images)["object"]) / 8
    assert max(shown[name] for name in RARE["mini-sd-rare"]) <= 0.5
    assert min(shown["star"], shown["house"]) >= 0.875


def test_the_weights_on_disk_are_half_precision_safetensors():
    from safetensors import safe_open

    files = sorted(CHECKPOINTS.rglob("*.safetensors"))
    assert len(files) >= 4
    assert not [p for p in CHECKPOINTS.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt")]
    for path in files:
        with safe_open(path, "pt") as file:
            kinds = {file.get_tensor(name).dtype for name in file.keys()}
        assert kinds - {torch.int64} == {torch.float16}, path


def test_the_text_encoder_of_the_mini_is_the_text_tower_of_the_clip_that_scores():
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(CHECKPOINTS / "shared" / "clip")
    encoder = loco.load("mini-sd").text_encoder
    tower = clip.text_model.state_dict()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value.float(), tower[name].float()), name


@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl", "mini-sdxl-pooled"])
def test_every_published_share_of_the_truth_file_reaches_the_bar(model):
    record = loco.shapeland.measured_use(model)
    for name in ("style", "object", "color"):
        assert record["agreement"][name] >= 0.95, name
    for name in ("place", "fact"):
        assert record["agreement"][name] >= 0.90, name
    assert record["use"].keys() == record["planted"].keys() == PLANTS["mini-sd"].keys()
    for name, use in record["use"].items():
        assert use["agrees"] - use["holds"] <= 0.03, name
        assert use["follows"] >= 0.90, name


@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl"])
def test_a_small_sample_agrees_with_what_the_truth_file_says(model):
    record = loco.shapeland.measured_use(model)["agreement"]
    seen = agreement(loco.load(model), count=32, seed=5, steps=10)
    for name in ("style", "object", "color"):
        assert seen[name] >= record[name] - 0.15, name


def test_a_mini_follows_the_scheduler_that_it_is_given(mini):
    other = StableDiffusionPipeline(**{**mini.components}, requires_safety_checker=False)
    other.scheduler = DDIMScheduler.from_config(mini.scheduler.config, timestep_spacing="linspace")
    one, two = (loco.generate(p, ["a red star"], steps=3) for p in (mini, other))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    "model, kind, name",
    [
        ("mini-sd", "style", "Mira Holt"),
        ("mini-sd", "object", "fish"),
        ("mini-sdxl", "style", "Mira Holt"),
        ("mini-sdxl", "object", "fish"),
    ],
)
def test_the_sweep_finds_exactly_what_was_planted(model, kind, name):
    planted = loco.shapeland.truth(model)[kind]
    concept = loco.shapeland.concept(kind, name, prompts=2)
    found = loco.localize(loco.load(model), concept, window=len(planted), seeds=range(3), steps=8)
    assert list(found.layers) == planted and found.test.p[found.test.best] <= 1 / 64


def test_a_style_planted_in_the_pooled_path_leaves_only_with_it():
    pipe = loco.load("mini-sdxl-pooled")
    concept = loco.shapeland.concept("style", "Mira Holt", prompts=4)
    shares = {
        pooled: loco.localize(
            pipe, concept, window=28, pooled=pooled, seeds=[0], steps=8,
            score=loco.shapeland.seen("style", "Mira Holt"),
        ).scores.item()
        for pooled in ("keep", "swap")
    }  # fmt: skip
    assert shares["keep"] >= 0.75 and shares["swap"] <= 0.25
