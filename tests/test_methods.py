"""UCE, TIME and LocoEdit do what their papers say, weight by weight and layer by layer."""

import inspect
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TOKENS as LENGTH
from conftest import build_tiny_sd, embeds, pairs, state

import loco_core as loco
from loco_core.closed_form.recipe import recipes_of

GOGH = loco.Concept(
    "van gogh",
    "style",
    ["a house in the style of van gogh", "a red star by van gogh with a tree"],
    ["a house", "a red star with a tree"],
    ["a painting by claude monet"],
)
MONET = loco.Concept("monet", "style", ["a tree in the style of claude monet"], ["a tree"])
KEPT = "a photo of a dog running"
LAYERS = [8, 9]
# (prompt, its token, twin, its token) of the last subject token and of the end of the text
GOGH_ROWS = [
    (GOGH.prompts[0], 8, "a house", 2),
    (GOGH.prompts[0], 9, "a house", 3),
    (GOGH.prompts[1], 6, GOGH.neutral[1], 3),
    (GOGH.prompts[1], 10, GOGH.neutral[1], 7),
]
MONET_ROWS = [(MONET.prompts[0], 8, "a tree", 2), (MONET.prompts[0], 9, "a tree", 3)]

pytestmark = pytest.mark.filterwarnings("ignore:.*by more than themselves")


@pytest.fixture
def pipe():
    return build_tiny_sd()


def normal_equations(W, C, G, lam: float, s=1.0) -> torch.Tensor:
    """(sum_i s_i W g_i c_i^T + lam W) (sum_i s_i c_i c_i^T + lam I)^-1, d x d, in float64."""
    W, d = W.double(), W.shape[1]
    left, right = lam * W, lam * torch.eye(d, dtype=torch.float64)
    for c, g, weight in zip(C, G, torch.as_tensor(s).expand(len(C)), strict=True):
        left = left + weight * torch.outer(W @ g, c)
        right = right + weight * torch.outer(c, c)
    return torch.linalg.solve(right, left, left=False)


def projections(pipe) -> dict[str, torch.Tensor]:
    """All to_k and to_v weights of the cross-attention."""
    return {
        f"unet.{name}": parameter.detach().clone()
        for name, parameter in pipe.unet.named_parameters()
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }


@torch.no_grad()
def read(pipe, prompt: str, layer: int) -> dict[str, torch.Tensor]:
    """K and V [token, channel] that `layer` makes of the prompt in a run of the whole UNet."""
    attention, seen = pipe.unet.get_submodule(loco.text_layers(pipe)[layer].name), {}
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output[0].double()})
        )
        for name in ("to_k", "to_v")
    ]
    denoise(pipe, prompt)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def denoise(pipe, prompt: str) -> torch.Tensor:
    """The UNet's answer to fixed noise under a prompt."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(pipe.unet.dtype)
    text = embeds(pipe, prompt)[None].to(pipe.unet.dtype)
    return pipe.unet(noise, 500, encoder_hidden_states=text).sample


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# -- UCE


@pytest.mark.parametrize("erase, keep, lam", [(1.0, 1.0, 0.5), (2.0, 0.3, 0.1), (1.0, 0.0, 0.5)])
def test_uce_is_its_published_closed_form_in_every_projection(tiny_sd, erase, keep, lam):
    edit = loco.uce(tiny_sd, GOGH, [KEPT], lam, erase_scale=erase, preserve_scale=keep)
    kept = embeds(tiny_sd, KEPT)[1:8]  # six words and the end of the text
    C, G = pairs(tiny_sd, GOGH_ROWS)
    C, G = torch.cat([C, kept]), torch.cat([G, kept])
    scales = torch.tensor([erase] * 4 + [keep] * 7, dtype=torch.float64)
    originals = projections(tiny_sd)
    assert edit.changes.keys() == originals.keys() and len(originals) == 32
    with edit.applied(tiny_sd):
        edited = projections(tiny_sd)
    for name, W in originals.items():
        expected = normal_equations(W, C, G, lam, scales)
        assert off(edit.changes[name].apply_to(W.double()), expected) < 1e-9
        assert off(edited[name], expected) < 1e-6


def test_uce_of_several_concepts_stacks_their_rows(tiny_sd):
    edit = loco.uce(tiny_sd, [GOGH, MONET], lam=0.5)
    C, G = pairs(tiny_sd, GOGH_ROWS + MONET_ROWS)
    for name, W in projections(tiny_sd).items():
        assert off(edit.changes[name].apply_to(W.double()), normal_equations(W, C, G, 0.5)) < 1e-9


@pytest.mark.parametrize("method", [loco.uce, loco.time_edit], ids=["uce", "time"])
def test_layers_restrict_what_is_edited_and_nothing_else(tiny_sd, method):
    names = [layer.name for layer in loco.text_layers(tiny_sd)]
    everywhere, some = method(tiny_sd, GOGH), method(tiny_sd, GOGH, layers=[3, 12])
    assert some.changes.keys() == {f"unet.{names[i]}.to_{x}.weight" for i in (3, 12) for x in "kv"}
    assert all(change == everywhere.changes[name] for name, change in some.changes.items())


def test_uce_of_a_trained_model_is_its_published_closed_form():
    pipe = loco.load("mini-sd")
    prompt, twin, kept = (f"a red house{by}" for by in (" by Mira Holt", "", " by Otto Lisk"))
    edit = loco.uce(pipe, loco.Concept("Mira Holt", "style", [prompt], [twin]), [kept], lam=0.5)
    # BOS a red house by Mira Holt EOS: every word of Shapeland is one token
    held = embeds(pipe, kept)[1:8]
    C = torch.cat([embeds(pipe, prompt)[[6, 7]], held])
    G = torch.cat([embeds(pipe, twin)[[3, 4]], held])
    for name, W in list(projections(pipe).items())[::7]:
        assert off(edit.changes[name].apply_to(W.double()), normal_equations(W, C, G, 0.5)) < 1e-8


# -- TIME


@pytest.mark.parametrize(
    "concept, target, twin, in_twin",
    [
        # BOS a rose EOS pad ... reads as BOS a blue rose EOS pad ...
        (("house", "color", ["a house"], ["a tree"]), "a blue house", "a blue house",
         [1, 3, 4, 5, 5, *range(6, LENGTH)]),
        # BOS a red star by van gogh with a tree EOS pad ... as BOS a red star with a tree EOS ...
        (("van gogh", "style", [GOGH.prompts[1]], [GOGH.neutral[1]]), None, GOGH.neutral[1],
         [1, 2, 3, 3, 3, 3, 4, 5, 6, 7, *range(11, LENGTH)]),
    ],
    ids=["a longer target", "a shorter target"],
)  # fmt: skip
def test_time_reads_every_token_as_that_of_the_target_in_all_layers(
    tiny_sd, concept, target, twin, in_twin
):
    concept = loco.Concept(*concept)
    edit = loco.time_edit(tiny_sd, concept, lam=0.1, target=target and [target])
    C, G = embeds(tiny_sd, concept.prompts[0])[1:], embeds(tiny_sd, twin)[in_twin]
    originals = projections(tiny_sd)
    assert edit.changes.keys() == originals.keys()
    for name, W in originals.items():
        assert off(edit.changes[name].apply_to(W.double()), normal_equations(W, C, G, 0.1)) < 1e-8


# -- LocoEdit: several concepts, the null space, the four uses


def test_several_concepts_are_the_textbook_solve_of_all_their_rows(tiny_sd):
    edit = loco.locoedit(tiny_sd, [GOGH, MONET], LAYERS, lam=0.01)
    C, G = pairs(tiny_sd, GOGH_ROWS + MONET_ROWS)
    assert len(edit.changes) == 4 and {m.D.shape[1] for m in edit.changes.values()} == {6}
    for name, change in edit.changes.items():
        W = projections(tiny_sd)[name]
        assert off(change.apply_to(W.double()), normal_equations(W, C, G, 0.01)) < 1e-8


@pytest.mark.parametrize("dtype, exact", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("tokens", ["eos", "following"])
def test_null_space_is_read_exactly_as_before_while_the_concept_moves(dtype, exact, tokens):
    pipe = build_tiny_sd(tokens=12).to(dtype)
    concept = loco.Concept("van gogh", "style", ["a house by van gogh"], ["a house"])
    held = {"": range(12), "a red dog": range(0, 12 if tokens == "following" else 5)}
    # lam = 1e-9 meets the few rows of "eos"; with "following" fewer directions are left than rows
    lam = 1e-9 if tokens == "eos" else 0.1
    edit = loco.locoedit(pipe, concept, LAYERS, lam, tokens=tokens, null_space=["a red dog"])
    before = {prompt: read(pipe, prompt, 8) for prompt in (*held, "a house", concept.prompts[0])}
    with edit.applied(pipe):
        after = {prompt: read(pipe, prompt, 8) for prompt in (*held, concept.prompts[0])}
    for kind in ("to_k", "to_v"):
        for prompt, places in held.items():
            found, wanted = after[prompt][kind][places], before[prompt][kind][places]
            assert ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max() <= exact
        old, new = (x[concept.prompts[0]][kind][[5, 6]] for x in (before, after))
        wanted = before["a house"][kind][[2, 3]]
        if tokens == "eos":
            assert off(new, wanted) < 1e-3 < off(old, wanted)
        else:
            assert off(new, old) > 0.05


def test_null_space_leaves_the_negative_half_of_guidance_and_empty_images_alone():
    pipe = build_tiny_sd(tokens=12)
    concept = loco.Concept("van gogh", "style", ["a house by van gogh"], ["a house"])
    prompts = ["", concept.prompts[0]]
    free = loco.locoedit(pipe, concept, LAYERS)
    edit = loco.locoedit(pipe, concept, LAYERS, null_space=())
    generate = partial(loco.generate, pipe, prompts, seeds=[0], steps=2)
    half, images = denoise(pipe, ""), generate()
    with free.applied(pipe):
        assert off(denoise(pipe, ""), half) > 1e-4  # without it, guidance is not left alone
    with edit.applied(pipe):
        assert off(denoise(pipe, ""), half) < 1e-5
        edited = generate()
    assert (edited[0] - images[0]).abs().max() < 1e-4 < (edited[1] - images[1]).abs().max()


def test_values_alone_leave_every_key_bit_identical(pipe):
    before = state(pipe)
    edit = loco.locoedit(pipe, GOGH, LAYERS, where=("v",))
    both = loco.locoedit(pipe, GOGH, LAYERS)
    names = [loco.text_layers(pipe)[i].name for i in LAYERS]
    assert edit.provenance.settings["lam"] == {"v": 0.01}
    with edit.applied(pipe):
        after = state(pipe)
    assert {n for n in after if after[n] != before[n]} == {f"unet.{x}.to_v.weight" for x in names}
    assert all(change == both.changes[name] for name, change in edit.changes.items())


USES = {
    "erase": (GOGH, dict(), GOGH_ROWS),
    "replace": (
        loco.Concept("van gogh", "style", [GOGH.prompts[0]], ["a house"]),
        dict(target=["a house in the style of claude monet"]),
        [(GOGH.prompts[0], i, "a house in the style of claude monet", i) for i in (8, 9)],
    ),
    "update a fact": (
        loco.Concept(
            "the emblem of norland",
            "fact",
            ["a photo of the emblem of norland"],
            ["a photo of a circle"],
            ["a photo of a star"],
        ),
        dict(),
        [("a photo of the emblem of norland", 7 + i, "a photo of a star", 5 + i) for i in (0, 1)],
    ),
    "remove an object": (
        loco.Concept("dog", "object", ["a photo of a dog"], ["a photo"]),
        dict(target=["a"]),
        [("a photo of a dog", 5 + i, "a", 1 + i) for i in (0, 1)],
    ),
}


@pytest.mark.parametrize("concept, choice, rows", USES.values(), ids=USES)
def test_edited_layers_make_the_keys_and_values_of_the_target(tiny_sd, concept, choice, rows):
    missed = {}
    for lam in (1.0, 1e-3, 1e-8):
        edit = loco.locoedit(tiny_sd, concept, LAYERS, lam, **choice)
        with edit.applied(tiny_sd):
            new = {(p, x): read(tiny_sd, p, x) for p in concept.prompts for x in LAYERS}
        missed[lam] = max(
            off(new[prompt, layer][kind][i], read(tiny_sd, twin, layer)[kind][j])
            for prompt, i, twin, j in rows
            for layer in LAYERS
            for kind in ("to_k", "to_v")
        )
    assert missed[1.0] > missed[1e-3] > missed[1e-8] and missed[1e-8] < 1e-4


def test_the_other_layers_read_the_concept_as_before(tiny_sd):
    before = read(tiny_sd, GOGH.prompts[0], 3)
    with loco.locoedit(tiny_sd, GOGH, LAYERS).applied(tiny_sd):
        assert torch.equal(read(tiny_sd, GOGH.prompts[0], 3)["to_k"], before["to_k"])


# -- with an outer autocast, and with bad input


def test_autocast_around_an_edit_sees_it_come_and_go(pipe):
    edit = loco.locoedit(pipe, GOGH, range(16), lam=0.01)
    generate = partial(loco.generate, pipe, [GOGH.prompts[0]], seeds=[0], steps=2)
    with edit.applied(pipe), torch.autocast("cpu", torch.bfloat16):
        alone = generate()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        before = generate()
        with edit.applied(pipe):
            inside = generate()
        after = generate()
    assert torch.equal(inside, alone) and not torch.equal(inside, before)
    assert torch.equal(after, before)


LISTED = dict(concept=[GOGH, MONET])
BAD = {
    "tokens": (dict(tokens="first"), "unknown tokens 'first': choose one of last, eos, following"),
    "where": (dict(where=("q",)), r"where=\('q',\) matches no weight: choose from \('k', 'v'\)"),
    "bare where": (dict(where="k"), "where='k' matches no weight"),
    "no where": (dict(where=()), r"where=\(\) matches no weight"),
    "a concept twice": (dict(concept=[GOGH, MONET, GOGH]), r"\['van gogh'\] are given twice"),
    "no concept": (dict(concept=[]), "list of concepts is empty: give at least one"),
    "one target list": (LISTED | dict(target=["a"]), "cannot serve several concepts: give each"),
    "a target that one lacks": (LISTED | dict(target="target"), "'monet' has no target prompts"),
    "bare preserve": (dict(preserve=KEPT), f"preserve must be a list of prompts: pass .'{KEPT}'"),
    "bare null_space": (dict(null_space=KEPT), "null_space must be a list of prompts"),
    "preserve holds a number": (dict(preserve=[3]), "prompt 3 is not a string"),
    "null space holds all": (dict(null_space=[GOGH.prompts[0]] * 2 + [KEPT, *GOGH.prompts]),
                             "nothing is left to edit; hold fewer rows, or pass them as preserve"),
    "lam is no number": (dict(lam=None), "lam must be a finite number >= 0, not None"),
    "lam is a word": (dict(lam="small"), "lam must be a finite number >= 0, not 'small'"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line_and_nothing_changes(tiny_sd, change, message):
    before = state(tiny_sd)
    with pytest.raises(ValueError, match=message) as caught:
        loco.locoedit(tiny_sd, **{"concept": GOGH, "layers": LAYERS} | change)
    assert "\n" not in str(caught.value) and caught.value.__context__ is None
    assert state(tiny_sd) == before


@pytest.mark.parametrize("scale", [-1.0, float("nan"), "2", None])
@pytest.mark.parametrize("name", ["erase_scale", "preserve_scale"])
def test_scales_of_uce_must_be_numbers_from_zero_up(tiny_sd, name, scale):
    with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0, not {scale!r}"):
        loco.uce(tiny_sd, GOGH, **{name: scale})


@pytest.mark.parametrize("method", [loco.uce, loco.time_edit, loco.diff_quickfix])
def test_every_method_refuses_what_is_no_concept(tiny_sd, method):
    with pytest.raises(TypeError, match="must be a loco.Concept, not 'van gogh'"):
        method(tiny_sd, ["van gogh"])
    with pytest.raises(ValueError, match="list of concepts is empty"):
        method(tiny_sd, ())


# -- the same bits, and a Recipe that can be read again


def probe(change):
    x = torch.linspace(-1, 1, change.R.shape[1], dtype=torch.float64)
    return [float((change.R @ x) @ (x @ change.D)), float(change.D.norm()), float(change.R.norm())]


def edits_of(pipe):
    one = loco.shapeland.concept("style", "Mira Holt", 2)
    kept = loco.shapeland.concept("style", "Mira Dunn", 3).prompts
    yield "locoedit", loco.locoedit(pipe, one, [8, 9])
    yield (
        "locoedit with all",
        loco.locoedit(pipe, one, [8], 0.1, lam_v=3.0, tokens="following", preserve=kept[:1],
                      null_space=["a tree"], where=("k", "v")),
    )  # fmt: skip
    asked = dict(tokens="last", target=["a circle"])
    yield "last, own target", loco.locoedit(pipe, one, [3, 4], 1.0, **asked)
    yield "uce", loco.uce(pipe, one, kept, 0.5, erase_scale=2.0, preserve_scale=0.5)
    yield "time", loco.time_edit(pipe, one, 0.1, layers=[0, 1])
    yield "quickfix", loco.diff_quickfix(pipe, one, preserve=kept)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mini-sd", "mini-sdxl"])
def test_every_method_makes_the_maps_of_0_3(name):
    """Three numbers of each map; where they were recorded, all bits were the same."""
    known = json.loads((Path(__file__).parent / "data" / "edits_0_3.json").read_text())
    for case, edit in edits_of(loco.load(name)):
        found = sorted(probe(change) for change in set(edit.changes.values()))
        assert torch.allclose(
            torch.tensor(found).double(), torch.tensor(known[f"{name}: {case}"]).double(), rtol=1e-7
        ), case


@pytest.mark.filterwarnings("ignore")
def test_what_an_edit_was_made_from_is_read_from_its_file(tmp_path):
    pipe = loco.load("mini-sd")
    for case, edit in edits_of(pipe):
        edit.save(tmp_path / "edit")
        (recipe,) = recipes_of(loco.Edit.load(tmp_path / "edit"))
        told = json.loads(json.dumps(recipe.to_settings()))
        assert told == edit.provenance.settings, case
        assert all(isinstance(concept, loco.Concept) for concept in recipe.concepts)
    both = loco.compose(loco.locoedit(pipe, recipe.concepts[0], [8]), edit)
    assert [part.method for part in recipes_of(both)] == ["locoedit", "diff_quickfix"]


def test_all_methods_take_the_same_keywords():
    takes = [set(inspect.signature(method).parameters) for method in
             (loco.locoedit, loco.uce, loco.time_edit, loco.diff_quickfix)]  # fmt: skip
    assert takes[0] == takes[1] == takes[2]
    assert takes[0] - takes[3] == {"layers", "where", "lam_k", "lam_v"}
    assert takes[3] - takes[0] == {"layer"}
