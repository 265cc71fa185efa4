"""A knock-out scales single entries of a weight, and an edit of them is an edit like any other."""

import hashlib
import json
import math

import pytest
import torch
from conftest import build_tiny_sd, state
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loco_core as loco
from loco_core.closed_form.solver import fit
from loco_core.edits.edit import make_edit
from loco_core.edits.file import MANIFEST
from loco_core.edits.knockout import Knockout

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
CONV = "unet.mid_block.resnets.0.conv1.weight"
SOME = torch.tensor([0, 5, 17])


@pytest.fixture
def pipe():
    return build_tiny_sd()


def weight(pipe, name: str) -> torch.Tensor:
    return pipe.unet.get_parameter(name.removeprefix("unet.")).detach()


def sparse(pipe, *names: str, indices=SOME, factor=0.0, **settings) -> loco.Edit:
    changes = {
        name: Knockout(weight(pipe, name).shape, indices, factor) for name in names or (LINEAR,)
    }
    return make_edit(pipe, changes, method="test", **settings)


def low_rank(pipe, name: str = KEY) -> loco.Edit:
    generator = torch.Generator().manual_seed(0)
    keys, targets = torch.randn(2, 2, 32, generator=generator)
    return make_edit(pipe, {name: fit(keys, targets, 0.01)}, method="test")


def by_hand(W: torch.Tensor, indices, factor) -> torch.Tensor:
    """Entry by entry, in float64, rounded once."""
    flat = W.double().flatten().tolist()
    for i in indices.tolist():
        flat[i] *= factor
    return torch.tensor(flat, dtype=torch.float64).to(W.dtype).reshape(W.shape)


# -- the change of one weight


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("shape", [(7,), (4, 5), (4, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("factor", [0.0, 0.3, -2.0])
def test_named_entries_are_scaled_and_all_others_bit_identical(dtype, shape, factor):
    W, indices = torch.randn(shape).to(dtype), torch.tensor([1, 3, 6])
    kept = W.clone()
    expected = by_hand(W, indices, factor)
    change = Knockout(shape, indices, factor)
    found = change.apply_to(W)
    assert found.dtype == dtype and torch.equal(found, expected) and torch.equal(W, kept)
    assert change.apply_to(W, out=W) is W and torch.equal(W, expected)


def test_a_weight_in_another_memory_format_is_counted_row_by_row():
    W = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    found = Knockout(W.shape, SOME).apply_to(W)
    assert torch.equal(found, by_hand(W, SOME, 0.0))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_scaled_knock_out_is_that_part_of_the_change(scale):
    W = torch.randn(4, 5).double()
    for factor in (0.25, torch.tensor([0.0, 0.5, 2.0]).double()):
        whole = Knockout(W.shape, SOME, factor)
        found = whole.scaled(scale).apply_to(W)
        torch.testing.assert_close(found, W + scale * (whole.apply_to(W) - W))
    with pytest.raises(ValueError, match="scale must be a finite number, not nan"):
        whole.scaled(float("nan"))


def test_relative_change_is_the_norm_of_the_difference():
    W = torch.randn(4, 5)
    change = Knockout(W.shape, SOME, 0.25)
    expected = (change.apply_to(W) - W).norm() / W.norm()
    assert change.relative_change(W) == pytest.approx(expected.item(), rel=1e-6)


def test_knock_outs_of_zero_join_to_their_union():
    one, other = Knockout((20,), SOME), Knockout((20,), torch.tensor([5, 9]))
    both = one.then(other)
    assert both.factor == 0.0 and both.indices.tolist() == [0, 5, 9, 17]
    assert both == other.then(one) and hash(both) == hash(other.then(one))


def test_one_after_the_other_is_both_at_once_where_they_meet_and_where_not():
    W = torch.randn(20).double()
    one = Knockout((20,), SOME, 0.5)
    other = Knockout((20,), torch.tensor([5, 9]), torch.tensor([3.0, 0.25]).double())
    torch.testing.assert_close(one.then(other).apply_to(W), other.apply_to(one.apply_to(W)))
    with pytest.raises(ValueError, match="cannot be followed"):
        one.then(Knockout((4, 5), SOME))


def test_knock_outs_differ_by_shape_indices_and_factor():
    one = Knockout((4, 5), SOME)
    assert one == Knockout([4, 5], SOME.clone()) and hash(one) == hash(Knockout([4, 5], SOME))
    assert one != Knockout((5, 4), SOME) and one != Knockout((4, 5), SOME + 1)
    assert one != Knockout((4, 5), SOME, 0.5) and one != "a knock-out"


@pytest.mark.parametrize(
    "indices, factor, message",
    [
        (torch.tensor([5, 1]), 0.0, "sorted and each once"),
        (torch.tensor([1, 1]), 0.0, "sorted and each once"),
        (torch.tensor([1, 20]), 0.0, "entries 0 to 19"),
        (torch.tensor([-1, 2]), 0.0, "from -1 to 2"),
        (torch.tensor([[1]]), 0.0, "vector of at least one int64"),
        (torch.tensor([1.0]), 0.0, "torch.float32"),
        (torch.tensor([], dtype=torch.int64), 0.0, "at least one"),
        (torch.tensor([1]), float("nan"), "NaN"),
        (torch.tensor([1]), torch.tensor([1.0, 2.0]).double(), r"number or \[1\] float64"),
        (torch.tensor([1]), torch.tensor([1.0]), "float32"),
    ],
)
def test_bad_entries_are_refused(indices, factor, message):
    with pytest.raises(ValueError, match=message):
        Knockout((4, 5), indices, factor)


def test_a_weight_of_another_shape_is_refused():
    for method in ("check", "apply_to", "relative_change"):
        with pytest.raises(ValueError, match=r"shape \[4, 5\], not \[5, 4\]"):
            getattr(Knockout((4, 5), SOME), method)(torch.zeros(5, 4))


# -- an edit of them


def test_sparse_edit_changes_the_named_entries_and_comes_off_bit_for_bit(pipe):
    edit, before = sparse(pipe, LINEAR, CONV), state(pipe)
    kept = {name: weight(pipe, name).clone() for name in (LINEAR, CONV)}
    with edit.applied(pipe):
        changed = {name for name, blob in state(pipe).items() if blob != before[name]}
        assert changed == {LINEAR, CONV}
        for name, W in kept.items():
            assert torch.equal(weight(pipe, name), by_hand(W, SOME, 0.0))
    assert state(pipe) == before
    with edit.applied(pipe, scale=0.5):
        torch.testing.assert_close(weight(pipe, CONV), by_hand(kept[CONV], SOME, 0.5))


def test_saved_sparse_edit_is_small_and_equal(pipe, tmp_path):
    indices = torch.arange(0, 500, 5)
    edit = sparse(pipe, LINEAR, CONV, indices=indices, note="kept")
    edit.save(tmp_path / "edit")
    loaded = loco.Edit.load(tmp_path / "edit")
    assert loaded == edit and hash(loaded) == hash(edit)
    assert (tmp_path / "edit").stat().st_size < 4096
    kinds = {x.dtype for x in load_file(tmp_path / "edit").values()}
    assert kinds <= {torch.int32, torch.uint8}
    mixed = edit.changes[LINEAR].then(Knockout(edit.changes[LINEAR].shape, SOME, 0.5))
    several = make_edit(pipe, {LINEAR: mixed, KEY: low_rank(pipe).changes[KEY]})
    several.save(tmp_path / "several")
    assert loco.Edit.load(tmp_path / "several") == several
    loaded.apply(pipe)
    edit.revert(pipe)  # an equal edit is the same edit


def test_every_damaged_byte_range_of_a_sparse_edit_is_refused(pipe, tmp_path):
    path = tmp_path / "edit"
    sparse(pipe).save(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 41):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(bytes(flipped))
        with pytest.raises(ValueError, match="cannot load an edit from"):
            loco.Edit.load(path)
            pytest.fail(f"byte {place}")


def test_a_file_of_the_format_before_knock_outs_is_read(pipe, tmp_path):
    edit, path = low_rank(pipe), tmp_path / "edit"
    edit.save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()[MANIFEST])
    manifest["format"] = 2
    del manifest["changes"], manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    manifest["sha256"] = digest.hexdigest()
    save_file(tensors, path, metadata={MANIFEST: json.dumps(manifest)})
    assert loco.Edit.load(path) == edit


def test_sparse_and_low_rank_edits_stack_on_one_weight(pipe):
    before = state(pipe)
    below = low_rank(pipe)
    with below.applied(pipe):
        edited = weight(pipe, KEY).clone()
        above = sparse(pipe, KEY)
        with above.applied(pipe):
            assert torch.equal(weight(pipe, KEY), by_hand(edited, SOME, 0.0))
            with pytest.raises(ValueError, match="revert that edit first"):
                below.revert(pipe)
        assert torch.equal(weight(pipe, KEY), edited)
    assert state(pipe) == before


def test_sparse_edit_belongs_to_its_weights(pipe):
    edit, other = sparse(pipe), build_tiny_sd(seed=3)
    with pytest.raises(ValueError, match="made for other weights"):
        edit.apply(other)
    with pytest.raises(ValueError, match=r"does not fit .*shape \[4, 5\], not"):
        make_edit(pipe, {LINEAR: Knockout((4, 5), SOME)})
    with torch.no_grad():
        weight(pipe, LINEAR).view(-1)[:20] = 0
    zeros = sparse(pipe)
    with pytest.warns(UserWarning, match="weights it knocks out are 0 already"):
        zeros.apply(pipe)


def test_a_low_rank_map_still_refuses_a_convolution(pipe):
    with pytest.raises(ValueError, match=r"does not fit .*conv1.weight .*\[out, 32\], not"):
        low_rank(pipe, CONV)
    with pytest.raises(ValueError, match="only a plain nn.Linear or convolution"):
        make_edit(pipe, {"unet.mid_block.resnets.0.norm1.weight": Knockout((16,), SOME[:2])})


# -- with other edits


def test_composed_knock_outs_are_one_after_the_other(pipe):
    one, other = sparse(pipe, LINEAR, factor=0.5), sparse(pipe, LINEAR, CONV, indices=SOME + 5)
    both = loco.compose(one, other)
    W, V = weight(pipe, LINEAR).clone(), weight(pipe, CONV).clone()
    with both.applied(pipe):
        assert torch.equal(weight(pipe, LINEAR), by_hand(by_hand(W, SOME, 0.5), SOME + 5, 0.0))
        assert torch.equal(weight(pipe, CONV), by_hand(V, SOME + 5, 0.0))


def test_map_and_knock_out_compose_only_on_different_weights(pipe):
    both = loco.compose(low_rank(pipe), sparse(pipe, LINEAR))
    assert both.changes.keys() == {KEY, LINEAR}
    with both.applied(pipe):
        pass
    for pair in ((low_rank(pipe), sparse(pipe, KEY)), (sparse(pipe, KEY), low_rank(pipe))):
        with pytest.raises(ValueError, match="cannot be one edit: .*to_k.weight .*apply the first"):
            loco.compose(*pair)


def test_lora_and_diagnose_refuse_knock_outs_with_the_reason(pipe, tmp_path):
    for edit in (sparse(pipe), loco.compose(low_rank(pipe), sparse(pipe))):
        with pytest.raises(ValueError, match=r"knocks out single .*low rank: use edit\.save"):
            edit.to_lora(tmp_path / "lora", pipe)
        with pytest.raises(ValueError, match="knocks out single .*no rows to measure"):
            loco.diagnose(pipe, edit)
    assert not (tmp_path / "lora").exists()


def test_sparse_edit_says_what_it_is(pipe):
    pipe.register_to_config(_name_or_path="mini")
    assert repr(sparse(pipe, LINEAR, CONV)) == "<Edit: test of 2 weights of mini>"


@pytest.mark.parametrize("share, entry", [(0.01, 4), (0.05, 1 / 8 / 0.05), (1.0, 1 / 8)])
def test_a_dense_knockout_takes_a_bit_an_entry_on_disk(share, entry, tmp_path):
    pipe = build_tiny_sd()
    name = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"
    shape = tuple(pipe.unet.get_parameter(name[5:]).shape)
    size = math.prod(shape)
    generator = torch.Generator().manual_seed(0)
    at = torch.randperm(size, generator=generator)[: max(1, int(share * size))].sort().values
    edit = make_edit(pipe, {name: Knockout(shape, at, 0.5)}, method="test")
    edit.save(tmp_path / "edit")
    loaded = loco.Edit.load(tmp_path / "edit")
    assert loaded == edit and torch.equal(loaded.changes[name].indices, at)
    held = sum(x.nbytes for x in load_file(tmp_path / "edit").values())
    assert held <= entry * len(at) + 8
