"""A family names the text layers in the order they run, and encodes as the pipeline does."""

import numpy as np
import pytest
import torch
from conftest import build_tiny_sd, build_tiny_sd2, build_tiny_sdxl
from diffusers import DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

import loco_core as loco
from loco_core.closed_form.keys import rows_of
from loco_core.closed_form.recipe import recipes_of
from loco_core.families import FAMILIES, Site, TextStates, family_of
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
    rows = rows_of(model, recipes_of(edit)[0], "prompt")
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


# --- sites ------------------------------------------------------------------------------------

BUILD = {"SD": build_tiny_sd, "SD-XL": build_tiny_sdxl}


@pytest.fixture(scope="module", params=BUILD.values(), ids=BUILD.keys())
def either(request):
    return family_of(request.param())


def test_sites_are_numbered_as_a_slow_trace_of_the_real_network_finds_them(either):
    kinds = {"ResnetBlock2D": "ResNet", "FeedForward": "feed-forward"}
    seen, handles = [], []
    for name, module in either.denoiser.named_modules():
        kind = kinds.get(type(module).__name__)
        if type(module).__name__ == "Attention":  # it reads text if its keys are as wide as text
            text = module.to_k.in_features == either.text_layers[0].width
            kind = "cross-attention" if text else "self-attention"
        if kind is not None:
            note = lambda module, args, out, site=(name, kind): seen.append(site)  # noqa: E731
            handles.append(module.register_forward_hook(note))
    try:
        either.pipe("a house", num_inference_steps=1, output_type="latent")
    finally:
        for handle in handles:
            handle.remove()
    assert [(site.name, site.kind) for site in either.sites] == seen
    for site in either.sites:
        assert either.module_of(site) is either.denoiser.get_submodule(site.name)


def test_sites_are_found_without_running_the_pipeline(either):
    calls = []
    networks = [x for x in either.pipe.components.values() if isinstance(x, nn.Module)]
    handles = [x.register_forward_pre_hook(lambda *args: calls.append(args)) for x in networks]
    try:
        assert either.sites and not calls
    finally:
        for handle in handles:
            handle.remove()


def test_a_site_is_its_label(either):
    sites = [*either.sites, *either.text_sites(["a house by Van Gogh"], "Van Gogh", "all")]
    assert [Site.of(site.label) for site in sites] == sites
    for site in sites[len(either.sites) :]:
        encoder, index = site.layer
        part = getattr(either.pipe, encoder)
        (path,) = [p for p in either.text_encoders if p.startswith(encoder + ".")]
        part = part.get_submodule(path.partition(".")[2])[index]
        assert either.module_of(site) is getattr(part, site.name.rpartition(".")[2])
    blocks = list(dict.fromkeys(site.block for site in either.sites))
    count = len(either.denoiser.config.down_block_types)
    down, up = ([f"{which} {i}" for i in range(count)] for which in ("down", "up"))
    assert blocks == [*down, "mid", *up]


@pytest.mark.parametrize("label", ["mid_block.resnets.1.conv1", "mlp", "a.attn2 @0", "a.mlp @x"])
def test_what_is_no_site_is_refused(label):
    with pytest.raises(ValueError, match="there is no site"):
        Site.of(label)


def test_a_site_of_another_model_is_refused(either):
    for site in (Site("nowhere.attn2", "cross-attention"), Site("x.layers.0.mlp", "MLP", 0)):
        with pytest.raises(ValueError, match=f"has no site '{site.label}'"):
            either.module_of(site)
    with pytest.raises(ValueError, match="is of the denoiser and has no layer"):
        _ = Site("mid_block.attn2", "cross-attention").layer


# --- what a model answers ----------------------------------------------------------------------


def test_what_a_weight_is_handed_depends_on_what_it_says(either):
    """Its inputs are recorded while two pictures of one prompt are made."""
    (first, *_), place = either.text_encoders, either.text_layers[3].name
    other = place.replace("attn2", "attn1")
    said = {
        f"unet.{place}.to_v.weight": "prompt",
        f"{first}.0.self_attn.out_proj.weight": "layer",
        f"unet.{place}.to_q.weight": "step",
        f"unet.{other}.to_v.weight": "step",
        "unet.mid_block.resnets.0.conv1.weight": "step",
    }
    seen: dict[str, list] = {name: [] for name in said}
    handles = []
    for name in said:
        component, _, path = name.removesuffix(".weight").partition(".")
        note = lambda module, args, name=name: seen[name].append(args[0][-1])  # noqa: E731
        module = getattr(either.pipe, component).get_submodule(path)
        handles.append(module.register_forward_pre_hook(note))
    states = either.encode(["a house", ""])
    either.call(states[[0, 0]], states[1:], [0, 1], steps=2, guidance=7.5)
    for handle in handles:
        handle.remove()
    assert either.reads("vae.decoder.conv_in.weight") == "step"
    for name, reads in said.items():
        assert either.reads(name) == reads
        if reads == "prompt":  # the text as encoded, at every step
            assert all(torch.equal(x, states.embeds[0]) for x in seen[name])
        elif reads == "step":
            assert (seen[name][0] - seen[name][-1]).abs().max() > 0
        else:  # known when the prompts are encoded, and not run again
            assert len(seen[name]) == 1


def test_the_word_tables_are_those_that_the_encoders_read(either):
    assert list(either.embeddings) == [path.partition(".")[0] for path in either.text_encoders]
    ids = either.tokenize(["a house"])
    for name, table in either.embeddings.items():
        seen = []
        handle = table.register_forward_hook(lambda module, args, out, s=seen: s.append(args[0]))
        getattr(either.pipe, name)(ids)
        handle.remove()
        assert torch.equal(seen[0], ids)


def test_joined_states_are_those_of_all_prompts_at_once(either):
    prompts = ["a house", "a red tree", "a dog"]
    joined = TextStates.joined([either.encode(prompts[:1]), either.encode(prompts[1:])])
    whole = either.encode(prompts)
    for x, y in zip(joined._fields(), whole._fields(), strict=True):
        assert (x is None and y is None) or torch.allclose(x, y, atol=1e-5)
    with pytest.raises(ValueError, match="at least one"):
        TextStates.joined([])
    bare = TextStates(
        whole.embeds, whole.tokens, pooled=None if either.pooled else torch.ones(3, 2)
    )
    with pytest.raises(ValueError, match="no pooled"):
        TextStates.joined([bare, whole])


def test_every_family_says_what_it_is(either):
    assert type(either) in FAMILIES and either.refuses == {}
    assert either.denoiser is either.pipe.components[either.component]
    assert either.device == torch.device("cpu") and either.dtype == torch.float32
    assert either.name in repr(either)


def test_whole_numbers_of_numpy_are_layers_and_true_is_none(either):
    wanted = either.text_projections(1)
    assert either.text_projections(np.int64(1)) == wanted and wanted[0].endswith("1.self_attn." + (
        "out_proj.weight"
    ))  # fmt: skip
    for layer in (True, 1.0, -1, 99, "0"):
        with pytest.raises(ValueError, match="choose from 0 to"):
            either.text_projections(layer)


# --- pipelines that were changed ----------------------------------------------------------------


def learned(pipe, token: str, vectors: int) -> None:
    """Load a textual inversion of several vectors into every text encoder."""
    for end in ("", "_2"):
        encoder = getattr(pipe, "text_encoder" + end, None)
        if encoder is not None:
            given = torch.Generator().manual_seed(7)
            table = torch.randn(vectors, encoder.config.hidden_size, generator=given)
            tokenizer = getattr(pipe, "tokenizer" + end)
            pipe.load_textual_inversion(
                {token: table}, token=token, text_encoder=encoder, tokenizer=tokenizer
            )


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
@pytest.mark.parametrize("vectors", [1, 3])
def test_a_textual_inversion_has_as_many_tokens_as_vectors(build, vectors):
    pipe = build()
    learned(pipe, "<mira>", vectors)
    model, prompt = family_of(pipe), "a house by <mira> with a tree"
    first, last = model.subject_span(prompt, "<mira>")
    assert (first, last) == (4, 3 + vectors)
    (ids,) = model.tokenize([prompt])
    said = pipe.tokenizer.convert_ids_to_tokens(ids[first : last + 1].tolist())
    assert said == ["<mira>", "<mira>_1", "<mira>_2"][:vectors]
    assert model.subject_span(prompt, "tree") == (last + 3, last + 3)
    edit = loco.locoedit(pipe, loco.Concept("<mira>", "style", [prompt], ["a house"]), layers=[3])
    wanted = model.encode([prompt]).embeds[0, last]
    layer = model.text_layers[3]
    with edit.applied(pipe):  # that token reads as the twin's
        now = model.kv(layer)["to_v"](wanted)
    then = model.kv(layer)["to_v"](model.encode(["a house"]).embeds[0, 2])
    assert (now - then).norm() < 0.1 * then.norm()


def with_ip_adapter(pipe):
    """Load a random IP-Adapter by the loader of diffusers."""
    unet, width = pipe.unet, pipe.unet.config.cross_attention_dim
    names = [n for n in unet.attn_processors if n.endswith("attn2.processor")]
    keys = {}
    for number, name in enumerate(names):
        out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for which in ("k", "v"):
            keys[f"{2 * number + 1}.to_{which}_ip.weight"] = torch.randn(out, width)
    image = {
        "proj.weight": torch.randn(4 * width, 16), "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": keys}])
    return pipe


def test_an_ip_adapter_leaves_layers_sites_and_edits_and_its_pictures_are_refused_by_name():
    plain, model = family_of(build_tiny_sd()), family_of(with_ip_adapter(build_tiny_sd()))
    assert model.text_layers == plain.text_layers and model.sites == plain.sites
    layer = model.text_layers[8]
    assert model.kv(layer).keys() == {"to_k", "to_v"}
    concept = loco.Concept("Van Gogh", "style", ["a house by Van Gogh"], ["a house"])
    edits = [loco.locoedit(each.pipe, concept, layers=[8]) for each in (model, plain)]
    assert edits[0].changes == edits[1].changes
    states = model.encode(["a house", ""])
    with pytest.raises(ValueError, match=r"IP-Adapter is loaded.*pipe.unload_ip_adapter\(\)"):
        model.call(states[:1], states[1:], [0], steps=1, guidance=7.5)
    model.pipe.unload_ip_adapter()
    images = [m.call(states[:1], states[1:], [0], steps=2, guidance=7.5) for m in (model, plain)]
    assert torch.equal(*images)
