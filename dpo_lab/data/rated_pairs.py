"""Ratings as pairs with margins: ties counted, and a rule for raters or passes that disagree."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from dpo_lab.data.ratings import Item, Rating, RatingStore, as_items

Disagreement = Literal["first", "last", "majority", "drop", "all"]


@dataclass(frozen=True)
class Vote:
    """What one rater, in one pass, said of two answers to one prompt."""

    sign: int
    """1 for the first answer, -1 for the second, 0 for a tie"""
    margin: float
    """score of the preferred answer minus that of the other; NaN where they were not rated"""


@dataclass(frozen=True, eq=False)
class RatedPairs:
    """P pairs among N rated answers, and what became of the other votes."""

    prompts: list[str]
    """(N,) the prompt of each answer"""
    answers: list[str]
    """(N,)"""
    chosen: np.ndarray
    """(P,) index into answers"""
    rejected: np.ndarray
    """(P,) index into answers"""
    margins: np.ndarray
    """(P,) difference of the ratings, 1 to 4; NaN where a side was chosen without ratings"""
    votes: int
    """what raters said of two answers, in all passes"""
    ties: int
    """pairs without a row since they are tied (votes, with disagreement="all")"""
    disagreements: int
    """pairs on which votes differ"""
    dropped: int
    """of these, pairs dropped since the rule does not settle them"""
    unrated: int
    """items that nobody rated"""
    unmatched: int
    """ratings of texts that are not among the items: changed, or left out"""

    def __len__(self) -> int:
        return len(self.chosen)

    def __str__(self) -> str:
        names = ("votes", "ties", "disagreements", "dropped", "unrated", "unmatched")
        said = [f"{name} {getattr(self, name):,}" for name in names]
        return ", ".join([f"pairs {len(self):,}", *said])

    def rows(self) -> list[dict[str, Any]]:
        """Rows that `from_rows` reads; with `margin` where all pairs have one."""
        found = [
            {"prompt": self.prompts[c], "chosen": self.answers[c], "rejected": self.answers[r]}
            for c, r in zip(self.chosen, self.rejected)
        ]
        if not np.isnan(self.margins).any():
            found = [row | {"margin": float(m)} for row, m in zip(found, self.margins)]
        return found


def to_pairs(
    store: RatingStore,
    items: Iterable[Any],
    *,
    rater: str | None = None,
    pass_number: int | None = None,
    disagreement: Disagreement = "last",
) -> RatedPairs:
    """Pairs of the answers that were compared, and of those rated alone that share a prompt.

    Answers that were rated alone are paired within a rater and pass: the higher rating is chosen,
    and the margin is the difference, 1 to 4.

    Args:
        store: of the ratings.
        items: those that were rated; ratings of other texts are counted and left out.
        rater, pass_number: of whom and which; None for all.
        disagreement: what holds where votes on a pair differ: the "first" or the "last", what the
            "majority" says (without one, the pair is dropped), none ("drop"), or "all": a row for
            each vote. The margin is the mean over the votes that hold and have one.

    Raises:
        ValueError: another rule, or items that `as_items` refuses.
    """
    if disagreement not in get_args(Disagreement):
        allowed = ", ".join(map(repr, get_args(Disagreement)))
        raise ValueError(f"disagreement is {disagreement!r}; it must be one of {allowed}")
    listed = {item.key: item for item in as_items(items)}
    ratings = store.ratings(rater, pass_number)
    known = [rating for rating in ratings if rating.item in listed]

    # answers by prompt and text, so that the same two are one pair however they were rated
    places: dict[tuple[str, str], int] = {}
    for item in listed.values():
        for answer in item.answers:
            places.setdefault((item.prompt, answer), len(places))
    votes = _votes(known, listed, places)

    # settle each pair
    chosen, rejected, margins, counts = [], [], [], Counter()
    for (a, b), said in votes.items():
        counts["disagreements"] += len({vote.sign for vote in said}) > 1
        held = said if disagreement == "all" else _settled(said, disagreement)
        counts["dropped"] += not held
        for vote in held:
            counts["ties"] += not vote.sign
            if vote.sign:
                chosen.append(a if vote.sign > 0 else b)
                rejected.append(b if vote.sign > 0 else a)
                margins.append(vote.margin)
    return RatedPairs(
        prompts=[prompt for prompt, _ in places],
        answers=[answer for _, answer in places],
        chosen=np.array(chosen, dtype=np.int64),
        rejected=np.array(rejected, dtype=np.int64),
        margins=np.array(margins, dtype=np.float64),
        votes=sum(map(len, votes.values())),
        ties=counts["ties"],
        disagreements=counts["disagreements"],
        dropped=counts["dropped"],
        unrated=len(listed) - len({rating.item for rating in known}),
        unmatched=len(ratings) - len(known),
    )


def to_rows(
    store: RatingStore,
    items: Iterable[Any],
    *,
    rater: str | None = None,
    pass_number: int | None = None,
    disagreement: Disagreement = "last",
) -> list[dict[str, Any]]:
    """The rows of `to_pairs`, with the columns that `from_rows` reads."""
    options = {"rater": rater, "pass_number": pass_number, "disagreement": disagreement}
    return to_pairs(store, items, **options).rows()


def choices_of(
    store: RatingStore, items: Iterable[Any], *, rater: str, pass_number: int = 1
) -> np.ndarray:
    """What a rater preferred, (M,) for M items in their order.

    1 is for the item's first answer, -1 for the second, 0 for a tie; NaN where the item has one
    answer or no rating.
    """
    found = [store.get(item.key, rater, pass_number) for item in as_items(items)]
    return np.array([rating.sign if rating and rating.choice else np.nan for rating in found])


def scores_of(
    store: RatingStore, items: Iterable[Any], *, rater: str, pass_number: int = 1
) -> np.ndarray:
    """Ratings 1 to 5, (M, 2) for the answers of M items in their order; NaN where there is none."""
    listed = as_items(items)
    found = np.full((len(listed), 2), np.nan)
    for row, item in zip(found, listed):
        rating = store.get(item.key, rater, pass_number)
        if rating and rating.item_scores:
            row[: len(item.answers)] = rating.item_scores
    return found


def _votes(
    ratings: Sequence[Rating], items: dict[str, Item], places: dict[tuple[str, str], int]
) -> dict[tuple[int, int], list[Vote]]:
    """Votes on each two answers, oldest first."""
    votes: dict[tuple[int, int], list[Vote]] = {}
    alone: dict[tuple[str, str, int], list[tuple[int, int]]] = {}

    def vote(a: int, b: int, sign: int, margin: float) -> None:
        """A vote on answers `a` and `b`, in either order."""
        key, sign = ((a, b), sign) if a < b else ((b, a), -sign)
        votes.setdefault(key, []).append(Vote(sign, abs(margin)))

    for rating in ratings:
        item, given = items[rating.item], rating.item_scores
        here = [places[item.prompt, answer] for answer in item.answers]
        if len(here) == 2:
            vote(*here, rating.sign, given[0] - given[1] if given else np.nan)
            continue

        # against the answers to the same prompt that were rated before
        assert given is not None
        before = alone.setdefault((item.prompt, *rating.who), [])
        for other, score in before:
            vote(here[0], other, int(np.sign(given[0] - score)), given[0] - score)
        before.append((here[0], given[0]))
    return votes


def _settled(votes: Sequence[Vote], rule: str) -> list[Vote]:
    """The vote that holds, as a list of one; none where the rule does not settle it."""
    if rule in ("first", "last"):
        return [votes[0] if rule == "first" else votes[-1]]
    counted = Counter(vote.sign for vote in votes).most_common(2)
    even = len(counted) == 2 and counted[0][1] == counted[1][1]
    if even or (rule == "drop" and len(counted) > 1):
        return []

    # the mean margin of those who agree
    sign = counted[0][0]
    margins = [vote.margin for vote in votes if vote.sign == sign and not np.isnan(vote.margin)]
    return [Vote(sign, float(np.mean(margins)) if margins else np.nan)]
