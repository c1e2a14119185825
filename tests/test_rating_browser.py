"""The rating form in JupyterLab in a real browser: labeled by keys, killed half-way, resumed."""

import json
import os
import signal
from pathlib import Path

import nbformat
import pytest
from browser import CHROMIUM, chromium, jupyterlab, open_notebook, run_first_cell

from dpo_lab.data.ratings import RatingStore, as_items, shown_order

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; .ci/run installs it"),
]
SCREENSHOTS = Path(__file__).parent.parent / "screenshots"

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> $x^2$ <b>b</b>"
PAIRS = [
    [f"Film {i:02} begins", f" and is a joy, number {i}.", f" and is a bore, number {i}."]
    for i in range(30)
]
PAIRS[0][1] = HOSTILE

CELL = """import os
from dpo_lab.widgets import rating_widget
open("pid", "w").write(str(os.getpid()))
pairs = {pairs!r}
rating_widget(pairs, "ratings.jsonl", rater="A", guidelines="Prefer the kinder <u>answer</u>.")"""

# what is pressed for the items one after another, and what that means: the choice as shown
KEYS = {"ArrowLeft": "left", "ArrowRight": "right", "ArrowDown": "tie", "4 2": "left", "3 3": "tie"}


class Form:
    """The form in the page, which is in `page.locator(".dpo-rate-form")`."""

    def __init__(self, page):
        self.page, self.root = page, page.locator(".dpo-rate-form")
        self.root.wait_for(timeout=30_000)

    @property
    def key(self):
        return self.root.get_attribute("data-key")

    def wait_for_count(self, n):
        self.root.locator(".dpo-rate-count", has_text=f"{n} of 30").wait_for(timeout=10_000)

    def answer(self, keys, n):
        """Press keys for the present item, and wait until `n` are rated."""
        for k, key in enumerate(keys.split()):
            if k:
                self.root.locator("[aria-pressed=true]").wait_for(timeout=10_000)
            self.page.keyboard.press(key)
        self.wait_for_count(n)


def test_thirty_pairs_are_labeled_by_keys_across_a_killed_kernel(tmp_path):
    folder = tmp_path / "lab"
    items = {item.key: item for item in as_items(PAIRS)}
    with jupyterlab(folder) as address, chromium(tmp_path) as browser:
        cells = [CELL.format(pairs=PAIRS), "1 + 1"]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        notebook = nbformat.v4.new_notebook(
            metadata=kernel, cells=list(map(nbformat.v4.new_code_cell, cells))
        )
        nbformat.write(notebook, folder / "notebooks" / "rate.ipynb")
        path = folder / "notebooks" / "ratings.jsonl"
        with open_notebook(browser, address, "rate") as (page, errors):
            run_first_cell(page)
            form = Form(page)

            # without the focus no key counts; in the form no key is JupyterLab's
            page.keyboard.press("ArrowLeft")
            assert not path.exists()
            page.keyboard.press("ArrowUp")
            form.root.focus()
            for key in "ddxab":
                page.keyboard.press(key)
            assert page.locator(".jp-CodeCell").count() == 2

            said, hostile_seen = {}, False
            presses = [list(KEYS)[i % len(KEYS)] for i in range(30)]

            def label(numbers):
                nonlocal hostile_seen
                for i in numbers:
                    key = form.key
                    shown = form.root.locator(".dpo-rate-answer").all_text_contents()
                    order = shown_order(items[key], seed=0, rater="A", pass_number=1)
                    assert shown == [items[key].answers[k] for k in order]
                    hostile_seen |= HOSTILE in shown
                    if HOSTILE in shown:
                        page.screenshot(path=SCREENSHOTS / "rating_hostile.png")
                    form.answer(presses[i], i + 1)
                    # it was on disk before the next one came
                    assert json.loads(path.read_text().splitlines()[-1])["item"] == key
                    said[key] = KEYS[presses[i]]

            label(range(14))
            window = page.locator(".jp-WindowedPanel-outer").first.bounding_box()["height"]
            assert form.root.bounding_box()["height"] <= window
            page.screenshot(path=SCREENSHOTS / "rating.png")

            # undo: the item is there again, and can be answered otherwise
            next_key, last_key = form.key, list(said)[-1]
            page.keyboard.press("u")
            form.wait_for_count(13)
            assert form.key == last_key
            form.answer("ArrowRight", 14)
            said[last_key] = "right"
            assert form.key == next_key

            # killed without warning; the page that is left saves nothing, and says so
            os.kill(int((folder / "notebooks" / "pid").read_text()), signal.SIGKILL)
            before = path.read_bytes()
            page.keyboard.press("ArrowLeft")
            gone = form.root.locator(".dpo-rate-status", has_text="does not answer")
            gone.wait_for()
            page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(
                timeout=60_000
            )
            assert path.read_bytes() == before

            # a new kernel goes on where the last one stopped
            page.locator(".jp-Dialog button.jp-mod-accept").click()
            run_first_cell(page)
            gone.wait_for(state="detached")
            form.wait_for_count(14)
            assert form.key == next_key
            form.root.focus()
            label(range(14, 30))
            form.root.get_by_text("All 30 are rated").wait_for()
            assert hostile_seen and page.evaluate("window.hacked") is None
            assert not form.root.locator("script, img, b, mjx-container").count()
            assert [e for e in errors if "WebSocket" not in e and "404" not in e] == []

    kept = {rating.item: rating.choice for rating in RatingStore(path).ratings("A", 1)}
    assert kept == said and len(kept) == 30
    assert all(rating.seconds < 60 for rating in RatingStore(path).ratings())
