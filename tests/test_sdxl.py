"""Stable Diffusion XL: two encoders, a pooled embedding beside the layers, blocks in a row."""

import dataclasses

import pytest
import torch
from conftest import build_tiny_sdxl, clip_tokenizer
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

import loco_core as loco
from loco_core.closed_form.keys import rows_of
from loco_core.closed_form.recipe import recipes_of
from loco_core.edits.weights import linear_of
from loco_core.families import family_of
from loco_core.interventions.routing import windows

PROMPT, NEUTRAL = "a house by Van Gogh", "a house"
STYLE = loco.Concept("Van Gogh", "style", [PROMPT], [NEUTRAL])
LAYERS = 18
FAST = dict(seeds=[0], steps=2)
BYTE = 0.5 / 255 + 1e-4  # generate() rounds to the 8-bit grid
STEP = 1.1 / 255  # of that grid


@pytest.fixture(scope="module")
def model(tiny_sdxl):
    return family_of(tiny_sdxl)


def by_hand(pipe, prompt, steps=2, guidance=7.5, **kwargs):
    """The pipeline called for one image, with the noise that seed 0 stands for."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe(
        prompt, latents=latents, num_inference_steps=steps, guidance_scale=guidance,
        output_type="pt", **kwargs,
    ).images[0]  # fmt: skip


def apart(a, b):
    return float((a - b).detach().abs().max())


def unlike(pipe, prompts, **run):
    """A score: how far an image is from the nearest of the pipeline's own images of `prompts`."""
    same = loco.generate(pipe, prompts, **FAST | run).flatten(0, 1)

    def score(images, texts):
        return (images[:, None] - same).abs().mean((2, 3, 4)).amin(1)

    return score


# --- what the pipeline is ---------------------------------------------------------------------


def test_text_layers_are_numbered_as_a_slow_trace_of_the_real_network_finds_them(tiny_sdxl):
    seen, handles = [], []
    for name, module in tiny_sdxl.unet.named_modules():
        if name.endswith("attn2.to_k"):
            note = lambda module, args, out, name=name: seen.append(name)  # noqa: E731
            handles.append(module.register_forward_hook(note))
    try:
        tiny_sdxl(NEUTRAL, num_inference_steps=1, output_type="latent")
    finally:
        for handle in handles:
            handle.remove()
    layers = loco.text_layers(tiny_sdxl)
    assert [f"{layer.name}.to_k" for layer in layers] == seen
    assert len(layers) == LAYERS and {layer.width for layer in layers} == {32 + 48}


def test_the_published_sdxl_has_70_layers_and_runs_up_blocks_after_the_mid_block():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
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
        )  # the published config: the other values are the class's defaults
    nothing = dict.fromkeys(
        ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
    )
    layers = loco.text_layers(StableDiffusionXLPipeline(unet=unet, **nothing))
    places = [layer.name.split(".attentions")[0] for layer in layers]
    spans = {"down_blocks.1": 4, "down_blocks.2": 20, "mid_block": 10, "up_blocks.0": 30}
    spans["up_blocks.1"] = 6
    assert places == [place for place, count in spans.items() for _ in range(count)]
    assert len(layers) == 70 and {layer.width for layer in layers} == {768 + 1280}
    assert [layer.name.rsplit(".", 2)[-2] for layer in layers[24:34]] == list("0123456789")
    assert len({layer.name for layer in layers}) == 70


def test_a_subclass_is_known_and_both_encoders_are_named(tiny_sdxl):
    class Mine(StableDiffusionXLPipeline):
        pass

    mine = Mine(**tiny_sdxl.components, add_watermarker=False)
    assert family_of(mine).name == "stable-diffusion-xl"
    encoders = family_of(mine).text_encoders
    flat, nested = tiny_sdxl.text_encoder.encoder, tiny_sdxl.text_encoder_2.text_model.encoder
    assert encoders == {
        "text_encoder.encoder.layers": flat.layers,
        "text_encoder_2.text_model.encoder.layers": nested.layers,
    }


def test_a_saved_pipeline_loads_with_the_same_layers_texts_and_images(tiny_sdxl, tmp_path):
    tiny_sdxl.save_pretrained(tmp_path)
    again = loco.load(tmp_path)
    assert type(again) is StableDiffusionXLPipeline
    assert loco.text_layers(again) == loco.text_layers(tiny_sdxl)
    ours, theirs = (family_of(pipe).encode([PROMPT]) for pipe in (tiny_sdxl, again))
    # a CPU may round a product by where in memory the weights lie, which loading moves
    assert torch.allclose(ours.embeds, theirs.embeds, atol=1e-5)
    assert torch.allclose(ours.pooled, theirs.pooled, atol=1e-5)
    images = [loco.generate(pipe, [PROMPT], **FAST) for pipe in (tiny_sdxl, again)]
    assert torch.allclose(*images, atol=1e-4)


# --- what it reads ----------------------------------------------------------------------------


def test_a_prompt_is_both_encoders_penultimate_states_and_the_seconds_pooled_one(tiny_sdxl, model):
    prompts = [PROMPT, "a red tree", ""]
    states = model.encode(prompts)
    with torch.no_grad():
        read = [
            encoder(tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids,
                    output_hidden_states=True)
            for encoder, tokenizer in (
                (tiny_sdxl.text_encoder, tiny_sdxl.tokenizer),
                (tiny_sdxl.text_encoder_2, tiny_sdxl.tokenizer_2),
            )
        ]  # fmt: skip
    assert torch.allclose(states.embeds[..., :32], read[0].hidden_states[-2], atol=1e-6)
    assert torch.allclose(states.embeds[..., 32:], read[1].hidden_states[-2], atol=1e-6)
    assert torch.allclose(states.pooled, read[1].text_embeds, atol=1e-6)
    assert states.tokens.shape == states.embeds.shape[:2] and states.mask is None
    assert torch.equal(states[[2]].pooled, states.pooled[2:])


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "no zeros"])
@pytest.mark.parametrize("negative", [None, "", "a dog"], ids=["none", "empty", "words"])
def test_images_are_those_of_the_pipeline_called_in_the_same_way(zeros, negative):
    pipe = build_tiny_sdxl(zeros=zeros)
    images = loco.generate(pipe, [PROMPT, NEUTRAL], negative_prompt=negative, **FAST)
    for image, prompt in zip(images[:, 0], [PROMPT, NEUTRAL], strict=True):
        assert apart(image, by_hand(pipe, prompt, negative_prompt=negative)) <= BYTE


def test_no_negative_prompt_is_another_call_than_an_empty_one(tiny_sdxl):
    ours = [loco.generate(tiny_sdxl, [PROMPT], negative_prompt=n, **FAST) for n in (None, "")]
    assert apart(*ours) > 1e-2


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_images_without_guidance_are_those_of_the_pipeline(tiny_sdxl, guidance):
    image = loco.generate(tiny_sdxl, [PROMPT], guidance=guidance, **FAST)[0, 0]
    assert apart(image, by_hand(tiny_sdxl, PROMPT, guidance=guidance)) <= BYTE


# --- routing and the pooled text --------------------------------------------------------------


def both(pipe, layers, pooled):
    """The pipeline's image of PROMPT or NEUTRAL for the layers and for the pooled text."""
    states = {p: family_of(pipe).encode([p]) for p in (layers, pooled)}
    return by_hand(
        pipe, None, prompt_embeds=states[layers].embeds, pooled_prompt_embeds=states[pooled].pooled
    )


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("pooled", [None, 1], ids=["keep", "swap"])
def test_a_routed_batch_equals_one_window_at_a_time(tiny_sdxl, guidance, pooled):
    src = torch.cat([torch.zeros(1, LAYERS), torch.ones(1, LAYERS), windows(LAYERS, 3)[::3]]).long()
    run = dict(sources=[PROMPT, NEUTRAL], guidance=guidance, **FAST)
    swap = None if pooled is None else src.amax(1)
    whole = loco.generate(
        tiny_sdxl, [PROMPT] * len(src), routes=src, pooled_routes=swap, batch_size=len(src), **run
    )
    single = [
        loco.generate(
            tiny_sdxl, [PROMPT], routes=row[None], batch_size=1,
            pooled_routes=None if pooled is None else row.amax()[None], **run,
        )[0]
        for row in src
    ]  # fmt: skip
    assert apart(whole, torch.stack(single)) <= STEP
    assert (whole[2:] - whole[0]).abs().amax((1, 2, 3, 4)).min() > 1e-4


def test_layers_and_pooled_text_are_routed_apart(tiny_sdxl):
    """Against the pipeline itself, handed the embeddings of one prompt, the pooled of another."""
    run = dict(sources=[PROMPT, NEUTRAL], **FAST)
    for layers, pooled in ((0, 0), (0, 1), (1, 0), (1, 1)):
        routes, texts = [[layers] * LAYERS], [PROMPT, NEUTRAL]
        image = loco.generate(tiny_sdxl, [PROMPT], routes=routes, pooled_routes=[pooled], **run)
        assert apart(image[0, 0], both(tiny_sdxl, texts[layers], texts[pooled])) <= BYTE
    kept = loco.generate(tiny_sdxl, [PROMPT], routes=[[1] * LAYERS], **run)[0, 0]
    assert apart(kept, both(tiny_sdxl, NEUTRAL, PROMPT)) <= BYTE
    assert apart(kept, both(tiny_sdxl, NEUTRAL, NEUTRAL)) > 1e-2  # the pooled text matters here


@pytest.mark.parametrize("pooled", ["keep", "swap"])
def test_a_sweep_keeps_or_swaps_the_pooled_text_of_rows_that_read_the_neutral_one(
    tiny_sdxl, pooled
):
    score = unlike(tiny_sdxl, [NEUTRAL])
    found = loco.localize(tiny_sdxl, STYLE, window=6, pooled=pooled, score=score, **FAST)
    beside = PROMPT if pooled == "keep" else NEUTRAL
    grid = 1e-4 + 0.5 / 255
    assert apart(found.baseline.images[0, 0], both(tiny_sdxl, PROMPT, PROMPT)) <= grid
    assert apart(found.neutral.images[0, 0], both(tiny_sdxl, NEUTRAL, beside)) <= grid
    window = loco.generate(
        tiny_sdxl, [PROMPT], routes=windows(LAYERS, 6).long()[4:5], sources=[PROMPT, NEUTRAL],
        pooled_routes=[int(pooled == "swap")], **FAST,
    )  # fmt: skip
    assert apart(found.images[4], window) <= grid
    assert found.provenance.settings["pooled"] == pooled
    assert (float(found.neutral.scores) < 1 / 255) == (pooled == "swap")
    assert "keep" == loco.localize(
        tiny_sdxl, STYLE, LAYERS, score=score, **FAST
    ).provenance.settings["pooled"]  # fmt: skip


def test_a_sweep_finds_the_block_that_listens():
    pipe = build_tiny_sdxl()
    for layer in loco.text_layers(pipe):
        loudness = 10 if layer.index in (9, 10) else 0
        pipe.unet.get_submodule(layer.name).to_out[0].weight.data *= loudness
    run = dict(seeds=range(6), steps=2)
    score = unlike(pipe, [NEUTRAL], **run)
    found = loco.localize(pipe, STYLE, 2, pooled="swap", score=score, **run)
    assert found.layers == (9, 10) and found.test.verdict == "found"


def test_a_folder_of_kept_pooled_text_is_not_taken_for_swapped(tiny_sdxl, tmp_path):
    run = dict(sources=[PROMPT, NEUTRAL], folder=tmp_path, **FAST)
    first = loco.generate(tiny_sdxl, [PROMPT], pooled_routes=[0], **run)
    assert torch.equal(loco.generate(tiny_sdxl, [PROMPT], pooled_routes=[0], **run), first)
    swapped = loco.generate(tiny_sdxl, [PROMPT], pooled_routes=[1], **run)
    assert torch.equal(swapped, loco.generate(
        tiny_sdxl, [PROMPT], pooled_routes=[1], sources=[PROMPT, NEUTRAL], **FAST
    )) and apart(swapped, first) > 1e-2  # fmt: skip


def test_an_unknown_pooled_is_refused_and_swapping_where_there_is_none(tiny_sdxl, tiny_sd):
    run = dict(score=lambda images, texts: torch.zeros(len(images)), **FAST)
    for pipe in (tiny_sdxl, tiny_sd):
        with pytest.raises(ValueError, match='pooled=\'zero\': choose "keep" or "swap"'):
            loco.localize(pipe, STYLE, 2, pooled="zero", **run)
    with pytest.raises(ValueError, match='"swap": stable-diffusion has no pooled text.*"keep"'):
        loco.localize(tiny_sd, STYLE, 2, pooled="swap", **run)
    with pytest.raises(ValueError, match="stable-diffusion has no pooled text"):
        loco.generate(tiny_sd, [PROMPT], pooled_routes=[0], **FAST)


BAD_POOLED = {
    "too many": ([0, 0], "for 1 prompts"),
    "a matrix": ([[0]], "for 1 prompts"),
    "not whole": ([0.5], "whole numbers"),
    "no such source": ([2], "sources 2 to 2, but there are 0 to 1"),
    "below zero": ([-1], "sources -1 to -1"),
}


@pytest.mark.parametrize("routes, reason", BAD_POOLED.values(), ids=BAD_POOLED.keys())
def test_pooled_routes_that_do_not_fit_are_refused(tiny_sdxl, routes, reason):
    with pytest.raises(ValueError, match=reason):
        loco.generate(tiny_sdxl, [PROMPT], pooled_routes=routes, sources=[PROMPT, NEUTRAL], **FAST)


# --- edits ------------------------------------------------------------------------------------


def changed(pipe, edit):
    """Names of the weights that differ under `edit`, over the whole pipeline."""
    parts = ("unet", "text_encoder", "text_encoder_2", "vae")

    def state():
        return {
            f"{part}.{name}": x.clone()
            for part in parts
            for name, x in getattr(pipe, part).state_dict().items()
        }

    before = state()
    with edit.applied(pipe):
        during = state()
    assert all(torch.equal(x, before[name]) for name, x in state().items())
    return {name for name, x in during.items() if not torch.equal(x, before[name])}


def test_locoedit_changes_the_chosen_layers_and_nothing_else():
    pipe = build_tiny_sdxl()
    edit = loco.locoedit(pipe, STYLE, layers=[4, 9])
    layers = loco.text_layers(pipe)
    assert changed(pipe, edit) == {
        f"unet.{layers[i].name}.{kind}.weight" for i in (4, 9) for kind in ("to_k", "to_v")
    }


def test_an_edited_layer_reads_the_subject_as_the_twin_in_both_halves_of_the_text():
    pipe = build_tiny_sdxl()
    model = family_of(pipe)
    first, last = model.subject_span(PROMPT, "Van Gogh")
    states = model.encode([PROMPT, NEUTRAL])
    value = model.kv(loco.text_layers(pipe)[4])["to_v"]
    wanted = value(states.embeds[1, 2])  # "house", in front of the twin's end
    assert apart(value(states.embeds[0, last]), wanted) > 1e-2
    with loco.locoedit(pipe, STYLE, [4], lam=1e-6, tokens="last").applied(pipe):
        assert apart(value(states.embeds[0, last]), wanted) < 1e-3


def test_uce_changes_keys_and_values_of_all_layers():
    pipe = build_tiny_sdxl()
    edit = loco.uce(pipe, STYLE, preserve=["a red tree"])
    assert len(changed(pipe, edit)) == 2 * LAYERS


def test_quickfix_edits_both_encoders_each_with_keys_of_its_own_width(tmp_path):
    pipe = build_tiny_sdxl()
    edit = loco.diff_quickfix(pipe, STYLE)
    names = {
        "text_encoder.encoder.layers.0.self_attn.out_proj.weight": 32,
        "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj.weight": 48,
    }
    assert changed(pipe, edit) == set(names)
    assert {name: change.width for name, change in edit.changes.items()} == names
    for name, width in names.items():
        seen = []  # recorded here by another way: of the encoder alone, called by hand
        module, part = linear_of(pipe, name), name.partition(".")[0]
        handle = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        tokenizer = getattr(pipe, part.replace("text_encoder", "tokenizer"))
        with torch.no_grad():
            getattr(pipe, part)(tokenizer([PROMPT], return_tensors="pt").input_ids)
        handle.remove()
        rows = rows_of(family_of(pipe), recipes_of(edit)[0], name)
        assert rows.keys.shape == (1, width)
        assert torch.allclose(rows.keys[0], seen[0][0, 5], atol=1e-6)  # "gogh"
    edit.save(tmp_path / "edit")
    assert loco.Edit.load(tmp_path / "edit") == edit
    before = family_of(pipe).encode([PROMPT])
    with edit.applied(pipe):
        after = family_of(pipe).encode([PROMPT])
    assert apart(before.embeds[..., :32], after.embeds[..., :32]) > 1e-2
    assert apart(before.embeds[..., 32:], after.embeds[..., 32:]) > 1e-2
    assert apart(before.pooled, after.pooled) > 1e-2


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["text_encoder_2", "tokenizer_2", "text_encoder"])
def test_a_pipeline_with_one_encoder_is_refused(tiny_sdxl, component):
    which = "second" if component.endswith("2") else "first"
    single = StableDiffusionXLPipeline(
        **tiny_sdxl.components | {component: None}, add_watermarker=False
    )
    reason = rf"a pipeline without its {which} encoder .*{component} .* is None"
    run = dict(score=lambda images, texts: torch.zeros(len(images)), **FAST)
    for call in (
        lambda: loco.generate(single, [PROMPT], **FAST),
        lambda: loco.localize(single, STYLE, 2, **run),
        lambda: loco.locoedit(single, STYLE, [3]),
        lambda: loco.diff_quickfix(single, STYLE),
    ):
        with pytest.raises(ValueError, match=reason):
            call()


def test_a_subject_behind_the_77th_token_is_refused():
    pipe = build_tiny_sdxl(tokens=77)
    far = dataclasses.replace(STYLE, prompts=("a " * 80 + "house by Van Gogh",))
    run = dict(score=lambda images, texts: torch.zeros(len(images)), **FAST)
    reason = "'Van Gogh' is cut off.*reads tokens 0 to 75; shorten the prompt"
    with pytest.raises(ValueError, match=reason):
        loco.localize(pipe, far, 2, **run)
    with pytest.raises(ValueError, match=reason):
        loco.locoedit(pipe, far, [3])


def test_tokenizers_that_split_a_prompt_differently_are_refused():
    pipe = build_tiny_sdxl()
    pipe.tokenizer_2 = clip_tokenizer()
    model = family_of(pipe)
    assert model.subject_span(PROMPT, "Van Gogh") == (4, 5)
    pipe.tokenizer_2.add_tokens("gogh")
    pipe.tokenizer_2.add_tokens("van gogh")
    with pytest.raises(ValueError, match="into 7 and 6 tokens, so 'Van Gogh' has no one place"):
        model.subject_span(PROMPT, "Van Gogh")
