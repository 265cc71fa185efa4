"""Train the autoencoder: AutoencoderKL, 64 x 64 pictures <-> 16 x 16 latents."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from .data import COUNT, drawings
from .loop import fit

CONFIG = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "block_out_channels": (24, 48, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}


def train_vae(folder: Path, device: str = "cpu", steps: int = 1600, count: int = COUNT) -> Path:
    """L1 + L1 of the image gradient + a little KL. Writes a diffusers folder whose
    `scaling_factor` gives the latents unit variance, and returns its path."""
    data = drawings(count, folder)
    torch.manual_seed(1)
    vae = AutoencoderKL(**CONFIG).to(device, memory_format=torch.channels_last)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(data), (16,), generator=generator)
        images = (data.floats(rows) * 2 - 1).to(device)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        pixels = F.smooth_l1_loss(decoded, images, beta=0.1)
        return pixels + 0.5 * edges + 1.5e-6 * posterior.kl().mean()

    fit("vae", vae, loss, steps=steps, lr=2e-3, folder=folder, device=device)
    vae.cpu().to(memory_format=torch.contiguous_format)
    spread = latents(vae, data.images[:2000], 1.0).float().std().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 4))
    vae.half().save_pretrained(folder / "vae")
    return folder / "vae"


@torch.inference_mode()
def latents(vae: AutoencoderKL, images: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled latent means of uint8 images, float16 [n, channels, 16, 16] on the CPU."""
    parts = []
    with torch.autocast(vae.device.type, torch.bfloat16):
        for chunk in images.split(50):
            pixels = chunk.to(vae.device, vae.dtype) / 127.5 - 1
            parts.append((vae.encode(pixels).latent_dist.mean.float() * scale).half().cpu())
    return torch.cat(parts)
