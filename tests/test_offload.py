"""Pipelines whose weights wait elsewhere (accelerate's offload) are read and run as they are."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import build_tiny_sd, build_tiny_sdxl
from torch import nn

import loco_core as loco
from loco_core.families import family_of, values

BUILD = {"SD": build_tiny_sd, "SD-XL": build_tiny_sdxl}
PROMPTS = ["a house by Van Gogh", "a red tree"]
GOGH = loco.Concept("Van Gogh", "style", PROMPTS[:1], ["a house"])


def networks(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def sequential(pipe):
    """As `enable_sequential_cpu_offload`, computing on the CPU: all weights are on "meta"."""
    for network in networks(pipe).values():
        cpu_offload(network, "cpu", offload_buffers=len(network._parameters) > 0)
    assert all(p.device.type == "meta" for p in pipe.unet.parameters())
    return pipe


def by_network(pipe):
    """As `enable_model_cpu_offload`, computing on the CPU: networks come and go as a whole."""
    hook = None
    for network in networks(pipe).values():
        _, hook = cpu_offload_with_hook(network, "cpu", prev_module_hook=hook)
    return pipe


OFFLOAD = {"sequential": sequential, "by network": by_network}


@pytest.fixture(params=OFFLOAD.values(), ids=OFFLOAD.keys())
def offload(request):
    return request.param


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
def test_an_offloaded_pipeline_answers_as_it_did(build, offload):
    plain = family_of(build())
    away = family_of(offload(build()))
    assert away.device == torch.device("cpu") and away.dtype == plain.dtype
    assert away.text_layers == plain.text_layers and away.sites == plain.sites
    texts, wanted = away.encode([*PROMPTS, ""]), plain.encode([*PROMPTS, ""])
    assert torch.equal(texts.embeds, wanted.embeds) and texts.embeds.device.type == "cpu"
    layer = away.text_layers[3]
    assert {k: m.weight.shape for k, m in away.kv(layer).items()} == {
        k: m.weight.shape for k, m in plain.kv(layer).items()
    }
    run = dict(steps=2, guidance=7.5)
    images = [m.call(wanted[:2], wanted[2:], [3, 5], **run) for m in (away, plain)]
    assert torch.equal(*images)
    last = len(away.text_layers)
    routed = dict(seeds=[0], steps=2, routes=[[1] * last, [0] * last])
    pictures = [loco.generate(m.pipe, PROMPTS, **routed) for m in (away, plain)]
    assert torch.equal(*pictures)


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
def test_values_are_those_of_the_weights_wherever_they_wait(build, offload):
    plain, away = build(), offload(build())
    for name, network in networks(plain).items():
        wanted, found = dict(values(network)), dict(values(networks(away)[name]))
        assert wanted.keys() == found.keys() == {
            *dict(network.named_parameters()), *dict(network.named_buffers())
        }  # fmt: skip
        assert all(torch.equal(found[x], wanted[x]) for x in wanted)


def test_an_edit_of_weights_that_are_not_there_is_refused_before_anything_is_computed():
    pipe, encoded = sequential(build_tiny_sd()), []
    pipe.text_encoder.register_forward_pre_hook(lambda module, args: encoded.append(args))
    for edit in (loco.locoedit, loco.uce):
        with pytest.raises(ValueError, match="to_k.weight is offloaded: load the pipeline without"):
            edit(pipe, GOGH, **({"layers": [8]} if edit is loco.locoedit else {}))
    with pytest.raises(ValueError, match="out_proj.weight is offloaded"):
        loco.diff_quickfix(pipe, GOGH)
    assert not encoded


def test_an_edit_reaches_the_weights_of_networks_that_come_and_go():
    pictures = []
    for pipe in (build_tiny_sd(), by_network(build_tiny_sd())):
        with loco.locoedit(pipe, GOGH, layers=[8]).applied(pipe):
            pictures.append(loco.generate(pipe, PROMPTS, steps=2))
    assert torch.equal(*pictures)


def test_attributions_of_networks_that_come_and_go_are_the_same():
    plain = build_tiny_sd()
    wanted = loco.attribute(plain, GOGH, steps=2, keep="all")
    away = by_network(build_tiny_sd())
    found = loco.attribute(away, GOGH, steps=2, keep="all")
    assert found == wanted
    seen = [loco.inside.fidelity(pipe, wanted, 4, share=0.01) for pipe in (plain, away)]
    assert torch.equal(seen[0].true, seen[1].true)
    assert loco.attribute(away, GOGH, steps=2, keep="all") == wanted  # nothing was left knocked out


def test_attributions_of_weights_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="is offloaded: load the pipeline without"):
        loco.attribute(sequential(build_tiny_sd()), GOGH, steps=2)
