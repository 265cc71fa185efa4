"""CONTRIBUTING.md is followed to the letter, in a copy of the library.

A fenced block begins with the file it is about. A `python` block is the whole of a new file; a
`diff` block is a change, whose old lines must stand in the file exactly once.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FENCED = re.compile(r"^```(\w+)\n(?:# (\S+/\S+)\n)?(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall(TEXT)
SECTIONS = dict(re.findall(r"^## (Add a \w+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
PAGE = 100  # lines


def changed(text: str, diff: str) -> str:
    """`text` after a change whose lines begin with "+", "-" or a blank."""
    lines = diff.splitlines(keepends=True)
    old, new = ("".join(x[1:] for x in lines if x[0] != sign) for sign in "+-")
    assert text.count(old) == 1, f"CONTRIBUTING changes lines that are not there, or twice:\n{old}"
    return text.replace(old, new)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the library in which everything was done that CONTRIBUTING says."""
    tree = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns("__pycache__", "checkpoints")
    shutil.copytree(ROOT / "loco_core", tree / "loco_core", ignore=skip)
    (tree / "loco_core" / "checkpoints").symlink_to(ROOT / "loco_core" / "checkpoints")
    (tree / "tests").mkdir()
    for name in ("pyproject.toml", "tests/conftest.py", "tests/shapes.py"):
        shutil.copy(ROOT / name, tree / name)
    for language, name, body in BLOCKS:
        path = tree / name
        if language == "python":
            assert not path.exists(), f"{name} is in the project already"
            path.write_text(body)
        elif language == "diff":
            path.write_text(changed(path.read_text(), body))
    return tree


def test_there_is_a_page_each_on_a_family_a_method_and_a_mini():
    assert list(SECTIONS) == ["Add a family", "Add a method", "Add a mini"]
    assert max(section.count("\n") for section in SECTIONS.values()) <= PAGE
    assert all("```python\n# tests/" in section for section in SECTIONS.values())


def test_following_contributing_makes_what_it_promises(tree):
    tests = [name for language, name, _ in BLOCKS if name.startswith("tests/")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(
        command,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(SECTIONS)} passed" in result.stdout


def test_the_code_of_contributing_is_in_the_style_of_the_house(tree):
    made = [name for language, name, _ in BLOCKS if language == "python"]
    for check in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *check, *made], cwd=tree, check=True)


def test_the_command_that_trains_a_mini_knows_the_new_one(tree):
    (command,) = [body.split() for language, _, body in BLOCKS if language == "bash"]
    code = f"from {command[2]}.recipe import RECIPES; assert {command[3]!r} in RECIPES"
    assert command[:3] == ["python", "-m", "loco_core.worlds.training"]
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True)
