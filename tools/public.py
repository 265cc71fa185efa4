"""What the library offers, read from its source without importing it: torch may be missing.

    [name for module in modules() for name in module.names]

Public is what a module's `__all__` lists or, without one, what has no underscore in front.
"""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.profiles import ROOT

PACKAGE = "loco_core"
#: What is left out: commands, which have a help text of their own, old names, and the private.
HIDDEN = ("__init__", "_warn", "_version", "cli", "editing", "worlds.training")

Definition = ast.FunctionDef | ast.ClassDef
#: (module, name) -> the dotted name it is shown under: "loco.trace", or that of its module.
Links = dict[tuple[str, str], str]


@dataclass(frozen=True)
class Module:
    """A parsed module: its name below the package, its path below the root, and its tree.

    constants: documented by comments `#:` above the assignment, by name.
    """

    name: str
    path: Path
    tree: ast.Module
    constants: dict[str, tuple[ast.AnnAssign | ast.Assign, str]]

    @property
    def definitions(self) -> dict[str, Definition]:
        """The public functions and classes: those in `__all__` if there is one."""
        exported = assigned(self.tree, "__all__")
        nodes = [node for node in self.tree.body if isinstance(node, Definition)]
        return {
            node.name: node
            for node in nodes
            if (not node.name.startswith("_") if exported is None else node.name in exported)
        }

    @property
    def names(self) -> list[str]:
        """Everything that the reference shows of this module."""
        return [*self.constants, *self.definitions]

    @property
    def home(self) -> str:
        """The dotted name to import it by."""
        return f"{PACKAGE}.{self.name}".removesuffix(".__init__")


def read_module(path: Path, root: Path = ROOT) -> Module:
    """Parse the module at `path`, which lies in the package below `root`."""
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    constants = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        above = node.lineno - 1
        while above and lines[above - 1].startswith("#:"):
            above -= 1
        name, comment = ast.unparse(target), lines[above : node.lineno - 1]
        if comment and not name.startswith("_"):
            constants[name] = node, "\n".join(line.removeprefix("#: ") for line in comment)
    name = ".".join(path.relative_to(root / PACKAGE).with_suffix("").parts)
    return Module(name, path.relative_to(root), tree, constants)


def parsed(path: Path) -> ast.Module:
    """The tree of a source file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def assigned(tree: ast.Module, name: str) -> Any:
    """The literal that a module assigns to `name`, or None if it does not."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            try:
                return ast.literal_eval(node.value)
            except ValueError:
                return None
    return None


def modules(root: Path = ROOT) -> list[Module]:
    """Every module of the package but the hidden ones."""
    found = [read_module(path, root) for path in sorted((root / PACKAGE).rglob("*.py"))]
    return [
        module
        for module in found
        if not any(f"{module.name}.".startswith(f"{hidden}.") for hidden in HIDDEN)
    ]


def public_names(known: list[Module], root: Path = ROOT) -> Links:
    """What users reach under `loco`, by where it is defined: the table of `loco_core/__init__.py`,
    then the `__all__` of the wings."""
    top = parsed(root / PACKAGE / "__init__.py")
    shown = [(home, name, f"loco.{name}") for name, home in assigned(top, "_HOME").items()]
    wings: dict[str, str] = {}
    for name, home in assigned(top, "_WINGS").items():
        if home not in wings or home.endswith(name):  # not the name it had in 0.3
            wings[home] = name
    for module in known:
        home, _, init = module.name.rpartition(".")
        if init == "__init__":
            wing, exported = wings.get(home, home), assigned(module.tree, "__all__") or ()
            shown += [(home, name, f"loco.{wing}.{name}") for name in exported]
    found: Links = {}
    for home, name, path in shown:
        wing = home.split(".")[0]
        near = [m for m in known if name in m.names and f"{m.name}.".startswith(f"{wing}.")]
        near.sort(key=lambda module: module.name != home)  # the table may name one that imports it
        for module in near[:1]:
            found.setdefault((module.name, name), path)
    return found
