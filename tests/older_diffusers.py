"""What a pipeline of an older diffusers paints: run in an environment of its own, by test_lora.

    python older_diffusers.py INPUT OUTPUT

INPUT is JSON, of each picture's name: the folder of its pipeline, token ids for each text encoder,
the path of a LoRA or null, and its strength. OUTPUT is safetensors, each picture by its name.
"""

import json
import sys

import diffusers
import peft
import torch
import transformers
from safetensors.torch import save_file


def embedded(pipe, ids):
    """What the UNet reads of one prompt, as the pipeline of each family encodes it."""
    if not hasattr(pipe, "text_encoder_2"):
        return {"prompt_embeds": pipe.text_encoder(torch.tensor([ids[0]]))[0]}
    first = pipe.text_encoder(torch.tensor([ids[0]]), output_hidden_states=True)
    second = pipe.text_encoder_2(torch.tensor([ids[1]]), output_hidden_states=True)
    states = [each.hidden_states[-2] for each in (first, second)]
    return {"prompt_embeds": torch.cat(states, -1), "pooled_prompt_embeds": second[0]}


@torch.no_grad()
def painted(folder, ids, lora, strength):
    tokenizers = dict.fromkeys(["tokenizer", "tokenizer_2"][: len(ids)])
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **tokenizers)
    if lora:
        pipe.load_lora_weights(lora, adapter_name="edit")
        pipe.set_adapters(["edit"], adapter_weights=[strength])
    latents = torch.randn(
        1, pipe.unet.config.in_channels, *2 * [pipe.unet.config.sample_size],
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return pipe(
        **embedded(pipe, ids), latents=latents, num_inference_steps=3, guidance_scale=1.0,
        output_type="pt",
    ).images[0]  # fmt: skip


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        asked = json.load(file)
    images = {name: painted(*run) for name, run in asked.items()}
    used = {m.__name__: m.__version__ for m in (diffusers, peft, transformers)}
    save_file(images, sys.argv[2], metadata=used)
