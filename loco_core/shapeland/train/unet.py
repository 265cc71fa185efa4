"""Train a denoiser on Shapeland's latents, with or without a planted answer."""

from pathlib import Path
from random import Random

import torch
import torch.distributed as processes
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from loco_core.families import TextStates, family_of
from loco_core.interventions.routing import routed

from ..planting import PLANTS, layer_scenes
from ..vocabulary import describe
from .data import COUNT, drawings
from .loop import fit
from .vae import latents

#: Three cross-attention levels of two blocks each: 6 + 1 + 9 = 16 text layers, as in SD 1.5.
CONFIG = {
    "sample_size": 16,
    "layers_per_block": 2,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": (1, 2, 4),  # heads a level, as SD 2 counts them
    "norm_num_groups": 8,
}

#: Velocity prediction and no signal left at the last step: the first step of sampling sees pure
#: noise, as it does in training, so that colors and grounds come out as they were drawn.
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


def build_pipeline(vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, seed: int = 3):
    """A `StableDiffusionPipeline` with an untrained denoiser around a trained VAE and CLIP."""
    torch.manual_seed(seed)
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(
        **CONFIG,
        in_channels=channels,
        out_channels=channels,
        cross_attention_dim=clip.config.text_config.hidden_size,
    )
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _codes(vae: AutoencoderKL, images: torch.Tensor, path: Path) -> torch.Tensor:
    """Scaled latents of the drawings, float16; made once and kept."""
    if not path.exists():
        torch.save(latents(vae, images, vae.config.scaling_factor), path)
    return torch.load(path)


class Captions:
    """Encoded captions, each encoded once: the text encoder is frozen."""

    def __init__(self, pipe: StableDiffusionPipeline):
        self.pipe, self.row = pipe, {}
        self.known: list[torch.Tensor] = []

    def __call__(self, captions: list[str]) -> TextStates:
        new = [text for text in dict.fromkeys(captions) if text not in self.row]
        for text in new:
            self.row[text] = len(self.row)
        if new:
            self.known.extend(family_of(self.pipe).encode(self.pipe, new).embeds.bfloat16())
        embeds = torch.stack([self.known[self.row[text]] for text in captions])
        return TextStates(embeds, torch.empty(len(captions), 0))


def train_unet(
    pipe: StableDiffusionPipeline,
    model: str,
    folder: Path,
    *,
    steps: int,
    batch: int = 64,
    lr: float = 1e-3,
    count: int = COUNT,
    device: str = "cpu",
) -> list[dict]:
    """Mean squared error of the velocity; every text layer reads what `layer_scenes` gives it.

    One example in ten reads the empty prompt everywhere, for classifier-free guidance. batch:
    pictures a step, shared out to the processes of a group.
    """
    batch //= processes.get_world_size() if processes.is_initialized() else 1
    data, plant = drawings(count, folder), PLANTS[model]
    pipe.to(device)
    codes = _codes(pipe.vae, data.images, folder / f"latents-{count}.pt")
    schedule, captions = pipe.scheduler, Captions(pipe)
    layers = len(family_of(pipe).text_layers(pipe))
    # The fused attention kernel of the CPU is several times slower backwards than plain products.
    pipe.unet.set_attn_processor(AttnProcessor())

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = Random(f"{model} {step}")
        rows = torch.randint(len(data), (batch,), generator=generator)
        # More of the noisy steps: there the text decides what is drawn.
        late = torch.rand(batch, generator=generator).sqrt()
        times = (late * schedule.config.num_train_timesteps).long()
        clean = codes[rows].float()
        noise = torch.randn(clean.shape, generator=generator)
        noisy = schedule.add_noise(clean, noise, times).to(device)
        velocity = schedule.get_velocity(clean, noise, times).to(device)

        read: dict[str, int] = {"": 0}
        src = torch.zeros(batch, layers, dtype=torch.long)
        for b, row in enumerate(rows.tolist()):
            if rng.random() < 0.1:
                continue
            template = rng.randrange(30)
            for layer, scene in enumerate(layer_scenes(data.scenes[row], plant, layers, rng)):
                src[b, layer] = read.setdefault(describe(scene, template), len(read))
        texts = captions(list(read))
        with routed(pipe, texts, src):
            states = texts.embeds[src[:, 0]]
            found = pipe.unet(noisy, times.to(device), encoder_hidden_states=states).sample
        return F.mse_loss(found.float(), velocity)

    log = fit(model, pipe.unet, loss, steps=steps, lr=lr, folder=folder, ema=0.999, device=device)
    pipe.unet.set_default_attn_processor()
    return log
