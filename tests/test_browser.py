"""JupyterLab in a real browser: what `make lab` opens can be read, run and moved.

Screenshots go to screenshots/ in the repository.
"""

import base64
import json
import re
from html import unescape
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from browser import (
    CHROMIUM,
    answer,
    chromium,
    jupyterlab,
    open_notebook,
    run_all_cells,
    run_first_cell,
    too_wide,
    write_exercise,
)
from ipywidgets import HTML, SelectionSlider
from recording import record_run

from dpo_lab.sentiment.results import load_sweep
from dpo_lab.theory.bandit import sample_pairs
from dpo_lab.theory.objective import optimal_policy
from dpo_lab.widgets.explorers import (
    BETAS,
    bandit_explorer,
    beta_explorer,
    betas_explorer,
    bradley_terry_explorer,
    frontier_explorer,
    gradient_weight_explorer,
    training_explorer,
)
from dpo_lab.widgets.landscape import landscape_explorer
from dpo_lab.widgets.predictions import FILE
from dpo_lab.widgets.states import (
    REFERENCE,
    REWARD,
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; .ci/run installs it"),
]
FAILED = ".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']"
SCREENSHOTS = Path(__file__).parent.parent / "screenshots"
STDERR = ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']"


def cloud_of_notebook_03():
    log_ratios = (optimal_policy(REFERENCE, REWARD, 0.5) / REFERENCE).log()
    chosen, rejected = sample_pairs(REFERENCE, REWARD, 60, torch.Generator().manual_seed(0))
    return gradient_weight_explorer(log_ratios[chosen] - log_ratios[rejected])


EXPLORERS = {
    "01_kl_constrained_objective": [beta_explorer],
    "02_bradley_terry": [bradley_terry_explorer],
    # the third is moved in a test of its own
    "03_optimal_policy_bandit": [bandit_explorer, cloud_of_notebook_03, None],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(folder):
    with jupyterlab(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


class Shown:
    """An explorer in the page, beside a twin of it in this process that says what must be there."""

    def __init__(self, page, output, twin):
        self.page, self.twin = page, twin
        self.readout, self.picture = (
            output.locator(".widget-hbox .widget-label").last,
            output.locator("img.dpo-lab-picture"),
        )
        self.handles, self.numbers = (
            output.locator(".noUi-handle"),
            output.locator(".widget-readout"),
        )

    def now(self):
        read = (
            "async image => btoa(String.fromCharCode("
            "...new Uint8Array(await (await fetch(image.src)).arrayBuffer())))"
        )
        return self.readout.inner_text(), base64.b64decode(self.picture.evaluate(read))

    def expected(self):
        """Read-out and picture for the numbers that stand beside the sliders."""
        values = {}
        for (name, slider), text in zip(
            self.twin.sliders.items(), self.numbers.all_inner_texts(), strict=True
        ):
            if isinstance(slider, SelectionSlider):
                values[name] = dict(slider.options)[text]
            elif name == "beta":  # it shows three digits
                values[name] = float(min(BETAS, key=lambda beta: abs(np.log(beta / float(text)))))
            else:
                values[name] = type(slider.value)(text.replace("\u2212", "-"))
        return values, (self.twin.show(**values), self.twin.picture.png())

    def settled(self):
        """The values of the sliders, once read-out and picture are what they must be."""
        for _ in range(100):
            values, expected = self.expected()
            if self.now() == expected:
                return values
            self.page.wait_for_timeout(100)
        raise AssertionError(
            f"sliders at {values}: {self.now()[0]!r} in the page, {expected[0]!r} expected, "
            "or another picture"
        )

    def press(self, i, key):
        self.handles.nth(i).scroll_into_view_if_needed()
        self.handles.nth(i).focus()
        self.page.keyboard.press(key)

    def drag(self, i, by):
        self.handles.nth(i).scroll_into_view_if_needed()
        box = self.handles.nth(i).bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + by, y, steps=8)
        self.page.mouse.up()

    def moved(self, before):
        """The values once they are others than `before` and shown."""
        for _ in range(100):
            if (values := self.settled()) != before:
                return values
            self.page.wait_for_timeout(100)
        raise AssertionError(f"the slider did not move: {before}")


def move_every_slider(shown):
    """Each by keyboard and by mouse: no other moves, it moves as it should; everything follows."""
    values = shown.settled()
    for i, name in enumerate(shown.twin.sliders):
        shown.press(i, "ArrowLeft")
        by_key = shown.moved(values)
        shown.drag(i, -20)
        by_mouse = shown.moved(by_key)
        assert values[name] > by_key[name] > by_mouse[name]
        assert {**by_mouse, name: values[name]} == values
        values = by_mouse


def test_the_slider_of_the_first_notebook_moves_and_resets(lab, browser):
    with open_notebook(browser, lab, "00_start_here") as (page, errors):
        page.get_by_role("heading", name="00. Start here").first.wait_for(timeout=30_000)
        cell = run_first_cell(page)
        page.screenshot(path=SCREENSHOTS / "lab.png")
        assert not page.locator(FAILED).count() and not page.locator(STDERR).count()
        shown = Shown(page, cell, beta_explorer())
        start = shown.settled()
        move_every_slider(shown)
        moved = shown.settled()
        cell.get_by_role("button", name="reset").click()
        assert shown.moved(moved) == start
        page.screenshot(path=SCREENSHOTS / "slider.png")
        assert errors == []


@pytest.mark.parametrize("notebook", EXPLORERS)
def test_a_notebook_runs_and_its_sliders_move_to_the_right_values(lab, browser, notebook):
    with open_notebook(browser, lab, notebook) as (page, errors):
        run_all_cells(page)
        assert not page.locator(FAILED).count()
        outputs = page.locator(".jp-OutputArea-output", has=page.locator("img.dpo-lab-picture"))
        assert outputs.count() == len(EXPLORERS[notebook])
        assert too_wide(page) == []

        # what a reader sees at once, without scrolling
        seen = page.locator(".jp-WindowedPanel-outer").first.bounding_box()["height"]
        assert all(output.bounding_box()["height"] <= seen for output in outputs.all())

        for k, make in enumerate(EXPLORERS[notebook]):
            if make:
                move_every_slider(Shown(page, outputs.nth(k), make()))
            outputs.nth(k).screenshot(path=SCREENSHOTS / f"{notebook}-{k}.png")
        assert errors == []


def write_notebook(path, sources):
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    cells = list(map(nbformat.v4.new_code_cell, sources))
    nbformat.write(nbformat.v4.new_notebook(metadata=kernel, cells=cells), path)


def test_a_written_guess_is_kept_and_stands_beside_the_result(lab, browser, folder):
    question, guess = "By what factor does the KL fall?", "<b>10</b> $x$"
    ask = f"from dpo_lab.widgets import predict\nrate = predict({question!r})"
    write_notebook(folder / "notebooks" / "guess.ipynb", [ask, "rate.beside(12.5)"])
    with open_notebook(browser, lab, "guess") as (page, errors):
        asked = run_first_cell(page)
        field = asked.get_by_label("your guess")
        asked.locator(".widget-html-content", has_text=question).wait_for()
        field.fill(guess)
        field.press("Enter")
        asked.get_by_text("kept", exact=True).wait_for()
        kept = (folder / "notebooks" / FILE).read_text(encoding="utf-8")
        assert json.loads(kept) == {question: guess}

        # a second run asks again, and has the guess from the file
        run_all_cells(page)
        assert field.input_value() == guess
        table = page.locator(".jp-CodeCell").nth(1).locator("td")
        assert table.all_inner_texts() == [guess, "12.5"]
        page.screenshot(path=SCREENSHOTS / "guess.png")
        assert not page.locator(FAILED).count() and errors == []


WRONG = """def my_dpo_loss(policy_logps, reference_logps, chosen, rejected, beta):
    log_ratios = policy_logps - reference_logps
    return -F.logsigmoid(log_ratios[chosen] - log_ratios[rejected])"""


def test_a_wrong_answer_comes_back_with_its_mistake_and_a_right_one_with_a_line(
    lab, browser, folder
):
    write_exercise(folder, "homework", "dpo_loss")
    with open_notebook(browser, lab, "homework") as (page, errors):
        run_first_cell(page)
        answer(page, WRONG, "dpo_loss: beta forgotten")
        page.screenshot(path=SCREENSHOTS / "homework-wrong.png")
        answer(page, WRONG.replace("-F", "-beta * F"), "dpo_loss: beta outside")
        difference = "policy_logps - reference_logps"
        right = WRONG.replace(difference, f"beta * ({difference})")
        answer(page, right, "✓ dpo_loss is right")
        page.screenshot(path=SCREENSHOTS / "homework-right.png")
        assert errors == []


RECORDED = {
    "training": (training_explorer, "training_explorer({run!r})"),
    "betas": (
        lambda run: betas_explorer({0.1: run, 5.0: run}, load_sweep().optimal),
        "betas_explorer({{0.1: {run!r}, 5.0: {run!r}}}, load_sweep().optimal)",
    ),
    "frontier": (lambda run: frontier_explorer(), "frontier_explorer()"),
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_walk_through_recorded_runs_shows_each_with_its_samples(lab, browser, folder, name):
    """The explorers of notebooks 04 and 05, without the minutes of training that those take."""
    make, source = RECORDED[name]
    run = folder / f"run-{name}"
    record_run(run)
    lines = [
        "from dpo_lab.sentiment import load_sweep",
        "from dpo_lab.widgets import *",
        source.format(run=str(run)),
    ]
    write_notebook(folder / "notebooks" / f"walk_{name}.ipynb", ["\n".join(lines)])
    with open_notebook(browser, lab, f"walk_{name}") as (page, errors):
        cell = run_first_cell(page)
        assert not page.locator(FAILED).count()
        shown = Shown(page, cell, make(run))
        start = shown.settled()
        shown.press(0, "ArrowRight")
        by_key = shown.moved(start)
        cell.screenshot(path=SCREENSHOTS / f"walk-{name}.png")
        table = next(
            child.value
            for child in shown.twin.box.children
            if isinstance(child, HTML) and "<table" in child.value
        )
        words = unescape(re.sub("<[^>]+>", " ", table)).split()
        assert cell.locator(".widget-html", has=page.locator("table")).inner_text().split() == words
        shown.drag(0, -400)
        assert shown.moved(by_key) == start
        assert errors == []


def test_a_policy_is_dragged_over_its_landscape_and_the_paths_follow(lab, browser, folder):
    source = "from dpo_lab.widgets import *\nlandscape_explorer(steps=6, seeds=3)"
    write_notebook(folder / "notebooks" / "landscape.ipynb", [source])
    with open_notebook(browser, lab, "landscape") as (page, errors):
        cell = run_first_cell(page)
        assert not page.locator(FAILED).count()
        shown = Shown(page, cell, landscape_explorer(steps=6, seeds=3))
        shown.numbers.nth(4).wait_for()
        start = shown.settled()

        # from the point at the right to the left of the triangle, in pixels of the picture
        box = shown.picture.bounding_box()
        page.mouse.move(box["x"] + 279, box["y"] + 304)
        page.mouse.down()
        page.mouse.move(box["x"] + 120, box["y"] + 290, steps=8)
        readout = shown.readout.inner_text()
        page.mouse.up()
        dragged = shown.moved(start)
        assert dragged["logit_1"] < -1 and {**dragged, **logits(start)} == start
        assert readout.startswith("J ") and errors == []

        # the sliders follow the pointer, and the policy follows the sliders
        shown.press(3, "ArrowRight")
        by_key = shown.moved(dragged)
        assert by_key["logit_2"] == pytest.approx(dragged["logit_2"] + 0.02)
        page.mouse.move(box["x"] + 300, box["y"] + 100)
        assert shown.settled() == by_key

        # one step goes from the end to the start; play goes on to the end, all in sight at once
        cell.get_by_role("button", name="one step").click()
        assert shown.moved(by_key) == {**by_key, "step": 0}
        cell.locator(".widget-play button").first.click()
        for _ in range(100):
            if shown.settled() == by_key:
                break
            page.wait_for_timeout(100)
        assert shown.settled() == by_key
        cell.screenshot(path=SCREENSHOTS / "landscape.png")
        seen = page.locator(".jp-WindowedPanel-outer").first.bounding_box()["height"]
        assert cell.locator(".jp-OutputArea").first.bounding_box()["height"] <= seen
        cell.get_by_role("button", name="reset").click()
        assert shown.moved(by_key) == start
        assert errors == []


def logits(values):
    return {name: value for name, value in values.items() if name.startswith("logit")}


@pytest.mark.long
@pytest.mark.parametrize(
    "notebook, seconds, keys",
    [
        ("04b_ppo_on_a_language_model", 900, ["ArrowLeft", "ArrowRight"]),
        ("04c_alignment_tax", 900, ["ArrowRight"]),
        ("05_dpo_gpt2_imdb", 1_200, ["ArrowRight"]),
        ("05c_on_policy_dpo", 900, ["ArrowRight"]),
        ("07_win_rates", 900, ["ArrowRight"]),
        ("08_failures", 900, ["ArrowRight"]),
    ],
)
def test_a_notebook_that_trains_runs_and_its_sliders_move(lab, browser, notebook, seconds, keys):
    """`keys` has the key that moves the first slider of each explorer, in the order of the page."""
    with open_notebook(browser, lab, notebook) as (page, errors):
        run_all_cells(page, seconds)
        assert not page.locator(FAILED).count()
        outputs = page.locator(
            ".jp-OutputArea-output", has=page.locator("img.dpo-lab-picture")
        ).filter(has=page.locator(".noUi-handle"))
        assert outputs.count() == len(keys)
        for place, key in enumerate(keys):
            output = outputs.nth(place)
            shown = Shown(page, output, None)
            states = [shown.now()]
            for move in ("key", "key", "drag"):
                shown.press(0, key) if move == "key" else shown.drag(0, -600)
                page.wait_for_timeout(2_000)
                states.append(shown.now())
                output.screenshot(path=SCREENSHOTS / f"{notebook}-{place}-{len(states)}.png")
            assert all(
                one[0] != other[0] and one[1] != other[1] for one, other in zip(states, states[1:])
            )
        assert errors == []
