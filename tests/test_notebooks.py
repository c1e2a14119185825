"""Every notebook reads well and runs top to bottom, offline; it is committed without outputs."""

import functools
import re
from pathlib import Path

import mutants
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SITE = "https://dpo-lab.github.io/dpo-lab/"

# what the cell tagged `parameters` says in `make test`; `make test-long` leaves it as it is
SMALL = {
    "04b_ppo_on_a_language_model": {
        "demonstrations": 128,
        "passes": 2,
        "prefixes": 160,
        "eval_prefixes": 48,
        "rollouts": 5,
        "batch": 48,
    },
    "04c_alignment_tax": {
        "prefixes": 64,
        "eval_prefixes": 24,
        "rollouts": 4,
        "batch": 32,
        "n_items": 20,
    },
    "05_dpo_gpt2_imdb": {
        "prefixes": 100,
        "eval_prefixes": 256,
        "betas": (0.01, 0.3, 5.0),
        "beta_prefixes": 48,
        "beta_eval_prefixes": 16,
    },
    "05c_on_policy_dpo": {
        "prefixes": 64,
        "eval_prefixes": 16,
        "live_rounds": 2,
        "budgets": (480, 7_680),
        "many_rounds": (1, 4, 24),
    },
    "06_preference_data": {
        "prefixes": 24,
        "eval_prefixes": 24,
        "sets": 1,
        "epochs": 2,
        "long": 2,
        "learning_rate": 1e-4,
        "frontier_completions": 4,
    },
    "07_win_rates": {
        "prefixes": 48,
        "rollouts": 1,
        "batch": 16,
        "questions": 40,
        "temperatures": (0, 1),
        "best_of": 2,
    },
    "08_failures": {
        "prefixes": 6,
        "max_new_tokens": 8,
        "eval_prefixes": 8,
        "held_out": 4,
    },
}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def parametrized(path, parameters):
    """A notebook with other values in its cell of parameters."""
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        assert len(tagged) == 1
        names = set(re.findall(r"^(\w+) = ", tagged[0].source, re.MULTILINE))
        assert set(parameters) <= names
        tagged[0].source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return notebook


@functools.cache
def ran(path):
    """A notebook and its one run in `make test`, with its mutants and solutions."""
    notebook = parametrized(path, SMALL.get(path.stem))
    return notebook, mutants.execute(notebook, path.parent, mutants.entries(path.stem))


@every_notebook
def test_a_notebook_runs(path):
    _, run = ran(path)
    if run.error:
        raise run.error


@every_notebook
def test_every_assert_of_a_notebook_can_fail(path):
    listed = mutants.entries(path.stem)
    notebook, run = ran(path)
    wrong = mutants.faults(notebook, listed) + mutants.survivors(notebook, listed, run)
    if wrong:
        pytest.fail("\n".join([f"{path.name}, tests/mutations/{path.stem}.toml:", *wrong]), False)


@every_notebook
def test_every_solution_of_a_notebook_runs(path):
    notebook, run = ran(path)
    for number, blocks in mutants.solutions(notebook):
        assert len(blocks) == 1, f"Solution {number} has {len(blocks)} blocks of Python"
        outcome = run.solutions.get(number, {"error": "not reached"})
        assert outcome["error"] is None, f"{path.name}, Solution {number}: {outcome}"


@every_notebook
def test_every_exercise_of_a_notebook_has_a_solution(path):
    notebook = nbformat.read(path, as_version=4)
    numbers = [number for number, _ in mutants.solutions(notebook)]
    assert numbers == list(range(1, mutants.exercises(notebook) + 1))


@every_notebook
def test_every_prediction_of_a_notebook_is_answered(path):
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in cells(notebook, "markdown"))
    asked, answered = text.count("**Predict"), len(mutants.folded(notebook, "(Answer)"))
    assert answered == asked


def test_few_asserts_guard_a_file_that_is_shipped():
    lists = [mutants.entries(path.stem) for path in NOTEBOOKS]
    assert sum(len(listed.get("shipped", [])) for listed in lists) <= 8


def test_every_list_of_mutants_is_of_a_notebook():
    stems = [path.stem for path in NOTEBOOKS]
    assert [path for path in mutants.MUTATIONS.glob("*.toml") if path.stem not in stems] == []


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_at_full_size(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    if error := mutants.execute(nbformat.read(path, as_version=4), path.parent, {}).error:
        raise error


@every_notebook
def test_a_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert "widgets" not in notebook.metadata


@every_notebook
def test_a_notebook_is_of_a_readable_size(path):
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in cells(notebook, "markdown"))
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1, (
        "one title: each is a page of its own in the site's navigation"
    )
    lengths = [len(cell.source.splitlines()) for cell in cells(notebook, "code")]
    assert max(lengths) <= 25 and sum(lengths) <= 250
    assert 25 <= len(notebook.cells) <= 45
    unfolded = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert len(unfolded.split()) <= 1_800

    # what JupyterLab shows whole at 1,280 pixels
    lines = [line for cell in cells(notebook, "code") for line in cell.source.splitlines()]
    assert not [line for line in lines if len(line) > 88]
    assert len([line for line in lines if re.match(r"(import|from) ", line)]) <= 6


@every_notebook
def test_a_notebook_begins_with_what_it_is_for(path):
    notebook = nbformat.read(path, as_version=4)
    header = notebook.cells[0].source
    assert header.startswith(f"# {path.stem.split('_')[0]}. ")
    rows = re.findall(r"^\| \*\*([\w ]+)\*\* \| (.+) \|$", header, re.MULTILINE)
    assert [name for name, _ in rows] == ["you will", "time", "memory", "needs", "words"]
    assert f"]({SITE}notebooks/{path.stem}.html)" in header


@every_notebook
def test_a_notebook_has_a_still_picture_near_its_top(path):
    """It is on disk, and one cell is tagged as the one that it shows."""
    notebook = nbformat.read(path, as_version=4)
    top = "\n".join(cell.source for cell in notebook.cells[:3])
    (picture,) = re.findall(r"^!\[[^\]]+\]\((.+)\)$", top, re.MULTILINE)
    assert picture == f"../docs/pictures/{path.stem}.png"
    assert (path.parent / picture).is_file()
    stills = [cell for cell in notebook.cells if "still" in cell.metadata.get("tags", [])]
    assert [cell.cell_type for cell in stills] == ["code"]


def test_the_first_notebook_in_the_list_is_the_first_to_open():
    assert NOTEBOOKS[0].stem == "00_start_here"
    first = cells(nbformat.read(NOTEBOOKS[0], as_version=4), "code")[0]
    assert first.source == "from dpo_lab import beta_explorer\n\nbeta_explorer()"


def test_the_map_lists_every_notebook():
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    (table,) = [cell.source for cell in notebook.cells if "## The map" in cell.source]
    assert re.findall(r"^\| \[?(\d\w+)", table, re.MULTILINE) == [path.stem for path in NOTEBOOKS]


def test_links_between_notebooks_lead_somewhere():
    for path in NOTEBOOKS:
        for name in re.findall(r"\]\((\w+\.ipynb)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / name).exists(), f"{path.name} links {name}"


def test_the_readme_names_the_same_site():
    assert SITE in (ROOT / "README.md").read_text(encoding="utf-8")


def test_there_are_notebooks():
    assert NOTEBOOKS
