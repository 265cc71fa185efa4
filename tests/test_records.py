"""Records come back equal, and appear whole or not at all."""

import errno
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


def test_a_fingerprint_survives_a_change_of_dtype_but_no_change_of_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    first = records.fingerprint(net)
    assert records.fingerprint(net.double()) == first
    assert records.fingerprint(net.half()) == first
    net[1].weight.data[0, 0] *= 1.01
    assert records.fingerprint(net) != first


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
