"""Write book/provenance.md from the records of the published runs.

python -m tools.provenance
"""

import json
from pathlib import Path

from loco_core.files import atomic_write
from tools.profiles import ROOT

PAGE = "book/provenance.md"
INTRODUCTION = """\
# Provenance

Every number and picture in this book was produced by a cell of a notebook. This page says by which
run: on what device, with what versions, from which source, and how long it took. It is written by
`tools/provenance.py` from `results/runs/`, never by hand.

What is checked, and what the check proves:

- `make test` re-executes every notebook and compares each printed number and table with the
  published one ([nbval](https://nbval.readthedocs.io)). That proves the outputs are *stable*: this
  code, run again, says the same. That they are *right* is the business of the tests of the library,
  which compare each kernel with an independent slow formula.
- Pixels are not compared; the table under each figure is.
- A notebook whose source changed after it was executed fails the tests, by its SHA-256.
"""


def page(records: list[dict]) -> str:
    """The provenance page of `records`, in the order of their notebooks."""
    rows = [
        "| notebook | profile | device | seconds | source | output |",
        "|---|---|---|---:|---|---|",
    ]
    for r in records:
        source, output = r["source_sha256"][:12], r["output_sha256"][:12]
        name = r["notebook"] if r["profile"] == "mini" else f"{r['profile']}/{r['notebook']}"
        rows.append(
            f"| [](../notebooks/{name}.ipynb) | {r['profile']} | {r['device']} | "
            f"{r['wall_seconds']:.1f} | `{source}` | `{output}` |"
        )
    names = sorted({name for r in records for name in r["versions"]})
    versions = [
        "| notebook | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        *(
            f"| {r['notebook']} | " + " | ".join(r["versions"].get(n, "") for n in names) + " |"
            for r in records
        ),
    ]
    sections = ["## Runs", "\n".join(rows), "## Versions", "\n".join(versions)]
    return INTRODUCTION + "\n" + "\n\n".join(sections) + "\n"


def read_records(root: Path = ROOT) -> list[dict]:
    """The records of the default profile, then those of the others."""
    runs = root / "results" / "runs"
    paths = sorted(runs.glob("*.json")) + sorted(runs.glob("*/*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def write(root: Path = ROOT) -> None:
    """Write the page of the records under `root`."""
    atomic_write(root / PAGE, page(read_records(root)).encode())


if __name__ == "__main__":
    write()
