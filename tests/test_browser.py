"""JupyterLab in a real browser: what `make lab` opens can be read, run and moved. Screenshots stay in pytest's folder."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from browser import CHROMIUM, chromium, jupyterlab, run_first_cell  # noqa: E402

from dpo_lab.widgets import BETAS, bandit_explorer, beta_state, bradley_terry_explorer  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; .ci/run installs it")]
STDERR = ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']"
EXPLORERS = {
    "01_kl_constrained_objective": [],
    "02_bradley_terry": [bradley_terry_explorer],
    "03_optimal_policy_bandit": [bandit_explorer, None],
}


@pytest.fixture
def lab(tmp_path):
    with jupyterlab(tmp_path) as address:
        yield address


@pytest.fixture
def page(tmp_path):
    with chromium(tmp_path) as (page, errors):
        page.errors = errors
        yield page


def test_the_first_run_opens_and_its_first_cell_runs(lab, page, tmp_path):
    run_first_cell(page, lab, "00_first_run", "00. A first run")
    assert not page.locator(STDERR).count()
    page.screenshot(path=tmp_path / "lab.png")
    assert (tmp_path / "lab.png").stat().st_size > 20_000


def changed(page, shown, before):
    """What is shown once both the read-out and the picture are others than before."""
    for _ in range(100):
        now = shown()
        if now[0] != before[0] and now[1] != before[1]:
            return now
        page.wait_for_timeout(50)
    raise AssertionError(f"the slider moved and nothing changed: {before[0]}")


def drag(page, handle, by):
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + by, box["y"] + box["height"] / 2, steps=8)
    page.mouse.up()


def test_beta_moves_by_keyboard_and_by_mouse_and_resets(lab, page, tmp_path):
    cell = run_first_cell(page, lab, "00_start_here", "Start here")
    assert not page.locator(STDERR).count()
    handle, picture = cell.locator(".noUi-handle"), cell.locator("img")
    readout = cell.locator(".jupyter-widgets.widget-label", has_text="mean reward")
    handle.wait_for(timeout=30_000)

    def shown():
        return readout.inner_text(), picture.get_attribute("src")

    def says(beta):
        state = beta_state(beta)
        return f"mean reward {state['reward']:.3f}, KL {state['kl']:.3f} nats, log Z {state['log_z']:.3f}"

    start = shown()
    assert start[0] == says(1.0)
    handle.focus()
    page.keyboard.press("ArrowLeft")
    by_key = changed(page, shown, start)
    assert by_key[0] == says(10**-0.05)
    drag(page, handle, -80)
    by_mouse = changed(page, shown, by_key)
    assert float(by_mouse[0].split("mean reward ")[1].split(",")[0]) > float(by_key[0].split("mean reward ")[1].split(",")[0])
    cell.get_by_role("button", name="reset").click()
    assert changed(page, shown, by_mouse)[0] == start[0]
    page.screenshot(path=tmp_path / "slider.png")
    assert page.errors == []


def run_all(page, address, notebook, path):
    """Run every cell and wait until the saved notebook has the outputs of all of them; none may be an error."""
    page.goto(f"{address}/lab/tree/{notebook}.ipynb")
    page.locator(".jp-CodeCell").first.wait_for(timeout=90_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    for _ in range(180):
        page.wait_for_timeout(1_000)
        page.keyboard.press("Control+s")
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        failed = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
        assert not failed, "\n".join(failed[0]["traceback"])
        if all(cell["execution_count"] for cell in cells):
            return
    raise AssertionError(f"{notebook} did not finish in 180 s")


def move_every_slider(page, output, twin):
    """Move each slider of an explorer by keyboard and by mouse; `twin` says what its read-out must show, where there is one."""
    readout, picture = output.locator(".widget-hbox .widget-label").last, output.locator("img.dpo-lab-picture")
    handles, numbers = output.locator(".noUi-handle"), output.locator(".widget-readout")

    def shown():
        return readout.inner_text(), picture.get_attribute("src")

    def expected():
        values = dict(zip(twin.sliders, (float(text) for text in numbers.all_inner_texts())))
        if "beta" in values:  # it shows three digits
            values["beta"] = float(min(BETAS, key=lambda beta: abs(np.log(beta / values["beta"]))))
        return twin.show(**values)

    before = shown()
    for i in range(handles.count()):
        handles.nth(i).scroll_into_view_if_needed()
        handles.nth(i).focus()
        page.keyboard.press("ArrowRight")
        before = changed(page, shown, before)
        drag(page, handles.nth(i), -30)
        changed(page, shown, before)
        page.wait_for_timeout(300)
        before = shown()
        assert twin is None or before[0] == expected()


@pytest.mark.parametrize("notebook", EXPLORERS)
def test_a_notebook_runs_and_every_slider_of_it_moves_to_the_right_values(lab, page, tmp_path, notebook):
    run_all(page, lab, notebook, tmp_path / "notebooks" / f"{notebook}.ipynb")
    outputs = page.locator(".jp-OutputArea-output", has=page.locator("img.dpo-lab-picture"))
    assert outputs.count() == len(EXPLORERS[notebook])
    for k, make in enumerate(EXPLORERS[notebook]):
        move_every_slider(page, outputs.nth(k), make and make())
        outputs.nth(k).screenshot(path=tmp_path / f"{notebook}-{k}.png")
    assert page.errors == []
