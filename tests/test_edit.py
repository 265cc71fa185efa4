"""An edit is exact to put on and take off, belongs to one model, and survives a disk."""

import dataclasses
import errno
import gc
import json
import os
import struct
import weakref

import pytest
import torch
from conftest import build_tiny_sd
from safetensors.torch import load, save

import loco_core as loco
from loco_core import records
from loco_core.closed_form.solver import fit
from loco_core.edits import file as edit_file
from loco_core.edits.edit import make_edit
from loco_core.edits.low_rank import LowRankMap
from loco_core.edits.stack import entries
from loco_core.edits.weights import module_of

KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
VALUE = KEY.replace("to_k", "to_v")


@pytest.fixture
def pipe():
    return build_tiny_sd()


def rows(seed: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def some_edit(pipe, *names: str, seed: int = 0, lam: float = 0.01) -> loco.Edit:
    change = fit(rows(seed), rows(seed + 1), lam)
    return make_edit(pipe, {name: change for name in names or (KEY, VALUE)}, method="test", lam=lam)


def weights(pipe) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder", "vae")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def differing(pipe, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that are not bit-identical to `before`."""
    after = weights(pipe)
    assert after.keys() == before.keys()
    return {n for n in after if after[n].numpy().tobytes() != before[n].numpy().tobytes()}


def test_apply_changes_the_named_weights_by_the_map_and_no_other(pipe):
    edit, before = some_edit(pipe), weights(pipe)
    edit.apply(pipe)
    assert differing(pipe, before) == {KEY, VALUE}
    for name in (KEY, VALUE):
        W, change = before[name].double(), edit.changes[name]
        expected = W + W @ (change.D @ change.R)
        torch.testing.assert_close(
            pipe.unet.get_parameter(name[5:]).detach().double(), expected, rtol=1e-6, atol=1e-7
        )


def test_revert_is_bit_identical(pipe):
    edit, before = some_edit(pipe), weights(pipe)
    parameter = pipe.unet.get_parameter(KEY[5:])
    edit.apply(pipe)
    edit.revert(pipe)
    assert differing(pipe, before) == set()
    assert pipe.unet.get_parameter(KEY[5:]) is parameter and parameter.requires_grad


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_applied_restores_after_an_interruption(pipe, interruption):
    edit, before = some_edit(pipe), weights(pipe)
    with pytest.raises(interruption), edit.applied(pipe):
        assert differing(pipe, before) == {KEY, VALUE}
        raise interruption
    assert differing(pipe, before) == set()
    edit.apply(pipe)  # nothing is left behind that would refuse it


def test_ctrl_c_between_two_weights_leaves_neither_edited(pipe, monkeypatch):
    edit, before = some_edit(pipe), weights(pipe)
    apply_to, calls = LowRankMap.apply_to, []

    def interrupted(self, weight):
        calls.append(weight)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return apply_to(self, weight)

    monkeypatch.setattr(LowRankMap, "apply_to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit.apply(pipe)
    monkeypatch.undo()
    assert differing(pipe, before) == set()
    edit.apply(pipe)


def test_apply_and_revert_work_inside_and_outside_inference_mode(pipe):
    edit, before = some_edit(pipe), weights(pipe)
    with torch.inference_mode():
        edit.apply(pipe)
    edit.revert(pipe)
    edit.apply(pipe)
    with torch.inference_mode():
        edit.revert(pipe)
    assert differing(pipe, before) == set()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_edit_follows_the_dtype_of_the_pipeline(pipe, dtype):
    pipe.unet.to(dtype)
    edit, before = some_edit(pipe), pipe.unet.get_parameter(KEY[5:]).clone()
    with edit.applied(pipe):
        edited = pipe.unet.get_parameter(KEY[5:])
        assert edited.dtype == dtype
        assert torch.equal(edited, edit.changes[KEY].apply_to(before))
    assert torch.equal(pipe.unet.get_parameter(KEY[5:]), before)


def test_edit_of_a_float16_checkpoint_fits_its_float32_loading(pipe):
    pipe.unet.to(torch.float16)
    edit = some_edit(pipe)
    pipe.unet.to(torch.float32)
    with edit.applied(pipe):
        pass


def test_pipeline_moved_to_another_dtype_while_edited_gets_its_weights_back(pipe):
    edit, before = some_edit(pipe), weights(pipe)
    edit.apply(pipe)
    pipe.unet.to(torch.float64)
    edit.revert(pipe)
    pipe.unet.to(torch.float32)
    assert differing(pipe, before) == set()


def test_double_apply_is_refused(pipe):
    edit = some_edit(pipe)
    edit.apply(pipe)
    edited = weights(pipe)
    with pytest.raises(ValueError, match=r"already applied .* edit\.revert\(pipe\) first"):
        edit.apply(pipe)
    assert differing(pipe, edited) == set()
    edit.revert(pipe)


def test_revert_of_an_edit_that_is_not_applied_is_refused(pipe):
    edit, before = some_edit(pipe), weights(pipe)
    with pytest.raises(ValueError, match=r"is not applied .* edit\.apply\(pipe\) first"):
        edit.revert(pipe)
    edit.apply(pipe)
    edit.revert(pipe)
    with pytest.raises(ValueError, match="is not applied"):
        edit.revert(pipe)
    assert differing(pipe, before) == set()


def test_stacked_edits_come_off_in_reverse_order_only(pipe):
    before = weights(pipe)
    below = some_edit(pipe)
    below.apply(pipe)
    between = weights(pipe)
    above = some_edit(pipe, VALUE, seed=5)
    above.apply(pipe)
    stacked = weights(pipe)
    with pytest.raises(ValueError, match="revert that edit first"):
        below.revert(pipe)
    assert differing(pipe, stacked) == set()
    above.revert(pipe)
    assert differing(pipe, between) == set()
    below.revert(pipe)
    assert differing(pipe, before) == set()


def test_edits_of_different_weights_come_off_in_any_order(pipe):
    before = weights(pipe)
    one, other = some_edit(pipe, KEY), some_edit(pipe, VALUE, seed=5)
    one.apply(pipe)
    other.apply(pipe)
    one.revert(pipe)
    assert differing(pipe, before) == {VALUE}
    other.revert(pipe)
    assert differing(pipe, before) == set()


def test_edit_made_before_another_was_applied_is_refused_on_top_of_it(pipe):
    one, other = some_edit(pipe), some_edit(pipe, seed=5)
    with one.applied(pipe):
        with pytest.raises(ValueError, match="revert that and apply loco.compose.*, or make this"):
            other.apply(pipe)
    other.apply(pipe)


def test_edit_for_another_model_is_refused_with_both_names(pipe):
    edit, other = some_edit(pipe), build_tiny_sd(seed=3)
    records.remember(other, records.Source("someone/else"))
    before = weights(other)
    with pytest.raises(ValueError, match="made for other weights than those of this someone/else"):
        edit.apply(other)
    assert differing(other, before) == set()


def test_edit_for_another_width_or_another_architecture_is_refused(pipe):
    change = fit(torch.randn(2, 48), torch.randn(2, 48), 0.01)
    with pytest.raises(
        ValueError, match=r"does not fit .*to_k.weight .*\[out, 48\], not \[16, 32\]"
    ):
        make_edit(pipe, {KEY: change}).apply(pipe)
    with pytest.raises(ValueError, match="has no weight unet.nowhere.to_k.weight"):
        make_edit(pipe, {"unet.nowhere.to_k.weight": change})
    edit = some_edit(pipe)
    pipe.unet.mid_block = torch.nn.Identity()
    with pytest.raises(ValueError, match="has no weight .*another model"):
        edit.apply(pipe)


def test_edit_without_weights_is_refused(pipe):
    with pytest.raises(ValueError, match="at least one weight"):
        make_edit(pipe, {})


def test_fused_projection_is_refused(pipe):
    edit = some_edit(pipe)
    pipe.fuse_qkv_projections(vae=False)
    before = weights(pipe)
    with pytest.raises(ValueError, match=r"fused .*unfuse_qkv_projections\(\)"):
        edit.apply(pipe)
    assert differing(pipe, before) == set()
    pipe.unfuse_qkv_projections(vae=False)
    edit.apply(pipe)


def test_quantised_projection_is_refused(pipe):
    edit = some_edit(pipe)
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    plain = attention.to_k
    attention.to_k = torch.ao.nn.quantized.dynamic.Linear(32, 16)
    with pytest.raises(ValueError, match="load the pipeline unquantised"):
        edit.apply(pipe)
    attention.to_k = plain.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="quantised to torch.float8_e4m3fn"):
        edit.apply(pipe)


def test_projection_wrapped_by_a_lora_adapter_is_refused(pipe):
    from peft import LoraConfig

    edit = some_edit(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    with pytest.raises(ValueError, match="LoRA adapter: call pipe.unload_lora_weights"):
        edit.apply(pipe)


def test_nan_in_the_weights_is_refused_by_name(pipe):
    with torch.no_grad():
        pipe.unet.get_parameter(KEY[5:])[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{KEY} holds NaN"):
        some_edit(pipe)


def test_result_that_overflows_the_dtype_is_refused_and_undone(pipe):
    pipe.unet.to(torch.float16)
    change = LowRankMap(torch.full((32, 1), 1e4).double(), torch.full((1, 32), 1e4).double())
    edit, before = make_edit(pipe, {KEY: change}), pipe.unet.get_parameter(KEY[5:]).clone()
    with pytest.raises(ValueError, match="overflows torch.float16"):
        edit.apply(pipe)
    assert torch.equal(pipe.unet.get_parameter(KEY[5:]), before)


def test_edit_that_changes_nothing_warns(pipe):
    keys = rows(0)
    with pytest.warns(UserWarning, match="changes nothing"):
        make_edit(pipe, {KEY: fit(keys, keys, 0.01)}).apply(pipe)
    with pytest.warns(UserWarning, match="lam is too large"):
        some_edit(pipe, VALUE, lam=1e30).apply(pipe)


def test_what_was_replaced_is_gone_with_the_module():
    pipe = build_tiny_sd()
    some_edit(pipe).apply(pipe)
    kept = weakref.ref(entries(module_of(pipe, KEY))[0].saved)
    assert kept() is not None
    del pipe
    gc.collect()
    assert kept() is None


def test_an_edit_that_is_equal_has_the_same_digest_and_another_has_not(pipe):
    edit = some_edit(pipe)
    assert edit.digest == some_edit(pipe).digest and len(edit.digest) == 64
    others = [some_edit(pipe, seed=7), some_edit(pipe, KEY), some_edit(pipe, lam=0.02)]
    renamed = dataclasses.replace(edit.provenance, model="other")
    others += [edit.scaled(0.5), dataclasses.replace(edit, provenance=renamed)]
    assert len({each.digest for each in (edit, *others)}) == 6
    assert all(edit != other for other in others)


def test_saved_edit_is_small_equal_and_edits_alike(pipe, tmp_path):
    edit, path = some_edit(pipe), tmp_path / "edits" / "gogh.safetensors"
    edit.save(path)
    loaded = loco.Edit.load(path)
    assert loaded == edit and hash(loaded) == hash(edit) and loaded is not edit
    assert loaded != some_edit(pipe, lam=0.02)
    assert path.stat().st_size < 4096  # both weights share one map
    edit.apply(pipe)
    edited = weights(pipe)
    edit.revert(pipe)
    loaded.apply(pipe)
    assert differing(pipe, edited) == set()
    edit.revert(pipe)  # an equal edit is the same edit


def test_saving_twice_gives_the_same_bytes(pipe, tmp_path):
    for name in "ab":
        some_edit(pipe).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_manifest_tells_what_the_edit_is(pipe, tmp_path):
    some_edit(pipe).save(tmp_path / "edit")
    blob = (tmp_path / "edit").read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    manifest = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["loco_core.edit"])
    assert manifest["weights"] == {KEY: 0, VALUE: 0}
    assert manifest["provenance"]["settings"] == {"method": "test", "lam": 0.01}
    assert manifest["provenance"]["versions"]["torch"] == torch.__version__


def test_full_disk_leaves_nothing_half_written(pipe, tmp_path, monkeypatch):
    edit, path = some_edit(pipe), tmp_path / "edit.safetensors"
    edit.save(path)
    kept = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="edit.safetensors: No space left"):
        some_edit(pipe, seed=9).save(path)
    assert path.read_bytes() == kept
    assert os.listdir(tmp_path) == ["edit.safetensors"]


def test_folder_that_cannot_be_written_is_named(pipe, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        some_edit(pipe).save(tmp_path / "file" / "edit.safetensors")
    assert os.listdir(tmp_path) == ["file"]


def test_every_damaged_byte_range_of_a_file_is_refused_by_name(pipe, tmp_path):
    path = tmp_path / "edit.safetensors"
    some_edit(pipe).save(path)
    whole = path.read_bytes()
    damaged = {"empty": b"", "cut": whole[:-7], "text": b"this is no edit at all"}
    for place in range(0, len(whole), 41):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        damaged[f"byte {place}"] = bytes(flipped)
    for what, blob in damaged.items():
        path.write_bytes(blob)
        with pytest.raises(ValueError, match=r"cannot load an edit from .*edit\.safetensors: "):
            loco.Edit.load(path)
            pytest.fail(what)


def test_what_becomes_of_a_file_does_not_change_what_was_loaded(pipe, tmp_path):
    edit, path = some_edit(pipe), tmp_path / "edit.safetensors"
    edit.save(path)
    loaded = loco.Edit.load(path)
    whole = path.read_bytes()
    with open(path, "r+b") as file:  # in place, as `cp other path` writes
        file.seek(len(whole) - 64)
        file.write(bytes(64))
        file.truncate(len(whole) - 32)
    assert loaded == edit
    for name, change in edit.changes.items():
        assert torch.equal(loaded.changes[name].R, change.R)
    with loaded.applied(pipe):
        pass


def resealed(path, change):
    """Change the manifest of a file, and seal it anew, as whoever knows how can."""
    blob = path.read_bytes()
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    manifest, tensors = json.loads(header["__metadata__"]["loco_core.edit"]), load(blob)
    manifest.pop("sha256")
    manifest = change(manifest) or manifest
    manifest["sha256"] = edit_file._seal(manifest, tensors)
    path.write_bytes(save(tensors, metadata={"loco_core.edit": json.dumps(manifest)}))


MADE_UP = {
    "no weights": lambda m: m.update(weights={}, originals={}),
    "a list of weights": lambda m: m.update(weights=[]),
    "a list of originals": lambda m: m.update(originals=[]),
    "other originals": lambda m: m["originals"].update(other="1f"),
    "an original that is no text": lambda m: m["originals"].update({KEY: 3}),
    "no settings": lambda m: m["provenance"].update(settings=None),
    "no model": lambda m: m["provenance"].update(model=None),
    "a change that is not there": lambda m: m["weights"].update({KEY: 9}),
    "a kind that is not there": lambda m: m["changes"][0].update(kind="other"),
    "a factor beyond float": lambda m: m.update(
        changes=[{"kind": "knockout", "shape": [2, 2], "factor": 10**400}]
    ),
    "another format": lambda m: m.update(format=99),
    "a manifest of one number": lambda m: {"format": 3},
}


@pytest.mark.parametrize("change", MADE_UP.values(), ids=MADE_UP.keys())
def test_a_made_up_file_under_a_good_seal_is_refused_by_name(change, pipe, tmp_path):
    path = tmp_path / "edit.safetensors"
    some_edit(pipe).save(path)
    resealed(path, lambda manifest: None)
    assert loco.Edit.load(path) == some_edit(pipe)
    resealed(path, change)
    with pytest.raises(ValueError, match=r"cannot load an edit from .*edit\.safetensors: "):
        loco.Edit.load(path)


def test_a_manifest_without_end_is_refused_by_name(pipe, tmp_path):
    path = tmp_path / "edit.safetensors"
    some_edit(pipe).save(path)
    deep = "[" * 100_000 + "]" * 100_000
    path.write_bytes(save(load(path.read_bytes()), metadata={"loco_core.edit": deep}))
    with pytest.raises(ValueError, match=r"cannot load an edit from .*edit\.safetensors: "):
        loco.Edit.load(path)


def test_missing_file_and_other_safetensors_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no edit is saved at .*nowhere"):
        loco.Edit.load(tmp_path / "nowhere")
    save_file({"weight": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="so it is no edit"):
        loco.Edit.load(tmp_path / "other")


def test_edit_says_what_it_is(pipe):
    pipe.register_to_config(_name_or_path="mini")
    assert repr(some_edit(pipe)) == "<Edit: test of 2 weights of mini>"
