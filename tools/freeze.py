"""Freeze an executed notebook: the same outputs give the same bytes.

Cell ids come from (stem, index); timestamps, papermill's bookkeeping, widget model ids and the
version of Python are dropped; pieces of one stream are joined. What is dropped and worth
knowing (wall clock, device, versions) goes to the run's record instead, see `execute`.
"""

import copy
import hashlib
from pathlib import Path

import nbformat
from nbformat import NotebookNode

CELL_KEYS = ("tags", "mystnb", "jupyter")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def source_hash(path: Path) -> str:
    """SHA-256 of the py:percent source, line ends normalised."""
    return hashlib.sha256(path.read_text(encoding="utf-8").encode()).hexdigest()


def freeze(
    notebook: NotebookNode, stem: str, source: str, profile: str, parameters: dict[str, object]
) -> NotebookNode:
    """A deterministic copy. `source` is the `source_hash` of the file it was executed from."""
    frozen = copy.deepcopy(notebook)
    frozen.nbformat_minor = 5
    frozen.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"file_extension": ".py", "name": "python"},
            "loco": {"source_sha256": source, "profile": profile, "parameters": parameters},
        }
    )
    for index, cell in enumerate(frozen.cells):
        cell.id = f"{stem}-{index:03d}"
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in CELL_KEYS if cell.metadata.get(key)}
        )
        if "injected-parameters" in cell.metadata.get("tags", ()):
            cell.metadata.tags = ["injected-parameters", "hide-cell"]
        if cell.cell_type == "code":
            cell.outputs = [_without_widget(o) for o in _joined_streams(cell.outputs)]
    return frozen


def dumps(notebook: NotebookNode) -> bytes:
    """The bytes of a frozen notebook: sorted keys, one space of indent, a final newline."""
    nbformat.validate(notebook)
    return (nbformat.writes(notebook, indent=1).rstrip("\n") + "\n").encode("utf-8")


def _joined_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """One output per run of the same stream: how a kernel chops its prints is a matter of time."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if (
            last is not None
            and output.output_type == last.output_type == "stream"
            and output.name == last.name
        ):
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _without_widget(output: NotebookNode) -> NotebookNode:
    """The output's static twin: a widget's model id is random and dead without its kernel."""
    if "data" in output:
        output.data.pop(WIDGET_VIEW, None)
    return output
