"""Neurons are ranked by Welch's t; the first of them are held still, for a while or for good."""

import math

import pytest
import torch
from conftest import build_tiny_sd, embeds, state

import loco_core as loco
from loco_core.inside.neuron_ranking import welch_z
from loco_core.inside.neurons import ablation_curve

GOGH = loco.Concept(
    "van gogh",
    "style",
    [
        "a house in the style of van gogh",
        "a red star by van gogh with a tree",
        "a dog by van gogh",
    ],
    ["a house", "a red star with a tree", "a dog"],
)
OTHERS = GOGH.renamed(["claude monet"])
LAYERS = [8, 9]
# tokens that are read of each prompt and of its twin; BOS is token 0 and every word is one
READ = {
    "last": ([[8], [6], [5]], [[2], [3], [2]]),
    "eos": ([[9], [10], [6]], [[3], [7], [3]]),
    "padding": (
        [range(10, 24), range(11, 24), range(7, 24)],
        [range(4, 24), range(8, 24), range(4, 24)],
    ),
    "all": ([range(1, 10), range(1, 11), range(1, 7)], [range(1, 4), range(1, 8), range(1, 4)]),
}
PROMPTS = [GOGH.prompts[0], "a blue circle"]


@pytest.fixture(scope="module")
def neurons(tiny_sd):
    return loco.rank_neurons(tiny_sd, GOGH, LAYERS)


def images(pipe, **settings) -> torch.Tensor:
    return loco.generate(pipe, PROMPTS, steps=2, **settings)


def slow_z(s: list[float], n: list[float]) -> float:
    """Welch's t in plain Python."""

    def moments(x: list[float]) -> tuple[float, float]:
        mean = math.fsum(x) / len(x)
        return mean, math.fsum((value - mean) ** 2 for value in x) / (len(x) - 1)

    (mu_s, var_s), (mu_n, var_n) = moments(s), moments(n)
    return (mu_s - mu_n) / math.sqrt(var_s / len(s) + var_n / len(n))


@pytest.mark.parametrize("token", READ)
def test_z_is_welchs_t_of_the_activations_at_the_documented_tokens(tiny_sd, token):
    found = loco.rank_neurons(tiny_sd, GOGH, LAYERS, token=token)
    read = [
        torch.stack(
            [embeds(tiny_sd, p)[list(at)].mean(0) for p, at in zip(prompts, spans, strict=True)]
        )
        for prompts, spans in zip((GOGH.prompts, GOGH.neutral), READ[token], strict=True)
    ]
    start = 0
    for name, size in zip(found.weights, found.sizes, strict=True):
        W = tiny_sd.unet.get_parameter(name.removeprefix("unet.")).detach().double()
        for row in range(size):
            s, n = ([float(W[row] @ x) for x in side] for side in read)
            assert float(found.z[start + row]) == pytest.approx(slow_z(s, n), rel=1e-4, abs=1e-4)
            assert float(found.concept_mean[start + row]) == pytest.approx(sum(s) / 3, abs=1e-5)
            assert float(found.neutral_mean[start + row]) == pytest.approx(sum(n) / 3, abs=1e-5)
        start += size
    assert start == len(found) == 4 * 16


def test_groups_of_different_sizes_are_each_weighed_by_their_own():
    torch.manual_seed(0)
    s, n = torch.randn(5, 7).double() + 1, 3 * torch.randn(9, 7).double()
    expected = [slow_z(s[:, i].tolist(), n[:, i].tolist()) for i in range(7)]
    assert welch_z(s, n).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_neuron_that_never_varies_scores_zero_or_first_but_finite():
    s = torch.tensor([[0.0, 0.1, 5.0, 1.0], [0.0, 0.1, 5.0, 2.0], [0.0, 0.1, 5.0, 3.0]])
    n = torch.tensor([[0.0, 0.1, 4.0, 0.0], [0.0, 0.1, 4.0, 1.0]])
    z = welch_z(s, n)
    assert z[0] == 0 and z[1].abs() < 1e-3 and z.isfinite().all()
    assert z.abs().argmax() == 2 and z[2] > 1e9


def test_ranks_go_by_size_over_all_layers_and_ties_by_index(tiny_sd, neurons):
    z = neurons.z.abs().tolist()
    assert neurons.order.tolist() == sorted(range(len(z)), key=lambda i: (-z[i], i))
    pipe = build_tiny_sd()
    with torch.no_grad():
        for name in neurons.weights:
            pipe.unet.get_parameter(name.removeprefix("unet."))[1:] = 0
    tied = loco.rank_neurons(pipe, GOGH, LAYERS).order.tolist()
    assert sorted(tied[:4]) == [0, 16, 32, 48]  # the row left in each weight
    assert tied[4:] == [i for i in range(64) if i % 16]


def test_by_shift_ranks_by_how_far_and_not_by_how_surely(tiny_sd, neurons):
    far = loco.rank_neurons(tiny_sd, GOGH, LAYERS, by="shift")
    shift = (far.concept_mean - far.neutral_mean).abs().tolist()
    assert far.order.tolist() == sorted(range(64), key=lambda i: (-shift[i], i))
    assert torch.equal(far.z, neurons.z) and not torch.equal(far.order, neurons.order)


def test_the_table_names_every_neuron(tiny_sd):
    frame = loco.rank_neurons(tiny_sd, GOGH, LAYERS, token="eos").to_frame()
    assert len(frame) == 64 and set(frame["layer"]) == {8, 9}
    assert frame["z"].abs().is_monotonic_decreasing
    best = frame.iloc[0]
    layer = loco.text_layers(tiny_sd)[best["layer"]]
    W = tiny_sd.unet.get_parameter(f"{layer.name}.{best['projection']}.weight").detach().double()
    states = torch.stack(
        [embeds(tiny_sd, p)[i] for p, i in zip(GOGH.prompts, (9, 10, 6), strict=True)]
    )
    assert float((states @ W[best["neuron"]]).mean()) == pytest.approx(best["concept"], abs=1e-5)


def test_layers_and_projections_can_be_chosen(tiny_sd):
    found = loco.rank_neurons(tiny_sd, GOGH, [9, 3], ["to_v"])
    assert found.layers == (3, 9) and all(name.endswith("to_v.weight") for name in found.weights)
    assert found.provenance.settings["where"] == ["to_v"]


def test_other_prompts_can_stand_for_neutral(tiny_sd):
    found = loco.rank_neurons(tiny_sd, GOGH, LAYERS, token="last", neutral=OTHERS)
    W = tiny_sd.unet.get_parameter(found.weights[0].removeprefix("unet.")).detach().double()
    monet = torch.stack([embeds(tiny_sd, p)[i] for p, i in zip(OTHERS, (8, 6, 5), strict=True)])
    assert torch.allclose(found.neutral_mean[:16], (monet @ W.T).mean(0), atol=1e-5)
    assert found.provenance.settings["neutral"] == list(OTHERS)


def test_no_neuron_ablated_changes_not_a_bit(tiny_sd, neurons):
    before = images(tiny_sd)
    with neurons.ablated(tiny_sd, top=0):
        assert torch.equal(images(tiny_sd), before)


def test_all_neurons_at_zero_is_a_model_with_zero_weights(tiny_sd, neurons):
    pipe = build_tiny_sd()
    with torch.no_grad():
        for name in neurons.weights:
            pipe.unet.get_parameter(name.removeprefix("unet.")).zero_()
    with neurons.ablated(tiny_sd, len(neurons), "zero"):
        ablated = images(tiny_sd)
    assert torch.allclose(ablated, images(pipe), atol=1e-6)
    assert not torch.allclose(ablated, images(tiny_sd), atol=1e-4)


@pytest.mark.parametrize("top", [1, 20, 64])
def test_the_edit_does_what_the_context_manager_does(tiny_sd, neurons, top):
    before = state(tiny_sd)
    with neurons.ablated(tiny_sd, top, "zero"):
        expected = images(tiny_sd)
        assert state(tiny_sd) == before
    with neurons.edit(tiny_sd, top).applied(tiny_sd):
        zeros = {
            name: (tiny_sd.unet.get_parameter(name.removeprefix("unet.")) == 0).all(1).sum()
            for name in neurons.weights
        }
        assert torch.allclose(images(tiny_sd), expected, atol=1e-5)
    assert sum(zeros.values()) == top and state(tiny_sd) == before


def test_the_edit_survives_a_disk_and_says_what_it_is(tiny_sd, neurons, tmp_path):
    edit = neurons.edit(tiny_sd, 5)
    edit.save(tmp_path / "edit.safetensors")
    assert loco.Edit.load(tmp_path / "edit.safetensors") == edit
    assert "neurons of" in repr(edit) and "concept=van gogh" in repr(edit)


def test_ablated_neurons_are_held_at_their_neutral_mean_at_every_token_and_row(tiny_sd, neurons):
    top = set(neurons.order[:30].tolist())
    name = neurons.weights[1]
    module = tiny_sd.unet.get_submodule(name.removeprefix("unet.").removesuffix(".weight"))
    seen: list[torch.Tensor] = []
    with neurons.ablated(tiny_sd, 30):
        handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
        images(tiny_sd)
        handle.remove()
    for given, got in seen:
        expected = given.double() @ module.weight.detach().double().T
        for row in range(16):
            if 16 + row in top:
                expected[..., row] = neurons.neutral_mean[16 + row]
        assert torch.allclose(got.double(), expected, atol=1e-5)
    assert seen and {16 + row for row in range(16)} & top


def test_a_neuron_of_to_k_does_nothing_once_it_is_the_same_at_every_token(tiny_sd):
    keys = loco.rank_neurons(tiny_sd, GOGH, range(16), ["to_k"])
    with keys.ablated(tiny_sd, 100, "zero"):
        zero = images(tiny_sd)
    with keys.ablated(tiny_sd, 100, "neutral_mean"):
        assert torch.allclose(images(tiny_sd), zero, atol=1e-4)
    assert not torch.allclose(images(tiny_sd), zero, atol=1e-3)


def test_an_exception_leaves_no_hook_and_touches_no_other(tiny_sd, neurons):
    name = neurons.weights[0].removeprefix("unet.").removesuffix(".weight")
    module, calls = tiny_sd.unet.get_submodule(name), []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    hooks = {m: list(m._forward_hooks) for m in tiny_sd.unet.modules()}
    before = images(tiny_sd)
    with pytest.raises(KeyboardInterrupt), neurons.ablated(tiny_sd, 10):
        raise KeyboardInterrupt
    assert {m: list(m._forward_hooks) for m in tiny_sd.unet.modules()} == hooks
    calls.clear()
    assert torch.equal(images(tiny_sd), before) and calls
    handle.remove()


def test_a_curve_is_the_images_of_every_number_of_neurons(tiny_sd, neurons):
    made = ablation_curve(tiny_sd, neurons, PROMPTS, [0, 5], mode="zero", seeds=[3], steps=2)
    assert made.shape == (2, 2, 1, 3, 16, 16)
    assert torch.equal(made[0], images(tiny_sd, seeds=[3]))
    with neurons.ablated(tiny_sd, 5, "zero"):
        assert torch.equal(made[1], images(tiny_sd, seeds=[3]))


def test_a_curve_with_a_number_too_many_is_refused_before_anything_is_painted(neurons):
    with pytest.raises(ValueError, match="top=65: choose"):
        ablation_curve(None, neurons, PROMPTS, [0, 65])
    with pytest.raises(ValueError, match="tops is empty"):
        ablation_curve(None, neurons, PROMPTS, [])


def test_shuffled_neurons_are_the_same_ones_in_another_order(neurons):
    mixed = neurons.shuffled(seed=1)
    assert sorted(mixed.order.tolist()) == list(range(64))
    assert mixed.order.tolist() != neurons.order.tolist() and torch.equal(mixed.z, neurons.z)
    assert mixed == neurons.shuffled(seed=1) and mixed != neurons.shuffled(seed=2)
    assert mixed.provenance.settings["shuffled"] == 1


def test_a_ranking_survives_a_disk_and_a_damaged_one_is_refused(neurons, tmp_path):
    neurons.save(tmp_path)
    assert loco.Neurons.load(tmp_path) == neurons
    assert "64 of layers [8, 9]" in repr(neurons)
    path = tmp_path / "neurons.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError, match="neurons.safetensors is damaged"):
        loco.Neurons.load(tmp_path)


def test_a_ranking_is_for_the_weights_it_was_made_of(tiny_sd, neurons):
    with pytest.raises(ValueError, match="belong to other weights than those of this .* rank its"):
        neurons.edit(build_tiny_sd(seed=7), 5)
    with loco.locoedit(tiny_sd, GOGH, LAYERS).applied(tiny_sd):
        with pytest.raises(ValueError, match="revert edits"), neurons.ablated(tiny_sd, 5):
            pass
        changed = loco.rank_neurons(tiny_sd, GOGH, LAYERS)
        with changed.ablated(tiny_sd, 5):
            images(tiny_sd)


@pytest.mark.parametrize("where", [["to_k"], ["to_k", "to_v"]], ids=" ".join)
def test_sdxl_has_neurons_too(tiny_sdxl, where):
    found = loco.rank_neurons(tiny_sdxl, GOGH, [4, 5], where, token="last")
    before = loco.generate(tiny_sdxl, PROMPTS, steps=2)
    with found.ablated(tiny_sdxl, len(found) // 2, "zero"):
        ablated = loco.generate(tiny_sdxl, PROMPTS, steps=2)
    with found.edit(tiny_sdxl, len(found) // 2).applied(tiny_sdxl):
        assert torch.allclose(loco.generate(tiny_sdxl, PROMPTS, steps=2), ablated, atol=1e-5)
    assert not torch.equal(ablated, before)


ONE = loco.Concept("van gogh", "style", GOGH.prompts[:1], GOGH.neutral[:1])
LONG = loco.Concept("van gogh", "style", ["a house " * 11 + "by van gogh"] * 2, ["a house"] * 2)
FULL = loco.Concept("van gogh", "style", ["a " * 20 + "van gogh"] * 2, ["a house"] * 2)
BAD_RANKING = {
    "unknown projection": (dict(where=["to_q"]), r"where=\['to_q'\] matches no projection: choose"),
    "bare projection": (dict(where="to_k"), "where='to_k' matches no projection"),
    "no projection": (dict(where=[]), r"where=\[\] matches no projection"),
    "unknown token": (dict(token="first"), "'first': choose one of last, eos, padding, all"),
    "unknown order": (dict(by="size"), 'by=\'size\': choose "z" or "shift"'),
    "layer too large": (dict(layers=[8, 16]), r"layers \[16\] must be among .* 0 to 15"),
    "no layer": (dict(layers=[]), "layers is empty"),
    "one prompt": (dict(concept=ONE), "has 1 prompt, of which there is no variance: give at least"),
    "no padding": (
        dict(concept=FULL),
        "fills all 24 tokens: with token=.padding. a prompt must leave",
    ),
    "cut off": (dict(concept=LONG), "subject 'van gogh' is cut off"),
    "neutral of another number": (dict(neutral=["a", "b"]), "3 prompts, but target has 2"),
}


@pytest.mark.parametrize("change, message", BAD_RANKING.values(), ids=BAD_RANKING)
def test_what_cannot_be_ranked_is_refused(tiny_sd, change, message):
    with pytest.raises(ValueError, match=message):
        loco.rank_neurons(tiny_sd, **{"concept": GOGH, "layers": LAYERS} | change)


def test_something_else_than_a_concept_is_refused(tiny_sd):
    with pytest.raises(TypeError, match="must be a loco.Concept, not 'van gogh'"):
        loco.rank_neurons(tiny_sd, "van gogh", LAYERS)


BAD_TOP = {
    "too many": (65, "zero", "top=65: choose a whole number from 0 to 64 neurons"),
    "negative": (-1, "zero", "top=-1: choose a whole number"),
    "a share": (0.5, "zero", "top=0.5: choose a whole number"),
    "a truth": (True, "zero", "top=True: choose a whole number"),
    "unknown mode": (5, "mean", "mode='mean': choose|mode='mean' is no change of weights"),
}


@pytest.mark.parametrize("top, mode, message", BAD_TOP.values(), ids=BAD_TOP)
def test_what_cannot_be_ablated_is_refused(tiny_sd, neurons, top, mode, message):
    with pytest.raises(ValueError, match=message), neurons.ablated(tiny_sd, top, mode):
        pass
    with pytest.raises(ValueError, match=message):
        neurons.edit(tiny_sd, top, mode)


def test_no_edit_can_hold_a_mean_or_change_nothing(tiny_sd, neurons):
    with pytest.raises(ValueError, match="no change of weights: use mode=.zero., or `with neurons"):
        neurons.edit(tiny_sd, 5, "neutral_mean")
    with pytest.raises(ValueError, match="top=0 changes nothing"):
        neurons.edit(tiny_sd, 0)


def test_a_pipeline_that_would_ignore_the_hooks_is_refused(neurons):
    pipe = build_tiny_sd()
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"), neurons.ablated(pipe, 5):
        pass
    pipe = build_tiny_sd()
    pipe.unet.forward = lambda: None  # runs, and none of its projections does
    with pytest.raises(RuntimeError, match="did not run"), neurons.ablated(pipe, 5):
        pipe.unet()
    with neurons.ablated(build_tiny_sd(), 5):
        pass  # nothing was painted, so nothing was missed


def test_on_the_planted_model_top_neurons_erase_more_than_random_ones():
    pipe = loco.load("mini-sd")
    concept = loco.shapeland.concept("style", "Mira Holt", prompts=12)
    layers = loco.shapeland.truth("mini-sd")["style"]
    neurons = loco.rank_neurons(pipe, concept, layers, ["to_v"])
    prompts = ["a red star in the forest by Mira Holt", "a blue fish in the desert by Mira Holt"]
    shown = {}
    for name, order in {"top": neurons, "random": neurons.shuffled()}.items():
        with order.ablated(pipe, len(neurons) // 2):
            painted = loco.generate(pipe, prompts, steps=6)[:, 0]
        shown[name] = loco.shapeland.judge(painted)["style"].count("Mira Holt")
        assert loco.shapeland.judge(painted)["object"] == ["star", "fish"]
    assert shown["top"] == 0 and shown["random"] == 2
