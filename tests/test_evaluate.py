"""An evaluation tells what an edit did from what was so without it, elsewhere, or by chance."""

import dataclasses
import itertools

import pytest
import torch
from conftest import build_tiny_sd

import loco_core as loco
from loco_core import records
from loco_core.closed_form.rivals import ELSEWHERE, relocated, rivals
from loco_core.concepts import mentions, with_name
from loco_core.edits.weights import projections
from loco_core.judging.clip_score import Clip
from loco_core.judging.probes import Probe, misspellings, probes_of
from loco_core.statistics import wilson
from loco_core.studies import evaluate
from loco_core.worlds.shapeland.vocabulary import ATTRIBUTES, Scene, describe, is_held_out

MIRA = loco.shapeland.concept("style", "Mira Holt", 12)
STYLE = loco.Concept("Van Gogh", "style", ["a house by Van Gogh"], ["a house"], ["a painting"])
PRESERVE = [
    loco.shapeland.caption(style=artist, object=thing, color=color)
    for artist, thing, color in zip(
        ATTRIBUTES["style"][1:], ATTRIBUTES["object"], ATTRIBUTES["color"], strict=False
    )
]
SHOWN = ("style", "object", "color", "place")
FAST = dict(seeds=[0], steps=1)
TWO = (
    Probe("a red star by Van Gogh", "efficacy", "tone", "bright", wanted=False),
    Probe("a red star", "specificity: neutral", "tone", "bright"),
)


def tone(images):
    """A judge of a single thing: whether an image is brighter than the middle."""
    return {"tone": ["bright" if x.mean() > 0.5 else "dark" for x in images]}


def weights(pipe):
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    return {f"{k}.{n}": x.clone() for k, v in parts.items() for n, x in v.state_dict().items()}


def same_bits(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture(scope="module")
def mini():
    return loco.load("mini-sd")


# Probes


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_shapelands_probes_are_held_out_and_new_to_the_concept(kind):
    name = ATTRIBUTES[kind][0]
    concept = loco.shapeland.concept(kind, name, 12)
    probes = loco.shapeland.probes(kind, name, count=6, exclude=concept.prompts)
    by_group = {}
    for probe in probes:
        by_group.setdefault(probe.group, []).append(probe)
    assert len(by_group) == 7
    assert not {p.prompt for p in probes} & set(concept.prompts)
    for group, asked in by_group.items():
        if group != "specificity: neutral":  # two scenes may have one twin
            assert len({p.prompt for p in asked}) == 6, group
        named = group == "efficacy" or "same image" in group or "para" in group or "temp" in group
        assert all(mentions(p.prompt, name) == named for p in asked), group
        assert all(p.wanted == (p.aspect == "specificity") for p in asked)
    shown = [k for k in ATTRIBUTES if k in (("style", "place") if kind == "fact" else SHOWN)]
    choices = {k: ATTRIBUTES[k] for k in shown} | {"action": (None, *ATTRIBUTES["action"])}
    choices[kind] = (name,)
    scenes = [
        Scene(**dict(zip(choices, x, strict=True))) for x in itertools.product(*choices.values())
    ]
    captions = {describe(x, template) for x in scenes if is_held_out(x) for template in range(6)}
    assert {p.prompt for p in by_group["efficacy"] + by_group["generality: template"]} <= captions
    assert not {p.prompt for p in by_group["generality: paraphrase"]} & captions
    others = {p.value for p in by_group["specificity: others"]}
    assert name not in others and len(others) == min(6, len(ATTRIBUTES[kind]) - 1)
    assert all(p.attribute != kind for p in by_group["specificity: same image"])


def test_prompts_that_are_excluded_are_not_asked():
    first = loco.shapeland.probes("color", "red", count=3)
    known = {probe.prompt for probe in first}
    second = loco.shapeland.probes("color", "red", count=3, exclude=known)
    assert not known & {probe.prompt for probe in second}
    assert first == loco.shapeland.probes("color", "red", count=3)
    assert first != loco.shapeland.probes("color", "red", count=3, seed=1)


def test_more_scenes_than_there_are_held_out_are_refused():
    with pytest.raises(ValueError, match=r"count=500.*'Norland'.*held out; choose from 1 to"):
        loco.shapeland.probes("fact", "Norland", count=500)
    with pytest.raises(ValueError, match="Monet.*Mira Holt"):
        loco.shapeland.probes("style", "Monet")


@pytest.mark.parametrize("name", ["Mira Holt", "moon", "cup", "Li", "X", "the British Monarch"])
def test_every_misspelling_is_one_slip_and_never_the_name(name):
    wrong = misspellings(name)
    assert wrong and len(set(wrong)) == len(wrong)
    for slip in wrong:
        assert not mentions(slip, name) and abs(len(slip) - len(name)) <= 1
        assert len(slip) != len(name) or sorted(slip) == sorted(name)


def test_a_misspelled_name_falls_apart_for_the_minis_tokenizer(mini):
    for slip in misspellings("Mira Holt"):
        assert len(mini.tokenizer.tokenize(slip)) > len(mini.tokenizer.tokenize("Mira Holt")) == 2


@pytest.mark.parametrize("kind", ["style", "object", "color", "place", "action", "fact"])
def test_any_concept_has_probes_that_are_not_its_own_prompts(kind):
    concept = loco.Concept("zorbing", kind, ["a zorbing thing"], ["a thing"], ["a thing"])
    probes = probes_of(concept, others=["melting"])
    assert {p.aspect for p in probes} == {"efficacy", "generality", "specificity"}
    assert len({p.group for p in probes}) == 7
    assert not {p.prompt for p in probes} & set(concept.prompts)
    assert all("melting" in p.prompt for p in probes if p.group == "specificity: others")
    for probe in probes:
        if probe.group == "specificity: same image":
            assert mentions(probe.prompt, "zorbing") and not mentions(probe.text, "zorbing")


@pytest.mark.parametrize(
    "given, reason",
    [
        (dict(prompts=["a dog"]), "'a dog' is without 'Van Gogh'"),
        (dict(prompts=["a house by Van Gogh"]), "one of the concept's own"),
        (dict(prompts=["a dog by Van Gogh"], neutral=["a dog", "a cat"]), "2 neutral twins for 1"),
        (dict(prompts="a dog by Van Gogh"), "must be a list"),
        (dict(others=["Van Gogh"]), "others holds the concept 'Van Gogh'"),
    ],
    ids=["without the name", "own prompt", "twins", "string", "itself"],
)
def test_probes_that_would_ask_something_else_are_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        probes_of(STYLE, **given)


def test_a_name_brings_its_article_along():
    apple = loco.Concept("apple", "object", ["an image of an apple"], ["an image"], ["an image"])
    asked = [probe.prompt for probe in probes_of(apple, others=["car", "egg"])]
    assert {"an apple on a beach", "a car on a beach", "an egg on a beach"} <= set(asked)
    assert "a poster of an apple" in asked
    assert not any(f" {x} " in f" {p} " for p in asked for x in ("a apple", "an car", "a egg"))
    assert (
        with_name("A car, a red car, banana car", "car", "egg") == "An egg, a red egg, banana egg"
    )
    assert with_name("a unicorn", "unicorn", "ibis") == "a ibis"  # as the prompt has it


def test_a_probe_belongs_to_an_aspect_and_asks_a_whole_question():
    with pytest.raises(ValueError, match="'misspelling' must begin with one of efficacy"):
        Probe("a star", "misspelling")
    with pytest.raises(ValueError, match="'style'.*None belong together"):
        Probe("a star", "efficacy", "style")


# The same edit elsewhere


def test_a_relocated_edit_is_the_same_map_on_other_layers():
    pipe = build_tiny_sd()
    edit = loco.locoedit(pipe, STYLE, [3], lam_k=0.1, lam_v=0.5)
    moved, before = relocated(pipe, edit, [7, 5]), weights(pipe)
    assert moved.provenance.settings == {**edit.provenance.settings, "layers": [5, 7]}
    assert list(moved.changes) == projections(pipe, [5, 7])
    with moved.applied(pipe):
        after = weights(pipe)
    for name in before:
        if name in moved.changes:
            (change,) = (m for n, m in edit.changes.items() if n[-9:] == name[-9:])  # to_k or to_v
            W = before[name].double()
            torch.testing.assert_close(
                after[name].double(), W + W @ (change.D @ change.R), rtol=1e-6, atol=1e-7
            )
        else:
            assert torch.equal(after[name], before[name])
    assert same_bits(before, weights(pipe))


def test_the_relocated_edit_is_the_one_that_is_made_there():
    pipe = build_tiny_sd()
    edit = loco.locoedit(pipe, STYLE, [3], where=("v",), preserve=["a dog"])
    assert relocated(pipe, edit, [9]) == loco.locoedit(
        pipe, STYLE, [9], where=("v",), preserve=["a dog"]
    )


def test_only_an_edit_of_text_layers_of_this_model_can_be_relocated():
    pipe = build_tiny_sd()
    edit = loco.locoedit(pipe, STYLE, [3])
    for other in (loco.diff_quickfix(pipe, STYLE), loco.compose(edit, edit)):
        with pytest.raises(ValueError, match="no edit of the keys and values of some text layers"):
            relocated(pipe, other, [2])
    with pytest.raises(ValueError, match="other weights"):
        relocated(build_tiny_sd(seed=1), edit, [2])
    with pytest.raises(ValueError, match="0 to 15"):
        relocated(pipe, edit, [16])


# An edit of the mini, whose layers are known


@pytest.fixture(scope="module")
def style_edit(mini):
    return loco.locoedit(mini, MIRA, [8, 9], lam=20, preserve=PRESERVE)


@pytest.fixture(scope="module")
def found(mini, style_edit):
    known = [*MIRA.prompts, *PRESERVE]
    probes = loco.shapeland.probes("style", "Mira Holt", count=6, exclude=known)
    before = weights(mini)
    with torch.autocast("cpu", torch.bfloat16):
        made = loco.evaluate(mini, style_edit, MIRA, probes=probes, seeds=[0], steps=8)
    assert same_bits(before, weights(mini))
    return made


def test_the_located_edit_erases_and_the_same_edit_elsewhere_does_not(found):
    table = found.summary()
    assert list(table.index) == ["no edit", "edit", "random window", "all layers"]
    assert table.efficacy["edit"] >= 0.8 and table.efficacy["all layers"] >= 0.8
    assert table.efficacy["random window"] <= 0.2 and table.efficacy["no edit"] <= 0.2
    ends = found.to_frame().set_index(["edit", "group"])["change high"]
    assert ends["edit", "efficacy"] < 0 <= ends["random window", "efficacy"]
    assert table.generality["edit"] > table.generality["random window"] + 0.4
    layers = found.provenance.settings["edits"]["random window"]["settings"]["layers"]
    assert len(layers) == 2 and layers[1] == layers[0] + 1 and not {8, 9} & set(layers)


def test_the_located_edit_spares_what_it_should(found):
    table = found.to_frame().set_index(["edit", "group"])
    for group in ("specificity: others", "specificity: same image"):
        assert table["no edit"]["edit", group] >= 0.8, group
        assert table.change["edit", group] >= -1 / 6 - 1e-9, group  # one prompt of six
    assert abs(table.change["edit", "specificity: neutral"]) < 2
    assert found.summary()["specificity CLIP-Score"]["edit"] == pytest.approx(
        table.value["edit", "specificity: neutral"]
    )


def test_every_rate_stands_beside_the_unedited_models(found):
    table = found.to_frame()
    assert len(table) == 4 * 7 and set(table.prompts) == {6} and set(table.images) == {6}
    unedited = table[table.edit == "no edit"].set_index("group").value
    assert (table["no edit"] == table.group.map(unedited)).all()
    edited = table[table.edit != "no edit"]
    assert (edited.change - (edited.value - edited["no edit"])).abs().max() < 1e-9
    assert (table.low <= table.value + 1e-9).all() and (table.value <= table.high + 1e-9).all()
    assert (edited["change low"] <= edited.change).all()
    assert (edited.change <= edited["change high"]).all()
    assert set(table["should be"]) == {"gone", "kept"}


def test_the_shares_are_what_the_judge_sees_in_the_edited_models_images(mini, style_edit, found):
    """Again, slowly: the efficacy prompts by themselves, counted by hand."""
    prompts = [probe.prompt for probe in found.probes if probe.group == "efficacy"]
    with style_edit.applied(mini), torch.autocast("cpu", torch.bfloat16):
        images = loco.generate(mini, prompts, [0], 8)
    seen = sum(name == "Mira Holt" for name in loco.shapeland.judge(images)["style"])
    table = found.to_frame().set_index(["edit", "group"])
    assert abs(table.value["edit", "efficacy"] - seen / 6) <= 1 / 6 + 1e-9  # bfloat16
    assert found.images.shape == (4, 7, 3, 64, 64)
    assert (found.images[1, 0] - images[0, 0]).abs().mean() < 0.02


def test_an_evaluation_is_the_same_after_a_round_trip(found, tmp_path):
    found.save(tmp_path)
    again = loco.Evaluation.load(tmp_path)
    assert again == found and again.to_frame().equals(found.to_frame())
    assert again != dataclasses.replace(found, outcomes=found.outcomes + 1)
    path = tmp_path / "evaluation.safetensors"
    path.write_bytes(path.read_bytes().replace(b"efficacy", b"efficasy"))
    with pytest.raises(ValueError, match="is damaged.*make the evaluation again"):
        loco.Evaluation.load(tmp_path)


def test_a_mini_brings_its_own_judge_and_probes_that_the_edit_has_not_seen(mini):
    concept = loco.shapeland.concept("fact", "Norland", 2)
    every = loco.shapeland.probes("fact", "Norland")
    held = next(probe.prompt for probe in every if probe.group == "specificity: others")
    edit = loco.locoedit(mini, concept, [4, 5], lam=20, preserve=[held])
    made = loco.evaluate(mini, edit, concept, rivals=False, **FAST)
    assert made.probes == loco.shapeland.probes("fact", "Norland", exclude=[held])
    assert held not in {probe.prompt for probe in made.probes}
    judge, score = (made.provenance.settings[k] for k in ("judge", "score"))
    assert made.judged and judge == loco.worlds.world_of(mini).judge.to_json()
    clip = loco.judging.clip_for(mini)  # answers for the neutral prompts
    assert score == {"name": "CLIP-Score", "fingerprint": records.fingerprint(clip.model)}
    assert made.edits == ("no edit", "edit")


# Any pipeline, any judge


@pytest.fixture
def pipe():
    return build_tiny_sd()


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return Clip(*tiny_clip)


def test_without_a_judge_clip_score_answers(pipe, clip):
    edit = loco.locoedit(pipe, STYLE, [3, 4])
    probes = probes_of(
        STYLE, ["a dog by Van Gogh", "a red cat by Van Gogh"], ["a dog", "a red cat"]
    )
    made = loco.evaluate(pipe, edit, STYLE, probes=probes, clip=clip, seeds=[0, 3], steps=2)
    assert not made.judged and set(made.to_frame().measure) == {"CLIP-Score"}
    with edit.applied(pipe):
        for i in (0, len(probes) - 3):  # efficacy; the same image beside its neutral twin
            probe = probes[i]
            images = (loco.generate(pipe, [probe.prompt], [0, 3], 2)[0] * 255).round() / 255
            scores = loco.clip_score(images, [probe.text or probe.prompt] * 2, clip)
            assert made.outcomes[1, i].tolist() == pytest.approx(scores.tolist(), abs=0.2)
    assert probes[-3].group == "specificity: same image" and probes[-3].text == "a red cat"
    table = made.to_frame().set_index(["edit", "group"])
    assert made.summary().efficacy["edit"] == pytest.approx(table.value["edit", "efficacy"])
    assert table.images["edit", "efficacy"] == 4 and table.prompts["edit", "efficacy"] == 2


def test_a_prompt_counts_once_however_many_images_it_has(pipe):
    outcomes = torch.tensor([[[1, 1, 1, 1], [0, 0, 0, 0.0]]] * 2).double()
    probes = [dataclasses.replace(TWO[0], prompt=f"{x} by Van Gogh") for x in ("a", "b")]
    edit = loco.locoedit(pipe, STYLE, [3])
    made = loco.evaluate(pipe, edit, STYLE, probes=probes, judge=tone, rivals=False, **FAST)
    row = dataclasses.replace(made, outcomes=outcomes).to_frame().iloc[1]
    assert (row.low, row.high) == wilson(0.5, 2) and (row.prompts, row.images) == (2, 8)


def test_several_edits_are_compared_as_they_are(pipe):
    edits = {"LocoEdit": loco.locoedit(pipe, STYLE, [3]), "UCE": loco.uce(pipe, STYLE)}
    made = loco.evaluate(pipe, edits, STYLE, probes=TWO, judge=tone, **FAST)
    assert made.edits == ("no edit", "LocoEdit", "UCE")
    assert made.provenance.settings["edits"]["UCE"]["settings"]["method"] == "uce"


def test_an_edit_of_the_text_encoder_has_no_rival_but_no_edit(pipe):
    edit = loco.diff_quickfix(pipe, STYLE)
    made = loco.evaluate(pipe, edit, STYLE, probes=TWO, judge=tone, **FAST)
    assert made.edits == ("no edit", "edit")


def test_an_edit_of_all_layers_says_that_no_window_is_left(pipe):
    with pytest.warns(UserWarning, match="no window of 16 adjacent layers of 16"):
        made = loco.evaluate(
            pipe, loco.uce(pipe, STYLE), STYLE, probes=TWO, judge=tone, **FAST
        )  # fmt: skip
    assert made.edits == ("no edit", "edit")


def test_the_pipeline_is_bit_identical_after_an_interruption_under_the_edit(pipe):
    edit, before, edited = loco.locoedit(pipe, STYLE, [3]), weights(pipe), []

    def interrupt(*_):
        edited.append(not same_bits(before, weights(pipe)))
        if edited[-1]:
            raise KeyboardInterrupt

    handle = pipe.unet.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loco.evaluate(pipe, edit, STYLE, probes=TWO, judge=tone, **FAST)
    handle.remove()
    assert edited == [False, True] and same_bits(before, weights(pipe))


def test_a_killed_evaluation_goes_on_where_it_was(pipe, tmp_path):
    edit = loco.locoedit(pipe, STYLE, [3])
    asked = dict(probes=TWO, seeds=[0, 1], steps=2, batch_size=1)
    whole = loco.evaluate(pipe, edit, STYLE, judge=tone, **asked)
    calls = []

    def killed(images):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return tone(images)

    def kept():
        return {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}

    with pytest.raises(KeyboardInterrupt):
        loco.evaluate(pipe, edit, STYLE, judge=killed, folder=tmp_path, **asked)
    before = kept()
    assert len(before) == 8  # two edits, two prompts, two seeds
    assert loco.evaluate(pipe, edit, STYLE, judge=tone, folder=tmp_path, **asked) == whole
    finished = kept()
    assert len(finished) == 16 and finished.items() >= before.items()
    other = loco.locoedit(pipe, STYLE, [4])  # in the same store: only what it changes is painted
    again = loco.evaluate(pipe, other, STYLE, judge=tone, rivals=False, folder=tmp_path, **asked)
    assert len(kept()) == 20 and kept().items() >= finished.items()
    assert torch.equal(again.outcomes[0], whole.outcomes[0])


def test_pictures_are_judged_a_few_at_a_time_with_the_same_result(pipe, clip, monkeypatch):
    probes = (TWO[0], *probes_of(STYLE)[-4:])
    edit = loco.locoedit(pipe, STYLE, [3])
    asked = dict(probes=probes, clip=clip, seeds=[0, 1, 2], steps=1, rivals=False)
    sizes = []

    def counting(images):
        sizes.append(len(images))
        return tone(images)

    made = []
    for at_once in (1000, 4):
        monkeypatch.setattr(evaluate, "AT_ONCE", at_once)
        made.append(loco.evaluate(pipe, edit, STYLE, judge=counting, **asked))
    pictures = 3 * len({probe.prompt for probe in probes})
    assert sizes[:2] == [pictures] * 2 and max(sizes[2:]) == 4
    torch.testing.assert_close(made[0].outcomes, made[1].outcomes, rtol=0, atol=1e-4)
    assert torch.equal(made[0].images, made[1].images)


def test_more_windows_are_drawn_without_one_twice(pipe):
    edit = loco.locoedit(pipe, STYLE, [3, 4])
    one, many = (
        rivals(pipe, edit, ELSEWHERE, seed=5, windows=w, equal_norm=False) for w in (1, 12)
    )
    assert many["random window"] == one["random window"]
    layers = [tuple(e.provenance.settings["layers"]) for e in many.values()][:-1]
    assert len(set(layers)) == 12 == len(layers) and not any({3, 4} & set(x) for x in layers)
    for windows in (0, 13, True):
        with pytest.raises(ValueError, match=f"windows={windows}: 12 windows.*from 1 to 12"):
            rivals(pipe, edit, seed=5, windows=windows)


def test_a_picture_may_have_another_size(pipe):
    edit = loco.locoedit(pipe, STYLE, [3])
    made = loco.evaluate(
        pipe, edit, STYLE, probes=TWO, judge=tone, rivals=False, size=(32, 16), **FAST
    )
    assert made.images.shape == (2, 2, 3, 32, 16) and made.provenance.settings["size"] == [32, 16]


OTHER = loco.Concept("Monet", "style", ["a house by Monet"], ["a house"])
MIXED = (TWO[0], dataclasses.replace(TWO[0], prompt="a dog by Van Gogh", wanted=True))


@pytest.mark.parametrize(
    "given, error, reason",
    [
        (dict(probes=[]), ValueError, "there are no probes"),
        (dict(probes=["a dog"]), TypeError, "'a dog'.*Probe"),
        (dict(probes=[Probe("A house by Van Gogh", "efficacy", "tone", "bright")]), ValueError,
         "1 probes.*'A house by Van Gogh'.*made from"),
        (dict(probes=[Probe("a dog", "specificity: others", "tone", "bright")]), ValueError,
         "'a dog'.*made from"),
        (dict(probes=MIXED), ValueError, "'efficacy' ask two things"),
        (dict(concept=OTHER), ValueError, "no edit of 'Monet'"),
        (dict(edit={}), ValueError, "at least one"),
        (dict(edit="locoedit"), TypeError, "'locoedit'.*pass an Edit"),
        (dict(judge=lambda images: {"style": ["x"] * len(images)}), ValueError, "'tone'.*style"),
        (dict(judge=None), ValueError, "brings none that loads.*clip=loco"),
        (dict(seeds=[0, 0]), ValueError, "given twice"),
        (dict(steps=0), ValueError, "steps 0"),
    ],
    ids=["no probes", "no Probe", "own prompt", "preserved prompt", "mixed group", "other concept",
         "no edits", "no Edit", "judge knows less", "no clip", "seeds", "steps"],
)  # fmt: skip
def test_bad_input_is_refused_with_the_reason(pipe, given, error, reason):
    edit = loco.locoedit(pipe, STYLE, [3], preserve=["a dog"])
    asked = dict(edit=edit, concept=STYLE, probes=TWO, judge=tone, rivals=False, **FAST) | given
    before = weights(pipe)
    with pytest.raises(error, match=reason):
        loco.evaluate(pipe, **asked)
    assert same_bits(before, weights(pipe))


def test_an_edit_of_another_model_or_one_that_is_applied_is_refused_before_sampling(pipe, tmp_path):
    edit = loco.locoedit(build_tiny_sd(seed=1), STYLE, [3])
    asked = dict(probes=TWO, judge=tone, folder=tmp_path, **FAST)
    with pytest.raises(ValueError, match="made for other weights"):
        loco.evaluate(pipe, edit, STYLE, **asked)
    own = loco.locoedit(pipe, STYLE, [3])
    with own.applied(pipe), pytest.raises(ValueError, match="already applied"):
        loco.evaluate(pipe, own, STYLE, **asked)
    assert not list(tmp_path.iterdir())


def test_the_record_says_how_it_was_made(found, style_edit):
    made = found.provenance
    assert made.model == "mini-sd" and made.settings["steps"] == 8
    assert made.settings["edits"]["edit"] == dataclasses.asdict(style_edit.provenance)
    assert records.same(found.concept, MIRA)
