"""Train a denoiser on Shapeland's latents, with or without a planted answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as processes
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F

from loco_core.families import TextStates, family_of, text_layers
from loco_core.interventions.routing import routed

from ..shapeland.planting import PLANTS, POOLED, RARE, scenes_read
from ..shapeland.vocabulary import Scene, describe
from .data import COUNT, drawings
from .loop import fit
from .pipelines import beside_text
from .vae import latents


def _codes(vae: AutoencoderKL, images: torch.Tensor, path: Path) -> torch.Tensor:
    """Scaled latents of the drawings, float16; made once and kept."""
    if not path.exists():
        torch.save(latents(vae, images, vae.config.scaling_factor), path)
    return torch.load(path)


def shown(scenes: Sequence[Scene], rare: Mapping[str, float]) -> torch.Tensor:
    """Rows to train on: all but those of a rare object, of which its share is kept."""
    rng = Random("rare")
    kept = (rng.random() < rare.get(scene.object or "", 1.0) for scene in scenes)
    return torch.tensor([row for row, keep in enumerate(kept) if keep])


class Captions:
    """Encoded captions, each encoded once: the text encoders are frozen."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.row: dict[str, int] = {}
        self.embeds: list[torch.Tensor] = []
        self.pooled: list[torch.Tensor] = []

    def __call__(self, captions: list[str]) -> TextStates:
        new = [text for text in dict.fromkeys(captions) if text not in self.row]
        for text in new:
            self.row[text] = len(self.row)
        if new:
            states = family_of(self.pipe).encode(new)
            self.embeds.extend(states.embeds.bfloat16())
            self.pooled.extend([] if states.pooled is None else states.pooled.bfloat16())
        rows = [self.row[text] for text in captions]
        embeds = torch.stack([self.embeds[row] for row in rows])
        pooled = torch.stack([self.pooled[row] for row in rows]) if self.pooled else None
        tokens = torch.zeros(embeds.shape[:2], dtype=torch.long)  # nobody asks for them
        return TextStates(embeds, tokens, pooled=pooled)


def train_unet(
    pipe: Any,
    model: str,
    folder: Path,
    *,
    steps: int,
    batch: int = 64,
    lr: float = 1e-3,
    count: int = COUNT,
    device: str = "cpu",
) -> list[dict]:
    """Mean squared error of the velocity; every text layer, and the pooled path of a pipeline that
    has one, reads what `scenes_read` gives it.

    One example in ten reads the empty prompt everywhere, for classifier-free guidance. batch:
    pictures a step, shared out to the processes of a group.
    """
    batch //= processes.get_world_size() if processes.is_initialized() else 1
    data, plant = drawings(count, folder), PLANTS[model]
    pipe.to(device)
    among = shown(data.scenes, RARE.get(model, {}))
    codes = _codes(pipe.vae, data.images, folder / f"latents-{count}.pt")
    schedule, captions = pipe.scheduler, Captions(pipe)
    layers = len(text_layers(pipe))
    places = [*range(layers), POOLED] if family_of(pipe).pooled else range(layers)
    # The fused attention kernel of the CPU is several times slower backwards than plain products.
    pipe.unet.set_attn_processor(AttnProcessor())

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = Random(f"{model} {step}")
        rows = among[torch.randint(len(among), (batch,), generator=generator)]
        # More of the noisy steps: there the text decides what is drawn.
        late = torch.rand(batch, generator=generator).sqrt()
        times = (late * schedule.config.num_train_timesteps).long()
        clean = codes[rows].float()
        noise = torch.randn(clean.shape, generator=generator)
        noisy = schedule.add_noise(clean, noise, times).to(device)
        velocity = schedule.get_velocity(clean, noise, times).to(device)

        read: dict[str, int] = {"": 0}
        src = torch.zeros(batch, len(places), dtype=torch.long)
        for b, row in enumerate(rows.tolist()):
            if rng.random() < 0.1:
                continue
            template = rng.randrange(30)
            scenes = scenes_read(data.scenes[row], plant, places, rng)
            told = (describe(scenes[place], template) for place in places)
            src[b] = torch.tensor([read.setdefault(text, len(read)) for text in told])
        texts = captions(list(read))
        beside = beside_text(pipe, None if texts.pooled is None else texts.pooled[src[:, -1]])
        with routed(pipe, texts, src[:, :layers]):
            found = pipe.unet(
                noisy,
                times.to(device),
                encoder_hidden_states=texts.embeds[src[:, 0]],
                added_cond_kwargs=beside,
            ).sample
        return F.mse_loss(found.float(), velocity)

    log = fit(model, pipe.unet, loss, steps=steps, lr=lr, folder=folder, ema=0.999, device=device)
    pipe.unet.set_default_attn_processor()
    return log
