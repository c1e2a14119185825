"""Pictures of what one sees in JupyterLab: python benchmarks/screenshot.py

Opens notebook 00 in headless Chromium at 1,280 x 800, runs its first cell and moves the slider.
Saves docs/pictures/beta_slider.png, a still, and beta_slider.gif, in which beta falls and rises
again. Then types a wrong and a right answer to an exercise: homework_wrong.png, homework_right.png.
Last it rates a few answers in the rating form: rating_widget.png. Needs Chromium.
"""

import io
import sys
import tempfile
from pathlib import Path

import nbformat
from PIL import Image
from playwright.sync_api import Locator, Page

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from browser import (  # noqa: E402
    answer,
    chromium,
    jupyterlab,
    open_notebook,
    run_first_cell,
    write_exercise,
)
from pictures import PICTURES, shrunk  # noqa: E402

# presses of the left arrow between two pictures, and pictures on the way down; beta starts at 1
PRESSES, FRAMES = 2, 12
MILLISECONDS = 120

# answers to the exercise `my_dpo_loss`, and what the check says of them
CODE = """def my_dpo_loss(policy_logps, reference_logps, chosen, rejected, beta):
    log_ratios = {}policy_logps - reference_logps{}
    return -F.logsigmoid(log_ratios[chosen] - log_ratios[rejected])"""
ANSWERS = {
    "wrong": (CODE.format("", ""), "dpo_loss: beta forgotten"),
    "right": (CODE.format("beta * (", ")"), "✓ dpo_loss is right"),
}

# pairs for the rating form, and what is pressed for all but the last
FORM = """from dpo_lab.widgets import rating_widget
pairs = [
    ("It is a rare film that", " wastes so many good actors in so little time.",
     " makes you forget the clock, and this one does it twice, with hardly a word spoken."),
    ("The story of the two brothers", " is told with care, and its end stays with you for days.",
     " begins well. Then the music takes over, and it is the kind of music that tells you when to "
     "cry. I did not."),
    ("I had not expected", " much, and got less.", " to laugh at all, and laughed to the end."),
]
rating_widget(pairs, "ratings.jsonl", rater="ada", shuffle=False, guidelines=(
    "Prefer the answer that is kinder to the film.\\n"
    "If both are, prefer the one that continues the prompt better."))"""
RATED = ("ArrowRight", "4")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        with (
            jupyterlab(Path(name)) as address,
            chromium(Path(name)) as browser,
            open_notebook(browser, address, "00_start_here") as (page, _),
        ):
            page.set_viewport_size({"width": 1280, "height": 800})
            cell = run_first_cell(page)
            shots = moved(page, cell)
    save(shots)
    homework()
    rating()


def homework() -> None:
    """A wrong answer with its diagnosis, and a right one."""
    with tempfile.TemporaryDirectory() as name:
        with jupyterlab(Path(name)) as address, chromium(Path(name)) as browser:
            write_exercise(Path(name), "homework", "dpo_loss")
            with open_notebook(browser, address, "homework") as (page, _):
                run_first_cell(page)
                for kind, (code, verdict) in ANSWERS.items():
                    answer(page, code, verdict)
                    cells = page.locator(".jp-CodeCell")
                    top, end = cells.nth(1).bounding_box(), cells.nth(2).bounding_box()
                    height = end["y"] + end["height"] - top["y"]
                    shot = page.screenshot(clip={**top, "height": height})
                    (PICTURES / f"homework_{kind}.png").write_bytes(shrunk(shot, max_width=1280))


def rating() -> None:
    """The rating form with one pair rated, and the left answer of the next."""
    with tempfile.TemporaryDirectory() as name:
        with jupyterlab(Path(name)) as address, chromium(Path(name)) as browser:
            cells = [nbformat.v4.new_code_cell(FORM)]
            kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
            notebook = nbformat.v4.new_notebook(metadata=kernel, cells=cells)
            nbformat.write(notebook, Path(name) / "notebooks" / "rating.ipynb")
            with open_notebook(browser, address, "rating") as (page, _):
                run_first_cell(page)
                form = page.locator(".dpo-rate-form")
                form.focus()
                for key in RATED:
                    page.keyboard.press(key)
                    page.wait_for_timeout(1_000)
                form.locator("summary").click()
                form.focus()
                page.mouse.move(0, 0)
                page.wait_for_timeout(500)
                shot = form.screenshot()
    (PICTURES / "rating_widget.png").write_bytes(shrunk(shot, max_width=1280))


def moved(page: Page, cell: Locator) -> list[bytes]:
    """Pictures of the cell, its slider and its figure while beta falls from 1."""
    handle = cell.locator(".noUi-handle")
    # it arrives after the picture, and its last digits change with every step
    readout = cell.locator(".widget-hbox .widget-label").last

    # the whole cell in the window, and no pointer on it
    readout.wait_for()
    cell.evaluate("cell => cell.scrollIntoView({block: 'end'})")
    handle.focus()
    page.mouse.move(0, 0)
    page.wait_for_timeout(1_000)

    # the cell fills the picture, which is small in the README
    box = cell.bounding_box()
    shots = [page.screenshot(clip=box)]
    for _ in range(FRAMES):
        for _ in range(PRESSES):
            before = readout.inner_text()
            page.keyboard.press("ArrowLeft")
            page.wait_for_function(
                "([readout, before]) => readout.innerText != before",
                arg=[readout.element_handle(), before],
            )
        # a browser draws a little later than it is told
        page.wait_for_timeout(200)
        shots.append(page.screenshot(clip=box))
    return shots


def save(shots: list[bytes]) -> None:
    """The middle one as a PNG; all of them, to and fro, as a GIF."""
    PICTURES.mkdir(exist_ok=True)
    still = PICTURES / "beta_slider.png"
    still.write_bytes(shrunk(shots[len(shots) // 2], max_width=1280))

    # one palette for all, so that what stands still does not flicker
    images = [Image.open(io.BytesIO(shot)).convert("RGB") for shot in shots]
    palette = images[0].quantize(64)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    film = PICTURES / "beta_slider.gif"
    images[0].save(
        film,
        save_all=True,
        append_images=[*images[1:], *images[-2:0:-1]],
        duration=MILLISECONDS,
        loop=0,
        optimize=True,
    )
    for path in (still, film):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
