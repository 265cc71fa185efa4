"""The command for a folder of pictures: what it holds, and what of it may go."""

import re
import time
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, BadParameter, Context, Option

import loco_core as loco

from .. import files
from . import options as o
from .command import register_as, show
from .report import Report

DAY = 24 * 3600
DAMAGED = "damaged"
KEY = re.compile(r"[0-9a-f]{64}")


def store(
    ctx: Context,
    folder: Annotated[Path, Argument(metavar="DIR", help="The folder of a store.")],
    prune: Annotated[
        bool, Option("--prune", help="Delete pictures: those of --model, --older-than, or both.")
    ] = False,
    model: Annotated[
        str | None,
        Option(help="Only of this model, as the list names it; damaged for files that are."),
    ] = None,
    older_than: Annotated[
        float | None, Option(metavar="DAYS", help="Only those written before; 0 is all.", min=0)
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only tell what would be deleted.")] = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """List the pictures that a store holds, or delete some of them.

    A store is a folder that a library call was given as folder=, or the .parts of a run. A picture
    that was deleted is painted again when it is asked for.
    """
    ctx.obj.debug = debug
    if prune and model is None and older_than is None:
        raise BadParameter("--prune needs --model or --older-than; --older-than 0 is all pictures")
    if not prune and (dry_run or model is not None or older_than is not None):
        raise BadParameter("--model, --older-than and --dry-run say what to --prune: add it")
    kept = loco.painting.Store(folder)
    listed, marked = _listed(kept)
    gone: list[Any] = []
    if prune:
        before = time.time() - DAY * (older_than or 0)
        with files.claimed(folder) if marked and not dry_run else nullcontext():
            gone = kept.prune(
                lambda entry: (
                    _is_key(entry)
                    and (model is None or _model(entry) == model)
                    and (older_than is None or entry.written <= before)
                ),
                dry_run,
            )
        paths = {entry.path for entry in gone}
        listed = listed if dry_run else [entry for entry in listed if entry.path not in paths]
    facts = {"store": str(folder), **_size(listed)}
    if prune:
        told = "would be deleted" if dry_run else "deleted"
        facts |= {told: len(gone), f"MB {told}": _size(gone)["MB"]}
    show(Report(facts, {"models": _by_model(listed)}), as_json)


def _listed(kept: Any) -> tuple[list[Any], bool]:
    """(the pictures of a store, whether it bears our mark); refuses what is no store."""
    folder = kept.folder
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: name the folder of a store")
    marked = (folder / files.MARK).is_file()
    listed = [entry for entry in kept.entries() if _is_key(entry)]
    ours = any(entry.facts.get("key") == entry.path.stem for entry in listed)
    if not (marked or ours):
        raise ValueError(
            f"{folder} is no store of pictures: name a folder that was given as folder=, or the "
            ".parts of a run that was not finished"
        )
    return listed, marked


def _is_key(entry: Any) -> bool:
    return KEY.fullmatch(entry.path.stem) is not None


def _model(entry: Any) -> str:
    return str(entry.facts.get("model", DAMAGED))


def _size(entries: Iterable[Any]) -> dict[str, Any]:
    sizes = [entry.bytes for entry in entries]
    return {"pictures": len(sizes), "MB": round(sum(sizes) / 1e6, 3)}


def _by_model(entries: Iterable[Any]) -> list[dict[str, Any]]:
    """A row per model."""
    found: dict[str, list[Any]] = {}
    for entry in entries:
        found.setdefault(_model(entry), []).append(entry)
    return [
        {
            "model": model,
            **_size(own),
            "prompts": len({entry.facts.get("prompt") for entry in own}),
            "first written": _told(min(entry.written for entry in own)),
            "last written": _told(max(entry.written for entry in own)),
        }
        for model, own in sorted(found.items())
    ]


def _told(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


register_as("store", store.__doc__, "loco store stars --prune --older-than 30 --dry-run")(store)
