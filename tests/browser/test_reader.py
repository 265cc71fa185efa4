"""What a reader of the built book sees and does, in a real headless Chromium, from the disk."""

import io
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

MEGABYTE = 1_000_000
LANDING = "book/index"
ARTICLE = "article.bd-article"
PICTURES = f"{ARTICLE} img"


def keep(tab, folder, name: str, kind: str) -> None:
    """A screenshot of the whole page, in a window as tall as it."""
    width, height = tab.viewport_size["width"], tab.viewport_size["height"]
    whole = tab.evaluate("document.documentElement.scrollHeight")
    tab.set_viewport_size({"width": width, "height": min(whole, 16_000)})
    tab.screenshot(path=folder / f"{name.replace('/', '_')}_{kind}.png")
    tab.set_viewport_size({"width": width, "height": height})


def shown(slider) -> list[str]:
    """Labels of the images of a slider that are visible."""
    return [image.get_attribute("data-label") for image in slider.locator("img:visible").all()]


def test_a_page_opens_without_a_complaint_or_a_remote_request(name, desktop, screenshots):
    desktop.complaints.clear()
    desktop.requests.clear()
    tab = desktop.open(name)
    tab.wait_for_function("!document.querySelector('article .math:not(:has(.katex))')")
    keep(tab, screenshots, name, "desktop")
    assert desktop.complaints == []
    assert desktop.remote == []


def test_a_page_fits_a_phone_without_scrolling_sideways(name, phone, screenshots):
    tab = phone.open(name)
    keep(tab, screenshots, name, "phone")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_dark_mode_leaves_the_colors_of_pictures_alone(name, night, screenshots):
    tab = night.open(name)
    keep(tab, screenshots, name, "dark")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    filters = tab.eval_on_selector_all(PICTURES, "es => es.map(e => getComputedStyle(e).filter)")
    assert set(filters) <= {"none"}


def test_axe_finds_nothing_serious_in_our_content(name, desktop):
    tab = desktop.open(name)
    found = Axe().run(tab, context=ARTICLE, options={"resultTypes": ["violations"]}).response
    serious = [
        (rule["id"], node["html"][:200])
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]
    assert serious == []


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_axe_finds_nothing_serious_on_the_landing_page(mode, desktop, night):
    tab = {"light": desktop, "dark": night}[mode].open(LANDING)
    found = Axe().run(tab, context=ARTICLE).response["violations"]
    assert [rule["id"] for rule in found if rule["impact"] in ("serious", "critical")] == []


def test_a_picture_is_the_same_pixels_in_the_dark(desktop, night):
    seen = []
    for visit in (desktop, night):
        png = visit.open(LANDING).locator(f"{PICTURES}:visible").first.screenshot()
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        seen.append(pixels[2:-2, 2:-2])  # the rim may hold a part of the page
    assert seen[0].std() > 0 and (seen[0] == seen[1]).all()


def test_every_slider_moves_by_its_arrow_keys(slider_page, desktop):
    tab = desktop.open(slider_page)
    for slider in tab.locator(".loco-slider").all():
        handle = slider.locator("input[type=range]")
        last = int(handle.get_attribute("max"))
        names = [image.get_attribute("data-label") for image in slider.locator("img").all()]
        handle.focus()
        tab.keyboard.press("Home")
        for at in range(last + 1):
            assert shown(slider) == [names[at]]
            assert slider.locator("output").inner_text() == names[at]
            assert handle.get_attribute("aria-valuetext") == names[at] or at == 0
            tab.keyboard.press("ArrowRight")
        assert shown(slider) == [names[last]]


def test_every_slider_moves_by_mouse_without_a_network(slider_page, visits):
    visit = visits(viewport={"width": 1250, "height": 900}, offline=True)
    tab = visit.open(slider_page)
    for slider in tab.locator(".loco-slider").all():
        handle = slider.locator("input[type=range]")
        handle.scroll_into_view_if_needed()
        box = handle.bounding_box()
        middle = box["y"] + box["height"] / 2
        handle.focus()
        tab.keyboard.press("Home")
        first = shown(slider)
        tab.mouse.move(box["x"] + 6, middle)
        tab.mouse.down()
        tab.mouse.move(box["x"] + box["width"] / 2, middle, steps=5)
        tab.mouse.up()
        assert len(shown(slider)) == 1 and shown(slider) != first
    assert visit.remote == []
    visit.context.close()


def test_every_slider_moves_by_touch(slider_page, phone):
    tab = phone.open(slider_page)
    for slider in tab.locator(".loco-slider").all():
        handle = slider.locator("input[type=range]")
        handle.scroll_into_view_if_needed()
        box = handle.bounding_box()
        seen = set()
        for part in (0.02, 0.5, 0.98):
            tab.touchscreen.tap(box["x"] + part * box["width"], box["y"] + box["height"] / 2)
            seen |= set(shown(slider))
        assert len(seen) == 3


def test_every_frame_of_a_slider_says_what_it_shows(slider_page, desktop):
    tab = desktop.open(slider_page)
    for slider in tab.locator(".loco-slider").all():
        texts = [image.get_attribute("alt") for image in slider.locator("img").all()]
        assert all(texts) and len(set(texts)) == len(texts)
        assert slider.get_attribute("aria-label")


def test_search_finds_locoedit(desktop, screenshots):
    desktop.complaints.clear()
    tab = desktop.open(LANDING)
    tab.keyboard.press("Control+k")
    tab.keyboard.type("LocoEdit")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/search.html?q=LocoEdit*")
    tab.wait_for_selector("#search-results .search li a")
    tab.wait_for_timeout(500)
    targets = tab.eval_on_selector_all("#search-results li a", "es => es.map(e => e.href)")
    keep(tab, screenshots, "search", "desktop")
    assert any("03_locoedit.html" in target for target in targets)


def test_the_landing_page_loads_at_most_a_megabyte_and_a_half(desktop):
    desktop.requests.clear()
    desktop.open(LANDING).wait_for_timeout(500)
    files = {unquote(urlsplit(url).path) for url in desktop.requests if url.startswith("file:")}
    assert 0 < sum((desktop.site / path).stat().st_size for path in files) <= 1.5 * MEGABYTE


def test_the_first_thing_on_the_landing_page_is_a_living_picture(desktop, phone):
    for visit in (desktop, phone):
        slider = visit.open(LANDING).locator(".loco-slider").first
        box = slider.bounding_box()
        assert box["y"] + box["height"] <= visit.tab.viewport_size["height"]


def test_a_link_of_methods_leads_to_the_source(desktop):
    tab = desktop.open("book/methods")
    tab.get_by_role("link", name="loco.localize").first.click()
    tab.wait_for_url("**/api/find.html#*")
    assert tab.locator("dt[id='loco.localize']").is_visible()
    assert tab.locator("summary", has_text="Source: loco_core/localization/locogen.py").count()
