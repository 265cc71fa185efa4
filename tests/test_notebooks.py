"""The published runs: complete, fresh, described; and the machinery that makes them.

nbval, run beside this file by `make test`, re-executes them and compares the outputs.
"""

import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from papermill.exceptions import PapermillExecutionError

from tools import execute, provenance
from tools.freeze import WIDGET_VIEW, dumps, freeze
from tools.guards import problems
from tools.profiles import Profile, check_device, check_parameters, load_profile

ROOT = Path(__file__).resolve().parent.parent
SOURCES = execute.sources()
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
MINI = Profile("mini", "cpu", {"greeting": "hello"})

HEADER = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% tags=["parameters"]
greeting = "nothing"

# %%
"""


@pytest.fixture
def notebook(tmp_path):
    """Write a toy notebook under `tmp_path` and return its path."""

    def write(code: str) -> Path:
        source = tmp_path / "notebooks" / "01_toy.py"
        source.parent.mkdir(exist_ok=True)
        source.write_text(HEADER + code + "\n")
        return source

    return write


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_published_run_is_complete_fresh_and_described(source):
    assert problems(source, source.with_suffix(".ipynb")) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_published_run_has_its_record(source):
    published, record = execute.destination(source, load_profile("mini"))
    facts = json.loads(record.read_text())
    assert facts["notebook"] == source.stem and facts["profile"] == "mini"
    executed = nbformat.read(published, as_version=4)
    assert facts["parameters"] == executed.metadata.loco.parameters
    assert facts["source_sha256"] == executed.metadata.loco.source_sha256


def test_pictures_in_readme_and_prose_are_those_of_the_published_runs(tmp_path):
    for source in SOURCES:
        published, _ = execute.destination(source, load_profile("mini"))
        execute.write_pictures(nbformat.read(published, as_version=4), tmp_path)
    made = {path.name: path.read_bytes() for path in (tmp_path / execute.PICTURES).iterdir()}
    assert {"picture.png", "trade_off.png"} <= set(made)
    for name, content in made.items():
        assert (ROOT / execute.PICTURES / name).read_bytes() == content


def test_the_provenance_page_is_written_from_the_records():
    assert (ROOT / provenance.PAGE).read_text() == provenance.page(provenance.read_records())


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_set_only_parameters_that_some_notebook_has(name):
    known = {source.stem: execute.parameters_of(source) for source in SOURCES}
    check_parameters(load_profile(name), known)


def test_a_second_run_changes_no_byte_of_notebook_or_record(notebook, tmp_path):
    source = notebook("import ipywidgets\nprint(greeting)\nipywidgets.IntSlider()")
    published, record = execute.destination(source, MINI, tmp_path)
    execute.execute(source, MINI, {"greeting"}, tmp_path)
    first = published.read_bytes(), record.read_bytes()
    execute.execute(source, MINI, {"greeting"}, tmp_path)
    assert (published.read_bytes(), record.read_bytes()) == first
    assert b"hello" in first[0] and WIDGET_VIEW.encode() not in first[0]
    assert problems(source, published) == []


def test_a_failing_notebook_leaves_the_published_run_as_it_was(notebook, tmp_path):
    source = notebook("print(1)")
    published, _ = execute.destination(source, MINI, tmp_path)
    published.write_bytes(b"the old run")
    notebook("1 / 0")
    with pytest.raises(PapermillExecutionError, match="ZeroDivisionError"):
        execute.execute(source, MINI, {"greeting"}, tmp_path)
    assert published.read_bytes() == b"the old run"
    failed = (tmp_path / "_build" / "01_toy.FAILED.ipynb").read_text()
    assert "ZeroDivisionError" in failed
    assert sorted(p.name for p in source.parent.iterdir()) == ["01_toy.ipynb", "01_toy.py"]


def test_freezing_joins_the_pieces_of_a_stream():
    pieces = [new_output("stream", name="stdout", text=text) for text in ("a", "b", "c")]
    whole = [new_output("stream", name="stdout", text="abc")]
    frozen = [
        dumps(freeze(new_notebook(cells=[new_code_cell("x", outputs=o)]), "s", "h", "mini", {}))
        for o in (pieces, whole)
    ]
    assert frozen[0] == frozen[1]


FLAWED = {
    "cleared outputs": ({"execution_count": None}, [], "not executed"),
    "an error": ({}, [new_output("error", ename="KeyError", evalue="", traceback=[])], "KeyError"),
    "stderr": ({}, [new_output("stream", name="stderr", text="careful")], "stderr"),
    "an address": (
        {},
        [new_output("display_data", {"text/plain": "<object at 0x7f00aa11>"})],
        "memory address",
    ),
    "a figure without alt text": ({}, [new_output("display_data", {"image/png": ""})], "alt text"),
    "a figure without a table": ({}, [new_output("display_data", {"image/png": ""})], "table"),
    "a recoloured figure": ({}, [new_output("display_data", {"image/png": ""})], "dark theme"),
    "an HTML image without alt text": (
        {},
        [new_output("display_data", {"text/html": '<img alt="" src="data:">'})],
        "without alt text",
    ),
    "a stale source": ({}, [], "stale"),
}


@pytest.mark.parametrize("flaw", FLAWED)
def test_guards_catch(flaw, notebook):
    changes, outputs, message = FLAWED[flaw]
    source = notebook("x = 1")
    cell = new_code_cell("x = 1", outputs=outputs, **{"execution_count": 1, **changes})
    published = source.with_suffix(".ipynb")
    published.write_bytes(dumps(freeze(new_notebook(cells=[cell]), "01_toy", "0", "mini", {})))
    assert any(message in problem for problem in problems(source, published))


def test_unknown_profile_parameter_and_key_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="unknown profile 'nano': choose one of .*mini"):
        load_profile("nano")
    with pytest.raises(ValueError, match="sets 'seedz', .* choose from seeds, steps"):
        check_parameters(Profile("p", "cpu", {"seedz": 1}), {"a": {"seeds"}, "b": {"steps"}})
    (tmp_path / "p.yaml").write_text("params: {}")
    with pytest.raises(ValueError, match="unknown key 'params'"):
        load_profile("p", tmp_path)
    (tmp_path / "q.yaml").write_text("device: tpu")
    with pytest.raises(ValueError, match="unknown device 'tpu', expected cpu or cuda"):
        load_profile("q", tmp_path)


def test_a_gpu_profile_stops_at_once_where_torch_sees_no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="'sdxl' needs an NVIDIA GPU, and torch .* sees none"):
        check_device(Profile("sdxl", "cuda", {}))


def test_a_notebook_without_a_parameters_cell_is_refused(tmp_path):
    source = tmp_path / "01_toy.py"
    source.write_text("# %%\nx = 1\n")
    with pytest.raises(ValueError, match="01_toy.py: tag one cell"):
        execute.parameters_of(source)
