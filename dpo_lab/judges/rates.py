"""Win rates by a judge: both orders, intervals over prompts, and the length-controlled rate."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpo_lab.engine.arguments import checked, integer
from dpo_lab.judges.intervals import (
    NOTHING,
    Estimate,
    difference_by_prompt,
    mean_by_prompt,
    means_of,
)
from dpo_lab.judges.length_control import length_controlled_rate
from dpo_lab.judges.simple import content_uniform
from dpo_lab.judges.verdicts import Judge, ask, check_texts

Order = Literal["swapped", "random", "given"]
Answers = Sequence[str] | Sequence[Sequence[str]]


@dataclass(frozen=True, eq=False)
class WinRate:
    """How often answers win against a baseline: ties count one half, prompts count equally.

    A pair that is asked in both orders is won where it is won in both; where the verdict follows
    the place, it is half won and half lost.
    """

    rate: float
    """mean over the prompts of the mean points of a prompt's pairs"""
    low: float
    """lower end of the 95% interval: percentile bootstrap over prompts"""
    high: float
    """upper end"""
    wins: int
    """pairs in which the answer got more than half of the points"""
    ties: int
    """pairs in which it got exactly half, inconsistent ones included"""
    losses: int
    """pairs in which it got less"""
    inconsistent: int
    """pairs whose winner changed with the order; 0 where each was asked once"""
    missing: dict[str, int]
    """verdicts that are missing, by reason; a pair without all its verdicts counts nowhere"""
    missing_pairs: int
    """pairs that count nowhere for that reason"""
    position_bias: Estimate
    """fraction of verdicts for the answer shown first, minus one half; NaN for order="given\""""
    length_controlled: Estimate
    """the rate that the judge would give at equal lengths: `length_controlled_rate`"""
    points: np.ndarray
    """(M,) mean points of each prompt, for paired comparisons; NaN where all its pairs are
    missing"""

    def __str__(self) -> str:
        said = f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}]"
        counts = f"{self.wins} won, {self.ties} tied, {self.losses} lost"
        lost = f", {self.missing_pairs} missing" if self.missing_pairs else ""
        return f"{said}, length-controlled {self.length_controlled} ({counts}{lost})"


@checked
def win_rates(
    judge: Judge,
    prompts: Sequence[str],
    answers: Answers,
    baseline: Answers,
    *,
    order: Order = "swapped",
    resamples: int = 2_000,
    seed: int = 0,
) -> WinRate:
    """How often the judge prefers the answers to the baseline's, with 95% intervals.

    The judge is asked once, about all pairs together. Intervals come from resampled prompts, so
    that all the answers to a prompt stay together.

    Args:
        judge: any function of (prompts, answers A, answers B); see `verdicts.Judge`.
        prompts: (M,) texts.
        answers: (M,) texts, or (M,) lists of any number of texts.
        baseline: (M,) texts, one for all answers to the prompt; or lists as `answers` has them,
            which are compared one by one.
        order: "swapped" asks about each pair twice, once in each order; "random" once, in an order
            that the seed and the texts decide; "given" once with the answer first, so that the rate
            contains the judge's position bias.
        resamples: of the bootstrap.
        seed: of the bootstrap and of the random order.

    Raises:
        ValueError, TypeError: lists that do not go together; no prompt; an argument that is not
            allowed; the judge does not return one verdict per pair, or gives no pair all its
            verdicts.
    """
    resamples, seed = integer("resamples", resamples), integer("seed", seed)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1, such as 2,000")
    texts, ours, theirs, owner = _paired(prompts, answers, baseline)

    # each verdict: about which pair, and whether our answer is shown first
    n = len(texts)
    pair, ours_first = np.arange(n), np.full(n, True)
    if order == "swapped":
        pair, ours_first = np.tile(pair, 2), np.repeat([True, False], n)
    elif order == "random":
        drawn = [content_uniform(seed, *three) for three in zip(texts, ours, theirs)]
        ours_first = np.array(drawn) < 0.5

    # one call for all verdicts, and what our answers get
    a = [(ours if first else theirs)[i] for i, first in zip(pair, ours_first)]
    b = [(theirs if first else ours)[i] for i, first in zip(pair, ours_first)]
    found = ask(judge, [texts[i] for i in pair], a, b)
    earned = np.where(ours_first, found.points, 1 - found.points)
    points = np.bincount(pair, earned, n) / np.bincount(pair, minlength=n)  # (n,)

    # means by prompt, of the pairs that have all their verdicts
    there = ~np.isnan(points)
    missing = dict(Counter(reason for reason in found.missing if reason))
    if not there.any():
        raise ValueError(
            f"no pair has all its verdicts, of {n} pairs; missing are {missing}. Look at what the "
            "judge answers before you ask it again"
        )
    by_prompt = means_of(points[there], owner[there], len(prompts))
    rate = mean_by_prompt(by_prompt[~np.isnan(by_prompt)], resamples, seed)
    bias = NOTHING
    if order != "given":
        first = np.where(there[pair], found.points, np.nan)
        bias = _position_bias(first, owner[pair], resamples, seed)
    gaps = np.array([len(one) - len(other) for one, other in zip(ours, theirs)], dtype=float)
    controlled = length_controlled_rate(
        points[there], gaps[there], owner[there], resamples=resamples, seed=seed
    )

    same_place = np.bincount(pair, found.winner, n) if order == "swapped" else np.zeros(n)
    return WinRate(
        rate=rate.value,
        low=rate.low,
        high=rate.high,
        wins=int((points > 0.5).sum()),
        ties=int((points == 0.5).sum()),
        losses=int((points < 0.5).sum()),
        inconsistent=int((np.abs(same_place[there]) == 2).sum()),
        missing=missing,
        missing_pairs=int((~there).sum()),
        position_bias=bias,
        length_controlled=controlled,
        points=by_prompt,
    )


def win_rate_difference(
    one: WinRate, other: WinRate, *, resamples: int = 2_000, seed: int = 0
) -> Estimate:
    """The difference of two win rates on the same prompts, with its paired 95% interval.

    Prompts are resampled for both together, so what makes a prompt hard for both cancels. Prompts
    that either lacks are left out.

    Raises:
        ValueError: the two have different numbers of prompts.
    """
    if len(one.points) != len(other.points):
        raise ValueError(
            f"one has {len(one.points)} prompts and other {len(other.points)}; a paired difference "
            "needs the same prompts in the same order"
        )
    gap = one.points - other.points
    return difference_by_prompt(gap[~np.isnan(gap)], resamples, seed)


def _position_bias(first: np.ndarray, owner: np.ndarray, resamples: int, seed: int) -> Estimate:
    """What the answer shown first gets, minus one half, over prompts; NaN is left out."""
    there = ~np.isnan(first)
    by_prompt = means_of(first[there], owner[there], owner.max() + 1)
    bias = mean_by_prompt(by_prompt[~np.isnan(by_prompt)], resamples, seed)
    return Estimate(bias.value - 0.5, bias.low - 0.5, bias.high - 0.5)


def _paired(
    prompts: Sequence[str], answers: Answers, baseline: Answers
) -> tuple[list[str], list[str], list[str], np.ndarray]:
    """Prompt, answer and baseline answer of each pair, and the place of its prompt."""
    check_texts(prompts=prompts)
    for name, given in (("answers", answers), ("baseline", baseline)):
        if isinstance(given, str) or not hasattr(given, "__len__"):
            raise TypeError(f"{name} is {given!r}; it must be a list, one text or list per prompt")
        if len(given) != len(prompts):
            raise ValueError(f"{len(given)} {name} for {len(prompts)} prompts; need one each")

    texts, ours, theirs, owner = [], [], [], []
    for i, (prompt, some, others) in enumerate(zip(prompts, answers, baseline)):
        some = [some] if isinstance(some, str) else some
        if not hasattr(some, "__len__"):
            raise TypeError(f"answers[{i}] is {some!r}; it must be a text, or a list of texts")
        others = [others] * len(some) if isinstance(others, str) else others
        if not len(some):
            raise ValueError(f"answers[{i}] is empty; give at least one answer to each prompt")
        check_texts(**{f"answers[{i}]": some, f"baseline[{i}]": others})
        texts += [prompt] * len(some)
        ours += some
        theirs += others
        owner += [i] * len(some)
    return texts, ours, theirs, np.array(owner)
