"""What nbval cannot see in a published run: things missing, stale, or different every time."""

import re
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from tools.freeze import source_hash

PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")
IMG = re.compile(r"<img\b[^>]*>")
ALT = re.compile(r'\balt="[^"]*\w[^"]*"')


def problems(source: Path, published: Path) -> list[str]:
    """What is wrong with the run `published` of the notebook `source`; empty if nothing is."""
    header = jupytext.read(source)
    found = []
    if header.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append(f"{source.name}: no kernelspec header naming python3")
    tags = [tag for cell in header.cells for tag in cell.metadata.get("tags", ())]
    if tags.count("parameters") != 1:
        found.append(f"{source.name}: needs exactly one cell tagged parameters")
    if not published.exists():
        return [*found, f"{published.name}: missing, run `make execute`"]
    notebook = nbformat.read(published, as_version=4)
    if notebook.metadata.get("loco", {}).get("source_sha256") != source_hash(source):
        found.append(f"{published.name}: stale, its source changed: run `make execute`")
    return found + [f"{published.name}: {problem}" for problem in _of_cells(notebook)]


def _of_cells(notebook: NotebookNode) -> Iterator[str]:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code if cell.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        yield f"cells were not executed once each, in order: {counts}"
    for index, cell in enumerate(code):
        name = f"cell {cell.id}"
        outputs = list(cell.outputs)
        for output in outputs:
            if output.output_type == "error":
                yield f"{name} ends in {output.ename}"
            if output.output_type == "stream" and output.name == "stderr":
                yield f"{name} writes to stderr: {output.text[:200]!r}"
            if ADDRESS.search(_text(output)):
                yield f"{name} prints a memory address, which differs in every run"
            for image in IMG.findall(output.get("data", {}).get("text/html", "")):
                if not ALT.search(image):
                    yield f"{name} has an image without alt text in its HTML"
        if not any(set(PICTURES) & set(output.get("data", {})) for output in outputs):
            continue
        image = cell.metadata.get("mystnb", {}).get("image", {})
        if not image.get("alt", "").strip():
            yield f'{name} has a figure without alt text: mystnb={{"image": {{"alt": ...}}}}'
        if "dark-light" not in image.get("classes", ""):
            yield f'{name} has a figure the dark theme recolours: set "classes": "dark-light"'
        if "<table" not in "".join(_text(o) for c in code[index : index + 2] for o in c.outputs):
            yield f"{name} has a figure, but neither it nor the next cell has a table of its data"


def _text(output: NotebookNode) -> str:
    data = output.get("data", {})
    shown = [data.get(kind, "") for kind in ("text/plain", "text/html")]
    return "\n".join([output.get("text", ""), *map(str, shown)])
