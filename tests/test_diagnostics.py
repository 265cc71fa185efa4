"""Diagnostics tell what an edit does to its rows, and warn before it does harm."""

import warnings

import pytest
import torch
from conftest import build_tiny_sd, embeds, pairs

import loco_core as loco
from loco_core.closed_form.solver import fit
from loco_core.edits.edit import make_edit

GOGH = loco.Concept(
    "van gogh",
    "style",
    ["a house in the style of van gogh", "a red star by van gogh with a tree"],
    ["a house", "a red star with a tree"],
)
MONET = loco.Concept("monet", "style", ["a tree by claude monet"], ["a tree"])
KEPT = "a photo of a dog running"
LAYERS = [8, 9]
# (prompt, its token, twin, its token): the last subject tokens and the ends of the text
GOGH_ROWS = [
    (GOGH.prompts[0], 8, "a house", 2),
    (GOGH.prompts[0], 9, "a house", 3),
    (GOGH.prompts[1], 6, GOGH.neutral[1], 3),
    (GOGH.prompts[1], 10, GOGH.neutral[1], 7),
]
MONET_ROWS = [
    ("a tree by claude monet", 5, "a tree", 2),
    ("a tree by claude monet", 6, "a tree", 3),
]

quiet = pytest.mark.filterwarnings("ignore:.*by more than themselves")


@pytest.fixture
def pipe():
    return build_tiny_sd()


def dense(C, G, K, lam: float) -> torch.Tensor:
    """T [d, d] from the normal equations: rows of K are their own targets."""
    every, wanted, eye = torch.cat([C, K]), torch.cat([G, K]), torch.eye(32, dtype=torch.float64)
    return (wanted.T @ every + lam * eye) @ torch.linalg.inv(every.T @ every + lam * eye)


def weight(pipe, name: str) -> torch.Tensor:
    component, _, path = name.partition(".")
    return getattr(pipe, component).get_parameter(path).detach().double()


def state(pipe) -> dict[str, bytes]:
    return {
        f"{part}.{name}": tensor.numpy().tobytes()
        for part in ("unet", "text_encoder")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def same(one: loco.closed_form.diagnostics.Diagnostics, other) -> bool:
    return (
        one.to_frame().equals(other.to_frame())
        and one.rows_to_frame().equals(other.rows_to_frame())
        and all(
            torch.equal(a.gram, b.gram) and a.condition == b.condition
            for a, b in zip(one.solves.values(), other.solves.values(), strict=True)
        )
    )


# -- the figures


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_every_figure_agrees_with_its_dense_formula(pipe, scale):
    edit = loco.locoedit(pipe, GOGH, LAYERS, lam=2.0, lam_v=0.5, preserve=[KEPT]).scaled(scale)
    found, (C, G), K = loco.diagnose(pipe, edit), pairs(pipe, GOGH_ROWS), embeds(pipe, KEPT)[1:8]
    every, eye = torch.cat([C, K]), torch.eye(32, dtype=torch.float64)
    assert list(found.solves) == ["prompt k", "prompt v"]
    for (_, solve), lam in zip(found.solves.items(), (2.0, 0.5), strict=True):
        T = eye + scale * (dense(C, G, K, lam) - eye)
        residual = (C @ T.T - G).norm(dim=1) / (G - C).norm(dim=1)
        assert torch.allclose(solve.residual, residual, rtol=1e-7)
        kept = (K @ T.T - K).norm(dim=1) / K.norm(dim=1)
        assert torch.allclose(solve.kept_residual, kept, rtol=1e-7)
        cosines = [[float(a @ b / a.norm() / b.norm()) for b in every] for a in every]
        assert torch.allclose(solve.gram, torch.tensor(cosines).double(), atol=1e-6)
        system = every @ every.T + lam * torch.eye(11, dtype=torch.float64)
        assert solve.condition == pytest.approx(float(torch.linalg.cond(system)), rel=1e-6)
        assert solve.rank == 4
        for name, change in found.changes.items():
            if f"to_{'k' if lam == 2 else 'v'}" in name:
                W = weight(pipe, name)
                assert change == pytest.approx(float((W @ T - W).norm() / W.norm()), rel=1e-7)
                assert found.ranks[name] == int(torch.linalg.matrix_rank(T - eye, atol=1e-9))
    assert found.changes.keys() == edit.changes.keys() == found.ranks.keys()


def test_condition_is_that_of_the_system_even_with_more_rows_than_features(pipe):
    edit = loco.locoedit(pipe, GOGH, LAYERS, lam=2.0, tokens="following")
    rows = len(next(iter(edit.changes.values())).R)
    solve = loco.diagnose(pipe, edit).solves["prompt k"]
    assert rows > 32 and len(solve.gram) == rows
    keys = torch.cat([embeds(pipe, GOGH.prompts[0])[8:], embeds(pipe, GOGH.prompts[1])[6:]])
    system = keys @ keys.T + 2.0 * torch.eye(rows, dtype=torch.float64)
    assert solve.condition == pytest.approx(float(torch.linalg.cond(system)), rel=1e-6)


@quiet
def test_residual_is_none_at_lam_zero_and_all_at_a_huge_lam(pipe):
    for lam, left in ((0.0, 0.0), (1e9, 1.0)):
        solves = loco.diagnose(pipe, loco.locoedit(pipe, GOGH, LAYERS, lam)).solves
        residual = torch.cat([solve.residual for solve in solves.values()])
        assert torch.allclose(residual, torch.full_like(residual, left), atol=1e-6)


def test_tables_name_every_row_and_weight(pipe):
    edit = loco.locoedit(pipe, GOGH, [8], lam=1.0, preserve=["a dog"], where=("v",))
    found = loco.diagnose(pipe, edit)
    rows = found.rows_to_frame()
    assert list(rows.columns) == ["solve", "row", "role", "residual"]
    assert rows.row.tolist() == [
        f"{GOGH.prompts[0]} | gogh",
        f"{GOGH.prompts[0]} | end",
        f"{GOGH.prompts[1]} | gogh",
        f"{GOGH.prompts[1]} | end",
        "a dog | a",
        "a dog | dog",
        "a dog | end",
    ]
    assert rows.role.tolist() == ["edited"] * 4 + ["preserved"] * 3
    assert set(rows.solve) == {"prompt v"}
    table = found.to_frame()
    assert list(table.index) == list(edit.changes) and list(table.columns) == ["change", "rank"]


def test_an_edit_that_no_prompts_made_has_changes_and_no_rows(pipe):
    name = f"unet.{loco.text_layers(pipe)[8].name}.to_k.weight"
    change = fit(torch.eye(32)[:1], torch.eye(32)[1:2], 0.1)
    found = loco.diagnose(pipe, make_edit(pipe, {name: change}, method="by hand"))
    assert found.solves == {} and found.ranks == {name: 1} and 0 < found.changes[name] < 1
    assert list(found.rows_to_frame().columns) == ["solve", "row", "role", "residual"]


# -- which edits can be examined, and in which state


KINDS = {
    "an edit": lambda text, unet: unet,
    "a scaled one": lambda text, unet: unet.scaled(0.5),
    "one of the text encoder": lambda text, unet: text,
    "both composed": loco.compose,
}


@quiet
@pytest.mark.parametrize("which", KINDS)
def test_a_loaded_or_applied_edit_is_told_the_same_and_nothing_changes(pipe, tmp_path, which):
    text = loco.diff_quickfix(pipe, GOGH, lam=1.0)
    edit = KINDS[which](text, loco.locoedit(pipe, GOGH, LAYERS, lam=2.0))
    before, found = state(pipe), loco.diagnose(pipe, edit)
    assert state(pipe) == before
    edit.save(tmp_path / "edit")
    assert same(loco.diagnose(pipe, loco.Edit.load(tmp_path / "edit")), found)
    with edit.applied(pipe):
        on = state(pipe)
        assert same(loco.diagnose(pipe, edit), found)
        assert state(pipe) == on
    assert state(pipe) == before


def test_a_composed_edit_is_measured_against_the_rows_of_both(pipe):
    a, b = (loco.locoedit(pipe, c, LAYERS, lam=2.0) for c in (GOGH, MONET))
    solve = loco.diagnose(pipe, loco.compose(a, b)).solves["prompt k"]
    C, G = pairs(pipe, GOGH_ROWS + MONET_ROWS)
    nothing = C[:0]
    T = dense(*pairs(pipe, GOGH_ROWS), nothing, 2.0) @ dense(*pairs(pipe, MONET_ROWS), nothing, 2.0)
    expected = (C @ T.T - G).norm(dim=1) / (G - C).norm(dim=1)
    assert torch.allclose(solve.residual, expected, rtol=1e-7) and solve.rank == 6


def test_parts_that_touch_different_layers_are_measured_each_with_its_own_rows(pipe):
    a, b = loco.locoedit(pipe, GOGH, [8], lam=2.0), loco.locoedit(pipe, MONET, [9], lam=2.0)
    solves = loco.diagnose(pipe, loco.compose(a, b)).solves
    assert list(solves) == ["prompt k", "prompt v", "prompt k 2", "prompt v 2"]
    for edit, number in ((a, ""), (b, " 2")):
        alone = loco.diagnose(pipe, edit).solves["prompt k"]
        assert solves[f"prompt k{number}"].labels == alone.labels
        assert torch.equal(solves[f"prompt k{number}"].residual, alone.residual)


def test_an_edit_made_on_an_edited_pipeline_is_measured_against_what_it_changes(pipe):
    below = loco.locoedit(pipe, GOGH, LAYERS, lam=2.0)
    with below.applied(pipe):
        above = loco.locoedit(pipe, MONET, LAYERS, lam=2.0)
        expected = {n: m.relative_change(weight(pipe, n)) for n, m in above.changes.items()}
        assert loco.diagnose(pipe, above).changes == pytest.approx(expected)
        with above.applied(pipe):
            assert loco.diagnose(pipe, above).changes == pytest.approx(expected)
            assert same(loco.diagnose(pipe, above), loco.diagnose(pipe, above))
    with pytest.raises(ValueError, match="was made for other weights than those of this"):
        loco.diagnose(pipe, above)


def test_an_edit_of_another_model_is_refused(pipe):
    edit, before = loco.locoedit(pipe, GOGH, LAYERS), state(other := build_tiny_sd(seed=3))
    with pytest.raises(ValueError, match=r"made for other weights .*to_k.weight differs\): load"):
        loco.diagnose(other, edit)
    assert state(other) == before


# -- warnings


def test_an_edit_larger_than_its_weights_warns_at_the_line_of_the_user(pipe):
    with pytest.warns(UserWarning, match="changes 4 of 4 weights by more than themselves") as seen:
        loco.locoedit(pipe, GOGH, LAYERS, lam=1e-3, tokens="following")
    assert {warning.filename for warning in seen} == {__file__}


@quiet
def test_prompts_that_nearly_coincide_but_contradict_each_other_warn(pipe):
    with torch.no_grad():  # red and blue all but mean the same
        table = pipe.text_encoder.embeddings.token_embedding.weight
        red, blue = (pipe.tokenizer(x, add_special_tokens=False).input_ids for x in ("red", "blue"))
        table[red[0]] = table[blue[0]] + 1e-4 * torch.randn(32)
    prompts, twins = ["a red van gogh", "a blue van gogh"], ["a house", "a dog running"]
    with pytest.warns(UserWarning, match="'a red van gogh | gogh' and 'a blue van gogh | gogh'"):
        loco.locoedit(pipe, loco.Concept("van gogh", "style", prompts, twins), LAYERS)
    with warnings.catch_warnings():  # the same prompts with one target agree
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*by more than themselves")
        loco.locoedit(pipe, loco.Concept("van gogh", "style", prompts, ["a house"] * 2), LAYERS)


@quiet
def test_a_prompt_that_is_edited_and_preserved_warns(pipe):
    with pytest.warns(UserWarning, match="nearly coincide but shall be read differently"):
        loco.uce(pipe, GOGH, preserve=GOGH.prompts[:1])


def test_a_sane_edit_of_a_trained_model_does_not_warn():
    pipe, styles = loco.load("mini-sd"), loco.shapeland.ATTRIBUTES["style"]
    for name in styles[:2]:
        concept = loco.shapeland.concept("style", name, 12)
        others = [p.replace(name, other) for p in concept.prompts for other in styles]
        preserve = [*concept.neutral, *(p for p in others if p not in concept.prompts)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            edit = loco.locoedit(pipe, concept, [8, 9], lam=20)
            loco.locoedit(pipe, concept, [8, 9], lam=20, preserve=preserve)
            loco.uce(pipe, concept, preserve, lam=20)
        assert max(loco.diagnose(pipe, edit).solves["prompt k"].residual) < 0.5
