"""The API reference shows every public name as the library has it, and is made without torch."""

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import loco_core as loco
from tools import api, public

ROOT = Path(__file__).resolve().parent.parent
KNOWN = public.modules()
PUBLIC = public.public_names(KNOWN)
PAGES = api.pages()
DEFINITIONS = {
    f"{module.home}.{node.name}": (module, node)
    for module in KNOWN
    for node in module.definitions.values()
}


def imported(path: str):
    """What a dotted name stands for, from a module or under `loco`."""
    if path.startswith("loco."):
        return functools.reduce(getattr, path.split(".")[1:], loco)
    home, _, name = path.rpartition(".")
    return getattr(importlib.import_module(home), name)


def test_every_module_is_on_one_page():
    assert [module.name for module in KNOWN if api.page_of(module.name) is None] == []


def test_every_public_name_says_what_it_is():
    silent = [path for path, (_, node) in DEFINITIONS.items() if not ast.get_docstring(node)]
    silent += [module.home for module in KNOWN if not ast.get_docstring(module.tree)]
    assert silent == []


def test_every_name_under_loco_is_in_the_table():
    table = PAGES["index.md"]
    wings = {name for name in loco.__all__ if inspect.ismodule(getattr(loco, name))}
    assert [n for n in set(loco.__all__) - wings if f"`loco.{n}`" not in table] == []
    assert [n for n in loco.shapeland.__all__ if f"`loco.shapeland.{n}`" not in table] == []


@pytest.mark.parametrize("path", sorted(PUBLIC.values()))
def test_a_name_of_the_table_is_where_the_reference_says(path):
    (home,) = [f"{loco.__name__}.{m}.{n}" for (m, n), p in PUBLIC.items() if p == path]
    assert imported(path) is imported(home.replace(".__init__", ""))


OLD = {
    "editing": (
        "Attribution Edit Knockout Neurons attribute closed_form compose diagnose diff_quickfix "
        "erase_in_rounds fidelity locoedit rank_neurons time_edit uce"
    ),
    "evaluation": "clip_score probes",
}


@pytest.mark.parametrize("wing", OLD)
def test_a_wing_of_0_3_still_answers_to_its_name(wing):
    code = f"import loco_core as loco; loco.{wing}\n"
    code += f"for name in {OLD[wing].split()}: getattr(loco.{wing}, name)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", sorted(DEFINITIONS))
def test_a_signature_has_the_arguments_that_python_sees(path):
    module, node = DEFINITIONS[path]
    if not (written := api.signature(node)):
        return  # a class without arguments of its own
    shown = ast.parse(f"def f{written}: ...").body[0].args
    names = [x.arg for x in [*shown.posonlyargs, *shown.args, shown.vararg, *shown.kwonlyargs] if x]
    seen = [p.name for p in inspect.signature(imported(path)).parameters.values() if p.kind != 4]
    assert names == seen


@pytest.mark.parametrize("path", sorted(DEFINITIONS))
def test_the_source_to_unfold_ends_where_the_definition_ends(path):
    module, node = DEFINITIONS[path]
    page = PAGES[f"{api.page_of(module.name)}.md"]
    name = PUBLIC.get((module.name, node.name), node.name)
    entry = re.search(rf"^:::::{{py:\w+}} {re.escape(name)}\b.*?^:::::$", page, re.M | re.S)[0]
    start, end = map(int, re.search(r"^:lines: (\d+)-(\d+)$", entry, re.M).groups())
    lines, first = inspect.getsourcelines(inspect.unwrap(imported(path)))
    assert end == first + len(lines) - 1 and first <= start <= end
    source = (ROOT / module.path).read_text().splitlines()[start - 1 : end]
    assert "\n".join(source) in "".join(lines)


def test_the_reference_is_written_where_torch_cannot_be_imported(tmp_path):
    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'numpy', 'diffusers', 'safetensors'])\n"
        "from tools.api import pages; assert pages()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_pages_are_written_once_and_pages_of_yesterday_go(tmp_path):
    (tmp_path / "loco_core").symlink_to(ROOT / "loco_core")
    (tmp_path / "book" / "api").mkdir(parents=True)
    (tmp_path / "book" / "api" / "gone.md").write_text("# An old wing")
    written = api.write(tmp_path)
    assert sorted((tmp_path / "book" / "api").iterdir()) == sorted(written)
    before = [path.stat().st_mtime_ns for path in written]
    assert [path.stat().st_mtime_ns for path in api.write(tmp_path)] == before


@pytest.mark.parametrize(
    "text",
    [
        "W' c_i = W g_i, sum_i ||x||^2 and *args",
        "[prompt, token] (a mask), <kind>.json and {'a': 1}",
        "from $5 to $6, ~x, #1, a\\b, 2 * 3 * 4",
    ],
)
def test_prose_is_read_as_it_was_written(text):
    html = MarkdownIt("commonmark").render(api.text(text, "zoo", {}))
    shown = re.sub(r"</?p>", "", html).strip()
    assert shown.replace("&lt;", "<").replace("&gt;", ">") == text


def test_equations_stay_as_they_stand_and_examples_are_python():
    found = api.text(
        "Solves\n\n    W' = W (I + D R)\n\nfor W:\n\n    fit(C, G)\n\n    more", "zoo", {}
    )
    assert "```text\nW' = W (I + D R)\n```" in found
    assert "```python\nfit(C, G)\n\nmore\n```" in found


def test_a_line_begins_where_the_text_turns_to_a_parameter():
    found = api.text("Edit it. lam: the price. a, b_c: two.", "zoo", {}, ["lam", "a", "b_c"])
    assert found == "Edit it.\\\n**lam**: the price.\\\n**a, b\\_c**: two."


def test_a_name_in_backticks_leads_to_its_entry():
    links = {("zoo", "load"): "loco.load", ("records", "read"): "loco_core.records.read"}
    assert api.prose("`load`", "zoo", links) == "{py:obj}`load <loco.load>`"
    assert api.prose("`loco.load`", "x", links) == "{py:obj}`loco.load <loco.load>`"
    assert (
        api.prose("`records.read`", "x", links) == "{py:obj}`records.read <loco_core.records.read>`"
    )
    assert api.prose("`read` `batch`", "x", links) == "`read` `batch`"
