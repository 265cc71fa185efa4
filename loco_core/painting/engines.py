"""Who paints: this process, processes on this machine, or machines beside it.

A list is painted by a callable shaped like the builtin `map`. `engine` makes one from a word:
1. The function and the items travel, small values. What they make does not: a worker writes it.
2. Results come in the order of the items. An item whose worker is lost is done again by another.
3. An item that fails does not stop the others. After the last one, one error names all that failed.

Dask (https://distributed.dask.org) hands the work out; it is imported here alone, and only then.
"""

import json
import logging
import multiprocessing
import os
import signal
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch

from .._warn import warn

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

AHEAD = 1024  # items the scheduler knows before their results are asked for
PATIENCE = "15s"  # until a scheduler answers
NAMED = 10  # failed items an error names
SILENT = logging.CRITICAL + 1
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
WORDS = (
    "local:2 for two processes on this machine, local:gpus for one per GPU, tcp://host:8786 for a "
    "Dask scheduler that runs, the path of its scheduler file, or None for this process"
)
SETTINGS = {
    "distributed.scheduler.allowed-failures": 3,
    "distributed.scheduler.no-workers-timeout": "10 minutes",
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.worker-saturation": 1.0,  # who waits behind an item could die with it
    "distributed.scheduler.worker-ttl": None,  # else a step that holds the GIL loses its worker
    "distributed.deploy.lost-worker-timeout": "1 day",  # else a slow restart is given up
    "distributed.diagnostics.nvml": False,
    "distributed.nanny.pre-spawn-environ": {},
}
UNGUARDED = (
    "the processes of the engine could not be started: in a script, what starts them stands under "
    'if __name__ == "__main__":, since each of them imports the script again'
)


@contextmanager
def engine(word: str | Path | None = None) -> Iterator[Map]:
    """A callable shaped like the builtin `map`, which does its work where `word` says.

    word: "local:N" for N processes of one thread on this machine, process i on GPU i if torch sees
    GPUs (from the first again when there are more processes than GPUs); "local" or "local:gpus" for
    one process per GPU; "tcp://host:8786" or "tls://host:8786" for a Dask scheduler that runs, or
    the path of the file it wrote (`dask scheduler --scheduler-file F`); None for the builtin.
    map(function, items): function can be pickled, items are small, and so is what comes back. The
    results up to the first item that fails are handed on; the items after it are done all the same,
    and then a RuntimeError names every item that failed, chained to the first one's exception.
    At the end of the block, or on Ctrl-C, what is pending is cancelled and the processes are ended.
    Raises ValueError for another word, without Dask, and for processes started by a script that
    does not guard them; ConnectionError if no scheduler answers, or if it goes away.

        with engine("local:2") as map:
            images = list(paint(pipe, pictures, store="pictures", map=map))
    """
    if word is None:
        yield map
        return
    environments, address = _read(word)
    dask = _dask(word)
    with (
        _quiet(),
        _environment(),
        tempfile.TemporaryDirectory(prefix="loco-") as folder,
        dask.config.set({**SETTINGS, "temporary-directory": folder}),
        _processes(environments) if address is None else nullcontext(address) as scheduler,
        _client(scheduler) as client,
    ):
        if not client.scheduler_info(n_workers=-1)["workers"]:
            warn(f"engine {str(word)!r} has no worker yet: the work begins when the first comes")
        yield partial(_mapped, client, str(word))


def _read(word: str | Path) -> tuple[list[dict[str, str]], str | None]:
    """(the environment of each process to start, None), or ([], the address of a scheduler)."""
    if not isinstance(word, str | Path) or not str(word):
        raise ValueError(f"engine {word!r} is no word: choose from {WORDS}")
    kind, _, number = (text := str(word)).partition(":")
    if kind == "local":
        return _local(text, number, _gpus()), None
    if "://" in text:
        scheme, _, place = text.partition("://")
        if scheme not in ("tcp", "tls") or not place.rpartition(":")[2].isdecimal():
            raise ValueError(f"engine {text!r} is not tcp:// or tls://HOST:PORT: choose {WORDS}")
        return [], text
    return [], _address(text)


def _local(text: str, number: str, gpus: Sequence[str]) -> list[dict[str, str]]:
    """The environment of each process that `text`, local or local:number, asks for."""
    if text == "local" or number == "gpus":
        if not gpus:
            raise ValueError(
                f"engine {text!r} is a process per GPU, and torch sees none: say how many "
                f"processes, as in local:{os.cpu_count() or 1}"
            )
        count = len(gpus)
    elif number.isascii() and number.isdecimal() and int(number) > 0:
        count = int(number)
    else:
        raise ValueError(f"engine {text!r} does not say how many processes: choose {WORDS}")
    return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(count)]


def _gpus() -> list[str]:
    """The GPUs torch sees here, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [n.strip() for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n.strip()]
    return (named or [str(i) for i in range(count)])[:count]


def _address(path: str) -> str:
    """The address in a scheduler file."""
    if not os.path.isfile(path):
        raise ValueError(f"engine {path!r} is no file and no word it knows: choose {WORDS}")
    try:
        return str(json.loads(Path(path).read_text())["address"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"engine {path!r} has no address of a scheduler: name the file that was written by "
            "`dask scheduler --scheduler-file`"
        ) from error


def _dask(word: str | Path) -> Any:
    try:
        import dask
        import distributed  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"engine {str(word)!r} needs Dask, and {error.name} is not installed: "
            "pip install 'loco-companion[distributed]'"
        ) from error
    return dask


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing from Dask's own logs: what matters to a user is raised."""
    names = ("distributed", "distributed.client", "distributed.gc", "tornado", "asyncio")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(SILENT)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _environment() -> Iterator[None]:
    """One thread for a process that is started here: its torch asks before it is told anything."""
    names = (*ONE_THREAD, "PYTHONHASHSEED", "__DASK_PARENT_PID")  # Dask sets these two
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def _processes(environments: Sequence[dict[str, str]]) -> Iterator[Any]:
    """A cluster of a process of one thread per environment, heard on this machine only."""
    from distributed import Nanny, Scheduler, SpecCluster

    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ValueError(UNGUARDED)  # the script that is imported again by a process of its own
    here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "dashboard": False}
    worker = {**here, "nthreads": 1, "memory_limit": 0, "silence_logs": SILENT}
    workers = {
        i: {"cls": Nanny, "options": {**worker, "env": environment}}
        for i, environment in enumerate(environments)
    }
    with SpecCluster(scheduler={"cls": Scheduler, "options": {**here, "port": 0}}) as cluster:
        resource_tracker.ensure_running()  # which else unblocks the signal that is blocked below
        cluster.loop.add_callback(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})
        cluster.worker_spec.update(workers)  # now, so that Ctrl-C finds a cluster to close
        try:
            cluster.sync(cluster._correct_state)
        except RuntimeError as error:
            raise ValueError(UNGUARDED) from error
        yield cluster


@contextmanager
def _client(scheduler: Any) -> Iterator[Any]:
    from distributed import Client, Security

    if str(scheduler).startswith("tls://") and not Security().tls_client_cert:
        raise ValueError(
            f"the scheduler at {scheduler} asks for a certificate, and none is set: name it in "
            "Dask's configuration, distributed.comm.tls.client.cert"
        )
    try:
        client = Client(scheduler, timeout=PATIENCE, set_as_default=False)
    except OSError as error:
        raise ConnectionError(
            f"no scheduler answers at {scheduler}: start one with `dask scheduler`, and name its "
            "address or the file it writes with --scheduler-file"
        ) from error
    with client:
        yield client


def _mapped(
    client: Any, word: str, function: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[Any]:
    """What `engine` promises of map(function, items)."""
    from distributed import CancelledError

    if client.status != "running":
        raise RuntimeError(f"engine {word!r} is closed: use its map inside the with block")
    # A group of tasks, known by the first part of their keys: what is more than the workers can
    # hold waits at the scheduler, for whoever is free and for workers that come late.
    group = f"loco-{uuid.uuid4().hex}"
    numbered = enumerate(items)
    waiting: deque[tuple[Any, Any]] = deque()
    failed: list[tuple[Any, Exception]] = []
    done = 0
    try:
        while True:
            for number, item in islice(numbered, AHEAD - len(waiting)):
                waiting.append((item, client.submit(function, item, key=(group, number))))
            if not waiting:
                break
            item, future = waiting.popleft()
            try:
                result = _result(client, function, item, future, [f for _, f in waiting])
            except CancelledError as error:
                raise ConnectionError(
                    f"the scheduler of engine {word!r} is gone, {done} items are done: start it "
                    "and then the same again, which goes on where this stopped"
                ) from error
            except Exception as error:
                failed.append((item, error))
            else:
                if not failed:  # else results would not stand beside their items any more
                    yield result
            done += 1
    finally:
        if client.status == "running":
            client.cancel([future for _, future in waiting])
    if failed:
        raise RuntimeError(_told(failed, done)) from failed[0][1]


def _result(
    client: Any, function: Callable[[Any], Any], item: Any, future: Any, others: Sequence[Any]
) -> Any:
    """The result of `future`. If its workers died, the item is done once more after all others:
    whoever shares a worker with an item that kills it looks as guilty."""
    from distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker:
        for other in others:
            other.exception()  # waits
    try:
        return client.submit(function, item, pure=False).result()
    except KilledWorker as error:
        told = "its process died at every try, at last alone: is there memory for a batch this big?"
        raise RuntimeError(told) from error


def _told(failed: Sequence[tuple[Any, Exception]], count: int) -> str:
    lines = [f"{_short(item)}: {type(e).__name__}: {_short(e)}" for item, e in failed[:NAMED]]
    if len(failed) > NAMED:
        lines.append(f"and {len(failed) - NAMED} more")
    told = "items failed, the others are done; the same again does only these:"
    return "\n  ".join([f"{len(failed)} of {count} {told}", *lines])


def _short(value: Any, most: int = 200) -> str:
    text = " ".join((str(value) if isinstance(value, Exception) else repr(value)).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
