"""The file of a record: JSON and tensors under one seal.

A safetensors file that any reader of that format opens. Its metadata hold the JSON; its last 32
bytes, a tensor named `__seal__`, are the SHA-256 of all bytes before them: no damage passes.
Pictures may come one by one, and are given back as a `Stack`, which reads them one by one.
"""

import hashlib
import json
import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .files import atomic_write

__all__ = ["Stack", "read_sealed", "write_sealed"]

SEALED, SEAL = "__seal__", 32  # its name, and bytes of a SHA-256
PIECE = 1 << 20  # bytes that are read or written at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stack:
    """Pictures [..., 3, H, W] uint8 in a file, read when they are asked for.

    stack[3] is the picture with that index when all but the last three axes are flattened,
    iterating gives them in that order, and len counts them. shape, dtype: of all together. path,
    offset: where the first byte is. Raises ValueError if the file was changed since it was loaded;
    the same file written anew will do.

        first = Localization.load("found").images[0]     # a tensor [3, H, W]
    """

    dtype = torch.uint8

    def __init__(self, path: str | Path, offset: int, shape: Iterable[int]) -> None:
        self.path = Path(os.path.abspath(path))
        self.offset = offset
        self.shape = tuple(shape)
        with open(self.path, "rb") as file:
            self._stamp, self._seal = _stamp(file), _tail(file)

    def __len__(self) -> int:
        return math.prod(self.shape[:-3])

    def __getitem__(self, index: int) -> Tensor:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"picture {index} is not among the {len(self)} of {self.path}")
        (picture,) = self._pictures([number % len(self)])
        return picture

    def __iter__(self) -> Iterator[Tensor]:
        return self._pictures(range(len(self)))

    def __repr__(self) -> str:
        return f"<Stack: pictures {list(self.shape)} in {self.path}>"

    def _pictures(self, indices: Iterable[int]) -> Iterator[Tensor]:
        size = math.prod(self.shape[-3:])
        try:
            with open(self.path, "rb") as file:
                self._check(file)
                for index in indices:
                    file.seek(self.offset + index * size)
                    yield _read(file, torch.uint8, self.shape[-3:])
        except FileNotFoundError:
            raise ValueError(f"{self.path} is gone, and its pictures with it") from None

    def _check(self, file: BinaryIO) -> None:
        if _stamp(file) != self._stamp:
            if _tail(file) != self._seal or _sealed(file) != self._seal:
                raise ValueError(f"{self.path} was changed since it was loaded: load it again")
            self._stamp = _stamp(file)


def write_sealed(path: str | Path, header: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write a header (JSON values) and named tensors, whole or not at all; any device.

    values: tensors, or pictures that have shape, dtype (uint8) and an order, and are never held all
    at once. Raises ValueError for what a file cannot hold.
    """
    ordered = sorted(values, key=lambda name: (-values[name].dtype.itemsize, name))  # aligned
    stacks = [name for name in ordered if not isinstance(values[name], Tensor)]
    told = json.dumps({"header": header, "stacks": stacks}, ensure_ascii=False)
    entries: dict[str, Any] = {"__metadata__": {"loco": told}}
    end = 0
    for name in ordered:
        value = values[name]
        if value.dtype not in NAMES or name in stacks and value.dtype != torch.uint8:
            raise ValueError(f"{name} is {value.dtype}, which is not saved: convert it first")
        start, end = end, end + math.prod(value.shape) * value.dtype.itemsize
        shape = list(value.shape)
        entries[name] = {"dtype": NAMES[value.dtype], "shape": shape, "data_offsets": [start, end]}
    entries[SEALED] = {"dtype": "U8", "shape": [SEAL], "data_offsets": [end, end + SEAL]}
    if len(entries) < len(values) + 2:
        raise ValueError('no tensor may be named "__seal__" or "__metadata__": rename it')
    text = json.dumps(entries, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    atomic_write(path, _file(text, [values[name] for name in ordered]))


def read_sealed(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor | Stack]] | None:
    """(header, values) of a file by `write_sealed`; None for a safetensors file without our header.

    Pictures that were written one by one are given back as a Stack.
    Raises ValueError with the reason if the file is damaged.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("it is cut off, or no safetensors file")
        entries = json.loads(file.read(length))
        if "loco" not in entries.get("__metadata__", {}) and SEALED not in entries:
            return None
        if size < 8 + length + SEAL or _sealed(file) != _tail(file):
            raise ValueError("its bytes are not those that were sealed")
        told = json.loads(entries["__metadata__"]["loco"])
        values: dict[str, Tensor | Stack] = {}
        for name, entry in entries.items():
            if name in ("__metadata__", SEALED):
                continue
            dtype, shape = DTYPES[entry["dtype"]], tuple(map(operator.index, entry["shape"]))
            start, end = (8 + length + operator.index(x) for x in entry["data_offsets"])
            sound = min(shape, default=0) >= 0 and 8 + length <= start <= end <= size - SEAL
            if not sound or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} lies outside of it")
            if name in told["stacks"]:
                values[name] = stack = Stack(path, start, shape)
                if stack._stamp != _stamp(file):
                    raise ValueError("it was written anew while it was read")
            else:
                file.seek(start)
                values[name] = _read(file, dtype, shape)
    return told["header"], values


def _file(text: bytes, values: Iterable[Any]) -> Iterator[bytes]:
    """The bytes of a file, piece by piece: length, header, tensors, seal."""
    seal = hashlib.sha256()
    for piece in _content(text, values):
        seal.update(piece)
        yield piece
    yield seal.digest()


def _content(text: bytes, values: Iterable[Any]) -> Iterator[bytes]:
    yield len(text).to_bytes(8, "little")
    yield text
    for value in values:
        pictures = [value] if isinstance(value, Tensor) else value
        expected = value.shape if isinstance(value, Tensor) else tuple(value.shape)[-3:]
        count = 1 if isinstance(value, Tensor) else math.prod(tuple(value.shape)[:-3])
        for picture in pictures:
            if picture.shape != expected or picture.dtype != value.dtype:
                raise ValueError(
                    f"a picture is {picture.dtype} {list(picture.shape)}, not {value.dtype} "
                    f"{list(expected)} as announced"
                )
            count -= 1
            raw = picture.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            yield from (raw[i : i + PIECE].tobytes() for i in range(0, len(raw), PIECE))
        if count:
            raise ValueError(f"there are not as many pictures as {list(value.shape)} announces")


def _read(file: BinaryIO, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of its own, from where the file stands."""
    buffer = bytearray(math.prod(shape) * dtype.itemsize)
    if file.readinto(buffer) < len(buffer):  # type: ignore[attr-defined]
        raise ValueError(f"{file.name} is cut off")
    if not buffer:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def _sealed(file: BinaryIO) -> bytes:
    """The SHA-256 of all but the last 32 bytes."""
    left, found = os.fstat(file.fileno()).st_size - SEAL, hashlib.sha256()
    file.seek(0)
    while left > 0 and (piece := file.read(min(PIECE, left))):
        found.update(piece)
        left -= len(piece)
    return found.digest()


def _tail(file: BinaryIO) -> bytes:
    file.seek(max(0, os.fstat(file.fileno()).st_size - SEAL))
    return file.read(SEAL)


def _stamp(file: BinaryIO) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
