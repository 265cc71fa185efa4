"""Stable Diffusion 1.x and 2.x: a UNet with one CLIP text encoder.

Text enters only through the cross-attention (`attn2`) of the transformer blocks, 16 of them in the
published models, and every layer reads the same text states.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .latent import LatentModel
from .running import Run, config_key, plain, record
from .text import TextLayer, TextStates, checked_prompts


class StableDiffusion(LatentModel):
    """`diffusers.StableDiffusionPipeline` and its subclasses."""

    name = "stable-diffusion"
    #: Component -> how the names of its weights begin in a LoRA file of kohya's convention.
    lora_prefixes: Mapping[str, str] = {"unet": "lora_unet", "text_encoder": "lora_te"}

    @classmethod
    def owns(cls, pipe: Any) -> bool:
        from diffusers import StableDiffusionPipeline

        return isinstance(pipe, StableDiffusionPipeline)

    def run(self) -> Run:
        unet = plain(self.denoiser)
        # an IP-Adapter's image projection is no part of the architecture that the config can build
        ours = unet.config.encoder_hid_dim_type == "ip_image_proj"
        instead = {"encoder_hid_dim_type": None} if ours else {}
        return _run(unet.__class__, config_key(unet, **instead))

    def encode(self, prompts: Sequence[str]) -> TextStates:
        prompts = checked_prompts(prompts)
        with torch.no_grad():
            embeds, _ = self.pipe.encode_prompt(
                prompts, self.pipe._execution_device, 1, do_classifier_free_guidance=False
            )
        return TextStates(embeds, self.tokenize(prompts))

    def kv(self, layer: TextLayer) -> dict[str, nn.Linear]:
        return {name: self.linear(layer, name) for name in ("to_k", "to_v")}

    def conditional_rows(self, rows: int, guidance: float) -> Tensor:
        guided = guidance > 1 and self.denoiser.config.time_cond_proj_dim is None
        return torch.arange(rows, 2 * rows) if guided else torch.arange(rows)

    @property
    def text_encoders(self) -> dict[str, nn.ModuleList]:
        return dict([clip_layers(self.pipe, "text_encoder")])

    def lora_key(self, weight: str) -> str | None:
        component, _, path = weight.removesuffix(".weight").partition(".")
        prefix = self.lora_prefixes.get(component)
        # the name of CLIP's layers is that of transformers before 5, which flattened them
        flat = component != self.component and path.startswith(("encoder.", "embeddings."))
        path = f"text_model.{path}" if flat else path
        return prefix and f"{prefix}_{path.replace('.', '_')}"

    def lora_also(self, weights: Collection[str]) -> set[str]:
        """A1111 takes the four matrices of an attention of OpenCLIP together or not at all."""
        layers = {weight.rpartition(".self_attn.")[0] for weight in weights} - {""}
        four = {f"{x}.self_attn.{each}_proj.weight" for x in layers for each in "q k v out".split()}
        return four.difference(weights)

    def _inputs(self, texts: TextStates, negative: TextStates) -> dict[str, Any]:
        return {"prompt_embeds": texts.embeds, "negative_prompt_embeds": negative.embeds}


def clip_layers(pipe: Any, component: str) -> tuple[str, nn.ModuleList]:
    """Path and transformer layers of the CLIP text encoder `component`."""
    encoder = plain(getattr(pipe, component))
    # transformers 5 flattened CLIPTextModel; before, and with projection, it is nested
    path = ("text_model." if hasattr(encoder, "text_model") else "") + "encoder.layers"
    return f"{component}.{path}", encoder.get_submodule(path)


@lru_cache(maxsize=64)
def _run(unet_class: Any, key: str) -> Run:
    with torch.device("meta"):
        unet = unet_class.from_config(json.loads(key))
        config = unet.config
        side = 2 ** len(config.block_out_channels)
        sample = torch.empty(1, config.in_channels, side, side)
        text = torch.empty(1, 1, config.cross_attention_dim)
        inputs: dict[str, Any] = {"encoder_hidden_states": text}
        if config.addition_embed_type == "text_time":  # SD-XL: the pooled text and six sizes
            sizes = 6 * config.addition_time_embed_dim
            pooled = torch.empty(1, config.projection_class_embeddings_input_dim - sizes)
            inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.empty(1, 6)}
        return record(unet, sample, torch.zeros(()), **inputs)
