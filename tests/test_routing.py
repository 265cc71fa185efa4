"""Routing text to layers: exact, and gone afterwards."""

import pytest
import torch
from conftest import build_tiny_sd

import loco_core as loco
from loco_core.families import TextStates, family_of
from loco_core.interventions.active import foreign_hooks, said
from loco_core.interventions.routing import routed, windows
from loco_core.painting import Store

PROMPTS = ["a house by Van Gogh", "a house", "a red tree"]


@pytest.fixture(scope="module")
def texts(tiny_sd):
    return family_of(tiny_sd).encode(PROMPTS)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def noise(pipe, latents, embeds, **kwargs):
    with torch.no_grad():
        return pipe.unet(latents, 500, encoder_hidden_states=embeds, **kwargs).sample


def hooks(module):
    return {
        name: list(part._forward_pre_hooks.items()) + list(part._forward_hooks.items())
        for name, part in module.named_modules()
    }


def slow(pipe, latents, texts, src):
    """One row at a time: each cross-attention is replaced by one that is handed its text."""
    rows = []
    for latent, sources in zip(latents, src.tolist(), strict=True):
        forwards = []
        for layer, source in zip(loco.text_layers(pipe), sources, strict=True):
            module = pipe.unet.get_submodule(layer.name)
            own = module.forward
            forwards.append((module, own))

            def swapped(x, encoder_hidden_states=None, own=own, source=source, **kwargs):
                return own(x, encoder_hidden_states=texts.embeds[source : source + 1], **kwargs)

            module.forward = swapped
        rows.append(noise(pipe, latent[None], texts.embeds[sources[0]][None]))
        for module, _ in forwards:
            del module.forward
    return torch.cat(rows)


def test_each_row_reads_at_each_layer_the_text_its_source_map_names(tiny_sd, texts, latents):
    src = torch.randint(3, (4, 16), generator=torch.Generator().manual_seed(1))
    with routed(tiny_sd, texts, src):
        batched = noise(tiny_sd, latents, texts.embeds[:1].expand(4, -1, -1))
    one_by_one = slow(tiny_sd, latents, texts, src)
    assert (batched - one_by_one).abs().max() <= 1e-4
    assert (batched - noise(tiny_sd, latents, texts.embeds[src[:, 0]])).abs().max() > 1e-2


def test_in_float64_the_batch_is_exact(latents):
    pipe = build_tiny_sd().to(torch.float64)
    texts = family_of(pipe).encode(PROMPTS)
    src = windows(16, 2).long()[:4]
    with routed(pipe, texts, src):
        batched = noise(pipe, latents.double(), texts.embeds[[0] * 4])
    assert (batched - slow(pipe, latents.double(), texts, src)).abs().max() <= 1e-12


def test_rows_that_are_not_named_read_what_they_did(tiny_sd, texts, latents):
    embeds = texts.embeds[[1, 1, 0, 0]]  # [negative, negative, positive, positive]
    src = torch.full((2, 16), 2)
    with routed(tiny_sd, texts, src, rows=torch.tensor([2, 3])):
        found = noise(tiny_sd, latents, embeds)
    assert torch.allclose(found[:2], noise(tiny_sd, latents, embeds)[:2], atol=1e-6)
    assert torch.allclose(found, noise(tiny_sd, latents, texts.embeds[[1, 1, 2, 2]]), atol=1e-5)


def test_the_attention_mask_travels_with_the_text(tiny_sd, texts, latents):
    mask = torch.ones(3, texts.embeds.shape[1])
    mask[1, 4:] = 0
    mask[2, 9:] = 0
    masked = TextStates(texts.embeds, texts.tokens, mask)
    with routed(tiny_sd, masked, torch.tensor([[1] * 16, [2] * 16])):
        found = noise(
            tiny_sd, latents[:2], texts.embeds[[0, 0]], encoder_attention_mask=mask[[0, 0]]
        )
    wanted = noise(tiny_sd, latents[:2], texts.embeds[[1, 2]], encoder_attention_mask=mask[[1, 2]])
    assert torch.allclose(found, wanted, atol=1e-5)
    with routed(tiny_sd, texts, torch.tensor([[1] * 16, [2] * 16])):  # these texts have no mask
        found = noise(
            tiny_sd, latents[:2], texts.embeds[[0, 0]], encoder_attention_mask=mask[[1, 1]]
        )
    assert torch.allclose(found, noise(tiny_sd, latents[:2], texts.embeds[[1, 2]]), atol=1e-5)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_hooks_go_and_others_stay_and_weights_are_untouched(texts, latents, error):
    pipe = build_tiny_sd()
    layer = pipe.unet.get_submodule(loco.text_layers(pipe)[6].name)
    calls = []
    layer.register_forward_pre_hook(lambda *args: calls.append(1))
    before, weights = hooks(pipe.unet), {k: v.clone() for k, v in pipe.unet.state_dict().items()}

    def interrupted(*args):
        if error is not None:
            raise error("in the middle")

    handle = pipe.unet.mid_block.register_forward_hook(interrupted)
    try:
        with routed(pipe, texts, torch.zeros(4, 16, dtype=torch.long)):
            noise(pipe, latents, texts.embeds[[0] * 4])
    except BaseException as caught:
        assert type(caught) is error
    handle.remove()
    assert hooks(pipe.unet) == before and calls
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())


def test_routing_survives_another_attention_processor(tiny_sd, texts, latents):
    from diffusers.models.attention_processor import AttnProcessor

    pipe = build_tiny_sd()
    pipe.unet.set_attn_processor(AttnProcessor())
    src = windows(16, 3).long()[5:9]
    found = []
    for each in (pipe, tiny_sd):
        with routed(each, texts, src):
            found.append(noise(each, latents, texts.embeds[[0] * 4]))
    assert torch.allclose(*found, atol=1e-5)


def test_a_compiled_denoiser_is_refused(texts):
    pipe = build_tiny_sd()
    pipe.unet.mid_block.compile()
    with pytest.raises(ValueError, match=r"compiled \(mid_block\) and would ignore the hooks"):
        with routed(pipe, texts, [[0] * 16]):
            pass
    pipe = build_tiny_sd()
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(ValueError, match="compiled"):
        with routed(pipe, texts, [[0] * 16]):
            pass


def test_fused_projections_are_refused_and_no_hook_stays(texts):
    pipe = build_tiny_sd()
    pipe.fuse_qkv_projections(vae=False)
    before = hooks(pipe.unet)
    with pytest.raises(ValueError, match="fused projections"):
        with routed(pipe, texts, [[0] * 16]):
            pass
    assert hooks(pipe.unet) == before


def test_a_routed_denoiser_says_what_each_layer_reads(tiny_sd, texts):
    src = torch.randint(3, (2, 16), generator=torch.Generator().manual_seed(2))
    assert said(tiny_sd.unet) == []
    with routed(tiny_sd, texts, src, rows=torch.tensor([2, 3])):
        told = dict(said(tiny_sd.unet))
        assert foreign_hooks(tiny_sd.unet) == []
    for layer in loco.text_layers(tiny_sd):
        assert told[layer.name]["reads"] == src[:, layer.index].tolist()
        assert told[layer.name]["rows"] == [2, 3]
    assert len(told) == 16 and said(tiny_sd.unet) == []
    with routed(tiny_sd, texts[[1, 0, 2]], src, rows=torch.tensor([2, 3])):
        other = dict(said(tiny_sd.unet))
    assert all(other[name] != told[name] for name in told)  # other texts under the same numbers


def test_what_is_painted_while_layers_are_routed_has_a_key_of_its_own(tiny_sd, texts, tmp_path):
    run = dict(prompts=PROMPTS[:1], steps=2, folder=tmp_path)
    plain = loco.generate(tiny_sd, **run)
    rows = torch.tensor([1])  # the conditional half of a batch of one
    with routed(tiny_sd, texts, [[2] * 16], rows):
        other = loco.generate(tiny_sd, **run)
    assert not torch.equal(other, plain)
    assert torch.equal(other, loco.generate(tiny_sd, PROMPTS[2:], steps=2))
    with routed(tiny_sd, texts, [[1] * 16], rows):
        third = loco.generate(tiny_sd, **run)
    assert len({entry.path.stem for entry in Store(tmp_path).entries()}) == 3
    assert torch.equal(loco.generate(tiny_sd, **run), plain)  # read from the store
    with routed(tiny_sd, texts, [[1] * 16], rows):
        assert torch.equal(loco.generate(tiny_sd, **run), third)
    assert len(list(Store(tmp_path).entries())) == 3


BAD_MAPS = {
    "too few layers": ([[0] * 15], "16 layers"),
    "not a matrix": ([0] * 16, "row, layer"),
    "no rows": (torch.zeros(0, 16, dtype=torch.long), "row, layer"),
    "not whole": (torch.zeros(1, 16), "whole numbers"),
    "text too high": ([[3] * 16], "texts 0 to 2"),
    "text below zero": ([[-1] * 16], "texts -1"),
}


@pytest.mark.parametrize("src, reason", BAD_MAPS.values(), ids=BAD_MAPS.keys())
def test_a_source_map_that_does_not_fit_is_refused(tiny_sd, texts, src, reason):
    with pytest.raises(ValueError, match=reason):
        with routed(tiny_sd, texts, src):
            pass


def test_rows_that_do_not_fit_are_refused(tiny_sd, texts, latents):
    src = torch.zeros(2, 16, dtype=torch.long)
    with pytest.raises(ValueError, match="for 2 rows of src"):
        with routed(tiny_sd, texts, src, rows=torch.arange(3)):
            pass
    with pytest.raises(ValueError, match="check rows="):
        with routed(tiny_sd, texts, src, rows=torch.tensor([3, 4])):
            noise(tiny_sd, latents, texts.embeds[[0] * 4])


def test_windows_cover_adjacent_layers():
    assert [row.nonzero().flatten().tolist() for row in windows(4, 2)] == [[0, 1], [1, 2], [2, 3]]
    assert windows(4, 4).tolist() == [[True] * 4]


@pytest.mark.parametrize("size", [0, -1, 17, 2.0, True])
def test_a_window_that_does_not_fit_is_refused(size):
    with pytest.raises(ValueError, match="16 text layers.*1 to 16"):
        windows(16, size)
