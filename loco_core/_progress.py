"""The house's one switch for progress bars, and who else is told how far the work is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm.auto import tqdm

Listener = Callable[[str, int, int], None]  # what is done, steps done, steps in all

_shown = True
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def progress(on: bool) -> None:
    """Show (True, the default) or silence (False) every progress bar of the library.

    loco.progress(False)
    """
    global _shown
    _shown = bool(on)


def shown() -> bool:
    """Whether progress bars are shown."""
    return _shown


@contextmanager
def watched(listener: Listener) -> Iterator[None]:
    """Within this context and thread, each step of the library's work is told to `listener`, and no
    bar is drawn. What it raises stops the work there, and every pipeline is left as it was.

        with watched(lambda what, done, total: print(what, done, "of", total)):
            loco.generate(pipe, ["a star"])
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class _Told(tqdm):
    """A bar that tells a listener and draws nothing."""

    def __init__(self, total: int, what: str, listener: Listener) -> None:
        super().__init__(total=total, disable=True)
        self.what, self.listener = what, listener

    def update(self, n: float | None = 1) -> None:
        self.n += n
        self.listener(self.what, self.n, self.total)


def bar(total: int, what: str, unit: str = "it") -> tqdm:
    """A progress bar that appears only when the work lasts longer than two seconds."""
    if (listener := _listener.get()) is not None:
        return _Told(total, what, listener)
    return tqdm(total=total, desc=what, unit=unit, delay=2, leave=False, disable=not _shown)
