"""Models by name, folder or Hub id: plain pipelines, or one clear refusal."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_sd
from diffusers import StableDiffusionPipeline

import loco_core as loco
from loco_core import zoo
from loco_core.families import family_of


@pytest.fixture
def home(tmp_path, tiny_sd):
    """`tiny/` in float16, as minis are stored."""
    build_tiny_sd().to(torch.float16).save_pretrained(tmp_path / "tiny")
    return tmp_path


def share(home, *components):
    """Move components of `tiny/` to `shared/`."""
    (home / "shared").mkdir()
    for component in components:
        shutil.move(home / "tiny" / component, home / "shared" / component)


def texts(pipe):
    return family_of(pipe).encode(["a house by Van Gogh"]).embeds


def test_a_folder_becomes_a_plain_pipeline_in_float32_on_the_cpu(home):
    pipe = loco.load(home / "tiny")
    assert type(pipe) is StableDiffusionPipeline and pipe.safety_checker is None
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe.device == torch.device("cpu")
    half = build_tiny_sd().to(torch.float16)
    assert torch.equal(pipe.unet.conv_in.weight, half.unet.conv_in.weight.float())


def test_dtype_and_device_are_as_asked(home):
    pipe = loco.load(str(home / "tiny"), device="cpu", dtype=torch.float64)
    assert {pipe.unet.dtype, pipe.text_encoder.dtype} == {torch.float64}


def test_minis_are_found_by_name(home, monkeypatch):
    monkeypatch.setattr(zoo, "CHECKPOINTS", home)
    assert zoo.minis() == ("tiny",)
    assert type(loco.load("tiny")) is StableDiffusionPipeline


def test_components_of_several_minis_are_filled_in_from_shared(home):
    whole = loco.load(home / "tiny")
    share(home, "vae", "text_encoder", "tokenizer")
    pipe = loco.load(home / "tiny", dtype=torch.float32)
    assert torch.equal(texts(pipe), texts(whole))
    for a, b in zip(pipe.vae.parameters(), whole.vae.parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32
    assert loco.load(home / "tiny", dtype=torch.float64).vae.dtype == torch.float64


def test_a_component_that_is_nowhere_is_named(home):
    shutil.rmtree(home / "tiny" / "vae")
    with pytest.raises(ValueError, match="lacks its component 'vae'"):
        loco.load(home / "tiny")


@pytest.mark.parametrize("name", ["mini-sdd", "/no/such/folder", "./owner/name", "a/b/c", ""])
def test_an_unknown_model_is_refused_with_the_minis(home, monkeypatch, name):
    monkeypatch.setattr(zoo, "CHECKPOINTS", home)
    with pytest.raises(ValueError, match="tiny"):
        loco.load(name)


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a folder without model_index.json"):
        loco.load(tmp_path)


def test_a_revision_is_for_the_hub(home):
    with pytest.raises(ValueError, match="revision 'main' is for Hub ids"):
        loco.load(home / "tiny", revision="main")


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"\xff" * 40, lambda b: b""],
                         ids=["cut off", "garbage", "empty"])  # fmt: skip
def test_damaged_weights_are_refused_by_name_and_reason(home, damage, shared):
    if shared:
        share(home, "vae")
    path = home / ("shared" if shared else "tiny") / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"vae.diffusion_pytorch_model.safetensors is damaged \("):
        loco.load(home / "tiny")


def test_a_damaged_index_is_refused(home):
    (home / "tiny" / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json is damaged"):
        loco.load(home / "tiny")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    pipe = build_tiny_sd()
    pipe.unet.conv_in.bias.data[3] = value
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not finite: unet, conv_in.bias"):
        loco.load(tmp_path)


def test_a_variant_is_loaded_when_named(tmp_path):
    build_tiny_sd().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert loco.load(tmp_path, variant="fp16").unet.dtype == torch.float32


HUB = """
import sys, torch, loco_core as loco
from loco_core import records
pipe = loco.load("owner/name")
print(records.model_name(pipe), records.revision(pipe), len(loco.text_layers(pipe)))
"""


def test_a_hub_id_is_loaded_from_the_cache_and_its_commit_recorded(home, tmp_path):
    """The Hub's cache layout, offline: what a download leaves behind."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "cache" / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    shutil.copytree(home / "tiny", model / "snapshots" / commit)
    root = Path(loco.__file__).parents[1]
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", HUB], env=env, cwd=root, capture_output=True, text=True
    )
    assert run.stdout.split() == ["owner/name", commit, "16"], run.stderr


def test_importing_the_library_is_cheap_and_loading_a_folder_is_silent(home):
    root = Path(loco.__file__).parents[1]
    code = (
        "import sys, loco_core as loco; assert 'torch' not in sys.modules; "
        f"loco.load({str(home / 'tiny')!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_every_public_name_exists_and_an_unknown_one_lists_them():
    for name in loco.__all__:
        assert getattr(loco, name) is not None
    assert set(loco.__all__) <= set(dir(loco))
    with pytest.raises(AttributeError, match="no 'locgen'; it offers .*localize"):
        loco.locgen  # noqa: B018
