"""A course for nbgrader and otter-grader, both graders on what students hand in, and the tables."""

import csv
import importlib.util
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grading as made_up
import nbformat
import pytest

from dpo_lab.checks import EXERCISES, diagnose
from dpo_lab.checks.grading import (
    COLUMNS,
    NOT_GRADED,
    class_report,
    diagnosis_of,
    main,
    prepare,
    rows_of_otter,
    write_course,
    write_rows,
)

ROOT = Path(__file__).parent.parent
EXPECTED = Path(__file__).parent / "expected_grades"


def needs(grader, package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"{grader} is not installed: pip install -c constraints.txt -e '.[grading]'",
    )


needs_nbgrader = needs("nbgrader", "nbgrader")
needs_otter = needs("otter-grader", "otter")


# a course


def test_a_course_holds_what_both_graders_need(tmp_path):
    names, points = ["sequence_logps", "kl"], [6, 0.5]
    folder = write_course(tmp_path / "course", names, points=points, assignment="week-1", seed=7)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "nbgrader_config.py",
        "source/week-1/ex01_objective.ipynb",
        "source/week-1/ex05_language_model.ipynb",
        "otter/ex01_objective/requirements.txt",
        "otter/ex01_objective/tests/kl.py",
        "otter/ex05_language_model/requirements.txt",
        "otter/ex05_language_model/tests/sequence_logps.py",
    }

    # the cells of these exercises alone, with these points
    notebook = nbformat.read(folder / "source/week-1/ex01_objective.ipynb", as_version=4)
    nbformat.validate(notebook)
    graded = [cell for cell in notebook.cells if "nbgrader" in cell.metadata]
    assert [cell.metadata.nbgrader.grade_id for cell in graded] == ["kl", "check_kl"]
    assert graded[1].metadata.nbgrader.points == 0.5
    text = "\n".join(cell.source for cell in notebook.cells[1:])
    assert "my_kl" in text and "my_optimal_policy" not in text and "Spot the mistake" not in text

    # both graders draw other inputs than the notebook, the same ones
    config = {"get_config": Config}
    exec(compile((folder / "nbgrader_config.py").read_text(), "config", "exec"), config)
    assert 'os.environ["DPO_LAB_CHECK_SEED"] = "7"' in (folder / "nbgrader_config.py").read_text()
    test = (folder / "otter/ex01_objective/tests/kl.py").read_text()
    assert "    seed = 7\n" in test and "points = 0.5\n" in test


class Config:
    """Takes any setting, as traitlets' configuration does."""

    def __getattr__(self, name):
        self.__dict__[name] = Config()
        return self.__dict__[name]


def test_a_course_has_a_seed_of_its_own_and_the_points_of_the_notebooks(tmp_path):
    texts = []
    for name in "ab":
        folder = write_course(tmp_path / name, list(EXERCISES))
        tests = sorted((folder / "otter").rglob("tests/*.py"))
        assert len(tests) == len(EXERCISES)
        texts.append((folder / "otter" / "ex03_dpo" / "tests" / "dpo_loss.py").read_text())
    assert texts[0] != texts[1] and "points = 4\n" in texts[0]


def test_the_page_for_instructors_has_the_commands_of_a_course(tmp_path):
    folder = write_course(tmp_path / "course", ["dpo_loss"])
    page = (ROOT / "docs" / "instructors.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    +(.+)$", (folder / "README.md").read_text(), re.MULTILINE)
    commands = [line for line in lines if not line.startswith(("cd ", "#"))]
    assert len(commands) == 13
    assert [line for line in commands if line not in page] == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"exercises": []}, "exercises is empty; name some of kl, "),
        ({"exercises": ["kl", "dpo"]}, "exercises has 'dpo'; they are kl, "),
        ({"exercises": ["kl", "kl"]}, "exercises has 'kl' 2 times"),
        ({"points": [1, 2]}, "points has 2 values for 1 exercises"),
        ({"points": [0]}, "points has 0; each must be a positive number"),
        ({"points": [float("nan")]}, "points has nan"),
        ({"assignment": "../hw1"}, "assignment is '../hw1'; give a name of letters"),
        ({"notebooks": "nowhere"}, "notebooks is nowhere, where no exercise notebook is"),
        ({"exercises": ["gae"]}, "'gae' is in no notebook"),
        ({"folder": "taken"}, "folder is taken, and something is there"),
        ({"folder": "taken/file"}, "folder is taken/file, and something is there"),
    ],
)
def test_what_is_wrong_with_a_course_is_named_and_nothing_is_written(
    changes, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    shutil.copy(ROOT / "notebooks" / "exercises" / "ex01_objective.ipynb", tmp_path / "some")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    given = {"folder": "course", "exercises": ["kl"], "notebooks": "some"} | changes
    with pytest.raises(ValueError) as caught:
        write_course(given.pop("folder"), given.pop("exercises"), **given)
    assert words in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["course", str(tmp_path / "course"), "--exercises", "dpo"])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("exercises has 'dpo'; they are kl, ")
    main(["course", str(tmp_path / "course"), "--exercises", "kl", "--points", "3"])
    assert (tmp_path / "course" / "source" / "hw1" / "ex01_objective.ipynb").exists()


# what is handed in


def test_submissions_are_prepared_and_only_their_metadata_change(tmp_path):
    course = write_course(tmp_path / "course", list(made_up.POINTS))
    source = course / "source" / "hw1" / f"{made_up.NOTEBOOK}.ipynb"
    paths = {
        student: made_up.hand_in(course, student, source)
        for student in ("right", "copied", "foreign-kernel")
    }
    before = {student: nbformat.read(path, as_version=4) for student, path in paths.items()}
    as_they_were = paths["right"].read_bytes()
    found = prepare(course / "submitted")
    assert [line.removeprefix(f"{course}/submitted/") for line in found] == [
        "copied/hw1/ex03_dpo.ipynb: cell dpo_loss was copied; the copy runs, and is not graded",
        "foreign-kernel/hw1/ex03_dpo.ipynb: kernel my-conda-env is now python3",
    ]
    assert paths["right"].read_bytes() == as_they_were
    for student, path in paths.items():
        after = nbformat.read(path, as_version=4)
        assert [c.source for c in after.cells] == [c.source for c in before[student].cells]
        ids = [c.metadata.get("nbgrader", {}).get("grade_id") for c in after.cells]
        assert len([one for one in ids if one]) == len({one for one in ids if one}) == 4
        assert after.metadata.kernelspec.name == "python3"
    assert prepare(course / "submitted") == []


def test_the_hard_coded_answer_is_right_on_the_inputs_of_the_notebook_alone():
    names = {}
    exec(f"import torch\n{made_up.hard_coded()}", names)
    exercise, function = EXERCISES["gradient_weights"], names["my_gradient_weights"]
    assert diagnose(exercise, function, seed=0) is None
    assert diagnose(exercise, function, seed=1) is not None


# tables


def test_a_diagnosis_is_the_first_line_without_the_exercise():
    assert diagnosis_of("dpo_loss: beta forgotten; sign\nexpected 1\nfound: 2") == (
        "beta forgotten; sign"
    )
    assert diagnosis_of("\n kl: from one outcome: p on\n") == "from one outcome: p on"
    assert diagnosis_of("a word") == "a word"
    assert diagnosis_of("") == ""


def otter_test(name, score, most, output=""):
    return {"name": f"{name} - 1", "score": score, "max_score": most, "output": output}


def test_rows_of_otter_have_one_row_per_student_and_exercise(tmp_path):
    wrong = "kl results:\n    kl - 1 result:\n      ❌ Test case failed\n      kl: sign\n  expected"
    results = {
        "ada": [
            {"name": "Public Tests", "max_score": 0.0, "output": "all"},
            otter_test("kl", 2.0, 2.0),
            otter_test("gae", 4.0, 4.0),
        ],
        "bob": [otter_test("kl", 0.0, 2.0, wrong), otter_test("gae", 0.0, 4.0, "NameError: x")],
        "eve": None,
    }
    for student, tests in results.items():
        (tmp_path / student).mkdir()
        if tests is not None:
            (tmp_path / student / "results.json").write_text(json.dumps({"tests": tests}))
    (tmp_path / "a file").touch()
    rows = [tuple(row.values()) for row in rows_of_otter(tmp_path)]
    assert rows == [
        ("ada", "kl", 2.0, 2.0, ""),
        ("ada", "gae", 4.0, 4.0, ""),
        ("bob", "kl", 0.0, 2.0, "sign"),
        ("bob", "gae", 0.0, 4.0, "NameError: x"),
        ("eve", "kl", 0.0, 2.0, NOT_GRADED),
        ("eve", "gae", 0.0, 4.0, NOT_GRADED),
    ]


def test_a_class_in_which_nothing_was_graded_still_has_a_row_per_student(tmp_path):
    (tmp_path / "eve").mkdir()
    assert [tuple(row.values()) for row in rows_of_otter(tmp_path)] == [
        ("eve", "", 0.0, 0.0, NOT_GRADED)
    ]


def test_the_report_counts_the_mistakes_of_each_exercise(tmp_path, capsys):
    rows = [
        ("ada", "kl", 2.0, 2.0, ""),
        ("bob", "kl", 0.0, 2.0, "sign; bits"),
        ("eve", "kl", 0.0, 2.0, "sign"),
        ("ada", "gae", 4.0, 4.0, ""),
    ]
    path = tmp_path / "diagnoses.csv"
    write_rows([dict(zip(COLUMNS, row)) for row in rows], path)
    assert path.read_text().splitlines()[2] == "bob,kl,0.0,2.0,sign; bits"
    expected = """\
| exercise | students | solved | mean points | commonest mistakes |
|---|---|---|---|---|
| kl | 3 | 1 | 0.67 of 2.0 | sign (2), bits (1) |
| gae | 1 | 1 | 4.00 of 4.0 |  |"""
    assert class_report(path) == expected
    main(["report", str(path)])
    assert capsys.readouterr().out == expected + "\n"


def test_a_table_without_a_column_is_refused_by_its_name(tmp_path):
    (tmp_path / "grades.csv").write_text("student,points\nada,1\n")
    with pytest.raises(ValueError, match="grades.csv has no column 'diagnosis'"):
        class_report(tmp_path / "grades.csv")


# both graders


def rows_in(path):
    with open(path, encoding="utf-8", newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: (row["student"], row["exercise"]))


def expected_rows(grader, students):
    return [row for row in rows_in(EXPECTED / f"{grader}.csv") if row["student"] in students]


@pytest.mark.parametrize("grader", ["nbgrader", "otter"])
def test_no_behavior_is_without_a_row(grader):
    rows = expected_rows(grader, made_up.CLASS)
    assert {(row["student"], row["exercise"]) for row in rows} == {
        (student, exercise) for student in made_up.CLASS for exercise in made_up.POINTS
    }
    assert len(made_up.CLASS) == 22 and len(rows) == 44
    assert len(rows_in(EXPECTED / f"{grader}.csv")) == 44


def course_of(folder, students):
    """A course as an instructor writes it, and what these students hand in, prepared."""
    points = [str(value) for value in made_up.POINTS.values()]
    main(["course", str(folder), "--exercises", *made_up.POINTS, "--points", *points])
    source = folder / "source" / "hw1" / f"{made_up.NOTEBOOK}.ipynb"
    paths = {student: made_up.hand_in(folder, student, source) for student in students}
    main(["prepare", str(folder / "submitted")])

    # seconds that a cell may take; nothing here waits for a minute
    with (folder / "nbgrader_config.py").open("a") as file:
        file.write(f"\nc.ExecutePreprocessor.timeout = {made_up.CELL_SECONDS}\n")
    return paths


def graded_by_nbgrader(folder, students):
    course_of(folder, students)
    released = made_up.run(folder, "nbgrader", "generate_assignment", "hw1")
    assert released.returncode == 0, released.stderr
    made_up.grade_with_nbgrader(folder)
    return rows_in(folder / "diagnoses.csv")


def graded_by_otter(folder, students, processes):
    paths = list(course_of(folder, students).items())
    otter = folder / "otter" / made_up.NOTEBOOK
    given = ("-t", "tests", "-r", "requirements.txt", "-o", "autograder.zip")
    made = made_up.run(otter, "otter", "generate", *given, "--python-version", "3.12")
    assert made.returncode == 0, made.stderr
    with ThreadPoolExecutor(processes) as pool:
        parts = [dict(paths[i::processes]) for i in range(processes)]
        list(pool.map(lambda part: made_up.grade_with_otter(otter, part), parts))
    table = folder / "diagnoses.csv"
    main(["otter", str(otter / "results"), "--to", str(table)])
    return rows_in(table)


@needs_nbgrader
def test_nbgrader_gives_the_commonest_submissions_their_points_and_diagnosis(tmp_path):
    rows = graded_by_nbgrader(tmp_path / "course", made_up.COMMON)
    assert rows == expected_rows("nbgrader", made_up.COMMON)


@needs_otter
def test_otter_gives_a_submission_that_is_half_right_its_points_and_diagnosis(tmp_path):
    rows = graded_by_otter(tmp_path / "course", ["wrong"], 1)
    assert rows == expected_rows("otter", ["wrong"])


@needs_otter
def test_otter_s_tests_give_the_commonest_submissions_their_points_and_diagnosis(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("DPO_LAB_CHECK_SECONDS", str(made_up.SECONDS))
    paths = course_of(tmp_path / "course", made_up.COMMON)
    otter = tmp_path / "course" / "otter" / made_up.NOTEBOOK
    made_up.grade_in_process(otter, paths)
    main(["otter", str(otter / "results"), "--to", str(tmp_path / "diagnoses.csv")])
    assert rows_in(tmp_path / "diagnoses.csv") == expected_rows("otter", made_up.COMMON)


@pytest.mark.long
@needs_nbgrader
@needs_otter
def test_both_graders_give_every_behavior_its_points_and_diagnosis(tmp_path):
    with ThreadPoolExecutor() as pool:
        nbgrader = pool.submit(graded_by_nbgrader, tmp_path / "nbgrader", made_up.CLASS)
        otter = pool.submit(graded_by_otter, tmp_path / "otter", made_up.CLASS, 2)
    assert nbgrader.result() == expected_rows("nbgrader", made_up.CLASS)
    assert otter.result() == expected_rows("otter", made_up.CLASS)
