"""What a judge is and what it returns: A, B, a tie, or no verdict and why."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from dpo_lab.engine.arguments import floats

Letter = Literal["A", "B", "tie"]
Reason = Literal["refusal", "empty", "prose", "malformed", "error"]

SIGN_OF = {"A": 1, "B": -1, "tie": 0}
LETTER_OF = {sign: letter for letter, sign in SIGN_OF.items()}


@dataclass(frozen=True, eq=False)
class Verdicts:
    """P verdicts on pairs (prompt, answer A, answer B); a missing one keeps its place.

    Raises:
        ValueError, TypeError: the parts differ in length or hold values of another kind.
    """

    winner: np.ndarray
    """(P,) int8: 1 where A wins, -1 where B does, 0 for a tie and where there is no verdict"""
    confidence: np.ndarray | None = None
    """(P,) the judge's probability that A wins, in [0, 1]; NaN where it states none"""
    missing: tuple[str, ...] | None = None
    """(P,) "" where there is a verdict, else why there is none: a `Reason`"""

    def __post_init__(self) -> None:
        winner = floats("winner", self.winner)
        if winner.ndim != 1 or not np.isin(winner, (-1, 0, 1)).all():
            raise ValueError(
                "winner must be (P,) numbers: 1 where A wins, -1 where B does, 0 for a tie"
            )

        # what is not given: no confidence, nothing missing
        n = len(winner)
        confidence = np.full(n, np.nan)
        if self.confidence is not None:
            confidence = floats("confidence", self.confidence)
        missing = ("",) * n if self.missing is None else tuple(self.missing)
        for name, values in (("confidence", confidence), ("missing", missing)):
            if np.shape(values) != (n,):
                raise ValueError(
                    f"{name} has the shape {np.shape(values)} for {n} verdicts; it must be (P,), "
                    "one value each"
                )

        _check_confidence(confidence)
        _check_missing(winner, missing)
        object.__setattr__(self, "winner", winner.astype(np.int8))
        object.__setattr__(self, "confidence", confidence)
        object.__setattr__(self, "missing", missing)

    @classmethod
    def of(cls, letters: Sequence[str | None], confidence: Any = None) -> "Verdicts":
        """From "A", "B" and "tie"; None is no verdict, counted as "empty".

        Raises:
            ValueError: another value.
        """
        for i, letter in enumerate(letters):
            if letter is not None and (not isinstance(letter, str) or letter not in SIGN_OF):
                raise ValueError(
                    f"verdict {i} is {letter!r}; it must be 'A', 'B' or 'tie', or None where there "
                    "is no verdict"
                )
        winner = np.array([SIGN_OF.get(letter, 0) for letter in letters], dtype=np.int8)
        missing = tuple("empty" if letter is None else "" for letter in letters)
        return cls(winner, confidence, missing)

    def __len__(self) -> int:
        return len(self.winner)

    @property
    def present(self) -> np.ndarray:
        """(P,) whether there is a verdict."""
        return np.array([not reason for reason in self.missing], dtype=bool)

    @property
    def letters(self) -> list[str]:
        """(P,) "A", "B" or "tie"; "" where there is no verdict."""
        return [
            "" if reason else LETTER_OF[int(sign)]
            for sign, reason in zip(self.winner, self.missing)
        ]

    @property
    def points(self) -> np.ndarray:
        """(P,) what A gets: 1, 0, or one half for a tie; NaN where there is no verdict."""
        return np.where(self.present, (1 + self.winner) / 2, np.nan)

    def swapped(self) -> "Verdicts":
        """The same verdicts with the names of A and B exchanged."""
        return Verdicts(-self.winner, 1 - self.confidence, self.missing)

    def counts(self) -> dict[str, int]:
        """How many of "A", "B" and "tie", and of each reason for which a verdict is missing."""
        found = Counter(letter or reason for letter, reason in zip(self.letters, self.missing))
        return {name: found[name] for name in ("A", "B", "tie", *get_args(Reason)) if found[name]}


Judge: TypeAlias = Callable[[Sequence[str], Sequence[str], Sequence[str]], Any]
"""A judge: called with P prompts, P answers A and P answers B, it returns `Verdicts`; or P of "A",
"B", "tie" and None (no verdict); or a pair of those and of P confidences."""


def ask(
    judge: Judge, prompts: Sequence[str], answers_a: Sequence[str], answers_b: Sequence[str]
) -> Verdicts:
    """The judge's verdicts on P pairs, in one form whatever it returns.

    Args:
        judge: any function of (prompts, answers A, answers B); see `Judge`.
        prompts: (P,) texts, at least one.
        answers_a: (P,) the answers that are shown first.
        answers_b: (P,) the answers that are shown second.

    Raises:
        ValueError, TypeError: the three differ in length, are empty, or hold no texts; or the judge
            returns something other than one verdict per pair.
    """
    n = check_texts(prompts=prompts, answers_a=answers_a, answers_b=answers_b)
    found = judge(list(prompts), list(answers_a), list(answers_b))
    name = getattr(judge, "__name__", type(judge).__name__)
    try:
        verdicts = _normalized(found)
    except (TypeError, ValueError) as error:
        raise type(error)(f"the judge {name} returned what is no verdict: {error}") from error
    if len(verdicts) != n:
        raise ValueError(
            f"the judge {name} returned {len(verdicts)} verdicts for {n} pairs; it must return one "
            "each, with None where it has none"
        )
    return verdicts


@dataclass(frozen=True, eq=False)
class BothOrders:
    """P pairs judged twice: with the first answer shown first, and with it shown second."""

    prompts: tuple[str, ...]
    """(P,)"""
    first: tuple[str, ...]
    """(P,) the answer that is A in `given` and B in `swapped`"""
    second: tuple[str, ...]
    """(P,) the other answer"""
    given: Verdicts
    """(P,) where A is `first`"""
    swapped: Verdicts
    """(P,) where A is `second`"""

    @property
    def points(self) -> np.ndarray:
        """(P,) what `first` gets, the mean over both orders; NaN unless both have a verdict."""
        return (self.given.points + self.swapped.swapped().points) / 2

    @property
    def inconsistent(self) -> np.ndarray:
        """(P,) whether the place decided: A won in both orders, or B did."""
        product = self.given.winner.astype(int) * self.swapped.winner
        return (product == 1) & self.given.present & self.swapped.present


def ask_both_orders(
    judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> BothOrders:
    """Ask a judge about each of P pairs in both orders, in one call of 2P pairs.

    Raises:
        ValueError, TypeError: as `ask`.
    """
    n = check_texts(prompts=prompts, first=first, second=second)
    prompts, first, second = list(prompts), list(first), list(second)
    found = ask(judge, prompts + prompts, first + second, second + first)
    given, swapped = (
        Verdicts(found.winner[part], found.confidence[part], found.missing[part])
        for part in (slice(n), slice(n, None))
    )
    return BothOrders(tuple(prompts), tuple(first), tuple(second), given, swapped)


def as_verdicts(name: str, found: Any) -> Verdicts:
    """`Verdicts` as they are; a list of "A", "B", "tie" and None as `Verdicts`.

    Raises:
        ValueError, TypeError: something else; the error names the argument.
    """
    try:
        return _normalized(found)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


# checks


def check_texts(**named: Sequence[str]) -> int:
    """The number of texts in each of several lists, by name.

    Raises:
        ValueError, TypeError: they differ in length, are empty, or hold something else than texts.
    """
    for name, texts in named.items():
        if isinstance(texts, (str, bytes)) or not hasattr(texts, "__len__"):
            raise TypeError(
                f"{name} is {texts!r} ({type(texts).__name__}); it must be a list of texts"
            )
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(
                    f"{name}[{i}] is {text!r} ({type(text).__name__}); it must be a text"
                )
    lengths = {name: len(texts) for name, texts in named.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{n} {name}" for name, n in lengths.items())
        raise ValueError(f"the lists have different lengths ({said}); they must go together")
    n = next(iter(lengths.values()))
    if not n:
        raise ValueError(f"there are no {next(iter(lengths))}; give at least one")
    return n


def _normalized(found: Any) -> Verdicts:
    """What a judge returned, as `Verdicts`."""
    if isinstance(found, Verdicts):
        return found
    if isinstance(found, str) or not hasattr(found, "__len__"):
        raise TypeError(
            f"{found!r} ({type(found).__name__}); return a list of 'A', 'B' or 'tie', one per pair"
        )
    if isinstance(found, tuple) and len(found) == 2 and not _is_letter(found[0]):
        return Verdicts.of(list(found[0]), found[1])
    return Verdicts.of(list(found))


def _is_letter(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _check_confidence(confidence: np.ndarray) -> None:
    """Raise ValueError for a confidence that is no probability; NaN is none at all."""
    outside = np.flatnonzero((confidence < 0) | (confidence > 1))
    if len(outside):
        raise ValueError(
            f"confidence[{outside[0]}] is {confidence[outside[0]]}; it is the probability that A "
            "wins, in [0, 1], or NaN where there is none"
        )


def _check_missing(winner: np.ndarray, missing: tuple[str, ...]) -> None:
    """Raise ValueError for an unknown reason, or for a winner where there is no verdict."""
    for i, reason in enumerate(missing):
        if reason not in ("", *get_args(Reason)):
            raise ValueError(
                f"missing[{i}] is {reason!r}; it must be '' where there is a verdict, or one of "
                f"{', '.join(map(repr, get_args(Reason)))}"
            )
        if reason and winner[i]:
            raise ValueError(
                f"verdict {i} is missing ({reason}) and has the winner {LETTER_OF[winner[i]]}; a "
                "missing verdict has none, so winner must be 0"
            )
