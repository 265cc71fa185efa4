"""Warnings that point at the line of the user, not at one of ours."""

import os
import sys
import warnings
from pathlib import Path

PACKAGE = str(Path(__file__).parent) + os.sep


def warn(message: str) -> None:
    """Warn, with the first frame outside of this package as the place."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and _ours(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _ours(path: str) -> bool:
    # the decorators of torch and contextlib stand between our frames
    return path.startswith(PACKAGE) or path.endswith(("_contextlib.py", "contextlib.py"))
