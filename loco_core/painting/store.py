"""A folder of pictures, each under a key that holds everything it depends on.

    key = SHA-256 of (state of the model, sampling, picture)

A picture is a PNG file, whole or not there. Any number of runs and processes may share a folder: a
run that was killed goes on, a larger one paints what is missing, a finished one paints nothing. How
many pictures were painted at a time is no part of what a picture is.
"""

import hashlib
import io
import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .. import files
from .picture import Picture, Sampling

__all__ = ["Entry", "Store"]

FORMAT = 1
CHUNK = "loco"  # the PNG text that says what the picture is


@dataclass(frozen=True)
class Entry:
    """One file of a store. facts: what is painted there and how; see `Store.write`."""

    path: Path
    bytes: int
    written: float
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Store:
    """Pictures in a folder. tag: what hooks of others on the pipeline do, in the user's words.

    Store("pictures") ; loco.generate(pipe, ["a star"], folder=Store("pictures", tag="my hook"))
    """

    folder: Path
    tag: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder).absolute())
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file: name a folder for the pictures")

    @classmethod
    def of(cls, folder: "str | Path | Store | None") -> "Store | None":
        """The store that `folder` means."""
        return folder if isinstance(folder, Store | None) else cls(Path(folder))

    @classmethod
    def temporary(cls) -> "Store":
        """A store that is gone when nobody holds it any more."""
        store = cls(Path(tempfile.mkdtemp(prefix="loco-pictures-")))
        weakref.finalize(store, shutil.rmtree, store.folder, ignore_errors=True)
        return store

    def key(self, state: str, sampling: Sampling, picture: Picture) -> str:
        """The key of a picture. state: the digest of the model's state, see `sealed`."""
        text = json.dumps([FORMAT, state, sampling.to_json(), picture.to_json()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, key: str) -> Path:
        """Where the picture with this key is, or would be."""
        return self.folder / key[:2] / f"{key}.png"

    def has(self, key: str) -> bool:
        """Whether the picture with this key is painted."""
        return self.path(key).is_file()

    def read(self, key: str) -> Tensor:
        """The picture with this key, [3, H, W] uint8. Raises ValueError for a damaged file."""
        path = self.path(key)
        pixels, facts = _read(path)
        if facts.get("key") != key:
            raise ValueError(f"{path} is damaged (it is another picture): delete it")
        return pixels

    def facts(self, key: str) -> Mapping[str, Any]:
        """What is known of the picture with this key; its pixels are not read."""
        path = self.path(key)
        try:
            with Image.open(path) as image:
                return json.loads(image.info[CHUNK])
        except FileNotFoundError:
            raise
        except _DAMAGE as error:
            raise _damaged(path, error) from None

    def write(self, key: str, pixels: Tensor, **facts: Any) -> None:
        """Keep a picture, [3, H, W] uint8, with facts (JSON) for whoever looks into the file."""
        if not self.folder.is_dir():
            files.mark(self.folder, "store")
        array = pixels.permute(1, 2, 0).contiguous().numpy()
        told = PngImagePlugin.PngInfo()
        whole = {"key": key, "pixels": _seal(array), **facts}
        told.add_itxt(CHUNK, json.dumps(whole, ensure_ascii=False, sort_keys=True))
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG", pnginfo=told, compress_level=1)
        files.atomic_write(self.path(key), buffer.getvalue())

    def entries(self) -> Iterator[Entry]:
        """Every picture of the store, the oldest first. A damaged file has no facts; one that lies
        where no picture of ours would is none."""
        own = (path for path in self.folder.glob("??/*.png") if path == self.path(path.stem))
        found = [(path.stat().st_mtime, path) for path in own]
        for written, path in sorted(found):
            try:
                facts = self.facts(path.stem)
            except ValueError:
                facts = {}
            yield Entry(path, path.stat().st_size, written, facts)

    def prune(self, unwanted: Callable[[Entry], bool], dry: bool = False) -> list[Entry]:
        """Delete the entries that are unwanted, and files that killed writers left. dry: only tell.

        Store("pictures").prune(lambda entry: entry.facts.get("model") != "mini-sd")
        """
        gone = [entry for entry in self.entries() if unwanted(entry)]
        if not dry:
            for entry in gone:
                entry.path.unlink(missing_ok=True)
            hour_ago = time.time() - 3600  # a younger one may still be written
            for left in self.folder.glob("??/.*.png.*"):
                if left.stat().st_mtime < hour_ago:
                    left.unlink(missing_ok=True)
        return gone


def sealed(state: Mapping[str, Any]) -> str:
    """The digest of a model's state."""
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()


#: What a damaged file ends in, before it is called one.
_DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, SyntaxError, EOFError, OSError,
    UnidentifiedImageError, Image.DecompressionBombError,
)  # fmt: skip


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({error}): delete it, and it is painted again")


def _read(path: Path) -> tuple[Tensor, dict[str, Any]]:
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            array = np.array(image)
            facts = json.loads(image.text[CHUNK])  # type: ignore[attr-defined]
        if array.ndim != 3 or facts["pixels"] != _seal(array):
            raise ValueError("its pixels do not match their checksum")
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    return torch.from_numpy(array).permute(2, 0, 1).contiguous(), facts


def _seal(array: Any) -> str:
    told = f"{array.dtype} {array.shape}\n".encode()
    return hashlib.sha256(told + array.tobytes()).hexdigest()
