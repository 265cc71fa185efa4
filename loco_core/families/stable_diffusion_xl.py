"""Stable Diffusion XL: a UNet that reads two CLIP text encoders.

    text layers read   c = [c1, c2], the penultimate layers of both encoders  [token, 768 + 1280]
    beside them        pooled text of the second encoder and image sizes, added to the time step

In the published model 70 text layers read c, in attentions of two to ten transformer blocks each.
The pooled text reaches every residual block through the time embedding: no routing of text layers
and no edit of their keys and values touches it.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from .stable_diffusion import StableDiffusion, clip_layers
from .text import TextStates, checked_prompts


class StableDiffusionXL(StableDiffusion):
    """`diffusers.StableDiffusionXLPipeline` and its subclasses, with both text encoders.

    What needs an encoder raises ValueError if the pipeline has not both.
    """

    name = "stable-diffusion-xl"
    pooled = True
    lora_prefixes = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1",
        "text_encoder_2": "lora_te2",
    }

    @classmethod
    def owns(cls, pipe: Any) -> bool:
        from diffusers import StableDiffusionXLPipeline

        return isinstance(pipe, StableDiffusionXLPipeline)

    def encode(self, prompts: Sequence[str]) -> TextStates:
        _check_encoders(self.pipe)
        prompts = checked_prompts(prompts)
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                prompts, device=self.pipe._execution_device, do_classifier_free_guidance=False
            )
        return TextStates(embeds, self.tokenize(prompts), pooled=pooled)

    def unprompted(self, empty: TextStates) -> TextStates:
        """Zeros, if the pipeline's config says `force_zeros_for_empty_prompt`. The negative prompt
        "" is no such case: it is encoded, by the pipeline as well."""
        if not self.pipe.config.force_zeros_for_empty_prompt:
            return empty
        assert empty.pooled is not None  # `encode` of this family always gives it
        zeros = torch.zeros_like(empty.embeds), torch.zeros_like(empty.pooled)
        return TextStates(zeros[0], empty.tokens, pooled=zeros[1])

    def lora_key(self, weight: str) -> str | None:
        """None for what adds the pooled text to the time step: diffusers knows no such name."""
        return None if ".add_embedding." in weight else super().lora_key(weight)

    def lora_also(self, weights: Collection[str]) -> set[str]:
        """And sd-scripts tells by a name outside the middle block that the names are diffusers'."""
        inside = [weight.split(".")[1] for weight in weights if weight.startswith("unet.")]
        first = {f"unet.{self.text_layers[0].name}.to_k.weight"}
        return super().lora_also(weights) | (first if set(inside) == {"mid_block"} else set())

    def _inputs(self, texts: TextStates, negative: TextStates) -> dict[str, Any]:
        return super()._inputs(texts, negative) | {
            "pooled_prompt_embeds": texts.pooled,
            "negative_pooled_prompt_embeds": negative.pooled,
        }

    @property
    def text_encoders(self) -> dict[str, nn.ModuleList]:
        _check_encoders(self.pipe)
        return dict(clip_layers(self.pipe, name) for name in ("text_encoder", "text_encoder_2"))

    @property
    def tokenizer(self) -> Any:
        """The first one. The second splits words alike; the published one pads with "!"."""
        _check_encoders(self.pipe)
        return self.pipe.tokenizer

    def subject_span(self, prompt: str, subject: str) -> tuple[int, int]:
        span = super().subject_span(prompt, subject)
        lengths = [
            len(tokenizer(self.pipe.maybe_convert_prompt(prompt, tokenizer)).input_ids)
            for tokenizer in (self.pipe.tokenizer, self.pipe.tokenizer_2)
        ]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"the two tokenizers split {prompt!r} into {lengths[0]} and {lengths[1]} tokens, "
                f"so {subject!r} has no one place: load a textual inversion into both of them"
            )
        return span


def _check_encoders(pipe: Any) -> None:
    for which, component in (("first", "text_encoder"), ("second", "text_encoder_2")):
        tokenizer = component.replace("text_encoder", "tokenizer")
        for name in (component, tokenizer):
            if getattr(pipe, name) is None:
                raise ValueError(
                    f"a pipeline without its {which} encoder cannot encode a prompt as SD-XL does "
                    f"({name} of this {type(pipe).__name__} is None; the refiner has no first one)"
                    ': load the base model, loco.load("stabilityai/stable-diffusion-xl-base-1.0")'
                )
