"""Models by name: the minis that come with the library, a folder, or a Hub id.

A mini is a plain diffusers folder below `checkpoints/`. Components that several minis have in
common are stored once, in the folder that the mini's index names (or `shared/`), and are filled in
from there.
"""

import importlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from . import _progress, records

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SHARED = "shared"
LIBRARIES = ("diffusers", "transformers")
_PICKLED = (
    "has pickled weights alone (.bin), which can run code when they are read: save them as "
    "safetensors with pipe.save_pretrained, or pass allow_pickle=True if you trust them"
)
#: What damaged files end in.
_DAMAGE = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError,
           UnpicklingError)  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def minis() -> tuple[str, ...]:
    """Names of the models that come with the library."""
    return tuple(sorted(path.parent.name for path in CHECKPOINTS.glob("*/model_index.json")))


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> Any:
    """A diffusers pipeline, nothing wrapped: a mini by name, a folder, or a Hub id "owner/name".

    Only a Hub id downloads anything; revision and variant ("fp16") are as diffusers takes them.
    device None stays on the CPU; dtype None is float32. The safety checker is left out. Weights are
    read from safetensors; allow_pickle=True takes pickled ones (`.bin`) where there are no others.
    Raises ValueError on an unknown name (the minis are listed), a missing component, a damaged
    file, weights that are missing, pickled or not finite, and a part whose code is not that of
    diffusers or transformers.

        pipe = loco.load("mini-sd")
    """
    folder = folder_of(name)
    dtype = torch.float32 if dtype is None else dtype
    with quiet_loading(local=folder is not None):
        from diffusers import DiffusionPipeline

        options = {"dtype": dtype, "variant": variant, "use_safetensors": not allow_pickle or None}
        if folder is None:
            options["revision"] = revision
            index = DiffusionPipeline.load_config(str(name), revision=revision)
        else:
            if revision is not None:
                raise ValueError(f"revision {revision!r} is for Hub ids; {name} is a local folder")
            index = _index(folder)
            options |= _components(folder, index, dtype, variant, allow_pickle)
        if "safety_checker" in index:
            options |= {"safety_checker": None, "requires_safety_checker": False}
            if not _is_there(folder, "feature_extractor"):
                options["feature_extractor"] = None
        try:
            pipe = DiffusionPipeline.from_pretrained(str(folder or name), **options)
        except OSError as error:
            if allow_pickle or "safetensors" not in str(error):
                raise
            raise ValueError(f"{name} {_PICKLED}") from error
    check_finite(pipe.components, name)
    pipe = pipe if device is None else pipe.to(device)
    called = str(name) if folder is None else Path(os.path.abspath(folder)).name
    home = None if folder is None else folder.resolve()
    records.remember(pipe, records.Source(called, home, pipe.device, dtype, revision, variant))
    return pipe


def folder_of(name: str | Path) -> Path | None:
    """The local folder that `name` means, or None for a Hub id."""
    path = Path(name).expanduser()
    for folder in (CHECKPOINTS / path, path):
        if (folder / "model_index.json").is_file():
            return folder
    if not path.exists() and _HUB_ID.fullmatch(str(name)) and not str(name).startswith("."):
        return None
    reason = "a folder without model_index.json" if path.is_dir() else "unknown"
    raise ValueError(
        f"model {str(name)!r} is {reason}: pass a mini ({', '.join(minis()) or 'none is here'}), "
        'the folder of a diffusers pipeline, or a Hub id "owner/name"'
    )


def _index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(index, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(index).__name__}")
    for name, entry in index.items():
        names = isinstance(entry, list) and all(isinstance(x, str | None) for x in entry)
        if isinstance(entry, list) and not (names and len(entry) == 2):
            raise ValueError(f"{path} is damaged: {name} is {str(entry)[:60]}")
    return index


def _is_there(folder: Path | None, component: str) -> bool:
    return folder is None or (folder / component).is_dir()


def _components(
    folder: Path, index: dict[str, Any], dtype: torch.dtype, variant: str | None, allow_pickle: bool
) -> dict[str, Any]:
    """The networks listed in `index`, and all else that lies not in `folder` but beside it."""
    found = {}
    for component, entry in index.items():
        optional = component in ("safety_checker", "feature_extractor", "image_encoder")
        if not isinstance(entry, list) or None in entry or optional:
            continue
        home = folder / component
        if not (own := home.is_dir()):
            home = _shared(folder, component, index.get("_shared_from", SHARED))
        if own and entry[0] not in LIBRARIES:
            continue  # diffusers knows it, or refuses to run its code
        kind = _class(folder, component, *entry)
        if issubclass(kind, nn.Module):
            found[component] = _network(kind, home, dtype, variant, allow_pickle)
        elif not own:
            found[component] = kind.from_pretrained(home)
    return found


def _shared(folder: Path, component: str, home: str) -> Path:
    """Where a component is that lies beside `folder`: in the folder that its index names, such as
    another mini, or in `shared/`."""
    if not isinstance(home, str) or Path(home).name != home or home in ("", ".."):
        raise ValueError(
            f"{folder / 'model_index.json'} takes parts from {home!r}: name a folder beside it"
        )
    places = [folder.parent / name / component for name in dict.fromkeys((home, SHARED))]
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(
        f"{folder} lacks its component {component!r}, and {places[0]} does not exist: "
        "restore the folder"
    )


def _class(folder: Path, component: str, library: str, name: str) -> Any:
    """The class of a component; no code is imported but that of the libraries."""
    path = folder / "model_index.json"
    if library not in LIBRARIES:
        raise ValueError(
            f"{path} takes the code of {component} from {library!r}: only parts of "
            f"{' and '.join(LIBRARIES)} are loaded"
        )
    kind = getattr(importlib.import_module(library), name, None)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        raise ValueError(f"{path} is damaged: {library} has no {name}, which {component} should be")
    return kind


def _network(
    kind: Any, home: Path, dtype: torch.dtype, variant: str | None, allow_pickle: bool
) -> nn.Module:
    """A network with all its weights from the folder `home`."""
    check_files(home)
    options = {"dtype": dtype, "variant": _variant(home, variant, allow_pickle)}
    options |= {"use_safetensors": not allow_pickle or None, "output_loading_info": True}
    try:
        network, told = kind.from_pretrained(home, **options)
    except _DAMAGE as error:
        raise ValueError(f"{home} is damaged ({error}): restore its files") from error
    if missing := sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]])):
        raise ValueError(
            f"{home} lacks {len(missing)} of its weights, which would be random, such as "
            f"{missing[0]}: restore its files"
        )
    return network


def _variant(home: Path, variant: str | None, allow_pickle: bool) -> str | None:
    """The variant to load: the one asked for, or None where `home` has no files of it."""
    files = sorted(path.name for path in home.iterdir() if path.is_file())
    pickled = [name for name in files if name.endswith(".bin")]
    files = [name for name in files if name.endswith(".safetensors")]
    known = files + pickled * allow_pickle
    if variant and any(f".{variant}." in name or f".{variant}-" in name for name in known):
        return variant
    if any(name.count(".") == 1 for name in known):
        return None
    if files:
        there = sorted({name.split(".")[1].partition("-")[0] for name in files})
        raise ValueError(f"{home} has weights of a variant alone: pass variant={there[0]!r}")
    raise ValueError(f"{home} {_PICKLED if pickled else 'has no weights: restore its files'}")


def check_files(folder: Path) -> None:
    """Refuse a safetensors file that is cut off or not one."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): restore the file") from None


def check_finite(components: Mapping[str, Any], name: str | Path) -> None:
    """Refuse weights that are infinite or no number."""
    for component, module in components.items():
        if isinstance(module, nn.Module):
            for key, weight in module.named_parameters():
                if not _is_finite(weight.detach()):
                    raise ValueError(
                        f"{name} has a weight that is not finite: {component}, {key}; "
                        "restore the file"
                    )


def _is_finite(weight: Tensor) -> bool:
    if not weight.is_floating_point() or not weight.numel() or weight.dtype.itemsize < 2:
        return True
    # the ends of a range that holds NaN are NaN: read once, and nothing is made
    return weight.device.type != "meta" and all(end.isfinite() for end in torch.aminmax(weight))


@contextmanager
def quiet_loading(local: bool) -> Iterator[None]:
    """Silence the loaders' bars, for a local folder always, else by the house's switch, and the
    note that torchvision is missing, which nothing here needs."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    noisy = [
        x
        for x in (diffusers_logging, transformers_logging)
        if (local or not _progress.shown()) and x.is_progress_bar_enabled()
    ]
    importer = logging.getLogger("transformers.utils.import_utils")
    importer.addFilter(_needs_no_torchvision)
    for x in noisy:
        x.disable_progress_bar()
    try:
        yield
    finally:
        importer.removeFilter(_needs_no_torchvision)
        for x in noisy:
            x.enable_progress_bar()


def _needs_no_torchvision(record: logging.LogRecord) -> bool:
    return "torchvision" not in record.getMessage()
