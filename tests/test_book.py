"""The book builds without a warning, with no broken link and nothing remote."""

import re
from pathlib import Path

import pytest

from tools.build_book import build
from tools.linkcheck import check_site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("book")).parent


def test_the_book_builds_with_warnings_fatal(site):
    assert (site / "index.html").is_file()
    assert len(list((site / "notebooks").glob("*.html"))) >= 3


def test_no_link_of_the_book_is_broken_and_no_asset_is_remote(site):
    assert check_site(site) == []


def test_the_book_has_one_search_bar_and_no_leftover_glue(site):
    for path in [*site.glob("book/*.html"), *site.glob("notebooks/*.html")]:
        text = path.read_text()
        assert text.count('class="btn search-button-field') == 1, path
        assert "{glue" not in text, path


def test_equations_are_rendered_by_what_the_site_brings(site):
    text = (site / "book" / "methods.html").read_text()
    assert text.count('<div class="math') >= 6
    assert "katex.min.js" in text and not re.search(r'src="[^"]*mathjax', text, re.IGNORECASE)
    assert list((site / "_static" / "katex" / "fonts").glob("*.woff2"))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<script src="https://cdn.example/x.js"></script>', "remote asset https://cdn.example"),
        ('<link rel="stylesheet" href="//cdn.example/x.css">', "remote asset //cdn.example"),
        ('<script>fetch("https://cdn.example/x.js")</script>', "remote asset https://cdn.example"),
        ('<style>@import "https://cdn.example/x.css";</style>', "remote asset"),
        ('<p style="background:url(https://cdn.example/x.png)">', "remote asset"),
        ('<img src="missing.png" alt="x">', "missing asset missing.png"),
        ('<img srcset="missing.png 2x" alt="x">', "missing asset missing.png"),
        ('<a href="nowhere.html">x</a>', "broken link nowhere.html"),
        ('<a href="#nowhere">x</a>', "missing anchor #nowhere"),
        ('<a href="other.html#nowhere">x</a>', "missing anchor other.html#nowhere"),
    ],
)
def test_linkcheck_finds(body, problem, tmp_path):
    (tmp_path / "other.html").write_text('<p id="here">')
    (tmp_path / "index.html").write_text(f"<html>{body}</html>")
    (found,) = check_site(tmp_path)
    assert problem in found and found.startswith("index.html: ")


def test_linkcheck_lets_sound_pages_pass(tmp_path):
    (tmp_path / "other.html").write_text('<p id="here">')
    (tmp_path / "index.html").write_text(
        '<a href="https://arxiv.org">paper</a><a href="other.html#here">x</a>'
        '<img src="data:image/png;base64,AA==" alt="x"><a href="">top</a>'
    )
    assert check_site(tmp_path) == []


def test_linkcheck_refuses_an_empty_site(tmp_path):
    with pytest.raises(ValueError, match="build the book first"):
        check_site(tmp_path)
