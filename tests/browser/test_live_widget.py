"""The live widgets, in JupyterLab and a real browser: moved, painted, cancelled."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
WAIT = 180_000  # milliseconds; a browser beside other work is slow
CELL = """\
import sys, time
sys.path.insert(0, {root!r})
import numpy as np
from loco_core._progress import bar
from loco_core.display import any_of, explore, window_slider
from IPython.display import display

def grey(k, bright):
    with bar(200 if k == 2 else 2, "painting", "step") as progress:
        for _ in range(progress.total):
            time.sleep(0.1)
            progress.update()
    return np.full((3, 8, 8), k / 9 + len(bright) / 3)

display(window_slider(np.random.rand(3, 3, 8, 8), ["zero", "one", "two"], alt="noise"))
explore(grey, {{"k": [0, 1, 2], "bright": any_of(["more"])}},
        "a grey square", stills=False)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab with one notebook."""
    folder = tmp_path_factory.mktemp("lab")
    notebook = new_notebook(
        cells=[new_code_cell(CELL.format(root=str(ROOT)))],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(notebook, folder / "live.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = {"JUPYTER_CONFIG_DIR": str(folder / ".config"), "JUPYTER_RUNTIME_DIR": str(folder)}
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token="]
    log = (folder / "lab.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options, str(folder)],
        env=os.environ | home, stdout=log, stderr=log,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(WAIT // 500):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (folder / "lab.log").read_text()
                time.sleep(0.5)
        yield f"{address}/lab/tree/live.ipynb"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.fixture(scope="module")
def page(browser, lab):
    """The notebook, opened and run."""
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    page.goto(lab, timeout=WAIT)
    page.locator("#jp-main-statusbar", has_text="(ipykernel) | Idle").wait_for()
    page.locator(".jp-CodeCell .cm-content").first.click()
    page.keyboard.press("Shift+Enter")
    yield page
    page.close()


def picture(page, start: str):
    """The live image whose alt text starts so."""
    return page.locator(f".jupyter-widgets img[alt^='{start}']").first


def test_the_live_window_slider_moves_by_keyboard_and_its_image_follows(page):
    image = picture(page, "noise")
    assert image.get_attribute("alt") == "noise: zero"
    before = image.get_attribute("src")
    page.locator(".jupyter-widgets [role=slider]").first.focus()
    page.keyboard.press("ArrowRight")
    picture(page, "noise: one").wait_for()
    assert picture(page, "noise").get_attribute("src") != before


def test_an_explorer_paints_what_is_chosen_and_its_cancel_stops_it(page, screenshots):
    before = picture(page, "a grey square; k: 0").get_attribute("src")
    slider = page.locator(".jupyter-widgets [role=slider]").nth(1)
    slider.focus()
    page.keyboard.press("ArrowRight")
    picture(page, "a grey square; k: 1; bright: nothing").wait_for()
    assert picture(page, "a grey square").get_attribute("src") != before
    page.get_by_role("checkbox", name="more").check()
    picture(page, "a grey square; k: 1; bright: more").wait_for()
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.locator("[role=status]", has_text="painting, step").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.locator("[role=status]", has_text="cancelled").wait_for()
    assert "k: 1; bright: more" in picture(page, "a grey square").get_attribute("alt")
    page.screenshot(path=screenshots / "live_widgets.png")
