"""LocoEdit makes the chosen layers read a concept as its target, and touches nothing else."""

import pytest
import torch
from conftest import TOKENS as LENGTH
from conftest import build_tiny_sd

import loco_core as loco
from loco_core.families.tokens import TOKENS

GOGH = loco.Concept(
    "van gogh",
    "style",
    ["a house in the style of van gogh", "a red star by van gogh with a tree"],
    ["a house", "a red star with a tree"],
    ["a painting by claude monet"],
)
LAYERS = [8, 9]
# BOS a red star by van gogh with a tree EOS pad: the last subject token is 6, EOS 10 in the prompt;
# BOS a red star with a tree EOS pad: "star" is 3 and EOS 7 in the twin.
IN_PROMPT = {
    "last": [6],
    "eos": [6, 10],
    "following": list(range(6, LENGTH)),
    "all": list(range(1, LENGTH)),
}
IN_TWIN = {
    "last": [3],
    "eos": [3, 7],
    "following": [3, 4, 5, 6, 7, *range(11, LENGTH)],
    "all": [1, 2, 3, 3, 3, 3, 4, 5, 6, 7, *range(11, LENGTH)],
}


def one_pair(prompt: str, twin: str, name: str = "van gogh") -> loco.Concept:
    return loco.Concept(name, "style", [prompt], [twin])


def embeds(pipe, prompt: str) -> torch.Tensor:
    """Token embeddings [token, width] by the text encoder alone."""
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        return pipe.text_encoder(ids.input_ids)[0][0]


def projections(pipe) -> dict[str, torch.Tensor]:
    """All to_k and to_v weights of the cross-attention, in execution order of the layers."""
    return {
        f"unet.{layer.name}.{kind}.weight": pipe.unet.get_parameter(f"{layer.name}.{kind}.weight")
        .detach()
        .clone()
        for layer in loco.text_layers(pipe)
        for kind in ("to_k", "to_v")
    }


def state(pipe) -> dict[str, bytes]:
    return {
        f"{part}.{name}": tensor.numpy().tobytes()
        for part in ("unet", "text_encoder", "vae")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def rank_of(edit: loco.Edit) -> int:
    return next(iter(edit.changes.values())).D.shape[1]


def test_edited_layers_read_every_key_as_its_target_as_lam_vanishes(tiny_sd):
    originals = projections(tiny_sd)
    C = torch.stack([embeds(tiny_sd, GOGH.prompts[0])[8], embeds(tiny_sd, GOGH.prompts[1])[6]])
    G = torch.stack([embeds(tiny_sd, GOGH.neutral[0])[2], embeds(tiny_sd, GOGH.neutral[1])[3]])
    missed = {}
    for lam in (1.0, 1e-2, 1e-4, 1e-9, 0.0):
        edit = loco.locoedit(tiny_sd, GOGH, LAYERS, lam, tokens="last")
        with edit.applied(tiny_sd):
            edited = projections(tiny_sd)
        missed[lam] = [
            ((edited[name] @ C.T - originals[name] @ G.T).norm() / (originals[name] @ G.T).norm())
            for name in edit.changes
        ]
    for bigger, smaller in zip((1.0, 1e-2, 1e-4), (1e-2, 1e-4, 1e-9), strict=True):
        assert all(a > b for a, b in zip(missed[bigger], missed[smaller], strict=True))
    assert max(missed[1e-9]) < 1e-5 and max(missed[0.0]) < 1e-5


def test_only_the_chosen_layers_change(tiny_sd):
    names = [layer.name for layer in loco.text_layers(tiny_sd)]
    before = state(tiny_sd)
    edit = loco.locoedit(tiny_sd, GOGH, LAYERS)
    assert state(tiny_sd) == before  # making an edit changes nothing yet
    with edit.applied(tiny_sd):
        after = state(tiny_sd)
        changed = {name for name in after if after[name] != before[name]}
    assert changed == {f"unet.{names[i]}.{kv}.weight" for i in LAYERS for kv in ("to_k", "to_v")}
    assert state(tiny_sd) == before


def test_one_map_serves_every_layer_and_agrees_with_the_textbook_per_layer(tiny_sd):
    edit = loco.locoedit(tiny_sd, GOGH, range(16), lam=0.01, tokens="last")
    assert len(edit.changes) == 32 and len({id(change) for change in edit.changes.values()}) == 1
    C = torch.stack([embeds(tiny_sd, GOGH.prompts[0])[8], embeds(tiny_sd, GOGH.prompts[1])[6]])
    G = torch.stack([embeds(tiny_sd, GOGH.neutral[0])[2], embeds(tiny_sd, GOGH.neutral[1])[3]])
    C, G, eye = C.double(), G.double(), 0.01 * torch.eye(32, dtype=torch.float64)
    for name, W in projections(tiny_sd).items():
        expected = W.double() @ (G.T @ C + eye) @ torch.linalg.inv(C.T @ C + eye)
        assert torch.allclose(edit.changes[name].apply_to(W.double()), expected, atol=1e-7)


@pytest.mark.parametrize("tokens", TOKENS["edit"])
def test_tokens_are_paired_as_documented(tiny_sd, tokens):
    prompt, twin = GOGH.prompts[1], GOGH.neutral[1]
    edit = loco.locoedit(tiny_sd, one_pair(prompt, twin), LAYERS, lam=0.0, tokens=tokens)
    change = next(iter(edit.changes.values()))
    C, G = embeds(tiny_sd, prompt)[IN_PROMPT[tokens]], embeds(tiny_sd, twin)[IN_TWIN[tokens]]
    assert torch.equal(change.D, (G.double() - C.double()).T)
    assert torch.allclose(C.double() + C.double() @ change.R.T @ change.D.T, G.double(), atol=1e-5)


@pytest.mark.parametrize(
    "prompt, twin, last, instead",
    [
        ("a painting by van gogh", "a painting", 5, 2),  # no tail: the twin's last word
        ("a painting by van gogh", "a painting by claude monet", 5, 5),
        ("a van gogh house", "a house", 3, 1),  # nothing instead: the last shared word, "a"
        ("a van gogh house", "a claude monet house", 3, 3),
        ("van gogh house", "house", 2, 1),  # the twin is the tail: its first word, not BOS
        ("van gogh", "", 2, 1),  # an empty twin: EOS
        ("a red red van gogh house", "a red house red house", 5, 4),
    ],
)
def test_subject_reads_as_what_the_twin_has_in_its_place(tiny_sd, prompt, twin, last, instead):
    edit = loco.locoedit(tiny_sd, one_pair(prompt, twin), LAYERS, tokens="last")
    expected = embeds(tiny_sd, twin)[instead].double() - embeds(tiny_sd, prompt)[last].double()
    assert torch.equal(next(iter(edit.changes.values())).D[:, 0], expected)


def test_words_behind_the_subject_that_the_twin_lacks_read_like_the_subject(tiny_sd):
    prompt, twin = "a star by van gogh with a tree", "a painting"
    edit = loco.locoedit(tiny_sd, one_pair(prompt, twin), LAYERS, tokens="following")
    G = next(iter(edit.changes.values())).D.T + embeds(tiny_sd, prompt)[5:].double()
    expected = embeds(tiny_sd, twin)[[2, 2, 2, 2, 3, *range(10, LENGTH)]].double()
    assert torch.allclose(G, expected, atol=1e-12)


def test_twin_longer_than_the_prompt_pairs_padding_with_padding(tiny_sd):
    prompt, twin = "van gogh", "a red house with a tree"
    edit = loco.locoedit(tiny_sd, one_pair(prompt, twin), LAYERS, tokens="following")
    G = next(iter(edit.changes.values())).D.T + embeds(tiny_sd, prompt)[2:].double()
    expected = embeds(tiny_sd, twin)[[6, 7, *[8] * 5, *range(9, LENGTH)]].double()
    assert torch.allclose(G, expected, atol=1e-12)


def test_lam_of_keys_and_values_are_separate(tiny_sd):
    both = loco.locoedit(tiny_sd, GOGH, LAYERS, lam=0.01, lam_v=5.0)
    soft = loco.locoedit(tiny_sd, GOGH, LAYERS, lam=5.0)
    hard = loco.locoedit(tiny_sd, GOGH, LAYERS, lam=0.01)
    for name, change in both.changes.items():
        assert change == (soft if "to_v" in name else hard).changes[name]
    assert both == loco.locoedit(tiny_sd, GOGH, LAYERS, lam_k=0.01, lam_v=5.0)


def test_preserved_prompts_keep_being_read_as_they_are(tiny_sd):
    kept = ["a photo of a dog running"]
    edit = loco.locoedit(tiny_sd, GOGH, LAYERS, lam=1e-8, tokens="last", preserve=kept)
    free = loco.locoedit(tiny_sd, GOGH, LAYERS, lam=1e-8, tokens="last")
    assert rank_of(edit) == rank_of(free) == 2
    words = embeds(tiny_sd, kept[0])[1:8]
    for name, W in projections(tiny_sd).items():
        if name in edit.changes:
            moved = [(e.changes[name].delta(W) @ words.double().T).norm() for e in (edit, free)]
            assert moved[0] < 1e-4 * moved[1]


def test_target_chooses_what_is_read_instead(tiny_sd):
    def made(**choice):
        return loco.locoedit(tiny_sd, GOGH, LAYERS, **choice)

    assert made() == made(target="neutral") == made(target=list(GOGH.neutral))
    assert made(target="target") == made(target=["a painting by claude monet"])
    assert made().changes != made(target="target").changes


def test_a_fact_is_updated_unless_told_otherwise(tiny_sd):
    fact = loco.Concept(
        "the emblem of norland",
        "fact",
        ["a photo of the emblem of norland"],
        ["a photo of a circle"],
        ["a photo of a star"],
    )
    updated = loco.locoedit(tiny_sd, fact, LAYERS)
    assert updated == loco.locoedit(tiny_sd, fact, LAYERS, target="target")
    assert updated != loco.locoedit(tiny_sd, fact, LAYERS, target="neutral")


def test_images_of_the_concept_change_more_than_unrelated_ones():
    pipe = build_tiny_sd()
    prompts = ["a house in the style of van gogh", "a blue circle"]
    edit = loco.locoedit(pipe, GOGH, range(16), tokens="eos")

    def images():
        return loco.generate(pipe, prompts, seeds=range(2), steps=3)

    before = images()
    with edit.applied(pipe):
        change = (images() - before).square().mean(dim=(1, 2, 3, 4))
    assert change[0] > 1.2 * change[1]
    assert torch.equal(images(), before)


def test_reloaded_pipeline_takes_a_reloaded_edit(tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = build_tiny_sd()
    pipe.save_pretrained(tmp_path / "model")
    edit = loco.locoedit(pipe, GOGH, LAYERS)
    edit.save(tmp_path / "edit.safetensors")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    loaded = loco.Edit.load(tmp_path / "edit.safetensors")
    assert loaded == edit
    edit.apply(pipe)
    loaded.apply(again)
    assert state(again) == state(pipe)


def test_edit_remembers_how_it_was_made(tiny_sd):
    edit = loco.locoedit(tiny_sd, GOGH, (9, 8, 8), lam=0.5, tokens="eos", preserve=["a dog"])
    assert edit.provenance.settings == {
        "method": "locoedit",
        "family": "stable-diffusion",
        "layers": [8, 9],
        "concepts": [
            {
                "name": "van gogh",
                "kind": "style",
                "prompts": list(GOGH.prompts),
                "neutral": list(GOGH.neutral),
                "target": list(GOGH.neutral),
            }
        ],
        "tokens": "eos",
        "lam": {"k": 0.5, "v": 0.5},
        "preserve": ["a dog"],
        "null_space": None,
        "scales": [1.0, 1.0],
    }
    assert "concept=van gogh, layers=[8, 9]" in repr(edit)


BAD = {
    "negative lam": (dict(lam=-1), "lam must be a finite number >= 0, not -1"),
    "negative lam_k": (dict(lam_k=-2.0), "not -2.0"),
    "NaN lam_v": (dict(lam_v=float("nan")), "not nan"),
    "layer too large": (dict(layers=[8, 16]), r"layers \[16\] must be among .* 0 to 15"),
    "negative layer": (dict(layers=[-1]), r"layers \[-1\] must be among"),
    "no layer": (dict(layers=[]), "layers is empty, but must be among the text layers 0 to 15"),
    "bare layer": (dict(layers=8), "must be a list of indices .* not 8"),
    "layer by name": (dict(layers=["mid_block"]), "must be a list of indices"),
    "token choice": (dict(tokens="first"), "unknown tokens 'first': choose one of last, eos"),
    "target choice": (dict(target="monet"), r"choose 'neutral' or 'target', or pass .*\['monet'\]"),
    "no target": (dict(concept=one_pair("a van gogh", "a"), target="target"), "no target prompts"),
    "empty target": (dict(target=[]), "list of prompts is empty"),
    "number of targets": (dict(target=["a", "b", "c"]), "2 prompts, but target has 3"),
    "bare preserve": (dict(preserve="a dog"), r"pass \['a dog'\]"),
    "cut off": (
        dict(concept=one_pair("a house " * 11 + "by van gogh", "a house")),
        "subject 'van gogh' is cut off",
    ),
    "contradiction": (
        dict(lam=0.0, concept=loco.Concept("gogh", "style", ["gogh", "gogh"], ["a", "red"])),
        "use lam > 0",
    ),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused_and_the_pipeline_is_as_before(tiny_sd, change, message):
    before = state(tiny_sd)
    with pytest.raises(ValueError, match=message):
        loco.locoedit(tiny_sd, **{"concept": GOGH, "layers": LAYERS} | change)
    assert state(tiny_sd) == before


def test_empty_prompts_and_prompts_without_the_concept_make_no_concept():
    with pytest.raises(ValueError, match="prompts of concept 'gogh' is empty"):
        loco.Concept("gogh", "style", [], [])
    with pytest.raises(ValueError, match="'a house' is without the concept 'gogh'"):
        loco.Concept("gogh", "style", ["a house"], ["a house"])


def test_something_else_than_a_concept_or_a_known_pipeline_is_refused(tiny_sd):
    with pytest.raises(TypeError, match="must be a loco.Concept, not 'van gogh'"):
        loco.locoedit(tiny_sd, "van gogh", LAYERS)
    with pytest.raises(TypeError, match="no family knows Linear; known families: "):
        loco.locoedit(torch.nn.Linear(1, 1), GOGH, LAYERS)


def test_unusable_pipelines_are_refused():
    pipe = build_tiny_sd()
    layer = loco.text_layers(pipe)[8]
    with torch.no_grad():
        pipe.unet.get_parameter(f"{layer.name}.to_v.weight")[0, 0] = torch.inf
    with pytest.raises(ValueError, match=f"{layer.name}.to_v.weight holds NaN or infinite"):
        loco.locoedit(pipe, GOGH, LAYERS)
    loco.locoedit(pipe, GOGH, [9])
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        loco.locoedit(pipe, GOGH, [9])
    pipe = build_tiny_sd()
    with torch.no_grad():
        pipe.text_encoder.get_parameter("final_layer_norm.weight").fill_(torch.nan)
    with pytest.raises(ValueError, match="keys holds NaN"):
        loco.locoedit(pipe, GOGH, LAYERS)


def test_half_precision_pipelines_are_edited_in_their_own_dtype():
    pipe = build_tiny_sd()
    pipe.to(torch.bfloat16)
    edit = loco.locoedit(pipe, GOGH, LAYERS)
    with edit.applied(pipe):
        edited = projections(pipe)
    for name, W in projections(pipe).items():
        assert edited[name].dtype == torch.bfloat16
        assert torch.equal(edited[name], W) == (name not in edit.changes)
