"""An engine does what the builtin `map` does, elsewhere: all of it, in order; it leaves nothing."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path

import psutil
import pytest
from conftest import build_tiny_sd

from loco_core.painting import Picture, Sampling, engines, paint
from loco_core.painting.engines import engine

ROOT = Path(__file__).resolve().parent.parent


def work(folder: Path, item: int) -> tuple[int, int]:
    """Write what belongs to `item`, whole or not at all, and say who did it."""
    time.sleep(0.05)
    new = folder / f".{item}.{os.getpid()}"
    new.write_bytes(hashlib.sha256(str(item).encode()).digest() * 100)
    new.rename(folder / str(item))
    return item, os.getpid()


def deadly(folder: Path, worst: int, item: int) -> tuple[int, int]:
    if item == worst:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(folder, item)


def faulty(folder: Path, wrong: set[int], item: int) -> tuple[int, int]:
    if item in wrong:
        raise ValueError(f"{item} is wrong")
    return work(folder, item)


def surroundings(item: int) -> tuple[dict[str, str | None], int, list[str]]:
    """The environment a worker has, its threads of torch, and where it can be reached."""
    import torch

    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    return {name: os.environ.get(name) for name in names}, torch.get_num_threads(), heard()


def heard() -> list[str]:
    """The addresses at which this process listens."""
    return [c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"]


def processes() -> set[int]:
    """Our child processes, without the one Python keeps to clean up after the others."""
    children = psutil.Process().children(recursive=True)
    return {p.pid for p in children if not any("resource_tracker" in c for c in p.cmdline())}


def variables() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


@pytest.fixture
def undisturbed(tmp_path) -> dict[str, bytes]:
    """What the builtin makes of 20 items."""
    (folder := tmp_path / "undisturbed").mkdir()
    list(map(partial(work, folder), range(20)))
    return contents(folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    (folder := tmp_path / "folder").mkdir()
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No process, no setting and no variable of an engine outlives it, however it ended."""
    before = processes(), variables()
    yield
    assert (processes(), variables()) == before


def test_without_a_word_it_is_the_builtin():
    with engine(None) as mapped:
        assert mapped is map


def test_two_processes_give_the_results_of_the_builtin_in_its_order(folder, undisturbed):
    with engine("local:2") as mapped:
        results = list(mapped(partial(work, folder), range(20)))
        again = list(mapped(abs, [-1, -1, 2]))  # an item may come twice, an engine be used twice
        assert list(mapped(abs, [])) == []
    assert [item for item, _ in results] == list(range(20)) and again == [1, 1, 2]
    workers = {process for _, process in results}
    assert len(workers) == 2 and os.getpid() not in workers
    assert contents(folder) == undisturbed


def test_results_come_while_the_rest_is_done_and_no_more_is_asked_for_than_fits_ahead(monkeypatch):
    monkeypatch.setattr(engines, "AHEAD", 8)
    asked = []
    with engine("local:1") as mapped:
        endless = mapped(abs, (asked.append(i) or -i for i in count()))
        assert asked == []
        assert list(islice(endless, 10)) == list(range(10))
        assert len(asked) <= 10 + 8
        endless.close()
        assert list(mapped(abs, [-3])) == [3]
    with pytest.raises(RuntimeError, match="engine 'local:1' is closed: use its map inside"):
        next(mapped(abs, [1]))


def test_a_lost_worker_s_items_are_done_by_another(folder, undisturbed):
    with engine("local:2") as mapped:
        results = mapped(partial(work, folder), range(20))
        done = list(islice(results, 5))
        os.kill(done[-1][1], signal.SIGKILL)
        done += results
    assert [item for item, _ in done] == list(range(20))
    assert contents(folder) == undisturbed


def test_an_item_that_kills_its_worker_is_named_and_the_rest_is_done(folder, undisturbed, capfd):
    got = []
    with engine("local:2") as mapped:
        with pytest.raises(RuntimeError) as error:
            got.extend(mapped(partial(deadly, folder, 4), range(20)))
    assert str(error.value).startswith("1 of 20 items failed, the others are done")
    assert "\n  4: RuntimeError: its process died at every try" in str(error.value)
    del undisturbed["4"]
    assert contents(folder) == undisturbed
    assert [item for item, _ in got] == [0, 1, 2, 3]  # and none that stands at another's place
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_items_that_share_a_worker_with_a_deadly_one_are_not_blamed(folder):
    with engine("local:1") as mapped:  # one worker: few items are all handed to it at once
        with pytest.raises(RuntimeError, match=r"1 of 3 items failed(?s:.)*\n  0: RuntimeError"):
            list(mapped(partial(deadly, folder, 0), range(3)))
    assert set(contents(folder)) == {"1", "2"}


def test_items_that_raise_are_named_together_at_the_end(folder, undisturbed):
    with engine("local:2") as mapped:
        with pytest.raises(RuntimeError) as error:
            list(mapped(partial(faulty, folder, {3, 11}), range(20)))
    head, *lines = str(error.value).split("\n  ")
    assert head.startswith("2 of 20 items failed")
    assert lines == ["3: ValueError: 3 is wrong", "11: ValueError: 11 is wrong"]
    assert repr(error.value.__cause__) == "ValueError('3 is wrong')"
    assert contents(folder) == {k: v for k, v in undisturbed.items() if k not in ("3", "11")}


def test_a_long_list_of_failures_is_cut():
    failed = [("x" * 1000, ValueError("y" * 1000))] * 14
    lines = engines._told(failed, 20).split("\n  ")
    assert len(lines) == 1 + 10 + 1 and lines[-1] == "and 4 more"
    assert max(map(len, lines)) < 450


def test_what_the_caller_raises_comes_through_and_cancels_the_rest(folder):
    with pytest.raises(ZeroDivisionError):
        with engine("local:2") as mapped:
            for item, _ in mapped(partial(work, folder), range(500)):
                1 / (3 - item)
    assert len(contents(folder)) < 400


def test_workers_have_one_thread_and_are_heard_on_this_machine_only(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with engine("local:1") as mapped:
        ((variables, threads, addresses),) = mapped(surroundings, [0])
        assert set(addresses) == set(heard()) == {"127.0.0.1"}
    assert variables["OMP_NUM_THREADS"] == "1" and threads == 1


def test_a_process_sees_one_gpu_and_those_the_user_hid_stay_hidden(monkeypatch):
    monkeypatch.setattr(engines.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    seen = [{"CUDA_VISIBLE_DEVICES": n} for n in "53535"]
    assert engines._read("local") == engines._read("local:gpus") == (seen[:2], None)
    assert engines._read("local:1") == (seen[:1], None)
    assert engines._read("local:5") == (seen, None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in engines._read("local")[0]] == ["0", "1"]


def test_the_variable_of_the_gpu_reaches_the_process(monkeypatch):
    monkeypatch.setattr(engines, "_gpus", lambda: ["7"])
    with engine("local") as mapped:
        ((variables, *_),) = mapped(surroundings, [0])
    assert variables["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline that another process can load."""
    import loco_core as loco

    folder = tmp_path_factory.mktemp("model")
    build_tiny_sd().save_pretrained(folder)
    return loco.load(folder)


def pictures_in(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.glob("**/*.png")}


PICTURES = [Picture(f"a {thing}", seed) for thing in ("star", "house") for seed in range(10)]


def test_a_list_is_painted_to_the_last_byte_though_a_painter_is_killed(saved, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    settings = Sampling(steps=2)
    alone = list(paint(saved, PICTURES, settings, store=here, batch_size=2))
    with engine("local:2") as mapped:
        ((victim, *_),) = [processes()]
        painted = paint(saved, PICTURES, settings, store=there, batch_size=2, map=mapped)
        together = list(islice(painted, 4))
        os.kill(victim, signal.SIGKILL)
        together += painted
        assert all(x.equal(y) for x, y in zip(alone, together, strict=True))
        assert pictures_in(here) == pictures_in(there) and len(pictures_in(there)) == 20

        times = {path: path.stat().st_mtime_ns for path in there.glob("**/*.png")}
        again = list(paint(saved, PICTURES, settings, store=there, map=_unasked))
        assert all(x.equal(y) for x, y in zip(alone, again, strict=True))
        more = [*PICTURES, Picture("a dog")]
        asked = []
        list(paint(saved, more, settings, store=there, map=_noting(asked, mapped)))
        assert asked == [[Picture("a dog")]]
    assert {p: p.stat().st_mtime_ns for p in times} == times and len(pictures_in(there)) == 21


def _unasked(function, items):
    raise AssertionError("a picture that is there was painted again")


def _noting(asked, mapped):
    def noting(function, items):
        asked.extend(items)
        return mapped(function, items)

    return noting


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("", "'' is no word"),
        (2, "engine 2 is no word"),
        (True, "engine True is no word"),
        ("local:0", "'local:0' does not say how many processes"),
        ("local:-1", "'local:-1' does not say how many"),
        ("local:", "'local:' does not say how many"),
        ("local:1.5", "'local:1.5' does not say how many"),
        ("local:two", "'local:two' does not say how many"),
        ("http://host:8786", "'http://host:8786' is not tcp:// or tls://HOST:PORT"),
        ("tcp://host", "'tcp://host' is not tcp:// or tls://HOST:PORT"),
        ("no-such/scheduler.json", "'no-such/scheduler.json' is no file and no word"),
        ("dask", "'dask' is no file and no word"),
    ],
)
def test_another_word_is_refused_with_the_choices(word, reason):
    with pytest.raises(ValueError) as error:
        engine(word).__enter__()
    assert reason in str(error.value)
    assert "local:2 for two processes" in str(error.value)
    assert "scheduler file" in str(error.value)


@pytest.mark.parametrize("word", ["local", "local:gpus"])
def test_a_process_per_gpu_needs_one(word, monkeypatch):
    monkeypatch.setattr(engines, "_gpus", list)
    with pytest.raises(ValueError, match="torch sees none: say how many .* as in local:"):
        engine(word).__enter__()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"workers": 1}'])
def test_a_file_that_is_no_scheduler_file_is_refused(text, tmp_path):
    (path := tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match="has no address of a scheduler: name the file"):
        engine(path).__enter__()


def test_a_scheduler_file_that_outlived_its_scheduler_says_what_to_start(tmp_path, monkeypatch):
    (path := tmp_path / "scheduler.json").write_text(json.dumps({"address": "tcp://127.0.0.1:9"}))
    monkeypatch.setattr(engines, "PATIENCE", "1s")
    with pytest.raises(ConnectionError, match="no scheduler answers at tcp://127.0.0.1:9: start"):
        engine(path).__enter__()


def test_a_scheduler_that_asks_for_a_certificate_is_not_called_without_one():
    with pytest.raises(ValueError, match="tls://host:8786 asks for a certificate, and none is set"):
        engine("tls://host:8786").__enter__()


@contextmanager
def dask(*arguments):
    """`dask` with these arguments, as its own process."""
    command = [sys.executable, "-m", "dask", *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


WORKER = ("--nthreads", "1", "--memory-limit", "0", "--no-dashboard")


@pytest.fixture
def scheduler(tmp_path):
    """(its process, its file) of a scheduler on this machine."""
    file = tmp_path / "scheduler.json"
    options = ("--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0")
    with dask("scheduler", *options, "--scheduler-file", file) as process:
        while not file.is_file():
            assert process.poll() is None
            time.sleep(0.1)
        yield process, file


def test_a_scheduler_file_leads_to_workers_also_to_one_that_comes_late(
    scheduler, folder, undisturbed
):
    _, file = scheduler
    with pytest.warns(UserWarning, match="has no worker yet: the work begins when the first"):
        with engine(file) as mapped, dask("worker", "--scheduler-file", file, *WORKER):
            results = mapped(partial(work, folder), range(200))
            done = list(islice(results, 20))
            assert contents(folder).items() >= undisturbed.items()
            with dask("worker", "--scheduler-file", file, *WORKER):
                done += results
    assert [item for item, _ in done] == list(range(200))
    assert len({process for _, process in done}) == 2


def test_a_scheduler_is_as_it_was_after_the_engine_is_closed(scheduler, folder):
    from distributed import Client

    _, file = scheduler
    address = json.loads(file.read_text())["address"]
    with dask("worker", "--scheduler-file", file, *WORKER):
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=30)
            with pytest.raises(KeyboardInterrupt):
                with engine(address) as mapped:
                    for _ in mapped(partial(work, folder), range(500)):
                        raise KeyboardInterrupt
            deadline = time.monotonic() + 10
            tasks = 1
            while tasks and time.monotonic() < deadline:
                tasks = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
            assert tasks == 0
    assert len(contents(folder)) < 400


def test_a_scheduler_that_goes_away_is_one_clear_error(scheduler, folder):
    process, file = scheduler
    with dask("worker", "--scheduler-file", file, *WORKER, "--no-reconnect"):
        with pytest.raises(ConnectionError, match="is gone, .* start it and then the same again"):
            with pytest.warns(UserWarning), engine(file) as mapped:
                for item, _ in mapped(partial(work, folder), range(500)):
                    if item == 3:
                        process.kill()


SCRIPT = """
import time
from loco_core.painting.engines import engine

def slow(item):
    print("began\\n", end="", flush=True)  # at once, beside the other
    time.sleep(60)

if __name__ == "__main__":
    with engine("local:2") as mapped:
        list(mapped(slow, range(20)))
"""


def script(folder: Path, text: str) -> subprocess.Popen:
    (folder / "script.py").write_text(text)
    return subprocess.Popen(
        [sys.executable, folder / "script.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a job in the background
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("everyone", [True, False], ids=["as a terminal does", "only us"])
def test_ctrl_c_ends_every_process_and_says_nothing_of_its_own(everyone, tmp_path):
    with script(tmp_path, SCRIPT) as process:
        assert process.stdout.readline() == "began\n"
        begun = time.monotonic()
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert time.monotonic() - begun < 20
    assert err.startswith("Traceback") and err.endswith("\nKeyboardInterrupt\n")
    assert err.count("Traceback") == 1 and "distributed.nanny" not in err
    assert psutil.wait_procs(workers, timeout=5)[1] == []


def test_a_killed_parent_takes_its_workers_along(tmp_path):
    with script(tmp_path, SCRIPT) as process:
        assert process.stdout.readline() == "began\n"
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_a_script_that_does_not_guard_its_processes_is_told_how(tmp_path):
    text = 'from loco_core.painting.engines import engine\nengine("local:1").__enter__()\n'
    with script(tmp_path, text) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'stands under if __name__ == "__main__":' in err.splitlines()[-1]


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_dask_is_not_imported_before_there_is_something_to_hand_out():
    ran = python(
        "import sys; from loco_core.painting.engines import engine\n"
        "with engine() as mapped: list(mapped(abs, [1]))\n"
        "print({'dask', 'distributed'} & set(sys.modules))"
    )
    assert ran.stdout == "set()\n", ran.stderr


@pytest.mark.parametrize("missing", ["dask", "distributed"])
def test_without_dask_the_error_says_what_to_install(missing):
    ran = python(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {missing!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "from loco_core.painting.engines import engine\n"
        "engine('local:2').__enter__()"
    )
    assert ran.stderr.splitlines()[-1] == (
        f"ValueError: engine 'local:2' needs Dask, and {missing} is not installed: "
        "pip install 'loco-companion[distributed]'"
    )
