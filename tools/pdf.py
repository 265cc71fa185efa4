"""Print the book to one PDF, without LaTeX: one long page of HTML, printed by a browser.

    python -m tools.pdf [--output _build]

Executes nothing. A slider is printed where it starts.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from tools.browser import launched
from tools.build_book import build
from tools.profiles import ROOT

MARGIN = dict.fromkeys(("top", "right", "bottom", "left"), "18mm")
PAGE_NUMBER = (
    '<div style="width:100%;font-size:8px;text-align:center"><span class="pageNumber"></span></div>'
)


def print_page(page: Path, pdf: Path) -> None:
    """Print the HTML file `page` to `pdf`, with an outline, when its equations are drawn."""
    with launched() as browser:
        tab = browser.new_page(color_scheme="light")
        tab.goto(page.resolve().as_uri(), wait_until="load")
        tab.wait_for_function("!document.querySelector('.math:not(:has(.katex))')", timeout=60_000)
        tab.pdf(
            path=pdf,
            format="A4",
            margin=MARGIN,
            print_background=True,
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=PAGE_NUMBER,
            outline=True,
            tagged=True,
        )


def main(arguments: list[str] | None = None) -> int:
    """Build the long page, print it, and say where it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT, help="folder that gets _build/")
    options = parser.parse_args(arguments)
    try:
        page = build(options.output, builder="singlehtml")
    except subprocess.CalledProcessError:
        print("error: the book did not build cleanly, see the warnings above", file=sys.stderr)
        return 1
    # Sphinx writes the long page where the root document is, but its links as from the top
    long = page.with_name("long.html")
    shutil.copyfile(page.parent / "book" / "index.html", long)
    pdf = page.parent.parent / "book.pdf"
    print_page(long, pdf)
    print(f"The book as a PDF: {pdf}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
