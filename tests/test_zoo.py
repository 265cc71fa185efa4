"""Models by name, folder or Hub id: plain pipelines, or one clear refusal."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_sd
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

import loco_core as loco
from loco_core import records, zoo
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


def pickled(folder):
    """Replace the safetensors of a component by a pickle."""
    (path,) = folder.glob("*.safetensors")
    torch.save(load_file(path), path.parent / PICKLES[folder.name])
    path.unlink()


PICKLES = {"unet": "diffusion_pytorch_model.bin", "text_encoder": "pytorch_model.bin"}


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("component", PICKLES)
def test_a_pickle_is_read_when_it_is_allowed_and_then_checked(home, component, shared):
    whole = loco.load(home / "tiny")
    if shared:
        share(home, component)
    folder = home / ("shared" if shared else "tiny") / component
    pickled(folder)
    with pytest.raises(ValueError, match=f"{component} has pickled weights alone .*allow_pickle"):
        loco.load(home / "tiny")
    pipe = loco.load(home / "tiny", allow_pickle=True)
    assert records.digest(records.weights(pipe)) == records.digest(records.weights(whole))
    path = folder / PICKLES[component]
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=f"{component} is damaged .*restore its files"):
        loco.load(home / "tiny", allow_pickle=True)
    path.unlink()
    with pytest.raises(ValueError, match=f"{component} has no weights: restore its files"):
        loco.load(home / "tiny", allow_pickle=True)


def test_safetensors_are_taken_before_a_pickle_that_lies_beside_them(home):
    (home / "tiny" / "unet" / PICKLES["unet"]).write_bytes(b"evil")
    assert loco.load(home / "tiny", allow_pickle=True).unet.dtype == torch.float32


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["missing", "renamed", "of another shape"])
def test_weights_that_would_be_random_are_refused_by_name(home, component, damage):
    (path,) = (home / "tiny" / component).glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(key for key in tensors if key.endswith("weight"))[0]
    weight = tensors.pop(name)
    if damage != "missing":
        new = {"renamed": (f"{name}s", weight), "of another shape": (name, weight[:1])}[damage]
        tensors |= dict([new])
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{component} (lacks 1 of its weights|is damaged)"):
        loco.load(home / "tiny")


def test_a_broken_config_is_named_with_its_folder(home):
    (home / "tiny" / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="unet is damaged"):
        loco.load(home / "tiny")


def put(home, **entries):
    """Change entries of the index of `tiny/`."""
    path = home / "tiny" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_no_code_is_imported_but_that_of_the_libraries(home, monkeypatch):
    (home / "payload.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(home)
    share(home, "tokenizer")
    put(home, tokenizer=["payload", "X"])
    with pytest.raises(ValueError, match="the code of tokenizer from 'payload': only .*diffusers"):
        loco.load(home / "tiny")
    put(home, tokenizer=["transformers", "CLIPTokenizer"], unet=["payload", "X"])
    with pytest.raises(Exception, match="payload"):  # diffusers refuses it
        loco.load(home / "tiny")
    assert "payload" not in sys.modules


@pytest.mark.parametrize("place", ["../elsewhere", "/", "..", "a/b", 5, ""])
def test_shared_parts_come_from_a_folder_beside_the_model(home, place):
    share(home, "vae")
    put(home, _shared_from=place)
    with pytest.raises(ValueError, match="takes parts from .*: name a folder beside it"):
        loco.load(home / "tiny")


@pytest.mark.parametrize("index, reason", [
    ("[]", "it holds a list"),
    ("[" * 100000, "recursion"),
    ('{"unet": ["diffusers"]}', "unet is"),
    ('{"unet": ["diffusers", 5]}', "unet is"),
    ('{"unet": ["diffusers", "Nothing"]}', "diffusers has no Nothing, which unet should be"),
    ('{"unet": ["diffusers", "utils"]}', "diffusers has no utils"),
])  # fmt: skip
def test_an_odd_index_is_refused(home, index, reason):
    (home / "tiny" / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=f"model_index.json is damaged: .*{reason}"):
        loco.load(home / "tiny")


def test_a_folder_with_a_variant_alone_names_it(tmp_path):
    build_tiny_sd().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="of a variant alone: pass variant='fp16'"):
        loco.load(tmp_path)
    with pytest.raises(ValueError, match="of a variant alone: pass variant='fp16'"):
        loco.load(tmp_path, variant="bf16")


def test_a_variant_of_some_parts_is_loaded_with_the_rest_as_it_is(home):
    other = build_tiny_sd(seed=3).to(torch.float16).unet
    other.save_pretrained(home / "tiny" / "unet", variant="fp16")
    pipe = loco.load(home / "tiny", variant="fp16")
    assert torch.equal(pipe.unet.conv_in.weight, other.conv_in.weight.float())
    assert torch.equal(loco.load(home / "tiny").vae.decoder.conv_in.weight,
                       pipe.vae.decoder.conv_in.weight)  # fmt: skip


def test_weights_of_any_kind_are_looked_at():
    kinds = [torch.zeros(0), torch.ones(3).to(torch.float8_e4m3fn), torch.ones(2).bfloat16()]
    net = nn.Module()
    for i, weight in enumerate([*kinds, torch.ones(3, dtype=torch.int8)]):
        net.register_parameter(f"w{i}", nn.Parameter(weight, requires_grad=False))
    zoo.check_finite({"unet": net, "scheduler": object()}, "x")
    for bad in (torch.tensor([1.0, float("nan"), 2.0]).half(), torch.ones(1, device="meta")):
        net.register_parameter("bad", nn.Parameter(bad, requires_grad=False))
        with pytest.raises(ValueError, match="not finite: unet, bad"):
            zoo.check_finite({"unet": net}, "x")


HUB = """
import sys, torch, loco_core as loco
from loco_core import records
pipe = loco.load("owner/name")
print(records.model_name(pipe), records.revision(pipe), len(loco.text_layers(pipe)))
"""


def from_cache(home, tmp_path, code):
    """Run code with `tiny/` in the Hub's cache, offline: what a download leaves behind."""
    model = tmp_path / "cache" / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    shutil.copytree(home / "tiny", model / "snapshots" / COMMIT)
    root = Path(loco.__file__).parents[1]
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True
    )


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_hub_id_is_loaded_from_the_cache_and_its_commit_recorded(home, tmp_path):
    run = from_cache(home, tmp_path, HUB)
    assert run.stdout.split() == ["owner/name", COMMIT, "16"], run.stderr


def test_a_hub_id_with_pickles_is_refused_unless_they_are_allowed(home, tmp_path):
    pickled(home / "tiny" / "unet")
    run = from_cache(home, tmp_path, HUB)
    assert "ValueError: owner/name has pickled weights alone" in run.stderr
    shutil.rmtree(tmp_path / "cache")
    run = from_cache(home, tmp_path, HUB.replace('"owner/name"', '"owner/name", allow_pickle=True'))
    assert run.stdout.split() == ["owner/name", COMMIT, "16"], run.stderr


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
