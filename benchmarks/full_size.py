"""The published architectures with random weights: their text layers, a sweep and an edit.

    python benchmarks/full_size.py --record results/full_size.json

No weights are needed. The full architecture is built on the meta device for its table of text
layers and edited weights. Then LocoGen and LocoEdit run on it, on a CPU with every width and the
image side divided by `--shrink` (4), so with the same layers in the same order, and on a GPU as it
is. The window is all layers but one, so that there are two windows. Time and memory are what is
measured; scores of random weights mean nothing. --record runs every model, each in a process of
its own, and writes what was found, with the machine and how busy it was.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import groupby
from typing import Any

import torch
from common import arguments, finish

import loco_core as loco
from loco_core.edits.weights import module_of
from loco_core.worlds.shapeland.tokenizer import learn_tokenizer
from loco_core.zoo import quiet_loading

SECONDS_BAR, BYTES_BAR = 180, 6e9  # on a CPU
CONCEPT = loco.Concept("Van Gogh", "style", ["a house in the style of Van Gogh"], ["a house"])
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
OPEN_CLIP_H = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
    hidden_act="gelu",
)  # fmt: skip
OPEN_CLIP_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    hidden_act="gelu", projection_dim=1280,
)  # fmt: skip
#: The published configs, (UNet, text encoders, text layers): all else is the classes' defaults.
MODELS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], int]] = {
    "sd15": (dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8), [CLIP_L], 16),
    "sd21": (
        dict(
            sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        ),
        [OPEN_CLIP_H],
        16,
    ),
    "sdxl": (
        dict(
            sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
            use_linear_projection=True, block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        ),
        [CLIP_L, OPEN_CLIP_G],
        70,
    ),
}  # fmt: skip
WIDTHS = (
    "sample_size", "cross_attention_dim", "block_out_channels", "addition_time_embed_dim",
    "projection_class_embeddings_input_dim", "hidden_size", "intermediate_size", "projection_dim",
    "norm_num_groups",
)  # fmt: skip


def shrunk(config: dict[str, Any], by: int) -> dict[str, Any]:
    """The config with its widths divided; numbers of layers, blocks and heads stay."""
    divided = {
        key: tuple(x // by for x in value) if isinstance(value, tuple) else value // by
        for key, value in config.items()
        if key in WIDTHS
    }
    return config | divided


@quiet_loading(local=True)
def build(model: str, shrink: int, device: str, dtype: torch.dtype) -> Any:
    """A pipeline of the published architecture with random weights; on "meta" with none."""
    import diffusers
    import transformers

    unet, texts, _ = MODELS[model]
    groups = dict(norm_num_groups=32)
    unet = dict(block_out_channels=(320, 640, 1280, 1280)) | groups | unet
    vae = groups | dict(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    words = " ".join((*CONCEPT.prompts, *CONCEPT.neutral)).lower().split()
    tokenizer = learn_tokenizer(sorted(set(words)), 77)
    special = dict(
        vocab_size=49408 if device == "meta" else len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    prediction = "v_prediction" if model == "sd21" else "epsilon"
    parts: dict[str, Any] = dict(
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type=prediction,
        )
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        parts["unet"] = diffusers.UNet2DConditionModel(**shrunk(unet, shrink))
        parts["vae"] = diffusers.AutoencoderKL(**shrunk(vae, shrink))
        kinds = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
        for suffix, text, kind in zip(("", "_2"), texts, kinds, strict=False):
            config = transformers.CLIPTextConfig(**shrunk(text, shrink), **special)
            parts[f"text_encoder{suffix}"] = kind(config)
            parts[f"tokenizer{suffix}"] = tokenizer
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    if len(texts) == 2:
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def structure(model: str) -> dict[str, Any]:
    """Text layers of the full architecture by block, and the weights that edits change."""
    pipe = build(model, 1, "meta", torch.float32)
    model = loco.family_of(pipe)
    layers = loco.text_layers(pipe)
    named = [
        (layer.name.split(".attentions")[0], tuple(model.kv(layer)["to_k"].weight.shape))
        for layer in layers
    ]
    blocks, first = [], 0
    for (place, shape), group in groupby(named):
        count = len(list(group))
        layers_of_it = [first, first + count - 1]
        blocks.append({"block": place, "layers": layers_of_it, "each of to_k, to_v": list(shape)})
        first += count
    edited = sum(w.weight.numel() for x in layers for w in model.kv(x).values())
    return {
        "text_layers": len(layers),
        "reads": layers[0].width,
        "blocks": blocks,
        "unet_parameters": sum(x.numel() for x in pipe.unet.parameters()),
        "key_and_value_parameters": edited,
        "out_proj": {
            name: list(module_of(pipe, name).weight.shape) for name in model.text_projections()
        },
    }


def run(
    model: str, shrink: int, device: str, dtype: torch.dtype, steps: int, pooled: str
) -> dict[str, Any]:
    """A sweep of two windows and a LocoEdit of what it finds, timed."""
    pipe = build(model, shrink, device, dtype)
    layers = len(loco.text_layers(pipe))
    clock = Clock(device)
    found = loco.localize(
        pipe, CONCEPT, layers - 1, [0], steps=steps, score=lambda x, texts: x.mean((1, 2, 3)),
        pooled=pooled,
    )  # fmt: skip
    clock.lap("sweep_seconds")
    edit = loco.locoedit(pipe, CONCEPT, found.best)
    clock.lap("locoedit_seconds")
    quickfix = loco.diff_quickfix(pipe, CONCEPT)
    clock.lap("diff_quickfix_seconds")
    with edit.applied(pipe):
        clock.lap("apply_seconds")
        image = loco.generate(pipe, CONCEPT.prompts, [0], steps)
        clock.lap("image_seconds")
    clock.lap("revert_seconds")
    images = torch.cat([found.images[:].flatten(0, 2), image.flatten(0, 1)])
    return {
        "shrink": shrink,
        "device": device,
        "dtype": str(dtype),
        "steps": steps,
        "images": list(found.images.shape),
        "parameters": sum(x.numel() for x in pipe.unet.parameters()),
        "text_layers": layers,
        "finite": bool(images.isfinite().all()),
        "edited_weights": len(edit.changes),
        "quickfix_widths": [change.width for change in quickfix.changes.values()],
        **clock.laps,
    }


class Clock:
    """Seconds between laps, a GPU idle at both ends."""

    def __init__(self, device: str) -> None:
        self.on_gpu, self.laps = device.startswith("cuda"), {}
        self.start = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[name], self.start = round(now - self.start, 3), now

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Structure and run, and whether the bars are held."""
    on_gpu = args.device.startswith("cuda")
    start, shrink = time.perf_counter(), args.shrink or (1 if on_gpu else 4)
    shape = structure(args.model)
    pooled = "swap" if args.model == "sdxl" else "keep"
    ran = run(args.model, shrink, args.device, getattr(torch, args.dtype), args.steps, pooled)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    expected = MODELS[args.model][2]
    right = shape["text_layers"] == ran["text_layers"] == expected and ran["finite"]
    return {
        "model": args.model,
        "structure": shape,
        "run": ran,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "seconds_bar": None if on_gpu else SECONDS_BAR,
        "peak_bytes": peak,
        "peak_bytes_bar": None if on_gpu else BYTES_BAR,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "passed": right and (on_gpu or (seconds <= SECONDS_BAR and peak <= BYTES_BAR)),
    }


def every_model(chosen: list[str]) -> list[dict]:
    """What is measured of every model, each in a fresh process, whose peak of memory is its own."""
    models = []
    for model in MODELS:
        command = [sys.executable, __file__, "--json", *chosen, "--model", model]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if not ran.stdout:
            raise SystemExit(ran.returncode)
        models.append(json.loads(ran.stdout))
        print(f"{model}: {models[-1]['seconds']} s, passed: {models[-1]['passed']}", flush=True)
    return models


def main() -> int:
    """Measure, print, and return 0 if all bars are held."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="sdxl", choices=sorted(MODELS))
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--shrink", type=int, choices=(1, 2, 4), help="4 on a CPU, 1 on a GPU")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    if args.record:
        chosen = [f"--device={args.device}", f"--dtype={args.dtype}", f"--steps={args.steps}"]
        shrink = [f"--shrink={args.shrink}"] if args.shrink else []
        models = every_model([*chosen, *shrink])
        found = {"models": models, "passed": all(model["passed"] for model in models)}
        return finish(args, found, n={"models": len(models), "steps": args.steps})
    loco.progress(False)
    found = measure(args)
    return finish(args, found, n={"steps": args.steps}, text=_text(found))


def _text(found: dict[str, Any]) -> str:
    """A table for a reader."""
    shape, ran = found["structure"], found["run"]
    lines = [f"{found['model']}: {shape['text_layers']} text layers read {shape['reads']} features"]
    for block in shape["blocks"]:
        first, last = block["layers"]
        lines.append(f"  {first:3}-{last:<3} {block['block']:14} {block['each of to_k, to_v']}")
    lines += [f"  {name} {of}" for name, of in shape["out_proj"].items()]
    width, device, steps = ran["shrink"], ran["device"], ran["steps"]
    lines.append(f"run at 1/{width} of every width, on {device}, {steps} steps:")
    names = [key for key in ran if key.endswith("_seconds")]
    lines += [f"  {name[:-8]:14} {ran[name]:8.2f} s" for name in names]
    lines.append(f"  {'in all':14} {found['seconds']:8.2f} s, {found['peak_bytes'] / 1e9:.2f} GB")
    if found["peak_gpu_bytes"]:
        lines.append(f"  {'GPU memory':14} {found['peak_gpu_bytes'] / 1e9:8.2f} GB")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
