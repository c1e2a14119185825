"""A judge against the known truth: accuracy, position bias and length bias."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_lab.judges.intervals import (
    LEVEL,
    NOTHING,
    Estimate,
    constant,
    normal_quantile,
    score_interval,
)
from dpo_lab.judges.verdicts import BothOrders, Verdicts, as_verdicts


@dataclass(frozen=True)
class JudgeBiases:
    """What a judge's verdicts in both orders say about it, given the truth."""

    accuracy: Estimate
    """probability that the better answer wins, at equal lengths and over both orders; NaN where the
    truth is a tie everywhere"""
    position_bias: Estimate
    """fraction of verdicts for the answer shown first, minus one half"""
    length_bias: Estimate
    """probability that the longer of two equally good answers wins, over both orders, minus one
    half; NaN where all pairs have answers of equal length"""
    consistent: Estimate
    """fraction of pairs with the same winner in both orders (or a tie in both)"""
    pairs: int
    """pairs with a verdict in both orders, on which all of this rests"""
    missing: dict[str, int]
    """verdicts that are missing, by reason"""


def judge_biases(
    both: BothOrders, truth: Verdicts | Sequence[str], *, level: float = LEVEL
) -> JudgeBiases:
    """Accuracy, position bias and length bias of a judge, from verdicts in both orders.

    Least squares on the model of `biased_judge`: with y = 1 where the answer shown first wins, 1/2
    for a tie and 0 otherwise,

        E[y] = 1/2 + (accuracy - 1/2) s + position_bias + length_bias d,

    where s says which answer is truly better (1 the first, -1 the second, 0 neither) and d which is
    longer. Since both orders of each pair are there, s and d have mean 0, and the position bias is
    simply the mean of y minus 1/2. Standard errors are clustered by prompt, since verdicts on the
    same texts need not be independent; an interval is Wilson's for as many independent verdicts as
    have this standard error.

    Args:
        both: from `ask_both_orders`, about P pairs of at least two prompts.
        truth: (P,) which of `both.first` ("A") and `both.second` ("B") is better, or "tie"; such as
            `ask(reward_judge(reward), both.prompts, both.first, both.second)`.
        level: of each interval by itself.

    Raises:
        ValueError, TypeError: the truth has another number of pairs; fewer than two prompts have
            verdicts; or the better answer is the longer one in every pair, or the shorter one in
            every pair, so that accuracy and length bias cannot be told apart.
    """
    from scipy.stats import t as student

    normal_quantile(level)  # checks the level
    truth = as_verdicts("truth", truth)
    if len(truth) != len(both.prompts):
        raise ValueError(
            f"truth has {len(truth)} verdicts for {len(both.prompts)} pairs; need one each"
        )

    # pairs with everything, and the prompts they belong to
    there = ~np.isnan(both.points) & truth.present
    _, prompt_of = np.unique(np.array(both.prompts, dtype=object)[there], return_inverse=True)
    n = int(there.sum())
    prompts = prompt_of.max(initial=-1) + 1
    if prompts < 2:
        raise ValueError(
            f"{prompts} prompts have verdicts in both orders and a truth; intervals need at least 2"
        )

    # both orders of each pair below each other: y (2n,) and regressors (2n, 3)
    y = np.concatenate([both.given.points[there], both.swapped.points[there]])
    gap = [len(one) - len(other) for one, other in zip(both.first, both.second)]
    better, longer = truth.winner[there].astype(float), np.sign(gap)[there].astype(float)
    columns = {
        "accuracy": np.concatenate([better, -better]),
        "position": np.ones(2 * n),
        "length": np.concatenate([longer, -longer]),
    }
    used = [name for name, column in columns.items() if column.any()]
    x = np.stack([columns[name] for name in used], 1)
    if np.linalg.matrix_rank(x) < len(used):
        raise ValueError(
            "the better answer is the longer one in every pair, or the shorter one in every pair, "
            "so accuracy and length bias cannot be told apart; add pairs where it is not"
        )

    # least squares, and standard errors clustered by prompt
    inverse = np.linalg.inv(x.T @ x)
    found = inverse @ (x.T @ (y - 0.5))
    pulls = x * (y - 0.5 - x @ found)[:, None]
    by_prompt = np.zeros((prompts, len(used)))
    np.add.at(by_prompt, np.tile(prompt_of, 2), pulls)
    covariance = inverse @ (by_prompt.T @ by_prompt) @ inverse * prompts / (prompts - 1)
    errors = np.sqrt(covariance.diagonal())

    quantile = student.ppf(0.5 + level / 2, prompts - 1)
    halves = {
        name: _fraction(0.5 + value, error, prompts, quantile)
        for name, value, error in zip(used, found, errors)
    }
    same = both.given.winner[there] == -both.swapped.winner[there]
    return JudgeBiases(
        accuracy=halves.get("accuracy", NOTHING),
        position_bias=_shifted(halves["position"]),
        length_bias=_shifted(halves.get("length", NOTHING)),
        consistent=_clustered(same, prompt_of, quantile),
        pairs=n,
        missing=dict(Counter(filter(None, both.given.missing + both.swapped.missing))),
    )


def _fraction(value: float, error: float, n: int, quantile: float) -> Estimate:
    """Wilson's interval of an estimated fraction, for the number of independent verdicts that its
    standard error is worth; that of `constant` where there is no error, as for a judge that is
    always right."""
    inside = min(max(float(value), 0.0), 1.0)
    if error < 1e-9:
        return constant(inside, n, quantile)
    spread = inside * (1 - inside) or (n + 1) / (n + 2) ** 2
    interval = score_interval(inside, spread / error**2, quantile)
    return Estimate(float(value), interval.low, interval.high)


def _shifted(found: Estimate) -> Estimate:
    """A probability as its distance from one half."""
    return Estimate(found.value - 0.5, found.low - 0.5, found.high - 0.5)


def _clustered(outcomes: np.ndarray, prompt_of: np.ndarray, quantile: float) -> Estimate:
    """A fraction of outcomes that come in groups, one per prompt."""
    value, prompts = float(outcomes.mean()), prompt_of.max() + 1
    pulls = np.bincount(prompt_of, outcomes - value)
    error = np.sqrt((pulls**2).sum() * prompts / (prompts - 1)) / len(outcomes)
    return _fraction(value, error, prompts, quantile)
