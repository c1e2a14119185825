"""An exporter for nbgrader: one row per student and exercise, with the diagnosis of the check.

nbgrader export --exporter dpo_lab.checks.nbgrader_export.DiagnosisExport --to diagnoses.csv
"""

from pathlib import Path
from typing import Any

import nbformat
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.plugins import ExportPlugin

from dpo_lab.checks.grading import NOT_GRADED, NOT_RUN, diagnosis_of, table_row, write_rows


class DiagnosisExport(ExportPlugin):
    """Writes the columns of `grading.COLUMNS`."""

    def export(self, gradebook: Gradebook) -> None:
        """Write the table to the file that --to names."""
        rows = [
            row
            for assignment in gradebook.assignments
            for student in gradebook.students
            for row in self._rows(gradebook, assignment, student)
        ]
        write_rows(rows, self.to or "diagnoses.csv")

    def _rows(self, gradebook: Gradebook, assignment: Any, student: Any) -> list[dict[str, Any]]:
        """The rows of one student's submission."""
        try:
            submission = gradebook.find_submission(assignment.name, student.id)
        except MissingEntry:
            return [
                table_row(student.id, _exercise(cell), 0, cell.max_score, "not submitted")
                for notebook in assignment.notebooks
                for cell in notebook.grade_cells
            ]
        rows = []
        course = self.parent.coursedir
        for notebook in submission.notebooks:
            folder = course.format_path(course.autograded_directory, student.id, assignment.name)
            path = Path(folder) / f"{notebook.name}.ipynb"
            found = outcomes(path) if path.exists() else None
            for grade in sorted(notebook.grades, key=lambda grade: grade.name):
                if found is None:
                    why = NOT_GRADED
                elif grade.auto_score is None:
                    why = NOT_RUN
                else:
                    why = found.get(grade.name, "")
                rows.append(
                    table_row(student.id, _exercise(grade), grade.score, grade.max_score, why)
                )
        return rows


def _exercise(graded: Any) -> str:
    """The exercise of a graded cell."""
    return graded.name.removeprefix("check_")


def outcomes(path: Path) -> dict[str, str]:
    """What the graded cells of a notebook raised, by grade id."""
    found = {}
    for cell in nbformat.read(path, as_version=4).cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                ours = output.ename == "Wrong"
                first = (output.evalue.splitlines() or [""])[0]
                found[name] = diagnosis_of(first) if ours else f"{output.ename}: {first}"
    return found
