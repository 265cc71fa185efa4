"""The recipe of a mini, from an empty folder to a checkpoint."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as processes
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..shapeland.judge import WEIGHTS
from ..shapeland.planting import CHECKPOINTS, PLANTS, RARE
from ..shapeland.world import Shapeland
from ..world import identity
from .clip import train_clip
from .data import COUNT, drawings
from .judge import train_judge
from .measure import agreement, plant_use
from .parallel import on_every_core
from .pipelines import build_sd, build_sdxl
from .second import train_second
from .unet import train_unet
from .vae import train_vae

SHARED = CHECKPOINTS / "shared"
#: The mini whose folder is complete; the others take what they share with it from there.
COMPLETE = "mini-sd"


@dataclass(frozen=True)
class Recipe:
    """build: folder, device -> the pipeline with an untrained denoiser; trains what is missing.
    steps: of the denoiser. start: the mini whose denoiser it starts from."""

    build: Callable[[Path, str], Any]
    steps: int
    start: str | None = None


def _sd(folder: Path, device: str = "cpu") -> Any:
    return build_sd(*shared_parts(folder, device))


def _sdxl(folder: Path, device: str = "cpu") -> Any:
    parts = shared_parts(folder, device)
    return build_sdxl(*parts, second_encoder(folder, *parts[1:], device))


#: A planted mini starts where another ends: what to draw is known by then, and what is left
#: to learn is where to read it.
RECIPES = {
    "mini-sd-natural": Recipe(_sd, 1400),
    "mini-sd": Recipe(_sd, 1700, start="mini-sd-natural"),
    "mini-sd-rare": Recipe(_sd, 1000),
    "mini-sdxl-natural": Recipe(_sdxl, 1400),
    "mini-sdxl": Recipe(_sdxl, 1700, start="mini-sdxl-natural"),
    "mini-sdxl-pooled": Recipe(_sdxl, 800, start="mini-sdxl"),  # only the style has to move
}


def train_mini(
    model: str,
    folder: Path,
    *,
    out: Path = CHECKPOINTS,
    device: str = "cpu",
    resume: bool = False,
    steps: int | None = None,
    count: int = COUNT,
    captions: int = 200,
) -> None:
    """Train whatever is missing, then the denoiser of `model`; measure it and write `out/model`.

    The shared parts (judge, autoencoder, text encoders) and the model to start from are trained
    once, and not at all where they are published. Without `resume` a denoiser is trained from the
    start, with it from the last state saved in `folder`. On a CPU there is a process for every
    core. count: drawings to train on. captions: how many it is measured on.
    """
    recipe = RECIPES[model]
    if recipe.start and _trained(recipe.start, folder) is None:
        train_mini(recipe.start, folder, out=out, device=device, resume=resume, count=count)
    if not WEIGHTS.exists():
        train_judge(folder, device)
    recipe.build(folder, device)
    drawings(count, folder)
    if not resume:
        (folder / f"{model}.pt").unlink(missing_ok=True)
    work = (model, folder, device, recipe.steps if steps is None else steps, count)
    if device == "cpu":
        on_every_core(_train_denoiser, *work)
    else:
        _train_denoiser(*work)
    pipe = recipe.build(folder, "cpu")
    pipe.unet.load_state_dict(load_file(folder / f"{model}.safetensors"))
    log = json.loads((folder / f"{model}.log.json").read_text())
    export(pipe, model, out)
    document(pipe, model, log, out, captions)
    if not (SHARED / "clip").exists():
        shutil.copytree(folder / "clip", SHARED / "clip")


def _train_denoiser(model: str, folder: Path, device: str, steps: int, count: int) -> None:
    """Train and write `folder/model.safetensors`."""
    recipe = RECIPES[model]
    pipe = recipe.build(folder, device)
    if recipe.start:
        pipe.unet.load_state_dict(load_file(_trained(recipe.start, folder)))
    train_unet(pipe, model, folder, steps=steps, count=count, device=device)
    if not processes.is_initialized() or processes.get_rank() == 0:
        weights = {name: value.cpu() for name, value in pipe.unet.state_dict().items()}
        save_file(weights, folder / f"{model}.safetensors")


def _trained(model: str, folder: Path) -> Path | None:
    """The trained denoiser of a model: of this run, or else the published one."""
    published = CHECKPOINTS / model / "unet" / "diffusion_pytorch_model.safetensors"
    return next((p for p in (folder / f"{model}.safetensors", published) if p.exists()), None)


def shared_parts(
    folder: Path, device: str = "cpu"
) -> tuple[AutoencoderKL, CLIPModel, CLIPTokenizer]:
    """The autoencoder and the CLIP that all minis share: published, or trained into `folder`."""
    found = {}
    for name, home, train in (
        ("vae", CHECKPOINTS / COMPLETE, train_vae),
        ("clip", SHARED, train_clip),
    ):
        places = (home / name, folder / name)
        there = (place for place in places if (place / "config.json").exists())
        found[name] = next(there, None) or train(folder, device)
    return (
        AutoencoderKL.from_pretrained(found["vae"], dtype=torch.float32).eval(),
        CLIPModel.from_pretrained(found["clip"], dtype=torch.float32).eval(),
        CLIPTokenizer.from_pretrained(found["clip"]),
    )


def second_encoder(
    folder: Path, clip: CLIPModel, tokenizer: CLIPTokenizer, device: str = "cpu"
) -> CLIPTextModelWithProjection:
    """The second text encoder, one for all minis that have one: published, or trained."""
    places = [SHARED / "text_encoder_2", folder / "text_encoder_2"]
    there = (place for place in places if (place / "config.json").exists())
    found = next(there, None) or train_second(folder, clip, tokenizer, device)
    return CLIPTextModelWithProjection.from_pretrained(found, dtype=torch.float32).eval()


def export(pipe: Any, model: str, out: Path) -> None:
    """Write `out/model`: a diffusers folder, float16 safetensors, loaded in float32 by default."""
    target = out / model
    pipe.to("cpu", torch.float16).save_pretrained(target)
    pipe.to(dtype=torch.float32)
    for path in target.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # the folder it was trained in
        if path.parent.name.startswith("text_encoder"):
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
    if model != COMPLETE:
        _share(target)


def document(pipe: Any, model: str, log: list[dict], out: Path, captions: int) -> None:
    """Measure a mini and write what it is to `out/model`: truth.json, the loss, a card."""
    record = {
        "model": model,
        "world": Shapeland.name,
        **identity(pipe.unet),
        "planted": {name: list(places) for name, places in PLANTS[model].items()},
        "captions": captions,
        "agreement": agreement(pipe, captions),
        "use": plant_use(pipe, PLANTS[model], max(1, captions // 2)),
    }
    target = out / model
    (target / "truth.json").write_text(json.dumps(record, indent=1) + "\n")
    (target / "training.json").write_text(json.dumps(log[:: max(1, len(log) // 100)]) + "\n")
    (target / "README.md").write_text(_card(pipe, record, log))


def _share(target: Path) -> None:
    """Leave out what the complete mini has, and keep a second text encoder in `shared/`, once; the
    index says where to look."""
    path = target / "model_index.json"
    index = json.loads(path.read_text())
    for component in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(target / component)
    for second in target.glob("*_2"):
        home = target.parent / SHARED.name / second.name
        home.parent.mkdir(exist_ok=True)
        shutil.rmtree(home, ignore_errors=True)
        second.rename(home)
    path.write_text(json.dumps(index | {"_shared_from": COMPLETE}, indent=2) + "\n")


def _card(pipe: Any, record: dict, log: list[dict]) -> str:
    """The model card: what it is, how it was trained, what it can do."""
    model, start = record["model"], RECIPES[record["model"]].start
    hours = sum(entry["seconds"] for entry in log) / 3600
    lines = [
        "---",
        "license: mit",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "---",
        f"# {model}",
        "",
        f"A `{type(pipe).__name__}` of 64 x 64 pictures, trained from scratch on Shapeland, a",
        "synthetic world. "
        + (
            "Which text layers carry which attribute was planted while training:"
            if record["planted"]
            else "Trained the ordinary way: every text layer reads the caption, nothing planted."
        ),
        "",
    ]
    if model in RARE:
        lines += [
            f"It was shown {share:.1%} of the drawings with {name!r}."
            for name, share in RARE[model].items()
        ]
        lines += [""]
    if record["planted"]:
        lines += ["| attribute | layers | agrees | holds | follows | removed |", "|" + "---|" * 6]
        for name, places in record["planted"].items():
            use = record["use"][name]
            shares = " | ".join(f"{use[k]:.1%}" for k in ("agrees", "holds", "follows", "removed"))
            lines.append(f"| {name} | {', '.join(map(str, places))} | {shares} |")
        lines += ["", "See `loco_core/worlds/training/measure.py` for what the columns mean.", ""]
    lines += [
        f"Agreement of the image with {record['captions']} held-out captions, by the judge:",
        "",
    ]
    lines += ["| attribute | agrees |", "|---|---|"]
    lines += [f"| {name} | {share:.1%} |" for name, share in record["agreement"].items()]
    lines += [
        "",
        f"Trained for {log[-1]['step']} steps of 64 pictures in {hours:.1f} hours"
        + (f", from where {start} ended." if start else "."),
        "The loss is in `training.json`. To reproduce:",
        f"`python -m loco_core.worlds.training {model}`. Its pictures are drawings of a",
        "made-up world: no person, no artist and no data set of the real one.",
        "",
    ]
    return "\n".join(lines)
