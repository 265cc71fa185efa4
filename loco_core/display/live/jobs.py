"""Heavy work in the background: one job at a time, never beside a running cell, stopped on request.

A pipeline can be edited or routed by one at a time. So a job waits until no other job and no cell
of the notebook runs, and a cell waits for the job that does; interrupting the kernel, or the job's
Cancel where the front end delivers it meanwhile, ends the wait. A job is stopped at the next step
of the library's work: the contexts it is in unwind, and the pipeline is as it was.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..._progress import Listener, watched

_turn = threading.RLock()  # held by the job or the cell that runs


class Cancelled(BaseException):
    """Raised inside a job that was told to stop; no `except Exception` on its way takes it."""


class Job(threading.Thread):
    """work() in a thread, told to `tell` step by step; its result, or error, goes to `finish`.

    tell(what, done, total). finish(result, error): error is None, the exception, or `Cancelled`.

        job = Job(lambda: loco.generate(pipe, ["a star"]), print, print)
        job.start()
        job.cancel()
    """

    def __init__(
        self,
        work: Callable[[], Any],
        tell: Listener,
        finish: Callable[[Any, BaseException | None], None],
    ) -> None:
        super().__init__(daemon=True)
        self.work, self.tell, self.finish = work, tell, finish
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop before the next step; does not wait for it."""
        self.cancelled.set()

    def run(self) -> None:
        result, error = None, None
        try:
            while not _turn.acquire(timeout=0.05):
                self._go_on()
            try:
                self._go_on()
                with watched(self._step):
                    result = self.work()
            finally:
                _turn.release()
        except (Exception, Cancelled) as raised:
            error = raised
        self.finish(result, error)

    def _step(self, what: str, done: int, total: int) -> None:
        self._go_on()
        self.tell(what, done, total)

    def _go_on(self) -> None:
        if self.cancelled.is_set():
            raise Cancelled


def wait_for(job: Job) -> None:
    """Return when a job has ended. A cell that waits lends its turn: the job could not begin."""
    held = 0
    with suppress(RuntimeError):  # it is not, or no longer, held by this thread
        while True:
            _turn.release()
            held += 1
    try:
        job.join()
    except BaseException:  # interrupted: the turn may be the job's, and is not waited for
        for _ in range(held):
            _turn.acquire(blocking=False)
        raise
    for _ in range(held):
        _turn.acquire()


def take_turns_with_cells() -> None:
    """From the next cell on, cells of this notebook and jobs wait for each other."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None and _cell_starts not in shell.events.callbacks["pre_run_cell"]:
        shell.events.register("pre_run_cell", _cell_starts)
        shell.events.register("post_run_cell", _cell_ends)


def _cell_starts(*_: Any) -> None:
    _turn.acquire()


def _cell_ends(*_: Any) -> None:
    with suppress(RuntimeError):  # the cell that registered, or one whose wait was interrupted
        _turn.release()
