"""A LoRA file paints the applied edit in releases of diffusers and peft older than ours.

Each is installed beside the torch of this environment, in a folder that is kept (.cache).
"""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loco_core as loco
from tools.house import ROOT

RELEASES = {
    "0.31.0": "peft==0.13.2 transformers==4.46.3 tokenizers==0.20.3 huggingface-hub==0.26.5",
    "0.35.2": "peft==0.17.1 transformers==4.56.2 tokenizers==0.22.1 huggingface-hub==0.35.3",
}
#: What pip says where it reaches no index; any other failure is ours.
OFFLINE = ("No matching distribution", "Connection", "Temporary failure in name resolution")
MIRA = loco.shapeland.concept("style", loco.shapeland.ATTRIBUTES["style"][0])


@pytest.fixture(scope="module", params=RELEASES)
def older(request) -> tuple[Path, dict[str, str]]:
    """The Python of an environment with an older diffusers, all else being ours; and its versions
    of what reads a LoRA."""
    folder = ROOT / ".cache" / f"diffusers-{request.param}"
    wanted = [f"diffusers=={request.param}", *RELEASES[request.param].split()]
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        venv.create(folder, clear=True, symlinks=True)
        home = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        (Path(home.strip()) / "ours.pth").write_text(sysconfig.get_path("purelib"))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
        ran = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        if ran.returncode and any(sign in ran.stderr for sign in OFFLINE):
            pytest.skip(f"no package index in reach: {ran.stderr[-300:]}")
        assert ran.returncode == 0, ran.stderr
        done.touch()
    versions = dict(each.split("==") for each in wanted)
    return python, {name: versions[name] for name in ("diffusers", "peft", "transformers")}


def saved(pipe, folder: Path) -> str:
    """Saved as transformers before 5 read it: a text encoder without projection is nested, too."""
    pipe.save_pretrained(folder)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


def of_unet(pipe):
    """A low rank in the first layers, a higher one in the others."""
    count = len(loco.text_layers(pipe))
    return loco.compose(
        loco.locoedit(pipe, MIRA, layers=range(4), tokens="last"),
        loco.locoedit(pipe, MIRA, layers=range(4, count), tokens="following"),
    )


def of_text(pipe):
    return loco.diff_quickfix(pipe, MIRA)


def of_both(pipe):
    return loco.compose(of_unet(pipe), of_text(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl"])
@pytest.mark.parametrize("method", [of_unet, of_text, of_both])
def test_older_diffusers_paints_the_edit(older, model, method, tmp_path):
    pipe = loco.load(model)
    tokenizers = [pipe.tokenizer, *filter(None, [getattr(pipe, "tokenizer_2", None)])]
    ids = [t(MIRA.prompts[0], padding="max_length").input_ids for t in tokenizers]
    edit, lora = method(pipe), str(tmp_path / "edit.safetensors")
    edit.to_lora(lora, pipe)
    with safe_open(lora, framework="pt") as file:
        ranks = set(json.loads(file.metadata()["loco_core.edit"])["weights"].values())
    assert len(ranks) > 1 or method is of_text  # what older releases take for one
    plain = saved(pipe, tmp_path / "plain")
    runs = {"none": [plain, ids, None, 1.0]}
    for strength in (0.5, 1.0):
        with edit.applied(pipe, strength):
            edited = saved(pipe, tmp_path / f"edited {strength}")
        runs |= {
            f"edit {strength}": [edited, ids, None, 1.0],
            f"lora {strength}": [plain, ids, lora, strength],
        }
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    script = Path(__file__).with_name("older_diffusers.py")
    given = [tmp_path / "runs.json", tmp_path / "images.safetensors"]
    python, versions = older
    ran = subprocess.run([python, script, *given], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    with safe_open(given[1], framework="pt") as file:
        assert file.metadata() == versions
    images = load_file(given[1])
    with torch.no_grad():
        for strength in (0.5, 1.0):
            far = (images[f"edit {strength}"] - images["none"]).abs().max()
            off = (images[f"lora {strength}"] - images[f"edit {strength}"]).abs().max()
            print(f"{model} {method.__name__} {strength}: {off:.1e} of {far:.2f}")
            assert far > 0.02 and off < 1e-3
