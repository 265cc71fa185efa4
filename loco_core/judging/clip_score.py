"""CLIP-Score: how well an image matches a text (arXiv 2104.08718).

    score = 100 * cos(E_image, E_text)

with the embeddings of any transformers CLIPModel. The factor 100 is the papers' convention;
negative cosines are not cut off.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from .. import zoo

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class Clip:
    """A transformers CLIPModel with its tokenizer and the mean and std of its pixels."""

    model: Any
    tokenizer: Any
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD


@torch.no_grad()
def clip_score(
    images: Float[Tensor, "n 3 height width"],
    texts: Sequence[str],
    clip: Clip,
    batch_size: int = 64,
) -> Float32[Tensor, " n"]:
    """100 * cosine of image i and text i: [n] float32 on the CPU.

    images: [n, 3, H, W] float in [0, 1], any size and device. texts: n strings. Images are resized
    (shorter side, bicubic) and cropped at the centre to the size the CLIP reads.

        clip = loco.judging.clip_score.clip_for("mini-sd")
        loco.clip_score(images[:, 0], prompts, clip)
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images are [n, 3, H, W] float in [0, 1]; got {images.dtype} {tuple(images.shape)}"
        )
    if isinstance(texts, str) or len(texts) != len(images) or not len(images):
        raise ValueError(f"{len(images)} images need as many texts, got {texts!r}")
    if images.min() < 0 or images.max() > 1 or images.isnan().any():
        raise ValueError(
            f"images must lie in [0, 1]; these reach from {float(images.min()):.3g} "
            f"to {float(images.max()):.3g}"
        )
    scores = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        tokens = clip.tokenizer(
            list(texts[part]), padding="max_length", truncation=True, return_tensors="pt"
        ).to(clip.model.device)
        found = clip.model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=_pixels(images[part].to(clip.model.device), clip),
        )
        image = F.normalize(found.image_embeds.float(), dim=-1)
        text = F.normalize(found.text_embeds.float(), dim=-1)
        scores.append(100 * (image * text).sum(-1).cpu())
    return torch.cat(scores)


def load_clip(
    name: str | Path, device: str | torch.device | None = None, revision: str | None = None
) -> Clip:
    """The CLIP (a CLIPModel and its tokenizer, float32) in a folder or of a Hub id.

    revision: commit or branch of a Hub id. Raises ValueError for a revision of a folder, damaged
    files and weights that are not finite.

        clip = load_clip("openai/clip-vit-large-patch14")
    """
    local = Path(name).is_dir()
    if local and revision is not None:
        raise ValueError(f"revision {revision!r} is for Hub ids; {name} is a local folder")
    with zoo.quiet_loading(local):
        from transformers import CLIPModel, CLIPTokenizer

        if local:
            zoo.check_files(Path(name))
        model = CLIPModel.from_pretrained(name, revision=revision, dtype=torch.float32).eval()
        tokenizer = CLIPTokenizer.from_pretrained(name, revision=revision)
    zoo.check_finite({"clip": model}, name)
    return Clip(model.to(device or "cpu"), tokenizer, *_statistics(name, revision))


def clip_for(model: Any) -> Clip:
    """The CLIP that comes with a mini, given its name or the loaded pipeline.

    It lies in `shared/clip` beside the mini. Raises ValueError for a model that brings none.
    """
    is_name = isinstance(model, str | Path)
    source = zoo.folder_of(model) if is_name else model.config.get("_name_or_path")
    home = Path(source or "").parent / zoo.SHARED / "clip"
    if source is None or not home.is_dir():
        raise ValueError(
            f"no CLIP comes with {model if is_name else source or type(model).__name__}: name one, "
            'score=partial(clip_score, clip=load_clip("openai/clip-vit-large-patch14"))'
        )
    return load_clip(home, None if is_name else model.device)


def _statistics(
    name: str | Path, revision: str | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the pixels as the CLIP's own image processor has them, else OpenAI's."""
    from transformers.utils import cached_file

    for file in ("preprocessor_config.json", "processor_config.json"):
        path = cached_file(
            name, file, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if path is not None:
            config = json.loads(Path(path).read_text())
            config = config.get("image_processor", config)
            return tuple(config["image_mean"]), tuple(config["image_std"])
    return OPENAI_MEAN, OPENAI_STD


def _pixels(images: Tensor, clip: Clip) -> Tensor:
    """What the vision tower reads: [n, 3, size, size], resized, cropped, normalised."""
    size = clip.model.config.vision_config.image_size
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        short = min(height, width)
        shape = (size * height // short, size * width // short)
        images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        images = images[..., top : top + size, left : left + size]
    mean, std = (images.new_tensor(x)[:, None, None] for x in (clip.mean, clip.std))
    return ((images - mean) / std).to(clip.model.dtype)
