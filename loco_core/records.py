"""How a result knows where it came from, and how it is saved, loaded and compared.

A record on disk is a folder with `<kind>.json` (what a person reads) and `<kind>.safetensors` (the
numbers). The JSON holds the SHA-256 of the other file, so that a damaged or mixed-up record is
refused. Files appear whole or not at all.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__

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


def weights(owner: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and buffer of a network, or of all networks of a pipeline.

    Tensors stay where they are; those that accelerate keeps elsewhere are read one by one.
    Raises ValueError for one that is nowhere.
    """
    if not isinstance(owner, nn.Module):
        for component, part in owner.components.items():
            if isinstance(part, nn.Module):
                yield from ((f"{component}.{name}", x) for name, x in weights(part))
        return
    for path, module in owner.named_modules():
        own = (*module.named_parameters("", False), *module.named_buffers("", False))
        for name, x in own:
            full = f"{path}.{name}" if path else name
            yield full, _offloaded(module, full, name) if x.device.type == "meta" else x


def _offloaded(module: nn.Module, full: str, name: str) -> Tensor:
    """A tensor that accelerate put aside, from the map of the module's hook."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            return kept[name]
    raise ValueError(
        f"{full} is on the meta device and has no values: load the weights before they are read"
    )


#: Entries that are rounded and hashed at a time: what stays in a cache of the processor.
CHUNK = 1 << 18


@torch.no_grad()
def digest(named: nn.Module | Iterable[tuple[str, Tensor]], exact: bool = False) -> str:
    """SHA-256 (hex) of weights: of the name, shape and bytes of every tensor, in order of names.

    named: a network, or (name, tensor) pairs in any order, which may be made one by one, as
    `weights` does. exact=True takes dtypes and bytes as they are. exact=False first rounds
    floating point to float16: the same for a model loaded in float16, float32 or float64.
    bfloat16 has fewer bits than float16, so a model loaded in it has a digest of its own, the same
    again when it is widened. Integers and booleans are never rounded. Devices do not matter.
    Raises ValueError for a name given twice and for a tensor without values.

    records.digest(pipe.unet, exact=True)
    """
    pairs = weights(named) if isinstance(named, nn.Module) else named
    found: dict[str, str] = {}
    for name, x in pairs:
        if name in found:
            raise ValueError(f"two tensors are named {name!r}: every weight needs its own name")
        found[name] = _digest(name, x.detach(), rounded=not exact and x.is_floating_point())
    return hashlib.sha256("\n".join(found[name] for name in sorted(found)).encode()).hexdigest()


def _digest(name: str, x: Tensor, rounded: bool) -> str:
    if x.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and has no values: pass records.weights")
    kind = "rounded to float16" if rounded else str(x.dtype)
    found = hashlib.sha256(json.dumps([name, kind, list(x.shape)]).encode())
    for piece in x.contiguous().view(-1).split(CHUNK):
        if rounded:
            piece = piece.to(torch.float16)
        found.update(piece.cpu().view(torch.uint8).numpy())
    return found.hexdigest()


def fingerprint(named: nn.Module | Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits that tell one set of weights from another: the start of `digest`.

    The same whether the model was loaded in float16, float32 or float64, on a CPU or a GPU.
    """
    return digest(named)[:16]


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all; missing folders are made.

    Raises OSError naming `path` if the disk is full or read-only; what was there before stays.
    """
    _write_all({Path(path): data})


def _write_all(files: Mapping[Path, bytes]) -> None:
    """Write several files next to their final names, then put all of them in place."""
    ready: dict[Path, str] = {}
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, ready[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in ready.items():
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot save {path}: {error.strerror}; nothing was written, free the disk or name "
            "another folder",
        ) from error
    finally:
        for temporary in ready.values():
            if os.path.exists(temporary):
                os.unlink(temporary)


def save_record(
    folder: str | Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write `<kind>.json` (header: JSON values) and `<kind>.safetensors`, whole or not at all."""
    from safetensors.torch import save

    blob = save({name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()})
    full = {"kind": kind, "sha256": hashlib.sha256(blob).hexdigest(), **header}
    text = json.dumps(full, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    folder = Path(folder)
    _write_all({folder / f"{kind}.safetensors": blob, folder / f"{kind}.json": text.encode()})


def load_record(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors) of a record written by `save_record`.

    Raises FileNotFoundError if there is none and ValueError if it is damaged.
    """
    from safetensors.torch import load

    folder = Path(folder)
    paths = folder / f"{kind}.json", folder / f"{kind}.safetensors"
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no {kind} is saved in {folder}: {path.name} is missing")
    text, blob = (path.read_bytes() for path in paths)
    try:
        header = json.loads(text)
        written = header["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{paths[0]} is damaged ({error!r}): make the {kind} again") from None
    if written != hashlib.sha256(blob).hexdigest():
        raise ValueError(
            f"{paths[1]} is damaged: it is not the file that {paths[0].name} was saved with; "
            f"make the {kind} again"
        )
    return header, load(blob)


@dataclass(frozen=True)
class Parts:
    """Finished parts of a long computation in a folder: a run that was killed goes on from there.

    `run.json` says what is computed; a folder that holds another computation is refused.
    """

    folder: Path

    @classmethod
    def of(cls, folder: str | Path, pipe: Any, **settings: Any) -> "Parts":
        """The parts of the computation with `settings` (JSON values) on the pipeline `pipe`."""
        wanted, path = dataclasses.asdict(provenance(pipe, **settings)), Path(folder) / "run.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text())
                flat, asked = ({**run, **run["settings"]} for run in (found, wanted))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged ({error!r}): name an empty folder") from None
            other = sorted(k for k in flat.keys() | asked.keys() if flat.get(k) != asked.get(k))
            if other:
                raise ValueError(
                    f"{folder} holds another run, which differs in {', '.join(other)}: "
                    "name an empty folder, or repeat that run"
                )
        else:
            atomic_write(path, json.dumps(wanted, indent=1, sort_keys=True).encode())
        return cls(Path(folder))

    def read(self, number: int) -> Tensor | None:
        """Part `number`, or None if it is not finished."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self._path(number)
        if not path.is_file():
            return None
        try:
            return load(path.read_bytes())["part"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): delete it, and it is made again"
            ) from None

    def write(self, number: int, part: Tensor) -> None:
        """Keep a finished part."""
        from safetensors.torch import save

        atomic_write(self._path(number), save({"part": part.contiguous()}))

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"


def same(a: Any, b: Any) -> bool:
    """Equality that reaches into dataclasses, dicts and lists and compares tensors exactly."""
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
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
