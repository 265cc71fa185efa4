"""Records come back equal, and appear whole or not at all."""

import errno
import hashlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import build_tiny_sd
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loco_core as loco
from loco_core import digests, records
from loco_core.edits.weights import fingerprint
from loco_core.inside.kept import Kept

ROOT = Path(records.__file__).parents[1]


@dataclass(frozen=True)
class Shape:
    """A part of a result."""

    name: str
    sides: int | None = None
    corners: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Found:
    """A result with a field of every kind."""

    shape: Shape
    shapes: tuple[Shape, ...]
    pair: tuple[int, str]
    weights: Mapping[str, Tensor]
    scores: Float[Tensor, "row column"]
    provenance: records.Provenance
    images: Any = None
    maybe: Tensor | None = None
    level: float = 0.05
    way: Literal["up", "down"] = "up"
    flags: list[bool] = field(default_factory=list)
    how: dict[str, Any] = field(default_factory=dict)
    folder: str = field(default="", compare=False)


def found(**more):
    """A small one."""
    torch.manual_seed(1)
    fields = dict(
        shape=Shape("star \u2605", 5, ((0.0, 1.5),)),
        shapes=(Shape("line"), Shape("square", 4)),
        pair=(3, "x"),
        weights={"a.b": torch.randn(2, 3).half(), "a": torch.arange(3), "": torch.ones(())},
        scores=torch.tensor([[1.0, float("nan")], [-0.0, float("inf")]], dtype=torch.float64),
        provenance=records.Provenance("mini", None, "0" * 16, {"seeds": [0, 1], "window": 2}),
        maybe=torch.tensor([True, False]),
        flags=[True, False],
        how={"deep": [1, 2.5, None, {"x": "y"}], "nothing": float("inf")},
    )
    return Found(**fields | more)


class Pictures:
    """Pictures that are made when they are asked for, one at a time."""

    dtype = torch.uint8

    def __init__(self, *leading, seed=0):
        self.shape, self.seed, self.alive, self.most = (*leading, 3, 4, 5), seed, 0, 0

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(math.prod(self.shape[:-3])):
            yield torch.randint(0, 256, self.shape[-3:], generator=generator, dtype=torch.uint8)


def test_a_result_comes_back_as_it_was_saved_from_one_file(tmp_path):
    records.save(found(), tmp_path / "new" / "folder", "thing")
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert file.name == "thing.safetensors"
    back = records.load(Found, tmp_path / "new" / "folder", "thing")
    assert records.same(back, found()) and back.pair == (3, "x")
    assert type(back.shapes) is tuple and back.shapes == found().shapes
    back.scores[0, 0] = 7  # its tensors are its own: writable, and no view of the file
    assert records.same(records.load(Found, file.parent, "thing"), found())


def test_any_reader_of_safetensors_opens_the_file(tmp_path):
    records.save(found(images=Pictures(2)), tmp_path, "thing")
    tensors = load_file(tmp_path / "thing.safetensors")
    assert records.same(tensors["scores"], found().scores)
    assert records.same(tensors["weights.a.b"], found().weights["a.b"])
    assert records.same(list(tensors["images"]), list(Pictures(2)))
    blob = (tmp_path / "thing.safetensors").read_bytes()
    assert tensors["__seal__"].numpy().tobytes() == hashlib.sha256(blob[:-32]).digest()


def test_names_that_are_spelt_alike_are_kept_apart(tmp_path):
    nested = {"a": {"b": torch.ones(2)}, "a.b": torch.zeros(2), "a'": torch.ones(1)}
    records.save(found(how=nested), tmp_path, "thing")
    assert records.same(records.load(Found, tmp_path, "thing").how, nested)


def test_numbers_of_numpy_are_numbers(tmp_path):
    odd = found(pair=(np.int64(3), "x"), level=np.float32(0.5), shape=Shape("x", np.uint8(4)))
    records.save(odd, tmp_path, "thing")
    back = records.load(Found, tmp_path, "thing")
    assert (back.pair, back.level, back.shape.sides) == ((3, "x"), 0.5, 4)
    assert type(back.pair[0]) is int and type(back.level) is float


@pytest.mark.parametrize("wrong, error", [
    (dict(how={"x": {1, 2}}), "how.x is a set, which cannot be saved"),
    (dict(how={"x": {1: 2}}), "how.x is a dict, which cannot be saved"),
    (dict(how={"$tensor": "scores"}), "how is a dict, which cannot be saved"),
    (dict(maybe=np.zeros(3)), "maybe is float64, which is not saved"),
    (dict(maybe=torch.zeros(3, dtype=torch.complex64)), "maybe is torch.complex64"),
])  # fmt: skip
def test_what_a_file_cannot_hold_is_refused_and_nothing_is_written(tmp_path, wrong, error):
    with pytest.raises((TypeError, ValueError), match=error):
        records.save(found(**wrong), tmp_path, "thing")
    assert not list(tmp_path.iterdir())


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no thing is saved in .*thing.safetensors is miss"):
        records.load(Found, tmp_path, "thing")


def refused(folder, cls=Found):
    """Whether a record is refused by name and with what to do, and not in another way."""
    try:
        records.load(cls, folder, "thing")
    except ValueError as error:
        path = str(folder / "thing.safetensors")
        assert str(error).startswith(f"{path} is damaged (") and "make the thing again" in str(
            error
        )
        return True
    return False


def test_a_change_of_any_byte_is_refused(tmp_path):
    records.save(Shape("x", 3), tmp_path, "thing")
    path = tmp_path / "thing.safetensors"
    blob = path.read_bytes()
    for i in range(len(blob)):
        for change in (0x01, 0x20, 0x80, 0xFF):
            path.write_bytes(blob[:i] + bytes([blob[i] ^ change]) + blob[i + 1 :])
            assert refused(tmp_path, Shape), (i, change)
        path.write_bytes(blob[:i])
        assert refused(tmp_path, Shape), i
    for other in (blob + b"x", blob[1:], blob * 2, bytes(len(blob)), b"[]", b"\xff" * 100):
        path.write_bytes(other)
        assert refused(tmp_path, Shape)
    path.write_bytes(blob)
    assert records.load(Shape, tmp_path, "thing") == Shape("x", 3)


def sealed(path, change):
    """Rewrite a file with another record or envelope, under a seal that is right."""
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    entries, data = json.loads(blob[8 : 8 + length]), blob[8 + length : -32]
    told = json.loads(entries["__metadata__"]["loco"])
    told = change(told, entries) or told
    entries["__metadata__"]["loco"] = told if isinstance(told, str) else json.dumps(told)
    text = json.dumps(entries).encode()
    body = len(text).to_bytes(8, "little") + text + data
    path.write_bytes(body + hashlib.sha256(body).digest())


def put(*where, to):
    """A change that sets one value of the record."""

    def change(told, entries):
        node = told["header"]
        for key in where[:-1]:
            node = node[key]
        node[where[-1]] = to

    return change


@pytest.mark.parametrize("change, reason", [
    (put("format", to=2), "format 2, of which this version knows 1"),
    (put("kind", to="other"), "it holds a other"),
    (put("record", to=[]), "Found is no Found"),
    (put("record", "shape", "name", to=5), "Found.shape.name is no str"),
    (put("record", "shape", "sides", to="5"), "Found.shape.sides is none of"),
    (put("record", "shape", "sides", to=True), "Found.shape.sides is none of"),
    (put("record", "shape", "corners", to=[[1]]), "shorter"),
    (put("record", "pair", to=[1, "x", 2]), "longer"),
    (put("record", "level", to="x"), "Found.level is no float"),
    (put("record", "way", to="left"), "Found.way is no"),
    (put("record", "flags", to=[1]), "Found.flags.0 is no bool"),
    (put("record", "scores", to=[1.0]), "Found.scores is no"),
    (put("record", "scores", to={"$tensor": "maybe"}), "Found.scores is no"),
    (put("record", "scores", to={"$tensor": "nowhere"}), "nowhere"),
    (put("record", "shapes", to={"$tensor": "scores"}), "Found.shapes is no"),
    (put("record", "more", to=1), "Found has no more"),
    (lambda told, entries: told["header"]["record"].pop("pair") and None, "pair"),
    (lambda told, entries: "[" * 100000, "recursion"),
    (lambda told, entries: "nothing", "Expecting value"),
    (lambda told, entries: entries["scores"].update(shape=[2, 3]), "scores lies outside"),
    (lambda told, entries: entries["scores"].update(shape=[-2, -2]), "scores lies outside"),
    (lambda told, entries: entries["scores"].update(shape=[2**70, 0, 2]), "scores"),
    (lambda told, entries: entries["scores"].update(shape="x"), "TypeError"),
    (lambda told, entries: entries["scores"].update(data_offsets=[0, 10**9]), "scores lies"),
    (lambda told, entries: entries["scores"].update(dtype="F8"), "F8"),
    (lambda told, entries: entries.update(scores=5), "TypeError"),
])  # fmt: skip
def test_what_is_sealed_and_odd_is_refused_in_the_same_words(tmp_path, change, reason):
    records.save(found(), tmp_path, "thing")
    sealed(tmp_path / "thing.safetensors", lambda told, entries: None)
    assert records.same(records.load(Found, tmp_path, "thing"), found())
    sealed(tmp_path / "thing.safetensors", change)
    assert refused(tmp_path)
    with pytest.raises(ValueError, match=re.escape(reason)):
        records.load(Found, tmp_path, "thing")


def test_another_safetensors_file_is_no_record(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "thing.safetensors")
    assert refused(tmp_path)


def test_fields_that_are_new_take_their_default_from_an_old_file(tmp_path):
    records.save(Shape("x"), tmp_path, "thing")
    sealed(tmp_path / "thing.safetensors", lambda t, e: t["header"]["record"].pop("sides") and None)
    assert records.load(Shape, tmp_path, "thing") == Shape("x")


def two_files(folder, kind, header, tensors):
    """A record as 0.3 wrote it."""
    save_file(tensors, folder / f"{kind}.safetensors")
    seal = hashlib.sha256((folder / f"{kind}.safetensors").read_bytes()).hexdigest()
    (folder / f"{kind}.json").write_text(json.dumps({"kind": kind, "sha256": seal, **header}))


MADE = records.Provenance("mini", None, "0" * 16, {"objective": "erase"}, {"torch": "2"})
STAR = loco.Concept("star", "object", ("a star",), ("a shape",))
W = {"unet.a.to_k.weight": torch.randn(2, 3), "unet.b.to_v.weight": torch.randn(2, 3)}
PROBES = (loco.judging.probes.Probe("a star", "efficacy", wanted=False),)
ROW = torch.randn(4).double()
RESULTS = [
    loco.Neurons(STAR, tuple(W), (8, 9), (2, 2), ("1" * 16,) * 2, ROW, ROW + 1, ROW - 1,
                 torch.tensor([2, 0, 1, 3]), MADE),
    loco.Attribution(STAR, Kept.of(W, 1.0), {k: fingerprint(v + 1) for k, v in W.items()}, 0.5,
                     ("a", "b"), MADE),
    loco.Evaluation(STAR, ("no edit", "edit"), PROBES, False, torch.rand(2, 1, 3).double(),
                    torch.randint(0, 256, (2, 1, 3, 4, 4)) / 255, MADE),
]  # fmt: skip


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_every_result_comes_back_from_one_file_and_from_the_two_of_before(result, tmp_path):
    kind = type(result).__name__.lower()
    result.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{kind}.safetensors"]
    assert type(result).load(tmp_path) == result
    header = {f.name: getattr(result, f.name) for f in fields(result)}
    tensors = {k: header.pop(k) for k, x in [*header.items()] if isinstance(x, Tensor)}
    if kind == "attribution":
        header = {k: v for k, v in header.items() if k not in ("kept", "marks")} | {"names": [*W]}
        tensors = {f"alpha.{k}": v for k, v in W.items()}
        tensors |= {f"weight.{k}": v + 1 for k, v in W.items()}
    if kind == "evaluation":
        tensors["images"] = (tensors["images"] * 255).round().to(torch.uint8)
    plain = json.loads(json.dumps(header, default=vars))
    two_files(tmp_path, kind, plain, tensors)
    assert type(result).load(tmp_path) == result
    (tmp_path / f"{kind}.json").write_text("{")
    with pytest.raises(ValueError, match=f"{kind}.safetensors is damaged .*make the {kind} again"):
        type(result).load(tmp_path)


def test_a_record_of_two_files_is_read_by_the_hook_and_replaced_by_one_file(tmp_path):
    two_files(tmp_path, "thing", {"name": "x"}, {"sides": torch.tensor(4)})
    assert refused(tmp_path, Shape)

    def older(header, tensors):
        return Shape(header["name"], int(tensors["sides"]))

    assert records.load(Shape, tmp_path, "thing", older) == Shape("x", 4)
    with pytest.raises(
        ValueError, match="thing.safetensors is damaged .KeyError.'side'.*: make the thing"
    ):
        records.load(Shape, tmp_path, "thing", lambda header, tensors: Shape(header["side"]))
    (tmp_path / "thing.safetensors").write_bytes(b"x" * 30)
    with pytest.raises(ValueError, match="is damaged"):
        records.load(Shape, tmp_path, "thing", older)
    (tmp_path / "other.json").write_text("{}")
    records.save(Shape("y"), tmp_path, "thing")
    records.save(Shape("z"), tmp_path, "other")
    assert records.load(Shape, tmp_path, "thing", older) == Shape("y")
    names = {"thing.safetensors", "other.safetensors", "other.json"}  # that was nobody's record
    assert {path.name for path in tmp_path.iterdir()} == names


# Pictures one by one


def test_pictures_are_written_and_read_one_by_one(tmp_path):
    records.save(found(images=Pictures(2, 3)), tmp_path, "thing")
    back = records.load(Found, tmp_path, "thing")
    images = back.images
    assert isinstance(images, records.Stack) and images.dtype == torch.uint8
    assert (images.shape, len(images)) == ((2, 3, 3, 4, 5), 6)
    assert records.same(list(images), list(Pictures(2, 3)))
    assert records.same(images[4], list(Pictures(2, 3))[4])
    assert records.same(images[np.int64(-1)], list(Pictures(2, 3))[-1])
    for index in (6, -7):
        with pytest.raises(IndexError, match="is not among the 6 of"):
            images[index]
    assert records.same(back, found(images=Pictures(2, 3)))
    assert not records.same(back, found(images=Pictures(2, 3, seed=1)))
    assert not records.same(back, found(images=Pictures(3, 2)))


def test_a_stack_may_be_saved_again_also_where_it_came_from(tmp_path):
    records.save(found(images=Pictures(2)), tmp_path, "thing")
    back = records.load(Found, tmp_path, "thing")
    for folder in (tmp_path / "copy", tmp_path):
        records.save(back, folder, "thing")
        assert records.same(records.load(Found, folder, "thing"), back)
    assert records.same(pickle.loads(pickle.dumps(back.images))[1], list(Pictures(2))[1])


def test_a_stack_refuses_a_file_that_was_changed_since(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records.save(found(images=Pictures(2)), "here", "thing")
    images = records.load(Found, "here", "thing").images
    monkeypatch.chdir("/")
    assert len(list(images)) == 2  # known by its whole path
    path = tmp_path / "here" / "thing.safetensors"
    blob = path.read_bytes()
    path.write_bytes(blob)  # the same, written anew
    assert len(list(images)) == 2
    for other in (blob[:-40] + b"x" + blob[-39:], blob[:-1] + b"x", blob[:-1], b""):
        path.write_bytes(other)
        os.utime(path, ns=(1, 1))
        with pytest.raises(ValueError, match="was changed since it was loaded: load it again"):
            images[0]
    records.save(found(images=Pictures(2, seed=1)), path.parent, "thing")
    with pytest.raises(ValueError, match="was changed since"):
        list(images)
    path.unlink()
    with pytest.raises(ValueError, match="is gone, and its pictures with it"):
        images[0]


class Wrong(Pictures):
    """Pictures that are not as they say."""

    def __init__(self, *shape, made):
        super().__init__(*shape)
        self.made = made

    def __iter__(self):
        yield from self.made


@pytest.mark.parametrize("made, error", [
    ([torch.zeros(3, 4, 5)] * 2, "a picture is torch.float32"),
    ([torch.zeros(3, 5, 4, dtype=torch.uint8)] * 2, "a picture is torch.uint8 .3, 5, 4"),
    ([torch.zeros(3, 4, 5, dtype=torch.uint8)], "not as many pictures"),
    ([torch.zeros(3, 4, 5, dtype=torch.uint8)] * 3, "not as many pictures"),
])  # fmt: skip
def test_pictures_that_are_not_as_announced_are_refused(tmp_path, made, error):
    records.save(found(), tmp_path, "thing")
    with pytest.raises(ValueError, match=error):
        records.save(found(images=Wrong(2, made=made)), tmp_path, "thing")
    assert records.same(records.load(Found, tmp_path, "thing"), found())


LARGE = """
import os, resource, sys, torch
from dataclasses import dataclass
from typing import Any
from loco_core import records

@dataclass(frozen=True)
class Result:
    images: Any

class Many:
    dtype, shape = torch.uint8, (200, 3, 512, 512)
    def __iter__(self):
        for i in range(200):
            if i == int(sys.argv[2]):
                os.kill(os.getpid(), 9)
            yield torch.full((3, 512, 512), i, dtype=torch.uint8)

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
records.save(Result(Many()), sys.argv[1], "thing")
images = records.load(Result, sys.argv[1], "thing").images
assert [int(image[0, 0, 0]) for image in images] == list(range(200))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_many_pictures_are_never_held_at_once(tmp_path):
    run = [sys.executable, "-c", LARGE, str(tmp_path), "-1"]
    kilobytes = int(subprocess.run(run, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    assert kilobytes < 30_000  # of 157 MB


def test_a_killed_writer_leaves_the_old_record(tmp_path):
    records.save(found(), tmp_path, "thing")
    process = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path), "100"], cwd=ROOT)
    assert process.returncode == -9
    assert records.same(records.load(Found, tmp_path, "thing"), found())


def test_a_full_disk_leaves_the_old_record_and_nothing_half_written(tmp_path, monkeypatch):
    records.save(found(), tmp_path, "thing")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot save .*thing.safetensors.*No space left") as caught:
        records.save(found(level=0.5), tmp_path, "thing")
    assert caught.value.errno == errno.ENOSPC
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# Where a result came from


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
        monkeypatch.setattr(digests, "CHUNK", chunk)
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


def test_same_leaves_out_what_is_not_compared():
    assert records.same(found(folder="a"), found(folder="b"))
    assert not records.same(found(level=0.1), found(level=0.2))
