"""Profiles of real weights: what they set exists, what is missing is said before anything runs, and
the path they take is walked on random weights of the same architectures, from folders on disk."""

import json
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from conftest import build_tiny_clip, build_tiny_sd, build_tiny_sdxl

from benchmarks import full_size
from loco_core.judging.clip_score import load_clip
from loco_core.painting.fit import fitting_batch, images_in
from tools import execute, profiles
from tools.profiles import Profile, Weights, load_profile

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
GPU = [name for name in NAMES if load_profile(name).device == "cuda"]
OWN = ROOT / "notebooks" / "10_your_own_model.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hugging Face cache and no Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def download(cache: Path, hub_id: str, files: dict[str, str]) -> Path:
    """What a download of `files` at COMMIT leaves behind."""
    home = cache / f"models--{hub_id.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    for name, text in files.items():
        path = home / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return home / "snapshots" / COMMIT


# what a profile sets


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_profile_is_one_of_a_notebook_that_it_runs(name):
    profile = load_profile(name)
    known = {source.stem: execute.parameters_of(source) for source in execute.sources()}
    profiles.check_parameters(profile, known)
    assert profile.name == name


def test_the_four_published_models_have_a_profile():
    assert {"sd15", "sd21", "openjourney", "sdxl"} <= set(GPU)


@pytest.mark.parametrize("name", GPU)
def test_a_gpu_profile_runs_on_the_gpu_in_half_precision_at_pinned_commits(name):
    profile = load_profile(name)
    assert profile.parameters["device"] == "cuda" and profile.gpu_gib >= 8
    assert profile.parameters["dtype"] in ("float16", "bfloat16")
    assert profile.parameters["batch_size"] == 0
    weights = profiles.weights_of(profile)
    assert len(weights) == 2  # the pipeline and the CLIP
    for each in weights:
        assert len(each.revision) == 40 and int(each.revision, 16)


@pytest.mark.parametrize("name", GPU)
def test_a_gpu_profile_makes_a_concept_and_publishes_beside_the_default(name):
    import loco_core as loco

    given = load_profile(name).parameters
    prompts = [text.format(given["name"]) for text in given["prompts"]]
    loco.Concept(given["name"], given["kind"], prompts, given["neutral"])
    assert 1 <= given["swept"] <= len(prompts)
    assert not set(given["held_out"]) & set(given["prompts"])
    published, record = execute.destination(OWN, load_profile(name), ROOT)
    assert published == ROOT / "notebooks" / name / "10_your_own_model.ipynb"
    assert record == ROOT / "results" / "runs" / name / "10_your_own_model.json"


def test_a_profile_may_name_its_notebooks_and_is_refused_one_that_does_not_exist(tmp_path):
    (tmp_path / "p.yaml").write_text("notebooks: [02_b]\nparameters: {seeds: 1}")
    profile = load_profile("p", tmp_path)
    known = {"01_a": {"seeds"}, "02_b": {"steps"}}
    with pytest.raises(
        ValueError, match="sets 'seeds', which no notebook has .* choose from steps"
    ):
        profiles.check_parameters(profile, known)
    with pytest.raises(ValueError, match="runs '03_c', which does not exist: choose from 01_a"):
        profiles.check_parameters(replace(profile, notebooks=("03_c",)), known)


def test_a_notebook_that_the_profile_does_not_run_is_refused(capsys):
    assert execute.main(["--profile", "sd15", "02_locogen"]) == 1
    assert "runs no notebook '02_locogen': choose from 10_your_own_model" in capsys.readouterr().err


# what is missing


@pytest.mark.parametrize("name", GPU)
def test_a_profile_without_gpu_and_weights_says_all_that_is_missing_and_runs_nothing(
    name, hub, monkeypatch, capsys
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(execute, "execute", lambda *_: pytest.fail("a notebook was executed"))
    assert execute.main(["--profile", name]) == 1
    said = capsys.readouterr().err
    given = load_profile(name)
    assert said.count("error: ") == 1
    assert f"profile '{name}' needs an NVIDIA GPU" in said
    assert f"{given.gpu_gib:g} GiB or more" in said
    assert "not (or not all) in the Hugging Face cache" in said and "OfflineMode" in said
    for weights in profiles.weights_of(given):
        assert f"hf download {weights.id} --revision {weights.revision} --include" in said
    assert "make execute PROFILE=mini" in said


def test_a_gpu_that_is_too_small_is_told_its_size(hub, monkeypatch):
    card = type("Card", (), {"total_memory": 6 * 2**30})()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Small Card")
    with pytest.raises(ValueError, match="a GPU of 16 GiB or more, and Small Card has 6.0: take"):
        profiles.check_device(Profile("p", "cuda", {}, gpu_gib=16))
    profiles.check_device(Profile("p", "cuda", {}, gpu_gib=6))


INDEX = json.dumps(
    {"_class_name": "X", "unet": ["diffusers", "U"], "tokenizer": ["transformers", "T"],
     "safety_checker": ["stable_diffusion", "S"], "image_encoder": [None, None]}
)  # fmt: skip
WHOLE = {
    "model_index.json": INDEX,
    "unet/config.json": "{}",
    "unet/model.fp16.safetensors": "",
    "tokenizer/vocab.json": "{}",
}


@pytest.mark.parametrize("lost", [None, *WHOLE])
def test_weights_count_as_there_when_every_component_is(hub, lost):
    folder = download(hub, "owner/name", {k: v for k, v in WHOLE.items() if k != lost})
    found = profiles.cached(Weights("owner/name", COMMIT, "fp16"))
    assert found == (folder if lost is None else None)


def test_files_of_another_variant_or_commit_do_not_count(hub):
    download(hub, "owner/name", WHOLE)
    assert profiles.cached(Weights("owner/name", COMMIT, "bf16")) is None
    assert profiles.cached(Weights("owner/name", COMMIT[::-1], "fp16")) is None


def test_a_clip_has_no_index_and_is_there_with_its_weights(hub):
    clip = Weights("owner/clip", "", None)
    download(hub, "owner/clip", {"config.json": "{}"})
    assert profiles.cached(clip) is None
    folder = download(hub, "owner/clip", {"model.safetensors": ""})
    assert profiles.cached(clip) == folder


def test_a_model_in_a_folder_and_a_mini_need_no_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for name in ("mini-sd", "owner/name", str(tmp_path)):
        assert profiles.weights_of(Profile("p", "cpu", {"your_model": name, "clip": ""})) == []


@pytest.mark.parametrize("variant, files", [
    (None, "--include '*.json' --include '*.txt' --include 'model.safetensors'"),
    ("fp16", "--include '*.json' --include '*.txt' --include '*.fp16.safetensors'"),
    ("", "--include 'model_index.json' --include '*/*'"),
])  # fmt: skip
def test_the_download_command_names_the_files_that_are_read(variant, files):
    assert Weights("a/b", "c0ffee", variant).command == f"hf download a/b --revision c0ffee {files}"
    assert "--revision" not in Weights("a/b", "", variant).command


def test_pin_writes_the_commits_and_keeps_every_other_byte(hub, tmp_path):
    text = (
        "# a comment\ndevice: cuda\nparameters:\n  your_model: owner/name\n"
        "  revision: main  # the newest\n  clip: owner/clip\n  clip_revision:\n  variant: fp16\n"
    )
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="no commit of owner/name at main is known: the Hub is"):
        profiles.pin("p", tmp_path)
    assert path.read_text() == text
    download(hub, "owner/name", WHOLE)
    download(hub, "owner/clip", {"config.json": "{}", "model.safetensors": ""})
    assert profiles.pin("p", tmp_path) == {"owner/name": COMMIT, "owner/clip": COMMIT}
    wanted = text.replace("revision: main", f"revision: {COMMIT}")
    assert path.read_text() == wanted.replace("clip_revision:", f"clip_revision: {COMMIT}")
    assert yaml.safe_load(path.read_text())["parameters"]["clip_revision"] == COMMIT


def test_the_record_of_a_run_has_the_commits_it_has_read(hub):
    download(hub, "owner/name", WHOLE)
    given = {"your_model": "owner/name", "revision": "main", "variant": "fp16"}
    assert execute.downloaded(Profile("p", "cuda", given)) == {"owner/name": COMMIT}
    assert execute.downloaded(load_profile("mini")) == {}


def test_a_clip_of_a_hub_id_is_read_at_its_revision_with_its_own_pixels(hub):
    model, tokenizer = build_tiny_clip()
    folder = download(hub, "owner/clip", {})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pixels = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    for revision in (None, "main", COMMIT):
        found = load_clip("owner/clip", revision=revision)
        assert found.mean == (0.5, 0.5, 0.5) and found.std == (0.1, 0.2, 0.3)
        assert torch.equal(found.model.text_projection.weight, model.text_projection.weight)
    with pytest.raises(OSError):
        load_clip("owner/clip", revision=COMMIT[::-1])
    with pytest.raises(ValueError, match="revision 'main' is for Hub ids"):
        load_clip(folder, revision="main")


# the batch


@pytest.mark.parametrize("free, one, two, most, images", [
    (10, 4, 6, 64, 4), (11.9, 4, 6, 64, 4), (12, 4, 6, 64, 5), (1, 4, 6, 64, 1),
    (1000, 4, 6, 64, 64), (100, 4, 4, 64, 64),
])  # fmt: skip
def test_the_batch_is_the_largest_that_fits(free, one, two, most, images):
    assert images_in(free, one, two, most) == images
    if 1 < images < most:
        assert one + (images - 1) * (two - one) <= free < one + images * (two - one)


def test_a_cpu_takes_sixteen_images_at_a_time(tiny_sd):
    assert (fitting_batch(tiny_sd), fitting_batch(tiny_sd, most=3)) == (16, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_what_fits_and_never_more_than_asked():
    assert fitting_batch(build_tiny_sd().to("cuda"), most=8) == 8


# the path, on random weights of the same architectures


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """Folders of random pipelines (float16, "fp16" variant, as published) and of a random CLIP."""
    home = tmp_path_factory.mktemp("weights")
    for name, build in {"sd": build_tiny_sd, "sdxl": build_tiny_sdxl}.items():
        pipe = build()
        pipe.vae.register_to_config(force_upcast=name == "sdxl")
        pipe.to(torch.float16).save_pretrained(home / name, variant="fp16")
    model, tokenizer = build_tiny_clip()
    model.save_pretrained(home / "clip")
    tokenizer.save_pretrained(home / "clip")
    return home


@pytest.mark.slow
@pytest.mark.parametrize("name, like, changes", [
    ("sdxl", "sdxl", dict(pooled="swap", dtype="float16")),
    ("sdxl", "sdxl", dict(pooled="keep", dtype="bfloat16", batch_size=5, tiles=True)),
    ("sd", "sd15", dict(batch_size=7)),
], ids=["sdxl-swap-float16", "sdxl-keep-bfloat16", "sd-float16"])  # fmt: skip
def test_a_profile_runs_from_saved_random_weights_of_its_architecture(
    random_weights, tmp_path, name, like, changes
):
    given = load_profile(like).parameters | dict(
        your_model=str(random_weights / name), revision="", device="cpu", steps=1, seeds=2,
        clip=str(random_weights / "clip"), clip_revision="", swept=3,
        others=["Monet"], held_out=["a house in the style of {}"], unrelated=["a red tree"],
    ) | changes  # fmt: skip
    profile = Profile(f"random-{name}", "cpu", given, ("10_your_own_model",))
    execute.execute(OWN, profile, execute.parameters_of(OWN), tmp_path)
    published, record = execute.destination(OWN, profile, tmp_path)
    assert published.parent == tmp_path / "notebooks" / f"random-{name}"
    assert json.loads(record.read_text())["parameters"]["dtype"] == given["dtype"]
    cells = nbformat.read(published, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    said = "".join(o.text for o in outputs if o.get("name") == "stderr")
    assert all("cannot run with `cpu`" in line for line in said.splitlines())  # float16 on a CPU
    text = "".join(str(o.get("text", o.get("data", {}).get("text/plain"))) for o in outputs)
    pipeline = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[name]
    assert pipeline in text and "nan" not in text
    assert f"width {given['window']}" in text and "lora" in text
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3


def test_the_vae_of_sdxl_is_upcast_in_float16_and_is_float16_again_after(
    random_weights, recwarn, capfd
):
    import loco_core as loco

    pipe = loco.load(random_weights / "sdxl", dtype=torch.float16, variant="fp16")
    seen = []
    pipe.vae.post_quant_conv.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    pipe.vae.enable_slicing()
    capfd.readouterr()
    images = loco.generate(pipe, ["a house", "a tree"], steps=1)
    assert capfd.readouterr() == ("", "")
    assert seen == [torch.float32] * 2  # one image at a time
    assert pipe.vae.dtype == torch.float16 and bool(images.isfinite().all())
    assert not [w for w in recwarn if "upcast_vae" in str(w.message)]


# the record of the full architectures

RECORD = ROOT / "results" / "full_size.json"


@pytest.mark.parametrize("model", sorted(full_size.MODELS))
def test_the_record_of_full_sizes_is_of_the_layer_tables_of_today(model):
    (found,) = (x for x in json.loads(RECORD.read_text())["models"] if x["model"] == model)
    assert found["structure"] == full_size.structure(model)
    ran, layers = found["run"], full_size.MODELS[model][2]
    assert ran["finite"] and found["peak_bytes"] <= full_size.BYTES_BAR
    assert ran["text_layers"] == found["structure"]["text_layers"] == layers
    assert ran["edited_weights"] == 2 * (layers - 1)
    widths = [size[1] // ran["shrink"] for size in found["structure"]["out_proj"].values()]
    assert ran["quickfix_widths"] == widths
