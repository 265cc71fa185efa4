"""A directive for the book: a slider of a published run, as it was published.

    :::{published-slider} ../notebooks/02_locogen.ipynb
    :number: 1
    :::

A small Sphinx extension, named in _config.yml. The page is read again when the notebook changes, so
what it shows is never older than the run.
"""

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

MARK = 'class="loco-slider"'


def sliders(notebook: Path) -> list[str]:
    """The HTML of every slider among the outputs of an executed notebook, in their order."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = (output for cell in cells for output in cell.get("outputs", ()))
    pages = ("".join(output.get("data", {}).get("text/html", "")) for output in outputs)
    return [page for page in pages if MARK in page]


class PublishedSlider(SphinxDirective):
    """The slider `number`, counted from 1, of the notebook named, relative to the page."""

    required_arguments = 1
    option_spec = {"number": directives.positive_int}

    def run(self) -> list[nodes.Node]:
        """The slider as raw HTML; an error that names the notebook if it has no such slider."""
        _, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        found = sliders(Path(path))
        number = self.options.get("number", 1)
        if number > len(found):
            raise self.error(f"{self.arguments[0]} has {len(found)} sliders, no number {number}")
        return [nodes.raw("", found[number - 1], format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("published-slider", PublishedSlider)
    return {"parallel_read_safe": True}
