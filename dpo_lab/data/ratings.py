"""What people said of answers: one append-only file of JSON lines, on disk before the next item.

An item is a prompt with one answer, which is rated from 1 to 5, or with two, of which one is
preferred. Two answers may be rated instead: then the higher rating is preferred, and equal ratings
are a tie. Items are named by a hash of their texts, so no rating passes to a text that was changed.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

Choice = Literal["left", "right", "tie"]

LOWEST, HIGHEST = 1, 5
"""ratings of an answer, from bad to good"""

VERSION = 1
"""of the file's format"""


@dataclass(frozen=True)
class Item:
    """A prompt with one answer, or with two different ones.

    Raises:
        ValueError, TypeError: another number of answers, equal ones, or what is no text.
    """

    prompt: str
    answers: tuple[str, ...]
    """one, or two; what is said of them refers to this order, whatever order they are shown in"""
    key: str = field(init=False)
    """16 hexadecimal digits: a hash of prompt and answers"""

    def __post_init__(self) -> None:
        answers = (self.answers,) if isinstance(self.answers, str) else tuple(self.answers)
        for text in (self.prompt, *answers):
            if not isinstance(text, str):
                raise TypeError(f"an item holds {text!r} ({type(text).__name__}); give texts")
        if len(answers) not in (1, 2):
            raise ValueError(
                f"an item has {len(answers)} answers; give one to rate, or two to compare"
            )
        if len(set(answers)) < len(answers):
            raise ValueError(
                f"an item has the answer {answers[0]!r} twice, of which neither can be preferred; "
                "drop it"
            )

        # lone surrogates have a hash, too
        named = json.dumps([self.prompt, *answers]).encode()
        object.__setattr__(self, "answers", answers)
        object.__setattr__(self, "key", hashlib.sha256(named).hexdigest()[:16])


def as_items(items: Iterable[Any]) -> list[Item]:
    """Items from `Item` objects, tuples (prompt, answer) or (prompt, one, other), or mappings.

    A mapping has `prompt`, and `answers` or `completions`, a text or a list of one or two.

    Raises:
        ValueError, TypeError: there is no item, one is something else or is there twice.
    """
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable):
        raise TypeError(f"items is a {type(items).__name__}; it must be a list of items")
    found = [_as_item(i, given) for i, given in enumerate(items)]
    if not found:
        raise ValueError("items is empty; give at least one")

    # the same texts have the same key, and so one rating
    first: dict[str, int] = {}
    for i, item in enumerate(found):
        if first.setdefault(item.key, i) != i:
            raise ValueError(
                f"items {first[item.key]} and {i} are the same texts; keep one of them. To rate "
                "all of them again, begin a second pass"
            )
    return found


def _as_item(i: int, given: Any) -> Item:
    if isinstance(given, Item):
        return given
    answers = None
    if isinstance(given, Mapping):
        prompt, answers = given.get("prompt"), given.get("answers", given.get("completions"))
    elif isinstance(given, Sequence) and not isinstance(given, str) and len(given) in (2, 3):
        prompt, answers = given[0], tuple(given[1:])
    if answers is None:
        raise TypeError(
            f"items[{i}] is {given!r:.200}; give (prompt, one answer, the other), (prompt, answer) "
            "or {'prompt': ..., 'answers': [...]}"
        )
    try:
        return Item(prompt, answers)
    except (TypeError, ValueError) as error:
        raise type(error)(f"items[{i}]: {error}") from error


def shown_order(item: Item, *, seed: int, rater: str, pass_number: int) -> tuple[int, ...]:
    """The answers from left to right, as indices: drawn from seed, item, rater and pass."""
    if len(item.answers) == 1:
        return (0,)
    drawn = hashed("order", seed, item.key, rater, pass_number)
    return (1, 0) if drawn % 2 else (0, 1)


def hashed(*values: Any) -> int:
    """A number of 64 bits that the values decide, on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(json.dumps(values).encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Rating:
    """What one rater said of one item in one pass.

    Raises:
        ValueError: the parts contradict each other.
    """

    item: str
    """key of the item"""
    rater: str
    pass_number: int
    """1, or 2 where a rater goes through the same items again"""
    order: tuple[int, ...]
    """the answers as shown from left to right: (0, 1) or (1, 0), and (0,) for one answer"""
    choice: Choice | None
    """what was preferred, as shown; None for one answer"""
    scores: tuple[int, ...] | None = None
    """1 to 5 for each answer as shown, where they were rated"""
    seconds: float | None = None
    """time for which the item was in view"""
    guidelines: str | None = None
    """hash of the guidelines that the rater had"""
    time: str = ""
    """UTC, ISO 8601"""

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise ValueError(f"a rating of item {self.item} {problem}: {self}")

    def _problem(self) -> str:
        """What is wrong, or ""."""
        if not (isinstance(self.rater, str) and self.rater.strip()):
            return "has no rater; give a name"
        if type(self.pass_number) is not int or self.pass_number < 1:
            return "has a pass that is no integer from 1 on"
        if self.order not in ((0,), (0, 1), (1, 0)):
            return "has an order that is neither (0,), (0, 1) nor (1, 0)"
        if self.scores is not None:
            whole = all(type(one) is int and LOWEST <= one <= HIGHEST for one in self.scores)
            if not whole or len(self.scores) != len(self.order):
                return f"needs one integer from {LOWEST} to {HIGHEST} for each answer"
        if len(self.order) == 1:
            right = self.choice is None and self.scores is not None
            return "" if right else "of one answer needs a score, and no choice"
        if self.choice not in get_args(Choice):
            return f"is wrong: choice is {self.choice!r}; it must be 'left', 'right' or 'tie'"
        if self.scores is not None and self.choice != preferred(*self.scores):
            return "prefers another answer than its scores"
        return ""

    @property
    def sign(self) -> int:
        """1 where the item's first answer is preferred, -1 for the second, 0 for a tie."""
        as_shown = {"left": 1, "right": -1}.get(self.choice or "", 0)
        return as_shown if self.order == (0, 1) else -as_shown

    @property
    def item_scores(self) -> tuple[int, ...] | None:
        """The scores in the order of the item's answers."""
        if self.scores is None:
            return None
        return tuple(self.scores[self.order.index(k)] for k in range(len(self.order)))

    @property
    def who(self) -> tuple[str, int]:
        """Rater and pass."""
        return self.rater, self.pass_number


def preferred(left: int, right: int) -> Choice:
    """The choice that two ratings imply: the higher is preferred, equal ones are a tie."""
    return "tie" if left == right else "left" if left > right else "right"


class RatingStore:
    """Ratings in a file to which whole lines are added, each on disk before `add` returns.

    Nothing in the file is ever changed: undo is a line, too. A line that a crash cut off, or that
    is damaged in another way, is skipped, and its number is in `damaged`. Several raters, passes
    and kernels may write to one file.

    Args:
        path: of the file, such as "ratings.jsonl"; it is made with the first rating.

    Raises:
        ValueError: the file holds something else than ratings, or those of a later version.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path | str):
        if not isinstance(path, (str, Path)):
            raise TypeError(f"path is {path!r} ({type(path).__name__}); give the path of a file")
        self.path = Path(path).expanduser()
        self.reload()

    def __repr__(self) -> str:
        skipped = f", damaged lines {list(self.damaged)}" if self.damaged else ""
        return f"RatingStore({str(self.path)!r}, {len(self._held)} ratings{skipped})"

    def reload(self) -> None:
        """Read the file again; `ratings` and `get` do so when it has grown."""
        self._held: dict[tuple[str, str, int], Rating] = {}
        self.guidelines: dict[str, str] = {}
        """texts of the guidelines by hash, oldest first"""
        self.damaged: tuple[int, ...] = ()
        """numbers of the lines that were skipped, from 1 on"""
        text = self.path.read_bytes() if self.path.exists() else b""
        self._size = len(text)
        lines, foreign = text.split(b"\n"), []
        for number, line in enumerate(lines, 1):
            if line.strip() and not self._read(line):
                self.damaged += (number,)
                foreign += [line] * (number < len(lines))
        if foreign and not self._held and not any(b'"event"' in line for line in lines):
            raise ValueError(
                f"{str(self.path)!r} holds something else than ratings, such as "
                f"{foreign[0]!r:.80}; give another file, which will be made"
            )

    def ratings(self, rater: str | None = None, pass_number: int | None = None) -> list[Rating]:
        """The ratings that hold, in the order in which they were given."""
        self._catch_up()
        return [
            rating
            for rating in self._held.values()
            if rater in (None, rating.rater) and pass_number in (None, rating.pass_number)
        ]

    def get(self, item: str, rater: str, pass_number: int) -> Rating | None:
        """What a rater said of the item with this key in this pass, or None."""
        self._catch_up()
        return self._held.get((item, rater, pass_number))

    def add(self, rating: Rating) -> None:
        """Write a rating; it replaces one of the same item, rater and pass.

        Raises:
            OSError: it could not be written; then it does not count.
        """
        event = {"event": "rating", "version": VERSION, **asdict(rating)}
        self._append(event | ({} if rating.time else {"time": now()}))

    def undo(self, rating: Rating) -> None:
        """Write that a rating no longer holds.

        Raises:
            KeyError: it does not hold.
            OSError: this could not be written; then the rating still holds.
        """
        key = (rating.item, *rating.who)
        if key not in self._held:
            raise KeyError(f"there is no rating of item {rating.item} by {rating.rater} to undo")
        named = dict(zip(("item", "rater", "pass_number"), key))
        self._append({"event": "undo", "version": VERSION, **named, "time": now()})

    def add_guidelines(self, text: str) -> str:
        """Write a text of guidelines unless it is there, and give the hash that names it."""
        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        if name not in self.guidelines:
            event = {"event": "guidelines", "version": VERSION, "name": name, "text": text}
            self._append({**event, "time": now()})
        return name

    def _append(self, event: Mapping[str, Any]) -> None:
        """Add a line, wait until it is on disk, and take it in."""
        line = json.dumps(event).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # without a buffer, which would write once more when the file is closed
        with open(self.path, "ab+", buffering=0) as file:
            # a line that was cut off ends here
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            try:
                if file.write(line + b"\n") <= len(line):
                    raise OSError(errno.ENOSPC, f"no space left to write {self.path}")
                os.fsync(file.fileno())
            except OSError:
                # nothing of it counts, not even where only fsync failed
                with suppress(OSError):
                    os.truncate(self.path, end)
                raise
        if end == self._size:
            self._read(line.strip())
            self._size += len(line) + 1
        self._catch_up()

    def _catch_up(self) -> None:
        """Read the file again where others have written to it."""
        if (self.path.stat().st_size if self.path.exists() else 0) != self._size:
            self.reload()

    def _read(self, line: bytes) -> bool:
        """Take in a line; False where it is damaged."""
        try:
            event = json.loads(line)
            kind, version = event.pop("event"), event.pop("version")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            return False
        if type(version) is int and version > VERSION:
            raise ValueError(
                f"{str(self.path)!r} was written by a later version of dpo_lab (format {version}; "
                f"this one reads up to {VERSION}); update dpo_lab"
            )
        try:
            return self._take(kind, event)
        except (ValueError, KeyError, TypeError):
            return False

    def _take(self, kind: str, event: dict[str, Any]) -> bool:
        """Take in what a line says; False where it says nothing that is known."""
        if kind == "guidelines":
            self.guidelines[event["name"]] = event["text"]
        elif kind == "undo":
            self._held.pop((event["item"], event["rater"], event["pass_number"]), None)
        elif kind == "rating":
            listed = {k: v if v is None else tuple(v) for k, v in event.items() if k in LISTS}
            rating = Rating(**{**event, **listed})
            # a replaced rating is the last one now
            self._held.pop((rating.item, *rating.who), None)
            self._held[(rating.item, *rating.who)] = rating
        else:
            return False
        return True


LISTS = ("order", "scores")
"""fields of a rating that JSON has as lists"""


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
