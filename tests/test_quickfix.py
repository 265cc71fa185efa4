"""Diff-QuickFix makes one projection of the text encoder answer a concept with its target."""

import pytest
import torch
from conftest import build_tiny_sd, state

import loco_core as loco
from loco_core import families
from loco_core.families.stable_diffusion import StableDiffusion

GOGH = loco.Concept(
    "van gogh",
    "style",
    ["a house in the style of van gogh", "a red star by van gogh with a tree"],
    ["a house", "a red star with a tree"],
    ["a painting by claude monet"],
)
# (prompt, its token, twin, its token): BOS a house in the style of van gogh EOS, and so on
LAST = [(GOGH.prompts[0], 8, "a house", 2), (GOGH.prompts[1], 6, GOGH.neutral[1], 3)]
ENDS = [(GOGH.prompts[0], 9, "a house", 3), (GOGH.prompts[1], 10, GOGH.neutral[1], 7)]
ROWS = {"last": LAST, "eos": LAST + ENDS}

pytestmark = pytest.mark.filterwarnings("ignore:.*by more than themselves")


@pytest.fixture
def pipe():
    """A tiny pipeline whose biases are not zero, as those of a trained text encoder."""
    pipe = build_tiny_sd()
    for layer in range(2):
        bias = out_proj(pipe, layer).bias
        torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(layer))
    return pipe


def out_proj(pipe, layer: int = 0) -> torch.nn.Linear:
    return pipe.text_encoder.encoder.layers[layer].self_attn.out_proj


def name_of(layer: int) -> str:
    return f"text_encoder.encoder.layers.{layer}.self_attn.out_proj.weight"


@torch.no_grad()
def seen(pipe, prompt: str, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output [token, d] of out_proj for one prompt, in float64, by a hook of our own."""
    found = []
    hook = out_proj(pipe, layer).register_forward_hook(
        lambda module, args, output: found.extend((args[0][0].double(), output[0].double()))
    )
    encoded(pipe, prompt)
    hook.remove()
    return tuple(found)


@torch.no_grad()
def encoded(pipe, prompt: str) -> torch.Tensor:
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt")
    return pipe.text_encoder(ids.input_ids)[0][0]


def published(pipe, rows: list, lam: float, layer: int = 0) -> torch.Tensor:
    """W' = (lam W + sum v k^T) (lam I + sum k k^T)^-1, v an output minus the bias; float64."""
    W, bias = (x.detach().double() for x in out_proj(pipe, layer).parameters())
    left, right = lam * W, lam * torch.eye(W.shape[1], dtype=torch.float64)
    for prompt, i, twin, j in rows:
        k, v = seen(pipe, prompt, layer)[0][i], seen(pipe, twin, layer)[1][j] - bias
        left, right = left + torch.outer(v, k), right + torch.outer(k, k)
    return torch.linalg.solve(right, left, left=False)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("tokens", ROWS)
def test_quickfix_is_the_published_formula_and_leaves_the_bias(pipe, tokens, layer):
    before = state(pipe)
    expected = published(pipe, ROWS[tokens], 0.01, layer)
    edit = loco.diff_quickfix(pipe, GOGH, lam=0.01, tokens=tokens, layer=layer)
    assert state(pipe) == before and list(edit.changes) == [name_of(layer)]
    with edit.applied(pipe):
        after = state(pipe)
        W = out_proj(pipe, layer).weight.detach().double()
    # v is an output minus a bias of float32 numbers: it carries their rounding
    assert off(W, expected) < 1e-5
    assert {name for name in after if after[name] != before[name]} == {name_of(layer)}
    assert state(pipe) == before


def test_quickfix_is_the_published_formula_on_a_trained_encoder():
    pipe = loco.load("mini-sd")
    pair = "a red house by Mira Holt", "a red house"
    rows = [(pair[0], 6, pair[1], 3)]
    expected = published(pipe, rows, 0.01)
    edit = loco.diff_quickfix(pipe, loco.Concept("Mira Holt", "style", pair[:1], pair[1:]))
    with edit.applied(pipe):
        assert off(out_proj(pipe).weight.detach().double(), expected) < 1e-5


@pytest.mark.parametrize("tokens", ROWS)
def test_projection_answers_the_concept_with_its_target_as_lam_vanishes(pipe, tokens):
    wanted = {(twin, j): seen(pipe, twin)[1][j] for _, _, twin, j in ROWS[tokens]}
    missed = []
    for lam in (1.0, 1e-4, 1e-10):
        with loco.diff_quickfix(pipe, GOGH, lam, tokens=tokens).applied(pipe):
            answers = [(seen(pipe, p)[1][i], wanted[twin, j]) for p, i, twin, j in ROWS[tokens]]
        missed.append(max(off(*pair) for pair in answers))
    assert missed[0] > missed[1] > missed[2] and missed[2] < 1e-3


def test_several_concepts_are_solved_together(pipe):
    monet = loco.Concept("monet", "style", ["a tree by claude monet"], ["a tree"])
    rows = [*LAST, ("a tree by claude monet", 5, "a tree", 2)]
    expected = published(pipe, rows, 0.01)
    with loco.diff_quickfix(pipe, [GOGH, monet]).applied(pipe):
        assert off(out_proj(pipe).weight.detach().double(), expected) < 1e-5


def test_a_whole_object_reads_as_an_article(pipe):
    dog = loco.Concept("dog", "object", ["a photo of a dog"], ["a photo"])
    expected = published(pipe, [("a photo of a dog", 5, "a", 1)], 0.01)
    with loco.diff_quickfix(pipe, dog, target=["a"]).applied(pipe):
        assert off(out_proj(pipe).weight.detach().double(), expected) < 1e-5


class TwoEncoders(StableDiffusion):
    """A family whose prompts are the sum of what two text encoders say."""

    @property
    def text_encoders(self):
        second = "text_encoder_2.encoder.layers"
        return super().text_encoders | {second: self.pipe.text_encoder_2.encoder.layers}

    def encode(self, prompts):
        states, ids = super().encode(prompts), self.tokenize(prompts)
        with torch.no_grad():
            return families.TextStates(states.embeds + self.pipe.text_encoder_2(ids)[0], ids)


def test_every_text_encoder_is_edited_with_keys_of_its_own(pipe, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (TwoEncoders,))
    pipe.text_encoder_2 = build_tiny_sd(seed=5).text_encoder
    swapped = build_tiny_sd(seed=5)  # to read the second encoder as if it were the first
    expected = {
        name_of(0): published(pipe, LAST, 0.01),
        name_of(0).replace("encoder.", "encoder_2.", 1): published(swapped, LAST, 0.01),
    }
    edit = loco.diff_quickfix(pipe, GOGH)
    assert list(edit.changes) == list(expected)
    with edit.applied(pipe):
        for name, W in expected.items():
            encoder, _, path = name.partition(".")
            assert off(getattr(pipe, encoder).get_parameter(path).detach().double(), W) < 1e-5


def test_encoded_prompts_change_where_they_read_the_concept(pipe):
    before = encoded(pipe, GOGH.prompts[0])
    model = loco.family_of(pipe)
    assert torch.equal(model.encode(GOGH.prompts[:1]).embeds[0], before)
    with loco.diff_quickfix(pipe, GOGH).applied(pipe):
        after = model.encode(GOGH.prompts[:1]).embeds[0]
        assert torch.equal(after, encoded(pipe, GOGH.prompts[0]))
    assert (after - before)[8].norm() > 0.1 * before[8].norm()
    assert torch.equal(encoded(pipe, GOGH.prompts[0]), before)


def test_null_space_and_preserve_reach_the_text_encoder_too(pipe):
    kept, empty = seen(pipe, "a blue circle"), seen(pipe, "")
    free = loco.diff_quickfix(pipe, GOGH, tokens="last")
    with free.applied(pipe):
        moved = off(seen(pipe, "a blue circle")[1][1:5], kept[1][1:5])
    with loco.diff_quickfix(pipe, GOGH, lam=1e-4, preserve=["a blue circle"]).applied(pipe):
        assert off(seen(pipe, "a blue circle")[1][1:5], kept[1][1:5]) < 0.1 * moved
    with loco.diff_quickfix(pipe, GOGH, null_space=()).applied(pipe):
        assert off(seen(pipe, "")[1], empty[1]) < 1e-5 < moved


class Interruption(Exception):
    pass


@pytest.mark.parametrize("breaks", [False, True], ids=["finished", "interrupted"])
def test_no_hook_is_left_and_those_of_others_stay(pipe, breaks):
    def later(module, args):
        if breaks:
            raise Interruption

    others = out_proj(pipe).register_forward_pre_hook(lambda module, args: None)
    pipe.text_encoder.encoder.layers[1].register_forward_pre_hook(later)
    before = hooks(pipe)
    if breaks:
        with pytest.raises(Interruption):
            loco.diff_quickfix(pipe, GOGH)
    else:
        loco.diff_quickfix(pipe, GOGH)
    assert hooks(pipe) == before and others.id in out_proj(pipe)._forward_pre_hooks


def hooks(pipe) -> dict[str, list[int]]:
    return {
        name: [*module._forward_pre_hooks, *module._forward_hooks]
        for name, module in pipe.text_encoder.named_modules()
    }


@pytest.mark.parametrize("layer", [2, -1, "first", None, True])
def test_a_layer_that_no_text_encoder_has_is_refused(pipe, layer):
    with pytest.raises(ValueError, match="is not in text_encoder.encoder.layers: choose from 0 to"):
        loco.diff_quickfix(pipe, GOGH, layer=layer)


def test_an_encoder_without_an_output_projection_is_refused(pipe):
    pipe.text_encoder.encoder.layers[0].self_attn = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"layers.0 has no self_attn.out_proj: only CLIP"):
        loco.diff_quickfix(pipe, GOGH)


def test_a_text_encoder_that_goes_round_the_projection_is_refused(pipe):
    attention = pipe.text_encoder.encoder.layers[0].self_attn
    attention.forward = lambda hidden_states, **more: (hidden_states, None)  # as a fused kernel
    with pytest.raises(ValueError, match="was not run while the prompts were encoded"):
        loco.diff_quickfix(pipe, GOGH)


def test_the_edit_survives_a_disk_and_belongs_to_its_text_encoder(pipe, tmp_path):
    edit = loco.diff_quickfix(pipe, GOGH, tokens="eos")
    edit.save(tmp_path / "edit.safetensors")
    loaded = loco.Edit.load(tmp_path / "edit.safetensors")
    assert loaded == edit and "diff_quickfix of 1 weights" in repr(loaded)
    with edit.applied(pipe):
        once = state(pipe)
    with loaded.applied(pipe):
        assert state(pipe) == once
    with pytest.raises(ValueError, match="made for other weights"):
        loaded.apply(build_tiny_sd(seed=7))
