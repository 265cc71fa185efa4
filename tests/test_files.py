"""Files and folders appear whole or not at all, and nobody else's is ever touched."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from loco_core import files
from loco_core.files import MANIFEST, MARK, atomic_write, claimed, new_folder, remove_ours

ROOT = Path(files.__file__).parents[1]
RESULT = json.dumps({"command": "loco generate mini-sd"})


def tree(folder):
    """Path -> content of all that lies below a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def python(code, *arguments, **options):
    """A process of its own that runs `code` with what it needs."""
    code = "import os, sys, time; from loco_core.files import *\n" + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def umask():
    """Set the umask of the process, for this test."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


# Files


@pytest.mark.parametrize("data", [b"whole", [b"wh", b"", b"ole"], (b for b in [b"whole"])],
                         ids=["bytes", "pieces", "generator"])  # fmt: skip
def test_a_file_is_written_with_its_folders(tmp_path, data):
    atomic_write(tmp_path / "a" / "b" / "file", data)
    assert tree(tmp_path / "a" / "b") == {"file": b"whole"}


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mask, mode):
    umask(mask)
    atomic_write(tmp_path / "new" / "file", b"x")
    with new_folder(tmp_path / "out") as (folder, _):
        pass
    assert (tmp_path / "new" / "file").stat().st_mode & 0o777 == mode
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    (tmp_path / "dangling").symlink_to(Path("far") / "new")
    atomic_write(tmp_path / "link", b"new")
    atomic_write(tmp_path / "dangling", b"made")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert tree(tmp_path / "far") == {"file": b"new", "new": b"made"}


def test_a_name_as_long_as_the_disk_allows_is_written(tmp_path):
    atomic_write(tmp_path / ("n" * 255), b"x")
    assert tree(tmp_path) == {"n" * 255: b"x"}


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot save .*file: No space left.*free the disk") as caught:
        atomic_write(tmp_path / "file", b"new")
    assert caught.value.errno == errno.ENOSPC and tree(tmp_path) == {"file": b"old"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_while_pieces_are_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(files, "open", lambda path, mode: open("/dev/full", "wb"), raising=False)
    with pytest.raises(OSError, match="cannot save .*file: No space left"):
        atomic_write(tmp_path / "file", (bytes(1 << 16) for _ in range(9)))
    assert tree(tmp_path) == {"file": b"old"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot save .*file/thing"):
        atomic_write(tmp_path / "file" / "thing", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="cannot save .*folder"):
        atomic_write(tmp_path / "folder", b"x")
    assert tree(tmp_path) == {"file": b"in the way", "folder": None}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_is_read_only_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot save .*thing: Permission denied"):
        atomic_write(tmp_path / "thing", b"x")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_pieces_that_fail_leave_the_old_file(tmp_path, error):
    def pieces():
        yield b"new"
        raise error

    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        atomic_write(tmp_path / "file", pieces())
    assert tree(tmp_path) == {"file": b"old"}


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    process = python(
        """
        def pieces():
            yield bytes(1 << 20)
            print("half", flush=True)
            time.sleep(60)
        atomic_write(sys.argv[1], pieces())
        """,
        tmp_path / "file",
    )
    assert process.stdout.readline() == "half\n"
    process.kill()
    process.wait()
    assert (tmp_path / "file").read_text() == "old"
    atomic_write(tmp_path / "file", b"next")
    assert (tmp_path / "file").read_text() == "next"


def test_a_reader_sees_one_of_two_writers_whole(tmp_path):
    code = """
    print("ready", flush=True)
    for _ in range(300):
        atomic_write(sys.argv[1], [sys.argv[2].encode() * 5000] * 3)
    """
    writers = [python(code, tmp_path / "file", letter) for letter in "ab"]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "file").exists():
            seen.add((tmp_path / "file").read_bytes())
    assert [writer.wait() for writer in writers] == [0, 0]
    seen.add((tmp_path / "file").read_bytes())
    assert seen <= {b"a" * 15000, b"b" * 15000} and len(list(tmp_path.iterdir())) == 1


def test_the_writer_needs_the_standard_library_alone():
    code = """
    from loco_core import files
    ours = {name.partition(".")[0] for name in sys.modules} - {"__main__", "__mp_main__"}
    print(*sorted(ours - set(sys.stdlib_module_names)))
    """
    process = python(code)
    found = set(process.communicate()[0].split())
    assert "torch" not in found and {"loco_core"} <= found
    assert not found & {"numpy", "safetensors", "typer", "diffusers", "transformers"}


# Folders


def test_a_folder_appears_whole_when_the_block_ends_well(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as (folder, parts):
        (folder / "result").write_text("x")
        assert parts is None and not (tmp_path / "deep" / "out").exists()
    assert tree(tmp_path / "deep") == {"out": None, "out/result": b"x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_that_fails_half_way_leaves_what_was_there(error, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text(RESULT)
    before = tree(tmp_path)
    with pytest.raises(error), new_folder(tmp_path / "out", force=True) as (new, _):
        (new / "half").write_text("of it")
        raise error
    assert tree(tmp_path) == before


def test_force_replaces_a_result_and_all_that_is_in_it(tmp_path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / MANIFEST).write_text(RESULT)
    with pytest.raises(ValueError, match="has a result already: .*--force"):
        new_folder(tmp_path / "out").__enter__()
    with new_folder(tmp_path / "out", force=True) as (folder, _):
        (folder / "new").touch()
    assert tree(tmp_path) == {"out": None, "out/new": b""}


FOREIGN = {
    "no manifest": {"thesis": "years"},
    "a web app": {MANIFEST: '{"name": "my web app"}', "thesis": "years"},
    "another command": {MANIFEST: '{"command": "locomotive"}'},
    "a list": {MANIFEST: '["command"]'},
    "no JSON": {MANIFEST: "{"},
    "deep JSON": {MANIFEST: "[" * 100000},
}


@pytest.mark.parametrize("inside", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("name", ["out", "out.parts"])
@pytest.mark.parametrize("force, resume", [(True, False), (False, True), (True, True)])
def test_nobody_elses_folder_is_touched(tmp_path, name, inside, force, resume):
    (tmp_path / name).mkdir()
    for file, text in inside.items():
        (tmp_path / name / file).write_text(text)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="no result of loco|not made by loco"):
        new_folder(tmp_path / "out", force, resume).__enter__()
    with pytest.raises(ValueError, match="not made by loco and is left alone"):
        remove_ours(tmp_path / name)
    assert tree(tmp_path) == before


def test_a_file_a_disk_and_a_name_that_cannot_be_recorded_are_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        new_folder(tmp_path / "file").__enter__()
    with pytest.raises(ValueError, match="is a whole disk"):
        new_folder(Path("/dev/shm" if os.path.ismount("/dev/shm") else "/")).__enter__()
    with pytest.raises(ValueError, match="not UTF-8"):
        new_folder(tmp_path / os.fsdecode(b"\xff")).__enter__()
    (tmp_path / "out.parts").touch()
    with pytest.raises(ValueError, match="not made by loco"):
        new_folder(tmp_path / "out", force=True, resume=False).__enter__()


def fill(folder):
    folder.mkdir(exist_ok=True)
    (folder / "thesis").write_text("years")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("appears", [fill, Path.touch, lambda out: out.symlink_to("/")],
                         ids=["folder", "file", "link"])  # fmt: skip
def test_what_appears_meanwhile_is_kept(tmp_path, force, appears):
    with (
        pytest.raises(ValueError, match="out appeared while this ran, and is kept"),
        new_folder(tmp_path / "out", force) as (folder, _),
    ):
        (folder / "new").touch()
        appears(tmp_path / "out")
        before = {k: v for k, v in tree(tmp_path).items() if not k.startswith(".")}
    assert tree(tmp_path) == before


def test_a_result_that_appears_meanwhile_is_replaced_by_force_alone(tmp_path):
    for force in (False, True):
        try:
            with new_folder(tmp_path / "out", force) as (folder, _):
                (folder / "mine").touch()
                with new_folder(tmp_path / "out", force) as (other, _):
                    (other / MANIFEST).write_text(RESULT)
        except ValueError:
            assert not force and tree(tmp_path / "out") == {MANIFEST: RESULT.encode()}
        else:
            assert force and tree(tmp_path) == {"out": None, "out/mine": b""}


def test_a_link_to_a_folder_elsewhere_is_filled(tmp_path):
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "disk" / "out")
    for content in ("first", "second"):
        with new_folder(tmp_path / "here" / "link", force=True, resume=False) as (folder, parts):
            (folder / MANIFEST).write_text(RESULT)
            (folder / "content").write_text(content)
            assert parts.parent == tmp_path / "disk"
        assert (tmp_path / "here" / "link").is_symlink()
        assert (tmp_path / "here" / "link" / "content").read_text() == content
    assert {p.name for p in tmp_path.rglob("*")} == {
        "disk",
        "out",
        "here",
        "link",
        "content",
        MANIFEST,
    }


def test_parts_stay_until_the_run_is_finished(tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), new_folder(out, resume=False) as (_, parts):
        raise KeyboardInterrupt
    assert tree(tmp_path) == {}  # nothing was finished
    with pytest.raises(KeyboardInterrupt), new_folder(out, resume=False) as (_, parts):
        (parts / "one").write_text("batch")
        raise KeyboardInterrupt
    assert "note: " in capsys.readouterr().err and (tmp_path / "out.parts" / "one").exists()
    with pytest.raises(ValueError, match="was not finished: add --resume .* or --force"):
        new_folder(out, resume=False).__enter__()
    with pytest.raises(KeyboardInterrupt), new_folder(out, resume=True) as (_, parts):
        assert (parts / "one").read_text() == "batch"
        raise KeyboardInterrupt
    with new_folder(out, force=True, resume=False) as (_, parts):
        assert not (parts / "one").exists()
    assert tree(tmp_path) == {"out": None}


def test_two_runs_do_not_share_their_parts(tmp_path):
    process = python(
        """
        with new_folder(sys.argv[1], resume=False) as (folder, parts):
            atomic_write(parts / "one", b"batch")
            print("working", flush=True)
            sys.stdin.readline()
        """,
        tmp_path / "out",
        stdin=subprocess.PIPE,
    )
    assert process.stdout.readline() == "working\n"
    before = tree(tmp_path)
    for force, resume in ((True, False), (False, True)):
        with pytest.raises(ValueError, match="another run is at work in .*out.parts: wait"):
            new_folder(tmp_path / "out", force, resume).__enter__()
    assert tree(tmp_path) == before
    process.communicate("\n")
    assert process.returncode == 0 and tree(tmp_path) == {"out": None}


WORK = """
with new_folder(sys.argv[1], force=True, resume=True) as (folder, parts):
    atomic_write(folder / "half", b"of it")
    atomic_write(parts / "one", b"batch")
    print("working", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_end_leaves_nothing_but_parts(tmp_path, number):
    def hears():
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = python(WORK, tmp_path / "out", stderr=subprocess.PIPE, preexec_fn=hears)
    assert process.stdout.readline() == "working\n"
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert "out.parts has the finished batches" in err
    assert tree(tmp_path) == {
        "out.parts": None,
        f"out.parts/{MARK}": b"",
        "out.parts/one": b"batch",
    }


def test_the_next_run_tidies_up_after_one_that_was_killed(tmp_path):
    (tmp_path / ".out.00000000").mkdir()  # looks like ours, and is not marked
    process = python(WORK, tmp_path / "out")
    assert process.stdout.readline() == "working\n"
    process.kill()
    process.wait()
    assert len(list(tmp_path.iterdir())) == 3
    with new_folder(tmp_path / "out", resume=True) as (folder, parts):
        assert (parts / "one").read_bytes() == b"batch" and not (folder / "half").exists()
        other = python("with new_folder(sys.argv[1]): pass", tmp_path / "out")
        assert other.wait() == 0 and folder.is_dir()  # a run that is alive is let be
        (tmp_path / "out").rmdir()
    assert tree(tmp_path) == {".out.00000000": None, "out": None}


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_while_a_result_is_replaced_loses_neither(tmp_path, renames):
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text(RESULT)
    process = python(
        """
        rename, left = os.rename, int(sys.argv[2])
        def last(a, b):
            global left
            rename(a, b)
            left -= 1
            left or os.kill(os.getpid(), 9)
        os.rename = last
        with new_folder(sys.argv[1], force=True) as (folder, _):
            atomic_write(folder / "manifest.json", b'{"command": "loco new"}')
        """,
        out,
        renames,
    )
    assert process.wait() == -9 and out.exists() == (renames == 2)
    with pytest.raises(ZeroDivisionError), new_folder(out, force=True):
        1 / 0  # noqa: B018
    kept = RESULT if renames == 1 else '{"command": "loco new"}'
    assert (out / MANIFEST).read_text() == kept and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_claim_is_for_one_and_ends_with_its_holder(tmp_path):
    process = python(
        """
        with claimed(sys.argv[1]):
            print("mine", flush=True)
            time.sleep(60)
        """,
        tmp_path / "store",
    )
    assert process.stdout.readline() == "mine\n"
    with pytest.raises(ValueError, match="another run is at work in .*store"):
        claimed(tmp_path / "store").__enter__()
    process.kill()
    process.wait()
    with claimed(tmp_path / "store"), pytest.raises(ValueError, match="another run"):
        claimed(tmp_path / "store").__enter__()


def test_only_a_marked_folder_is_removed_and_links_in_it_are_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("years")
    (tmp_path / "work" / "deep").mkdir(parents=True)
    (tmp_path / "work" / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="left alone"):
        remove_ours(tmp_path / "work")
    files.mark(tmp_path / "work", "a test")
    remove_ours(tmp_path / "work")
    assert tree(tmp_path) == {"mine": None, "mine/thesis": b"years"}
