"""Edits can be scaled and put together, and still are edits."""

import json

import pytest
import torch
from conftest import build_tiny_sd
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loco_core as loco
from loco_core.edits.file import MANIFEST

GOGH = loco.Concept("van gogh", "style", ["a house by van gogh"], ["a house"])
MONET = loco.Concept("monet", "style", ["a tree by claude monet"], ["a tree"])
LAYERS = [8, 9]
ONE = {"van gogh": GOGH, "monet": MONET}

pytestmark = pytest.mark.filterwarnings("ignore:.*by more than themselves")


@pytest.fixture
def pipe():
    return build_tiny_sd()


@pytest.fixture
def unmixed():
    """A pipeline whose text encoder hands every word on as it is, orthogonal to all others."""
    pipe = build_tiny_sd()
    encoder, words = pipe.text_encoder, ("gogh", "monet", "house", "tree", "circle")
    with torch.no_grad():
        encoder.embeddings.position_embedding.weight.zero_()
        for layer in encoder.encoder.layers:
            for last in (layer.self_attn.out_proj, layer.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()
        for i, word in enumerate(words):
            row = torch.zeros(32)
            row[2 * i], row[2 * i + 1] = 1, -1  # of mean zero: the last norm only scales it
            (index,) = pipe.tokenizer(word, add_special_tokens=False).input_ids
            encoder.embeddings.token_embedding.weight[index] = row
    return pipe


def edited(pipe, *edits: loco.Edit) -> dict[str, torch.Tensor]:
    """All weights with the edits on, applied in order; the pipeline is as before afterwards."""
    for edit in edits:
        edit.apply(pipe)
    found = weights(pipe)
    for edit in reversed(edits):
        edit.revert(pipe)
    return found


def weights(pipe) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.detach().clone()
        for part in ("unet", "text_encoder")
        for name, tensor in getattr(pipe, part).named_parameters()
    }


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any weight."""
    assert one.keys() == other.keys()
    return max(float((one[n] - x).norm() / x.norm().clamp_min(1e-9)) for n, x in other.items())


def in_turn(pipe, first: loco.Concept, second: loco.Concept, **choice) -> dict[str, torch.Tensor]:
    """The weights after an edit of `first`, and one of `second` made on the edited pipeline."""
    below = loco.locoedit(pipe, first, LAYERS, **choice)
    with below.applied(pipe):
        above = loco.locoedit(pipe, second, LAYERS, **choice)
        return edited(pipe, above)


def ranks(pipe, edit: loco.Edit) -> set[int]:
    return set(loco.diagnose(pipe, edit).ranks.values())


# -- compose


def test_composed_edit_is_one_edit_and_then_the_other_made_on_top_of_it(pipe):
    for lam in (0.01, 5.0):
        a, b = (loco.locoedit(pipe, c, LAYERS, lam) for c in (GOGH, MONET))
        both = edited(pipe, loco.compose(a, b))
        assert far(both, in_turn(pipe, GOGH, MONET, lam=lam)) < 2e-6
        assert far(both, edited(pipe, a)) > 0.01 and far(both, edited(pipe, b)) > 0.01


def test_order_and_joining_matter_where_the_keys_overlap(pipe):
    a, b = (loco.locoedit(pipe, c, LAYERS) for c in (GOGH, MONET))
    joint = edited(pipe, loco.locoedit(pipe, [GOGH, MONET], LAYERS))
    one, other = edited(pipe, loco.compose(a, b)), edited(pipe, loco.compose(b, a))
    assert far(one, other) > 0.01
    assert far(one, joint) > 0.01 and far(other, joint) > 0.01


@pytest.mark.parametrize("lam", [0.01, 20.0])
def test_order_and_joining_make_no_difference_where_nothing_overlaps(unmixed, lam):
    # Joint: T = I + D_a R_a + D_b R_b, as C_a C_b^T = 0 splits the solve in two. In turn there is
    # D_a (R_a D_b) R_b more, which is 0 as gogh's key is orthogonal to monet's key and target.
    choice = dict(lam=lam, tokens="last")
    a, b = (loco.locoedit(unmixed, c, LAYERS, **choice) for c in (GOGH, MONET))
    joint = edited(unmixed, loco.locoedit(unmixed, [GOGH, MONET], LAYERS, **choice))
    for result in (
        edited(unmixed, loco.compose(a, b)),
        edited(unmixed, loco.compose(b, a)),
        in_turn(unmixed, GOGH, MONET, **choice),
    ):
        assert far(result, joint) < 1e-6
    assert far(joint, weights(unmixed)) > 0.01


@pytest.mark.parametrize("first, gogh_reads_as", [("gogh", "house"), ("house", "tree")])
def test_a_later_edit_decides_what_its_target_means(unmixed, first, gogh_reads_as):
    # After gogh -> house, gogh is read as house was then; after house -> tree, house means tree.
    moved = loco.Concept("house", "object", ["a house"], ["a tree"])
    steps = [loco.locoedit(unmixed, c, [8], 0.0, tokens="last") for c in (GOGH, moved)]
    both = loco.compose(*(steps if first == "gogh" else reversed(steps)))
    embeddings = unmixed.text_encoder.embeddings.token_embedding.weight.detach()
    tokenizer, name = unmixed.tokenizer, next(iter(both.changes))
    before, after = weights(unmixed)[name], edited(unmixed, both)[name]

    def token(word: str) -> torch.Tensor:
        return embeddings[tokenizer(word, add_special_tokens=False).input_ids[0]]

    for word, meant in (("gogh", gogh_reads_as), ("house", "tree"), ("circle", "circle")):
        assert torch.allclose(after @ token(word), before @ token(meant), atol=1e-5)


def test_ranks_add_up_and_three_edits_compose_in_any_grouping(pipe):
    a, b = (loco.locoedit(pipe, c, LAYERS) for c in (GOGH, MONET))
    star = loco.Concept("star", "object", ["a red star"], ["a red circle"])
    c = loco.locoedit(pipe, star, [9, 10])
    assert ranks(pipe, a) == ranks(pipe, b) == {2} and ranks(pipe, loco.compose(a, b)) == {4}
    left, right = loco.compose(loco.compose(a, b), c), loco.compose(a, loco.compose(b, c))
    assert far(edited(pipe, left), edited(pipe, right)) < 1e-6
    names = [layer.name for layer in loco.text_layers(pipe)]
    found = loco.diagnose(pipe, left).ranks
    assert [found[f"unet.{names[i]}.to_k.weight"] for i in (8, 9, 10)] == [4, 6, 2]


def test_edits_of_the_text_encoder_and_the_unet_compose(pipe):
    a, b = loco.diff_quickfix(pipe, GOGH), loco.locoedit(pipe, MONET, LAYERS)
    both = loco.compose(a, b)
    assert both.changes.keys() == a.changes.keys() | b.changes.keys()
    assert far(edited(pipe, both), edited(pipe, a, b)) == 0
    assert far(edited(pipe, both), edited(pipe, loco.compose(b, a))) == 0


def test_composed_edit_survives_a_disk_with_the_story_of_its_parts(pipe, tmp_path):
    a = loco.locoedit(pipe, GOGH, LAYERS, lam_v=3.0)
    b = loco.compose(loco.diff_quickfix(pipe, GOGH), loco.locoedit(pipe, MONET, [9]).scaled(0.5))
    both = loco.compose(a, b)
    both.save(tmp_path / "both")
    loaded = loco.Edit.load(tmp_path / "both")
    assert loaded == both and hash(loaded) == hash(both)
    assert far(edited(pipe, loaded), edited(pipe, both)) == 0
    assert repr(loaded).startswith("<Edit: compose of 5 weights")
    assert "concept=van gogh, van gogh, monet" in repr(loaded)
    first, (second, third) = (
        loaded.provenance.settings["parts"][0],
        loaded.provenance.settings["parts"][1]["parts"],
    )
    assert [p["method"] for p in (first, second, third)] == [
        "locoedit",
        "diff_quickfix",
        "locoedit",
    ]
    assert third["scale"] == 0.5 and first["lam"] == {"k": 0.01, "v": 3.0}


def test_edits_of_different_models_do_not_compose(pipe):
    a = loco.locoedit(pipe, GOGH, LAYERS)
    other = build_tiny_sd(seed=3)
    with pytest.raises(ValueError, match="not for the same weights .*differs.*same unedited"):
        loco.compose(a, loco.locoedit(other, MONET, LAYERS))
    apart = loco.compose(a, loco.locoedit(other, MONET, [3]))  # no weight in common to tell by
    for either in (pipe, other):
        with pytest.raises(ValueError, match="made for other weights"):
            apart.apply(either)
    with a.applied(pipe):  # already edited weights are other weights
        with pytest.raises(ValueError, match="not for the same weights"):
            loco.compose(a, loco.locoedit(pipe, MONET, LAYERS))


def test_edits_of_one_model_in_two_folders_compose(pipe, tmp_path):
    edits = []
    for name, concept in (("here", GOGH), ("there", MONET)):
        pipe.save_pretrained(tmp_path / name)
        edits.append(loco.locoedit(loco.load(tmp_path / name), concept, LAYERS))
    assert far(edited(pipe, loco.compose(*edits)), edited(pipe, edits[0])) > 0.01


# -- scale


@pytest.mark.parametrize("scale", [0.5, 0.25, -1.0, 2.0])
def test_scaled_edit_is_that_part_of_the_change(pipe, scale):
    edit, before = loco.locoedit(pipe, GOGH, LAYERS), weights(pipe)
    whole, part = edited(pipe, edit), edited(pipe, edit.scaled(scale))
    expected = {name: W + scale * (whole[name] - W) for name, W in before.items()}
    assert far(part, expected) < 1e-6
    with edit.applied(pipe, scale=scale):
        assert far(weights(pipe), part) == 0
    assert far(weights(pipe), before) == 0
    assert edit.scaled(scale).scale == scale and f"scale={scale:g}" in repr(edit.scaled(scale))


def test_scale_zero_changes_nothing_and_says_so(pipe):
    edit, before = loco.locoedit(pipe, GOGH, LAYERS), weights(pipe)
    with pytest.warns(UserWarning, match="changes nothing: .*its scale is 0"):
        with edit.applied(pipe, scale=0):
            assert far(weights(pipe), before) == 0
    assert far(weights(pipe), before) == 0


@pytest.mark.filterwarnings("error:.*changes nothing")
def test_a_warning_made_an_error_leaves_no_edit_behind(pipe):
    edit = loco.locoedit(pipe, GOGH, LAYERS)
    for _ in range(2):  # the second time, it would be applied already
        with pytest.raises(UserWarning, match="changes nothing"):
            edit.scaled(0).apply(pipe)
    with edit.applied(pipe):
        pass


def test_scales_multiply_and_the_whole_edit_is_itself(pipe, tmp_path):
    edit = loco.locoedit(pipe, GOGH, LAYERS)
    half = edit.scaled(0.5)
    assert edit.scale == 1 and edit.scaled(1) is edit and half != edit
    assert half.scaled(2).changes == edit.changes and half.scaled(0.5) == edit.scaled(0.25)
    half.save(tmp_path / "half")
    loaded = loco.Edit.load(tmp_path / "half")
    assert loaded == half and loaded.scale == 0.5
    assert far(edited(pipe, loaded), edited(pipe, half)) == 0


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "half", None])
def test_a_scale_that_is_no_number_is_refused_and_nothing_is_applied(pipe, scale):
    edit, before = loco.locoedit(pipe, GOGH, LAYERS), weights(pipe)
    with pytest.raises(ValueError, match=f"scale must be a finite number, not {scale!r}"):
        with edit.applied(pipe, scale=scale):
            pass
    assert far(weights(pipe), before) == 0


# -- files of other versions


@pytest.mark.parametrize("version", [1, 4])
def test_a_file_of_another_format_is_refused_with_the_fix(pipe, tmp_path, version):
    path = tmp_path / "edit.safetensors"
    loco.locoedit(pipe, GOGH, LAYERS).save(path)
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()[MANIFEST])
    manifest["format"] = version
    save_file(load_file(path), path, metadata={MANIFEST: json.dumps(manifest)})
    with pytest.raises(ValueError, match=f"its format is {version}, this version reads 3; make"):
        loco.Edit.load(path)
