"""Sampling: the pipeline's own images, row by row independent of the batch."""

import copy

import pytest
import torch
from conftest import build_tiny_sd, build_tiny_sd2
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

import loco_core as loco
from loco_core import records
from loco_core.families import family_of
from loco_core.interventions.routing import windows
from loco_core.painting import Picture, Sampling, brush
from loco_core.painting.batch import paint_batch

PROMPTS = ["a house by Van Gogh", "a red tree"]
FAST = dict(steps=3)
BYTE = 0.5 / 255 + 1e-4  # generate() rounds to the 8-bit grid
STEP = 1.1 / 255  # of the 8-bit grid


def by_hand(pipe, prompt, seed, steps=3, guidance=7.5):
    """The pipeline called for one image, with the noise that the seed stands for."""
    shape = (1, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(shape, generator=generator)
    return pipe(
        prompt, negative_prompt="", latents=latents, generator=generator,
        num_inference_steps=steps, guidance_scale=guidance, output_type="pt",
    ).images[0]  # fmt: skip


@pytest.mark.parametrize("scheduler", [
    DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
])  # fmt: skip
def test_images_are_those_of_the_pipeline_under_its_own_scheduler(scheduler):
    pipe = build_tiny_sd()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    images = loco.generate(pipe, PROMPTS, seeds=[3, 5], **FAST)
    assert images.shape == (2, 2, 3, 16, 16) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    for p, prompt in enumerate(PROMPTS):
        for s, seed in enumerate([3, 5]):
            assert torch.allclose(images[p, s], by_hand(pipe, prompt, seed), atol=BYTE)


def test_images_of_a_pipeline_that_predicts_v_are_its_own():
    pipe = build_tiny_sd2()
    images = loco.generate(pipe, PROMPTS, seeds=[3], **FAST)
    for image, prompt in zip(images[:, 0], PROMPTS, strict=True):
        assert torch.allclose(image, by_hand(pipe, prompt, 3), atol=BYTE)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    other = loco.generate(pipe, PROMPTS, seeds=[3], **FAST)
    assert (images - other).abs().max() > 1e-2  # so the prediction type was obeyed


def as_openjourney():
    """SD 1.5's network under its published scheduler, which takes a step more than asked."""
    pipe = build_tiny_sd()
    pipe.scheduler = PNDMScheduler.from_config(
        pipe.scheduler.config, skip_prk_steps=True, set_alpha_to_one=False
    )
    return pipe


@pytest.mark.parametrize("build", [build_tiny_sd2, as_openjourney], ids=["SD 2", "OpenJourney"])
def test_a_routed_batch_of_other_models_equals_one_row_at_a_time(build):
    pipe, prompts = build(), [PROMPTS[0], "a house"]
    src = torch.cat([torch.zeros(1, 16), torch.ones(1, 16), windows(16, 5)[3:6]]).long()
    run = dict(seeds=[0], steps=3, sources=prompts)
    whole = loco.generate(pipe, prompts[:1] * len(src), routes=src, **run)
    single = [loco.generate(pipe, prompts[:1], routes=row[None], **run)[0] for row in src]
    assert (whole - torch.stack(single)).abs().max() <= STEP
    for row, prompt in zip(whole[:2, 0], prompts, strict=True):
        assert torch.allclose(row, by_hand(pipe, prompt, 0), atol=BYTE)
    assert (whole[2:] - whole[0]).abs().amax((1, 2, 3, 4)).min() > 1e-4


def test_no_negative_prompt_is_the_empty_one_for_stable_diffusion(tiny_sd):
    images = [loco.generate(tiny_sd, PROMPTS, negative_prompt=n, **FAST) for n in (None, "")]
    assert torch.equal(*images)


def test_an_image_does_not_depend_on_its_batch(tiny_sd):
    whole = loco.generate(tiny_sd, PROMPTS, seeds=range(3), **FAST)
    alone = loco.generate(tiny_sd, PROMPTS[1:], seeds=[2], batch_size=1, **FAST)
    in_pairs = loco.generate(tiny_sd, PROMPTS, seeds=range(3), batch_size=2, **FAST)
    assert torch.allclose(whole[1, 2], alone[0, 0], atol=STEP)
    assert torch.allclose(whole, in_pairs, atol=STEP)
    assert (whole[0, 0] - whole[0, 1]).abs().max() > 1e-2


def test_the_same_call_gives_the_same_bits(tiny_sd):
    first, second = (loco.generate(tiny_sd, PROMPTS, seeds=[1], **FAST) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("guidance", [0, 1.0, 3.0])
def test_guidance_is_the_pipelines(tiny_sd, guidance):
    images = loco.generate(tiny_sd, PROMPTS[:1], seeds=[4], steps=3, guidance=guidance)
    wanted = by_hand(tiny_sd, PROMPTS[0], 4, guidance=guidance)
    assert torch.allclose(images[0, 0], wanted, atol=BYTE)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_a_routed_batch_equals_one_window_at_a_time(tiny_sd, guidance):
    prompts = [PROMPTS[0], "a house"]
    src = torch.cat([torch.zeros(1, 16), torch.ones(1, 16), windows(16, 2)]).long()
    settings = dict(seeds=[0], steps=4, guidance=guidance, sources=prompts)
    rows = prompts[:1] * len(src)
    whole = loco.generate(tiny_sd, rows, routes=src, batch_size=len(src), **settings)
    single = [
        loco.generate(tiny_sd, prompts[:1], routes=row[None], batch_size=1, **settings)[0]
        for row in src
    ]
    assert (whole - torch.stack(single)).abs().max() <= STEP
    plain = loco.generate(tiny_sd, prompts, [0], steps=4, guidance=guidance)
    assert torch.allclose(whole[:2], plain, atol=STEP)  # never and always replaced
    assert (whole[2:] - plain[0]).abs().amax((1, 2, 3, 4)).min() > 1e-4


def test_routes_index_the_prompts_unless_sources_are_named(tiny_sd):
    swapped = loco.generate(tiny_sd, PROMPTS, [0], routes=[[1] * 16, [0] * 16], **FAST)
    assert torch.allclose(swapped.flip(0), loco.generate(tiny_sd, PROMPTS, [0], **FAST), atol=STEP)


def test_only_the_conditional_half_is_routed(tiny_sd):
    """With the negative prompt's text in every layer, guidance has nothing to push from."""
    both = ["a house", "a red tree"]
    images = loco.generate(
        tiny_sd, both[:1], [0], routes=[[1] * 16], sources=both, negative_prompt=both[1], **FAST
    )
    unguided = loco.generate(tiny_sd, both[1:], [0], guidance=1.0, **FAST)
    assert torch.allclose(images, unguided, atol=STEP)


def test_float64_starts_from_the_same_noise(tiny_sd):
    double = build_tiny_sd().to(torch.float64)
    images = loco.generate(double, PROMPTS, [0], **FAST)
    assert images.dtype == torch.float32
    assert torch.allclose(images, loco.generate(tiny_sd, PROMPTS, [0], **FAST), atol=STEP)


def test_the_pipeline_is_left_as_it_was():
    pipe = build_tiny_sd()
    pipe.set_progress_bar_config(desc="mine")
    scheduler, state = pipe.scheduler, copy.deepcopy(vars(pipe.scheduler))
    weights = records.fingerprint(pipe.unet)
    loco.generate(pipe, PROMPTS, [0], routes=[[1] * 16] * 2, **FAST)
    assert pipe.scheduler is scheduler and records.same(vars(scheduler), state)
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert records.fingerprint(pipe.unet) == weights
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_the_pipeline_as_it_was(error):
    pipe = build_tiny_sd()
    scheduler = pipe.scheduler

    def interrupted(*args):
        raise error("in the middle")

    handle = pipe.unet.mid_block.register_forward_hook(interrupted)
    with pytest.raises(error):
        loco.generate(pipe, PROMPTS, [0], routes=[[1] * 16] * 2, **FAST)
    handle.remove()
    assert pipe.scheduler is scheduler and not hasattr(pipe, "_progress_bar_config")
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())


def test_a_subclassed_pipeline_is_called_itself(tiny_sd):
    class Dark(StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            made = super().__call__(*args, **kwargs)
            made.images = made.images / 2
            return made

    dark = Dark(**tiny_sd.components, requires_safety_checker=False)
    images = loco.generate(dark, PROMPTS, [0], **FAST)
    bright = loco.generate(tiny_sd, PROMPTS, [0], **FAST)
    assert torch.allclose(images, bright / 2, atol=STEP) and images.max() <= 0.51


def killed_after(batches, monkeypatch):
    """Let `batches` batches through, then die as if Ctrl-C was pressed."""
    real, calls = brush.paint_batch, []

    def sample(*args):
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(brush, "paint_batch", sample)
    return calls


def test_a_killed_run_goes_on_with_the_same_result(tiny_sd, tmp_path, monkeypatch):
    run = dict(seeds=range(3), batch_size=2, **FAST)
    wanted = loco.generate(tiny_sd, PROMPTS, **run)
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            loco.generate(tiny_sd, PROMPTS, folder=tmp_path, **run)
    with monkeypatch.context() as patch:
        calls = killed_after(99, patch)
        assert torch.equal(loco.generate(tiny_sd, PROMPTS, folder=tmp_path, **run), wanted)
        assert len(calls) == 1  # of three batches, two were finished
    assert not [p for p in tmp_path.glob("??/*") if p.name.startswith(".")]


@pytest.mark.parametrize("change", [
    dict(steps=2), dict(seeds=[0, 2]), dict(guidance=2.0), dict(routes=[[1] * 16] * 2),
    dict(negative_prompt="a dog"), dict(prompts=["a dog", "a cat"]), dict(eta=1.0),
], ids=lambda change: next(iter(change)))  # fmt: skip
def test_another_run_may_share_a_folder_and_gets_its_own_pictures(tiny_sd, tmp_path, change):
    run = dict(prompts=PROMPTS, seeds=[0, 1], steps=1)
    first = loco.generate(tiny_sd, **run, folder=tmp_path)
    other = loco.generate(tiny_sd, **run | change, folder=tmp_path)
    assert torch.equal(other, loco.generate(tiny_sd, **run | change))
    assert torch.equal(loco.generate(tiny_sd, **run, folder=tmp_path), first)


def test_numbers_of_numpy_are_numbers(tiny_sd):
    import numpy as np

    wanted = loco.generate(tiny_sd, PROMPTS, [3], steps=2, guidance=3.0, batch_size=1)
    asked = dict(steps=np.int64(2), guidance=np.float32(3), batch_size=np.int32(1))
    assert torch.equal(loco.generate(tiny_sd, PROMPTS, np.array([3]), **asked), wanted)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_before_rounding_a_routed_batch_is_one_row_at_a_time_to_1e_4(tiny_sd, guidance):
    model, sampling = family_of(tiny_sd), Sampling(steps=4, guidance=guidance)
    rows = [(), *[tuple(row.nonzero().flatten().tolist()) for row in windows(16, 2)]]
    listed = [Picture(PROMPTS[0], 0, tuple((k, "a house") for k in row)) for row in rows]
    whole = paint_batch(model, listed, sampling)
    single = torch.cat([paint_batch(model, [picture], sampling) for picture in listed])
    assert (whole - single).abs().max() <= 1e-4
    assert (whole[1:] - whole[0]).abs().amax((1, 2, 3)).min() > 1e-4


BAD = {
    "no prompts": (dict(prompts=[]), "list of prompts is empty"),
    "a bare string": (dict(prompts="a house"), "must be a list"),
    "a seed twice": (dict(seeds=[1, 2, 1]), r"seeds \[1\] are given twice"),
    "no seeds": (dict(seeds=[]), "no seed is given"),
    "a broken seed": (dict(seeds=[0.5]), "seed 0.5"),
    "a seed below zero": (dict(seeds=[-1]), "seed -1"),
    "no steps": (dict(steps=0), "steps 0 is not a whole number from 1 to 1000"),
    "too many steps": (dict(steps=1001), "steps 1001"),
    "broken steps": (dict(steps=2.5), "steps 2.5"),
    "guidance below zero": (dict(guidance=-1), "guidance -1"),
    "guidance is no number": (dict(guidance=float("nan")), "guidance nan"),
    "no batch": (dict(batch_size=0), "batch_size 0"),
    "rows of routes": (dict(routes=[[0] * 16]), "routes has 1 rows for 2 prompts"),
    "layers of routes": (dict(routes=[[0] * 3] * 2), "16 layers"),
}


@pytest.mark.parametrize("change, reason", BAD.values(), ids=BAD.keys())
def test_bad_settings_are_refused(tiny_sd, change, reason):
    with pytest.raises(ValueError, match=reason):
        loco.generate(tiny_sd, **dict(prompts=PROMPTS, seeds=[0], steps=1) | change)
