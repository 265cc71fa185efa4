"""Execute the notebooks with papermill on one profile, and publish the frozen runs.

    python -m tools.execute [--profile mini] [NN_name ...]

notebooks/NN_name.py -> jupytext -> papermill -> freeze -> notebooks/NN_name.ipynb. A profile other
than the default publishes to notebooks/<profile>/, and one whose GPU or weights are missing stops
before anything is executed. A failing notebook leaves _build/NN_name.FAILED.ipynb with the error in
place, and the published run as it was.

Each published run has its record, results/runs/NN_name.json: wall clock, device, versions, source
hash, commits of weights from the Hub. It belongs to the run whose bytes are published: a run that
reproduces them bit for bit leaves it alone. The figure of the cell tagged `picture` becomes the
README's, book/_static/picture.png; one tagged `picture-NAME` is book/_static/NAME.png, for the
prose of the book.
"""

import argparse
import base64
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jupytext
import nbformat
import papermill
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from loco_core.files import atomic_write
from tools import profiles, provenance
from tools.freeze import dumps, freeze, source_hash
from tools.profiles import DEFAULT, ROOT, Profile

PICTURES = "book/_static"
VERSIONED = ("torch", "diffusers", "transformers", "numpy", "safetensors")


def sources(root: Path = ROOT) -> list[Path]:
    """The hand-edited notebooks, in reading order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.py"))


def parameters_of(source: Path) -> set[str]:
    """Names a notebook's cell tagged `parameters` defines; ValueError if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{source.stem}.ipynb"
        notebook = jupytext.read(source)
        if not any("parameters" in cell.metadata.get("tags", ()) for cell in notebook.cells):
            raise ValueError(f'{source.name}: tag one cell with `# %% tags=["parameters"]`')
        nbformat.write(notebook, path)
        return set(papermill.inspect_notebook(str(path)))


def destination(source: Path, profile: Profile, root: Path = ROOT) -> tuple[Path, Path]:
    """(published notebook, record) of `source` under `profile`."""
    sub = "" if profile.name == DEFAULT else profile.name
    return (
        root / "notebooks" / sub / f"{source.stem}.ipynb",
        root / "results" / "runs" / sub / f"{source.stem}.json",
    )


def execute(source: Path, profile: Profile, known: set[str], root: Path = ROOT) -> float:
    """Run one notebook and publish it; the wall-clock seconds it took.

    Raises papermill's PapermillExecutionError after writing _build/NN_name.FAILED.ipynb.
    """
    published, record = destination(source, profile, root)
    failed = root / "_build" / f"{source.stem}.FAILED.ipynb"
    parameters = {k: v for k, v in profile.parameters.items() if k in known}
    origin = source_hash(source)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        draft, run = Path(folder) / "draft.ipynb", Path(folder) / "run.ipynb"
        nbformat.write(jupytext.read(source), draft)
        try:
            papermill.execute_notebook(
                str(draft),
                str(run),
                parameters=parameters,
                kernel_name="python3",
                cwd=str(source.parent),
                progress_bar=False,
                extra_arguments=["--log-level=CRITICAL"],  # of the kernel's own chatter
            )
        except PapermillExecutionError:
            atomic_write(failed, run.read_bytes())
            raise
        executed = nbformat.read(run, as_version=4)
    seconds = time.perf_counter() - start
    frozen = freeze(executed, source.stem, origin, profile.name, parameters)
    content = dumps(frozen)
    failed.unlink(missing_ok=True)
    digest = hashlib.sha256(content).hexdigest()
    if recorded(record) != digest:
        facts = {
            "notebook": source.stem,
            "profile": profile.name,
            "parameters": parameters,
            "source_sha256": origin,
            "output_sha256": digest,
            "wall_seconds": round(seconds, 1),
            **machine(profile),
            **({"weights": commits} if (commits := downloaded(profile)) else {}),
        }
        atomic_write(record, (json.dumps(facts, indent=1) + "\n").encode())
    atomic_write(published, content)
    if profile.name == DEFAULT:
        write_pictures(frozen, root)
    return seconds


def write_pictures(notebook: NotebookNode, root: Path = ROOT) -> None:
    """Publish the figures of cells tagged `picture` or `picture-NAME`, for README and prose."""
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", ()):
            kind, _, name = tag.partition("-")
            if kind == "picture":
                (image,) = (
                    o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", ())
                )
                path = root / PICTURES / f"{name or kind}.png"
                atomic_write(path, base64.b64decode(image))


def machine(profile: Profile) -> dict[str, object]:
    """The device a run of `profile` uses here, and the versions that decide its numbers."""
    import torch

    gpu = profile.device == "cuda"
    cores = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "device": torch.cuda.get_device_name() if gpu else cores,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in VERSIONED}},
    }


def downloaded(profile: Profile) -> dict[str, str]:
    """The commits of the weights from the Hub that a run of `profile` has just read, by Hub id."""
    return {
        weights.id: folder.name if (folder := profiles.cached(weights)) else "unknown"
        for weights in profiles.weights_of(profile)
    }


def recorded(record: Path) -> str | None:
    """The hash of the published run that a record is of, or None without a record that tells."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))["output_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # written anew: the run that it was of is gone or was damaged


def main(arguments: list[str] | None = None) -> int:
    """Execute the chosen notebooks; 0 if all ran, 1 with a message if not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebooks", nargs="*", metavar="NN_name", help="default: all")
    parser.add_argument("--profile", default=DEFAULT, help="a file in profiles/ (default: mini)")
    options = parser.parse_args(arguments)
    try:
        profile = profiles.load_profile(options.profile)
        known = {source.stem: parameters_of(source) for source in sources()}
        profiles.check_parameters(profile, known)
        run = profile.notebooks or tuple(known)
        if unknown := sorted(set(options.notebooks) - set(run)):
            raise ValueError(
                f"profile {profile.name!r} runs no notebook {unknown[0]!r}: choose from "
                f"{', '.join(run)}"
            )
        profiles.check_device(profile)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for source in sources():
        if source.stem not in (options.notebooks or run):
            continue
        try:
            seconds = execute(source, profile, known[source.stem])
        except PapermillExecutionError as error:
            print(f"error: {source.stem}: {error.ename}: {error.evalue}", file=sys.stderr)
            print(f"       see _build/{source.stem}.FAILED.ipynb", file=sys.stderr)
            return 1
        print(f"{source.stem}: executed on profile {profile.name} in {seconds:.0f} s", flush=True)
    provenance.write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
