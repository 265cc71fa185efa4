"""pyproject.toml is the one truth for dependencies; what is installed and shipped follows it."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import loco_core
from tools.pins import closure, direct_requirements

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {r.name: r for group in direct_requirements().values() for r in group}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {name: Version(number) for name, number in pairs}


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_every_requirement_has_a_pin_it_accepts_and_that_is_installed(name):
    pin = pins()[canonicalize_name(name)]
    assert REQUIREMENTS[name].specifier.contains(pin)
    assert Version(version(name)).public == pin.public


def test_everything_the_extras_reach_is_pinned():
    reached = {n for n in closure(list(REQUIREMENTS.values())) if not n.startswith("nvidia-")}
    assert reached - {"triton", "cuda-bindings", "cuda-pathfinder"} <= set(pins())


def test_reading_the_book_does_not_need_torch():
    assert PROJECT["dependencies"] == []
    assert not {"torch", "diffusers", "transformers"} & set(closure(direct_requirements()["book"]))


def test_the_all_extra_holds_every_other_extra():
    extras = PROJECT["optional-dependencies"]

    def reach(name: str) -> set[str]:
        lines = [Requirement(line) for line in extras[name]]
        inner = {e for r in lines if r.name == PROJECT["name"] for e in r.extras}
        return inner.union(*(reach(e) for e in inner))

    assert reach("all") == set(extras) - {"all"}


def test_conda_and_make_install_the_same_pinned_all_extra():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python, pip, from_pip = conda
    assert pip == "pip" and from_pip == {"pip": ["-c constraints.txt", "-e .[all]"]}
    number = python.removeprefix("python=")
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(number)
    assert "install --quiet" in (makefile := (ROOT / "Makefile").read_text())
    assert "-c constraints.txt -e '.[all]'" in makefile


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == loco_core.__version__ == citation["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_a_wheel_carries_the_whole_library_and_its_checkpoints(tmp_path):
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "loco_core", tree / "loco_core", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    files = {str(p.relative_to(tree)) for p in (tree / "loco_core").rglob("*") if p.is_file()}
    command = "pip wheel --quiet --no-index --no-deps --no-build-isolation -w".split()
    subprocess.run([sys.executable, "-m", *command, tmp_path, tree], check=True, env=_offline())
    (wheel,) = tmp_path.glob("*.whl")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("loco_core/")}
    assert packed == files
    assert {"loco_core/py.typed", "loco_core/__init__.pyi"} <= packed


def _offline() -> dict[str, str]:
    return {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
