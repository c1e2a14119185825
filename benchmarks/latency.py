"""From the slider's event to the new picture in the page: beta_explorer in JupyterLab 4.

    python benchmarks/latency.py

Runs in headless Chromium, which it needs. Writes benchmarks/results/latency.json.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro

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


@dataclass(frozen=True)
class LatencyConfig:
    """How much to measure."""

    drags: int = 200
    """moves of the slider's handle to other values, a pause before each; and as many without"""
    pause: float = 0.2
    """seconds"""


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
            milliseconds: dict[str, list[float]] = {"apart": [], "in a row": []}
            for i in range(2 * config.drags):
                apart = i < config.drags
                if apart:
                    page.wait_for_timeout(1_000 * config.pause)
                page.evaluate("() => window.expect()")
                page.mouse.move(x + 60 * np.sin(i / 5) + (8 if i % 2 else -8), y)
                milliseconds["apart" if apart else "in a row"].append(
                    page.evaluate("() => window.arrival")
                )
            page.mouse.up()
        if errors:
            raise SystemExit(f"the page reported errors: {errors}")
    result = {
        name: {
            "median": statistics.median(values),
            "p95": float(np.quantile(values, 0.95)),
            "milliseconds": values,
        }
        for name, values in milliseconds.items()
    }
    write_json(
        RESULTS,
        {
            "provenance": provenance(),
            "ipykernel": version("ipykernel"),
            "pause": config.pause,
            **result,
        },
    )
    for name, values in result.items():
        print(
            f"{config.drags} drags {name}: median {values['median']:.0f} ms, "
            f"p95 {values['p95']:.0f} ms"
        )


if __name__ == "__main__":
    main(tyro.cli(LatencyConfig))
