"""A reader's browser on the built book, from the disk: `make test-book`."""

from pathlib import Path

import pytest

from tools.browser import launched
from tools.profiles import ROOT
from tools.published import MARK


def pytest_addoption(parser):
    parser.addoption("--site", type=Path, default=ROOT / "_build" / "html")
    parser.addoption("--screenshots", type=Path, default=ROOT / "_build" / "screenshots")


def pages(site: Path) -> list[str]:
    """Every page of the site, as its path without .html."""
    found = [*site.glob("book/**/*.html"), *site.glob("notebooks/**/*.html")]
    return sorted(str(path.relative_to(site).with_suffix("")) for path in found)


def pytest_generate_tests(metafunc):
    site = metafunc.config.getoption("--site")
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", pages(site))
    if "slider_page" in metafunc.fixturenames:
        html = {name: (site / f"{name}.html").read_text() for name in pages(site)}
        metafunc.parametrize("slider_page", [name for name in html if MARK in html[name]])


@pytest.fixture(scope="session")
def site(pytestconfig) -> Path:
    folder = pytestconfig.getoption("--site").resolve()
    assert (folder / "index.html").is_file(), f"no book in {folder}: `make html` builds it"
    return folder


@pytest.fixture(scope="session")
def screenshots(pytestconfig) -> Path:
    folder = pytestconfig.getoption("--screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def browser():
    with launched() as chromium:
        yield chromium


class Visit:
    """Opens pages of the site as their reader would, and keeps what went wrong on the way."""

    def __init__(self, browser, site: Path, **settings):
        self.site, self.requests, self.complaints = site, [], []
        self.context = browser.new_context(**settings)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(120_000)  # milliseconds; a machine may be busy
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("console", self._heard)

    def _heard(self, message) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def open(self, name: str, query: str = ""):
        """The tab, with the page of that name loaded."""
        self.tab.goto(f"{(self.site / name).as_uri()}.html{query}", wait_until="load")
        return self.tab

    @property
    def remote(self) -> list[str]:
        """Addresses asked for that are not files of the site."""
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]


@pytest.fixture(scope="session")
def visits(browser, site):
    """Visit(...) of this browser and site; every one is closed in the end."""
    made = []

    def visit(**settings) -> Visit:
        made.append(Visit(browser, site, **settings))
        return made[-1]

    yield visit
    for one in made:
        one.context.close()


@pytest.fixture(scope="session")
def desktop(visits):
    return visits(viewport={"width": 1250, "height": 900}, color_scheme="light")


@pytest.fixture(scope="session")
def phone(visits):
    return visits(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)


@pytest.fixture(scope="session")
def night(visits):
    return visits(viewport={"width": 1250, "height": 900}, color_scheme="dark")
