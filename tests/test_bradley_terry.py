"""Rewards fitted to comparisons and rankings, against logistic regression, autograd, simulation."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from dpo_lab.losses import plackett_luce_loss
from dpo_lab.theory.bradley_terry import fit_bradley_terry, fit_plackett_luce

TRUTH = np.array([1.0, 0.3, 0.0, -0.5, -0.8])


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


def test_a_comparison_counts_by_its_weight():
    """As often as it is repeated; not at all with weight 0; a tie is one half each way."""
    chosen, rejected = simulate(TRUTH, 200, 1)
    times = np.random.default_rng(0).integers(4, size=200)
    weighted = fit_bradley_terry(chosen, rejected, 5, weights=times)
    repeated = fit_bradley_terry(np.repeat(chosen, times), np.repeat(rejected, times), 5)
    np.testing.assert_allclose(weighted.rewards, repeated.rewards, atol=1e-12)
    np.testing.assert_allclose(weighted.covariance, repeated.covariance, atol=1e-12)
    assert weighted.nll == pytest.approx(repeated.nll, abs=1e-12)

    tie = fit_bradley_terry([0, 0, 1], [1, 1, 0], 2, weights=[1, 0.5, 0.5])
    assert tie.rewards[0] - tie.rewards[1] == pytest.approx(np.log(1.5 / 0.5))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, np.nan], [1.0, np.inf]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="weights have the shape .* for each of 2 comparisons"):
        fit_bradley_terry([0, 1], [1, 0], 2, weights=weights)


def test_what_has_no_weight_connects_nothing():
    with pytest.raises(ValueError, match="fall into 2 groups"):
        fit_bradley_terry([0, 1], [1, 0], 2, weights=[1, 0])
    with pytest.raises(ValueError, match="no comparisons"):
        fit_bradley_terry([0, 1], [1, 0], 2, weights=[0, 0])


def rankings(n, seed, kept=5):
    """The best `kept` of five items by reward with Gumbel noise, best first."""
    noise = np.random.default_rng(seed).gumbel(size=(n, 5))
    return np.argsort(-(TRUTH + noise), axis=1)[:, :kept]


def test_rankings_of_two_are_comparisons():
    chosen, rejected = simulate(TRUTH, 300, 0)
    pairs = fit_bradley_terry(chosen, rejected, 5)
    found = fit_plackett_luce(np.stack([chosen, rejected], 1), 5)
    np.testing.assert_array_equal(found.rewards, pairs.rewards)
    np.testing.assert_array_equal(found.covariance, pairs.covariance)


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_to_rankings_is_least_in_the_loss_and_its_covariance_is_the_inverse_curvature(seed):
    ranked = torch.from_numpy(rankings(80, seed))
    fit = fit_plackett_luce(ranked, 5)

    def loss(rewards):
        return plackett_luce_loss(rewards, torch.zeros(5, dtype=rewards.dtype), ranked, 1.0).sum()

    rewards = torch.from_numpy(fit.rewards)
    np.testing.assert_allclose(torch.func.grad(loss)(rewards), 0, atol=1e-10)
    curvature = torch.func.hessian(loss)(rewards).numpy()
    np.testing.assert_allclose(fit.covariance @ curvature, np.eye(5) - 1 / 5, atol=1e-10)
    assert fit.nll == pytest.approx(loss(rewards).item() / 80, rel=1e-12)
    assert abs(fit.rewards.mean()) < 1e-12


def test_the_covariance_of_many_rankings_is_that_of_the_model():
    """Against the expected information: a sum over all rankings and places, with loops."""
    information = np.zeros((5, 5))
    for order in permutations(range(5)):
        chance, seen = 1.0, np.zeros((5, 5))
        for k in range(4):
            rest = list(order[k:])
            p = np.exp(TRUTH[rest]) / np.exp(TRUTH[rest]).sum()
            seen[np.ix_(rest, rest)] += np.diag(p) - np.outer(p, p)
            chance *= p[0]
        information += chance * seen
    found = 20_000 * fit_plackett_luce(rankings(20_000, 0), 5).covariance
    np.testing.assert_allclose(found, np.linalg.pinv(information), rtol=0.05, atol=0.01)


def test_intervals_from_rankings_cover_the_truth_as_often_as_they_say():
    hits = 0
    for seed in range(200):
        low, high = fit_plackett_luce(rankings(60, seed), 5).interval(0, 4)
        hits += low < TRUTH[0] - TRUTH[4] < high
    assert 178 <= hits <= 199  # 190 expected, standard deviation 3


def test_rankings_may_hold_some_of_the_items():
    ranked = np.concatenate([rankings(4_000, 0, kept=3), rankings(4_000, 1, kept=3)[:, ::-1]])
    assert fit_plackett_luce(ranked, 5).rewards.shape == (5,)


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


@pytest.mark.parametrize(
    "rankings, error, words",
    [
        ([], ValueError, r"rankings has shape \(0,\)"),
        (np.empty((0, 3), int), ValueError, "no comparisons"),
        ([[0, 1, 2]], ValueError, "4 groups"),
        ([[0, 1], [1, 0], [2, 3], [3, 2]], ValueError, "2 groups"),
        ([[0, 1, 0]], ValueError, "ranking 0 is .* completion 0 twice"),
        ([[0, 4]], ValueError, r"rankings\[0, 1\] is 4"),
        ([0, 1], ValueError, r"rankings has shape \(2,\)"),
        ([[0, 1], [1]], TypeError, "rankings holds sequences of unequal length"),
        ([[0.0, 1.0]], TypeError, "rankings holds"),
    ],
)
def test_rankings_that_cannot_be_fitted_are_named(rankings, error, words):
    with pytest.raises(error, match=words):
        fit_plackett_luce(rankings, 4)


@pytest.mark.parametrize("wins", [1, 3, 10, 30, 100, 299, 300, 301, 1000, 3000])
@pytest.mark.parametrize("items", [2, 3, 4])
def test_the_fit_ends_where_rounding_hides_the_last_steps(wins, items):
    """A chain of lopsided pairs; each of its differences is log(wins) exactly."""
    chosen, rejected = [], []
    for i in range(items - 1):
        chosen += [i] * wins + [i + 1]
        rejected += [i + 1] * wins + [i]
    rewards = fit_bradley_terry(chosen, rejected, items).rewards
    np.testing.assert_allclose(-np.diff(rewards), math.log(wins), atol=1e-9)
