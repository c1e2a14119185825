"""The pages say what was measured, their code runs as pasted, and what they name exists."""

import importlib.util
import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from hub_copies import into_cache, write_copy

from dpo_lab.checks import mistakes
from dpo_lab.sentiment.run import CONFIGS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
}
SNIPPETS = [
    pytest.param(code, id=f"{page}-{i}")
    for page, text in PAGES.items()
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]


@pytest.fixture
def figures(monkeypatch):
    """benchmarks/readme.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Figures


def test_the_figures_are_those_of_the_recorded_results(figures):
    for page in figures.pages():
        text = page.read_text(encoding="utf-8")
        assert figures.render(text) == text, f"run python benchmarks/readme.py: {page.name}"
    assert "±" in README
    assert "bits per byte" in PAGES["docs/models.md"].replace("\n", " ")


def test_every_block_of_figures_stands_in_a_page(figures):
    used = {
        name
        for page in figures.pages()
        for name in re.findall(r"<!-- ([a-z ]+) -->", page.read_text(encoding="utf-8"))
    }
    assert used - {"end"} == set(figures.BLOCKS)


def test_a_page_without_measurements_on_a_gpu_says_so(figures, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", ROOT / "nowhere")
    names = ("gpu", "gpu exactness", "gpu dpo", "gpu speed")
    page = "\n".join(f"<!-- {name} -->\n<!-- end -->" for name in names)
    assert figures.render(page).count(figures.UNMEASURED) == 4
    assert figures._gpu_result() == figures.UNMEASURED


def test_the_laptop_config_has_settings_of_the_sweep_and_reaches_090_within_4_nats():
    """Seeds of the sweep are not among the reported ones."""
    results = {
        name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in ("sweep", "main_job")
    }
    swept, reported = results["sweep"]["rows"], results["main_job"]["rows"]
    assert not {row["seed"] for row in swept} & {row["seed"] for row in reported}

    # of the learning rates and blocks, those with the most reward within 4 nats
    found = {}
    for row in swept:
        key = row["beta"], row["learning_rate"], row["lora_layers"]
        found.setdefault(key, []).append((row["after"]["kl"], row["after"]["reward"]))
    means = {key: np.mean(values, 0) for key, values in found.items()}
    best = max((key for key in means if means[key][0] <= 4), key=lambda key: means[key][1])
    config = CONFIGS["laptop"].dpo
    assert len({beta for beta, *_ in found}) > 1
    assert best[1:] == (config.loop.learning_rate, config.lora_layers)
    assert (config.beta, *best[1:]) in found

    confined = json.loads((ROOT / "benchmarks" / "results" / "main_job-avx2.json").read_text())[
        "rows"
    ]
    for rows in (reported, confined):
        assert np.mean([row["after"]["kl"] for row in rows]) <= 4
        assert round(np.mean([row["after"]["reward"] for row in rows]), 2) >= 0.90
    assert np.mean([row["after"]["reward"] for row in confined]) >= 0.90


def test_every_block_is_written_where_float32_is_the_faster_precision(figures, monkeypatch):
    """As after `make bench` on a processor without fast bfloat16."""
    recorded, slower = figures._result, figures._result("cpu-avx2")
    assert not any(row["precision"] == "bfloat16" for row in slower["table"])
    monkeypatch.setattr(
        figures, "_result", lambda name: slower if name == "cpu" else recorded(name)
    )
    for name, block in figures.BLOCKS.items():
        assert block().strip() == block(), name
        assert block(), name
    assert "On the first machine" not in figures.limit()


def test_pages_name_the_size_and_the_settings_of_the_configs():
    """The full run wherever a command or a sentence has its prefixes, and the table of configs."""
    full = CONFIGS["laptop"].task.prefixes
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in (README, makefile, PAGES["CHANGELOG.md"], PAGES["docs/experiment.md"]):
        named = re.findall(r'ARGS="--prefixes (\d+)"', text)
        assert named
        assert set(map(int, named)) == {full}
    assert f"takes all {full:,} prefixes" in PAGES["docs/experiment.md"]
    assert f"full run, with {full:,} prefixes" in PAGES["docs/results.md"]

    # the table, a column per config
    settings = {
        "prefixes": lambda config: f"{config.task.prefixes:,}",
        "pairs per step": lambda config: str(config.dpo.batch_pairs),
        "beta": lambda config: f"{config.dpo.beta:g}",
    }
    for name, setting in settings.items():
        cells = " | ".join(setting(CONFIGS[config]) for config in ("laptop", "gpu", "paper"))
        assert f"| {name} | {cells} |" in PAGES["docs/experiment.md"]
    beta = CONFIGS["laptop"].dpo.beta
    assert f"(the laptop config has {beta:g})" in PAGES["CHANGELOG.md"]


def test_every_mistake_was_measured():
    results = json.loads((ROOT / "benchmarks" / "results" / "mistakes.json").read_text())
    for exercise, switches in mistakes().items():
        known = [
            (slip.name, {s: one}) for s, some in switches.items() for one, slip in some.items()
        ]
        rows = results["exact"]["exercises"][exercise]["rows"]
        assert [(row["name"], row["settings"]) for row in rows] == [("right", {}), *known]

    # DPO's loss trained the language model with each of them
    trained = results["model"]["exercises"]["dpo_loss"]
    assert [row["name"] for row in trained][1:] == [
        slip.name for some in mistakes()["dpo_loss"].values() for slip in some.values()
    ]


def test_every_equation_names_a_test_that_exists(figures):
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert set(figures.EQUATION_TESTS) == {row["equation"] for row in figures.equation_index()}
    for name in figures.EQUATION_TESTS.values():
        assert f"def {name}(" in tests


# Code


def test_the_homework_lines_run():
    code = re.search(r"homework\n\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 12
    names = {}
    exec(code, names)
    assert all(p.grad is not None for p in names["policy"].parameters())
    assert names["dpo"].losses.tolist() == pytest.approx(2 * [math.log(2)])
    assert len(names["logps"]) == 4


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_has_no_undefined_name_and_imports_from_the_front(code):
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9,F", "-"]
    checked = subprocess.run(command, input=code, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    packages = {path.parent.name for path in (ROOT / "dpo_lab").glob("*/__init__.py")}
    for name in re.findall(r"^\s*(?:from|import) dpo_lab\.?([\w.]*)", code, re.MULTILINE):
        assert name in packages | {""}, name


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs_as_pasted(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "load_preferences(" in code:
        # a made-up copy of HH, in the cache of the hub
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        into_cache(tmp_path, "Anthropic/hh-rlhf", write_copy(tmp_path / "hh", "hh"))
    exec(code, {})


# What is named exists


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130
    assert len(README.encode()) <= 8_000


def test_the_first_screen_is_a_sentence_a_picture_a_command_and_the_notebooks():
    order = ["# DPO Lab", "docs/pictures/beta_slider.", "make lab", "| notebook |", "## Use it"]
    places = [README.index(part) for part in order]
    assert places == sorted(places)
    notebooks = re.findall(r"^\| \[(\w+)\]\(notebooks/\1\.ipynb\) \|.*\| \d+ \|$", README, re.M)
    assert notebooks == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_the_tree_lists_what_is_in_the_package():
    package = ROOT / "dpo_lab"
    listed = re.findall(r"^  (\w+(?:\.py|/)) ", README, re.MULTILINE)
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert sorted(listed) == sorted(files | folders)


def test_the_api_page_lists_every_module():
    package = ROOT / "dpo_lab"
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    listed = re.findall(r"automodule:: ([\w.]+)", PAGES["docs/api.md"])
    assert sorted(listed) == sorted(modules)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_file_named_exists(page):
    text, folder = PAGES[page], (ROOT / page).parent
    for path in re.findall(r'src="([^"]*)"', text):
        assert (folder / path).exists(), path
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = folder / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            assert anchor in headings(target.read_text(encoding="utf-8")), (path, anchor)
    for path in re.findall(r"`((?:dpo_lab|benchmarks|docs|tests|notebooks)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def headings(text: str) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_every_command_named_exists(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", PAGES[page], re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    from dpo_lab.cli import COMMANDS

    for command in re.findall(r"(?:^|`|/)dpo-lab ([a-z]+)", PAGES[page], re.MULTILINE):
        assert command in COMMANDS, command
    for config in re.findall(r"--config (\w+)", PAGES[page]):
        assert config in CONFIGS, config
    assert "--lane" not in PAGES[page]


# Words

UNIT = (
    "nats|nat|tokens|seconds|minutes|hours|bytes|ms|bits|pairs|pair|completions|memory|times|one|once"
    "|FLOPs|weights|log-probs|parameters|prompts|steps|GB|MB|s|traffic|compute|reads?|costs?"
)
OF = (
    "token|step|pair|second|minute|prompt|prefix|completion|byte|batch|row|GPU|process|seed|page|"
    "parameter|epoch|run|model|position|point|contender"
)


@pytest.mark.parametrize("page", PAGES)
def test_a_rate_says_per(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL).replace("\n", " ")
    assert re.findall(rf"\b(?:{UNIT}|\d) an? (?:{OF})\b", text) == []


def test_british_spelling_and_own_words_are_gone():
    own = (
        r"\b(?:contenders?|licence|labell\w+|tokenis\w+|minimis\w+|optimis\w+|quantis\w+|colour)\b"
    )
    for page, text in PAGES.items():
        if page != "CHANGELOG.md":
            prose = re.sub(r"`[^`]*`", "", text)
            assert re.findall(own, prose, re.IGNORECASE) == [], page


# The version


def test_the_version_is_that_of_pyproject():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert re.search(r"^## (\S+):", PAGES["CHANGELOG.md"], re.MULTILINE)[1] == version


def test_the_citation_file_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] and citation["title"] and citation["message"]
    assert (
        citation["license"]
        == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    )
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)
