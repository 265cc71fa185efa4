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
from collections.abc import Mapping
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

    records.provenance(pipe, prompts=["a star"], seeds=[0], steps=25).fingerprint
    """
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
    return Provenance(
        model=model_name(pipe),
        revision=revision(pipe),
        fingerprint=fingerprint(nn.ModuleDict(parts)),
        settings=json.loads(json.dumps(settings)),
        versions=versions(),
    )


def model_name(pipe: Any) -> str:
    """The Hub id of a pipeline, or the last part of the folder it was loaded from."""
    source = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    return Path(source).name if Path(source).is_dir() else source


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


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """16 hex digits that tell one set of weights from another.

    Over names, shapes and the exact sum of the bits of the weights rounded to float16: the same
    whether the model was loaded in float16, float32 or float64, on a CPU or a GPU.
    """
    sums = {
        name: (list(x.shape), x.detach().to(torch.float16).view(torch.int16).sum(dtype=torch.int64))
        for name, x in module.state_dict().items()
        if x.is_floating_point()
    }
    text = json.dumps([[name, shape, int(total)] for name, (shape, total) in sorted(sums.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
