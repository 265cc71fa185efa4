"""The book builds without a warning, with no broken link and nothing remote, and is complete.

What a reader sees and does in a browser is in tests/browser.
"""

import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from tools.build_book import build
from tools.linkcheck import check_site
from tools.profiles import ROOT
from tools.published import sliders

MEGABYTE = 1_000_000


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


def article(site: Path, name: str) -> BeautifulSoup:
    """What is ours on a page."""
    page = BeautifulSoup((site / f"{name}.html").read_text(), "html.parser")
    return page.select_one("article.bd-article")


def ours(site: Path) -> list[str]:
    """Names of the pages that were written for this book."""
    found = [*site.glob("book/*.html"), *site.glob("notebooks/**/*.html")]
    return sorted(str(path.relative_to(site).with_suffix("")) for path in found)


def test_every_picture_has_a_text_and_every_figure_a_number(site):
    for name in ours(site):
        page = article(site, name)
        assert [str(i)[:120] for i in page.find_all("img") if not i.get("alt", "").strip()] == []
        for figure in page.select("figure:not(.loco-slider, .loco-pictures)"):
            assert figure.select_one(".caption-number"), (name, figure.get("id"))


def test_the_landing_page_shows_the_slider_of_the_published_run(site):
    published, *_ = sliders(ROOT / "notebooks" / "02_locogen.ipynb")
    (shown,) = article(site, "book/index").select(".loco-slider")
    frames = BeautifulSoup(published, "html.parser").find_all("img")
    assert len(frames) > 1
    assert [i["src"] for i in shown.find_all("img")] == [i["src"] for i in frames]


def test_the_landing_page_has_three_claims_and_three_ways_in(site):
    page = article(site, "book/index")
    assert len(page.select(".claims .sd-card")) == len(page.select(".ways .sd-card")) == 3


def test_every_section_of_methods_with_an_equation_links_to_a_function(site):
    sections = [
        s for s in article(site, "book/methods").select("section section") if s.select(".math")
    ]
    displayed = [s for s in sections if s.select("div.math")]
    assert len(displayed) >= 8
    for section in displayed:
        assert section.select('a.reference[href^="api/"]'), section.get("id")


def test_every_claim_of_the_papers_has_a_status_and_what_was_not_attempted_a_reason(site):
    tables = article(site, "book/paper_versus_here").select("table.versus")
    assert len(tables) == 3
    for table in tables:
        for row in table.select("tbody tr"):
            claim, reported, measured, status = (cell.get_text(" ").strip() for cell in row("td"))
            assert claim and reported and measured and status
            assert not status.startswith("not attempted") or len(status) > 20, claim


def test_provenance_names_every_executed_notebook(site):
    links = {a["href"] for a in article(site, "book/provenance").select("table a")}
    executed = {f"../notebooks/{p.stem}.html" for p in (site / "notebooks").glob("*.html")}
    assert executed and executed <= links


def test_the_whole_book_is_at_most_forty_megabytes(site):
    assert sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) <= 40 * MEGABYTE


def test_a_page_without_equations_loads_none_of_katex(site):
    assert "katex" not in (site / "book" / "index.html").read_text()
    assert "katex.min.js" in (site / "book" / "methods.html").read_text()


def test_a_slider_of_a_notebook_is_found_in_the_order_of_its_outputs():
    found = sliders(ROOT / "notebooks" / "02_locogen.ipynb")
    assert len(found) == 2 and all('<input type="range"' in html for html in found)
    assert sliders(ROOT / "notebooks" / "01_world_and_model.ipynb") == []


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
