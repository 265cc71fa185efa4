"""Causal tracing equals its slow definition, finds what is known, and leaves nothing behind."""

import copy
import dataclasses
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from conftest import build_tiny_sd, build_tiny_sdxl

import loco_core as loco
from loco_core import records
from loco_core.display.plots import effect_figure
from loco_core.families import Site, family_of
from loco_core.families.running import record
from loco_core.families.sites import adjacent
from loco_core.judging.clip_score import Clip
from loco_core.localization import threshold_from
from loco_core.localization.corruption import NOISE_SEED
from loco_core.painting import Noise, Picture, Sampling, Store, brush
from loco_core.painting.batch import batches, donors, paint_batch
from loco_core.statistics import max_t, t_interval

STYLE = loco.Concept(
    "Van Gogh", "style", ["a red house by Van Gogh on a tree", "a tree by Van Gogh"],
    ["a house", "a tree"],
)  # fmt: skip
TREE = loco.Concept("Van Gogh", "style", STYLE.prompts[1:], STYLE.neutral[1:])
FAST = dict(seeds=[0, 3], steps=2)


def bright(images, prompts):
    """A score that knows nothing of the prompt."""
    return images.mean((1, 2, 3))


BUILD = {"sd": build_tiny_sd, "sdxl": build_tiny_sdxl}


# --- the slow definition: one run per site, in a batch of its own, from activations that were
# --- kept of a separate clean run; text states by a forward pass written out, without hooks


def text_forward(encoder, ids, noise=None, first=0, restored=None, kept=None):
    """Hidden states of a CLIP text encoder; `restored` maps (layer, part) to (token, value)."""
    top = getattr(encoder, "text_model", encoder)
    x = top.embeddings.token_embedding.weight[ids].clone()
    if noise is not None:
        x[first : first + len(noise)] += noise
    x = (x + top.embeddings.position_embedding.weight[: len(ids)])[None]
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)[None, None].to(x)
    states = [x]
    for index, layer in enumerate(top.encoder.layers):
        for part, norm in (("self_attn", layer.layer_norm1), ("mlp", layer.layer_norm2)):
            out = getattr(layer, part)(norm(x), *([mask] if part == "self_attn" else []))
            out = out[0].clone() if part == "self_attn" else out.clone()
            for token, value in (restored or {}).get((index, part), []):
                out[0, token] = value
            if kept is not None:
                kept[index, part] = out[0].clone()
            x = x + out
        states.append(x)
    end = (ids == encoder.config.eos_token_id).int().argmax()
    return states, top.final_layer_norm(x), end


def encoders(pipe):
    return [n for n in ("text_encoder", "text_encoder_2") if hasattr(pipe, n)]


def slow_text(pipe, noises=None, first=0, restored=None, kept=None):
    """TREE for the pipeline; noises: per encoder; restored, kept: dicts by encoder."""
    names, parts, found = encoders(pipe), [], {}
    for number, name in enumerate(names):
        encoder = getattr(pipe, name)
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        ids = tokenizer(TREE.prompts, padding="max_length", truncation=True, return_tensors="pt")
        states, last, end = text_forward(
            encoder, ids.input_ids[0], None if noises is None else noises[number], first,
            (restored or {}).get(name), None if kept is None else kept.setdefault(name, {}),
        )  # fmt: skip
        parts.append(states[-2] if len(names) > 1 else last)
        if number:
            found["pooled_prompt_embeds"] = encoder.text_projection(last[:, end])
    return {"prompt_embeds": torch.cat(parts, -1), **found}


@contextmanager
def replaced(modules, wrap):
    """Modules whose forward is wrap(module, its own forward)."""
    for module in modules:
        module.forward = wrap(module, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def slow_image(pipe, text, modules=(), kept=None, calls=None):
    """The image of seed 3 in a batch of one. kept None: plain; an empty dict: filled with
    conditional activations; a full one: they stand in for the pipeline's own, at `calls`."""
    step, record = {module: -1 for module in modules}, kept == {}

    def wrap(module, own):
        def forward(*args, **kwargs):
            step[module] += 1
            out, at = own(*args, **kwargs), (module, step[module])
            if record:
                kept[at] = out[1:].clone()
            elif calls is None or step[module] in calls:
                out = torch.cat([out[:1], kept[at]])
            return out

        return forward

    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))[None]
    own, pipe.scheduler = pipe.scheduler, copy.deepcopy(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    try:
        with replaced(modules, wrap), torch.no_grad():
            return pipe(
                **text, latents=latents, num_inference_steps=2, guidance_scale=7.5, output_type="pt"
            ).images[0]  # fmt: skip
    finally:
        pipe.scheduler = own


def drawn_noise(pipe, std, draws):
    """Span of the subject of TREE; [draw][encoder] [token, width], by the documented rule."""
    first, last = family_of(pipe).subject_span(TREE.prompts[0], TREE.name)
    generator = torch.Generator().manual_seed(NOISE_SEED)
    widths = [getattr(pipe, name).config.hidden_size for name in encoders(pipe)]
    return (first, last), [
        [std * torch.randn(last - first + 1, w, generator=generator) for w in widths]
        for _ in range(draws)
    ]


def batched(pipe, groups, size, draws=1, calls=None):
    """Images of TREE as `trace` makes them, before they are put on the 8-bit grid: by (row, d)."""
    model, (prompt,) = family_of(pipe), TREE.prompts
    span, stds = model.subject_span(prompt, TREE.name), (2.0,) * len(encoders(pipe))
    pictures = {(0, 0): Picture(prompt, 3)}
    for d in range(draws):
        noise = Noise(*span, stds, NOISE_SEED, d)
        pictures[1, d] = Picture(prompt, 3, noise=noise)
        for row, group in enumerate(groups, 2):
            labels = tuple(site.label for site in group)
            pictures[row, d] = Picture(prompt, 3, noise=noise, restored=labels, calls=calls)
    made = [
        image
        for batch in batches(list(pictures.values()), lambda: size)
        for image in paint_batch(model, batch, Sampling(steps=2))
    ]
    return dict(zip(pictures, made, strict=True))


def painted(monkeypatch):
    """Batches that are painted from now on, as lists of pictures."""
    seen = []

    def paints(model, batch, *args):
        seen.append(list(batch))
        return paint_batch(model, batch, *args)

    monkeypatch.setattr(brush, "paint_batch", paints)
    return seen


@pytest.fixture(scope="module", params=BUILD, ids=list(BUILD))
def pipe(request):
    return BUILD[request.param]()


@pytest.mark.parametrize("window, every, calls", [(1, 9, None), (3, 23, None), (1, 35, (1,))])
def test_a_batched_trace_of_the_denoiser_is_the_slow_one(pipe, window, every, calls):
    model, kept = family_of(pipe), {}
    groups = adjacent(model.sites, window)[::every]
    found = batched(pipe, groups, 4, 2, calls)
    modules = [[model.module_of(site) for site in group] for group in groups]
    span, noise = drawn_noise(pipe, 2.0, 2)
    with torch.no_grad():
        text = slow_text(pipe)
        noisy = [slow_text(pipe, each, span[0]) for each in noise]
    clean = slow_image(pipe, text, sum(modules, []), kept)
    assert (found[0, 0] - clean).abs().max() <= 1e-4
    apart = []
    for d, each in enumerate(noisy):
        corrupted = slow_image(pipe, each)
        assert (found[1, d] - corrupted).abs().max() <= 1e-4
        for g in range(len(groups))[:: 1 + 2 * d]:
            image = slow_image(pipe, each, modules[g], kept, calls)
            assert (found[2 + g, d] - image).abs().max() <= 1e-4
            apart.append((image - corrupted).abs().max())
    assert max(apart) > (1e-3 if calls is None else 1e-4)  # what is compared is not all the same


@pytest.mark.parametrize("window, every", [(1, 2), (2, 5)])
def test_a_batched_trace_of_the_text_encoders_is_the_slow_one(pipe, window, every):
    sites, kept = family_of(pipe).text_sites(TREE.prompts, TREE.name, "all"), {}
    groups = adjacent(sites, window)
    found = batched(pipe, groups, 6)
    (first, last), (noise,) = drawn_noise(pipe, 2.0, 1)
    with torch.no_grad():
        text, noisy = slow_text(pipe, kept=kept), slow_text(pipe, noise, first)
    corrupted = slow_image(pipe, noisy)
    assert (found[0, 0] - slow_image(pipe, text)).abs().max() <= 1e-4
    assert (found[1, 0] - corrupted).abs().max() <= 1e-4
    apart = []
    for g, group in [(g, x) for g, x in enumerate(groups) if x[0].token >= -1][::every]:
        restored = {}
        for site in group:
            name, *_, index, part = site.name.split(".")
            at = last + site.token, kept[name][int(index), part][last + site.token]
            restored.setdefault(name, {}).setdefault((int(index), part), []).append(at)
        with torch.no_grad():
            image = slow_image(pipe, slow_text(pipe, noise, first, restored))
        assert (found[2 + g, 0] - image).abs().max() <= 1e-4
        apart.append((image - corrupted).abs().max())
    assert max(apart) > 1e-3


# --- sites


def test_the_published_architectures_have_70_and_227_sites():
    from diffusers import UNet2DConditionModel

    cross, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    sd = dict(
        block_out_channels=(320, 640, 1280, 1280), down_block_types=(cross,) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + (up,) * 3, cross_attention_dim=768, attention_head_dim=8,
    )  # fmt: skip
    xl = dict(
        block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", cross, cross),
        up_block_types=(up, up, "UpBlock2D"), cross_attention_dim=2048, use_linear_projection=True,
        attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    blocks = "self-attention", "cross-attention", "feed-forward"
    counts = {
        70: (sd, dict(ResNet=22) | dict.fromkeys(blocks, 16)),
        227: (xl, dict(ResNet=17) | dict.fromkeys(blocks, 70)),
    }
    for total, (config, kinds) in counts.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(layers_per_block=2, sample_size=8, **config)
            pooled = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
            inputs = dict(encoder_hidden_states=torch.empty(1, 7, unet.config.cross_attention_dim))
            noise = torch.empty(1, 4, 8, 8), torch.zeros(())
            sites = record(unet, *noise, **inputs, added_cond_kwargs=pooled).sites
        found = [site.kind for site in sites]
        assert len(sites) == total and {kind: found.count(kind) for kind in kinds} == kinds
        names = [site.name for site in sites]
        parts = list(dict.fromkeys(name.split(".")[0] for name in names))
        assert parts == ["down_blocks", "mid_block", "up_blocks"]  # as they run, not as listed
        assert {"down_blocks.1.resnets.1", "up_blocks.0.resnets.2"} < set(names)


def test_sites_of_the_text_encoder_are_layers_parts_and_tokens(tiny_sd):
    last = family_of(tiny_sd).text_sites(STYLE.prompts, STYLE.name)
    names = [
        f"text_encoder.encoder.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")
    ]
    assert [site.name for site in last] == names and {site.token for site in last} == {0}
    every = family_of(tiny_sd).text_sites(STYLE.prompts, STYLE.name, "all")
    assert sorted({site.token for site in every}) == list(range(-5, 5))
    assert every[0].label == f"{names[0]} @-5"


def test_windows_hold_sites_that_lie_behind_each_other(tiny_sd):
    sites = family_of(tiny_sd).text_sites(STYLE.prompts, STYLE.name, "all")
    pairs = adjacent(sites, 2)
    assert len(pairs) == len(sites) // 2
    for a, b in pairs:
        assert (
            a.kind == b.kind
            and a.token == b.token
            and "layers.0" in a.name in b.name.replace("1", "0")
        )
    sites = family_of(tiny_sd).sites
    assert [group[0] for group in adjacent(sites, 3)] == list(sites[:-2])


# --- planted answers


def listening(layer, seed=0):
    """A pipeline whose image depends on its text only through cross-attention `layer`."""
    pipe = build_tiny_sd(seed)
    for each in loco.text_layers(pipe):
        loudness = 10 if each.index == layer else 0
        pipe.unet.get_submodule(each.name).to_out[0].weight.data *= loudness
    return pipe


def near_clean(pipe):
    """A score that is higher the nearer an image is to the pipeline's own of the same prompt."""
    made = loco.generate(pipe, STYLE.prompts, **FAST)

    def score(images, prompts):
        own = made[[STYLE.prompts.index(p) for p in prompts]]
        return -(images[:, None] - own).abs().mean((2, 3, 4)).amin(1)

    return score


@pytest.mark.parametrize("layer", [3, 12])
def test_the_only_layer_that_reads_the_text_restores_the_clean_image(layer):
    pipe = listening(layer)
    names = [text_layer.name for text_layer in loco.text_layers(pipe)]
    traced = loco.trace(
        pipe, STYLE, sites=names, noise=2.0, score=near_clean(pipe), images=True, **FAST
    )
    assert traced.causal(threshold_from([traced], 0.5)) == (traced.sites[layer],)
    assert abs(traced.effects[layer].item() - traced.gap) <= 1e-4 and traced.gap > 1e-3
    assert (traced.images[2 + layer] - traced.images[0]).abs().max() <= 1.1 / 255
    deaf = [j for j in range(16) if j != layer]
    assert traced.effects[deaf].abs().max() <= 1e-4


def test_all_sites_together_restore_the_clean_image(tiny_sd):
    traced = loco.trace(
        tiny_sd, STYLE, window=70, noise=2.0, score=near_clean(tiny_sd), images=True, **FAST
    )
    assert traced.images.shape == (3, 2, 1, 2, 3, 16, 16)
    assert (traced.images[2] - traced.images[0]).abs().max() <= 1.1 / 255
    assert (traced.images[1] - traced.images[0]).abs().max() > 3 / 255
    assert set(traced.causal(traced.gap * 0.99)) == set(family_of(tiny_sd).sites)


def test_a_token_before_the_noise_restores_nothing(tiny_sd):
    traced = loco.trace(
        tiny_sd, TREE, "text_encoder", tokens="all", noise=2.0, score=near_clean(tiny_sd), **FAST
    )
    before = [i for i, site in enumerate(traced.sites) if site.token < -1]
    at = [i for i, site in enumerate(traced.sites) if site.token == 0]
    assert len(before) == 4 * 4 and len(at) == 4 and traced.effects[before].abs().max() <= 1e-5
    assert traced.effects[at].abs().max() > 1e-3


# --- the noise


def test_the_default_noise_is_three_stds_of_the_subjects_embeddings(pipe):
    traced = loco.trace(
        pipe, STYLE, sites=[family_of(pipe).sites[0].name], score=bright, seeds=[0],
        steps=1,
    )  # fmt: skip
    ids = pipe.tokenizer("van gogh", add_special_tokens=False).input_ids
    names = [n for n in ("text_encoder", "text_encoder_2") if getattr(pipe, n, None)]
    wanted = [
        3 * getattr(pipe, n).get_input_embeddings().weight[ids].detach().numpy().std()
        for n in names
    ]
    assert traced.provenance.settings["noise"] == pytest.approx(wanted, rel=1e-5)


def test_draws_differ_and_do_not_depend_on_how_many_are_made(tiny_sd):
    run = dict(sites=["mid_block.resnets.0"], noise=2.0, score=bright, **FAST)
    one, three = (loco.trace(tiny_sd, STYLE, draws=draws, **run) for draws in (1, 3))
    assert torch.allclose(one.corrupted[:, 0], three.corrupted[:, 0], atol=1e-4)
    assert torch.allclose(one.restored[:, :, 0], three.restored[:, :, 0], atol=1e-4)
    assert (three.corrupted[:, 0] - three.corrupted[:, 1]).abs().min() > 5e-4
    assert three.restored.shape == (1, 2, 3, 2) and three.corrupted.shape == (2, 3, 2)


@pytest.mark.parametrize("where", ["denoiser", "text_encoder"])
def test_the_trace_does_not_depend_on_how_it_is_cut_in_batches(tiny_sd, where):
    run = dict(noise=2.0, score=bright, images=True, seeds=[0], steps=2)
    if where == "denoiser":
        run["sites"] = [site.name for site in family_of(tiny_sd).sites[20:24]]
    small, large = (loco.trace(tiny_sd, STYLE, where, batch_size=n, **run) for n in (2, 64))
    assert (small.images[:] - large.images[:]).abs().max() <= 1.1 / 255
    assert torch.allclose(small.effects, large.effects, atol=1e-3)


def test_without_guidance_the_only_row_is_restored(tiny_sd):
    score = near_clean(tiny_sd)
    run = dict(noise=2.0, score=score, guidance=1.0, images=True, seeds=[0], steps=2)
    traced = loco.trace(tiny_sd, STYLE, window=70, **run)
    own = loco.generate(tiny_sd, STYLE.prompts, [0], 2, 1.0)
    assert (traced.images[[0, 2], :, 0] - own).abs().max() <= 1.6 / 255
    assert (traced.images[1, :, 0] - own).abs().max() > 3 / 255


# --- the result


@pytest.fixture(scope="module")
def clip_based(tiny_clip):
    return partial(loco.clip_score, clip=Clip(*tiny_clip))


RUN = dict(draws=2, batch_size=8, noise=2.0, images=True, **FAST)


@pytest.fixture(scope="module")
def traced(tiny_sd, clip_based):
    return loco.trace(tiny_sd, STYLE, "text_encoder", score=clip_based, **RUN)


def test_the_effect_is_the_mean_of_restored_minus_corrupted(tiny_sd, traced, clip_based):
    for j, site in enumerate(traced.sites):
        each = [
            (traced.restored[j, p, d, k] - traced.corrupted[p, d, k]).item()
            for p in range(2) for d in range(2) for k in range(2)
        ]  # fmt: skip
        assert traced.effects[j].item() == pytest.approx(sum(each) / 8), site
        assert traced.scores[j].item() == pytest.approx(traced.restored[j].mean().item())
    by_prompt = traced.samples.mean((2, 3))
    assert torch.allclose(traced.interval, t_interval(by_prompt), rtol=1e-12)
    assert (traced.low <= traced.effects + 1e-12).all() and (
        traced.effects <= traced.high + 1e-12
    ).all()
    own = loco.generate(tiny_sd, STYLE.prompts, **FAST)
    assert (traced.images[0, :, 0] - own).abs().max() <= 1e-4 + 0.5 / 255
    for p, prompt in enumerate(STYLE.prompts):
        assert torch.allclose(
            clip_based(traced.images[0, p, 0], [prompt] * 2).double(), traced.clean[p], atol=1e-4
        )
        assert torch.allclose(
            clip_based(traced.images[4, p, 1], [prompt] * 2).double(), traced.restored[2, p, 1],
            atol=1e-4,
        )  # fmt: skip


def test_without_a_threshold_the_causal_sites_are_those_that_the_test_finds(traced):
    sites, seen = 4, torch.Generator().manual_seed(0)
    planted = torch.zeros(sites, 8, 2, 1, dtype=torch.float64)
    planted[1] = 2.0
    planted += 0.1 * torch.randn(planted.shape, generator=seen, dtype=torch.float64)
    reference = torch.randn(8, 2, 1, generator=seen, dtype=torch.float64)
    one = dataclasses.replace(traced, scored=planted + reference, reference=reference)
    by_prompt = planted.mean((2, 3))
    assert torch.allclose(one.test.p, max_t(by_prompt).p)
    assert one.causal() == (traced.sites[1],) and one.test.verdict == "found"
    # by brute force: all sign flips of the prompts at once, the largest of all sites
    flips = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * 8)
    largest = (flips @ by_prompt.T).amax(1)
    p = (largest >= by_prompt.sum(1)[1] - 1e-9).double().mean()
    assert one.test.p[1].item() == pytest.approx(p.item()) and p < 0.05
    silent = dataclasses.replace(one, scored=planted[[0, 2, 3, 3]] + reference)
    assert silent.causal() == () and silent.test.verdict == "none"
    assert silent.causal(-1.0) == traced.sites


def test_causal_sites_reach_the_threshold(traced):
    threshold = traced.effects.sort().values[-2].item()
    best = set(traced.effects.argsort()[-2:].tolist())
    assert traced.causal(threshold) == tuple(s for i, s in enumerate(traced.sites) if i in best)
    assert traced.causal(1e9) == ()


def test_the_threshold_is_a_share_of_what_the_noise_took(traced):
    low = dataclasses.replace(traced, goal=traced.corrupted + 4.0)
    high = dataclasses.replace(traced, goal=traced.corrupted + 8.0)
    assert threshold_from([low, high], 0.5) == pytest.approx(3.0)
    assert threshold_from(low) == pytest.approx(threshold_from([low], 0.2)) == pytest.approx(0.8)
    flat = dataclasses.replace(traced, goal=traced.corrupted)
    for bad, fraction, reason in (
        ([], 0.2, "no validation trace"), ([low], 0, "fraction 0"), ([low], 1.5, "fraction 1.5"),
        ([flat], 0.2, "the noise took nothing"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            threshold_from(bad, fraction)


def test_noise_that_takes_nothing_is_warned_of(tiny_sd):
    with pytest.warns(UserWarning, match="the noise took nothing of 'Van Gogh'.*more noise="):
        same = dict(score=lambda images, prompts: torch.ones(len(images)))
        loco.trace(tiny_sd, TREE, "text_encoder", seeds=[0], steps=1, **same)


def test_its_table_has_a_row_per_site(traced):
    frame = traced.to_frame()
    assert list(frame) == ["site", "kind", "token", "effect", "low", "high", "p", "score"]
    assert len(frame) == len(traced.sites) == 4
    assert frame["effect"].tolist() == traced.effects.tolist()


def test_a_trace_comes_back_equal_and_unlike_another(traced, tmp_path):
    for name, each in {"with": traced, "without": dataclasses.replace(traced, pixels=None)}.items():
        each.save(tmp_path / name)
        again = loco.CausalTrace.load(tmp_path / name)
        assert again == each and again.sites == each.sites
        assert again.to_frame().equals(each.to_frame())
    other = traced.restored.clone()
    other[3, 0, 0, 0] += 1e-9
    assert dataclasses.replace(traced, scored=other) != traced and traced != 3
    assert torch.equal(loco.CausalTrace.load(tmp_path / "with").images[:], traced.images[:])


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_trace_is_refused_by_name(traced, tmp_path, damage):
    traced.save(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-1])
    elif damage == "flipped":
        path.write_bytes(whole.replace(b"Van Gogh", b"van Gogh", 1))
    else:
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="causal_trace.*(damaged|missing)"):
        loco.CausalTrace.load(tmp_path)


def test_it_knows_how_it_was_made(tiny_sd, traced):
    made = traced.provenance
    assert made.fingerprint == records.provenance(tiny_sd).fingerprint
    wanted = {"where": "text_encoder", "noise": [2.0], "draws": 2, "seeds": [0, 3], "steps": 2}
    assert (wanted | {"restore_steps": None, "guidance": 7.5}).items() <= made.settings.items()


def test_a_killed_trace_goes_on_with_the_same_result(
    tiny_sd, traced, clip_based, tmp_path, monkeypatch
):
    seen = []

    def dies(model, batch, *args):
        seen.extend(batch)
        if len(seen) > 2 * RUN["batch_size"]:  # the third batch
            raise KeyboardInterrupt
        return paint_batch(model, batch, *args)

    run = dict(score=clip_based, folder=tmp_path, **RUN)
    monkeypatch.setattr(brush, "paint_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        loco.trace(tiny_sd, STYLE, "text_encoder", **run)
    kept = len(list(tmp_path.glob("??/*.png")))
    assert 0 < kept < len(seen)
    batches_after = painted(monkeypatch)
    assert loco.trace(tiny_sd, STYLE, "text_encoder", **run) == traced
    again, whole = sum(map(len, batches_after)), len(list(Store(tmp_path).entries()))
    assert again == whole - kept > 0  # what was there was not painted again
    batches_after.clear()
    other = loco.trace(tiny_sd, STYLE, "text_encoder", **run | {"score": bright})
    assert not batches_after and torch.equal(other.images[:], traced.images[:])  # scored again
    softer = loco.trace(tiny_sd, STYLE, "text_encoder", **run | {"noise": 1.0})  # beside it
    assert softer.provenance.settings["noise"] == [1.0]
    assert not torch.equal(softer.corrupted, traced.corrupted)
    assert torch.equal(softer.clean, traced.clean)  # read: its clean runs are the same pictures
    assert not {p for batch in batches_after for p in batch if p.noise is None}


def test_without_images_a_trace_keeps_none(tiny_sd, tmp_path, monkeypatch):
    seen = painted(monkeypatch)
    bare = loco.trace(tiny_sd, TREE, "text_encoder", score=bright, **FAST | {"steps": 1})
    assert seen and bare.pixels is None and torch.isfinite(bare.restored).all()
    with pytest.raises(ValueError, match="not kept: paint again with images=True"):
        _ = bare.images
    bare.save(tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 20_000  # numbers alone


# --- what is painted


def test_a_batch_never_mixes_two_clean_runs(tiny_sd, monkeypatch):
    seen = painted(monkeypatch)
    names = [site.name for site in family_of(tiny_sd).sites[20:25]]
    run = dict(sites=names, noise=2.0, score=bright, draws=2, batch_size=5, **FAST)
    loco.trace(tiny_sd, STYLE, **run)
    assert len({p.clean for batch in seen for p in batch}) == 4  # two prompts, two seeds
    for batch in seen:
        assert len({p.clean for p in batch}) == 1
        clean = donors(batch) + [p for p in batch if p == p.clean]
        assert len(clean) == 1 and len({*batch, *clean}) <= 5  # rows, the clean one included
    made = [p for batch in seen for p in batch]
    assert len(made) == len(set(made)) == 2 * 2 * (1 + 2 * (1 + len(names)))


def test_equal_text_states_are_painted_once(tiny_sd, monkeypatch):
    seen = painted(monkeypatch)
    run = dict(tokens="all", noise=2.0, score=bright, seeds=[0], steps=1)
    traced = loco.trace(tiny_sd, TREE, "text_encoder", **run)
    before = [i for i, site in enumerate(traced.sites) if site.token < -1]
    assert len(traced.sites) == 28 and len(before) == 16  # the noise does not reach them
    made = [p for batch in seen for p in batch]
    assert len(made) == len(set(made)) == 2 + 28 - 16
    assert (traced.samples[before] == 0).all()  # they have the corrupted run's own scores
    others = [i for i in range(28) if i not in before]
    assert (traced.samples[others] != 0).any()


# --- nothing is left behind, and what cannot be traced is refused


def hooks(pipe):
    return {
        f"{top}.{name}": list(part._forward_pre_hooks.items()) + list(part._forward_hooks.items())
        for top in ("unet", "text_encoder")
        for name, part in getattr(pipe, top).named_modules()
    }


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_pipeline_is_left_as_it_was(error):
    pipe, calls = build_tiny_sd(), []
    pipe.text_encoder.encoder.layers[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    scheduler, unet = pipe.scheduler, pipe.unet.mid_block
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    weights = {n: {k: v.clone() for k, v in x.state_dict().items()} for n, x in parts.items()}
    before, steps = hooks(pipe), []

    def interrupted(module, args):
        steps.append(1)
        if error is not None and len(steps) == 2:
            raise error("in the middle")

    for where, chosen in {"denoiser": ["mid_block.resnets.0"], "text_encoder": None}.items():
        handle = unet.register_forward_pre_hook(interrupted)
        steps.clear()
        with nullcontext() if error is None else pytest.raises(error, match="in the middle"):
            loco.trace(pipe, TREE, where, sites=chosen, score=bright, seeds=[0], steps=2)
        handle.remove()
        assert hooks(pipe) == before and calls and pipe.scheduler is scheduler
    for name, part in parts.items():
        assert all(torch.equal(v, weights[name][k]) for k, v in part.state_dict().items())


BAD = {
    "where": (dict(where="vae"), "where='vae': choose \"denoiser\" or \"text_encoder\""),
    "no noise": (dict(noise=0), "noise 0 corrupts nothing"),
    "negative noise": (dict(noise=-1.0), "noise -1.0 corrupts nothing"),
    "no such site": (dict(sites=["mid_block"]), "no site 'mid_block'; choose from the 70 sites"),
    "no site": (dict(sites=[]), "there is no site"),
    "late step": (dict(restore_steps=[0, 2]), r"restore_steps \[2\]: choose from the calls 0 to 1"),
    "early step": (dict(restore_steps=[-1]), r"restore_steps \[-1\]"),
    "no step": (dict(restore_steps=[]), r"restore_steps \[\]"),
    "steps of text": (dict(where="text_encoder", restore_steps=[0]), "runs once"),
    "tokens of unet": (dict(tokens="all"), "a denoiser has no tokens"),
    "other tokens": (dict(where="text_encoder", tokens="first"), 'choose "last" or "all"'),
    "window": (dict(window=71), "window 71 does not fit: 70 sites"),
    "text window": (dict(where="text_encoder", window=3), "window 3 does not fit: 2 sites"),
    "draws": (dict(draws=0), "draws 0"),
    "batch": (dict(batch_size=1), "no room for the clean run"),
    "a seed twice": (dict(seeds=[0, 0]), r"seeds \[0\] are given twice"),
    "no score": (dict(score=None), "no CLIP comes with"),
    "short score": (dict(score=lambda i, t: torch.zeros(1)), "finite numbers, one per image"),
}  # fmt: skip


@pytest.mark.parametrize("change, reason", BAD.values(), ids=BAD.keys())
def test_bad_settings_are_refused(tiny_sd, change, reason):
    settings = dict(where="denoiser", score=bright, **FAST)
    with pytest.raises(ValueError, match=reason):
        loco.trace(tiny_sd, STYLE, **settings | change)


def test_a_concept_that_the_prompt_does_not_hold_or_cuts_off_is_refused(tiny_sd):
    far = loco.Concept("star", "object", ["a " * 30 + "star"], ["a house"])
    with pytest.raises(ValueError, match="'star' is cut off"):
        loco.trace(tiny_sd, far, score=len, **FAST)
    gone = dataclasses.replace(STYLE)
    object.__setattr__(gone, "prompts", ("a house",))
    with pytest.raises(ValueError, match="subject 'Van Gogh' is not in the prompt 'a house'"):
        loco.trace(tiny_sd, gone, score=len, **FAST)


def test_what_is_compiled_is_refused():
    pipe = build_tiny_sd()
    pipe.unet.mid_block.compile()
    with pytest.raises(ValueError, match="compiled"):
        loco.trace(pipe, STYLE, score=len, **FAST)
    pipe.text_encoder = torch.compile(build_tiny_sd().text_encoder)
    with pytest.raises(ValueError, match="compiled"):
        loco.trace(pipe, STYLE, "text_encoder", score=len, **FAST)


# --- the figures


def test_a_trace_of_text_is_drawn_as_a_map_and_one_of_a_denoiser_as_bars(tiny_sd):
    run = dict(score=bright, seeds=[0], steps=1)
    traced = loco.trace(tiny_sd, STYLE, "text_encoder", tokens="all", **run)
    figure = effect_figure(traced, threshold=0.1)
    maps = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in maps] == ["self-attention", "MLP"]
    assert maps[-1].get_xlabel().startswith("token")
    drawn = maps[1].collections[0].get_array().reshape(2, 10)
    mlp = [i for i, site in enumerate(traced.sites) if site.kind == "MLP"]
    assert drawn.flatten().tolist() == pytest.approx(traced.effects[mlp].tolist())
    first = [site.name for site in family_of(tiny_sd).sites[:6]]
    bars = loco.trace(tiny_sd, TREE, sites=first, **run)
    figure = effect_figure(bars, threshold=0.5)
    (axis,) = figure.axes
    heights = [
        bar.get_height() for group in axis.containers for bar in getattr(group, "patches", [])
    ]
    assert sorted(heights) == pytest.approx(sorted(bars.effects.tolist()))
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {
        "ResNet",
        "self-attention",
    }


def test_unet_is_another_word_for_denoiser(tiny_sd):
    run = dict(sites=["mid_block.resnets.0"], score=bright, seeds=[0], steps=1)
    traced = loco.trace(tiny_sd, TREE, "unet", **run)
    assert traced.where == "denoiser" and traced == loco.trace(tiny_sd, TREE, **run)


def test_a_site_knows_its_label():
    assert Site("mid_block.resnets.0", "ResNet").label == "mid_block.resnets.0"
    assert Site("text_encoder.encoder.layers.0.mlp", "MLP", 1).label.endswith("mlp @1")
