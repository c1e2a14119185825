"""A rater's way through the items: what is shown, what each key does, and where they go on.

It knows nothing of browsers: `dpo_lab.widgets.rating_widget` shows what it says.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from dpo_lab.data.ratings import (
    HIGHEST,
    LOWEST,
    Item,
    Rating,
    RatingStore,
    as_items,
    hashed,
    now,
    preferred,
    shown_order,
)

CHOICES = ("left", "right", "tie")
SCORES = tuple(str(score) for score in range(LOWEST, HIGHEST + 1))


class Labeling:
    """One rater in one pass over the items; whoever makes it again goes on where it stopped.

    `press` takes a key: "left", "right" or "tie" for two answers; "1" to "5" rates an answer, the
    left one first; "undo" takes back the last key that counted.

    Args:
        items: as `as_items` takes them.
        store: a `RatingStore`, or the path of its file.
        rater: their name or initials.
        pass_number: 2 to rate the same items again.
        guidelines: what raters are told, as plain text; kept in the store, and named in each
            rating.
        seed: of the order of items and of the side on which answers are shown.
        shuffle: whether items come in an order drawn for this rater and pass, or as given.

    Raises:
        ValueError, TypeError: an argument is something else.
    """

    def __init__(
        self,
        items: Iterable[Any],
        store: RatingStore | str,
        *,
        rater: str = "me",
        pass_number: int = 1,
        guidelines: str = "",
        seed: int = 0,
        shuffle: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        _check(rater, pass_number, guidelines, seed)
        self.items = as_items(items)
        self.store = store if isinstance(store, RatingStore) else RatingStore(store)
        self.rater, self.pass_number, self.seed = rater, pass_number, seed
        self.guidelines, self.message, self._clock = guidelines, "", clock
        if shuffle:
            self.items.sort(key=lambda item: hashed("place", seed, item.key, rater, pass_number))
        self.turn = 0
        """counts what is shown, so that a key meant for what was shown before does nothing"""
        self._go_on()

    @property
    def done(self) -> dict[str, Rating]:
        """This rater's ratings of these items in this pass, by key, oldest first."""
        keys = {item.key for item in self.items}
        ratings = self.store.ratings(self.rater, self.pass_number)
        return {rating.item: rating for rating in ratings if rating.item in keys}

    @property
    def order(self) -> tuple[int, ...]:
        """The answers of the present item from left to right."""
        assert self.item is not None
        drawn = {"seed": self.seed, "rater": self.rater, "pass_number": self.pass_number}
        return shown_order(self.item, **drawn)

    def press(self, key: str, *, turn: int | None = None, seconds: float | None = None) -> bool:
        """Do what a key means, and say whether it counted. Nothing is shown before it is on disk.

        Args:
            key: "left", "right", "tie", "1" to "5", or "undo".
            turn: of the view in which it was pressed; one of before does nothing.
            seconds: for which the item was in view; measured here where they are not given.

        Raises:
            ValueError: another key.
        """
        if key not in (*CHOICES, *SCORES, "undo"):
            raise ValueError(
                f"key is {key!r}; it must be 'left', 'right', 'tie', '1' to '5' or 'undo'"
            )
        if turn not in (None, self.turn):
            return False
        try:
            counted = self._undo() if key == "undo" else self._answer(key, seconds)
        except OSError as error:
            self.message = f"Not saved: {error}. Free some space or correct the path, then go on."
            self.turn += 1
            return False
        self.turn += counted
        return counted

    def view(self) -> dict[str, Any]:
        """What is to be shown, as JSON: the item's texts as they stand from left to right."""
        done = self.done
        shown: dict[str, Any] = {
            "turn": self.turn,
            "done": len(done),
            "total": len(self.items),
            "rater": self.rater,
            "pass": self.pass_number,
            "message": self.message,
            "guidelines": self.guidelines,
            "file": str(self.store.path),
            "can_undo": bool(done or self.scores),
            "finished": self.item is None,
            "item": None,
        }
        if self.item is not None:
            answers = [self.item.answers[k] for k in self.order]
            item = {"key": self.item.key, "prompt": self.item.prompt, "answers": answers}
            shown["item"] = item | {"scores": self.scores}
        return shown

    def _answer(self, key: str, seconds: float | None) -> bool:
        """A preference, or a rating of the next answer; saved once the item is complete."""
        if self.item is None:
            return False
        if key in CHOICES:
            if len(self.item.answers) == 1:
                return False
            self._save(key, None, seconds)
            return True
        self.scores = [*self.scores, int(key)]
        if len(self.scores) == len(self.item.answers):
            choice = preferred(*self.scores) if len(self.scores) == 2 else None
            try:
                self._save(choice, tuple(self.scores), seconds)
            except OSError:
                self.scores = self.scores[:-1]
                raise
        return True

    def _save(self, choice: Any, scores: tuple[int, ...] | None, seconds: float | None) -> None:
        assert self.item is not None
        named = self.store.add_guidelines(self.guidelines) if self.guidelines else None
        self.store.add(
            Rating(
                item=self.item.key,
                rater=self.rater,
                pass_number=self.pass_number,
                order=self.order,
                choice=choice,
                scores=scores,
                seconds=round(self._clock() - self._since if seconds is None else seconds, 2),
                guidelines=named,
                time=now(),
            )
        )
        self._go_on()

    def _undo(self) -> bool:
        """Take back a rating of one of two answers, or else the last saved item."""
        if self.scores:
            self.scores, self.message = [], ""
            return True
        if not (done := self.done):
            return False
        last = list(done.values())[-1]
        self.store.undo(last)
        self._go_on(next(item for item in self.items if item.key == last.item))
        return True

    def _go_on(self, item: Item | None = None) -> None:
        """Show `item`, or else the first that has no rating."""
        if item is None:
            done = self.done
            item = next((one for one in self.items if one.key not in done), None)
        self.item = item
        """what is shown; None when all is rated"""
        self.scores: list[int] = []
        """of the shown answers, as far as they are rated"""
        self.message, self._since = "", self._clock()


def _check(rater: Any, pass_number: Any, guidelines: Any, seed: Any) -> None:
    """Raise for an argument that is something else."""
    for name, value in (("rater", rater), ("guidelines", guidelines)):
        if not isinstance(value, str):
            raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a text")
    if not rater.strip():
        raise ValueError("rater is blank; give a name or initials, which each rating keeps")
    for name, value in (("pass_number", pass_number), ("seed", seed)):
        if type(value) is not int:
            raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be an integer")
    if pass_number < 1:
        raise ValueError(f"pass_number is {pass_number}; it must be 1, or 2 for a second pass")
