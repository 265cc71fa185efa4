"""Check a built site: every internal link, anchor and image exists, and no asset is remote.

    python -m tools.linkcheck _build/html

A link a reader may follow (`<a href>`) can lead anywhere; what a browser fetches by itself
(scripts, styles, fonts, images, frames) must lie in the site, so that the book opens offline.
"""

import argparse
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ASSET_ATTRIBUTES = {"src", "srcset", "poster", "data", "xlink:href"}
ASSET_RELATIONS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "manifest"}
CSS_URL = re.compile(r"url\(\s*['\"]?([^'\")]+)['\"]?\s*\)|@import\s+['\"]([^'\"]+)['\"]")
# What a script would fetch: a quoted remote address of a script, style or font.
SCRIPT_FETCH = re.compile(r"['\"](https?://[^'\"\s]+\.(?:m?js|css|woff2?|wasm)(?:\?[^'\"]*)?)['\"]")


@dataclass
class Page(HTMLParser):
    """Links, assets and anchors of one HTML page."""

    links: list[str] = field(default_factory=list)
    assets: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    _inside: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sort each attribute into links, assets or anchors."""
        given = {key: value or "" for key, value in attrs}
        self._inside = tag
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        if tag in ("a", "area") and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and set(given.get("rel", "").lower().split()) & ASSET_RELATIONS:
            self.assets.append(given.get("href", ""))
        for key in ASSET_ATTRIBUTES & set(given):
            pieces = given[key].split(",") if key == "srcset" else [given[key]]
            self.assets += [piece.split()[0] for piece in pieces if piece.strip()]
        self.assets += css_targets(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        """Look into inline styles and scripts."""
        if self._inside == "style":
            self.assets += css_targets(data)
        if self._inside == "script":
            self.assets += SCRIPT_FETCH.findall(data)

    def handle_endtag(self, tag: str) -> None:
        """Leave an inline style or script."""
        self._inside = ""


def css_targets(text: str) -> list[str]:
    """Addresses a style sheet fetches."""
    return [a or b for a, b in CSS_URL.findall(text)]


def check_site(site: Path) -> list[str]:
    """Problems of the site under folder `site`, one line each; empty if it is sound."""
    # The theme leaves its Jinja templates in _static: no browser opens these.
    found = [p for p in sorted(site.rglob("*.html")) if "_static" not in p.relative_to(site).parts]
    if not found:
        raise ValueError(f"no HTML page under {site}: build the book first with `make book`")
    pages: dict[Path, Page] = {}
    for path in found:
        pages[path.resolve()] = page = Page()
        page.feed(path.read_text(encoding="utf-8"))
    problems: list[str] = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        problems += [f"{name}: {p}" for asset in page.assets if (p := _asset(path, asset))]
        problems += [f"{name}: {p}" for link in page.links if (p := _link(path, link, pages))]
    for path in sorted(site.rglob("*.css")):
        targets = css_targets(path.read_text(encoding="utf-8"))
        problems += [f"{path.relative_to(site)}: {p}" for t in targets if (p := _asset(path, t))]
    for path in sorted(site.rglob("*.js")):
        remote = SCRIPT_FETCH.findall(path.read_text(encoding="utf-8"))
        problems += [f"{path.relative_to(site)}: remote asset {url}" for url in remote]
    return sorted(set(problems))


def _asset(origin: Path, address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme == "data" or (not parts.path and not parts.netloc):
        return ""
    if parts.scheme or parts.netloc:
        return f"remote asset {address}"
    return "" if (origin.parent / unquote(parts.path)).is_file() else f"missing asset {address}"


def _link(origin: Path, address: str, pages: dict[Path, Page]) -> str:
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return ""
    target = (origin.parent / unquote(parts.path)).resolve() if parts.path else origin
    if not target.exists():
        return f"broken link {address}"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return f"missing anchor {address}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Print the problems of a site; 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("site", type=Path)
    problems = check_site(parser.parse_args(arguments).site)
    for problem in problems:
        print(problem)
    return bool(problems)


if __name__ == "__main__":
    raise SystemExit(main())
