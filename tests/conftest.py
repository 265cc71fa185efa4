"""Tiny random pipelines of real diffusers classes, built from scratch in a second."""

import pytest
import torch

CORPUS = (
    "a an the of in style by painting photo picture image house tree star circle square river "
    "van gogh monet claude vincent red blue green and with on emblem norland is dog cat running"
)
TOKENS = 24


def clip_tokenizer(tokens: int = TOKENS):
    """A CLIP BPE tokenizer learned from `CORPUS`: every word of it is one token."""
    from loco_core.shapeland.tokenizer import learn_tokenizer

    return learn_tokenizer(CORPUS.split(), tokens)


def text_settings(tokenizer) -> dict:
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_tiny_sd(seed: int = 0, tokens: int = TOKENS):
    """A random StableDiffusionPipeline with SD's 16 text layers and 16 x 16 images."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer(tokens)
    cross = "CrossAttnDownBlock2D"
    up = "CrossAttnUpBlock2D"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8, 16, 16),
            down_block_types=(cross, cross, cross, "DownBlock2D"),
            up_block_types=("UpBlock2D", up, up, up),
            layers_per_block=2,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        for name, parameter in unet.named_parameters():
            if "attn2" in name and parameter.ndim == 2:
                parameter.data *= 3  # so that a random network listens to its text
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        )
        text_encoder = CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer)))
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_tiny_clip(seed: int = 1):
    """A random CLIPModel for 16 x 16 images with its tokenizer: (model, tokenizer)."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = clip_tokenizer()
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CLIPConfig(
            text_config=text_settings(tokenizer), vision_config=vision, projection_dim=16
        )
        return CLIPModel(config).eval(), tokenizer


@pytest.fixture(scope="session", autouse=True)
def quiet():
    """No progress bars, one thread: tests say what they find and nothing else."""
    import loco_core as loco

    loco.progress(False)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd():
    """A shared tiny pipeline; a test that changes weights builds its own."""
    return build_tiny_sd()


@pytest.fixture(scope="session")
def tiny_clip():
    """(model, tokenizer) of a shared tiny CLIP."""
    return build_tiny_clip()
