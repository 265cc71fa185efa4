"""An edit written as a LoRA is the same edit in a pipeline that loads it.

Names that other programs know are in test_lora_keys, older releases of ours in test_lora_older.
"""

import doctest
import errno
import json
import logging
import os
import warnings
from functools import partial

import pytest
import torch
from conftest import build_tiny_sd, build_tiny_sdxl, exact, text_settings
from safetensors import safe_open

import loco_core as loco
from loco_core import records
from loco_core.closed_form.solver import fit
from loco_core.edits import factors as kernel
from loco_core.edits.edit import make_edit
from loco_core.edits.factors import factors
from loco_core.edits.knockout import Knockout
from loco_core.edits.low_rank import LowRankMap
from loco_core.edits.weights import module_of
from loco_core.families import family_of
from loco_core.judging.clip_score import Clip

CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2."
TEXT = "encoder.layers.{}.self_attn.out_proj.weight"
NAMES = (CROSS + "to_k.weight", CROSS + "to_v.weight", "text_encoder." + TEXT.format(0))
GOGH = loco.Concept("van gogh", "style", ["a house in style of van gogh"], ["a house"])
MIRA = loco.shapeland.concept("style", loco.shapeland.ATTRIBUTES["style"][0])
MODELS = {
    "tiny": (build_tiny_sd, GOGH),
    "mini-sd": (partial(loco.load, "mini-sd"), MIRA),
    "mini-sdxl": (partial(loco.load, "mini-sdxl"), MIRA),
}


def locoedit(pipe, concept):
    return loco.locoedit(pipe, concept, layers=[8, 9])


def of_both(pipe, concept):
    """An edit of the UNet and of the text encoder, with different ranks."""
    return loco.compose(
        loco.locoedit(pipe, concept, layers=[9]),
        loco.diff_quickfix(pipe, concept),
    )


def rows(seed: int, count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def some_edit(pipe, *names: str, seed: int = 0) -> loco.Edit:
    """An edit that changes the i-th of `names` by a map of rank i + 1."""
    changes = {}
    for i, name in enumerate(names or NAMES):
        width = module_of(pipe, name).in_features
        keys, targets = rows(seed + i, i + 1, width), rows(seed + i + 50, i + 1, width)
        changes[name] = fit(keys, targets, 0.01)
    return make_edit(pipe, changes, method="test")


def weights(pipe) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for name, tensor in module.state_dict().items()
    }


def identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def contents(path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


@pytest.fixture
def pipe():
    return build_tiny_sd()


@pytest.fixture
def log():
    """What diffusers, transformers and peft warn of."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    yield records
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.parametrize("method", [locoedit, loco.diff_quickfix, of_both])
@pytest.mark.parametrize("model", MODELS)
def test_fresh_pipeline_with_the_lora_makes_the_images_of_the_edit(model, method, tmp_path, log):
    build, concept = MODELS[model]
    pipe, path = build(), tmp_path / "edit.safetensors"
    images = partial(exact, prompts=concept.prompts[:1], seeds=[0, 1], steps=3)
    edit = method(pipe, concept)
    edit.to_lora(path, pipe)
    expected = {0.0: images(pipe)}
    for scale in (0.5, 1.0):
        with edit.scaled(scale).applied(pipe):
            expected[scale] = images(pipe)
    assert (expected[1.0] - expected[0.0]).abs().max() > 0.02
    assert (expected[1.0] - expected[0.5]).abs().max() > 0.01

    fresh = build()
    before = weights(fresh)
    log.clear()
    fresh.load_lora_weights(path, adapter_name="edit")
    touched = {name.partition(".")[0] for name in edit.changes}
    assert set(fresh.get_list_adapters()) == touched
    assert len([m for m in log if "No LoRA keys" in m]) == len(
        set(fresh._lora_loadable_modules) - touched
    )
    assert not [m for m in log if "No LoRA keys" not in m]
    for scale, wanted in expected.items():
        fresh.set_adapters(["edit"], adapter_weights=[scale])
        assert (images(fresh) - wanted).abs().max() <= (1e-4 if scale else 0)
    fresh.unload_lora_weights()
    assert identical(weights(fresh), before)
    with edit.applied(fresh):
        assert torch.equal(images(fresh), expected[1.0])


def sd():
    return build_tiny_sd(), [*NAMES, "text_encoder." + TEXT.format(1)]


def sdxl():
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    pipe = build_tiny_sd()
    config = CLIPTextConfig(**text_settings(pipe.tokenizer), projection_dim=16)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    xl = StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer,
        unet=unet,
        scheduler=pipe.scheduler,
    )
    nested = "text_encoder_2.text_model."  # as is a CLIP with projection; one without is flat
    return xl, [*NAMES, *(nested + TEXT.format(i) for i in (0, 1))]


def sd3():
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    parts = ("vae", *(f"{p}{i}" for p in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")))
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(parts),
    )
    path = "transformer.transformer_blocks.{}.attn.add_{}_proj.weight"
    return pipe, [path.format(i, kind) for i in (0, 1) for kind in "kv"][:3]


def deepfloyd():
    from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    parts = ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
    pipe = IFPipeline(
        unet=unet,
        scheduler=DDPMScheduler(),
        requires_safety_checker=False,
        **dict.fromkeys(parts),
    )
    return pipe, [f"unet.mid_block.attentions.0.add_{kind}_proj.weight" for kind in "kv"]


@pytest.mark.parametrize("build", [sd, sdxl, sd3, deepfloyd])
def test_changes_of_different_rank_each_act_as_the_edited_weight(build, tmp_path, log):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe, names = build()
    edit = some_edit(pipe, *names)
    edit.to_lora(tmp_path / "edit", pipe)
    before = weights(pipe)
    inputs = {name: rows(99, 3, module_of(pipe, name).in_features) for name in names}

    def outputs():
        with torch.no_grad():
            return {name: module_of(pipe, name)(x) for name, x in inputs.items()}

    original = outputs()
    with edit.applied(pipe):
        expected = outputs()
    log.clear()
    pipe.load_lora_weights(tmp_path / "edit", adapter_name="edit")
    adapted = outputs()
    for name in names:
        assert module_of(pipe, name).r == {"edit": len(names)}  # the largest of 1, 2, ...
        assert module_of(pipe, name).scaling == {"edit": 1}
        assert (expected[name] - original[name]).abs().max() > 0.02
        assert (expected[name] - adapted[name]).abs().max() < 1e-5
    adapters = [
        m
        for part in pipe.components.values()
        if isinstance(part, torch.nn.Module)
        for m in part.modules()
        if hasattr(m, "base_layer")
    ]
    also = family_of(pipe).lora_also(names) if build in (sd, sdxl) else set()
    assert len(adapters) == len({*names, *also})
    assert not [m for m in log if "No LoRA keys" not in m]
    pipe.unload_lora_weights()
    assert identical(weights(pipe), before)


@pytest.mark.parametrize(
    "dtype, error",
    [(torch.float64, 1e-12), (torch.bfloat16, 0.05), (torch.float16, 0.01)],
    ids=["float64", "bfloat16", "float16"],
)
def test_lora_is_as_exact_as_the_dtype_of_the_pipeline(pipe, dtype, error, tmp_path):
    for part in (pipe.unet, pipe.text_encoder):
        part.to(dtype)
    edit = some_edit(pipe)
    edit.to_lora(tmp_path / "edit", pipe)
    stored = {tensor.dtype for tensor in contents(tmp_path / "edit")[0].values()}
    assert stored == {torch.float64 if dtype == torch.float64 else torch.float32}
    expected = {}
    with edit.applied(pipe):
        for name in NAMES:
            x = rows(99, 3, 32).to(dtype)
            expected[name] = x, module_of(pipe, name)(x)
    pipe.load_lora_weights(tmp_path / "edit")
    for name, (x, y) in expected.items():
        assert (module_of(pipe, name)(x) - y).abs().max() < error * y.abs().max()


def test_fusing_the_lora_gives_the_weights_of_the_edit(pipe, tmp_path):
    edit, fused = of_both(pipe, GOGH), build_tiny_sd()
    edit.to_lora(tmp_path / "edit", pipe)
    fused.load_lora_weights(tmp_path / "edit")
    fused.fuse_lora(components=["unet", "text_encoder"])
    fused.unload_lora_weights()
    edit.apply(pipe)
    expected, found, plain = weights(pipe), weights(fused), weights(build_tiny_sd())
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert (weight - found[name]).abs().max() <= 1e-6 * weight.abs().max(), name
    assert {n for n in found if not torch.equal(found[n], plain[n])} == set(edit.changes)


@pytest.mark.parametrize("out, width, n", [(8, 32, 3), (4, 32, 9), (48, 6, 20)])
def test_factors_multiply_to_the_change_and_have_its_rank(out, width, n):
    change = LowRankMap(rows(1, width, n).double(), rows(2, n, width).double())
    W = rows(3, out, width)
    A, B, *_ = factors(change, W)
    delta = W.double() @ change.D @ change.R
    assert A.shape == (min(out, width, n), width) and B.shape == (out, min(out, width, n))
    assert torch.dist(B.double() @ A.double(), delta) < 1e-6 * delta.norm()
    assert torch.allclose(A.norm(), B.norm(), rtol=1e-5)
    assert A.dtype == B.dtype == torch.float32


def test_rows_that_say_the_same_twice_cost_nothing():
    keys, targets, W = rows(1, 3, 32), rows(2, 3, 32), rows(3, 16, 32)
    twice = fit(keys.repeat(2, 1), targets.repeat(2, 1), 0.01)
    A, B, *_ = factors(twice, W)
    assert len(A) == 3 and twice.R.shape[0] == 6
    assert torch.dist(B @ A, twice.delta(W).float()) < 1e-6 * (B @ A).norm()


def test_edit_that_changes_nothing_is_a_lora_of_zeros(pipe, tmp_path):
    some_edit(pipe).scaled(0).to_lora(tmp_path / "edit", pipe)
    tensors, _ = contents(tmp_path / "edit")
    assert len(tensors) == 3 * 6  # q, k, v of the text layer as well: see lora_also
    assert not any(tensor.any() for key, tensor in tensors.items() if "alpha" not in key)
    pipe.load_lora_weights(tmp_path / "edit")


def test_factors_lose_less_in_half_precision_than_those_of_the_map():
    keys = rows(1, 1, 64) + 0.1 * rows(2, 12, 64)  # twelve tokens of one concept, much alike
    change, W = fit(keys, keys + rows(3, 1, 64), 1e-6), rows(4, 48, 64)
    delta = change.delta(W)

    def lost(A, B):
        return torch.dist(B.half().double() @ A.half().double(), delta) / delta.norm()

    assert 2 * lost(*factors(change, W)[:2]) < lost(change.R, W.double() @ change.D)


def test_doctest():
    assert doctest.testmod(kernel).failed == 0


def test_file_is_the_same_whether_the_edit_is_applied_or_not(pipe, tmp_path):
    edit, other = some_edit(pipe), some_edit(pipe, seed=7)
    edit.to_lora(tmp_path / "plain", pipe)
    for applied in (edit, other):
        with applied.applied(pipe):
            before = weights(pipe)
            edit.to_lora(tmp_path / "applied", pipe)
            assert identical(weights(pipe), before)
        assert (tmp_path / "plain").read_bytes() == (tmp_path / "applied").read_bytes()


def test_file_holds_a_lora_for_each_weight_and_says_what_it_is(pipe, tmp_path):
    edit, path = some_edit(pipe), tmp_path / "new" / "edit.safetensors"
    edit.to_lora(path, pipe)
    tensors, metadata = contents(path)
    keys = [
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v",
        "lora_te_text_model_encoder_layers_0_self_attn_out_proj",
    ]
    also = [keys[2].replace("out", x) for x in "qkv"]
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(tensors) == {f"{key}.{part}" for key in [*keys, *also] for part in parts}
    assert not any(tensors[f"{key}.{part}"].any() for key in also for part in parts[:2])
    for i, key in enumerate(keys, start=1):
        down, up, alpha = (tensors[f"{key}.{part}"] for part in parts)
        assert len(down) == up.shape[1] == alpha == 3  # one rank for all, the rest of it zeros
        assert down[:i].any(1).all() and not down[i:].any() and not up[:, i:].any()
    told = json.loads(metadata["loco_core.edit"])
    assert told["weights"] == {name: i + 1 for i, name in enumerate(NAMES)}
    assert told["left_out"] == dict.fromkeys(NAMES, 0)
    assert told["originals"] == edit.originals
    assert told["provenance"]["settings"] == {"method": "test"}
    with pytest.raises(ValueError, match=r"edit\.safetensors: its format is 'lora'"):
        loco.Edit.load(path)


def test_other_model_is_refused(pipe, tmp_path):
    edit, other = some_edit(pipe), build_tiny_sd(seed=3)
    records.remember(other, records.Source("someone/else"))
    with pytest.raises(ValueError, match="made for other weights than those of this someone/else"):
        edit.to_lora(tmp_path / "edit", other)
    other.unet.mid_block = torch.nn.Identity()
    with pytest.raises(ValueError, match="has no weight unet.mid_block.*another model"):
        edit.to_lora(tmp_path / "edit", other)
    assert not os.listdir(tmp_path)


def test_edit_made_on_top_of_another_is_refused(pipe, tmp_path):
    with some_edit(pipe).applied(pipe):
        above = some_edit(pipe, seed=7)
        with pytest.raises(ValueError, match="adds to the unedited weights.*no other is applied"):
            above.to_lora(tmp_path / "edit", pipe)


def test_projections_that_cannot_take_a_lora_are_refused(pipe, tmp_path):
    edit = some_edit(pipe)
    write = partial(edit.to_lora, tmp_path / "edit", pipe)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match=r"fused .*unfuse_qkv_projections\(\)"):
        write()
    pipe.unfuse_qkv_projections(vae=False)
    write()
    pipe.load_lora_weights(tmp_path / "edit")
    with pytest.raises(ValueError, match="LoRA adapter: call pipe.unload_lora_weights"):
        write()
    pipe.unload_lora_weights()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="quantised to torch.float8_e4m3fn"):
        write()


def test_pipeline_that_loads_no_lora_is_refused_with_another_way(pipe, tmp_path):
    from diffusers import DDPMPipeline

    edit = some_edit(pipe, *NAMES[:2])
    other = DDPMPipeline(unet=pipe.unet, scheduler=pipe.scheduler)
    with pytest.raises(ValueError, match=r"DDPMPipeline .*no load_lora_weights.*edit\.save\(path"):
        edit.to_lora(tmp_path / "edit", other)
    name = "vae.decoder.mid_block.attentions.0.to_k.weight"
    with pytest.raises(ValueError, match=f"only into unet, text_encoder, but .* changes {name}"):
        some_edit(pipe, name).to_lora(tmp_path / "edit", pipe)


def test_full_disk_leaves_nothing_half_written(pipe, tmp_path, monkeypatch):
    path = tmp_path / "edit.safetensors"
    some_edit(pipe).to_lora(path, pipe)
    kept = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="edit.safetensors: No space left"):
        some_edit(pipe, seed=9).to_lora(path, pipe)
    assert path.read_bytes() == kept and os.listdir(tmp_path) == ["edit.safetensors"]


def test_folder_that_cannot_be_written_is_named(pipe, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        some_edit(pipe).to_lora(tmp_path / "file" / "edit.safetensors", pipe)
    assert os.listdir(tmp_path) == ["file"]


def test_localisation_under_a_lora_is_that_of_the_edited_pipeline(pipe, tiny_clip, tmp_path):
    score = partial(loco.clip_score, clip=Clip(*tiny_clip))
    localize = partial(loco.localize, pipe, GOGH, 4, seeds=range(5), steps=2, score=score)
    edit, layers = of_both(pipe, GOGH), loco.text_layers(pipe)
    edit.to_lora(tmp_path / "edit", pipe)
    plain = localize()
    with edit.applied(pipe):
        expected = localize()
    pipe.load_lora_weights(tmp_path / "edit")
    assert loco.family_of(pipe).name == "stable-diffusion"
    assert loco.text_layers(pipe) == layers
    found = localize()
    # images are rounded to 8 bits
    assert (found.images[:] - expected.images[:]).abs().max() <= 2 / 255
    assert (expected.images[:] - plain.images[:]).abs().max() > 0.02
    assert torch.allclose(found.scores, expected.scores, atol=0.05)
    assert found.best == expected.best and found.layers == expected.layers


CONV = "unet.down_blocks.0.resnets.0.conv1.weight"


def knocked(pipe, *names: str, share: float = 0.3) -> loco.Edit:
    """An edit that zeroes the same share of each of `names`, at random."""
    changes = {}
    for i, name in enumerate(names or NAMES):
        shape = module_of(pipe, name).weight.shape
        chosen = rows(i, 1, shape.numel())[0].argsort()[: int(share * shape.numel())]
        changes[name] = Knockout(tuple(shape), chosen.sort().values)
    return make_edit(pipe, changes, method="test")


def relative_error(edit, pipe, path) -> float:
    """What the adapters of a file lack of an edit's change: slowly, with weights as matrices."""
    differences = {name: -module_of(pipe, name).weight.data.double() for name in edit.changes}
    with edit.applied(pipe):
        for name in edit.changes:
            differences[name] += module_of(pipe, name).weight.data.double()
    pipe.load_lora_weights(path)
    missed = [
        differences[name] - module_of(pipe, name).get_delta_weight("default_0").detach().double()
        for name in edit.changes
    ]
    pipe.unload_lora_weights()
    size, lost = (sum(d.square().sum() for d in each) for each in (differences.values(), missed))
    return float((lost / size).sqrt())


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_truncated_lora_misses_as_much_of_the_change_as_it_says(pipe, rank, tmp_path):
    map = fit(rows(1, 6, 32), rows(2, 6, 32), 0.01)
    for name, edit in {
        "maps": make_edit(pipe, dict.fromkeys(NAMES[:2], map), method="test"),
        "knock-outs": knocked(pipe, *NAMES, CONV),
    }.items():
        whole = name == "maps" and rank >= 6
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            error = edit.to_lora(tmp_path / "edit", pipe, rank=rank)
        assert len(warned) == (not whole)
        assert whole or f"leaves out {error:.1%} of what" in str(warned[0].message)
        assert error == pytest.approx(relative_error(edit, pipe, tmp_path / "edit"), abs=1e-6)
        assert (error < 1e-6) == whole
        told = json.loads(contents(tmp_path / "edit")[1]["loco_core.edit"])
        assert max(told["weights"].values()) == (min(rank, 6) if name == "maps" else rank)
        assert set(told["left_out"]) == set(edit.changes)


@pytest.mark.parametrize(
    "build, extra", [(build_tiny_sd, False), (build_tiny_sdxl, False), (build_tiny_sdxl, True)]
)
def test_every_weight_finds_its_place_in_the_pipeline(build, extra, tmp_path):
    """extra: with those of SD-XL that only diffusers' own names are for."""
    pipe = build()
    names = [
        f"{part}.{name}.weight"
        for part in pipe._lora_loadable_modules
        for name, module in getattr(pipe, part).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        and (extra or not name.startswith("add_embedding"))
    ]
    edit = knocked(pipe, *names)
    with pytest.warns(UserWarning, match="leaves out"):
        error = edit.to_lora(tmp_path / "edit", pipe, rank=3)
    assert len(names) > 250
    assert any("lora_A" in key for key in contents(tmp_path / "edit")[0]) == extra
    assert error == pytest.approx(relative_error(edit, pipe, tmp_path / "edit"), abs=1e-5)


def test_no_change_of_that_rank_is_nearer_than_the_one_written():
    shape, count = (24, 16), 90
    chosen = rows(1, 1, 384)[0].argsort()[:count].sort().values
    change, W = Knockout(shape, chosen), rows(2, *shape)
    A, B, size, missed, cut = factors(change, W, rank=5)
    delta = change.apply_to(W.double()) - W.double()
    assert cut and size == pytest.approx(float(delta.norm()))
    assert missed == pytest.approx(float(torch.dist(B.double() @ A.double(), delta)), rel=1e-6)
    for seed in range(10):  # alternating least squares from anywhere ends above it
        left = rows(seed, 24, 5).double()
        for _ in range(200):
            right = torch.linalg.lstsq(left, delta).solution
            left = torch.linalg.lstsq(right.T, delta.T).solution.T
        assert torch.dist(left @ right, delta) >= missed * (1 - 1e-9)


def test_whole_neurons_are_of_low_rank_and_lose_nothing(pipe, tmp_path):
    name = NAMES[1]
    out, width = module_of(pipe, name).weight.shape
    rows_of_two = torch.arange(2 * width)  # the first two rows of the weight
    edit = make_edit(pipe, {name: Knockout((out, width), rows_of_two)}, method="test")
    assert edit.to_lora(tmp_path / "edit", pipe, rank=2) < 1e-6
    assert relative_error(edit, pipe, tmp_path / "edit") < 1e-6


@pytest.mark.filterwarnings("ignore:the LoRA")
def test_knock_out_says_what_the_nearest_lora_leaves_out(tmp_path):
    pipe = loco.load("mini-sd")
    wide = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"
    edit = knocked(pipe, wide, share=0.01)
    with pytest.raises(ValueError, match="knocks out single.*low rank.*rank=32") as refusal:
        edit.to_lora(tmp_path / "edit", pipe)
    assert not os.listdir(tmp_path)
    error = edit.to_lora(tmp_path / "edit", pipe, rank=32)
    assert f"leaves out {error:.1%} of" in str(refusal.value) and error > 0.05


@pytest.mark.parametrize("shape", [(20, 90), (90, 20), (6, 5, 3, 3)])
def test_factors_of_a_knock_out_are_those_of_the_singular_value_decomposition(shape):
    size = torch.Size(shape).numel()
    chosen, W = rows(1, 1, size)[0].argsort()[: size // 4].sort().values, rows(2, 1, size)
    change, W = Knockout(shape, chosen), W.reshape(shape)
    U, S, Vh = torch.linalg.svd((change.apply_to(W) - W).double().flatten(1), full_matrices=False)
    for rank in (1, 3, None):
        A, B, full, missed, _ = factors(change, W, rank)
        assert torch.allclose(
            B.double() @ A.double(), U[:, :rank] * S[:rank] @ Vh[:rank], atol=1e-5
        )
        assert (full, missed) == pytest.approx(
            (float(S.norm()), float(S[len(A) :].norm())), abs=1e-6
        )


@pytest.mark.parametrize("rank", [0, -3, 2.5, True, "8"])
def test_rank_that_is_no_whole_number_from_one_on_is_refused(pipe, rank, tmp_path):
    with pytest.raises(ValueError, match=r"rank=.* must be a whole number from 1 on, or None"):
        some_edit(pipe).to_lora(tmp_path / "edit", pipe, rank=rank)
    assert not os.listdir(tmp_path)
