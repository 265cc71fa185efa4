"""How a result knows where it came from, and how it is saved, loaded and compared.

A result is a frozen dataclass: of numbers, strings, tensors, pictures, and tuples, mappings and
dataclasses of such. On disk it is one file, `<kind>.safetensors`, under a seal (`record_file`).
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._version import __version__
from .codec import decoded, encoded, is_stack
from .digests import digest, fingerprint, weights
from .record_file import Stack, read_sealed, write_sealed

__all__ = ["Provenance", "Source", "Stack", "digest", "fingerprint", "load", "model_name",
           "provenance", "remember", "revision", "same", "save", "source_of", "versions",
           "weights"]  # fmt: skip

LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Provenance:
    """Where a result came from: everything needed to make it again.

    model: Hub id or folder name. revision: Hub commit, or None. fingerprint: of the weights.
    settings: prompts, seeds, steps, ... (JSON values). versions: of the libraries.
    """

    model: str
    revision: str | None
    fingerprint: str
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def provenance(pipe: Any, **settings: Any) -> Provenance:
    """The provenance of something made now with the diffusers pipeline `pipe`.

    Its fingerprint is that of all networks of the pipeline, in the sense of `digest`.

    records.provenance(pipe, prompts=["a star"], seeds=[0], steps=25).fingerprint
    """
    return Provenance(
        model=model_name(pipe),
        revision=revision(pipe),
        fingerprint=fingerprint(weights(pipe)),
        settings=json.loads(json.dumps(settings)),
        versions=versions(),
    )


@dataclass(frozen=True)
class Source:
    """How `loco.load` made a pipeline, fixed then: a later change of the working directory or of a
    config changes nothing.

    name: of the model: Hub id, or last part of the folder. folder: resolved, None for a Hub id.
    device, dtype, revision, variant: as they were asked for, with the defaults filled in.
    """

    name: str
    folder: Path | None = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    revision: str | None = None
    variant: str | None = None


_SOURCES: MutableMapping[Any, Source] = weakref.WeakKeyDictionary()


def remember(pipe: Any, source: Source) -> None:
    """Note where the pipeline `pipe` came from, for as long as it lives."""
    _SOURCES[pipe] = source


def source_of(pipe: Any) -> Source | None:
    """Where a pipeline came from, or None if it was not `loco.load` that made it."""
    return _SOURCES.get(pipe)


def model_name(pipe: Any) -> str:
    """The Hub id of a pipeline, or the last part of the folder it was loaded from."""
    if source := source_of(pipe):
        return source.name
    named = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    # A relative folder may look like a Hub id; what came from the Hub lies in its cache.
    return named if revision(pipe) else Path(named).name or named


def revision(pipe: Any) -> str | None:
    """The Hub commit a pipeline's weights were downloaded at, or None for a local one."""
    for part in pipe.components.values():
        source = str(getattr(getattr(part, "config", None), "_name_or_path", None))
        if found := re.search(r"\bsnapshots\W([0-9a-f]{40})\b", source):
            return found[1]
    return None


def versions() -> dict[str, str]:
    """Versions of loco_core and of the libraries that decide what a pipeline computes."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"loco_core": __version__, **found}


#: Number of the way in which the fields of a result are written.
FORMAT = 1

T = TypeVar("T")
#: What a damaged file ends in, before it is called one.
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)


def save(result: Any, folder: str | Path, kind: str) -> None:
    """Write a result, a frozen dataclass, to `<folder>/<kind>.safetensors`, whole or not at all.

    Its fields may be None, numbers, strings, tensors, dataclasses, tuples, lists, mappings with
    strings as keys, and pictures that come one by one: whatever has shape and dtype (uint8) and
    iterates over tensors [3, H, W], the leading axes flattened in order. Those are never held all
    at once. Raises TypeError for anything else and OSError as `files.atomic_write`.

        records.save(found, "results", "localization")
    """
    values: dict[str, Any] = {}
    header = {"format": FORMAT, "kind": kind, "record": encoded(result, values)}
    path = Path(folder) / f"{kind}.safetensors"
    write_sealed(path, header, values)
    text = path.with_suffix(".json")
    with suppress(OSError, *_DAMAGE):  # the other half of a record of 0.3
        if json.loads(text.read_text(encoding="utf-8"))["kind"] == kind:
            text.unlink()


def load(
    cls: type[T],
    folder: str | Path,
    kind: str,
    older: Callable[[dict[str, Any], dict[str, Tensor]], T] | None = None,
) -> T:
    """What `save` wrote, equal to what was saved, on the CPU; pictures as a `Stack`.

    cls: the dataclass, by whose type hints the file is read. older: makes one of the header and the
    tensors of a record of 0.3, which had two files.
    Raises FileNotFoundError if nothing is saved there and ValueError if it is damaged.

        found = records.load(Localization, "results", "localization")
    """
    path = Path(folder) / f"{kind}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no {kind} is saved in {folder}: {path.name} is missing")
    try:
        found = read_sealed(path)
        if found is not None:
            return _decoded_whole(cls, kind, *found)
        if older is not None:
            return older(*_two_files(path))
        raise ValueError("it has no header of loco")
    except _DAMAGE as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is damaged ({reason}): make the {kind} again") from None


def _two_files(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors) of a record of 0.3: the header, in JSON, holds the hash of the other."""
    from safetensors.torch import load

    text, blob = path.with_suffix(".json"), path.read_bytes()
    if not text.is_file():
        raise ValueError(f"{text.name} is missing")
    header = json.loads(text.read_text(encoding="utf-8"))
    if header["sha256"] != hashlib.sha256(blob).hexdigest():
        raise ValueError(f"it is not the file that {text.name} was saved with")
    return header, load(blob)


def _decoded_whole(cls: type[T], kind: str, header: dict[str, Any], values: dict[str, Any]) -> T:
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']!r}, of which this version knows {FORMAT} alone")
    if header["kind"] != kind:
        raise ValueError(f"it holds a {header['kind']}")
    return decoded(cls, header["record"], values)


def same(a: Any, b: Any) -> bool:
    """Equality that reaches into dataclasses, mappings and lists; tensors are compared exactly.

    Pictures that come one by one are compared one by one, whatever holds them. Fields with
    compare=False are left out.
    """
    if is_stack(a) and is_stack(b):
        return tuple(a.shape) == tuple(b.shape) and all(map(same, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and bool(((a == b) | ((a != a) & (b != b))).all())
        )
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        names = [f.name for f in dataclasses.fields(a) if f.compare]
        return all(same(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
