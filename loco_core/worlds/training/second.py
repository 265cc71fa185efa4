"""Train the second text encoder of mini-sdxl: a real `CLIPTextModelWithProjection`.

It has another width than the first and learns, from captions alone, to give the embeddings of the
shared CLIP's text tower (distillation): the pooled text of mini-sdxl then lives in the space in
which that CLIP compares texts and images.
"""

from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ..shapeland.vocabulary import ATTRIBUTES, describe, held_out_scenes, is_held_out, random_scene
from .clip import ids_of
from .loop import fit

WIDTH = 96


def build_second(clip: CLIPModel) -> CLIPTextModelWithProjection:
    """An untrained encoder: as deep as the shared text tower, with its projection, but narrower."""
    config = clip.config.text_config.to_dict() | {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 3,
        "projection_dim": clip.config.projection_dim,
    }
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    encoder.set_attn_implementation("eager")  # the fused kernel is slow backwards on a CPU
    return encoder


def train_second(
    folder: Path, clip: CLIPModel, tokenizer: CLIPTokenizer, device: str = "cpu", steps: int = 600
) -> Path:
    """Mean squared error to the teacher's projected embeddings, of captions and of their twins with
    one attribute changed. Writes a folder and returns its path."""
    torch.manual_seed(4)
    clip.to(device)
    encoder = build_second(clip).to(device)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        ids = ids_of(tokenizer, _captions(Random(step), 64)).to(device)
        with torch.no_grad():
            teacher = _embeds(clip, ids).float()
        return F.mse_loss(encoder(ids).text_embeds.float(), teacher) / teacher.var()

    fit("text_encoder_2", encoder, loss, steps=steps, lr=2e-3, folder=folder, device=device)
    print("values told apart on held-out captions:", told_apart(encoder.cpu(), clip, tokenizer))
    encoder.half().save_pretrained(folder / "text_encoder_2")
    return folder / "text_encoder_2"


@torch.inference_mode()
def told_apart(
    encoder: CLIPTextModelWithProjection, clip: CLIPModel, tokenizer: CLIPTokenizer
) -> dict[str, float]:
    """Per attribute, the share of held-out captions whose embedding lies nearer to the teacher's
    of the same caption than to those with any other value of the attribute."""
    clip.cpu()
    result = {}
    for name, values in ATTRIBUTES.items():
        scenes = [scene for scene in held_out_scenes(400, seed=9) if scene.get(name)]
        own = encoder(ids_of(tokenizer, [describe(scene) for scene in scenes])).text_embeds
        distance = []
        for value in values:
            captions = [describe(replace(scene, **{name: value})) for scene in scenes]
            teacher = _embeds(clip, ids_of(tokenizer, captions))
            distance.append((own - teacher).norm(dim=-1))
        nearest = torch.stack(distance).argmin(0).tolist()
        right = sum(values[n] == s.get(name) for n, s in zip(nearest, scenes, strict=True))
        result[name] = round(right / len(scenes), 3)
    return result


def _embeds(clip: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Projected embeddings of the text tower, as long as they come: [n, 128]."""
    return clip.text_projection(clip.text_model(ids).pooler_output)


def _captions(rng: Random, count: int) -> list[str]:
    """`count` captions and their twins that differ in one attribute, none of them held out."""
    result = []
    for _ in range(count):
        scene, template = random_scene(rng, held_out=False), rng.randrange(30)
        name = rng.choice([name for name in ATTRIBUTES if scene.get(name)] or ["style"])
        twin = replace(scene, **{name: rng.choice(ATTRIBUTES[name])})
        result += [describe(s, template) for s in (scene, twin) if not is_held_out(s)]
    return result
