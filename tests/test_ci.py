"""The public workflows run what a reader runs, and CITATION.cff cites what the book cites."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from pybtex.database import parse_file
from test_readme import environment

from tools.profiles import load_profile

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
STEPS = [
    pytest.param(step, id=f"{name}: {step.get('run') or step['uses']}")
    for name, workflow in WORKFLOWS.items()
    for job in workflow["jobs"].values()
    for step in job["steps"]
]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
BIBLIOGRAPHY = parse_file(ROOT / "book" / "references.bib").entries
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands(workflow: str) -> list[str]:
    jobs = WORKFLOWS[workflow]["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("step", STEPS)
def test_every_step_is_a_make_target_that_exists_or_a_pinned_action(step):
    if "uses" in step:
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
        return
    make, target, *_ = step["run"].split()
    assert make == "make" and "\n" not in step["run"].strip()
    subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True, env=environment()
    )


def test_a_change_passes_what_a_merge_passes_and_then_only_main_is_published():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    merge = [line.strip() for line in lines if line.strip().startswith("make")]
    assert commands("ci") == merge
    publish = WORKFLOWS["ci"]["jobs"]["publish"]
    assert publish["needs"] == "check" and publish["if"] == "github.ref == 'refs/heads/main'"
    (built,) = [
        s for s in WORKFLOWS["ci"]["jobs"]["check"]["steps"] if "pages" in s.get("uses", "")
    ]
    assert (ROOT / built["with"]["path"]).parent.name == "_build"


def test_the_gpu_job_is_started_by_hand_on_a_profile_that_exists_and_needs_a_gpu():
    triggers = WORKFLOWS["gpu"][True]  # YAML 1.1 reads the key `on` as true
    assert list(triggers) == ["workflow_dispatch"]
    default = triggers["workflow_dispatch"]["inputs"]["profile"]["default"]
    assert load_profile(default).device == "cuda"
    assert commands("gpu") == ['make execute PROFILE="$PROFILE"']  # no input in a shell line


def test_workflows_use_a_python_that_the_project_supports_and_may_write_nothing():
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                if "setup-python" in step.get("uses", ""):
                    number = step["with"]["python-version"]
                    assert SpecifierSet(PROJECT["requires-python"]).contains(number)


def test_the_citation_has_what_the_format_asks_for():
    assert CITATION["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(CITATION)
    assert CITATION["version"] == PROJECT["version"] and CITATION["license"] == PROJECT["license"]
    assert CITATION["authors"] == PROJECT["authors"]
    for reference in CITATION["references"]:
        assert {"type", "title", "authors"} <= set(reference)


@pytest.mark.parametrize(
    "key", ["basu2024mechanistic", "basu2024localizing", "nguyen2025unveiling"]
)
def test_the_three_papers_are_cited_as_in_the_bibliography(key):
    entry = BIBLIOGRAPHY[key]
    (cited,) = [r for r in CITATION["references"] if r["title"] == entry.fields["title"]]
    names = [
        (" ".join(p.first_names + p.middle_names), " ".join(p.last_names))
        for p in entry.persons["author"]
    ]
    assert [(a["given-names"], a["family-names"]) for a in cited["authors"]] == names
    assert str(cited["year"]) == entry.fields["year"] == cited["conference"]["name"].split()[-1]
    assert cited["doi"] == entry.fields["note"].replace("arXiv:", "10.48550/arXiv.")


def test_changes_are_listed_by_version_the_newest_first():
    versions = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [tuple(map(int, v.split("."))) for v in versions if v != "Unreleased"]
    assert PROJECT["version"] in versions
    assert released == sorted(released, reverse=True) and len(set(released)) == len(released)
