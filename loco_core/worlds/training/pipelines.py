"""The pipelines that are trained: a new denoiser around trained encoders and autoencoder."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

#: Three cross-attention levels of two blocks each: 6 + 1 + 9 = 16 text layers, as in SD 1.5.
SD: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 2,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": (1, 2, 4),  # heads a level, as SD 2 counts them
    "norm_num_groups": 8,
}

#: As in SD-XL, no text at the highest resolution and several transformer blocks an attention:
#: 4 + 6 + 3 + 9 + 6 = 28 text layers. What text says about texture comes up from 8 x 8 in channels.
SDXL: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 2,
    "block_out_channels": (48, 64, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (1, 2, 3),
    "use_linear_projection": True,
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
}

#: Velocity prediction and no signal left at the last step: the first step of sampling sees pure
#: noise, as it does in training, so that colors and grounds come out as they were drawn.
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


def build_sd(
    vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, seed: int = 3
) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` with an untrained denoiser around a trained VAE and CLIP."""
    torch.manual_seed(seed)
    width = clip.config.text_config.hidden_size
    return StableDiffusionPipeline(
        vae=vae,
        unet=_denoiser(SD, vae, cross_attention_dim=width),
        text_encoder=_text_tower(clip),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sdxl(
    vae: AutoencoderKL,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    second: CLIPTextModelWithProjection,
    seed: int = 3,
) -> StableDiffusionXLPipeline:
    """A `StableDiffusionXLPipeline` with an untrained denoiser around trained parts.

    The empty prompt is encoded like any other, also where no negative prompt is given.
    """
    torch.manual_seed(seed)
    unet = _denoiser(
        SDXL,
        vae,
        cross_attention_dim=clip.config.text_config.hidden_size + second.config.hidden_size,
        projection_class_embeddings_input_dim=second.config.projection_dim
        + 6 * SDXL["addition_time_embed_dim"],
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=_text_tower(clip),
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULE),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def beside_text(pipe: Any, pooled: Tensor | None) -> dict[str, Tensor]:
    """What an SD-XL denoiser reads beside the text: pooled [row, width] and, in each row, that
    the picture was made and is wanted at full size, uncut. Nothing for a pipeline without."""
    if pooled is None:
        return {}
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    sizes = torch.tensor([side, side, 0, 0, side, side], device=pooled.device)
    return {"text_embeds": pooled, "time_ids": sizes.to(pooled).expand(len(pooled), -1)}


def _denoiser(config: dict, vae: AutoencoderKL, **widths: int) -> UNet2DConditionModel:
    channels = vae.config.latent_channels
    return UNet2DConditionModel(**config, **widths, in_channels=channels, out_channels=channels)


def _text_tower(clip: CLIPModel) -> CLIPTextModel:
    tower = CLIPTextModel(clip.config.text_config)
    tower.load_state_dict(clip.text_model.state_dict())
    return tower.eval()
