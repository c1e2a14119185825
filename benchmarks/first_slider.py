"""Seconds from `git clone` to the first moved slider of notebook 00.

    python benchmarks/first_slider.py

Clones the commit that is checked out here, sets up its .venv as `make lab` does, opens JupyterLab
in headless Chromium, runs the first cell and moves the slider. Packages come from pip's cache if
they are in it. Needs Chromium. Writes benchmarks/results/first_slider.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dpo_lab.engine.runs import provenance, write_json

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import chromium, jupyterlab, open_notebook, run_first_cell  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "first_slider.json"


def main() -> None:
    # a newcomer's Python keeps what it compiled; pip leaves that to the first import
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds, began = {}, time.perf_counter()

    def done(what: str) -> None:
        seconds[what] = round(time.perf_counter() - began, 1)

    with tempfile.TemporaryDirectory() as name:
        folder, clone = Path(name), Path(name) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        done("cloned")
        subprocess.run(["make", ".venv/.installed"], cwd=clone, check=True)
        done("installed")
        with (
            jupyterlab(folder, clone / ".venv" / "bin" / "python") as address,
            chromium(folder) as browser,
            open_notebook(browser, address, "00_start_here") as (page, _),
        ):
            done("notebook open")
            cell = run_first_cell(page)
            picture, handle = cell.locator("img.dpo-lab-picture"), cell.locator(".noUi-handle")
            before = picture.get_attribute("src")
            handle.focus()
            page.keyboard.press("ArrowLeft")
            page.wait_for_function(
                "([picture, src]) => picture.src != src", arg=[picture.element_handle(), before]
            )
            done("slider moved")
    write_json(RESULTS, {"provenance": provenance(), "seconds_since_start": seconds})
    print(json.dumps(seconds, indent=2))


if __name__ == "__main__":
    main()
