"""Rivals do elsewhere, or blindly, what an edit does on purpose: each is what its name says."""

import pytest
import torch
from conftest import build_tiny_sd

import loco_core as loco
from loco_core.closed_form.rivals import RIVALS
from loco_core.edits.edit import make_edit
from loco_core.edits.knockout import Knockout
from loco_core.families import family_of

GOGH = loco.Concept(
    "van gogh", "style", ["a house by van gogh", "a tree by van gogh"], ["a house", "a tree"]
)
pytestmark = pytest.mark.filterwarnings("ignore:.*more than themselves")


@pytest.fixture(scope="module")
def pipe():
    return build_tiny_sd()


@pytest.fixture(scope="module")
def edit(pipe):
    return loco.locoedit(pipe, GOGH, [8, 9], lam=1.0, preserve=["a circle"])


@pytest.fixture(scope="module")
def found(pipe, edit):
    return loco.rivals(pipe, edit)


def weights(pipe):
    return {n: w.detach().double().clone() for n, w in pipe.unet.named_parameters() if "attn2" in n}


def changes(pipe, edit):
    """Name -> W' - W of what an edit changes."""
    before = weights(pipe)
    with edit.applied(pipe):
        after = weights(pipe)
    found = {f"unet.{n}": after[n] - w for n, w in before.items()}
    return {n: d for n, d in found.items() if d.any()}


def norm(of):
    return sum(d.square().sum() for d in of.values()).sqrt().item()


def test_all_rivals_come_by_name_and_leave_the_pipeline_alone(pipe, edit, found):
    before = weights(pipe)
    assert set(found) == set(RIVALS)
    loco.rivals(pipe, edit, seed=3)
    assert all(torch.equal(w, before[n]) for n, w in weights(pipe).items())


def test_a_random_window_is_apart_and_its_change_is_as_large(pipe, edit, found):
    own, other = changes(pipe, edit), changes(pipe, found["random window"])
    assert not own.keys() & other.keys() and len(own) == len(other) == 4
    assert norm(other) == pytest.approx(norm(own), rel=1e-5)
    assert len({loco.rivals(pipe, edit, seed=s)["random window"].digest for s in range(6)}) > 1


def test_all_layers_do_what_the_edit_does_and_more(pipe, edit, found):
    own, every = changes(pipe, edit), changes(pipe, found["all layers"])
    assert len(every) == 32 and all(torch.equal(every[n], d) for n, d in own.items())


def test_the_destroyer_lets_its_layers_read_nothing(pipe, edit, found):
    before = weights(pipe)
    for name, change in changes(pipe, found["destroyer"]).items():
        assert torch.equal(change, -before[name[5:]])


def test_noise_is_as_large_as_the_edit_in_every_weight_and_of_its_rank(pipe, edit, found):
    own, noise = changes(pipe, edit), changes(pipe, found["noise"])
    assert own.keys() == noise.keys()
    for name, change in own.items():
        assert noise[name].norm() == pytest.approx(change.norm().item(), rel=1e-5)
        angle = (noise[name] * change).sum() / change.square().sum()
        assert abs(angle) < 0.5
        assert found["noise"].changes[name].rank == edit.changes[name].rank
    again, other = (loco.rivals(pipe, edit, "noise", seed=s)["noise"] for s in (0, 1))
    assert again == found["noise"] != other


def test_the_mean_keeps_of_every_key_what_lies_along_the_mean(pipe, edit, found):
    texts = family_of(pipe).encode([*GOGH.prompts, "a circle"])
    keys = [texts.embeds[0, 5], texts.embeds[0, 6], texts.embeds[1, 5], texts.embeds[1, 6]]
    keys += [texts.embeds[2, 1], texts.embeds[2, 2], texts.embeds[2, 3]]
    mean = torch.stack(keys).double().mean(0)
    name = next(iter(edit.changes))
    W = weights(pipe)[name[5:]]
    wanted = W @ torch.outer(mean, mean) / mean.square().sum() - W
    assert torch.allclose(changes(pipe, found["mean"])[name], wanted, atol=1e-5)


def test_an_edit_of_the_text_encoder_has_the_rivals_that_need_no_other_layers(pipe):
    rivals = loco.rivals(pipe, loco.diff_quickfix(pipe, GOGH))
    assert set(rivals) == {"destroyer", "mean", "noise"}


def test_what_has_no_rivals_is_refused(pipe, edit):
    with pytest.raises(ValueError, match="no rival is called 'best': choose from random window"):
        loco.rivals(pipe, edit, "best")
    name = next(iter(edit.changes))
    shape = tuple(weights(pipe)[name[5:]].shape)
    sparse = make_edit(pipe, {name: Knockout(shape, torch.tensor([0]))}, method="test")
    with pytest.raises(ValueError, match="knocks out single entries, .*parts.erase"):
        loco.rivals(pipe, sparse)
    with pytest.raises(ValueError, match="made for other weights"):
        loco.rivals(build_tiny_sd(seed=3), edit, "noise")


def test_an_edit_that_changes_nothing_has_no_rivals(pipe):
    same = loco.locoedit(pipe, GOGH, [8], target=list(GOGH.prompts))
    with pytest.raises(ValueError, match="changes nothing: there is nothing to be as large as"):
        loco.rivals(pipe, same)


def test_evaluate_takes_rivals_by_name(pipe, edit):
    probes = [
        loco.judging.Probe("a circle by van gogh", "efficacy", "style", "van gogh", wanted=False)
    ]

    def judge(images):
        return {"style": ["van gogh" if x.mean() > 0.4 else "none" for x in images]}

    asked = dict(probes=probes, judge=judge, seeds=[0], steps=1)
    made = loco.evaluate(pipe, edit, GOGH, rivals=["destroyer", "noise"], **asked)
    assert list(made.summary().index) == ["no edit", "edit", "destroyer", "noise"]
    alone = loco.evaluate(pipe, edit, GOGH, rivals="destroyer", **asked)
    assert list(alone.summary().index) == ["no edit", "edit", "destroyer"]
