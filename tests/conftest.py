"""Tiny random pipelines of real diffusers classes, built from scratch in a second."""

import pytest
import shapes  # noqa: F401  (checks the shapes in signatures from here on)
import torch

CORPUS = (
    "a an the of in style by painting photo picture image house tree star circle square river "
    "van gogh monet claude vincent red blue green and with on emblem norland is dog cat running"
)
TOKENS = 24


def clip_tokenizer(tokens: int = TOKENS):
    """A CLIP BPE tokenizer learned from `CORPUS`: every word of it is one token."""
    from loco_core.worlds.shapeland.tokenizer import learn_tokenizer

    return learn_tokenizer(CORPUS.split(), tokens)


def padded_with(tokenizer, pad: str):
    """The same tokenizer with another padding token, loaded from its files as a pipeline's is."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return type(tokenizer).from_pretrained(folder, pad_token=pad)


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
        unet = louder(
            UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 8, 16, 16),
                down_block_types=(cross, cross, cross, "DownBlock2D"),
                up_block_types=("UpBlock2D", up, up, up),
                layers_per_block=2,
                cross_attention_dim=32,
                attention_head_dim=2,
                norm_num_groups=4,
            )
        )
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


def build_tiny_sd2(seed: int = 0):
    """A random pipeline like SD 2.1: predicts v, projects linearly, has heads per block and a wider
    text encoder, and pads with "!"."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    pipe, tokenizer = build_tiny_sd(seed), padded_with(clip_tokenizer(), "!")
    config = {**pipe.unet.config} | dict(
        cross_attention_dim=64, use_linear_projection=True, attention_head_dim=(1, 2, 4, 4)
    )
    text = text_settings(tokenizer) | dict(hidden_size=64, hidden_act="gelu")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = louder(UNet2DConditionModel.from_config(config))
        text_encoder = CLIPTextModel(CLIPTextConfig(**text))
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    parts = dict(unet=unet.eval(), text_encoder=text_encoder.eval(), tokenizer=tokenizer)
    return StableDiffusionPipeline(
        **pipe.components | parts | dict(scheduler=scheduler), requires_safety_checker=False
    )


def build_tiny_sdxl(seed: int = 0, tokens: int = TOKENS, zeros: bool = True):
    """A random StableDiffusionXLPipeline with 18 text layers and 16 x 16 images.

    Like the published one: no text at the highest resolution, one to three transformer blocks per
    attention, two encoders of different widths, of which the second pads with "!" and is pooled.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer(tokens)
    tokenizer_2 = padded_with(tokenizer, "!")
    first = text_settings(tokenizer)
    second = text_settings(tokenizer_2) | dict(
        hidden_size=48, num_hidden_layers=3, hidden_act="gelu", projection_dim=24
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = louder(
            UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 8, 16),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                transformer_layers_per_block=(1, 2, 3),
                attention_head_dim=(1, 2, 4),
                cross_attention_dim=32 + 48,
                use_linear_projection=True,
                norm_num_groups=4,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=24 + 6 * 8,
            )
        )
        unet.add_embedding.linear_1.weight.data[:, :24] *= 5  # and to its pooled text
        text_encoder = CLIPTextModel(CLIPTextConfig(**first))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**second))
    return StableDiffusionXLPipeline(
        vae=build_tiny_sd(seed).vae,
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def louder(unet):
    """`unet` with stronger cross-attention, so that a random network listens to its text."""
    for name, parameter in unet.named_parameters():
        if "attn2" in name and parameter.ndim == 2:
            parameter.data *= 3
    return unet


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


@torch.no_grad()
def embeds(pipe, prompt: str) -> torch.Tensor:
    """Token embeddings [token, width] in float64, by tokenizer and text encoder alone."""
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt")
    return pipe.text_encoder(ids.input_ids)[0][0].double()


def exact(pipe, prompts, seeds=(0,), steps: int = 25) -> torch.Tensor:
    """Images [prompt, seed, 3, H, W] before `loco.generate` puts them on the 8-bit grid."""
    from loco_core.families import family_of
    from loco_core.painting import Picture, Sampling
    from loco_core.painting.batch import paint_batch

    listed = [Picture(prompt, seed) for prompt in prompts for seed in seeds]
    images = paint_batch(family_of(pipe), listed, Sampling(steps))
    return images.unflatten(0, (len(prompts), len(seeds)))


def pairs(pipe, rows: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys C and targets G [row, width] of hand-made rows (prompt, token, twin, token)."""
    keys = torch.stack([embeds(pipe, prompt)[i] for prompt, i, _, _ in rows])
    return keys, torch.stack([embeds(pipe, twin)[j] for _, _, twin, j in rows])


def state(pipe) -> dict[str, bytes]:
    """Every weight of a Stable Diffusion pipeline, bit for bit."""
    return {
        f"{part}.{name}": tensor.numpy().tobytes()
        for part in ("unet", "text_encoder", "vae")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


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
def tiny_sdxl():
    """A shared tiny SD-XL; a test that changes weights builds its own."""
    return build_tiny_sdxl()


@pytest.fixture(scope="session")
def tiny_clip():
    """(model, tokenizer) of a shared tiny CLIP."""
    return build_tiny_clip()
