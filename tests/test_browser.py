"""JupyterLab in a real browser: what `make lab` opens can be read and run."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from dpo_lab.widgets import beta_state

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab on a copy of the notebooks."""
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token="]
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path / "data")}
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options, str(tmp_path / "notebooks")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api", timeout=1)
            break
        except OSError:
            time.sleep(0.5)
    yield address
    process.terminate()
    process.wait(timeout=20)


@pytest.fixture
def page(tmp_path):
    """A page of a fresh Chromium; errors on its console are collected in `page.errors`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=BROWSER,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            viewport={"width": 1280, "height": 1100},
        )
        page = browser.new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page
        browser.close()


pytestmark = [pytest.mark.browser, pytest.mark.skipif(BROWSER is None, reason="needs Chromium; .ci/run installs it")]
STDERR = ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']"


def run_first_cell(page, address, notebook, heading):
    page.goto(f"{address}/lab/tree/{notebook}.ipynb")
    page.get_by_role("heading", name=heading).first.wait_for(timeout=90_000)
    first = page.locator(".jp-CodeCell").first
    first.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    first.locator(".jp-InputPrompt", has_text="[1]:").wait_for(timeout=90_000)
    assert not page.locator(STDERR).count()
    return first


def test_the_first_run_opens_and_its_first_cell_runs(lab, page, tmp_path):
    run_first_cell(page, lab, "00_first_run", "00. A first run")
    page.screenshot(path=tmp_path / "lab.png")
    assert (tmp_path / "lab.png").stat().st_size > 20_000


def test_beta_moves_by_keyboard_and_by_mouse_and_resets(lab, page, tmp_path):
    cell = run_first_cell(page, lab, "00_start_here", "Start here")
    handle, picture = cell.locator(".noUi-handle"), cell.locator("img")
    readout = cell.locator(".jupyter-widgets.widget-label", has_text="mean reward")
    handle.wait_for(timeout=30_000)

    def shown():
        return readout.inner_text(), picture.get_attribute("src")

    def changed(before):
        for _ in range(100):
            if shown()[0] != before[0] and shown()[1] != before[1]:
                return shown()
            page.wait_for_timeout(50)
        raise AssertionError("the slider moved and nothing changed")

    def says(beta):
        state = beta_state(beta)
        return f"mean reward {state['reward']:.3f}, KL {state['kl']:.3f} nats, log Z {state['log_z']:.3f}"

    start = shown()
    assert start[0] == says(1.0)
    handle.focus()
    page.keyboard.press("ArrowLeft")
    by_key = changed(start)
    assert by_key[0] == says(10**-0.05)
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 80, box["y"] + box["height"] / 2, steps=8)
    page.mouse.up()
    by_mouse = changed(by_key)
    assert float(by_mouse[0].split("mean reward ")[1].split(",")[0]) > float(by_key[0].split("mean reward ")[1].split(",")[0])
    cell.get_by_role("button", name="reset").click()
    assert changed(by_mouse)[0] == start[0]
    page.screenshot(path=tmp_path / "slider.png")
    assert page.errors == []
