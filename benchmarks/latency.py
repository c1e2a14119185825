"""From the slider's event to the new picture in the page: beta_explorer in JupyterLab 4, in headless Chromium.

    python benchmarks/latency.py

Needs Chromium. Writes benchmarks/results/latency.json.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from dpo_lab.runs import provenance, write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from browser import chromium, jupyterlab, open_notebook, run_first_cell  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "latency.json"
LISTEN = """picture => {
    window.moved = 0; window.shown = [];
    document.addEventListener("pointermove", () => { window.moved = performance.now(); }, true);
    picture.addEventListener("load", () => requestAnimationFrame(() => window.shown.push(performance.now() - window.moved)));
}"""


@dataclass(frozen=True)
class LatencyConfig:
    """How much to measure."""

    drags: int = 200
    """moves of the slider's handle, each to another value"""


def main(config: LatencyConfig) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            jupyterlab(folder) as address,
            chromium(folder) as browser,
            open_notebook(browser, address, "00_start_here") as (page, errors),
        ):
            cell = run_first_cell(page)
            handle, picture = cell.locator(".noUi-handle"), cell.locator("img.dpo-lab-picture")
            handle.wait_for(timeout=30_000)
            picture.evaluate(LISTEN)
            box = handle.bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x, y)
            page.mouse.down()
            for i in range(config.drags):
                page.mouse.move(x + 60 * np.sin(i / 5) + (8 if i % 2 else -8), y)
                page.wait_for_function(f"window.shown.length > {i}", timeout=5_000)
            page.mouse.up()
            milliseconds = page.evaluate("window.shown")[: config.drags]
        if errors:
            raise SystemExit(f"the page reported errors: {errors}")
    median, p95 = statistics.median(milliseconds), float(np.quantile(milliseconds, 0.95))
    write_json(RESULTS, {"provenance": provenance(), "median": median, "p95": p95, "milliseconds": milliseconds})
    print(f"{len(milliseconds)} drags: median {median:.0f} ms, p95 {p95:.0f} ms")


if __name__ == "__main__":
    main(tyro.cli(LatencyConfig))
