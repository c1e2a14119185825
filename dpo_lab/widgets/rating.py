"""The rating form: two answers side by side under the keys, each rating saved before the next."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from dpo_lab.data.labeling import Labeling
from dpo_lab.data.ratings import RatingStore
from dpo_lab.engine.escaping import for_html

HERE = Path(__file__).parent


class RatingForm(anywidget.AnyWidget):
    """The page of a `Labeling`: it sends keys, and shows the view that comes back."""

    _esm = HERE / "rating.js"
    _css = HERE / "rating.css"
    view = traitlets.Dict().tag(sync=True)

    def __init__(self, labeling: Labeling):
        super().__init__(view=labeling.view())
        self.labeling = labeling
        self.on_msg(self._receive)

    def _receive(self, _: Any, message: Any, buffers: Any = None) -> None:
        """Do what a key in the page means, and show what comes next."""
        try:
            key, turn, seconds = (message[name] for name in ("key", "turn", "seconds"))
            self.labeling.press(str(key), turn=int(turn), seconds=max(float(seconds), 0.0))
        except (KeyError, TypeError, ValueError):
            return
        self.view = self.labeling.view()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        # a page without a kernel shows the present item
        bundle = super()._repr_mimebundle_(**options)
        parts = bundle if isinstance(bundle, tuple) else (bundle, {})
        still = {"text/html": still_html(self.view), "text/plain": self._plain()}
        return {**(parts[0] or {}), **still}, parts[1]

    def _plain(self) -> str:
        view = self.view
        return f"RatingForm({view['done']} of {view['total']} rated, in {view['file']!r})"


def rating_widget(
    items: Iterable[Any],
    store: RatingStore | Path | str,
    *,
    rater: str = "me",
    pass_number: int = 1,
    guidelines: str = "",
    seed: int = 0,
    shuffle: bool = True,
) -> RatingForm:
    """A form in which one rater compares answers, or rates them from 1 to 5.

    Of two answers, the left arrow key prefers the left one, the right arrow key the right one, and
    the down arrow key says tie. Or two digits rate them, the left one first: the higher rating is
    preferred. Of one answer a digit is its rating. "u" or backspace takes back the last key. Each
    rating is on disk before the next item is shown; the same call in a new kernel goes on where the
    last one stopped. Texts are shown as text, whatever is in them.

    Args:
        items: (prompt, one answer, the other), (prompt, answer), mappings, or `Item` objects.
        store: a `RatingStore`, or the path of its file, such as "ratings.jsonl".
        rater: name or initials of who rates.
        pass_number: 2 to rate the same items again, for the agreement with oneself.
        guidelines: what raters are told, as plain text; kept beside the ratings.
        seed: of the order of the items, and of the side on which an answer is shown.
        shuffle: False keeps the items in the order given.

    Raises:
        ValueError, TypeError: an argument is something else; see `dpo_lab.data.Labeling`.
    """
    return RatingForm(
        Labeling(
            items,
            store,
            rater=rater,
            pass_number=pass_number,
            guidelines=guidelines,
            seed=seed,
            shuffle=shuffle,
        )
    )


def still_html(view: dict[str, Any]) -> str:
    """The present item as a table, for a page without a kernel."""
    progress = f"<p>{view['done']} of {view['total']} rated. In JupyterLab, a form is here.</p>"
    item = view["item"]
    if item is None:
        return progress
    cells = "".join(
        f'<td style="text-align: left; vertical-align: top; width: 50%">{for_html(text)}</td>'
        for text in item["answers"]
    )
    head = f'<th colspan="2" style="text-align: left">{for_html(item["prompt"])}</th>'
    return f"<table><tr>{head}</tr><tr>{cells}</tr></table>{progress}"
