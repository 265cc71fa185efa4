"""Find a Chromium for the tests of the book and its PDF, or install one.

    python -m tools.browser

Looks at $CHROMIUM, at the browsers on the PATH, at what Playwright installed; and if there is none,
asks apt-get (where it may) and Playwright for one. Prints where it is; 1 if none can be had.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
APT = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", "chromium"]
NONE = (
    "no browser: install chromium (Debian: apt-get install chromium), or run `python -m playwright "
    "install chromium`, or set CHROMIUM to the path of one"
)


def find() -> str | None:
    """Path of a Chromium that is here, or None. FileNotFoundError if $CHROMIUM names no program."""
    if named := os.environ.get("CHROMIUM"):
        if path := shutil.which(named):
            return path
        raise FileNotFoundError(f"CHROMIUM={named!r} is no program: correct or unset it")
    return next(filter(None, map(shutil.which, NAMES)), None) or _of_playwright()


def _of_playwright() -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


def install() -> str | None:
    """Install a Chromium, by apt-get where it may and else by Playwright, and return its path."""
    tries = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        tries[:0] = [APT, ["apt-get", "update", "--quiet"], APT]
    for command in tries:
        print("no browser yet:", " ".join(command), file=sys.stderr)
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
        if done.returncode == 0 and (path := find()):
            return path
    return None


@contextmanager
def launched() -> Iterator["Browser"]:
    """A headless browser; RuntimeError that says how to get one if there is none."""
    from playwright.sync_api import sync_playwright

    path = find()
    if path is None:
        raise RuntimeError(NONE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


def main(arguments: list[str] | None = None) -> int:
    """Say where the browser is, installing it first if need be."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    try:
        path = find() or install()
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path or f"error: {NONE}", file=sys.stdout if path else sys.stderr)
    return 0 if path else 1


if __name__ == "__main__":
    raise SystemExit(main())
