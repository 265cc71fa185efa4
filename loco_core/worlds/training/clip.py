"""Train the CLIP: a real `CLIPModel`, contrastively, on drawings and captions.

A vision transformer this small does not learn shapes from the contrastive loss alone, and a text
tower trained against it does not tell objects apart. So the text tower is first trained against
a convolutional image tower, which learns in minutes; the vision transformer then learns to give
the embeddings of that tower (distillation), and the convolutional tower is thrown away.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from ..shapeland.tokenizer import MAX_LENGTH, build_tokenizer
from ..shapeland.vocabulary import ATTRIBUTES, Scene, describe
from .data import COUNT, Drawings, drawings
from .loop import fit

WIDTH = 128
_PIXELS = 0.5  # mean and std of the image processor: pixels become [-1, 1]


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP of the mini family: width 128, four layers a tower, patches of 8."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    clip = CLIPModel(config)
    clip.set_attn_implementation("eager")  # the fused kernel is slow backwards on a CPU
    return clip


class ConvTower(nn.Sequential):
    """[n, 3, 64, 64] -> [n, 128]; the teacher of the vision transformer."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in ((32, 2), (64, 2), (96, 1), (128, 2), (160, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        super().__init__(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(channels * 16, WIDTH))


def ids_of(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids padded to the full length, int64 [n, 24]."""
    batch = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return batch.input_ids


def text_embedding(clip: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Unit text embeddings [n, 128]."""
    return F.normalize(clip.text_projection(clip.text_model(ids).pooler_output).float(), dim=-1)


def image_embedding(clip: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Unit image embeddings [n, 128] of images in [0, 1]."""
    pixels = (images - _PIXELS) / _PIXELS
    return F.normalize(
        clip.visual_projection(clip.vision_model(pixels).pooler_output).float(), dim=-1
    )


def contrast(clip: CLIPModel, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy over the batch."""
    logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class Batches:
    """Rows and captions of a step. Two of three batches share one attribute's value (one style,
    say), so that telling their pictures apart takes all the other attributes."""

    def __init__(self, data: Drawings, tokenizer: CLIPTokenizer, size: int):
        self.data, self.tokenizer, self.size = data, tokenizer, size
        rows: dict[tuple[str, str | None], list[int]] = {}
        for row, scene in enumerate(data.scenes):
            for name in ("style", "object"):
                rows.setdefault((name, scene.get(name)), []).append(row)
        self.groups = [torch.tensor(group) for group in rows.values() if len(group) > 4 * size]

    def __call__(self, step: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        pool = self.groups[step % len(self.groups)] if step % 3 else torch.arange(len(self.data))
        rows = pool[torch.randperm(len(pool), generator=generator)[: self.size]]
        rng = Random(step)
        captions = [describe(self.data.scenes[row], rng.randrange(30)) for row in rows.tolist()]
        return self.data.floats(rows), ids_of(self.tokenizer, captions)


def train_text_tower(
    folder: Path, device: str = "cpu", steps: int = 1000, count: int = COUNT
) -> tuple[CLIPModel, ConvTower, CLIPTokenizer]:
    """First half: text tower against the convolutional tower."""
    data, tokenizer = drawings(count, folder), build_tokenizer()
    torch.manual_seed(2)
    clip, conv = build_clip(tokenizer).to(device), ConvTower().to(device)
    both = nn.ModuleDict({"clip": clip, "conv": conv})
    clip.vision_model.requires_grad_(False)
    clip.visual_projection.requires_grad_(False)
    batches = Batches(data, tokenizer, 128)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        images, ids = batches(step, generator)
        image = F.normalize(conv(images.to(device) * 2 - 1).float(), dim=-1)
        return contrast(clip, image, text_embedding(clip, ids.to(device)))

    fit("clip-text", both, loss, steps=steps, lr=1e-3, folder=folder, device=device)
    return clip, conv, tokenizer


def train_clip(folder: Path, device: str = "cpu", steps: int = 600, count: int = COUNT) -> Path:
    """Second half: distil the vision transformer; write a `CLIPModel` folder, return its path."""
    clip, conv, tokenizer = train_text_tower(folder, device, count=count)
    data = drawings(count, folder)
    clip.requires_grad_(False)
    clip.vision_model.requires_grad_(True)
    clip.visual_projection.requires_grad_(True)
    batches = Batches(data, tokenizer, 128)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        images, ids = batches(step, generator)
        images = images.to(device)
        with torch.no_grad():
            teacher = F.normalize(conv(images * 2 - 1).float(), dim=-1)
            text = text_embedding(clip, ids.to(device))
        image = image_embedding(clip, images)
        return 10 * (1 - (image * teacher).sum(-1)).mean() + contrast(clip, image, text)

    fit("clip-vision", clip, loss, steps=steps, lr=1e-3, folder=folder, device=device)
    print("zero-shot on held-out drawings:", zero_shot(clip.cpu(), tokenizer, folder))
    clip.half().save_pretrained(folder / "clip")
    size = {"height": 64, "width": 64}
    processor = CLIPImageProcessor(
        size=size, crop_size=size, image_mean=[_PIXELS] * 3, image_std=[_PIXELS] * 3
    )
    CLIPProcessor(processor, tokenizer).save_pretrained(folder / "clip")
    return folder / "clip"


@torch.inference_mode()
def zero_shot(
    clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path, embed: Callable = image_embedding
) -> dict[str, float]:
    """Share of held-out drawings whose own value of an attribute scores above all others, the
    rest of the caption being right."""
    data = drawings(4000, folder, held_out=True)
    result = {}
    for name, values in ATTRIBUTES.items():
        rows = [i for i, scene in enumerate(data.scenes[:1000]) if scene.get(name)]
        image = embed(clip, data.floats(torch.tensor(rows)))
        scores = []
        for value in values:
            captions = [describe(_with(data.scenes[row], name, value)) for row in rows]
            scores.append((image * text_embedding(clip, ids_of(tokenizer, captions))).sum(-1))
        best = torch.stack(scores).argmax(0).tolist()
        right = sum(values[b] == data.scenes[r].get(name) for b, r in zip(best, rows, strict=True))
        result[name] = round(right / len(rows), 3)
    return result


def _with(scene: Scene, name: str, value: str) -> Scene:
    return replace(scene, **{name: value})
