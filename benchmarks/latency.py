"""From a move of the pointer to the new picture in the page, in JupyterLab 4.

    python benchmarks/latency.py

The slider of beta_explorer, and the point of landscape_explorer. Runs in headless Chromium, which
it needs. Writes benchmarks/results/latency.json.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import tyro
from playwright.sync_api import Locator, Page

from dpo_lab.engine.runs import provenance, write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from browser import chromium, jupyterlab, open_notebook, run_first_cell  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "latency.json"
LISTEN = """picture => {
    document.addEventListener("pointermove", () => { window.moved = performance.now(); }, true);
    window.expect = () => { window.arrival = new Promise((arrived, late) => {
        setTimeout(() => late(new Error("no new picture after 5 s")), 5000);
        const loaded = () => requestAnimationFrame(() => arrived(performance.now() - window.moved));
        picture.addEventListener("load", loaded, { once: true });
    }); };
}"""


LANDSCAPE = "from dpo_lab.widgets import landscape_explorer\nlandscape_explorer()"


@dataclass(frozen=True)
class LatencyConfig:
    """How much to measure."""

    drags: int = 100
    """moves of the pointer to other values, a pause before each; and as many without"""
    pause: float = 0.2
    """seconds"""


def main(config: LatencyConfig) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with jupyterlab(folder) as address, chromium(folder) as browser:
            write_landscape(folder / "notebooks" / "landscape.ipynb")
            with open_notebook(browser, address, "00_start_here") as (page, errors):
                handle = run_first_cell(page).locator(".noUi-handle")
                handle.wait_for(timeout=30_000)
                slider = drag(page, center(handle), 60, config)
            with open_notebook(browser, address, "landscape") as (page, more_errors):
                picture = run_first_cell(page).locator("img.dpo-lab-picture")
                picture.wait_for(timeout=30_000)

                # the pointer takes over once the page has it, in the middle of the triangle
                page.wait_for_timeout(2_000)
                box = picture.bounding_box()
                point = drag(page, (box["x"] + 190, box["y"] + 240), 60, config)
        if errors or more_errors:
            raise SystemExit(f"the page reported errors: {errors + more_errors}")

    about = {"provenance": provenance(), "ipykernel": version("ipykernel"), "pause": config.pause}
    write_json(RESULTS, {**about, **summary(slider), "landscape": summary(point)})
    for name, result in {"slider": summary(slider), "landscape": summary(point)}.items():
        for how, values in result.items():
            print(
                f"{name}, {config.drags} drags {how}: median {values['median']:.0f} ms, "
                f"p95 {values['p95']:.0f} ms"
            )


def write_landscape(path: Path) -> None:
    """A notebook of one cell, with the landscape explorer."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    cells = [nbformat.v4.new_code_cell(LANDSCAPE)]
    nbformat.write(nbformat.v4.new_notebook(metadata=kernel, cells=cells), path)


def center(handle: Locator) -> tuple[float, float]:
    """The middle of an element of the page."""
    box = handle.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag(
    page: Page, start: tuple[float, float], reach: float, config: LatencyConfig
) -> dict[str, list[float]]:
    """Milliseconds from each move to its picture, with a pause before each move and without."""
    page.locator("img.dpo-lab-picture").evaluate(LISTEN)
    x, y = start
    page.mouse.move(x, y)
    page.mouse.down()
    milliseconds: dict[str, list[float]] = {"apart": [], "in a row": []}
    for i in range(2 * config.drags):
        apart = i < config.drags
        if apart:
            page.wait_for_timeout(1_000 * config.pause)
        page.evaluate("() => window.expect()")
        page.mouse.move(x + reach * np.sin(i / 5) + (8 if i % 2 else -8), y)
        milliseconds["apart" if apart else "in a row"].append(page.evaluate("() => window.arrival"))
    page.mouse.up()
    return milliseconds


def summary(milliseconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Median and 95th percentile beside the values."""
    return {
        name: {
            "median": statistics.median(values),
            "p95": float(np.quantile(values, 0.95)),
            "milliseconds": values,
        }
        for name, values in milliseconds.items()
    }


if __name__ == "__main__":
    main(tyro.cli(LatencyConfig))
