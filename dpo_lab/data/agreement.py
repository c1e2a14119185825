"""How far raters agree, with each other and with themselves; position bias, and time per item.

Kappa and alpha subtract what chance gives. All are NaN where they are not defined: nothing was
rated twice, or only one label was ever used. Intervals resample items.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np

from dpo_lab.data.rated_pairs import choices_of
from dpo_lab.data.ratings import Rating, RatingStore, as_items

Level = Literal["nominal", "ordinal", "interval", "ratio"]

CONFIDENCE = 0.95
"""level of every interval"""


@dataclass(frozen=True)
class Measured:
    """A number with the ends of its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float
    n: int
    """items, or ratings, that it is computed from"""

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"not defined (n = {self.n})"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] (n = {self.n})"


def raw_agreement(labels: Any, *, resamples: int = 1000, seed: int = 0) -> Measured:
    """Fraction of the pairs of raters who give an item the same label, over all items.

    Args:
        labels: (M, R) labels of M items by R raters, as numbers; NaN where one gave none.
        resamples, seed: of the bootstrap over items.

    Raises:
        ValueError: `labels` is not of this shape, or has fewer than two raters.
    """
    table = _shared(labels)
    counts = _counts(table)
    raters = counts.sum(1)
    same, pairs = (counts * (counts - 1)).sum(1), raters * (raters - 1)

    def fraction(some: np.ndarray) -> float:
        return float(same[some].sum() / pairs[some].sum())

    return _measured(fraction, len(table), resamples, seed)


def cohen_kappa(one: Any, other: Any, *, resamples: int = 1000, seed: int = 0) -> Measured:
    """Cohen's kappa of two raters, or of two passes of one: 1 is full agreement, 0 is chance.

    Cohen 1960. Items that either left out do not count.

    Args:
        one, other: (M,) labels as numbers; NaN where there is none.
        resamples, seed: of the bootstrap over items.

    Raises:
        ValueError: the two differ in length.
    """
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.shape != other.shape or one.ndim != 1:
        raise ValueError(
            f"one has shape {one.shape} and other {other.shape}; both must be (M,), a label per "
            "item, with NaN where there is none"
        )
    table = np.stack([one, other], 1)
    table = table[~np.isnan(table).any(1)]
    values, codes = np.unique(table, return_inverse=True)
    met = np.ravel_multi_index(tuple(codes.reshape(-1, 2).T), (len(values), len(values)))

    def kappa(some: np.ndarray) -> float:
        # how often each label of one meets each of the other, (C, C)
        both = np.bincount(met[some], minlength=len(values) ** 2).reshape(len(values), -1)
        both = both / len(some)
        chance = both.sum(0) @ both.sum(1)
        return float((both.trace() - chance) / (1 - chance))

    return _measured(kappa, len(table), resamples, seed)


def fleiss_kappa(labels: Any, *, resamples: int = 1000, seed: int = 0) -> Measured:
    """Fleiss' kappa of R raters, who need not be the same for each item: Fleiss 1971.

    Args:
        labels: (M, R) labels of M items as numbers; NaN where a rater gave none. Items that fewer
            rated than the most of any item do not count: `n` says how many do.
        resamples, seed: of the bootstrap over items.

    Raises:
        ValueError: `labels` is not of this shape, or has fewer than two raters.
    """
    counts = _counts(_shared(labels))
    raters = counts.sum(1)
    r = raters.max(initial=0)
    counts = counts[raters == r]
    same = (counts * (counts - 1)).sum(1) / max(r * (r - 1), 1)

    def kappa(some: np.ndarray) -> float:
        chance = (counts[some].mean(0) / r) ** 2
        return float((same[some].mean() - chance.sum()) / (1 - chance.sum()))

    return _measured(kappa, len(counts), resamples, seed)


def krippendorff_alpha(
    labels: Any, level: Level = "nominal", *, resamples: int = 1000, seed: int = 0
) -> Measured:
    """Krippendorff's alpha of R raters, with any labels missing, by the package `krippendorff`.

    Args:
        labels: (M, R) labels of M items as numbers; NaN where a rater gave none.
        level: "nominal" for names, "ordinal" for ratings 1 to 5, "interval" where their differences
            count, "ratio" where there is a zero, too.
        resamples, seed: of the bootstrap over items.

    Raises:
        ValueError: `labels` is not of this shape, has fewer than two raters, or another level.
    """
    import krippendorff

    if level not in get_args(Level):
        allowed = ", ".join(map(repr, get_args(Level)))
        raise ValueError(f"level is {level!r}; it must be one of {allowed}")
    table = _shared(labels)
    values, counts = np.unique(table[~np.isnan(table)]), _counts(table)

    def alpha(some: np.ndarray) -> float:
        there = counts[some].sum(0) > 0
        if there.sum() < 2:
            return math.nan
        domain = values[there]
        return float(
            krippendorff.alpha(
                value_counts=counts[some][:, there],
                value_domain=domain,
                level_of_measurement=level,
            )
        )

    return _measured(alpha, len(table), resamples, seed)


@dataclass(frozen=True)
class PositionBias:
    """How often the left answer was chosen; without a bias that is one half."""

    left: Measured
    """fraction of the decided pairs, with Wilson's interval"""
    p_value: float
    """probability of a count this far from one half, or farther, without a bias; exact"""
    ties: int
    """pairs left out, since neither was chosen"""


def position_bias(ratings: Iterable[Rating]) -> PositionBias:
    """Whether raters prefer a side, from ratings of two answers; the sides were drawn at random."""
    from scipy.stats import binomtest

    said = [rating.choice for rating in ratings if rating.choice is not None]
    left, n = said.count("left"), len(said) - said.count("tie")
    if not n:
        return PositionBias(Measured(math.nan, math.nan, math.nan, 0), math.nan, len(said))
    test = binomtest(left, n)
    low, high = test.proportion_ci(CONFIDENCE, "wilson")
    return PositionBias(
        Measured(left / n, float(low), float(high), n), float(test.pvalue), len(said) - n
    )


def seconds_per_item(
    ratings: Iterable[Rating], *, resamples: int = 1000, seed: int = 0
) -> Measured:
    """The median time per item in seconds, which one long pause does not change."""
    found = np.array([r.seconds for r in ratings if r.seconds is not None], dtype=np.float64)
    return _measured(lambda some: float(np.median(found[some])), len(found), resamples, seed)


@dataclass(frozen=True)
class Agreement:
    """What raters of the same pairs agree on: a table of the measures that can be computed."""

    raters: tuple[str, ...]
    labels: np.ndarray
    """(M, R) in the first pass: 1 for an item's first answer, -1 for the second, 0 for a tie"""
    raw: Measured
    """over all pairs of raters"""
    cohen: dict[tuple[str, str], Measured]
    """of every two raters"""
    fleiss: Measured
    alpha: Measured
    """Krippendorff's, nominal"""
    with_themselves: dict[str, tuple[Measured, Measured]]
    """raw agreement and Cohen's kappa of a rater's first two passes, where there are two"""


def rater_agreement(
    store: RatingStore,
    items: Iterable[Any],
    raters: Sequence[str] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """The agreement of raters on the items of two answers, a tie being a label like the others.

    Args:
        store: of the ratings.
        items: those that were rated.
        raters: by default all of the store.
        resamples, seed: of the bootstrap over items.

    Raises:
        ValueError: nobody has rated anything.
    """
    items, options = as_items(items), {"resamples": resamples, "seed": seed}
    raters = tuple(raters or dict.fromkeys(rating.rater for rating in store.ratings()))
    if not raters:
        raise ValueError(f"{store} has no ratings; rate some items first")
    first = np.stack([choices_of(store, items, rater=rater) for rater in raters], 1)
    nothing = Measured(math.nan, math.nan, math.nan, 0)
    several = len(raters) > 1

    with_themselves = {}
    for k, rater in enumerate(raters):
        again = choices_of(store, items, rater=rater, pass_number=2)
        both = np.stack([first[:, k], again], 1)
        if (~np.isnan(both)).all(1).any():
            raw, kappa = raw_agreement(both, **options), cohen_kappa(*both.T, **options)
            with_themselves[rater] = (raw, kappa)
    return Agreement(
        raters=raters,
        labels=first,
        raw=raw_agreement(first, **options) if several else nothing,
        cohen={
            (raters[a], raters[b]): cohen_kappa(first[:, a], first[:, b], **options)
            for a, b in combinations(range(len(raters)), 2)
        },
        fleiss=fleiss_kappa(first, **options) if several else nothing,
        alpha=krippendorff_alpha(first, **options) if several else nothing,
        with_themselves=with_themselves,
    )


def _shared(labels: Any) -> np.ndarray:
    """The items (m, R) that at least two raters labeled, checked."""
    table = np.asarray(labels, np.float64)
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError(
            f"labels has shape {table.shape}; it must be (M, R): a row for each item, and a column "
            "for each of at least two raters, with NaN where one gave no label"
        )
    return table[(~np.isnan(table)).sum(1) >= 2]


def _counts(table: np.ndarray) -> np.ndarray:
    """How many raters gave each item each label, (m, C)."""
    values = np.unique(table[~np.isnan(table)])
    return (table[:, :, None] == values).sum(1)


def _measured(
    statistic: Callable[[np.ndarray], float], n: int, resamples: int, seed: int
) -> Measured:
    """A statistic of item indices, with its percentile interval over resampled items."""
    if not n:
        return Measured(math.nan, math.nan, math.nan, 0)
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of 0 / 0, which is NaN here
        value, generator = statistic(np.arange(n)), np.random.default_rng(seed)
        drawn = np.array([statistic(generator.integers(n, size=n)) for _ in range(resamples)])
    drawn = drawn[~np.isnan(drawn)]
    if math.isnan(value) or not len(drawn):
        return Measured(math.nan, math.nan, math.nan, n)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Measured(value, float(low), float(high), n)
