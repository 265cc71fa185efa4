"""The README's commands do what it says: every block of it is run here or by .ci/run, and so is
the Python in the prose of the book.

A shell block runs in a copy of the tree. The two commands that everything hangs on are run by
.ci/run itself, one of them being the command that runs this test.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall(TEXT)
BOOK = [
    pytest.param(code, id=path.stem)
    for path in sorted((ROOT / "book").glob("*.md"))
    for language, code in FENCED.findall(path.read_text())
    if language == "python"
]
CI = ["make test", "make book"]


def blocks(language: str) -> list[str]:
    return [code for name, code in BLOCKS if name == language]


def run_by_ci(block: str) -> bool:
    return set(block.split("\n")) - {""} <= set(CI)


def environment(**changes: str) -> dict[str, str]:
    """This environment, without the traces of the make that may be running this test."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))} | changes


def copy_of_the_tree(folder: Path) -> Path:
    built = shutil.ignore_patterns(
        ".git", ".venv*", "_build", "build", "__pycache__", ".*cache", ".hypothesis", "*.egg-info"
    )
    return Path(shutil.copytree(ROOT, folder / "tree", ignore=built))


def test_every_block_has_a_language_this_file_runs():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert TEXT.count("```") == 2 * len(BLOCKS)


def test_ci_runs_the_two_commands_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == CI
    assert any(run_by_ci(block) for block in blocks("bash"))
    assert "set -euo pipefail" in lines


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (\w+)\b(?=[`\n ])", TEXT))))
def test_every_make_target_the_readme_names_exists(target):
    if f"`make {target}" in TEXT or f"\nmake {target}\n" in TEXT:
        command = ["make", "--dry-run", target]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment())


@pytest.mark.parametrize(
    "code", [*(pytest.param(code, id="README") for code in blocks("python")), *BOOK]
)
def test_python_blocks_run(code, tmp_path):
    path = environment(PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=path)


@pytest.mark.parametrize(
    "block", [b for b in blocks("bash") if not run_by_ci(b)], ids=lambda b: b.split("\n")[0]
)
def test_shell_blocks_run(block, tmp_path):
    """pip finds what this environment has, so that the block runs offline, too."""
    offline = environment(
        PYTHONPATH=sysconfig.get_paths()["purelib"], PIP_NO_BUILD_ISOLATION="0", PIP_NO_INDEX="1"
    )
    tree = copy_of_the_tree(tmp_path)
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=tree, check=True, env=offline)


def test_files_the_readme_links_to_exist():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
