"""Written predictions: a question with a text field, and later the guess beside the result.

Guesses are kept in a small JSON file beside the notebook, so they outlive the kernel.
"""

import json
from pathlib import Path

import ipywidgets as widgets
from IPython.display import display

from dpo_lab.engine.arguments import checked
from dpo_lab.engine.escaping import for_html
from dpo_lab.engine.runs import write_json

# in the folder of the notebook; git ignores it
FILE = ".predictions.json"

NO_GUESS = "(none written; write one in the field above, and run this cell again)"


class Prediction:
    """A question, its text field, and the guess that was written into it; see `predict`."""

    def __init__(self, question: str, path: Path):
        self.question, self.path = question, path
        self.field = widgets.Text(
            value=_kept(path).get(question, ""),
            placeholder="write your guess, then press Enter",
            description="your guess",
            tooltip=question,
            continuous_update=False,  # a change arrives on Enter, or when the field is left
            style={"description_width": "80px"},
            layout={"width": "420px"},
        )
        self.status = widgets.Label()
        self.field.observe(self._keep, "value")
        self.box = widgets.VBox(
            [
                widgets.HTML(for_html(question)),
                widgets.HBox([self.field, self.status]),
            ]
        )

    @property
    def guess(self) -> str:
        """What the learner wrote, without blanks around it; "" where nothing was written."""
        return self.field.value.strip()

    def beside(self, result: object) -> None:
        """Show the guess and the result, side by side; both as text, never as markup."""
        cells = [("your guess", self.guess or NO_GUESS), ("the result", str(result))]
        rows = "".join(
            f'<tr><th style="text-align: left">{name}</th>'
            f'<td style="text-align: left">{for_html(text)}</td></tr>'
            for name, text in cells
        )
        plain = "; ".join(f"{name}: {text}" for name, text in cells)
        display({"text/html": f"<table>{rows}</table>", "text/plain": plain}, raw=True)

    def __repr__(self) -> str:
        return f"Prediction({self.question!r}, guess={self.guess!r})"

    def _repr_mimebundle_(self, **options: object) -> dict[str, object]:
        # a page without a kernel shows the question alone
        bundle = dict(self.box._repr_mimebundle_(**options))
        return {**bundle, "text/html": f"<p>{for_html(self.question)}</p>"}

    def _keep(self, change: object) -> None:
        """Write the guess to the file. An error is shown beside the field, not raised."""
        try:
            write_json(self.path, {**_kept(self.path), self.question: self.guess})
            self.status.value = "kept"
        except (OSError, ValueError) as error:
            self.status.value = f"kept until the kernel stops: {error}"


@checked
def predict(question: str, folder: Path | str = ".") -> Prediction:
    """Show a question with a text field for a guess, and return it for `beside`.

        rate = predict("By what factor does the KL fall?")
        ...
        rate.beside(f"{factor:.1f}")

    The guess is kept when Enter is pressed or the field is left, and is there again after a restart
    of the kernel. `beside` can be called where no guess was written, too.

    Args:
        question: one sentence; guesses are kept by question, so each needs its own.
        folder: where the guesses are kept, in the hidden file `.predictions.json`. One that holds
            something else is replaced at the next guess.

    Raises:
        ValueError, TypeError: the question is no text, or is blank.
    """
    if not isinstance(question, str):
        raise TypeError(f"question is {question!r} ({type(question).__name__}); it must be a text")
    if not question.strip():
        raise ValueError("question is blank; it must be a sentence that asks for a guess")
    shown = Prediction(question, Path(folder) / FILE)
    display(shown)
    return shown


def _kept(path: Path) -> dict[str, str]:
    """The guesses in a file by question; none where it is missing, unreadable or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {question: guess for question, guess in found.items() if isinstance(guess, str)}
