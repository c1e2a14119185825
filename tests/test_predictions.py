"""A written prediction is kept, comes back, and stands beside the result as text."""

import json
import os

import nbformat
import pytest
from nbclient import NotebookClient

from dpo_lab.widgets import predict, predictions
from dpo_lab.widgets.predictions import FILE

QUESTION = "By what factor does the KL fall?"


@pytest.fixture
def shown(monkeypatch):
    """What a cell shows."""
    outputs = []
    monkeypatch.setattr(predictions, "display", lambda value, **options: outputs.append(value))
    return outputs


def on_disk(folder):
    return json.loads((folder / FILE).read_text(encoding="utf-8"))


def test_a_guess_is_shown_beside_the_result(shown, tmp_path):
    rate = predict(QUESTION, tmp_path)
    assert shown == [rate] and rate.guess == ""
    rate.field.value = "  about 10 "
    rate.beside(12.5)
    assert rate.guess == "about 10" and rate.status.value == "kept"
    assert shown[1]["text/plain"] == "your guess: about 10; the result: 12.5"
    assert ">about 10</td>" in shown[1]["text/html"] and ">12.5</td>" in shown[1]["text/html"]


def test_where_no_guess_was_written_the_result_says_so(shown, tmp_path):
    predict(QUESTION, tmp_path).beside("12.5")
    assert "none written" in shown[1]["text/html"] and "12.5" in shown[1]["text/html"]
    assert not (tmp_path / FILE).exists()


def test_what_is_written_is_no_markup(shown, tmp_path):
    rate = predict("Is <b>1 < 2</b> & $x$?", tmp_path)
    rate.field.value = "<script>alert(1)</script> $y$"
    rate.beside("<i>12.5</i>")
    question = rate._repr_mimebundle_()["text/html"]
    assert "&lt;b&gt;1 &lt; 2&lt;/b&gt; &amp; <span>&#36;</span>x" in question
    html = shown[1]["text/html"]
    assert "&lt;script&gt;" in html and "&lt;i&gt;" in html
    assert "<script" not in html and "<i>" not in html and "$" not in html


def test_a_guess_outlives_the_kernel_and_stays_with_its_question(shown, tmp_path):
    first, second = predict(QUESTION, tmp_path), predict("And the reward, in %?", tmp_path)
    first.field.value, second.field.value = "10", "ein Fünftel"
    assert predict(QUESTION, tmp_path).guess == "10"
    assert on_disk(tmp_path) == {QUESTION: "10", "And the reward, in %?": "ein Fünftel"}
    first.field.value = "20"
    assert on_disk(tmp_path)[QUESTION] == "20" and os.listdir(tmp_path) == [FILE]


@pytest.mark.parametrize(
    "damaged", [b"{", b"\xff\xfe", b"[1]", b'{"By what factor does the KL fall?": 3}', b"[" * 10**5]
)
def test_a_damaged_file_is_no_crash(shown, tmp_path, damaged):
    (tmp_path / FILE).write_bytes(damaged)
    rate = predict(QUESTION, tmp_path)
    assert rate.guess == ""
    rate.field.value = "10"
    assert on_disk(tmp_path) == {QUESTION: "10"}


def test_a_folder_that_cannot_be_written_is_said_beside_the_field(shown, tmp_path):
    (tmp_path / "file").write_text("")
    rate = predict(QUESTION, tmp_path / "file" / "folder")
    rate.field.value = "10"
    assert rate.guess == "10" and rate.status.value.startswith("kept until the kernel stops: ")


@pytest.mark.parametrize(
    ("question", "error", "says"),
    [(None, TypeError, "question is None"), ("  ", ValueError, "question is blank")],
)
def test_a_question_is_a_text(shown, tmp_path, question, error, says):
    with pytest.raises(error, match=says):
        predict(question, tmp_path)
    assert shown == []


def test_the_field_has_a_name_and_sends_no_half_written_guess(shown, tmp_path):
    field = predict(QUESTION, tmp_path).field
    assert field.description == "your guess" and field.tooltip == QUESTION
    assert not field.continuous_update


def test_a_notebook_shows_the_field_once_and_runs_without_a_browser(tmp_path):
    """Shown by the call, not by the value: in a notebook the value is given a name."""
    code = (
        "from dpo_lab.widgets import predict",
        f"rate = predict({QUESTION!r})",
        "rate.beside(f'{12.5:.1f}')",
    )
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, code)))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    _, (field,), (result,) = (cell.outputs for cell in notebook.cells)
    assert "application/vnd.jupyter.widget-view+json" in field["data"]
    assert field["data"]["text/html"] == f"<p>{QUESTION}</p>"
    assert "none written" in result["data"]["text/plain"] and "12.5" in result["data"]["text/html"]
    assert os.listdir(tmp_path) == []
