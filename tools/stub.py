"""The types of the names under `loco`, from the tables by which they are found.

    python -m tools.stub

writes `loco_core/__init__.pyi`. The names are loaded on first use, which no type checker follows;
the stub imports each from its home, so that a checker knows `loco.localize` with its signature and
refuses a name that is not there.
"""

from pathlib import Path

from tools.house import PACKAGE, ROOT
from tools.public import assigned, parsed

STUB = Path(PACKAGE) / "__init__.pyi"


def stub(root: Path = ROOT) -> str:
    """The text of the stub."""
    top = parsed(root / PACKAGE / "__init__.py")
    homes: dict[str, str] = assigned(top, "_HOME")
    wings: dict[str, str] = assigned(top, "_WINGS")
    lines = ["from ._version import __version__ as __version__"]
    lines += [f"from .{home} import {name} as {name}" for name, home in homes.items()]
    for name, path in wings.items():
        package, _, module = path.rpartition(".")
        lines.append(f"from .{package} import {module} as {name}")
    listed = "".join(f'    "{name}",\n' for name in sorted([*homes, *wings]))
    return "\n".join([*sorted(lines, key=_place), "", f"__all__ = [\n{listed}]\n"])


def _place(line: str) -> tuple[str, ...]:
    """Where an import stands among others: by its module, then by what it takes."""
    _, module, _, *names = line.split(" ")
    return module.lower(), *names


if __name__ == "__main__":
    (ROOT / STUB).write_text(stub(), encoding="utf-8")
    print(STUB)
