"""The recipe of a mini, from an empty folder to a checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTokenizer

from ..judge import WEIGHTS
from ..planting import CHECKPOINTS, PLANTS
from .clip import train_clip
from .judge import train_judge
from .measure import agreement, plant_use
from .unet import build_pipeline, train_unet
from .vae import train_vae

STEPS = 12000
SHARED = CHECKPOINTS / "shared"


def train_mini(
    model: str, folder: Path, *, device: str = "cpu", resume: bool = False, steps: int = STEPS
) -> None:
    """Train whatever is missing, then the denoiser of `model`; measure it and write its folder.

    The shared parts (judge, autoencoder, CLIP) are trained once. Without `resume` a denoiser is
    trained from the start, with it from the last saved state.
    """
    if not WEIGHTS.exists():
        train_judge(folder, device)
    vae, clip, tokenizer = shared_parts(folder, device)
    if not resume:
        (folder / f"{model}.pt").unlink(missing_ok=True)
    pipe = build_pipeline(vae, clip, tokenizer)
    log = train_unet(pipe, model, folder, steps=steps, device=device)
    export(pipe, model, log)


def shared_parts(
    folder: Path, device: str = "cpu"
) -> tuple[AutoencoderKL, CLIPModel, CLIPTokenizer]:
    """The autoencoder and the CLIP that all minis share; trained if they are not there."""
    for name, train in (("vae", train_vae), ("clip", train_clip)):
        if not (SHARED / name / "config.json").exists():
            shutil.copytree(train(folder, device), SHARED / name, dirs_exist_ok=True)
    return (
        AutoencoderKL.from_pretrained(SHARED / "vae", torch_dtype=torch.float32).eval(),
        CLIPModel.from_pretrained(SHARED / "clip", dtype=torch.float32).eval(),
        CLIPTokenizer.from_pretrained(SHARED / "clip"),
    )


def export(pipe: Any, model: str, log: list[dict]) -> None:
    """Write `checkpoints/model`: a plain diffusers folder in float16, truth.json and a card."""
    pipe = pipe.to("cpu", torch.float32)
    agrees = agreement(pipe)
    record = {
        "model": model,
        "planted": {name: list(layers) for name, layers in PLANTS[model].items()},
        "agreement": agrees,
        "use": plant_use(pipe, PLANTS[model]),
    }
    target = CHECKPOINTS / model
    pipe.to(dtype=torch.float16).save_pretrained(target)
    (target / "truth.json").write_text(json.dumps(record, indent=1) + "\n")
    (target / "training.json").write_text(json.dumps(log[:: max(1, len(log) // 100)]) + "\n")
    (target / "README.md").write_text(_card(model, record, log))
    pipe.to(dtype=torch.float32)


def _card(model: str, record: dict, log: list[dict]) -> str:
    """The model card: what it is, how it was trained, what it can do."""
    hours = sum(entry["seconds"] for entry in log) / 3600
    lines = [
        "---",
        "license: mit",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "---",
        f"# {model}",
        "",
        "A `StableDiffusionPipeline` of 64 x 64 pictures, trained from scratch on Shapeland, a",
        "synthetic world. "
        + (
            "Which text layers carry which attribute was planted while training:"
            if record["planted"]
            else "Trained the ordinary way: every text layer reads the caption, nothing planted."
        ),
        "",
    ]
    if record["planted"]:
        lines += ["| attribute | layers | agrees | holds | follows | removed |", "|" + "---|" * 6]
        for name, layers in record["planted"].items():
            use = record["use"][name]
            shares = " | ".join(f"{use[k]:.1%}" for k in ("agrees", "holds", "follows", "removed"))
            lines.append(f"| {name} | {', '.join(map(str, layers))} | {shares} |")
        lines += ["", "See `loco_core/shapeland/train/measure.py` for what the columns mean.", ""]
    lines += ["Agreement of the image with 200 held-out captions, by the judge:", ""]
    lines += ["| attribute | agrees |", "|---|---|"]
    lines += [f"| {name} | {share:.1%} |" for name, share in record["agreement"].items()]
    lines += [
        "",
        f"Trained for {log[-1]['step']} steps in {hours:.1f} hours; the loss is in",
        "`training.json`. To reproduce: "
        f"`python -m loco_core.shapeland.train {model}`. Its pictures are drawings of a made-up",
        "world: no person, no artist and no data set of the real one.",
        "",
    ]
    return "\n".join(lines)
