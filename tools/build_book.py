"""Build the book from the published runs, warnings fatal, and check its links.

    python -m tools.build_book [--output _build]

Executes nothing: notebooks are rendered as `tools.execute` published them. The API reference is
written anew from the docstrings (`tools.api`).
"""

import argparse
import subprocess
import sys
from pathlib import Path

from tools.api import write as write_reference
from tools.linkcheck import check_site
from tools.profiles import ROOT


def build(output: Path, root: Path = ROOT, builder: str = "html") -> Path:
    """Build `output`/_build/`builder`, "html" or "singlehtml" (one long page), and return its
    index.html; CalledProcessError on a warning."""
    write_reference(root)
    run = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    options = ["--all", "-W", "--keep-going", "--quiet", "--builder", builder]
    subprocess.run([*run, str(root), *options, "--path-output", str(output)], check=True)
    return output / "_build" / builder / "index.html"


def main(arguments: list[str] | None = None) -> int:
    """Build, check, and say where the book is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT, help="folder that gets _build/")
    options = parser.parse_args(arguments)
    try:
        index = build(options.output)
    except subprocess.CalledProcessError:
        print("error: the book did not build cleanly, see the warnings above", file=sys.stderr)
        return 1
    problems = check_site(index.parent)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"The book is ready: {index}")
    return bool(problems)


if __name__ == "__main__":
    raise SystemExit(main())
