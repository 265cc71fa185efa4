"""What the theme and Sphinx are told to do otherwise: a small extension, named in _config.yml.

The theme brings its icons twice, as a font and as a script of 1.5 MB; the font is enough. A page
without an equation loads nothing of KaTeX. The bibliography says of its list that it has items.
"""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

ICONS = Path("_static") / "scripts" / "fontawesome.js"


def without_equations(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Drop the scripts and styles of KaTeX from the context of a page that has no equation."""
    if doctree is not None and any(doctree.findall(_is_equation)):
        return
    for kind in ("script_files", "css_files"):
        context[kind][:] = [file for file in context[kind] if "katex" not in str(file.filename)]
    context["script_files"][:] = [
        file for file in context["script_files"] if "auto-render" not in str(file.filename)
    ]


def with_list_items(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Give what docutils writes in a list of works the role that a list asks of its children."""
    body = context.get("body", "")
    context["body"] = body.replace('role="doc-biblioentry"', 'role="listitem"')


def _is_equation(node: nodes.Node) -> bool:
    return isinstance(node, nodes.math | nodes.math_block)


def without_icon_script(app: Sphinx, error: Exception | None) -> None:
    """Leave the script of icons empty; FileNotFoundError if the theme has moved it."""
    script = Path(app.outdir) / ICONS
    if error is None and app.builder.format == "html":
        if not script.is_file():
            raise FileNotFoundError(f"{script}: the theme has moved it; see tools/theme.py")
        script.write_text("/* The font has the icons: tools/theme.py */\n")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect all three."""
    app.connect("html-page-context", without_equations)
    app.connect("html-page-context", with_list_items)
    app.connect("build-finished", without_icon_script)
    return {"parallel_read_safe": True}
