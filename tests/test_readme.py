"""The README says what was measured, and its lines of code run."""

import importlib.util
import json
import re
from pathlib import Path

import torch

from dpo_lab.logprobs import score_completions
from dpo_lab.sentiment.run import CONFIGS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_recorded_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert module.render(text := page.read_text(encoding="utf-8")) == text
    assert "±" in README and "bits a byte" in README.replace("\n", " ")


def test_the_default_beta_has_the_most_reward_within_4_nats():
    rows = json.loads((ROOT / "benchmarks" / "results" / "sweep.json").read_text())["rows"]
    best = max(
        (row for row in rows if row["after"]["kl"] <= 4), key=lambda row: row["after"]["reward"]
    )
    config = CONFIGS["laptop"].dpo
    assert len({row["beta"] for row in rows}) > 1
    assert (best["beta"], best["learning_rate"]) == (config.beta, config.loop.learning_rate)


def test_the_homework_lines_run(model):
    code = re.search(r"homework\n\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) == 5
    prompts, completions, prompt_of = (
        [[0, 5], [0, 9]],
        [[3, 0], [4, 8, 0], [7, 0], [6, 6, 6, 0]],
        [0, 0, 1, 1],
    )
    names = {
        "policy": model,
        "prompts": prompts,
        "completions": completions,
        "prompt_of": prompt_of,
    }
    names |= {"reference_logps": score_completions(model, prompts, completions, prompt_of)}
    names |= {"chosen": torch.tensor([0, 2]), "rejected": torch.tensor([1, 3])}
    exec(code, names)
    assert all(p.grad is not None for p in model.parameters())


def test_every_file_and_command_named_exists():
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / "dpo_lab" / name).exists(), name
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    listed = set(re.findall(r"`(\w+\.py)`", README.split("## Map")[1]))
    assert listed == {p.name for p in (ROOT / "dpo_lab").glob("*.py")} - {"__init__.py"}


def test_files_import_only_files_above_them():
    order = re.findall(r"`(\w+)\.py`", README.split("## Map")[1].split("A file imports")[0])
    for place, name in enumerate(order):
        source = (ROOT / "dpo_lab" / f"{name}.py").read_text()
        for used in re.findall(r"^(?:from|import) dpo_lab\.(\w+)", source, re.MULTILINE):
            assert order.index(used) < place, f"{name} imports {used}"


def test_a_page_without_measurements_on_a_gpu_says_so(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", ROOT / "nowhere")
    page = "<!-- gpu -->\n<!-- end -->\n<!-- gpu exactness -->\n<!-- end -->\n<!-- gpu dpo -->\n<!-- end -->\n<!-- gpu speed -->\n<!-- end -->"
    assert module.render(page).count(module.UNMEASURED) == 4
