"""A family names the text layers in the order they run, and encodes as the pipeline does."""

import pytest
import torch
from conftest import build_tiny_sd, build_tiny_sd2
from diffusers import DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

import loco_core as loco
from loco_core.closed_form.keys import rows_of
from loco_core.families import family_of
from loco_core.families.running import record


@pytest.fixture(scope="module")
def model(tiny_sd):
    return family_of(tiny_sd)


def test_text_layers_are_numbered_as_a_slow_trace_of_the_real_network_finds_them(tiny_sd):
    seen, handles = [], []
    for name, module in tiny_sd.unet.named_modules():
        if name.endswith("attn2.to_k"):  # runs once a layer, whatever the attention is called
            note = lambda module, args, out, name=name: seen.append(name)  # noqa: E731
            handles.append(module.register_forward_hook(note))
    try:
        tiny_sd("a house", num_inference_steps=1, output_type="latent")
    finally:
        for handle in handles:
            handle.remove()
    layers = loco.text_layers(tiny_sd)
    assert [f"{layer.name}.to_k" for layer in layers] == seen
    assert [layer.index for layer in layers] == list(range(16))
    assert {layer.width for layer in layers} == {32}


def test_finding_the_layers_neither_runs_nor_hooks_the_pipeline(tiny_sd):
    calls = []
    handle = tiny_sd.unet.register_forward_pre_hook(lambda *args: calls.append(args))
    before = [len(m._forward_pre_hooks) for m in tiny_sd.unet.modules()]
    try:
        loco.text_layers(tiny_sd)
        assert not calls
        assert before == [len(m._forward_pre_hooks) for m in tiny_sd.unet.modules()]
    finally:
        handle.remove()


def test_the_published_sd15_has_16_layers_with_the_mid_block_at_6():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8
        )  # the published config: the other values are the class's defaults
        layers = record(
            unet, torch.empty(1, 4, 8, 8), torch.zeros(()), torch.empty(1, 77, 768)
        ).text_layers
    places = [layer.name.split(".attentions")[0] for layer in layers]
    assert len(layers) == 16 and {layer.width for layer in layers} == {768}
    assert places[:6] == [f"down_blocks.{i}" for i in (0, 0, 1, 1, 2, 2)]
    assert places[6] == "mid_block"
    assert places[7:] == [f"up_blocks.{i}" for i in (1, 1, 1, 2, 2, 2, 3, 3, 3)]


def test_the_published_sd21_has_the_same_16_places_and_reads_1024_features():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )  # the published config: the other values are the class's defaults
    parts = ["vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"]
    pipe = StableDiffusionPipeline(unet=unet, **dict.fromkeys(parts), requires_safety_checker=False)
    layers = loco.text_layers(pipe)
    assert [layer.name for layer in layers] == [
        layer.name for layer in loco.text_layers(build_tiny_sd())
    ]
    assert {layer.width for layer in layers} == {1024}
    assert family_of(pipe)._latent_shape() == (4, 96, 96)


PADDED = {"with EOS, as SD 1": build_tiny_sd, "with !, as SD 2": build_tiny_sd2}


@pytest.mark.parametrize("build", PADDED.values(), ids=PADDED.keys())
@pytest.mark.parametrize("prompt", ["a house by Van Gogh", "a house ! by Van Gogh !"])
def test_the_end_of_a_text_is_told_from_its_padding(build, prompt):
    pipe = build()
    model = family_of(pipe)
    length = len(pipe.tokenizer(prompt).input_ids)
    (tokens,) = model.tokenize([prompt])
    pad = pipe.tokenizer.convert_tokens_to_ids("!" if build is build_tiny_sd2 else "<|endoftext|>")
    assert (tokens[length:] == pad).all() and tokens[length - 1] == pipe.tokenizer.eos_token_id
    first, last = model.subject_span(prompt, "Van Gogh")
    words = pipe.tokenizer.convert_ids_to_tokens(tokens.tolist())
    assert words[first : last + 1] == ["van</w>", "gogh</w>"]
    concept = loco.Concept("Van Gogh", "style", [prompt], ["a house"])
    edit = loco.locoedit(pipe, concept, layers=[8], tokens="eos", preserve=["a red tree"])
    rows = rows_of(pipe, edit.provenance.settings, "prompt")
    texts = model.encode([prompt, "a house", "a red tree"])
    assert [label.rpartition("| ")[2] for label in rows.labels] == ["gogh", "end"]
    assert torch.allclose(rows.keys, texts.embeds[0, [last, length - 1]], atol=1e-6)
    assert torch.allclose(rows.targets, texts.embeds[1, [2, 3]], atol=1e-6)  # "house", end
    assert torch.allclose(rows.kept, texts.embeds[2, 1:5], atol=1e-6)  # three words, end


def test_a_saved_and_reloaded_sd2_keeps_its_padding_and_its_prediction(tmp_path):
    pipe = build_tiny_sd2()
    pipe.save_pretrained(tmp_path)
    again = loco.load(tmp_path)
    assert again.tokenizer.pad_token == "!" and again.scheduler.config.prediction_type == (
        "v_prediction"
    )
    images = [loco.generate(each, ["a house by Van Gogh"], steps=2) for each in (pipe, again)]
    assert torch.equal(*images)
    assert loco.text_layers(again) == loco.text_layers(pipe)


def test_a_saved_and_reloaded_pipeline_has_the_same_layers_and_texts(tiny_sd, model, tmp_path):
    tiny_sd.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert loco.text_layers(again) == loco.text_layers(tiny_sd)
    prompts = ["a house by Van Gogh", "a tree"]
    assert torch.equal(family_of(again).encode(prompts).embeds, model.encode(prompts).embeds)


def test_a_subclass_of_a_known_pipeline_is_known(tiny_sd):
    class Mine(StableDiffusionPipeline):
        pass

    mine = Mine(**tiny_sd.components, requires_safety_checker=False)
    assert family_of(mine).name == "stable-diffusion"
    assert loco.text_layers(mine) == loco.text_layers(tiny_sd)


def test_an_unknown_pipeline_is_refused_with_the_known_families():
    with pytest.raises(TypeError, match="DDPMPipeline; known families: stable-diffusion, "):
        family_of(DDPMPipeline.__new__(DDPMPipeline))


def test_encode_gives_the_texts_the_pipeline_itself_would_read(tiny_sd, model):
    prompts = ["a house by Van Gogh", "a red tree", ""]
    states = model.encode(prompts)
    for i, prompt in enumerate(prompts):
        wanted = tiny_sd.encode_prompt(prompt, "cpu", 1, False)[0]
        assert torch.allclose(states.embeds[i], wanted[0], atol=1e-6)
    assert states.tokens.shape == (3, tiny_sd.tokenizer.model_max_length)
    assert len(states) == 3 and states.mask is None and states.pooled is None
    assert torch.equal(states[[2, 0]].embeds, states.embeds[[2, 0]])


@pytest.mark.parametrize("prompts, reason", [([], "empty"), ("a house", "list"), ([3], "string")])
def test_bad_prompts_are_refused(tiny_sd, model, prompts, reason):
    with pytest.raises(ValueError, match=reason):
        model.encode(prompts)


def test_kv_are_the_modules_that_compute_keys_and_values(tiny_sd, model):
    layer = loco.text_layers(tiny_sd)[7]
    block = tiny_sd.unet.up_blocks[1].attentions[0].transformer_blocks[0]
    assert model.attention(layer) is block.attn2
    assert model.kv(layer) == {"to_k": block.attn2.to_k, "to_v": block.attn2.to_v}


def test_a_layer_of_another_model_is_refused(tiny_sd, model):
    with pytest.raises(ValueError, match="no module 'nowhere.attn2'"):
        model.attention(loco.TextLayer(3, "nowhere.attn2", 32))


def test_projections_that_cannot_be_edited_are_refused_with_the_reason():
    pipe = build_tiny_sd()
    model, layer = family_of(pipe), loco.text_layers(pipe)[0]
    attention = model.attention(layer)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="fused.*unfuse_qkv_projections"):
        model.kv(layer)
    pipe.unfuse_qkv_projections(vae=False)
    model.kv(layer)
    attention.to_v = torch.ao.nn.quantized.dynamic.Linear(32, 8)
    with pytest.raises(ValueError, match="to_v of text layer 0.*quantised"):
        model.kv(layer)
    attention.to_v = nn.Linear(32, 8, bias=False)
    attention.to_v.weight = nn.Parameter(torch.zeros(8, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="int8"):
        model.kv(layer)


def test_projections_under_a_lora_adapter_are_refused():
    from peft import LoraConfig

    pipe = build_tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    with pytest.raises(ValueError, match="LoRA.*unload_lora_weights"):
        family_of(pipe).kv(loco.text_layers(pipe)[0])


SPANS = [
    ("a house by Van Gogh", "Van Gogh", (4, 5)),
    ("Van Gogh, a house", "van gogh", (1, 2)),
    ("a dog's house", "dog", (2, 2)),
    ("star", "star", (1, 1)),
    ("a red starfish and a red star", "red star", (7 + 4, 12)),
    ("monet and monet", "monet", (3, 3)),
]


@pytest.mark.parametrize("prompt, subject, span", SPANS, ids=[s[0] for s in SPANS])
def test_subject_span_points_at_the_tokens_of_the_subject(tiny_sd, model, prompt, subject, span):
    first, last = model.subject_span(prompt, subject)
    words = tiny_sd.tokenizer.convert_ids_to_tokens(model.tokenize([prompt])[0].tolist())
    said = "".join(words[first : last + 1]).replace("</w>", " ").strip()
    assert said == subject.lower()
    if "starfish" not in prompt:
        assert (first, last) == span


@pytest.mark.parametrize("tokens", [8, 24, 77])
def test_subject_span_works_with_any_number_of_tokens(tokens):
    pipe = build_tiny_sd(tokens=tokens)
    model = family_of(pipe)
    assert model.subject_span("a house by Van Gogh", "Van Gogh") == (4, 5)
    assert model.tokenize(["a house"]).shape == (1, tokens)
    fits = " ".join(["a"] * (tokens - 3)) + " star"
    assert model.subject_span(fits, "star") == (tokens - 2, tokens - 2)
    with pytest.raises(ValueError, match=f"cut off: it ends at token {tokens - 1}"):
        model.subject_span("a " + fits, "star")


@pytest.mark.parametrize(
    "prompt, subject", [("a house", "star"), ("a starfish", "star"), ("a", "")]
)
def test_a_subject_that_is_not_in_the_prompt_is_refused(tiny_sd, model, prompt, subject):
    with pytest.raises(ValueError, match="is not in the prompt"):
        model.subject_span(prompt, subject)
