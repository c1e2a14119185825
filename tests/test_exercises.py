"""The exercise notebooks run without their solutions and with them; the answers drive real things.

Their cells are run in this process: the tests of the graders run whole notebooks in kernels.
"""

import inspect
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from test_train import CONFIG, make_preferences, same, state, timeless

from dpo_lab.checks import EXERCISES, Wrong, diagnosis
from dpo_lab.models import load_model
from dpo_lab.train import train_dpo
from tests.test_checks import solutions

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from driven import on_bandit  # noqa: E402
from mistaken import mistaken, singles  # noqa: E402

FOLDER = ROOT / "notebooks" / "exercises"
NOTEBOOKS = sorted(FOLDER.glob("ex*.ipynb"))

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def nothing_solved(monkeypatch):
    """As in a new kernel, in the folder of the notebooks."""
    monkeypatch.setattr(diagnosis, "_solved", set())
    monkeypatch.chdir(FOLDER)


def run(path, answers):
    """Run the code cells with these answers, by name; what each check says, None for right."""
    space, said = {"F": torch.nn.functional}, {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        grader = cell.metadata.get("nbgrader", {})
        source = answers.get(grader.get("grade_id"), cell.source)
        try:
            exec(compile(source, f"{path.name}:{cell.id}", "exec"), space)
            verdict = None
        except Wrong as wrong:
            verdict = wrong.names
        if grader.get("grade"):
            assert "raises-exception" in cell.metadata["tags"] and grader["points"] > 0
            said[grader["grade_id"].removeprefix("check_")] = verdict
        else:
            assert verdict is None
    return said


@every_notebook
def test_a_notebook_as_committed_says_what_is_not_written_yet(path, nothing_solved, capsys):
    said = run(path, {})
    assert len(said) >= 3 and set(said.values()) == {("not written yet",)}
    assert "is right" not in capsys.readouterr().out


@every_notebook
def test_a_notebook_with_the_solutions_has_no_error(path, nothing_solved, capsys):
    answers = {name: inspect.getsource(getattr(solutions, f"my_{name}")) for name in EXERCISES}
    said = run(path, answers)
    assert set(said.values()) == {None}
    out = capsys.readouterr().out
    assert out.count(" is right\n") == len(said) and "waits for" not in out


def test_every_exercise_stands_in_one_notebook_with_the_signature_of_its_solution():
    found = {}
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            name = cell.metadata.get("nbgrader", {}).get("grade_id")
            if name in EXERCISES:
                assert name not in found
                found[name] = cell.source.partition("raise NotImplementedError")[0]
    assert list(found) == list(EXERCISES)
    for name, head in found.items():
        assert inspect.getsource(getattr(solutions, f"my_{name}")).startswith(head), name


# what an answer drives


@pytest.fixture(scope="module")
def preferences(tiny):
    return make_preferences(tiny)


def test_the_solution_trains_byte_for_byte_as_the_package_s_loss(tiny, preferences):
    ours, theirs = load_model(str(tiny)), load_model(str(tiny))
    expected = train_dpo(ours, preferences, CONFIG, seed=2, progress=None)
    found = train_dpo(
        theirs, preferences, CONFIG, seed=2, progress=None, loss=solutions.my_dpo_loss
    )
    assert same(state(ours), state(theirs))
    for a, b in zip(timeless(expected), timeless(found)):
        assert {name: a[name] for name in b} == b


def test_a_loss_of_one_number_is_refused(tiny, preferences):
    def averaged(*data):
        return solutions.my_dpo_loss(*data).mean()

    with pytest.raises(ValueError, match="shape"):
        train_dpo(load_model(str(tiny)), preferences, CONFIG, progress=None, loss=averaged)


# on a bandit with labels without end a constant factor changes nothing, and (1 - p)^2 is a proper
# scoring rule: its mean is least at the true probability, as that of -log p
SAME_OPTIMUM = {"beta inside and outside", "bits", "squared error"}


def test_the_solution_ends_at_the_optimal_policy():
    assert on_bandit(solutions.my_dpo_loss) <= 1e-9


@pytest.mark.parametrize("name, settings", singles(EXERCISES["dpo_loss"])[1:])
def test_a_mistake_ends_elsewhere_unless_it_shares_the_optimum(name, settings):
    distance = on_bandit(mistaken("dpo_loss", settings))
    if name in SAME_OPTIMUM:
        assert distance <= 1e-9
    else:
        # a ratio of log-ratios, 0 / 0 at the reference
        assert distance is None and name == "log-ratios divided" or distance >= 0.005
