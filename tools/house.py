"""The plan of the house, drawn from its source: who imports whom, and what breaks the rules.

    python -m tools.house

prints the table of the wings, from the ground up, for CONTRIBUTING. Source is parsed, never
imported. The rules: an arrow runs from a wing to one below it (`ORDER`), no modules import each
other in a circle, an import of the package stands at the top of a module and nowhere else, and a
module has at most `LONGEST` lines.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "loco_core"
ROOT = Path(__file__).resolve().parent.parent
LONGEST = 300

#: Wings and single rooms, from the ground up. "" is `loco_core/__init__.py`, through which the
#: command line reaches all below it.
ORDER = (
    "_version",
    "_progress",
    "_warn",
    "files",
    "statistics",
    "concepts",
    "codec",
    "digests",
    "record_file",
    "records",
    "zoo",
    "families",
    "interventions",
    "painting",
    "judging",
    "localization",
    "edits",
    "closed_form",
    "inside",
    "editing",
    "worlds",
    "studies",
    "display",
    "",
    "cli",
)
#: Neighbours that know nothing of each other, though one stands above: what finds layers, and what
#: a change is.
APART = {("edits", "localization")}
#: What a call that imports the package speaks of: its name, or a place beside the module.
OURS = (PACKAGE, "__name__", "__package__", "'.")


@dataclass(frozen=True)
class Arrow:
    """An import of the package by the package: from module to module, names below the package.

    hidden: it does not stand at the top of its module.
    """

    source: str
    target: str
    line: int
    hidden: bool

    def __str__(self) -> str:
        return f"{_dotted(self.source)}, line {self.line}: imports {_dotted(self.target)}"


@dataclass(frozen=True)
class House:
    """The package below `root`, as it stands."""

    root: Path = ROOT

    @cached_property
    def modules(self) -> dict[str, ast.Module]:
        """Name below the package ("display.live.jobs", of a package its own) -> its tree."""
        return {_name(path, self.root): _parsed(path.read_text("utf-8")) for path in self._paths}

    @cached_property
    def arrows(self) -> list[Arrow]:
        """Every import of the package by itself, in the order of the modules."""
        return [arrow for name in self.modules for arrow in self._from(name)]

    def faults(self) -> list[str]:
        """What breaks a rule, a line each; empty for a house in order."""
        return [*self.strangers(), *self.upward(), *self.circles(), *self.hidden(), *self.long()]

    def strangers(self) -> list[str]:
        """Wings that have no place in `ORDER`."""
        wings = dict.fromkeys(_wing(name) for name in self.modules)
        return [f"{_dotted(x)} has no place in tools.house.ORDER" for x in wings if x not in ORDER]

    def upward(self) -> list[str]:
        """Arrows to a wing above, or to a neighbour that stands apart."""
        known = [arrow for arrow in self.arrows if {*_wings(arrow)} <= {*ORDER}]
        up = [x for x in known if ORDER.index(_wing(x.target)) > ORDER.index(_wing(x.source))]
        apart = [arrow for arrow in known if _wings(arrow) in APART]
        return [f"{arrow}, which stands above it" for arrow in up] + [
            f"{arrow}, which stands apart" for arrow in apart
        ]

    def circles(self) -> list[str]:
        """One circle of modules that import each other, if there is any."""
        below: dict[str, set[str]] = {name: set() for name in self.modules}
        for arrow in self.arrows:
            below[arrow.source].add(arrow.target)
        try:
            TopologicalSorter(below).prepare()
        except CycleError as error:
            return [f"a circle: {' <- '.join(map(_dotted, error.args[1]))}"]
        return []

    def hidden(self) -> list[str]:
        """Imports of the package in a function, a class, or under a condition."""
        return [f"{arrow}, but not at its top" for arrow in self.arrows if arrow.hidden] + [
            f"{_dotted(name)}, line {call.lineno}: {ast.unparse(call)} hides what it imports"
            for name, tree in self.modules.items()
            if name  # the names under `loco` are handed on by one
            for call in _calls_of_functions(tree)
            if ast.unparse(call.func).rpartition(".")[2] in ("import_module", "__import__")
            and any(words in ast.unparse(call) for words in OURS)
        ]

    def long(self) -> list[str]:
        """Modules of more than `LONGEST` lines."""
        counts = {path: len(path.read_text("utf-8").splitlines()) for path in self._paths}
        return [
            f"{_dotted(_name(path, self.root))} has {count} lines, more than {LONGEST}"
            for path, count in counts.items()
            if count > LONGEST
        ]

    def table(self) -> str:
        """Markdown: each wing, from the ground up, and the wings that it imports."""
        rows = []
        for wing in filter(None, ORDER):
            below = {_wing(arrow.target) for arrow in self.arrows if _wing(arrow.source) == wing}
            shown = [f"`{x or PACKAGE}`" for x in ORDER if x in below - {wing}]
            rows.append(f"| `{wing}` | {', '.join(shown)} |")
        return "\n".join(["| wing | imports |", "|---|---|", *rows])

    @cached_property
    def _paths(self) -> list[Path]:
        return sorted((self.root / PACKAGE).rglob("*.py"))

    def _from(self, source: str) -> Iterator[Arrow]:
        """The arrows of one module."""
        tree = self.modules[source]
        top = set(map(id, tree.body))
        for node in ast.walk(tree):
            hidden = id(node) not in top
            for target in _imported(node, self._package_of(source)):
                found = self._module(target)
                if found is not None and found != source:
                    yield Arrow(source, found, getattr(node, "lineno", 0), hidden)

    def _package_of(self, module: str) -> str:
        """The dotted name of the package that a module's relative imports begin from."""
        path = self.root / PACKAGE / Path(*module.split("."), "__init__.py")
        return _dotted(module if path.exists() else module.rpartition(".")[0])

    def _module(self, dotted: str) -> str | None:
        """The module in which a dotted name is found, or None if it is not the package's."""
        while dotted:
            name = "" if dotted == PACKAGE else dotted.removeprefix(f"{PACKAGE}.")
            if name in self.modules and (name == "" or dotted.startswith(f"{PACKAGE}.")):
                return name
            dotted = dotted.rpartition(".")[0]
        return None


@cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _imported(node: ast.AST, package: str) -> list[str]:
    """The dotted names that a node imports, if it is an import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        home = ".".join([*base, *([node.module] if node.module else [])])
        return [f"{home}.{alias.name}" for alias in node.names]
    return []


def _calls_of_functions(tree: ast.Module) -> list[ast.Call]:
    """The calls that stand in a function, each once."""
    functions = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef | ast.Lambda)]
    calls = [x for f in functions for x in ast.walk(f) if isinstance(x, ast.Call)]
    return list({id(call): call for call in calls}.values())


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _dotted(module: str) -> str:
    return f"{PACKAGE}.{module}" if module else PACKAGE


def _wing(module: str) -> str:
    return module.partition(".")[0]


def _wings(arrow: Arrow) -> tuple[str, str]:
    return _wing(arrow.source), _wing(arrow.target)


if __name__ == "__main__":
    house = House()
    print(house.table())
    if found := house.faults():
        sys.exit("\n".join(["", *found]))
