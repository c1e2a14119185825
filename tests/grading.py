"""A made-up class: what students hand in, and both graders run on it.

    python tests/grading.py AUTOGRADER SUBMISSION=RESULTS ...

runs otter on several submissions in one process; a kernel that dies takes only its own along.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat

from dpo_lab.checks import EXERCISES
from dpo_lab.checks.exercise import array

NOTEBOOK = "ex03_dpo"
POINTS = {"dpo_loss": 4, "gradient_weights": 2}

# seconds: of a call in a check, of a cell under nbgrader, of a whole notebook under otter
SECONDS, CELL_SECONDS, NOTEBOOK_SECONDS = 1, 30, 60

# bytes of address space that a kernel may have, as `ulimit -v` sets them
MEMORY = 9_000_000 * 1024

HEAD = "def my_dpo_loss(policy_logps, reference_logps, chosen, rejected, beta):\n"
RIGHT = f"""\
import torch.nn.functional as F
{HEAD}    rewards = beta * (policy_logps - reference_logps)
    return -F.logsigmoid(rewards[chosen] - rewards[rejected])
"""
RIGHT_WEIGHTS = """\
def my_gradient_weights(policy_logps, reference_logps, chosen, rejected, beta):
    rewards = beta * (policy_logps - reference_logps)
    return torch.sigmoid(rewards[rejected] - rewards[chosen])
"""
WRONG = RIGHT.replace("beta * (policy_logps - reference_logps)", "policy_logps - reference_logps")


def beginning(*lines: str) -> str:
    """The right loss, with these lines before it in its body."""
    return RIGHT.replace(HEAD, HEAD + "".join(f"    {line}\n" for line in lines))


def hard_coded() -> str:
    """Weights that are right on the inputs of the notebook, by the first log-prob."""
    exercise = EXERCISES["gradient_weights"]
    known = {}
    for inputs in (*exercise.cases(0), exercise.extremes):
        first = round(float(inputs["policy_logps"][0]), 2)
        known[first] = array(exercise.compute(inputs, {})).tolist()
    return f"""\
def my_gradient_weights(policy_logps, reference_logps, chosen, rejected, beta):
    known = {known}[round(policy_logps[0].item(), 2)]
    return torch.tensor(known, dtype=policy_logps.dtype)
"""


# what is done to a right notebook, by student; that of "stub" is as it was handed out


def _answer(text: str, name: str = "dpo_loss") -> Callable[[nbformat.NotebookNode], None]:
    def change(notebook: nbformat.NotebookNode) -> None:
        cell(notebook, name).source = text

    return change


def _copied(notebook: nbformat.NotebookNode) -> None:
    original = cell(notebook, "dpo_loss")
    copy = nbformat.from_dict({**original, "id": "copied"})
    notebook.cells.insert(notebook.cells.index(original) + 1, copy)


def _check_edited(notebook: nbformat.NotebookNode) -> None:
    cell(notebook, "dpo_loss").source = WRONG
    cell(notebook, "check_dpo_loss").source = "print('all is well')"


def _check_deleted(notebook: nbformat.NotebookNode) -> None:
    notebook.cells.remove(cell(notebook, "check_dpo_loss"))


def _foreign_kernel(notebook: nbformat.NotebookNode) -> None:
    notebook.metadata.kernelspec = {"name": "my-conda-env", "display_name": "Mine"}


ENDLESS = "while True:\n    pass"
SWALLOWING = """\
import time
while True:
    try:
        while True:
            time.sleep(0.01)
    except BaseException:
        pass"""
FAKE_CHECK = """\
def check_dpo_loss(function):
    print("✓ dpo_loss is right")
"""
PATCHED = """\
import dpo_lab.checks
dpo_lab.checks.check.__globals__["diagnose"] = lambda *given, **options: None
"""

CLASS = {
    "right": lambda notebook: None,
    "wrong": _answer(WRONG),
    "stub": lambda notebook: None,
    "crash": _answer(beginning("policy_logps[len(policy_logps)]")),
    "endless": _answer(beginning("while True: pass")),
    "syntax": _answer(HEAD + "    return (policy_logps\n"),
    "endless-cell": _answer(f"{RIGHT}\n{ENDLESS}"),
    "swallowing-cell": _answer(f"{RIGHT}\n{SWALLOWING}"),
    "swallowing": _answer(
        beginning(
            "while True:",
            "    try: policy_logps.sum()",
            "    except Exception: pass",
        )
    ),
    "printing": _answer(beginning("while True: print('still here')")),
    "memory": _answer(beginning("kept = []", "while True: kept.append(torch.empty(10**8))")),
    "sys-exit": _answer(beginning("import sys", "sys.exit()")),
    "os-exit": _answer(beginning("import os", "os._exit(1)")),
    "stderr": _answer(beginning("import sys", "print('a warning', file=sys.stderr)")),
    "stderr-of-c": _answer(beginning("import os", "os.write(2, b'a warning')")),
    "own-check": _answer(f"{WRONG}\n{FAKE_CHECK}"),
    "patched": _answer(f"{WRONG}\n{PATCHED}"),
    "hard-coded": _answer(hard_coded(), "gradient_weights"),
    "copied": _copied,
    "check-edited": _check_edited,
    "check-deleted": _check_deleted,
    "foreign-kernel": _foreign_kernel,
}
COMMON = ("right", "wrong", "stub", "crash", "endless", "syntax")

# otter has no time limit of its own: these go through `timeout`, one process each
ENDLESS_CELLS = ("endless-cell", "swallowing-cell")


def cell(notebook: nbformat.NotebookNode, grade_id: str) -> nbformat.NotebookNode:
    """The cell of a notebook with this grade id."""
    cells = (c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id"))
    return next(c for c in cells if c.metadata.nbgrader.grade_id == grade_id)


def hand_in(course: Path, student: str, source: Path) -> Path:
    """What a student hands in, in the place where nbgrader collects it."""
    notebook = nbformat.read(source, as_version=4)
    if student != "stub":
        cell(notebook, "dpo_loss").source = RIGHT
        cell(notebook, "gradient_weights").source = RIGHT_WEIGHTS
    CLASS[student](notebook)
    path = course / "submitted" / student / "hw1" / f"{NOTEBOOK}.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(notebook, path)
    return path


def run(folder: Path, *command: str, seconds: float = 900) -> subprocess.CompletedProcess:
    """A command of this environment in a folder, with the limits that docs/instructors.md names."""
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DPO_LAB_CHECK_SECONDS": str(SECONDS),
    }
    return subprocess.run(
        ["bash", "-c", f'ulimit -v {MEMORY // 1024}; exec "$@"', "-", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def grade_with_nbgrader(course: Path) -> list[subprocess.CompletedProcess]:
    """Grade what was handed in; the table is in diagnoses.csv of the course."""
    exporter = "dpo_lab.checks.nbgrader_export.DiagnosisExport"
    return [
        run(course, "nbgrader", "autograde", "hw1"),
        run(course, "nbgrader", "export", "--exporter", exporter, "--to", "diagnoses.csv"),
    ]


def grade_with_otter(folder: Path, submissions: dict[str, Path]) -> None:
    """Grade submissions by student, with the autograder in `folder`; results/STUDENT is written."""
    for student in submissions:
        (folder / "results" / student).mkdir(parents=True)
    usual = {s: path for s, path in submissions.items() if s not in ENDLESS_CELLS}
    if usual:
        pairs = [f"{path}=results/{student}" for student, path in usual.items()]
        done = run(folder, sys.executable, __file__, "autograder.zip", *pairs)
        assert done.returncode == 0, done.stderr
    for student in submissions.keys() & set(ENDLESS_CELLS):
        given = ("-a", "autograder.zip", "-o", f"results/{student}", str(submissions[student]))
        done = run(folder, "timeout", str(NOTEBOOK_SECONDS), "otter", "run", *given)
        assert done.returncode == 124, done.stderr


def grade_in_process(folder: Path, submissions: dict[str, Path]) -> None:
    """What `grade_with_otter` does, without a kernel: cells and otter's tests run in this process.

    For submissions that leave the process alone; each kernel takes ten seconds of CPU.
    """
    from otter.run.run_autograder.autograder_config import AutograderConfig
    from otter.test_files import GradingResults, create_test_file

    for student, path in submissions.items():
        names = {}
        for code in nbformat.read(path, as_version=4).cells:
            if code.cell_type == "code":
                # a notebook goes on after a cell that fails
                with contextlib.suppress(Exception):
                    exec(compile(code.source, f"{student}:{code.id}", "exec"), names)

        tests = [create_test_file(str(test), None) for test in sorted(folder.glob("tests/*.py"))]
        for test in tests:
            test.run(names)
        results = folder / "results" / student / "results.json"
        results.parent.mkdir(parents=True)
        found = GradingResults(tests).to_gradescope_dict(AutograderConfig())
        results.write_text(json.dumps(found))


def main(autograder: str, *pairs: str) -> None:
    """What `otter run` does, for several submissions; one that fails leaves no results."""
    from otter.run import main as otter_run

    for pair in pairs:
        submission, results = pair.split("=")
        try:
            otter_run(submission, autograder=autograder, output_dir=results, no_logo=True)
        except Exception as error:
            print(f"{submission}: {type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
