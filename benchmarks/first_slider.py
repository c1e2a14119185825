"""From `git clone` to the first moved slider of notebook 00: python benchmarks/first_slider.py

Clones the commit that is checked out here, sets up its .venv as `make lab` does, opens JupyterLab in headless Chromium, runs
the first cell and moves the slider. Package downloads come from pip's cache where they are there. Needs Chromium. Writes
benchmarks/results/first_slider.json.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dpo_lab.runs import provenance, write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "first_slider.json"
MOVE = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, "tests")
from browser import chromium, jupyterlab, open_notebook, run_first_cell
with tempfile.TemporaryDirectory() as name:
    with jupyterlab(Path(name)) as address, chromium(Path(name)) as browser:
        with open_notebook(browser, address, "00_start_here") as (page, errors):
            cell = run_first_cell(page)
            picture = cell.locator("img.dpo-lab-picture")
            before = picture.get_attribute("src")
            cell.locator(".noUi-handle").focus()
            page.keyboard.press("ArrowLeft")
            page.wait_for_function("([p, src]) => p.src != src", arg=[picture.element_handle(), before])
            print("moved", flush=True)
"""


def main() -> None:
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "clone"
        began = time.perf_counter()
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        seconds["clone"] = time.perf_counter() - began
        subprocess.run(["make", ".venv/.installed"], cwd=clone, check=True)
        seconds["installed"] = time.perf_counter() - began
        process = subprocess.Popen([".venv/bin/python", "-c", MOVE], cwd=clone, stdout=subprocess.PIPE, text=True)
        if process.stdout.readline().strip() != "moved":
            sys.exit("the slider did not move")
        seconds["slider moved"] = time.perf_counter() - began
        process.wait(timeout=60)
    write_json(RESULTS, {"provenance": provenance(), "seconds_since_start": seconds})
    print(json.dumps(seconds, indent=2))


if __name__ == "__main__":
    main()
