"""CLIP-Score against transformers' own formula, with any CLIPModel."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import build_tiny_clip, build_tiny_sd
from PIL import Image
from transformers import CLIPImageProcessorPil

import loco_core as loco
from loco_core import zoo
from loco_core.judging.clip_score import Clip, clip_for, load_clip

TEXTS = ["a house by Van Gogh", "a red tree", "a dog"]


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return Clip(*tiny_clip)


@pytest.fixture(scope="module")
def images():
    """Images on the 8-bit grid, of the size the tiny CLIP reads."""
    levels = torch.randint(256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return levels / 255


def processor(clip, size):
    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=size, image_mean=clip.mean, image_std=clip.std
    )


@torch.no_grad()
def by_transformers(images, texts, clip):
    """logits_per_image / exp(logit_scale) * 100 in float64, images by way of PIL."""
    model = build_tiny_clip()[0].double()
    as_pil = [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    pixels = processor(clip, 16)(as_pil, return_tensors="np")["pixel_values"]
    found = []
    for image, text in zip(pixels, texts, strict=True):
        ids = clip.tokenizer(text, return_tensors="pt").input_ids
        out = model(input_ids=ids, pixel_values=torch.from_numpy(np.array(image))[None].double())
        found.append(out.logits_per_image[0, 0] / model.logit_scale.exp() * 100)
    return torch.stack(found)


def test_scores_are_100_times_the_cosine_of_transformers(images, clip):
    found = loco.clip_score(images, TEXTS, clip)
    assert found.shape == (3,) and found.dtype == torch.float32
    assert torch.allclose(found.double(), by_transformers(images, TEXTS, clip), atol=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (8, 8)])
def test_images_of_any_size_are_resized_as_transformers_does(clip, size):
    smooth = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.interpolate(smooth, size, mode="bilinear").mul(255).round() / 255
    found = loco.clip_score(images, TEXTS, clip)
    # PIL resizes on the 8-bit grid, torch on the real line
    assert torch.allclose(found.double(), by_transformers(images, TEXTS, clip), atol=0.2)


def test_the_batch_size_does_not_matter(images, clip):
    whole = loco.clip_score(images, TEXTS, clip)
    assert torch.allclose(whole, loco.clip_score(images, TEXTS, clip, batch_size=2), atol=1e-4)


@pytest.mark.parametrize("change, reason", [
    (dict(images=torch.zeros(3, 16, 16)), "n, 3, H, W"),
    (dict(images=torch.zeros(3, 3, 16, 16, dtype=torch.uint8)), "uint8"),
    (dict(images=torch.full((3, 3, 16, 16), 2.0)), r"\[0, 1\].*to 2"),
    (dict(images=torch.full((3, 3, 16, 16), float("nan"))), "nan"),
    (dict(texts=["a house"]), "3 images need as many texts"),
    (dict(texts="abc"), "3 images need as many texts"),
])  # fmt: skip
def test_bad_images_and_texts_are_refused(images, clip, change, reason):
    with pytest.raises(ValueError, match=reason):
        loco.clip_score(**dict(images=images, texts=TEXTS, clip=clip) | change)


@pytest.fixture
def home(tmp_path, clip):
    """A folder of minis: `tiny/` and, shared, `shared/clip/`."""
    build_tiny_sd().save_pretrained(tmp_path / "tiny")
    clip.model.save_pretrained(tmp_path / "shared" / "clip")
    clip.tokenizer.save_pretrained(tmp_path / "shared" / "clip")
    return tmp_path


def test_a_mini_brings_the_clip_beside_it(home, images, clip):
    wanted = loco.clip_score(images, TEXTS, clip)
    for model in (home / "tiny", zoo.load(home / "tiny")):
        assert torch.equal(loco.clip_score(images, TEXTS, clip_for(model)), wanted)


def test_the_folders_own_pixel_statistics_are_used(home, clip):
    other = Clip(*build_tiny_clip(), mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 0.3))
    processor(other, 16).save_pretrained(home / "shared" / "clip")
    found = load_clip(home / "shared" / "clip")
    assert (found.mean, found.std) == (other.mean, other.std)


def test_a_model_without_a_clip_asks_for_one(tiny_sd, home):
    with pytest.raises(ValueError, match="no CLIP comes with StableDiffusionPipeline: name one"):
        clip_for(tiny_sd)
    with pytest.raises(ValueError, match="no CLIP comes with owner/name"):
        clip_for("owner/name")


def test_a_damaged_clip_is_refused_by_name(home):
    weights = home / "shared" / "clip" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        clip_for(home / "tiny")
    weights.write_bytes(whole[:-4] + torch.tensor(float("nan")).numpy().tobytes())
    with pytest.raises(ValueError, match="not finite"):
        clip_for(home / "tiny")


def test_a_score_for_localize_is_a_partial_of_clip_score(images, clip):
    score = partial(loco.clip_score, clip=clip)
    assert torch.equal(score(images, TEXTS), loco.clip_score(images, TEXTS, clip))
