"""Every name in a LoRA file of ours is one that the programs which read such files know.

Their rules, in our words, for models of the published sizes (on "meta", without weights). What a
reader knows is built from the layout of the checkpoints, not from our names.

- ComfyUI, and Forge which shares its loader (comfy/lora.py, model_lora_keys_unet and _clip): the
  diffusers name of a UNet weight after "lora_unet_", dots as underscores; the six matrices of a
  CLIP layer after "lora_te_" or "lora_te1_", those of SD-XL's second encoder after "lora_te2_".
- A1111 (extensions-builtin/Lora/networks.py): turns the diffusers name of a block into the place in
  the checkpoint, three places a block, and looks that up; of text encoders that came from OpenCLIP
  (SD 2 and the second of SD-XL) it renames the matrices, and q, k, v are one module: it finds their
  names, but adds their change, and that of out, only if the file has all four of a layer.
- sd-scripts (networks/lora.py): for SD 1 and 2 the names are those of diffusers' modules; its SD-XL
  UNet has those of the checkpoint, and a file is translated block by block once it sees a name with
  "down_blocks" or "up_blocks" in it.
"""

import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from loco_core.families import family_of

XL = dict(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
UNETS = {
    "SD 1": dict(cross_attention_dim=768),
    "SD 2": dict(
        cross_attention_dim=1024, use_linear_projection=True, attention_head_dim=(5, 10, 20, 20)
    ),
    "SD-XL": XL,
}
#: Of each model its text encoders: layers, and where they came from.
ENCODERS = {
    "SD 1": [(12, "openai")],
    "SD 2": [(23, "openclip")],
    "SD-XL": [(12, "openai"), (32, "openclip")],
}
MATRICES = [*(f"self_attn_{x}_proj" for x in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2"]
#: Where the checkpoints have transformers in their UNet, and how many blocks each has.
PLACES = {
    "SD 1": {f"input_blocks_{i}_1": 1 for i in (1, 2, 4, 5, 7, 8)}
    | {"middle_block_1": 1}
    | {f"output_blocks_{i}_1": 1 for i in range(3, 12)},
    "SD-XL": {f"input_blocks_{i}_1": depth for i, depth in ((4, 2), (5, 2), (7, 10), (8, 10))}
    | {"middle_block_1": 10}
    | {f"output_blocks_{i}_1": 10 if i < 3 else 2 for i in range(6)},
}
PLACES["SD 2"] = PLACES["SD 1"]
INSIDE = [f"{a}_{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out_0")]
INSIDE += ["ff_net_0_proj", "ff_net_2"]


def full_size(model):
    def encoder(layers: int, made=CLIPTextModel):
        return made(CLIPTextConfig(num_hidden_layers=layers, hidden_size=64, intermediate_size=64))

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[model])
        encoders = [encoder(ENCODERS[model][0][0])]
        if model == "SD-XL":
            encoders.append(encoder(32, CLIPTextModelWithProjection))
    parts = dict(vae=None, tokenizer=None, scheduler=None, unet=unet, text_encoder=encoders[0])
    if model == "SD-XL":
        return StableDiffusionXLPipeline(
            **parts, text_encoder_2=encoders[1], tokenizer_2=None, add_watermarker=False
        )
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def keys(pipe, chosen: str) -> set[str]:
    """The names in a file of an edit that changes the matrices whose path matches `chosen`."""
    weights = {
        f"{part}.{name}.weight"
        for part in ("unet", "text_encoder", "text_encoder_2")
        if isinstance(getattr(pipe, part, None), nn.Module)
        for name, module in getattr(pipe, part).named_modules()
        if isinstance(module, nn.Linear) and re.search(chosen, f"{part}.{name}")
    }
    family = family_of(pipe)
    return {family.lora_key(name) for name in weights | family.lora_also(weights)}


def in_checkpoint(model) -> set[str]:
    """The matrices of the UNet's transformer blocks, as the published checkpoint calls them."""
    return {
        f"{place}_transformer_blocks_{block}_{matrix}"
        for place, depth in PLACES[model].items()
        for block in range(depth)
        for matrix in INSIDE
    }


def in_diffusers(model) -> set[str]:
    """The same matrices by the names of diffusers, underscores for dots."""
    return {
        re.sub(
            r"^(\w+?)_blocks?_(\d+)(_1)?_(?=transformer_blocks)",
            lambda m: {
                "input": "down_blocks_{}_attentions_{}_".format(*divmod(int(m[2]) - 1, 3)),
                "middle": "mid_block_attentions_0_",
                "output": "up_blocks_{}_attentions_{}_".format(*divmod(int(m[2]), 3)),
            }[m[1]],
            name,
        )
        for name in in_checkpoint(model)
    }


def place_of(name: str) -> str:
    """Where the checkpoint has what diffusers calls "down_blocks_0_attentions_1_...": three places
    a block, of which the last is the sampler's."""
    if match := re.fullmatch(r"(down|up)_blocks_(\d+)_attentions_(\d+)_(.+)", name):
        side, block, at, rest = match.groups()
        place = 3 * int(block) + int(at) + (side == "down")
        return f"{'input' if side == 'down' else 'output'}_blocks_{place}_1_{rest}"
    return re.sub(r"^mid_block_attentions_0_", "middle_block_1_", name)


def of_encoders(model, prefixes) -> set[str]:
    """The matrices of the text encoders, each after the prefixes in its place."""
    return {
        f"{prefix}_text_model_encoder_layers_{layer}_{matrix}"
        for allowed, (layers, _) in zip(prefixes, ENCODERS[model], strict=False)
        for prefix in allowed
        for layer in range(layers)
        for matrix in MATRICES
    }


def comfyui(model, found) -> set[str]:
    known = {f"lora_unet_{name}" for name in in_diffusers(model)}
    return found & (known | of_encoders(model, [("lora_te", "lora_te1"), ("lora_te2",)]))


def a1111(model, found) -> set[str]:
    names = {f"diffusion_model_{name}" for name in in_checkpoint(model)}
    for i, (layers, source) in enumerate(ENCODERS[model]):
        start = f"{i}_" if model == "SD-XL" else ""
        for layer in range(layers):
            if source == "openai":
                at = f"{start}transformer_text_model_encoder_layers_{layer}_"
                names |= {at + matrix for matrix in MATRICES}
            else:
                at = f"{start}model_transformer_resblocks_{layer}_"
                names |= {at + m for m in ("attn", "attn_out_proj", "mlp_c_fc", "mlp_c_proj")}

    def looked_up(key: str) -> str:
        if key.startswith("lora_unet_"):
            return f"diffusion_model_{place_of(key.removeprefix('lora_unet_'))}"
        prefix, layer, matrix = re.fullmatch(
            r"(lora_te\d?)_text_model_encoder_layers_(\d+)_(.+)", key
        ).groups()
        start = {"lora_te": "", "lora_te1": "0_", "lora_te2": "1_"}[prefix]
        if prefix != "lora_te2" and model != "SD 2":
            return f"{start}transformer_text_model_encoder_layers_{layer}_{matrix}"
        renamed = {
            "mlp_fc1": "mlp_c_fc",
            "mlp_fc2": "mlp_c_proj",
            "self_attn_out_proj": "attn_out_proj",
        }
        return f"{start}model_transformer_resblocks_{layer}_{renamed.get(matrix, 'attn')}"

    def taken(key: str) -> bool:
        layer, split, _ = key.rpartition("_self_attn_")
        four = {f"{layer}_self_attn_{x}_proj" for x in ("q", "k", "v", "out")}
        whole = not split or "resblocks" not in looked_up(key) or four <= found
        return looked_up(key) in names and whole

    return {key for key in found if taken(key)}


def sd_scripts(model, found) -> set[str]:
    if model != "SD-XL":
        known = {f"lora_unet_{name}" for name in in_diffusers(model)}
        return found & (known | of_encoders(model, [("lora_te",)]))
    known, text = in_checkpoint(model), of_encoders(model, [("lora_te1",), ("lora_te2",)])
    translate = place_of if any("down_blocks" in k or "up_blocks" in k for k in found) else str
    return {k for k in found if translate(k.removeprefix("lora_unet_")) in known} | (found & text)


READERS = {"ComfyUI and Forge": comfyui, "A1111": a1111, "sd-scripts": sd_scripts}
BLOCKS = r"transformer_blocks|layers\.\d+\.(self_attn|mlp)"


@pytest.fixture(scope="module", params=UNETS)
def model(request):
    return request.param, full_size(request.param)


@pytest.mark.parametrize("reader", READERS)
def test_every_name_of_ours_is_one_that_the_program_reads(model, reader):
    name, pipe = model
    found = keys(pipe, BLOCKS)
    layers = sum(layers for layers, _ in ENCODERS[name])
    assert len(found) == len(in_checkpoint(name)) + 6 * layers  # no two weights share a name
    assert READERS[reader](name, found) == found
    # what 0.3 wrote, none of them reads
    dotted = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"}
    assert not READERS["ComfyUI and Forge"](name, dotted)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "chosen",
    [r"attn2\.to_[kv]$", r"mid_block.*attn2\.to_[kv]$", r"\.0\.self_attn\.out_proj$"],
    ids=["all text layers", "middle block alone", "Diff-QuickFix"],
)
def test_every_name_in_the_file_of_an_edit_is_read(model, reader, chosen):
    name, pipe = model
    found = keys(pipe, chosen)
    assert found and READERS[reader](name, found) == found


def test_what_is_there_for_a_program_that_overlooks_others_is_needed(model):
    name, pipe = model
    middle = {key for key in keys(pipe, r"mid_block.*attn2\.to_[kv]$") if "mid_block" in key}
    assert sd_scripts(name, middle) == (set() if name == "SD-XL" else middle)
    out = {key for key in keys(pipe, r"self_attn\.out_proj$") if key.endswith("out_proj")}
    openai = {"SD 1": 12, "SD 2": 0, "SD-XL": 12}[name]  # layers, of which it takes any matrix
    assert len(a1111(name, out)) == openai


def test_keys_and_values_of_all_text_layers_have_a_name_each(model):
    name, pipe = model
    layers = len(family_of(pipe).text_layers)
    assert len(keys(pipe, r"attn2\.to_[kv]$")) == 2 * layers == (140 if name == "SD-XL" else 32)
