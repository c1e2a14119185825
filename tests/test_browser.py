"""JupyterLab in a real browser: what `make lab` opens can be read and run. Screenshots stay in pytest's folder."""

import pytest
from browser import CHROMIUM, chromium, jupyterlab, run_first_cell

from dpo_lab.widgets import beta_state

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; .ci/run installs it")]
STDERR = ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']"


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
