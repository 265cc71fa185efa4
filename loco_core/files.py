"""Files and folders appear whole or not at all: the one writer of the house.

A file is written beside its place and renamed there. So is a result folder; the finished batches of
its run are kept in `<folder>.parts` until it is done. `.loco` marks a folder that we work in, and
`manifest.json` a result of ours: no other is ever deleted or replaced. Needs the standard library
alone.
"""

import errno
import json
import os
import re
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

__all__ = ["MANIFEST", "MARK", "atomic_write", "claimed", "is_ours", "mark", "new_folder",
           "remove_ours"]  # fmt: skip

MARK, MANIFEST = ".loco", "manifest.json"
#: What renaming a folder onto something that is there ends in.
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


def atomic_write(path: str | Path, data: bytes | Iterable[bytes]) -> None:
    """Write `data` to `path`, whole or not at all; missing folders are made.

    data: bytes, or pieces of them, which are made and written one by one. What a link points to is
    replaced, the link stays. Permissions are those of any new file (the umask).
    Raises OSError naming `path` if the disk is full or read-only; what was there before stays, as
    it does when the pieces raise an error or the process is killed.

        atomic_write("results/scores.json", b"{}")
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[-40:]}.{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            for piece in (data,) if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot save {path}: {error.strerror}; nothing was written, free the disk or name "
            "another folder",
        ) from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def mark(folder: str | Path, what: str = "") -> None:
    """Make a folder, if it is not there, and mark it as one that we may delete. what: it is for."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / MARK).write_text(what, encoding="utf-8")


def is_ours(folder: str | Path) -> bool:
    """Whether a folder bears our mark, or is a result: its manifest names a command of `loco`."""
    folder = Path(folder)
    if (folder / MARK).is_file():
        return True
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return isinstance(told, str) and told.startswith("loco ")


def remove_ours(folder: str | Path) -> None:
    """Delete a folder of ours with all that is in it. Raises ValueError for any other."""
    folder = Path(folder)
    if not is_ours(folder):
        raise ValueError(f"{folder} was not made by loco and is left alone: name another folder")
    for path in folder.iterdir():  # the marks last: what a kill leaves is still known
        if path.name not in (MARK, MANIFEST):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(folder)


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """`folder`, made and marked, for this process alone, until the block or the process ends.

    Raises ValueError if another process has it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = _lock(folder)
    if handle is None:
        raise ValueError(
            f"another run is at work in {folder}: wait until it is done, or name another folder"
        )
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def new_folder(
    out: str | Path, force: bool = False, resume: bool | None = None
) -> Iterator[tuple[Path, Path | None]]:
    """(a folder to fill, a folder for parts): the first becomes `out` when the block ends well.

    If it does not, also on Ctrl-C and SIGTERM, `out` is what it was and only the parts stay. What a
    link points to is filled, the link stays. force: replace `out`, which must be a result of ours.
    resume: whether to go on from parts; None for what has none.
    Raises ValueError for an `out` that is there and not empty, or parts that are, unless told how
    to go on; for folders that are not ours in any case; for parts that another run is at work in;
    and at the end for an `out` that appeared meanwhile, which is kept.

        with new_folder("found") as (folder, _):
            atomic_write(folder / "result.json", b"{}")
    """
    out = Path(os.path.realpath(out))
    parts = None if resume is None else out.with_name(f"{out.name}.parts")
    _check(out, parts, force, bool(resume))
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    new = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    with _ended_by_sigterm(), claimed(parts) if parts else nullcontext():
        if parts and not resume:
            _empty(parts)
        try:
            with claimed(new):
                yield new, parts
                _put(new, out, force)
        except BaseException:
            if parts and _empty(parts, only_look=True):
                remove_ours(parts)
            elif parts:
                print(
                    f"note: {parts} has the finished batches; the same command with --resume "
                    "goes on",
                    file=sys.stderr,
                )
            raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
        if parts:
            remove_ours(parts)


def _check(out: Path, parts: Path | None, force: bool, resume: bool) -> None:
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(out)!r} is not UTF-8 and cannot be recorded: rename it") from None
    if os.path.ismount(out):
        raise ValueError(f"{out} is a whole disk, which no folder replaces: name one in it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder for the results")
    if out.is_dir() and any(out.iterdir()):
        if not is_ours(out):
            raise ValueError(f"{out} is not empty and no result of loco: name another folder")
        if not force:
            raise ValueError(f"{out} has a result already: name another folder, or add --force")
    if parts and os.path.lexists(parts):
        if not parts.is_dir() or any(parts.iterdir()) and not is_ours(parts):
            raise ValueError(
                f"{parts} is where batches would be kept, and was not made by loco: name another "
                "folder"
            )
        if not (force or resume or _empty(parts, only_look=True)):
            raise ValueError(
                f"{parts} has the batches of a run that was not finished: add --resume to go on "
                "with it, or --force to begin again"
            )


def _put(new: Path, out: Path, force: bool) -> None:
    """`new` in the place of `out`, which is there until then and back if this fails.

    That `out` is empty, or ours, is asked of what has been renamed: nobody can come between.
    """
    old = new.with_name(f"{new.name}.old")
    if force and out.is_dir() and any(out.iterdir()):
        os.rename(out, old)
    try:
        if old.exists() and not is_ours(old):
            raise FileExistsError(errno.EEXIST, "no result of loco")
        os.rename(new, out)
    except BaseException as error:
        if old.exists():
            os.rename(old, out)
        if isinstance(error, OSError) and error.errno in _TAKEN:
            raise ValueError(
                f"{out} appeared while this ran, and is kept: name another folder"
            ) from None
        raise
    (out / MARK).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


def _empty(folder: Path, only_look: bool = False) -> bool:
    """Delete all but the mark; whether nothing else was there."""
    inside = [path for path in folder.iterdir() if path.name != MARK]
    for path in () if only_look else inside:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return not inside


def _sweep(out: Path) -> None:
    """Tidy up after runs for `out` that were killed; a result that one had put aside comes back."""
    name = re.compile(rf"(\.{re.escape(out.name)}\.[0-9a-f]{{8}})(?:\.old)?")
    found = filter(None, map(name.fullmatch, sorted(os.listdir(out.parent))))
    for new in {out.with_name(match[1]) for match in found}:
        old, handle = new.with_name(f"{new.name}.old"), None
        if new.exists():
            handle = _lock(new) if (new / MARK).is_file() else None
            if handle is None:
                continue  # another run is at work
            if old.exists() and not out.exists():
                os.rename(old, out)
            remove_ours(new)
        if out.exists() and is_ours(old):
            remove_ours(old)
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """A handle that holds the mark of a folder until it is closed; None if somebody else has it."""
    while True:
        handle = os.open(folder / MARK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:
            return handle  # a disk without locks
        with suppress(FileNotFoundError):  # deleted before it was locked: try the next one
            if os.path.samestat(os.fstat(handle), os.stat(folder / MARK)):
                return handle
        os.close(handle)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the program, as Ctrl-C does, where nobody has said otherwise."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
