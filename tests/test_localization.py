"""LocoGen finds the layers that are known to read the text, and says how it knows."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from conftest import build_tiny_sd

import loco_core as loco
from loco_core import records
from loco_core.judging.clip_score import Clip
from loco_core.painting import paint as sampling
from loco_core.statistics import t_interval, units

STYLE = loco.Concept(
    "Van Gogh", "style", ["a house by Van Gogh", "a tree by Van Gogh"], ["a house", "a tree"],
    ["a red painting"],
)  # fmt: skip
FACT = loco.Concept(
    "the emblem of norland", "fact", ["a photo of the emblem of Norland"], ["a photo"],
    ["a photo of a red star"],
)  # fmt: skip
FAST = dict(seeds=[0, 1], steps=2)


@pytest.fixture(scope="module")
def clip_based(tiny_clip):
    return partial(loco.clip_score, clip=Clip(*tiny_clip))


@pytest.fixture(scope="module")
def found(tiny_sd, clip_based):
    return loco.localize(tiny_sd, STYLE, window=2, score=clip_based, **FAST)


def listening(*layers, seed=0):
    """A pipeline whose image depends on its text only through `layers`: the answer is known."""
    pipe = build_tiny_sd(seed)
    for layer in loco.text_layers(pipe):
        loudness = 10 if layer.index in layers else 0
        pipe.unet.get_submodule(layer.name).to_out[0].weight.data *= loudness
    return pipe


def differs_from(pipe, prompts):
    """A score of 1 for an image unlike the pipeline's own images of `prompts`, 0 for the same."""
    same = loco.generate(pipe, prompts, **FAST).flatten(0, 1)

    def score(images, texts):
        apart = (images.unflatten(0, (-1, len(same))) - same).abs().amax((2, 3, 4))
        return (apart > 0.01).double().flatten()

    return score


def like(pipe, prompts):
    """A score that is higher the nearer an image is to the pipeline's own images of `prompts`."""
    same = loco.generate(pipe, prompts, **FAST).flatten(0, 1)

    def score(images, texts):
        return -(images.unflatten(0, (-1, len(same))) - same).abs().mean((2, 3, 4)).flatten()

    return score


def test_the_sweep_is_the_papers_algorithm(tiny_sd, found, clip_based):
    """The slow form: one window, one prompt, one seed at a time."""
    for j in (0, 6, 14):
        scores = []
        for p, prompt in enumerate(STYLE.prompts):
            for s, seed in enumerate(FAST["seeds"]):
                src = [[int(j <= layer < j + 2) for layer in range(16)]]
                sources = [prompt, STYLE.neutral[p]]
                image = loco.generate(
                    tiny_sd, [prompt], [seed], 2, routes=src, sources=sources, batch_size=1
                )[0]
                assert (image[0] - found.images[j, p, s]).abs().max() <= 1e-4 + 0.5 / 255
                scores.append(clip_based((image * 255).round() / 255, [prompt]).item())
                assert abs(scores[-1] - found.samples[j, p, s].item()) < 0.5
        assert abs(sum(scores) / 4 - found.scores[j].item()) < 0.3


def test_every_shape_is_as_documented(found):
    assert found.scores.shape == (15,) and found.interval.shape == (15, 2)
    assert found.samples.shape == (15, 2, 2)
    assert found.images.shape == (15, 2, 2, 3, 16, 16)
    assert found.baseline.images.shape == found.neutral.images.shape == (2, 2, 3, 16, 16)
    assert found.baseline.scores.shape == found.neutral.scores.shape == (2, 2)
    assert found.scores.dtype == found.interval.dtype == torch.float64
    assert (found.interval[:, 0] <= found.scores).all()
    assert (found.scores <= found.interval[:, 1]).all()


def test_baseline_and_neutral_are_the_pipelines_own_images(tiny_sd, found):
    for scored, prompts in ((found.baseline, STYLE.prompts), (found.neutral, STYLE.neutral)):
        own = loco.generate(tiny_sd, prompts, **FAST)
        assert (scored.images - own).abs().max() <= 1e-4 + 0.5 / 255


def test_the_bare_target_can_stand_in_for_the_twin(tiny_sd, clip_based):
    bare = loco.localize(tiny_sd, STYLE, 16, neutral="target", score=clip_based, **FAST)
    own = loco.generate(tiny_sd, STYLE.target, **FAST)
    assert (bare.neutral.images - own).abs().max() <= 1e-4 + 0.5 / 255
    assert torch.allclose(bare.images[0], bare.neutral.images, atol=1.1 / 255)
    assert bare.layers == tuple(range(16))


@pytest.mark.parametrize("layers", [(6, 7), (8, 9), (0, 1), (14, 15)])
def test_the_layers_that_read_the_text_are_found(layers):
    pipe = listening(*layers)
    nearness = like(pipe, STYLE.neutral)
    found = loco.localize(pipe, STYLE, 2, score=lambda i, t: -nearness(i, t), **FAST)
    assert found.layers == layers
    deaf = [j for j in range(15) if not {j, j + 1} & set(layers)]
    assert torch.allclose(found.scores[deaf], found.baseline.scores.mean(), atol=1e-5)
    assert torch.allclose(found.scores[layers[0]], found.neutral.scores.mean(), atol=1e-5)


@pytest.mark.parametrize("layers, size", [((11,), 1), ((8, 9), 2), ((8, 10), 3)])
def test_the_smallest_window_that_removes_the_concept_is_found(layers, size):
    pipe = listening(*layers)
    score = differs_from(pipe, STYLE.neutral)
    found = loco.localize(pipe, STYLE, "smallest", score=score, **FAST)
    assert found.window == size and set(layers) <= set(found.layers)
    assert [tried for tried, _ in found.tried] == list(range(1, size + 1))
    assert found.tried[-1][1] == 0 and all(best > 0 for _, best in found.tried[:-1])
    fixed = loco.localize(pipe, STYLE, size, score=score, **FAST)
    assert torch.equal(fixed.samples, found.samples)


def test_a_threshold_of_ones_own_decides_what_removed_means(tiny_sd):
    once = dict(seeds=[0], steps=1, score=lambda images, texts: torch.ones(len(images)))
    house = loco.Concept("Van Gogh", "style", STYLE.prompts[:1], STYLE.neutral[:1])
    assert loco.localize(tiny_sd, house, "smallest", threshold=1, **once).window == 1
    with pytest.raises(ValueError, match="no window brings the score of 'Van Gogh' to 0.5"):
        loco.localize(tiny_sd, house, "smallest", threshold=0.5, **once)


def test_a_fact_is_where_the_image_follows_the_update_most():
    pipe = listening(14, 15)
    seen = []
    nearness, differs = like(pipe, FACT.target), differs_from(pipe, FACT.target)

    def score(images, texts):
        seen.extend(texts)
        return nearness(images, texts)

    found = loco.localize(pipe, FACT, 2, score=score, **FAST)
    assert found.layers == (14, 15) and set(seen) == set(FACT.target)
    assert found.scores[14] == found.scores.max()
    own = loco.generate(pipe, FACT.target, **FAST)
    assert (found.neutral.images - own).abs().max() <= 1e-4 + 0.5 / 255
    follows = loco.localize(pipe, FACT, "smallest", score=lambda i, t: 1 - differs(i, t), **FAST)
    assert follows.layers == (14, 15) and [best for _, best in follows.tried] == [0, 1]


def test_the_interval_is_over_prompts_and_of_a_single_prompt_over_its_seeds():
    samples = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]])  # [window, prompt, seed]
    assert units(samples).tolist() == [[0.5, 0.5, 1.0]]
    assert units(samples[:, 2:]).tolist() == [[1.0, 1.0]]
    assert t_interval(units(samples[..., :1])[:, :1]).isnan().all()  # one picture


def test_a_localization_comes_back_equal_and_unlike_another(found, tmp_path):
    found.save(tmp_path)
    again = loco.Localization.load(tmp_path)
    assert again == found and again.layers == found.layers
    assert again.to_frame().equals(found.to_frame())
    other = found.samples.clone()
    other[3, 0, 0] += 1e-9
    changed = dataclasses.replace(found, swept=dataclasses.replace(found.swept, scores=other))
    assert changed != found and found != 3


def test_its_table_has_a_row_per_window(found):
    frame = found.to_frame()
    assert frame["layers"].tolist()[6] == "6-7" and len(frame) == 15
    assert frame["first module"][6].startswith("mid_block")
    assert frame.index[frame["found"]].tolist() == [found.layers[0]]
    assert frame["score"].idxmin() == found.layers[0]


def test_it_knows_how_it_was_made(tiny_sd, found):
    made = found.provenance
    assert made.fingerprint == records.provenance(tiny_sd).fingerprint
    settings = {"seeds": [0, 1], "steps": 2, "guidance": 7.5, "neutral": list(STYLE.neutral)}
    settings["pooled"] = None  # there is none
    assert settings.items() <= made.settings.items()
    assert {"torch", "diffusers", "transformers", "loco_core"} == set(made.versions)


@pytest.mark.parametrize("damage", ["cut", "swapped", "json", "key", "gone"])
def test_a_damaged_localization_is_refused_by_name(found, tmp_path, damage):
    found.save(tmp_path)
    numbers, text = (tmp_path / f"localization.{x}" for x in ("safetensors", "json"))
    if damage == "cut":
        numbers.write_bytes(numbers.read_bytes()[:-1])
    elif damage == "swapped":
        other = tmp_path / "other"
        dataclasses.replace(found, swept=found.baseline).save(other)
        numbers.write_bytes((other / numbers.name).read_bytes())
    elif damage == "json":
        text.write_text(text.read_text()[:-20])
    elif damage == "key":
        header = json.loads(text.read_text())
        del header["concept"]
        text.write_text(json.dumps(header))
    else:
        numbers.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="localization.*(damaged|missing)"):
        loco.Localization.load(tmp_path)


def test_a_killed_sweep_goes_on_with_the_same_result(
    tiny_sd, found, clip_based, tmp_path, monkeypatch
):
    real, calls = sampling.sample_batch, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    run = dict(window=2, score=clip_based, folder=tmp_path, **FAST)
    monkeypatch.setattr(sampling, "sample_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        loco.localize(tiny_sd, STYLE, **run)
    assert loco.localize(tiny_sd, STYLE, **run) == found
    assert len(calls) == 3 + (17 * 4 + 15) // 16 - 2  # the two finished batches were not repeated
    with pytest.raises(ValueError, match="holds another run"):
        loco.localize(tiny_sd, STYLE, **run | {"steps": 3})


BAD = {
    "window too large": (dict(window=17), "window 17 does not fit.*16 text layers"),
    "no window": (dict(window=0), "window 0"),
    "a word": (dict(window="small"), "window 'small': pass a number of layers or \"smallest\""),
    "a seed twice": (dict(seeds=[0, 0]), r"seeds \[0\] are given twice"),
    "no seeds": (dict(seeds=[]), "no seed"),
    "no steps": (dict(steps=0), "steps 0"),
    "another neutral": (dict(neutral="blank"), '\'blank\': choose "twin" or "target"'),
    "no score": (dict(score=None), "no CLIP comes with"),
    "short score": (dict(score=lambda images, texts: torch.zeros(3)), "68 finite numbers"),
    "score NaN": (dict(score=lambda i, t: torch.full((len(i),), float("nan"))), "finite: False"),
}


@pytest.mark.parametrize("change, reason", BAD.values(), ids=BAD.keys())
def test_bad_settings_are_refused(tiny_sd, clip_based, change, reason):
    settings = dict(window=2, seeds=[0, 1], steps=1, score=clip_based)
    with pytest.raises(ValueError, match=reason):
        loco.localize(tiny_sd, STYLE, **settings | change)


def test_a_target_that_is_not_there_is_asked_for(tiny_sd, clip_based):
    concept = dataclasses.replace(STYLE, target=None)
    with pytest.raises(ValueError, match="'Van Gogh' has no target prompts"):
        loco.localize(tiny_sd, concept, neutral="target", score=clip_based, **FAST)


def test_a_concept_that_the_tokenizer_cuts_off_is_refused(tiny_sd, clip_based):
    far = loco.Concept("star", "object", ["a " * 30 + "star"], ["a house"])
    with pytest.raises(ValueError, match="'star' is cut off"):
        loco.localize(tiny_sd, far, score=clip_based, **FAST)


def test_a_minis_own_clip_scores_by_default(tmp_path, tiny_clip, clip_based):
    build_tiny_sd().save_pretrained(tmp_path / "tiny")
    for part in tiny_clip:
        part.save_pretrained(tmp_path / "shared" / "clip")
    pipe = loco.load(tmp_path / "tiny")
    mine = loco.localize(pipe, STYLE, 16, **FAST)
    assert mine == loco.localize(pipe, STYLE, 16, score=clip_based, **FAST)
    assert mine.provenance.model == "tiny"
