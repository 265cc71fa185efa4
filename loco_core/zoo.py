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
from typing import Any

import torch
from torch import nn

from . import _progress, records

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SHARED = "shared"
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
) -> Any:
    """A diffusers pipeline, nothing wrapped: a mini by name, a folder, or a Hub id "owner/name".

    Only a Hub id downloads anything; revision and variant ("fp16") are as diffusers takes them.
    device None stays on the CPU; dtype None is float32. The safety checker is left out.
    Raises ValueError on an unknown name (the minis are listed), a missing component, a damaged
    safetensors file and weights that are not finite.

        pipe = loco.load("mini-sd")
    """
    folder = folder_of(name)
    dtype = torch.float32 if dtype is None else dtype
    with quiet_loading(local=folder is not None):
        from diffusers import DiffusionPipeline

        options = {"dtype": dtype, "variant": variant}
        if folder is None:
            options["revision"] = revision
            index = DiffusionPipeline.load_config(str(name), revision=revision)
        else:
            if revision is not None:
                raise ValueError(f"revision {revision!r} is for Hub ids; {name} is a local folder")
            index = _index(folder)
            options |= _shared_components(folder, index, dtype)
            check_files(folder)
        if "safety_checker" in index:
            options |= {"safety_checker": None, "requires_safety_checker": False}
            if not _is_there(folder, "feature_extractor"):
                options["feature_extractor"] = None
        pipe = DiffusionPipeline.from_pretrained(str(folder or name), **options)
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
    try:
        return json.loads((folder / "model_index.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'model_index.json'} is damaged: {error}") from None


def _is_there(folder: Path | None, component: str) -> bool:
    return folder is None or (folder / component).is_dir()


def _shared_components(folder: Path, index: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Components listed in `index` that lie not in `folder` but beside it: in the folder that the
    index names under "_shared_from", such as another mini, or in `shared/`."""
    found = {}
    for component, entry in index.items():
        listed = isinstance(entry, list) and entry[0] is not None
        optional = component in ("safety_checker", "feature_extractor", "image_encoder")
        if not listed or optional or (folder / component).is_dir():
            continue
        homes = dict.fromkeys((index.get("_shared_from", SHARED), SHARED))
        places = [folder.parent / home / component for home in homes]
        home = next((place for place in places if place.is_dir()), None)
        if home is None:
            raise ValueError(
                f"{folder} lacks its component {component!r}, and {places[0]} "
                "does not exist: restore the folder"
            )
        check_files(home)
        library, class_name = entry
        kind = getattr(importlib.import_module(library), class_name)
        found[component] = (
            kind.from_pretrained(home, dtype=dtype)
            if issubclass(kind, nn.Module)
            else kind.from_pretrained(home)
        )
    return found


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
                if not bool(weight.detach().isfinite().all()):
                    raise ValueError(
                        f"{name} has a weight that is not finite: {component}, {key}; "
                        "restore the file"
                    )


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
