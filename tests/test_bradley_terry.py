"""Rewards fitted to comparisons, against scikit-learn's logistic regression and simulation."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from dpo_lab.theory.bradley_terry import fit_bradley_terry


def simulate(rewards, pairs, seed):
    rng = np.random.default_rng(seed)
    a = rng.integers(len(rewards), size=pairs)
    b = (a + rng.integers(1, len(rewards), size=pairs)) % len(rewards)
    wins = rng.random(pairs) < expit(rewards[a] - rewards[b])
    return np.where(wins, a, b), np.where(wins, b, a)


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_is_that_of_logistic_regression_on_differences(seed):
    n = 6
    chosen, rejected = simulate(np.random.default_rng(seed).normal(size=n), 300, seed)
    fit = fit_bradley_terry(chosen, rejected, n)
    difference = np.zeros((300, n))
    difference[np.arange(300), chosen], difference[np.arange(300), rejected] = 1, -1
    rows, labels = np.concatenate([difference, -difference]), np.repeat([1, 0], 300)
    other = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(
        rows[:, 1:], labels
    )
    np.testing.assert_allclose(fit.rewards - fit.rewards[0], [0, *other.coef_[0]], atol=1e-6)
    assert abs(fit.rewards.mean()) < 1e-12


def test_intervals_cover_the_truth_as_often_as_they_say():
    truth = np.array([0.5, 0.0, -0.5, 0.3])
    hits = 0
    for seed in range(200):
        low, high = fit_bradley_terry(*simulate(truth, 400, seed), 4).interval(0, 2)
        hits += low < 1.0 < high
    assert 178 <= hits <= 199  # 190 expected, standard deviation 3


def test_more_comparisons_narrow_the_interval_by_the_root():
    truth = np.array([0.4, -0.4, 0.1])
    widths = [
        np.diff(fit_bradley_terry(*simulate(truth, pairs, 0), 3).interval(0, 1))[0]
        for pairs in (500, 50_000)
    ]
    assert widths[0] / widths[1] == pytest.approx(10, rel=0.15)


def test_even_results_give_even_rewards():
    fit = fit_bradley_terry([0, 1, 2], [1, 2, 0], 3)  # rock, paper, scissors
    np.testing.assert_allclose(fit.rewards, 0, atol=1e-12)
    assert fit.nll == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    "chosen, rejected, n, words",
    [
        ([], [], 3, "no comparisons"),
        ([0, 1], [1, 0], 3, r"2 groups, .*\[2\].* never compared"),
        ([0, 1, 2, 3], [1, 0, 3, 2], 4, "2 groups"),
        ([0, 0, 1], [1, 2, 2], 3, "3 groups"),
        ([0, 1, 3], [1, 0, 0], 3, "chosen\[2\] is 3"),
        ([1], [1], 2, "as chosen and as rejected"),
    ],
)
def test_what_cannot_be_fitted_is_named(chosen, rejected, n, words):
    with pytest.raises(ValueError, match=words):
        fit_bradley_terry(chosen, rejected, n)
