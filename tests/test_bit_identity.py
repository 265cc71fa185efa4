"""Pictures are those of version 0.3, bit for bit: hashes were taken before anything was rebuilt.

In float64 the last bits, which differ from CPU to CPU, are far below a step of the 8-bit grid.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import loco_core as loco

RECORDED = json.loads((Path(__file__).parent / "data" / "pictures_0_3.json").read_text())


def sha(images) -> str:
    pixels = images[:].mul(255).round().to(torch.uint8).contiguous()
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def of_localize(model: str, kind: str, name: str, pooled: str) -> None:
    pipe = loco.load(model, dtype=torch.float64)
    concept = loco.shapeland.concept(kind, name, prompts=2)
    with pytest.warns(UserWarning, match="4 pictures"):
        found = loco.localize(pipe, concept, 2, seeds=[0, 3], steps=3, pooled=pooled)
    wanted = RECORDED[f"localize {model} {kind}:{name} {pooled}"]
    assert sha(found.sheet) == wanted["pictures"]
    scores = torch.cat([found.baseline.scores[None], found.neutral.scores[None], found.samples])
    assert scores.flatten(1).mean(1).tolist() == pytest.approx(wanted["scores"], abs=2e-4)


def of_trace(model: str, where: str, tokens: str, **run) -> None:
    pipe = loco.load(model, dtype=torch.float64)
    concept = loco.shapeland.concept("object", "star", prompts=2)
    traced = loco.trace(
        pipe, concept, where, seeds=[0], steps=2, tokens=tokens, images=True, **run
    )  # fmt: skip
    wanted = RECORDED[f"trace {model} {where} {tokens}"]
    assert sha(traced.images) == wanted["pictures"]
    assert traced.effects.tolist() == pytest.approx(wanted["effects"], abs=2e-4)


def test_a_sweep_of_a_style_paints_the_pictures_of_0_3():
    of_localize("mini-sd", "style", "Mira Holt", "keep")


def test_a_trace_of_the_denoiser_paints_the_pictures_of_0_3():
    of_trace("mini-sd", "unet", "last")


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    ("mini-sd", "object", "star", "keep"), ("mini-sdxl", "style", "Mira Holt", "keep"),
    ("mini-sdxl", "style", "Mira Holt", "swap"),
], ids=" ".join)  # fmt: skip
def test_every_recorded_sweep_paints_the_pictures_of_0_3(case):
    of_localize(*case)


@pytest.mark.slow
def test_every_recorded_trace_paints_the_pictures_of_0_3():
    of_trace("mini-sd", "text_encoder", "all", draws=2)
    of_trace("mini-sdxl", "text_encoder", "all", draws=2)
    names = [site.name for site in loco.family_of(loco.load("mini-sdxl")).sites][::9]
    of_trace("mini-sdxl", "unet", "last", sites=names)
