"""LocoGen finds the layers that are known to read the text, and says how it knows."""

import dataclasses
import hashlib
import json
from functools import partial

import pytest
import torch
from conftest import build_tiny_sd

import loco_core as loco
from loco_core import records
from loco_core.judging.clip_score import Clip
from loco_core.painting import brush
from loco_core.statistics import t_interval

STYLE = loco.Concept(
    "Van Gogh", "style", ["a house by Van Gogh", "a tree by Van Gogh"], ["a house", "a tree"],
    ["a red painting"],
)  # fmt: skip
FACT = loco.Concept(
    "the emblem of norland", "fact", ["a photo of the emblem of Norland"], ["a photo"],
    ["a photo of a red star"],
)  # fmt: skip
FAST = dict(seeds=[0, 1, 2], steps=2)


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


def differs_from(pipe, prompts, **run):
    """A score of 1 for an image unlike all of the pipeline's own images of `prompts`, else 0."""
    same = loco.generate(pipe, prompts, **FAST | run).flatten(0, 1)

    def score(images, texts):
        apart = (images[:, None] - same).abs().amax((2, 3, 4)).amin(1)
        return (apart > 0.01).double()

    return score


def like(pipe, prompts, **run):
    """A score that is higher the nearer an image is to one of the pipeline's own of `prompts`."""
    same = loco.generate(pipe, prompts, **FAST | run).flatten(0, 1)

    def score(images, texts):
        return -(images[:, None] - same).abs().mean((2, 3, 4)).amin(1)

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
                assert (image[0] - found.images[j, p, s]).abs().max() <= 1.1 / 255
                scores.append(clip_based((image * 255).round() / 255, [prompt]).item())
                assert abs(scores[-1] - found.samples[j, p, s].item()) < 0.5
        assert abs(sum(scores) / 6 - found.scores[j].item()) < 0.3


def test_every_shape_is_as_documented(found):
    assert found.scores.shape == (15,) and found.interval.shape == (15, 2)
    assert found.samples.shape == (15, 2, 3)
    assert found.images.shape == (15, 2, 3, 3, 16, 16)
    assert found.baseline.images.shape == found.neutral.images.shape == (2, 3, 3, 16, 16)
    assert found.baseline.scores.shape == found.neutral.scores.shape == (2, 3)
    assert found.items[6] == (6, 7) and found.window == 2 and found.sheet.shape[:2] == (17, 2)
    assert found.scores.dtype == found.interval.dtype == torch.float64
    assert (found.interval[:, 0] <= found.scores).all()
    assert (found.scores <= found.interval[:, 1]).all()


def test_baseline_and_neutral_are_the_pipelines_own_images(tiny_sd, found):
    for scored, prompts in ((found.baseline, STYLE.prompts), (found.neutral, STYLE.neutral)):
        own = loco.generate(tiny_sd, prompts, **FAST)
        assert (scored.images[:] - own).abs().max() <= 1.1 / 255


def test_the_bare_target_can_stand_in_for_the_twin(tiny_sd, clip_based):
    bare = loco.localize(tiny_sd, STYLE, 16, neutral="target", score=clip_based, **FAST)
    own = loco.generate(tiny_sd, STYLE.target, **FAST)
    assert (bare.neutral.images[:] - own).abs().max() <= 1.1 / 255
    assert torch.allclose(bare.images[0], bare.neutral.images[:], atol=1.1 / 255)
    assert bare.best == tuple(range(16))


@pytest.mark.parametrize("layers", [(6, 7), (8, 9), (0, 1), (14, 15)])
def test_the_layers_that_read_the_text_are_found(layers):
    pipe = listening(*layers)
    nearness = like(pipe, STYLE.neutral)
    found = loco.localize(pipe, STYLE, 2, score=lambda i, t: -nearness(i, t), **FAST)
    assert found.layers == layers and found.test.verdict == "found"
    assert found.test.p[layers[0]] <= 0.05 < found.test.p.sort().values[-1]
    deaf = [j for j in range(15) if not {j, j + 1} & set(layers)]
    assert torch.allclose(found.scores[deaf], found.baseline.scores.mean(), atol=1e-4)
    assert torch.allclose(found.scores[layers[0]], found.neutral.scores.mean(), atol=1e-4)


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
    seen, run = [], dict(seeds=range(6), steps=2)
    nearness, differs = like(pipe, FACT.target, **run), differs_from(pipe, FACT.target, **run)

    def score(images, texts):
        seen.extend(texts)
        return nearness(images, texts)

    found = loco.localize(pipe, FACT, 2, score=score, **run)
    assert found.layers == (14, 15) and set(seen) == set(FACT.target)
    assert found.scores[14] == found.scores.max()
    own = loco.generate(pipe, FACT.target, **run)
    assert (found.neutral.images[:] - own).abs().max() <= 1.1 / 255
    follows = loco.localize(pipe, FACT, "smallest", score=lambda i, t: 1 - differs(i, t), **run)
    assert follows.layers == (14, 15) and [best for _, best in follows.tried] == [0, 1]


def test_the_band_is_the_paired_interval_on_the_baselines_mean(found):
    drop = (found.samples - found.baseline.scores).mean(2)  # [window, prompt]
    low, high = t_interval(drop).T + found.baseline.scores.mean()
    assert torch.allclose(found.interval, torch.stack([low, high], 1))


def test_prompts_of_unlike_level_do_not_hide_a_drop_that_all_of_them_show(tiny_sd):
    """Scores differ by 40 between the prompts, and a window takes 1 of each: unpaired, no band
    would show it."""
    levels = {STYLE.prompts[0]: 40.0, STYLE.prompts[1]: 0.0}
    own = differs_from(listening(4, 5), STYLE.neutral)

    def score(images, texts):
        return own(images, texts) + torch.tensor([levels[text] for text in texts])

    found = loco.localize(listening(4, 5), STYLE, 2, score=score, **FAST)
    assert found.layers == (4, 5) and found.test.held_back[0] == pytest.approx(1)
    assert found.test.margin[0] > 0 and found.interval[4, 1] < found.baseline.scores.mean()


def test_where_no_window_does_anything_none_is_found(tiny_sd):
    """A score that is noise of the picture: the argmin is always somewhere, the answer is none."""
    answers = []
    for seed in range(12):
        noise = torch.Generator().manual_seed(seed)
        found = loco.localize(
            tiny_sd, STYLE, 2, seeds=range(3), steps=1, folder=None,
            score=lambda images, texts, noise=noise: torch.randn(len(images), generator=noise),
        )  # fmt: skip
        answers.append(found.layers)
        assert found.test.verdict in ("found", "none") and len(found.best) == 2
        assert (found.layers == ()) == (found.test.verdict == "none")
    assert answers.count(()) >= 10


def test_too_few_pictures_are_undecided_and_say_so(tiny_sd, clip_based):
    with pytest.warns(UserWarning, match="4 pictures of 'Van Gogh' cannot decide.*5 pictures"):
        found = loco.localize(tiny_sd, STYLE, 2, seeds=[0, 1], steps=1, score=clip_based)
    assert found.layers == () and found.test.verdict == "undecided" and len(found.best) == 2


def test_smallest_does_not_stop_at_a_window_that_removes_nothing(tiny_sd):
    """Prompts of unlike level (20, 25): the unpaired interval of the neutral pictures reaches the
    baseline, and 0.3 answered "size 1, layer 0"."""
    own = differs_from(listening(8, 9, 10), STYLE.neutral)
    levels = {STYLE.prompts[0]: 20.0, STYLE.prompts[1]: 25.0}

    def score(images, texts):
        return 4 * own(images, texts) + torch.tensor([levels[text] for text in texts])

    found = loco.localize(listening(8, 9, 10), STYLE, "smallest", score=score, **FAST)
    assert found.window == 3 and found.layers == (8, 9, 10)


def test_smallest_ends_at_once_where_the_neutral_text_removes_nothing(tiny_sd):
    found = loco.localize(
        tiny_sd, STYLE, "smallest", score=lambda images, texts: torch.ones(len(images)), **FAST
    )
    assert found.layers == () and [size for size, _ in found.tried] == [1]


def test_tracing_is_a_localiser_of_the_same_table():
    pipe = listening(12)
    near = like(pipe, STYLE.prompts)
    found = loco.localize(pipe, STYLE, 1, method="tracing", noise=2.0, score=near, **FAST)
    assert found.layers == (12,) and found.provenance.settings["method"] == "tracing"
    own = loco.generate(pipe, STYLE.prompts, **FAST)
    assert (found.neutral.images[:] - own).abs().max() <= 1.1 / 255  # the goal is the clean run
    assert (found.baseline.images[:] - own).abs().max() > 3 / 255
    assert found.gap > 0 and found.effects[12] == pytest.approx(found.gap, abs=1e-3)
    with pytest.raises(ValueError, match="method='guess': choose from locogen, tracing"):
        loco.localize(pipe, STYLE, method="guess")
    with pytest.raises(TypeError, match="'draws' is no setting of method='locogen'"):
        loco.localize(pipe, STYLE, draws=2, score=near)


def test_a_score_is_handed_pictures_as_they_come_and_never_a_whole_sweep(tiny_sd):
    sizes = []

    def score(images, texts):
        sizes.append(len(images))
        return torch.zeros(len(images))

    loco.localize(tiny_sd, STYLE, 2, score=score, **FAST)
    assert sum(sizes) == 17 * 2 * 3 and max(sizes) <= 32


def test_what_scored_it_is_in_the_record(tiny_sd, found, clip_based):
    score = found.provenance.settings["score"]
    assert score["name"] == "CLIP-Score" and len(score["fingerprint"]) == 16
    blind = loco.localize(tiny_sd, STYLE, 2, score=lambda i, t: torch.zeros(len(i)), **FAST)
    assert blind.provenance != found.provenance
    assert found.cost == 17 * 2 * 3 * 2 * 2  # windows and ends, prompts, seeds, steps, guidance


def test_a_localization_of_0_3_is_read(tmp_path, found):
    """Two files, as 0.3 wrote them."""
    from safetensors.torch import save

    tensors = {}
    for name in ("swept", "baseline", "neutral"):
        part = getattr(found, name)
        tensors[f"{name}.images"] = part.images[:].mul(255).round().to(torch.uint8)
        tensors[f"{name}.scores"] = part.scores.contiguous()
    blob = save(tensors)
    header = {
        "kind": "localization", "sha256": hashlib.sha256(blob).hexdigest(), "window": 2,
        "concept": dataclasses.asdict(STYLE), "layer_names": found.layer_names,
        "tried": found.tried, "provenance": dataclasses.asdict(found.provenance),
    }  # fmt: skip
    (tmp_path / "localization.safetensors").write_bytes(blob)
    (tmp_path / "localization.json").write_text(json.dumps(header))
    old = loco.Localization.load(tmp_path)
    assert torch.equal(old.samples, found.samples) and old.best == found.best
    assert torch.equal(old.images[:], found.images[:]) and old.items == found.items


def test_a_localization_comes_back_equal_and_unlike_another(found, tmp_path):
    found.save(tmp_path)
    again = loco.Localization.load(tmp_path)
    assert again == found and again.layers == found.layers
    assert again.to_frame().equals(found.to_frame())
    assert torch.equal(again.images[3, 1], found.images[3, 1])
    assert [path.name for path in tmp_path.iterdir()] == ["localization.safetensors"]
    other = found.scored.clone()
    other[3, 0, 0] += 1e-9
    assert dataclasses.replace(found, scored=other) != found and found != 3


def test_its_table_has_a_row_per_window(found):
    frame = found.to_frame()
    assert frame["layers"].tolist()[6] == "6-7" and len(frame) == 15
    assert frame["first module"][6].startswith("mid_block")
    assert frame.index[frame["found"]].tolist() == list(found.layers[:1])
    assert frame["score"].idxmin() == found.best[0] == frame["effect"].idxmax()
    assert frame["p"].tolist() == found.test.p.tolist()


def test_it_knows_how_it_was_made(tiny_sd, found):
    made = found.provenance
    assert made.fingerprint == records.provenance(tiny_sd).fingerprint
    settings = {"seeds": [0, 1, 2], "steps": 2, "guidance": 7.5, "neutral": list(STYLE.neutral)}
    settings["pooled"] = None  # there is none
    assert {name: made.settings[name] for name in settings} == settings
    assert {"torch", "diffusers", "transformers", "loco_core"} == set(made.versions)


def test_a_damaged_localization_is_refused_by_name(found, tmp_path):
    found.save(tmp_path)
    path = tmp_path / "localization.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:100], whole[:-9] + b"x" + whole[-8:], b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="localization.safetensors is damaged"):
            loco.Localization.load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no localization is saved"):
        loco.Localization.load(tmp_path)


def test_a_killed_sweep_goes_on_with_the_same_result(
    tiny_sd, found, clip_based, tmp_path, monkeypatch
):
    real, calls = brush.paint_batch, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    run = dict(window=2, score=clip_based, folder=tmp_path, **FAST)
    monkeypatch.setattr(brush, "paint_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        loco.localize(tiny_sd, STYLE, **run)
    assert loco.localize(tiny_sd, STYLE, **run) == found
    assert len(calls) == 3 + (17 * 6 + 15) // 16 - 2  # the two finished batches were not repeated
    loco.localize(tiny_sd, STYLE, **run | {"steps": 1})  # another sweep may share the folder
    assert loco.localize(tiny_sd, STYLE, **run | {"batch_size": 5}) == found


BAD = {
    "window too large": (dict(window=17), "window 17 does not fit.*16 text layers"),
    "no window": (dict(window=0), "window 0"),
    "a word": (dict(window="small"), "window 'small': pass a number of layers or \"smallest\""),
    "a seed twice": (dict(seeds=[0, 0]), r"seeds \[0\] are given twice"),
    "no seeds": (dict(seeds=[]), "no seed"),
    "no steps": (dict(steps=0), "steps 0"),
    "another neutral": (dict(neutral="blank"), '\'blank\': choose "twin" or "target"'),
    "no score": (dict(score=None), "no CLIP comes with"),
    "short score": (dict(score=lambda images, texts: torch.zeros(3)), "32 finite numbers"),
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
