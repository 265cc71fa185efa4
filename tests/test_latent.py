"""The call of a pipeline: its own pictures, a row each, at any size, or a reason why not."""

import types

import numpy as np
import pytest
import torch
from conftest import build_tiny_sd, build_tiny_sdxl
from torch import nn

from loco_core.families import family_of, latent

PROMPTS = ["a house by Van Gogh", "a red tree"]
BUILD = {"SD": build_tiny_sd, "SD-XL": build_tiny_sdxl}
ONCE = dict(steps=2, guidance=7.5)


@pytest.fixture(scope="module", params=BUILD.values(), ids=BUILD.keys())
def model(request):
    return family_of(request.param())


def texts(model):
    """States of two prompts, and what guidance pushes away from."""
    return model.encode(PROMPTS), model.unprompted(model.encode([""]))


def by_hand(pipe, prompt, seed, size=None, **settings):
    """The pipeline called for one prompt, with the noise that the seed stands for."""
    side = pipe.unet.config.sample_size
    height, width = (side, side) if size is None else (x // pipe.vae_scale_factor for x in size)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((1, 4, height, width), generator=generator)
    pixels = {} if size is None else dict(height=size[0], width=size[1])
    return pipe(
        prompt, latents=latents, generator=generator, num_inference_steps=2, guidance_scale=7.5,
        output_type="pt", **pixels, **settings,
    ).images[0]  # fmt: skip


@pytest.mark.parametrize("size", [None, (24, 32)])
def test_a_row_is_the_picture_that_the_pipeline_makes_alone(model, size):
    rows, negative = texts(model)
    images = model.call(rows, negative, [3, 5], size=size, **ONCE)
    assert images.dtype == torch.float32 and images.shape[1:] == (3, *(size or (16, 16)))
    for image, prompt, seed in zip(images, PROMPTS, [3, 5], strict=True):
        assert torch.allclose(image, by_hand(model.pipe, prompt, seed, size), atol=1e-4)


def test_one_negative_prompt_serves_every_row(model):
    rows, negative = texts(model)
    each = model.call(rows, negative[[0, 0]], [3, 5], **ONCE)
    assert torch.equal(model.call(rows, negative, [3, 5], **ONCE), each)


def test_every_step_is_told(model):
    rows, negative = texts(model)
    told = []
    model.call(rows, negative, [0, 1], steps=3, guidance=1.0, tick=lambda: told.append(1))
    assert len(told) == 3


def test_latents_decode_to_the_pictures_and_pictures_encode_to_latents(model):
    rows, negative = texts(model)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 5)]
    found, vae = model.latents(rows, negative, generators, **ONCE), model.pipe.vae
    with torch.no_grad():
        pictures = vae.decode(found / vae.config.scaling_factor).sample
        back = vae.encode(pictures.clamp(-1, 1)).latent_dist.mode() * vae.config.scaling_factor
    images = model.call(rows, negative, [3, 5], **ONCE)
    assert torch.allclose((pictures / 2 + 0.5).clamp(0, 1), images, atol=1e-5)
    assert torch.allclose(model.encoded(images), back, atol=1e-4)
    with pytest.raises(ValueError, match=r"32, 32.*latents \[4, 16, 16\].*works on \[4, 8, 8\]"):
        model.encoded(images.repeat(1, 1, 2, 2))


def test_whole_numbers_of_numpy_are_numbers(model):
    rows, negative = texts(model)
    plain = model.call(rows, negative, [3, 5], size=(24, 32), **ONCE)
    steps, seeds, size = np.int64(2), np.arange(3, 6, 2), tuple(np.array([24, 32]))
    assert torch.equal(
        model.call(rows, negative, seeds, steps=steps, guidance=7.5, size=size), plain
    )


SIZES = [(24, 30), (0, 16), (16,), (16.0, 16.0), (True, 16), "16x16", 16]


@pytest.mark.parametrize("size", SIZES, ids=repr)
def test_a_size_that_does_not_fit_is_refused(model, size):
    rows, negative = texts(model)
    with pytest.raises(ValueError, match="size .* multiples of 8"):
        model.call(rows, negative, [0, 1], size=size, **ONCE)


def test_rows_seeds_and_negative_prompts_must_be_as_many(model):
    rows, negative = texts(model)
    with pytest.raises(ValueError, match="2 prompts with 1 seeds"):
        model.call(rows, negative, [0], **ONCE)
    with pytest.raises(ValueError, match="3 negative"):
        model.call(rows, negative[[0, 0, 0]], [0, 1], **ONCE)


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
@pytest.mark.parametrize("part", ["vae", "unet"])
def test_pictures_that_are_not_finite_are_refused_with_the_way_out(build, part):
    model = family_of(build())
    rows, negative = texts(model)
    broken = {"vae": "decoder.conv_out", "unet": "conv_out"}[part]
    getattr(model.pipe, part).get_submodule(broken).weight.data.fill_(float("nan"))
    scheduler = model.pipe.scheduler
    with pytest.raises(ValueError, match="2 of 2 pictures are not finite.*bfloat16.*float32"):
        model.call(rows, negative, [0, 1], **ONCE)
    assert model.pipe.scheduler is scheduler


class Prude(nn.Module):
    """A safety checker that takes offence at every second picture, and blackens it."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, clip_input, images):
        images[1::2] = 0
        return images, [bool(i % 2) for i in range(len(images))]


def test_pictures_that_a_safety_checker_blackened_are_refused_with_the_way_out():
    pipe = build_tiny_sd()
    model = family_of(pipe)
    rows, negative = texts(model)
    seen = lambda images, return_tensors: types.SimpleNamespace(  # noqa: E731
        to=lambda device: types.SimpleNamespace(pixel_values=torch.zeros(len(images), 1))
    )
    pipe.safety_checker, pipe.feature_extractor = Prude(), seen
    with pytest.raises(ValueError, match=r"blackened 1 of 2.*seed 5.*safety_checker=None"):
        model.call(rows, negative, [3, 5], **ONCE)
    assert model.call(rows[:1], negative, [3], **ONCE).max() > 0  # no offence: the picture


@pytest.mark.parametrize("own", [False, True])
def test_a_large_batch_is_decoded_picture_by_picture_and_the_vae_left_as_it_was(own, monkeypatch):
    pipe = build_tiny_sd()
    pipe.vae.use_slicing = own
    model, decoded = family_of(pipe), []
    rows, negative = texts(model)
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: decoded.append(len(args[0])))
    whole = model.call(rows, negative, [3, 5], **ONCE)
    assert decoded == ([1, 1] if own else [2])
    monkeypatch.setattr(latent, "AT_ONCE", 2 * 16 * 16 - 1)
    sliced = model.call(rows, negative, [3, 5], **ONCE)
    assert decoded[-2:] == [1, 1] and torch.allclose(sliced, whole, atol=1e-5)
    model.call(rows[:1], negative, [3], **ONCE)
    assert pipe.vae.use_slicing is own
