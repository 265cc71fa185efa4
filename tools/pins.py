"""Write constraints.txt: the versions installed here of all that pyproject.toml asks for.

    python -m tools.pins > constraints.txt

The environment running it must have the `all` extra installed. Only what that extra reaches is
pinned, transitively, for this platform; local build tags (`torch 2.13.0+cpu`) are dropped, so that
a CPU and a GPU wheel match the same pin.
"""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Exact versions of the `all` extra and what it needs. Written by tools/pins.py.\n"


def direct_requirements(root: Path = ROOT) -> dict[str, list[Requirement]]:
    """Requirements of every extra of `root`/pyproject.toml; self-references are left out."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        name: [r for r in map(Requirement, lines) if r.name != project["name"]]
        for name, lines in extras.items()
    }


def closure(requirements: list[Requirement]) -> dict[str, Version]:
    """Installed version of every distribution that `requirements` reach on this platform."""
    found: dict[str, Version] = {}
    visited: set[tuple[str, frozenset[str]]] = set()
    queue = list(requirements)
    while queue:
        requirement = queue.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in visited:
            continue
        visited.add(key)
        dist = distribution(requirement.name)
        found[key[0]] = Version(dist.version)
        for line in dist.requires or ():
            child = Requirement(line)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                queue.append(child)
    return found


def main() -> None:
    """Print the constraints."""
    everything = [r for group in direct_requirements().values() for r in group]
    print(HEADER, end="")
    for name, version in sorted(closure(everything).items()):
        print(f"{name}=={version.public}")


if __name__ == "__main__":
    main()
