"""For instructors: a course for nbgrader and otter-grader from the exercises, and its results.

    python -m dpo_lab.checks.grading course FOLDER --exercises dpo_loss sequence_logps
    python -m dpo_lab.checks.grading prepare SUBMISSIONS
    python -m dpo_lab.checks.grading otter RESULTS --to diagnoses.csv
    python -m dpo_lab.checks.grading report diagnoses.csv

Both graders run the checks that students run, on other inputs, and give the same table: one row per
student and exercise. docs/instructors.md says what grading in one process cannot prevent.
"""

import argparse
import csv
import json
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_lab.checks import EXERCISES

# in a checkout; a wheel has no notebooks
NOTEBOOKS = Path(__file__).parent.parent.parent / "notebooks" / "exercises"

COLUMNS = ("student", "exercise", "points", "max_points", "diagnosis")

NOT_GRADED = "not graded: the kernel died or did not answer; see the log"
NOT_RUN = "not run: the check cell was missing"

CONFIG = """\
import os

c = get_config()
c.CourseDirectory.course_id = "dpo"

# all of nbgrader's steps but ClearSolutions: the notebooks come without solutions
c.GenerateAssignment.preprocessors = [
    "nbgrader.preprocessors.IncludeHeaderFooter",
    "nbgrader.preprocessors.LockCells",
    "nbgrader.preprocessors.ClearOutput",
    "nbgrader.preprocessors.CheckCellMetadata",
    "nbgrader.preprocessors.ComputeChecksums",
    "nbgrader.preprocessors.SaveCells",
    "nbgrader.preprocessors.ComputeChecksums",
    "nbgrader.preprocessors.CheckCellMetadata",
]

# seconds per cell; a check stops a function after five
c.ExecutePreprocessor.timeout = 60

# what libraries write to stderr takes no points away: a check that fails raises
c.IgnorePattern.enabled = True
c.IgnorePattern.pattern = r"[\\s\\S]"

# other inputs than those of the notebook, the same ones for all students
os.environ["DPO_LAB_CHECK_SEED"] = "{seed}"
"""

OTTER_TEST = """\
OK_FORMAT = False

from otter.test_files import test_case

name = "{name}"
points = {points}


@test_case()
def test_{name}(my_{name}):
    from dpo_lab.checks import check_{name}

    seed = {seed}
    if my_{name} is None:
        raise NameError("name 'my_{name}' is not defined")
    check_{name}(my_{name}, seed=seed)
"""

README = """\
# A course from dpo_lab's exercises

nbgrader, in this folder:

    nbgrader generate_assignment {assignment}
    # hand out release/{assignment}/; collect into submitted/STUDENT/{assignment}/
    python -m dpo_lab.checks.grading prepare submitted
    nbgrader autograde {assignment}
    nbgrader generate_feedback {assignment}
    nbgrader export --exporter dpo_lab.checks.nbgrader_export.DiagnosisExport --to diagnoses.csv

otter-grader, for one notebook, on the same submissions:

    cd otter/{notebook}
    otter generate -t tests -r requirements.txt -o autograder.zip --python-version 3.12
    for file in ../../submitted/*/{assignment}/{notebook}.ipynb; do
        student=$(basename "$(dirname "$(dirname "$file")")")
        mkdir -p "results/$student"
        timeout 300 otter run -a autograder.zip -o "results/$student" "$file"
    done
    python -m dpo_lab.checks.grading otter results --to diagnoses.csv

The report of a class, from either table:

    python -m dpo_lab.checks.grading report diagnoses.csv
"""

# of Gradescope's image; `otter generate` puts the wheel there
REQUIREMENTS = """\
--extra-index-url https://download.pytorch.org/whl/cpu
torch
dpo-lab @ file:///autograder/source/files/dpo_lab-{version}-py3-none-any.whl
"""


def write_course(
    folder: Path | str,
    exercises: Sequence[str],
    *,
    points: Sequence[float] = (),
    assignment: str = "hw1",
    notebooks: Path | str = NOTEBOOKS,
    seed: int | None = None,
) -> Path:
    """Write a course for nbgrader and otter-grader into a new folder; the folder.

    Args:
        folder: must not exist, or be empty.
        exercises: names of exercises, such as "dpo_loss".
        points: of each exercise; without them, those of the notebooks.
        assignment: the name of the assignment: letters, digits, - and _.
        notebooks: where the exercise notebooks are, `notebooks/exercises` of a checkout.
        seed: of the inputs on which both graders call the functions; by default one is drawn.

    Raises:
        ValueError: an exercise that does not exist, is named twice or is in no notebook, another
            number of points than exercises, a folder with something in it, or another name.
    """
    folder, notebooks = Path(folder).expanduser(), Path(notebooks).expanduser()
    worth = _checked_points(exercises, points)
    if not re.fullmatch(r"[\w-]+", assignment):
        raise ValueError(
            f"assignment is {assignment!r}; give a name of letters, digits, - and _, such as hw1"
        )
    seed = secrets.randbelow(2**31) if seed is None else seed
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder is {folder}, and something is there; give a new one")
    found = {path.stem: path for path in sorted(notebooks.glob("ex*.ipynb"))}
    if not found:
        raise ValueError(
            f"notebooks is {notebooks}, where no exercise notebook is; give notebooks/exercises of "
            "a checkout of dpo-lab"
        )

    # the notebooks that hold some of the exercises, with these alone
    chosen = {}
    for stem, path in found.items():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if names := _keep_exercises(notebook, worth):
            chosen[stem] = notebook, names
    there = {name for _, names in chosen.values() for name in names}
    if missing := [name for name in exercises if name not in there]:
        raise ValueError(f"notebooks is {notebooks}, where {missing[0]!r} is in no notebook")

    source = folder / "source" / assignment
    source.mkdir(parents=True)
    for stem, (notebook, names) in chosen.items():
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        (source / f"{stem}.ipynb").write_text(text, encoding="utf-8")
        tests = folder / "otter" / stem / "tests"
        tests.mkdir(parents=True)
        for name, value in names.items():
            test = OTTER_TEST.format(name=name, points=value, seed=seed)
            (tests / f"{name}.py").write_text(test, encoding="utf-8")
        needed = REQUIREMENTS.format(version=version("dpo-lab"))
        (tests.parent / "requirements.txt").write_text(needed, encoding="utf-8")
    (folder / "nbgrader_config.py").write_text(CONFIG.format(seed=seed), encoding="utf-8")
    readme = README.format(assignment=assignment, notebook=next(iter(chosen)))
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def _checked_points(exercises: Sequence[str], points: Sequence[float]) -> dict[str, float | None]:
    """The points of each exercise by name, None for those of the notebook."""
    known = ", ".join(EXERCISES)
    if not exercises:
        raise ValueError(f"exercises is empty; name some of {known}")
    for name, times in Counter(exercises).items():
        if name not in EXERCISES:
            raise ValueError(f"exercises has {name!r}; they are {known}")
        if times > 1:
            raise ValueError(f"exercises has {name!r} {times} times; once is enough")
    if points and len(points) != len(exercises):
        raise ValueError(
            f"points has {len(points)} values for {len(exercises)} exercises; give one each, or "
            "none"
        )
    for value in points:
        if not value > 0:
            raise ValueError(f"points has {value!r}; each must be a positive number")
    return dict(zip(exercises, points or [None] * len(exercises)))


def _keep_exercises(notebook: dict[str, Any], worth: dict[str, float | None]) -> dict[str, float]:
    """Leave in a notebook the cells of these exercises; their points by name."""
    kept, names = [], {}
    for cell in notebook["cells"]:
        name = re.sub(r"^check-|-(task|hints|use)$", "", cell["id"])
        if name in EXERCISES and name not in worth:
            continue
        if cell["id"].startswith("spot-"):
            continue
        meta = cell["metadata"].get("nbgrader", {})
        if meta.get("grade"):
            if worth[name] is not None:
                meta["points"] = worth[name]
            names[name] = meta["points"]
        kept.append(cell)
    notebook["cells"] = kept
    return names


# what students hand in


def prepare(folder: Path | str) -> list[str]:
    """Make every notebook below a folder fit for the graders; a line about each change.

    Only metadata change. A notebook that names an environment of the student's own runs in the
    kernel python3: `otter run` would look for the other one in vain. Of a cell that was copied with
    its grade id the first one keeps it: two of them stop `nbgrader autograde` for all students.
    """
    changes = []
    for path in sorted(Path(folder).rglob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        found = [f"{path}: {change}" for change in (*_own_kernel(notebook), *_copies(notebook))]
        if found:
            text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8")
        changes += found
    return changes


def _own_kernel(notebook: dict[str, Any]) -> Iterator[str]:
    """Run in python3 what names another kernel."""
    name = notebook["metadata"].get("kernelspec", {}).get("name", "none")
    if name != "python3":
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook["metadata"]["kernelspec"] = kernel
        yield f"kernel {name} is now python3"


def _copies(notebook: dict[str, Any]) -> Iterator[str]:
    """Leave each grade id to the first cell that has it."""
    seen = set()
    for cell in notebook["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id")
        if name in seen:
            del cell["metadata"]["nbgrader"]
            yield f"cell {name} was copied; the copy runs, and is not graded"
        elif name is not None:
            seen.add(name)


# the results of a class


def diagnosis_of(message: str) -> str:
    """The names of the mistakes in what a check raised: its first line, without the exercise."""
    first = (message.strip().splitlines() or [""])[0]
    return first.split(": ", 1)[-1]


def rows_of_otter(results: Path | str) -> list[dict[str, Any]]:
    """One row per student and exercise from RESULTS/STUDENT/results.json.

    A student's folder without a file of results has the rows of the others, with no points.
    """
    tests_of = {
        folder.name: _tests_of(folder / "results.json")
        for folder in sorted(path for path in Path(results).iterdir() if path.is_dir())
    }
    most = {name: test["max_score"] for tests in tests_of.values() for name, test in tests.items()}
    rows = []
    for student, tests in tests_of.items():
        for name, max_points in (most or {"": 0.0}).items():
            if name not in tests:
                rows.append(table_row(student, name, 0.0, max_points, NOT_GRADED))
                continue
            points = tests[name].get("score", 0.0)
            passed = points == max_points
            why = "" if passed else _named_in(tests[name].get("output", ""), name)
            rows.append(table_row(student, name, points, max_points, why))
    return rows


def _tests_of(path: Path) -> dict[str, dict[str, Any]]:
    """The tests in a file of otter's results by exercise; none where there is no file."""
    if not path.exists():
        return {}
    tests = json.loads(path.read_text(encoding="utf-8"))["tests"]
    scored = [test for test in tests if "max_score" in test and test["name"] != "Public Tests"]
    return {re.split(r"\W", test["name"])[0]: test for test in scored}


def _named_in(output: str, name: str) -> str:
    """The diagnosis in an otter message, which has lines of its own around it."""
    lines = [line.strip() for line in output.splitlines()]
    named = [line for line in lines if f"{name}: " in line]
    if named:
        return named[0].split(f"{name}: ", 1)[1]
    return next((line for line in reversed(lines) if line), NOT_RUN)


def table_row(
    student: str, exercise: str, points: float, max_points: float, diagnosis: str
) -> dict[str, Any]:
    """One row of the table."""
    return dict(zip(COLUMNS, (student, exercise, float(points), float(max_points), diagnosis)))


def write_rows(rows: Iterable[dict[str, Any]], path: Path | str) -> None:
    """Rows of `COLUMNS` as a CSV file, which an LMS can import."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def class_report(path: Path | str) -> str:
    """Of each exercise: how many solved it, the mean of the points, and the commonest mistakes."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missing = set(COLUMNS) - set(rows[0] if rows else COLUMNS)
    if missing:
        raise ValueError(f"{path} has no column {sorted(missing)[0]!r}; it must have {COLUMNS}")
    by_exercise = defaultdict(list)
    for row in rows:
        by_exercise[row["exercise"]].append(row)

    lines = ["| exercise | students | solved | mean points | commonest mistakes |"]
    lines.append("|---|---|---|---|---|")
    for name, some in by_exercise.items():
        earned = [float(row["points"]) for row in some]
        solved = sum(float(row["points"]) == float(row["max_points"]) > 0 for row in some)
        named = (one for row in some for one in row["diagnosis"].split("; ") if one)
        common = ", ".join(f"{one} ({n})" for one, n in Counter(named).most_common(3))
        mean = f"{sum(earned) / len(earned):.2f} of {some[0]['max_points']}"
        lines.append(f"| {name or '-'} | {len(some)} | {solved} | {mean} | {common} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dpo_lab.checks.grading")
    commands = parser.add_subparsers(dest="command", required=True)
    course = commands.add_parser("course", help="write a course for nbgrader and otter-grader")
    course.add_argument("folder", type=Path)
    course.add_argument("--exercises", nargs="+", default=list(EXERCISES), metavar="NAME")
    course.add_argument("--points", nargs="+", type=float, default=[])
    course.add_argument("--assignment", default="hw1")
    course.add_argument("--notebooks", type=Path, default=NOTEBOOKS)
    prepared = commands.add_parser("prepare", help="make submissions fit for the graders")
    prepared.add_argument("folder", type=Path)
    otter = commands.add_parser("otter", help="the table of a class from otter's results")
    otter.add_argument("results", type=Path)
    otter.add_argument("--to", type=Path, default=Path("diagnoses.csv"))
    report = commands.add_parser("report", help="the commonest mistakes of a class")
    report.add_argument("table", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.command == "course":
            folder = write_course(
                given.folder,
                given.exercises,
                points=given.points,
                assignment=given.assignment,
                notebooks=given.notebooks,
            )
            print(f"The course is in {folder}; its README.md says how it goes on.")
        elif given.command == "prepare":
            print("\n".join(prepare(given.folder)))
        elif given.command == "otter":
            write_rows(rows_of_otter(given.results), given.to)
        else:
            print(class_report(given.table))
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
