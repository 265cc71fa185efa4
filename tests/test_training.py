"""Claims about the command that trains the minis; run for real, on a handful of drawings."""

import json
import subprocess
import sys

import pytest

import loco_core as loco

COMMAND = [sys.executable, "-m", "loco_core.shapeland.train"]


def run(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options
    )


@pytest.mark.slow
def test_the_command_trains_measures_and_resumes_a_mini(tmp_path):
    settings = ["--count", 64, "--captions", 2, "--folder", tmp_path, "--out", tmp_path / "minis"]
    first = run("mini-sd", "--steps", 2, *settings)
    assert first.returncode == 0, first.stderr
    again = run("mini-sd", "--steps", 3, "--resume", *settings)
    assert again.returncode == 0, again.stderr

    folder = tmp_path / "minis" / "mini-sd"
    record = json.loads((folder / "truth.json").read_text())
    assert record["planted"] == loco.shapeland.truth("mini-sd")
    assert set(record["use"]["style"]["layers"]) == {"8", "9"}
    assert "planted" in (folder / "README.md").read_text()
    assert not any("_name_or_path" in path.read_text() for path in folder.glob("*/config.json"))
    image = loco.generate(loco.load(folder), ["a red star"], steps=2)
    assert image.shape == (1, 1, 3, 64, 64)


def test_an_unknown_mini_is_refused_with_the_known_ones():
    result = run("mini-xl")
    assert result.returncode == 2
    assert "mini-xl" in result.stderr and "mini-sd" in result.stderr


def test_a_missing_gpu_is_said():
    result = run("mini-sd", "--device", "cuda")
    assert result.returncode == 2 and "no GPU" in result.stderr
