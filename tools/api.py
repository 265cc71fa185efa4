"""Write the API reference into the book, one page a wing, from the docstrings.

    python -m tools.api

Source is parsed, never imported, so that the book builds where torch is not installed. The pages
(`book/api/*.md`, not under version control) are written again by every build of the book and so
are never stale. On a page stand the modules of a wing, those with names under `loco.` first; in a
module every public name: its signature, its docstring, and its source to unfold.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from loco_core.files import atomic_write
from tools.profiles import ROOT
from tools.public import Definition, Links, Module, modules, public_names

FOLDER = Path("book") / "api"

#: Page -> its title and its modules, a package with all that lies directly in it.
PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "know": ("Know a pipeline", ("families", "zoo", "concepts")),
    "touch": ("Touch it", ("interventions",)),
    "paint": ("Paint", ("painting",)),
    "judge": ("Judge a picture", ("judging", "statistics")),
    "find": ("Find the layers", ("localization",)),
    "edits": ("What a change is", ("edits",)),
    "closed": ("Change by an equation", ("closed_form",)),
    "inside": ("Single out neurons and weights", ("inside",)),
    "world": ("Worlds", ("worlds",)),
    "study": ("Study", ("studies",)),
    "show": ("Show it", ("display",)),
    "keep": (
        "Files, results and progress",
        ("files", "records", "record_file", "codec", "digests", "_progress"),
    ),
}
INTRODUCTION = """\
After `import loco_core as loco` every name below is there. The pages that follow stand in the order
of the method, know, touch, paint, judge, find, change, study, show; they hold these names and the
modules behind them. Every text is the docstring of what it describes, with the source beneath it to
unfold."""

BREAK, BOLD = "\x01", "\x02"  # markup of ours, put in before what looks like markup is escaped
CODE_SPAN = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)


def page_of(module: str) -> str | None:
    """The page a module is on, or None."""
    for page, (_, homes) in PAGES.items():
        if any(module == home or module.startswith(f"{home}.") for home in homes):
            return page
    return None


def pages(root: Path = ROOT) -> dict[str, str]:
    """The Markdown of every page, by file name."""
    known = modules(root)
    public = public_names(known, root)
    links = {(m.name, name): f"{m.home}.{name}" for m in known for name in m.names} | public
    found = {"index.md": _index(known, public)}
    first = {name for name, _ in public}
    for page, (title, _) in PAGES.items():
        own = [module for module in known if page_of(module.name) == page]
        own.sort(key=lambda m: (not m.name.endswith("__init__"), m.name not in first))
        parts = [f"# {title}", *(part for module in own for part in _section(module, links))]
        found[f"{page}.md"] = "\n\n".join(parts) + "\n"
    return found


def _index(known: list[Module], public: Links) -> str:
    """The names under `loco.`, each with its page and what it is."""
    parts = ["# The names under `loco`", INTRODUCTION]
    for page, (title, _) in PAGES.items():
        rows = [
            f"| {{py:obj}}`{public[module.name, name]}` | {_summary(module, name)} |"
            for module in known
            for name in module.names
            if page_of(module.name) == page and (module.name, name) in public
        ]
        if rows:
            parts += [f"## [{title}]({page}.md)", "\n".join(["| name | |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _summary(module: Module, name: str) -> str:
    """The first sentence of the docstring of a name."""
    if name in module.constants:
        docstring = module.constants[name][1]
    else:
        docstring = ast.get_docstring(module.definitions[name]) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    return prose(re.split(r"(?<=[^.]\.)\s", first)[0].rstrip("."), module.name, {})


def _section(module: Module, links: Links) -> Iterator[str]:
    """A module: its docstring, then its public names in the order of the source."""
    if not module.name.endswith("__init__"):
        yield f"## {module.name}"
    yield f"```{{py:currentmodule}} {module.home}\n```"
    yield text(ast.get_docstring(module.tree) or "", module.name, links)
    for name, (assignment, comment) in module.constants.items():
        head = _head("data", module, name, links)
        if isinstance(assignment, ast.AnnAssign):
            head += f"\n:type: {ast.unparse(assignment.annotation)}"
        yield "\n\n".join(
            [head, text(comment, module.name, links), _source(module, [assignment]), ":::::"]
        )
    for node in module.definitions.values():
        yield _entry(module, node, links)


def _head(kind: str, module: Module, name: str, links: Links, arguments: str = "") -> str:
    """The opening of a directive of Sphinx's Python domain."""
    path = links[module.name, name]
    home = "" if path.startswith("loco.") else module.home
    shown = name if home else path
    return f":::::{{py:{kind}}} {shown}{arguments}\n:module: {home}".rstrip()


def _entry(module: Module, node: Definition, links: Links) -> str:
    """A function, or a class with its documented public methods."""
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    parts = [
        _head(kind, module, node.name, links, signature(node)),
        text(ast.get_docstring(node) or "", module.name, links, parameters(node)),
    ]
    for method in node.body if isinstance(node, ast.ClassDef) else ():
        if not isinstance(method, ast.FunctionDef) or method.name.startswith("_"):
            continue
        if documented := ast.get_docstring(method):
            shown = text(documented, module.name, links, parameters(method))
            parts += [_method_head(method), shown, "::::"]
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return "\n\n".join([*parts, _source(module, body or [node]), ":::::"])


def _method_head(method: ast.FunctionDef) -> str:
    marks = {ast.unparse(mark) for mark in method.decorator_list}
    if marks & {"property", "cached_property"}:
        kind = f"\n:type: {ast.unparse(method.returns)}" if method.returns else ""
        return f"::::{{py:property}} {method.name}{kind}"
    options = [mark for mark in ("abstractmethod", "classmethod", "staticmethod") if mark in marks]
    arguments = signature(method, bound="staticmethod" not in marks)
    return "\n".join(
        [f"::::{{py:method}} {method.name}{arguments}", *(f":{option}:" for option in options)]
    )


def _source(module: Module, body: Sequence[ast.stmt]) -> str:
    """The code of `body` to unfold; a docstring before it is on the page already."""
    marks = getattr(body[0], "decorator_list", ())
    start = min([body[0].lineno, *(mark.lineno for mark in marks)])
    path = module.path.as_posix()
    return "\n".join(
        [
            f":::{{dropdown}} Source: `{path}`, line {start}",
            f"```{{literalinclude}} /{path}",
            ":language: python",
            ":lineno-match:",
            f":lines: {start}-{body[-1].end_lineno}",
            "```",
            ":::",
        ]
    )


def signature(node: Definition, bound: bool = False) -> str:
    """`(pipe: Any, lam: float = 0.01) -> Edit`; of a dataclass, its fields."""
    if isinstance(node, ast.FunctionDef):
        arguments = node.args
        if bound:
            arguments = ast.arguments(**{**vars(arguments), "args": arguments.args[1:]})
        return f"({ast.unparse(arguments)})" + (
            f" -> {ast.unparse(node.returns)}" if node.returns else ""
        )
    if _is_dataclass(node):
        return f"({', '.join(fields(node).values())})"
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return signature(method, bound=True).removesuffix(" -> None")
    return ""


def fields(node: ast.ClassDef) -> dict[str, str]:
    """The fields of a dataclass as arguments, by name, in their order; first those it inherits."""
    found: dict[str, str] = {}
    for base in node.bases:
        inherited = _classes().get(ast.unparse(base).partition("[")[0])
        if inherited is not None and _is_dataclass(inherited):
            found |= fields(inherited)
    own = [x for x in node.body if isinstance(x, ast.AnnAssign)]
    own = [x for x in own if not ast.unparse(x.annotation).startswith("ClassVar")]
    return found | {ast.unparse(x.target): _field(x) for x in own}


@cache
def _classes() -> dict[str, ast.ClassDef]:
    """The public classes of the package, by name."""
    nodes = (node for module in modules() for node in module.definitions.values())
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(mark) for mark in node.decorator_list)


def _field(node: ast.AnnAssign) -> str:
    default = "" if node.value is None else ast.unparse(node.value)
    if default.startswith("field("):
        default = "..." if "default" in default else ""
    return (
        ast.unparse(node.target)
        + f": {ast.unparse(node.annotation)}"
        + (default and f" = {default}")
    )


def parameters(node: Definition) -> list[str]:
    """The names of the arguments of a function, or of the fields of a class."""
    if isinstance(node, ast.ClassDef):
        return [ast.unparse(x.target) for x in node.body if isinstance(x, ast.AnnAssign)]
    return [argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]]


def text(docstring: str, module: str, links: Links, names: Sequence[str] = ()) -> str:
    """A docstring as Markdown: prose, examples as Python, other indented lines as they stand.

    names: parameters; where the text turns to one ("lam: ..."), a line begins with it, in bold.
    """
    paragraphs: list[str] = []
    for part in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if part.startswith("    ") and paragraphs and paragraphs[-1].startswith("    "):
            paragraphs[-1] += f"\n\n{part}"
        else:
            paragraphs.append(part)
    return "\n\n".join(_paragraph(part, module, links, names) for part in paragraphs)


def _paragraph(part: str, module: str, links: Links, names: Sequence[str]) -> str:
    code = textwrap.dedent(part)
    if code.startswith(">>>"):
        return f"```pycon\n{code}\n```"
    try:
        ast.parse(code)
    except SyntaxError:
        if part.startswith("    "):
            return f"```text\n{code}\n```"
        return prose(part, module, links, names)
    return f"```python\n{code}\n```"


def prose(part: str, module: str, links: Links, names: Sequence[str] = ()) -> str:
    """Text with what Markdown would read as markup escaped, and names in backticks linked."""
    part = re.sub(r"(?<=\.)\s(?=(?:Raises|Warns)\b)", BREAK, part)
    if names:
        one = f"(?:{'|'.join(names)})"
        turn = rf"(?:^|(?<=[.;])\s|\n)({one}(?:, {one})*):(?=\s)"
        part = re.sub(turn, rf"{BREAK}{BOLD}\1{BOLD}:", part).removeprefix(BREAK)
    pieces = CODE_SPAN.split(part)
    plain = [re.sub(r"([\\*_<>\[\]{}$|~#^])", r"\\\1", piece) for piece in pieces[::2]]
    spans = [_span(piece.strip("`"), module, links) for piece in pieces[1::2]]
    whole = "".join(a + b for a, b in zip(plain, [*spans, ""], strict=True))
    return whole.replace(BREAK, "\\\n").replace(BOLD, "**")


def _span(code: str, module: str, links: Links) -> str:
    """A code span; a link if it names something that the reference shows."""
    wing, _, name = code.rpartition(".")
    for (home, known), target in links.items():
        here = not wing and home == module or wing and home.endswith(wing)
        if (known == name and here) or target == code or target == f"loco.{code}":
            return f"{{py:obj}}`{code} <{target}>`"
    return f"`{code}`"


def write(root: Path = ROOT) -> list[Path]:
    """Write the pages that changed, each whole or not at all, and return the paths of all."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    made = {folder / name: content for name, content in pages(root).items()}
    for path, content in made.items():
        if path.exists() and path.read_text(encoding="utf-8") == content:
            continue
        atomic_write(path, content.encode())
    for stale in set(folder.glob("*.md")) - set(made):
        stale.unlink()
    return list(made)


if __name__ == "__main__":
    for written in write():
        print(written.relative_to(ROOT))
