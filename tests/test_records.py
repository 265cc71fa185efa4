"""Records come back equal, and appear whole or not at all."""

import errno
import hashlib
import json
import os

import pytest
import torch
from conftest import build_tiny_sd
from torch import nn

from loco_core import records

HEADER = {"name": "x", "prompts": ["a house"]}
TENSORS = {
    "scores": torch.arange(6.0).reshape(2, 3).double(),
    "images": torch.zeros(2, dtype=torch.uint8),
}


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    records.save_record(tmp_path / "new" / "folder", "thing", HEADER, TENSORS)
    header, tensors = records.load_record(tmp_path / "new" / "folder", "thing")
    assert {k: header[k] for k in HEADER} == HEADER and header["kind"] == "thing"
    assert records.same(tensors, TENSORS)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no thing is saved in .*thing.json is missing"):
        records.load_record(tmp_path, "thing")


@pytest.mark.parametrize("name, damage", [
    ("thing.json", lambda b: b[:-9]),
    ("thing.json", lambda b: b"[]"),
    ("thing.safetensors", lambda b: b[:-1]),
    ("thing.safetensors", lambda b: b[:-1] + b"\x01"),
])  # fmt: skip
def test_a_damaged_record_is_refused_by_name(tmp_path, name, damage):
    records.save_record(tmp_path, "thing", HEADER, TENSORS)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        records.load_record(tmp_path, "thing")


def test_a_full_disk_leaves_the_old_record_and_nothing_half_written(tmp_path, monkeypatch):
    records.save_record(tmp_path, "thing", HEADER, TENSORS)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:  # the second of the two files does not fit
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot save .*thing.json.*No space left") as caught:
        records.save_record(tmp_path, "thing", HEADER | {"name": "y"}, TENSORS)
    assert caught.value.errno == errno.ENOSPC
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot save .*file/thing"):
        records.save_record(tmp_path / "file", "thing", HEADER, TENSORS)


def network():
    """A small network with a buffer and whole numbers among its weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    net[0].register_buffer("codes", torch.arange(12, dtype=torch.int8).reshape(3, 4))
    return net


def by_hand(net, exact):
    """The digest as its docstring has it, tensor by tensor and without pieces."""
    lines = []
    for name, x in sorted(net.state_dict().items()):
        rounded = x.is_floating_point() and not exact
        kind = "rounded to float16" if rounded else str(x.dtype)
        one = hashlib.sha256(json.dumps([name, kind, list(x.shape)]).encode())
        array = x.numpy()
        one.update((array.astype("float16") if rounded else array).tobytes())
        lines.append(one.hexdigest())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("exact", [False, True])
def test_a_digest_is_that_of_the_bytes_whatever_the_pieces(exact, monkeypatch):
    for chunk in (1, 4, 1 << 18):
        monkeypatch.setattr(records, "CHUNK", chunk)
        assert records.digest(network(), exact) == by_hand(network(), exact)


def test_a_rounded_digest_survives_a_change_of_dtype_and_an_exact_one_does_not():
    first, exact = records.digest(network()), records.digest(network(), exact=True)
    assert records.digest(network().double()) == records.digest(network().half()) == first
    assert records.fingerprint(network()) == first[:16]
    assert records.digest(network().double(), exact=True) != exact
    # bfloat16 has a digest of its own, which holds when it is widened
    brief = network().bfloat16()
    assert records.digest(brief) == records.digest(brief.float()) != first


CHANGES = {
    "a value": lambda net: net[2].weight.data[0, 0].mul_(1.01),
    "rows reversed": lambda net: net[2].weight.data.copy_(net[2].weight.data.flip(0)),
    "two entries swapped": lambda net: net[0].bias.data[:2].copy_(net[0].bias.data[:2].flip(0)),
    "int8 weights": lambda net: net[0].codes[1, 1].add_(5),
    "int8 rows": lambda net: net[0].codes.copy_(net[0].codes.flip(0)),
    "a buffer": lambda net: net[1].running_mean.add_(1),
    "a bool": lambda net: net[0].register_buffer("codes", net[0].codes.bool()),
    "a shape": lambda net: net[0].register_buffer("codes", net[0].codes.reshape(4, 3)),
    "a buffer that is not saved": lambda net: net.register_buffer("x", torch.ones(1), False),
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_digest_changes_with_every_weight_and_its_place(change, exact):
    net = network()
    first = records.digest(net, exact)
    change(net)
    assert records.digest(net, exact) != first


def test_pairs_may_come_in_any_order_and_from_a_generator():
    pairs = list(network().state_dict().items())
    assert records.digest(iter(pairs[::-1])) == records.digest(pairs) == records.digest(network())
    with pytest.raises(ValueError, match="two tensors are named '0.bias'"):
        records.digest([*pairs, ("0.bias", torch.zeros(1))])
    with pytest.raises(ValueError, match="1.weight is on the meta device"):
        records.digest(nn.Sequential(nn.Identity(), nn.Linear(2, 2, device="meta")))


def test_weights_that_lie_any_way_in_memory_have_the_digest_of_their_values():
    x = torch.randn(4, 6, 5, 3)
    lying = x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1)
    for other in lying:
        assert records.digest([("x", other)]) == records.digest([("x", x)])
    parts = [("0-d", torch.tensor(2.0)), ("none", torch.zeros(0, 3)), ("b", torch.ones(2).bool())]
    assert len(records.digest(parts, exact=True)) == 64


def test_offloaded_weights_are_read_from_where_they_are_kept():
    from accelerate import cpu_offload

    net = network()
    first = records.digest(net)
    cpu_offload(net.eval(), "cpu")
    assert net[2].weight.device.type == "meta" and records.digest(net) == first
    x = torch.randn(4, 5)
    net(x)
    assert records.digest(net) == first


def test_the_source_of_a_pipeline_is_fixed_when_it_is_loaded(tmp_path, monkeypatch):
    build_tiny_sd().save_pretrained(tmp_path / "deep" / "tiny")
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "tiny")
    monkeypatch.chdir(tmp_path / "deep")
    from loco_core import zoo

    pipe = zoo.load("tiny", dtype=torch.float64)
    source = records.Source("tiny", tmp_path / "deep" / "tiny", pipe.device, torch.float64)
    assert records.source_of(pipe) == source
    plain = type(pipe).from_pretrained("../deep/tiny")
    before = records.provenance(plain)
    monkeypatch.chdir("/")
    pipe.register_to_config(_name_or_path="someone-else/other")
    assert records.source_of(pipe) == source and records.model_name(pipe) == "tiny"
    assert records.source_of(plain) is None and records.provenance(plain) == before
    assert before == records.provenance(pipe)
    linked = zoo.load(tmp_path / "link")
    assert (records.model_name(linked), records.source_of(linked).folder) == ("link", source.folder)
    monkeypatch.chdir(tmp_path / "deep" / "tiny")
    assert records.model_name(zoo.load(".")) == "tiny"


def test_provenance_names_model_settings_and_versions(tmp_path):
    build_tiny_sd().save_pretrained(tmp_path / "tiny")
    from loco_core import zoo

    made = records.provenance(zoo.load(tmp_path / "tiny"), seeds=[0, 1], prompts=("a",))
    assert made.model == "tiny" and made.revision is None
    assert made.settings == {"seeds": [0, 1], "prompts": ["a"]}
    assert made.versions["torch"] == torch.__version__
    assert str(tmp_path) not in repr(made)


def test_same_looks_into_everything_and_tells_dtypes_apart():
    a = {"x": [torch.tensor([1.0, float("nan")]), (1, "a")]}
    assert records.same(a, {"x": [torch.tensor([1.0, float("nan")]), (1, "a")]})
    assert not records.same(a, {"x": [torch.tensor([1.0, 2.0]), (1, "a")]})
    assert not records.same(torch.zeros(2), torch.zeros(2).double())
    assert not records.same(torch.zeros(2), torch.zeros(3))
    assert not records.same([1], (1,)) and not records.same({"a": 1}, {"b": 1})
