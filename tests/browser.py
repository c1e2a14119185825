"""JupyterLab in a real browser."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import BrowserContext, Locator, Page, sync_playwright

ROOT = Path(__file__).parent.parent
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@contextmanager
def jupyterlab(folder: Path, python: str | Path = sys.executable) -> Iterator[str]:
    """Address of a JupyterLab of `python` on a copy of the notebooks, with settings of its own.

    As with `make lab`, its root is above the notebooks, which show pictures from docs/.
    """
    for part in ("notebooks", "docs/pictures"):
        shutil.copytree(ROOT / part, folder / part)
    for name, setting in {
        # every cell stays in the page
        "notebook-extension/tracker": '{"windowingMode": "none"}',
        # no question stands in front of it
        "apputils-extension/notification": '{"fetchNews": "false"}',
    }.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(setting)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--IdentityProvider.token=",
    ]
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
    }
    process = subprocess.Popen(
        [str(python), "-m", "jupyterlab", *options, str(folder)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextmanager
def chromium(folder: Path) -> Iterator[BrowserContext]:
    """A fresh Chromium with the window of a small laptop."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            folder / "profile",
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            viewport={"width": 1280, "height": 800},
        )
        yield browser
        browser.close()


@contextmanager
def open_notebook(
    browser: BrowserContext, address: str, notebook: str
) -> Iterator[tuple[Page, list[str]]]:
    """A page with the notebook alone, and the list of its errors, uncaught or on the console."""
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    page.goto(f"{address}/lab/workspaces/{notebook}/tree/notebooks/{notebook}.ipynb")
    page.locator(".jp-CodeCell").first.wait_for(timeout=90_000)
    # before there is a kernel it says idle, too
    page.locator(".jp-KernelName", has_not_text="No Kernel").first.wait_for(timeout=90_000)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(timeout=90_000)
    yield page, errors
    page.close()


def wait_until_run(page: Page, cells: Locator, seconds: int) -> None:
    """Wait until every one of the cells has a number."""
    for _ in range(5 * seconds):
        prompts = cells.locator(".jp-InputPrompt").all_inner_texts()
        if prompts and all(re.fullmatch(r"\[\d+\]:", prompt.strip()) for prompt in prompts):
            return
        page.wait_for_timeout(200)
    raise AssertionError(f"after {seconds} s the cells say {prompts}")


def begins(page: Page, cell: Locator) -> bool:
    """Whether a cell begins to run within a second."""
    for _ in range(10):
        page.wait_for_timeout(100)
        if cell.locator(".jp-InputPrompt").inner_text() != "[ ]:":
            return True
    return False


def run_first_cell(page: Page) -> Locator:
    """Run the first code cell, and wait until it is done."""
    first = page.locator(".jp-CodeCell").first
    for _ in range(10):  # a click is lost while JupyterLab still lays the page out
        first.locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")
        if begins(page, first):
            break
    wait_until_run(page, first, 90)
    return first


def run_all_cells(page: Page, seconds: int = 180) -> None:
    """Run > Run All Cells, and wait until they are done."""
    for _ in range(10):  # as in run_first_cell
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        if begins(page, page.locator(".jp-CodeCell").first):
            break
    wait_until_run(page, page.locator(".jp-CodeCell"), seconds)


def too_wide(page: Page) -> list[str]:
    """The beginnings of equations and code cells that do not fit into the width of the page."""
    return page.evaluate(
        """() => {
            const equations = [...document.querySelectorAll("mjx-container[display=true]")];
            const code = [...document.querySelectorAll(".jp-CodeCell .cm-scroller")];
            return [...equations, ...code]
                .filter(box => box.scrollWidth > box.clientWidth + 1)
                .map(box => box.innerText.replace(/\\s+/g, " ").slice(0, 80));
        }"""
    )


def write_exercise(folder: Path, name: str, exercise: str) -> None:
    """A notebook with the stub and the check of one exercise, as they stand in the exercises."""
    for path in sorted((ROOT / "notebooks" / "exercises").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        cells = [cell for cell in notebook.cells if cell.id in (exercise, f"check-{exercise}")]
        if cells:
            first = nbformat.v4.new_code_cell("import torch\nimport torch.nn.functional as F")
            notebook.cells = [first, *cells]
            nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")


def answer(page: Page, code: str, verdict: str) -> None:
    """Type an answer into the second cell, run it and its check, and wait for the verdict."""
    page.locator(".jp-CodeCell").nth(1).locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(code)
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")
    check = page.locator(".jp-CodeCell").nth(2)
    check.locator(".jp-OutputArea-output", has_text=verdict).wait_for(timeout=60_000)
