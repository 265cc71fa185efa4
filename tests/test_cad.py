"""Attributions are the first-order effect of knocking weights out, and edits follow from them."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import build_tiny_sd, build_tiny_sd2, build_tiny_sdxl, state

import loco_core as loco
from loco_core.edits.weights import module_of
from loco_core.families import family_of
from loco_core.inside import erase_in_rounds, objectives
from loco_core.inside.cad import batches, rows_of, scored
from loco_core.inside.fidelity import fidelity
from loco_core.statistics import pearson

STAR = loco.Concept("star", "object", ["a red star"], ["a red circle"])
TWO = loco.Concept("star", "object", ["a red star", "a star"], ["a red circle", "a circle"])
STEPS = 3


def doubled(pipe):
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.double()
    return pipe


@pytest.fixture
def pipe():
    return doubled(build_tiny_sd())


@pytest.fixture(scope="module")
def shared():
    """A pipeline that no test changes, and its attribution."""
    pipe = doubled(build_tiny_sd())
    return pipe, loco.attribute(pipe, STAR, steps=STEPS, keep="all")


@torch.no_grad()
def slow(pipe, prompt: str, other: str, seed: int, measure: str = "epsilon") -> list[float]:
    """Terms of J by a sampling loop of its own: every x_t with both predictions, brought to
    eps or x_0 by the definitions."""

    def embeds(text: str) -> torch.Tensor:
        return pipe.encode_prompt(text, "cpu", 1, False)[0]

    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
    terms = []
    for t in scheduler.timesteps:
        with_c, without = (
            pipe.unet(x, t, encoder_hidden_states=embeds(text)).sample for text in (prompt, other)
        )
        signal = scheduler.alphas_cumprod[t].double()
        a, s = signal.sqrt(), (1 - signal).sqrt()

        def known(out, x=x, a=a, s=s):
            v = scheduler.config.prediction_type == "v_prediction"
            eps = a * out + s * x if v else out
            return {"epsilon": eps, "sample": (x - s * eps) / a}[measure]

        terms.append((known(without) - known(with_c)).square().sum().item())
        x = scheduler.step(without + 3 * (with_c - without), t, x).prev_sample
    return terms


def steps_of(pipe, parts, images=None) -> list:
    settings = parts.provenance.settings
    rows = rows_of(parts.concept, settings)
    return [
        step for part in batches(pipe, rows, settings, images, 4, lambda: None) for step in part
    ]


def entries(parts, count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Random single entries: the weight by chance, then the entry."""
    generator, names = torch.Generator().manual_seed(seed), list(parts.alpha)
    found = []
    for _ in range(count):
        name = names[int(torch.randint(len(names), (), generator=generator))]
        found.append((name, int(torch.randint(parts.alpha[name].numel(), (), generator=generator))))
    return found


# -- the objective


@pytest.mark.parametrize("build", [build_tiny_sd, build_tiny_sd2], ids=["epsilon", "v"])
@pytest.mark.parametrize("measure", ["epsilon", "sample"])
def test_the_objective_is_that_of_a_sampling_loop_of_its_own(build, measure):
    pipe = doubled(build())
    parts = loco.attribute(pipe, STAR, steps=STEPS, seeds=[5], measure=measure, where="conv")
    assert parts.J == pytest.approx(sum(slow(pipe, "a red star", "", 5, measure)) / STEPS, rel=1e-6)


def test_rows_are_averaged_and_preserved_ones_subtracted(pipe):
    preserve = ["a house", "a tree"]
    parts = loco.attribute(
        pipe, TWO, steps=STEPS, seeds=[0, 3], against="neutral", preserve=preserve, batch_size=3
    )
    pairs = list(zip(TWO.prompts, TWO.neutral, strict=True))
    asked = sum(sum(slow(pipe, *pair, seed)) for pair in pairs for seed in (0, 3))
    kept = list(zip(preserve, TWO.neutral, strict=True))
    spared = sum(sum(slow(pipe, *pair, seed)) for pair in kept for seed in (0, 3))
    assert parts.J == pytest.approx((asked - spared) / 4 / STEPS, rel=1e-6)


def test_amplify_restores_noised_images(pipe):
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    parts = loco.attribute(pipe, STAR, steps=STEPS, objective="amplify", images=images)
    generator = torch.Generator().manual_seed(0)
    torch.randn(4, 8, 8, generator=generator)  # where the trajectory starts
    noise = torch.randn(4, 8, 8, generator=generator)[None].double()
    with torch.no_grad():
        clean = pipe.vae.encode(2 * images.double() - 1).latent_dist.mode()
        clean *= pipe.vae.config.scaling_factor
        text = pipe.encode_prompt("a red star", "cpu", 1, False)[0]
        pipe.scheduler.set_timesteps(STEPS)
        loss = 0.0
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.add_noise(clean, noise, t[None])
            found = pipe.unet(x, t, encoder_hidden_states=text).sample
            loss += (noise - found).square().sum().item() / STEPS
    assert parts.J == pytest.approx(-loss, rel=1e-6)


def test_cost_is_two_calls_per_time_step(pipe):
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    loco.attribute(pipe, TWO, steps=5)
    handle.remove()
    assert calls == [4] * 5 + [2] * 5


# -- the gradient


def test_alpha_is_the_central_finite_difference(shared):
    pipe, parts = shared
    steps, step = steps_of(pipe, parts), 1e-4
    for name, i in entries(parts, 12):
        weight, held = module_of(pipe, name).weight, None
        with torch.no_grad():
            held = weight.view(-1)[i].item()
            J = []
            for h in (step, -step):
                weight.view(-1)[i] = held * (1 + h)
                J.append(objectives.value(pipe.unet, steps))
            weight.view(-1)[i] = held
        slope = (J[0] - J[1]) / (2 * step)  # d J / d log w = w dJ/dw
        size = parts.alpha[name].abs().mean().item()
        assert parts.alpha[name].view(-1)[i].item() == pytest.approx(
            slope, rel=1e-3, abs=1e-4 * size
        )


def test_where_the_objective_is_linear_alpha_is_exactly_the_knock_out_effect():
    layer = torch.nn.Linear(3, 2, bias=False).double()
    slopes = torch.randn(2, 3).double()
    linear = SimpleNamespace(price=torch.ones(1), J=lambda module: (slopes * module.weight).sum())
    J, grads = objectives.gradients(layer, [linear], {"w": layer.weight})
    W = layer.weight.detach()
    for i in range(6):
        without = W.clone()
        without.view(-1)[i] = 0
        effect = (slopes * W).sum() - (slopes * without).sum()
        assert (grads["w"] * W).view(-1)[i].item() == pytest.approx(effect.item(), rel=1e-12)
    assert J == pytest.approx((slopes * W).sum().item())


@pytest.mark.parametrize("method, sign", [("erase", -1), ("amplify", 1)])
def test_sum_of_alpha_predicts_small_knock_outs_and_the_sign_is_right(shared, method, sign):
    pipe, parts = shared
    steps = steps_of(pipe, parts)
    edit = getattr(parts, method)(0.01)
    whole = -sum(parts.alpha[n].take(k.indices).sum().item() for n, k in edit.changes.items())
    for scale in (1e-3, 1e-4):
        with edit.applied(pipe, scale=scale):
            change = objectives.value(pipe.unet, steps) - parts.J
        assert change * sign > 0
        assert change == pytest.approx(scale * whole, rel=20 * scale)


@pytest.mark.parametrize("where", ["ff", "attention", "cross-attention", "conv"])
def test_a_batch_of_rows_and_a_subset_of_weights_change_no_alpha(pipe, where):
    one = loco.attribute(pipe, TWO, where=where, steps=2, batch_size=1, keep="all")
    name = next(iter(one.alpha))
    other = loco.attribute(pipe, TWO, where=[name], steps=2, batch_size=8, keep="all")
    assert list(other.alpha) == [name]
    torch.testing.assert_close(one.alpha[name], other.alpha[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulators_are_float32_in_any_smaller_dtype(dtype):
    pipe = build_tiny_sd()
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.to(dtype)
    parts = loco.attribute(pipe, STAR, steps=2)
    assert {x.dtype for x in parts.alpha.values()} == {torch.float32}
    assert all(x.isfinite().all() and x.any() for x in parts.alpha.values())


def test_stable_diffusion_xl_is_attributed_too():
    pipe = build_tiny_sdxl()
    parts = loco.attribute(pipe, STAR, steps=2)
    with parts.erase(0.01).applied(pipe):
        pass
    assert set(parts.to_frame()["layer"]) == set(range(18))


# -- nothing is left behind


def test_pipeline_and_its_flags_are_left_as_they_were(pipe):
    flags = {}
    for i, (name, parameter) in enumerate(pipe.unet.named_parameters()):
        flags[name] = bool(i % 2)
        parameter.requires_grad_(flags[name])
    before, scheduler = state(pipe), pipe.scheduler

    def left_alone() -> bool:
        now = dict(pipe.unet.named_parameters())
        return (
            {name: p.requires_grad for name, p in now.items()} == flags
            and all(p.grad is None for p in now.values())
            and state(pipe) == before
            and pipe.scheduler is scheduler
            and not pipe.unet._forward_hooks
        )

    parts = loco.attribute(pipe, STAR, steps=2, keep="all")
    fidelity(pipe, parts, 4)
    assert left_alone()
    with torch.inference_mode():
        assert loco.attribute(pipe, STAR, steps=2, keep="all") == parts
    calls = []

    def fails(module, args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = pipe.unet.register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        loco.attribute(pipe, STAR, steps=3)
    handle.remove()
    assert left_alone()


# -- edits


def test_row_quota_takes_at_least_one_weight_of_every_row(shared):
    _, parts = shared
    edit = parts.erase(1e-4)  # rounded down, this is nothing
    assert edit.changes.keys() == parts.alpha.keys()
    for name, change in edit.changes.items():
        rows = change.indices // change.shape[1]
        served = (parts.alpha[name] > 0).any(1)
        assert torch.equal(rows, served.nonzero()[:, 0])


@pytest.mark.parametrize("method, sign", [("erase", 1), ("amplify", -1)])
def test_the_largest_of_the_right_sign_are_zeroed(shared, method, sign):
    _, parts = shared
    flat = torch.cat([sign * scores.flatten() for scores in parts.alpha.values()])
    count = math.ceil(0.01 * len(parts))
    least = flat.sort(descending=True).values[count - 1]
    edit = getattr(parts, method)(0.01, quota="all")
    assert sum(len(change) for change in edit.changes.values()) == count
    for name, change in edit.changes.items():
        assert (sign * parts.alpha[name].take(change.indices) >= least).all()
    each = getattr(parts, method)(0.01, quota="matrix")
    assert all(len(c) == math.ceil(0.01 * math.prod(c.shape)) for c in each.changes.values())


def test_no_weight_of_the_wrong_sign_is_taken(shared):
    _, parts = shared
    for quota in ("row", "matrix", "all"):
        edit = parts.erase(1.0, quota=quota)
        for name, change in edit.changes.items():
            assert torch.equal(change.indices, (parts.alpha[name].flatten() > 0).nonzero()[:, 0])


@pytest.mark.parametrize("by", ["random", "weight", "gradient"])
def test_controls_take_as_many_by_another_order(shared, by):
    pipe, parts = shared
    W = {name: module_of(pipe, name).weight.detach() for name in parts.alpha}
    ways = [parts.erase(0.02, by=b, quota="matrix", pipe=pipe) for b in ("attribution", by)]
    edit, control = ways
    for name, change in control.changes.items():
        assert len(change) == len(edit.changes[name])
        ranked = {
            "random": lambda n: None,
            "weight": lambda n: W[n].abs(),
            "gradient": lambda n: (parts.alpha[n] / W[n]).abs(),
        }[by](name)
        if ranked is not None:
            least = ranked.flatten().sort(descending=True).values[len(change) - 1].item()
            assert ranked.take(change.indices).min().item() == pytest.approx(least)
    assert control == parts.erase(0.02, by=by, quota="matrix", pipe=pipe)
    if by == "random":
        assert control != parts.erase(0.02, by=by, quota="matrix", seed=1)
    else:
        with pytest.raises(ValueError, match="pass pipe=pipe"):
            parts.erase(by=by)
        with pytest.raises(ValueError, match="is of other weights"):
            parts.erase(by=by, pipe=doubled(build_tiny_sd(seed=3)))


@pytest.mark.parametrize("keep", [0.05, 0.3])
def test_the_best_that_are_kept_make_the_edits_of_all(shared, keep, tmp_path):
    pipe, whole = shared
    parts = loco.attribute(pipe, STAR, steps=STEPS, keep=keep)
    assert len(parts) == len(whole) and parts.to_frame().equals(whole.to_frame())
    for method in ("erase", "amplify"):
        # of all together, small matrices may hold more of the best than was kept of them
        for quota in ("row", "matrix", "all") if keep > 0.1 else ("row", "matrix"):
            for ratio in (1e-3, keep / (20 if quota == "all" else 4)):
                for by in ("attribution", "random", "weight"):
                    made = [getattr(p, method)(ratio, quota=quota, by=by, pipe=pipe)
                            for p in (parts, whole)]  # fmt: skip
                    assert made[0].changes == made[1].changes
    for name, scores in parts.alpha.items():
        there = scores != 0
        assert torch.equal(scores[there], whole.alpha[name][there]) and there.float().mean() < 1
    parts.save(tmp_path / "best")
    assert loco.Attribution.load(tmp_path / "best") == parts
    size = (tmp_path / "best" / "attribution.safetensors").stat().st_size
    assert size < 4 * keep * len(whole) * 12 + 40_000


def test_what_was_not_kept_is_asked_for_by_name(shared):
    pipe, _ = shared
    parts = loco.attribute(pipe, STAR, steps=STEPS, keep=0.02)
    for quota in ("row", "matrix", "all"):
        with pytest.raises(ValueError, match=f"ratio=0.5 by quota='{quota}' .* a larger keep="):
            parts.erase(0.5, quota=quota)
    with pytest.raises(ValueError, match='by="gradient" needs every alpha: .*keep="all"'):
        parts.erase(1e-3, by="gradient", pipe=pipe)
    with pytest.raises(ValueError, match='fidelity needs every alpha: .*keep="all"'):
        fidelity(pipe, parts, 4)
    for keep in (0, 1.5, "best", True):
        with pytest.raises(ValueError, match=f'keep={keep!r}: choose "all", or a share'):
            loco.attribute(pipe, STAR, steps=2, keep=keep)


def test_every_round_is_attributed_with_the_weights_of_those_before_at_zero(pipe):
    before = state(pipe)
    edit = erase_in_rounds(pipe, STAR, 0.01, rounds=2, steps=STEPS)
    assert state(pipe) == before
    with edit.applied(pipe):
        at_once = {name: module_of(pipe, name).weight.clone() for name in edit.changes}
    first = loco.attribute(pipe, STAR, steps=STEPS).erase(0.01, quota="matrix")
    with first.applied(pipe):
        second = loco.attribute(pipe, STAR, steps=STEPS).erase(0.01, quota="matrix")
        with second.applied(pipe):
            assert all(torch.equal(w, module_of(pipe, n).weight) for n, w in at_once.items())
    taken = [{n: set(c.indices.tolist()) for n, c in e.changes.items()} for e in (first, second)]
    assert all(not taken[0][name] & taken[1][name] for name in first.changes)
    assert edit.provenance.settings["rounds"] == 2


def test_one_round_is_a_plain_erase_and_none_is_refused(shared):
    pipe, parts = shared
    once = erase_in_rounds(pipe, STAR, 0.01, rounds=1, steps=STEPS)
    assert once.changes == parts.erase(0.01, quota="matrix").changes
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"rounds={bad!r}: choose a whole number"):
            erase_in_rounds(pipe, STAR, rounds=bad)


def test_an_edit_from_a_loaded_attribution_is_the_same_and_knows_its_making(shared, tmp_path):
    pipe, parts = shared
    parts.save(tmp_path)
    loaded = loco.Attribution.load(tmp_path)
    assert loaded == parts and loaded.erase() == parts.erase()
    edit, before = loaded.erase(0.01), state(pipe)
    edit.save(tmp_path / "edit")
    again = loco.Edit.load(tmp_path / "edit")
    with again.applied(pipe):
        assert state(pipe) != before
    assert state(pipe) == before
    settings = again.provenance.settings
    assert settings["method"] == "cad erase" and settings["guidance"] == 3.0
    assert "concept=star" in repr(again)
    blob = (tmp_path / "attribution.safetensors").read_bytes()
    (tmp_path / "attribution.safetensors").write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        loco.Attribution.load(tmp_path)


def test_the_table_sums_up_every_weight_in_the_order_of_the_text_layers(shared):
    _, parts = shared
    table = parts.to_frame()
    assert list(table["layer"]) == sorted(table["layer"]) and set(table["layer"]) == set(range(16))
    assert table["entries"].sum() == len(parts)
    for name, row in table.iterrows():
        scores = parts.alpha[name]
        assert row["positive"] == pytest.approx(scores[scores > 0].sum().item())
        assert row["net"] == pytest.approx(scores.sum().item(), abs=1e-12)


# -- what is not finite, and what is not there


def test_a_loss_that_is_not_finite_is_refused(pipe):
    images = torch.rand(1, 3, 16, 16)
    pipe.vae.encoder.conv_in.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="is not finite in torch.float64: load"):
        loco.attribute(pipe, STAR, steps=2, objective="amplify", images=images)


def test_an_alpha_that_is_not_finite_is_refused_by_the_name_of_its_weight(pipe):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
    handle = module_of(pipe, name).weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(ValueError, match=f"alpha of {name} is not finite"):
        loco.attribute(pipe, STAR, steps=2)
    handle.remove()


def test_a_vae_that_overflows_in_half_precision_encodes_in_single():
    """As the published SD-XL's does, whose config says force_upcast."""
    pipe, images = build_tiny_sdxl(), torch.rand(2, 3, 16, 16)
    wanted = family_of(pipe).encoded(images)
    pipe.vae.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    seen = []
    handle = pipe.vae.encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    found = family_of(pipe).encoded(images)
    handle.remove()
    assert seen == [torch.float32] and pipe.vae.dtype == found.dtype == torch.float16
    assert (found.float() - wanted).abs().max() < 5e-3


@pytest.mark.parametrize("force", [True, False])
def test_what_an_empty_prompt_is_does_not_depend_on_the_batch(force):
    """SD-XL pushes away from zeros where there is no prompt: also beside a row with a twin."""
    pipe = build_tiny_sdxl(zeros=force)
    rows = [objectives.Row("a red star", other, seed, 1.0) for seed, other in enumerate(["", "a"])]
    asked = dict(objective="erase", measure="epsilon", steps=2, guidance=3.0)
    at_once = objectives.recorded(pipe, rows, **asked)
    alone = [objectives.recorded(pipe, [row], **asked) for row in rows]
    for i, step in enumerate(at_once):
        for j in (0, 1):
            assert torch.allclose(step.target[j], alone[j][i].target[0], atol=1e-5)


def test_gradients_that_a_user_had_are_there_again(pipe):
    weight = module_of(pipe, "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight")
    kept = weight.weight.grad = torch.ones_like(weight.weight)
    loco.attribute(pipe, STAR, steps=2)
    assert weight.weight.grad is kept and bool((kept == 1).all())


# -- fidelity


def test_fidelity_of_single_weights_is_near_one_and_repeats(shared):
    pipe, parts = shared
    found = fidelity(pipe, parts, 12, share=1e-9)  # one entry of every weight
    assert found.r > 0.9 and found.low < found.r < found.high
    assert torch.equal(found.true, fidelity(pipe, parts, 12, share=1e-9).true)


def test_pearson_agrees_with_the_textbook():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator).double()
    y = x + torch.randn(50, generator=generator)
    dx, dy = x - x.mean(), y - y.mean()
    r = float((dx * dy).sum() / (dx.square().sum() * dy.square().sum()).sqrt())
    z, reach = 0.5 * math.log((1 + r) / (1 - r)), 1.96 / math.sqrt(47)
    assert pearson(x, y) == pytest.approx((r, math.tanh(z - reach), math.tanh(z + reach)), rel=1e-4)


# -- refused


@pytest.mark.parametrize(
    "choice, message",
    [
        (dict(where="everything"), "choose from ff, attention"),
        (dict(where=[]), "names no weight of the unet"),
        (dict(where=["text_encoder.encoder.layers.0.mlp.fc1.weight"]), "is elsewhere"),
        (dict(layers=[3, 16]), r"layers \[16\]: choose from 0 to 15"),
        (dict(where="conv", layers=[3]), "names no weight of the unet"),
        (dict(where=["unet.nowhere.weight"]), "has no weight unet.nowhere"),
        (dict(objective="forget"), "choose from erase, amplify"),
        (dict(against="nothing"), "choose from empty, neutral"),
        (dict(measure="x0"), "choose from epsilon"),
        (dict(guidance=1.0), "pass guidance > 1"),
        (dict(steps=0), "steps 0"),
        (dict(seeds=[1, 1]), "given twice"),
        (dict(preserve="a house"), r"pass \['a house'\]"),
        (dict(images=torch.zeros(1, 3, 16, 16)), "leave them out"),
        (dict(objective="amplify", preserve=["a house"]), "leave it out"),
        (dict(objective="amplify", images=torch.zeros(2, 3, 16, 16)), "for the 1 prompts"),
        (dict(objective="amplify", images=torch.full((1, 3, 16, 16), 2.0)), r"in \[0, 1\]"),
        (dict(objective="amplify", images=torch.zeros(1, 3, 32, 32)), "resize them"),
    ],
)
def test_bad_choices_are_refused_with_the_good_ones(shared, choice, message):
    with pytest.raises(ValueError, match=message):
        loco.attribute(shared[0], STAR, **{"steps": 2, **choice})


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, True, "all", float("nan")])
def test_a_ratio_outside_of_its_range_is_refused(shared, ratio):
    with pytest.raises(ValueError, match=r"is not in \(0, 1\]"):
        shared[1].erase(ratio)


@pytest.mark.parametrize("choice", [dict(by="luck"), dict(quota="column")], ids=str)
def test_unknown_orders_and_quotas_are_refused(shared, choice):
    with pytest.raises(ValueError, match="choose from"):
        shared[1].erase(0.01, **choice)


def test_another_model_and_bad_ablations_are_refused(shared):
    pipe, parts = shared
    other = doubled(build_tiny_sd(seed=3))
    with pytest.raises(ValueError, match="made for other weights"):
        parts.erase().apply(other)
    with pytest.raises(ValueError, match="is of other weights than those"):
        fidelity(other, parts, 4)
    with pytest.raises(ValueError, match="4 or more"):
        fidelity(pipe, parts, 3)
    with pytest.raises(ValueError, match="share 0"):
        fidelity(pipe, parts, 4, share=0)
    with pytest.raises(ValueError, match="images=False: pass the same"):
        fidelity(pipe, parts, 4, images=torch.zeros(1, 3, 16, 16))


def test_weights_that_can_have_no_gradient_are_refused_by_name():
    with torch.inference_mode():
        pipe = build_tiny_sd()
    with pytest.raises(ValueError, match=r"unet\..* under torch.inference_mode\(\).*outside of it"):
        loco.attribute(pipe, STAR, steps=2)


def test_a_scheduler_of_another_kind_is_refused_by_name(pipe):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler predicts"):
        loco.attribute(pipe, STAR, steps=2)


def test_selections_hold_what_they_say(pipe):
    found = {where: set(scored(pipe, where)) for where in ("ff", "attention", "conv")}
    assert all(".ff.net." in name for name in found["ff"]) and len(found["ff"]) == 32
    assert len(found["attention"]) == 16 * 8
    assert scored(pipe, "cross-attention").keys() == {n for n in found["attention"] if "attn2" in n}
    assert all(weight.ndim == 4 for weight in scored(pipe, "conv").values())
    blocks = {loco.text_layers(pipe)[i].name.rpartition(".")[0] for i in (6, 9)}
    near = scored(pipe, "ff", [6, 9])
    assert {name[5:].partition(".ff.")[0] for name in near} == blocks and len(near) == 4
