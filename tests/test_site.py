"""The site: explorers that move without a kernel, still pictures, and the publishing workflow."""

import ast
import base64
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import ipywidgets as widgets
import nbformat
import numpy as np
import pytest
import yaml
from browser import CHROMIUM, chromium
from PIL import Image
from recording import record_run

from dpo_lab.theory.frontier import OptimalFrontier
from dpo_lab.widgets import (
    bandit_explorer,
    beta_explorer,
    betas_explorer,
    bradley_terry_explorer,
    failures_explorer,
    frontier_explorer,
    gae_explorer,
    gradient_weight_explorer,
    landscape_explorer,
    prompts_explorer,
    rounds_explorer,
    tax_explorer,
    training_explorer,
)
from dpo_lab.widgets.frames import frames_html, slider_values

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LABELS = ["$5 to $10", r"c$\undefined$", "_hidden", '<b onclick="x">&"\n\\$']
TAX = [
    {"coefficient": c, "reward": 0.8, "kl": 3.0, "changes": {"$_a": 0.1 - c, "<b>": 60 * c}}
    for c in (0, 0.5, 2)
]
OPTIMAL = OptimalFrontier(np.array([0.5, 0.9]), np.array([0.0, 3.0]), np.array([64.0, 20.0]))

sys.path.insert(0, str(ROOT / "benchmarks"))

from pictures import shrunk, still  # noqa: E402


@pytest.fixture(scope="module")
def explorers(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    record_run(run)
    return {
        "beta_explorer": beta_explorer(labels=LABELS),
        "bandit_explorer": bandit_explorer(labels=LABELS),
        "gradient_weight_explorer": gradient_weight_explorer(),
        "bradley_terry_explorer": bradley_terry_explorer(labels=LABELS[:3]),
        "landscape_explorer": landscape_explorer(labels=LABELS[:3]),
        "training_explorer": training_explorer(run),
        "betas_explorer": betas_explorer({0.1: run, 5.0: run}, OPTIMAL),
        "frontier_explorer": frontier_explorer(),
        "gae_explorer": gae_explorer(LABELS, [-0.1, 0.2, -0.3, 1.5], [0.4, 0.5, 0.3, 0.9]),
        "prompts_explorer": prompts_explorer(),
        "rounds_explorer": rounds_explorer(labels=12, rounds=(1, 2, 4), seeds=2),
        "failures_explorer": failures_explorer(),
        "tax_explorer": tax_explorer(TAX),
    }


@pytest.fixture(scope="module")
def blocks(explorers):
    return {name: frames_html(explorer) for name, explorer in explorers.items()}


class Read(HTMLParser):
    """Tags of a block with their attributes, and the text of every frame."""

    def __init__(self, block):
        super().__init__()
        self.tags, self.texts, self.frame = [], [], None
        self.feed(block)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if "dpo-lab-frame" == dict(attributes).get("class"):
            self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def frames(self):
        return [a for a in self.attributes("div") if a.get("class") == "dpo-lab-frame"]


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


NAMES = [
    "beta_explorer",
    "bandit_explorer",
    "gradient_weight_explorer",
    "bradley_terry_explorer",
    "training_explorer",
    "betas_explorer",
    "frontier_explorer",
    "tax_explorer",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_frame_is_what_the_explorer_shows_at_its_value(explorers, blocks, name):
    explorer, read = explorers[name], Read(blocks[name])
    now = {key: slider.value for key, slider in explorer.sliders.items()}
    first, slider = next(iter(explorer.sliders.items()))
    values, images = slider_values(slider), read.attributes("img")
    assert len(values) == len(images) == len(read.frames()) > 1
    (range_input,) = read.attributes("input")
    assert range_input["max"] == str(len(values) - 1)
    shown = [i for i, frame in enumerate(read.frames()) if "hidden" not in frame]
    assert shown == [int(range_input["value"])] and values[shown[0]] == slider.value

    # in their order: a picture whose axes change depends a little on the one before it
    for i, value in enumerate(values):
        readout = explorer.show(**{**now, first: value})
        assert images[i]["alt"] == readout and read.texts[i].startswith(readout)
        source = images[i]["src"].removeprefix("data:image/webp;base64,")
        assert np.array_equal(pixels(base64.b64decode(source)), pixels(explorer.picture.png()))
    assert read.frames()[shown[0]]["data-value"] == range_input["aria-valuetext"]
    explorer.show(**now)


@pytest.mark.parametrize("name", ["training_explorer", "betas_explorer", "frontier_explorer"])
def test_samples_move_with_the_slider(explorers, blocks, name):
    explorer, read = explorers[name], Read(blocks[name])
    tables = [child for child in explorer.box.children if isinstance(child, widgets.HTML)][:-1]
    first, slider = next(iter(explorer.sliders.items()))
    for text, value in zip(read.texts, slider_values(slider), strict=True):
        explorer.show(**{first: value})
        # the diagnosis of a run stands below its samples
        sample = Read(f"<div class=dpo-lab-frame>{tables[0].value}</div>").texts[0]
        assert sample and sample in text
    explorer.show(**{first: slider.value})


@pytest.mark.parametrize("name", ["betas_explorer", "training_explorer"])
def test_frames_leave_the_explorer_as_it_was(explorers, name):
    explorer = explorers[name]
    before = explorer.picture.png(), [child.get_state() for child in explorer.box.children]
    frames_html(explorer)
    assert before == (
        explorer.picture.png(),
        [child.get_state() for child in explorer.box.children],
    )


@pytest.mark.parametrize("name", NAMES)
def test_text_is_never_markup_and_no_host_is_asked(blocks, name):
    read = Read(blocks[name])
    known = "div label input output p img em table tr th td span".split()
    assert {tag for tag, _ in read.tags} <= set(known)
    handlers = [value for _, found in read.tags for key, value in found.items() if key[:2] == "on"]
    assert len(handlers) == 1
    assert "http" not in re.sub(r"base64,[^\"]*", "", blocks[name])
    # MathJax reads text, not attributes
    outside = re.sub(r"<[^>]*>", "", blocks[name])
    assert "$" not in outside and "\\" not in outside


def test_values_are_evenly_spread_around_the_present_one():
    beta = widgets.FloatLogSlider(value=1.0, base=10, min=-2, max=2, step=0.05)
    assert len(slider_values(beta)) == 81
    assert slider_values(beta) == pytest.approx(np.geomspace(0.01, 100, 81))
    fine = widgets.FloatSlider(value=0.3, min=-4, max=4, step=0.05)
    values = slider_values(fine)
    assert len(values) <= 81 and 0.3 in values and np.allclose(np.diff(values), 0.1)
    choice = widgets.SelectionSlider(options=[("one", "a"), ("two", "b")], value="b")
    assert slider_values(choice) == ["a", "b"]


def test_values_of_ones_own():
    read = Read(frames_html(beta_explorer(), [0.1, 1.0, 10.0]))
    assert [frame["data-value"] for frame in read.frames()] == ["0.1", "1", "10"]
    with pytest.raises(ValueError, match="values is empty"):
        frames_html(beta_explorer(), [])


def test_an_explorer_has_frames_on_the_site_alone(monkeypatch, explorers):
    explorer = explorers["training_explorer"]
    monkeypatch.delenv("DPO_LAB_FRAMES", raising=False)
    assert "text/html" not in explorer._repr_mimebundle_()
    monkeypatch.setenv("DPO_LAB_FRAMES", "1")
    bundle = explorer._repr_mimebundle_()
    assert bundle["text/html"] == frames_html(explorer) and "image/png" in bundle


def test_the_site_asks_for_frames_and_prefers_them(monkeypatch):
    # undone after the test
    monkeypatch.setenv("DPO_LAB_FRAMES", "")
    settings = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    assert os.environ["DPO_LAB_FRAMES"]
    priorities = {mime: rank for _, mime, rank in settings["nb_mime_priority_overrides"]}
    # that of ipywidgets is 10
    assert priorities["text/html"] < priorities["image/png"] < 10
    assert settings["nb_ipywidgets_js"] == {}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_frames_of_a_page_weigh_at_most_a_megabyte_and_a_half(notebook, blocks):
    cells = [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    shown = re.findall(r"^(?:\w+ = )?(\w+_explorer)\(", "\n".join(cells), re.MULTILINE)
    assert sum(len(blocks[name]) for name in shown) <= 1_500_000


def test_the_root_of_the_site_leads_to_its_front_page():
    settings = (ROOT / "docs" / "conf.py").read_text()
    assert 'html_extra_path = ["extra"]' in settings
    assert 'root_doc = "docs/index"' in settings
    assert "url=docs/index.html" in (ROOT / "docs" / "extra" / "index.html").read_text()


# Pictures


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_still_picture(notebook):
    image = Image.open(PICTURES / f"{notebook.stem}.png")
    assert 300 <= image.width <= 960


def test_pictures_weigh_at_most_a_megabyte_and_a_half():
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) <= 1_500_000


def test_every_picture_is_of_a_notebook_the_slider_homework_or_the_rating_form():
    names = {f"{path.stem}.png" for path in NOTEBOOKS}
    assert {path.name for path in PICTURES.iterdir()} <= names | {
        "beta_slider.png",
        "beta_slider.gif",
        "homework_right.png",
        "homework_wrong.png",
        "rating_widget.png",
    }


def test_the_slider_is_pictured_as_a_visitor_sees_it():
    for name, heaviest in (("beta_slider.png", 150_000), ("beta_slider.gif", 400_000)):
        image = Image.open(PICTURES / name)
        # the cell in a window of 1,280 pixels; 520 wide, it leaves the README's table in view
        assert 900 <= image.width <= 1280 and image.height <= 0.57 * image.width
        assert (PICTURES / name).stat().st_size <= heaviest
    assert image.n_frames > 10


def png(color, size=(40, 20)):
    out = io.BytesIO()
    Image.new("RGBA", size, color).save(out, "png")
    return out.getvalue()


def cell(*pictures, tags=()):
    outputs = [
        nbformat.v4.new_output(
            "display_data", data={"image/png": base64.b64encode(picture).decode()}
        )
        for picture in pictures
    ]
    return nbformat.v4.new_code_cell("", outputs=outputs, metadata={"tags": list(tags)})


def test_the_tagged_picture_is_taken_or_else_the_first():
    red, green, blue = png("red"), png("green"), png("blue")
    cells = [nbformat.v4.new_markdown_cell("a"), cell(), cell(red), cell(green, blue)]
    assert still(nbformat.v4.new_notebook(cells=cells)) == red
    cells[-1].metadata.tags = ["still"]
    assert still(nbformat.v4.new_notebook(cells=cells)) == green
    assert still(nbformat.v4.new_notebook(cells=[cell()])) is None


def test_a_picture_is_shrunk_onto_white():
    assert (pixels(shrunk(png((0, 0, 0, 0)))) == 255).all()
    assert pixels(shrunk(png("red", (2000, 1000)))).shape == (480, 960, 3)
    assert pixels(shrunk(png("red"))).shape == (20, 40, 3)


# Workflow and Makefile


def test_the_workflow_publishes_what_make_site_builds():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text())
    # YAML reads the key `on` as true
    assert workflow[True]["push"] == {"branches": ["main"]}
    assert workflow["permissions"] == {"contents": "read", "pages": "write", "id-token": "write"}
    build, deploy = workflow["jobs"]["build"]["steps"], workflow["jobs"]["deploy"]
    assert [step["run"] for step in build if "run" in step] == ["make site"]
    (upload,) = (s for s in build if "upload-pages-artifact" in s.get("uses", ""))
    assert upload["with"]["path"] == "site" and build.index(upload) == len(build) - 1
    assert deploy["needs"] == "build"
    uses = [step["uses"] for step in [*build, *deploy["steps"]] if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in uses)
    assert {"configure-pages", "upload-pages-artifact", "deploy-pages"} <= {
        action.split("/")[1].split("@")[0] for action in uses
    }


@pytest.fixture
def checkout(tmp_path):
    """Makefile and notebooks, beside a .venv that counts as set up."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1_000_000, 1_000_000))
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


def test_make_site_builds_the_pages_and_then_the_pictures(checkout):
    # a make that runs the tests would speak through this one
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "site"]
    printed = subprocess.check_output(command, cwd=checkout, text=True, env=own)
    _, sphinx, pictures = printed.splitlines()
    assert "-m sphinx" in sphinx and " -W " in sphinx and sphinx.endswith(" . site")
    assert "benchmarks/pictures.py" in pictures


# In a browser

in_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; .ci/run installs it"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


class TestInABrowser:
    pytestmark = in_browser

    def test_a_page_without_a_kernel_moves(self, browser, explorers, blocks, tmp_path):
        page = browser.new_page()
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        # two on one page: each moves its own frames
        body = blocks["beta_explorer"] + blocks["training_explorer"]
        (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{body}")
        page.goto((tmp_path / "page.html").as_uri())

        def seen(name):
            block = page.locator(".dpo-lab-frames").nth(list(names).index(name))
            (frame,) = [f for f in block.locator(".dpo-lab-frame").all() if f.is_visible()]
            source = frame.locator("img").get_attribute("src")
            texts = frame.locator("p").first.inner_text(), block.locator("output").inner_text()
            return *texts, pixels(base64.b64decode(source.split(",")[1])).tobytes()

        def expected(name, value, label):
            explorer = explorers[name]
            readout = explorer.show(**{next(iter(explorer.sliders)): value})
            return readout, label, pixels(explorer.picture.png()).tobytes()

        names = "beta_explorer", "training_explorer"
        ranges = page.locator("input[type=range]")
        start = expected("beta_explorer", 1.0, "1")
        assert seen("beta_explorer") == start

        # dragged to the left end
        box = ranges.first.bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] / 2, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + 2, middle, steps=5)
        page.mouse.up()
        assert seen("beta_explorer") == expected("beta_explorer", 0.01, "0.01") != start
        assert ranges.first.get_attribute("aria-valuetext") == "0.01"

        # by keyboard, the other one too
        ranges.first.focus()
        page.keyboard.press("End")
        assert seen("beta_explorer") == expected("beta_explorer", 100.0, "100")
        before = seen("training_explorer")
        assert before == expected("training_explorer", 0, "0")
        ranges.last.focus()
        page.keyboard.press("ArrowRight")
        assert seen("training_explorer") == expected("training_explorer", 1, "4") != before
        assert "A joy & more" in page.locator("body").inner_text()
        assert errors == []
        assert {url.split(":")[0] for url in asked} <= {"file", "data"}
        page.close()

    def test_make_lab_opens_the_first_notebook_and_asks_nothing(self, browser, checkout, tmp_path):
        scripts = Path(sys.executable).parent
        (checkout / ".venv" / "bin" / "jupyter").symlink_to(scripts / "jupyter")
        # what setting up .venv writes there
        lines = [
            line.strip().removeprefix("@")
            for line in (ROOT / "Makefile").read_text().splitlines()
            if "labconfig" in line
        ]
        for line in lines:
            subprocess.run(line, shell=True, cwd=checkout, check=True)
        assert json.loads(next((checkout / ".venv" / "etc").rglob("*.json")).read_text())

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path / "log"
        environment = {
            **{
                k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
            },
            **{f"JUPYTER_{k}_DIR": str(tmp_path / k) for k in ("CONFIG", "DATA", "RUNTIME")},
            "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
            "JUPYTER_CONFIG_PATH": str(checkout / ".venv" / "etc" / "jupyter"),
        }
        arguments = f"ARGS=--no-browser --allow-root --port={port} --ServerApp.port_retries=0"
        with log.open("w") as out:
            process = subprocess.Popen(
                ["make", "lab", arguments],
                cwd=checkout,
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        try:
            page = browser.new_page()
            for _ in range(240):
                address = re.search(r"http://127\S+", log.read_text())
                if address or process.poll() is not None:
                    break
                page.wait_for_timeout(500)
            assert address, log.read_text()
            page.goto(address[0])
            page.locator(".jp-CodeCell").first.wait_for(timeout=90_000)
            page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(
                timeout=90_000
            )
            title = page.locator(".lm-TabBar-tab.jp-mod-current .lm-TabBar-tabLabel").first
            assert title.inner_text() == NOTEBOOKS[0].name
            # "none" would ask, about a second after the page is there
            answer = page.evaluate(
                """async () => {
                    const name = "@jupyterlab/apputils-extension:notification";
                    const settings = await (await fetch("/lab/api/settings/" + name)).json();
                    return settings.schema.properties.fetchNews.default;
                }"""
            )
            assert answer == "false"
            page.wait_for_timeout(3_000)
            assert page.locator(".jp-Dialog").count() == 0
            assert page.locator(".Toastify__toast").count() == 0
            page.close()
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=120)


def test_no_docstring_begins_a_substitution():
    """`make site` reads |y| as the name of a text to put there, and stops."""
    begins = re.compile(r"(?:^|[\s'\"(\[{<:/-])\|(?![|\s])")
    found = []
    for path in sorted((ROOT / "dpo_lab").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            outside = re.sub(r"`[^`]*`", "", text or "")
            found += [
                f"{path.name}: {line}" for line in outside.splitlines() if begins.search(line)
            ]
    assert found == []
