"""The house's one switch for progress bars."""

from tqdm.auto import tqdm

_shown = True


def progress(on: bool) -> None:
    """Show (True, the default) or silence (False) every progress bar of the library.

    loco.progress(False)
    """
    global _shown
    _shown = bool(on)


def shown() -> bool:
    """Whether progress bars are shown."""
    return _shown


def bar(total: int, what: str, unit: str = "it") -> tqdm:
    """A progress bar that appears only when the work lasts longer than two seconds."""
    return tqdm(total=total, desc=what, unit=unit, delay=2, leave=False, disable=not _shown)
