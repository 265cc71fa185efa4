"""A world whose answers are known, and how a model that was trained in one is told.

A checkpoint says in `truth.json` which world it was trained in, what was planted in it, and the
fingerprint of its denoiser. Whoever has those weights is that model, wherever it lies and whatever
its folder is called; whoever has others is not.
"""

import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..concepts import Concept
from ..digests import fingerprint, weights
from ..edits.stack import entries, original
from ..families import family_of
from ..judging.judge import Judge
from ..judging.probes import Probe
from ..records import source_of
from ..zoo import CHECKPOINTS
from .shapeland.world import Shapeland

__all__ = ["WORLDS", "World", "identity", "world_of"]

TRUTH = "truth.json"


class World(Protocol):
    """What a world offers, for one model that was trained in it.

    name: of the world. model: as its truth file calls it. attributes: attribute -> its values.
    truth: attribute -> the text layers it was planted in, empty for a model that nobody planted.
    pooled_truth: the attributes that were planted in the pooled path alone. caption: attributes ->
    a prompt.
    """

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def attributes(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def truth(self) -> Mapping[str, Sequence[int]]: ...
    @property
    def pooled_truth(self) -> tuple[str, ...]: ...
    @property
    def caption(self) -> Callable[..., str]: ...
    @property
    def judge(self) -> Judge:
        """Names what the world's pictures show."""
        ...

    def concept(self, kind: str, name: str, prompts: int = 4) -> Concept:
        """The concept `name`, a value of the attribute `kind`, with so many prompts."""
        ...

    def probes(self, kind: str, name: str, *, exclude: Iterable[str] = ()) -> tuple[Probe, ...]:
        """What is asked of an edit of that concept; none of the prompts in `exclude`."""
        ...


#: Makers of a world for one model, from its truth file, by the world's name.
WORLDS: dict[str, Callable[[Mapping[str, Any]], World]] = {Shapeland.name: Shapeland.of}

_KNOWN: MutableMapping[Any, tuple[weakref.ref[nn.Module], World]] = weakref.WeakKeyDictionary()


def world_of(pipe: Any) -> World | None:
    """The world that the model in `pipe` was trained in, or None.

    A pipeline that was recognised stays in its world while its weights are edited, until another
    denoiser is put into it. One that is edited already is known by the weights below the edits.
    Raises ValueError for a damaged `truth.json` in the folder that `loco.load` read, TypeError for
    a pipeline that no family knows.

        world_of(loco.load("mini-sd")).truth["style"]  # [8, 9]
    """
    denoiser = family_of(pipe).denoiser
    if (known := _KNOWN.get(pipe)) and known[0]() is denoiser:
        return known[1]
    size = sum(x.numel() for x in denoiser.parameters())
    claims = [record for record in _records(pipe) if record.get("weights") == size]
    mark = fingerprint(_unedited(denoiser)) if claims else None
    for record in claims:
        if mark in (record.get("fingerprint"), record.get("fingerprint in bfloat16")):
            world = WORLDS[record["world"]](record)
            _KNOWN[pipe] = weakref.ref(denoiser), world
            return world
    return None


def identity(denoiser: nn.Module) -> dict[str, Any]:
    """What a truth file says of the weights of a denoiser, by which it is told later.

    The fingerprint is that of a load in float16, float32 or float64; one in bfloat16 has its own.
    """
    rounded = ((name, x.detach().to(torch.bfloat16)) for name, x in weights(denoiser))
    return {
        "weights": sum(x.numel() for x in denoiser.parameters()),
        "fingerprint": fingerprint(denoiser),
        "fingerprint in bfloat16": fingerprint(rounded),
    }


def _records(pipe: Any) -> Iterator[Mapping[str, Any]]:
    """Truth files: of the folder that the pipeline was loaded from, and those that are shipped."""
    source = source_of(pipe)
    own = source.folder / TRUTH if source and source.folder else None
    for path in [own, *sorted(CHECKPOINTS.glob(f"*/{TRUTH}"))]:
        if path is not None and path.is_file():
            record = _read(path)
            if record.get("world") in WORLDS:
                yield record


def _read(path: Path) -> Mapping[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("world") in WORLDS:
            WORLDS[record["world"]](record)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): restore the file, or remove it") from None
    return record if isinstance(record, dict) else {}


def _unedited(denoiser: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights below the edits that are applied now."""
    originals = {
        f"{path}.weight": original(module)
        for path, module in denoiser.named_modules()
        if entries(module)
    }
    for name, x in weights(denoiser):
        yield name, originals.get(name, x)
