"""Result folders: there is a whole one, or none.

A folder is filled beside its place and put there at the end. Finished batches of a long run are
kept beside it, in `<folder>.parts`, until the run is finished. `manifest.json` says how a folder
was made, and that it is one of ours: no other is ever replaced.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"


@contextmanager
def new_folder(
    out: Path, force: bool = False, resume: bool | None = None
) -> Iterator[tuple[Path, Path | None]]:
    """(a folder to fill, a folder for parts): the first becomes `out` when the block ends well.

    If it does not, also on Ctrl-C, `out` is what it was and only the parts stay. force: replace
    `out`. resume: whether to go on from parts; None for what has none.
    Raises ValueError for an `out` that is there and not empty, or parts that are, unless told how
    to go on.
    """
    parts = None if resume is None else out.with_name(f"{out.name}.parts")
    _check(out, parts, force, bool(resume))
    out.parent.mkdir(parents=True, exist_ok=True)
    if parts and parts.exists() and not resume:
        shutil.rmtree(parts)
    new = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield new, parts
        new.chmod(0o755)
        _put(new, out)
    except BaseException:
        if parts and parts.exists():
            print(
                f"note: {parts} has the finished batches; the same command with --resume goes on",
                file=sys.stderr,
            )
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if parts:
        shutil.rmtree(parts, ignore_errors=True)


def _check(out: Path, parts: Path | None, force: bool, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder for the results")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MANIFEST).is_file():
            raise ValueError(f"{out} is not empty and no result of loco: name another folder")
        if not force:
            raise ValueError(f"{out} has a result already: name another folder, or add --force")
    if parts and parts.exists() and not (force or resume):
        raise ValueError(
            f"{parts} has the batches of a run that was not finished: add --resume to go on with "
            "it, or --force to begin again"
        )


def _put(new: Path, out: Path) -> None:
    """`new` in the place of `out`, which is there until then and back if this fails."""
    old = new.with_name(f"{new.name}.old")
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(new, out)
    except BaseException:
        if old.exists():
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
