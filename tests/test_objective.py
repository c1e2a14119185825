"""The exact objective against mpmath and against itself.

Identities that hold for every policy, reward and beta.
"""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from dpo_lab.losses import bradley_terry_nll, dpo_loss
from dpo_lab.theory.objective import (
    implicit_reward,
    kl,
    log_partition,
    objective_value,
    optimal_policy,
    value_gap,
)

mpmath.mp.dps = 60
betas = st.floats(-6, 6).map(lambda e: 10.0**e)
rewards = st.lists(st.floats(-5, 5), min_size=4, max_size=4).map(
    lambda r: torch.tensor(r, dtype=torch.float64)
)
weights = st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)


def distribution(counts):
    return torch.tensor(counts, dtype=torch.float64) / sum(counts)


def exact_log_partition(reference, reward, beta):
    """For the reference as if it summed to exactly 1."""
    q = [mpmath.mpf(value) for value in reference.tolist()]
    return mpmath.log(
        sum(a * mpmath.exp(mpmath.mpf(r) / beta) for a, r in zip(q, reward.tolist())) / sum(q)
    )


def exact_kl(p, q):
    return sum(
        mpmath.mpf(a) * mpmath.log(mpmath.mpf(a) / b) for a, b in zip(p.tolist(), q.tolist()) if a
    )


@settings(deadline=None)
@given(weights, rewards, betas)
def test_log_partition_and_optimum_are_exact_from_tiny_to_huge_beta(counts, reward, beta):
    reference = distribution(counts)
    exact = exact_log_partition(reference, reward, beta)
    assert abs(float((log_partition(reference, reward, beta).item() - exact) * beta)) < 1e-13 * (
        1 + reward.abs().max()
    )
    best = optimal_policy(reference, reward, beta)
    expected = [
        float(mpmath.mpf(q) * mpmath.exp(r / mpmath.mpf(beta) - exact))
        for q, r in zip(reference.tolist(), reward.tolist())
    ]
    np.testing.assert_allclose(best, expected, atol=1e-9)
    assert best.sum().item() == pytest.approx(1, abs=1e-12) and not best[reference == 0].any()


@settings(deadline=None)
@given(weights, weights, rewards, betas)
def test_the_value_gap_is_what_the_objective_loses(policy_counts, reference_counts, reward, beta):
    policy, reference = distribution(policy_counts), distribution(reference_counts)
    gap = value_gap(policy, reference, reward, beta).item()
    if ((policy > 0) & (reference == 0)).any():
        assert (
            gap == math.inf and objective_value(policy, reference, reward, beta).item() == -math.inf
        )
        return
    best = beta * exact_log_partition(reference, reward, beta)
    value = sum(
        mpmath.mpf(p) * r for p, r in zip(policy.tolist(), reward.tolist())
    ) - beta * exact_kl(policy, reference)
    assert objective_value(policy, reference, reward, beta).item() == pytest.approx(
        float(value), rel=1e-12, abs=1e-12
    )
    assert gap == pytest.approx(float(best - value), rel=1e-6, abs=1e-9 * max(1, beta))


@settings(deadline=None, max_examples=30)
@given(weights, rewards, st.floats(0.05, 20))
def test_the_optimal_policy_has_no_gap_and_gives_the_reward_back(counts, reward, beta):
    reference = distribution(counts)
    best = optimal_policy(reference, reward, beta)
    assert value_gap(best, reference, reward, beta).abs() < 1e-12
    some = best > 0
    recovered = implicit_reward(best, reference, beta) + beta * log_partition(
        reference, reward, beta
    )
    torch.testing.assert_close(
        recovered[some & (best > 1e-290)], reward[some & (best > 1e-290)], rtol=1e-9, atol=1e-9
    )
    assert (implicit_reward(best, reference, beta)[reference == 0] == 0).all()


def test_an_independent_optimizer_finds_the_same_optimum():
    reference, reward, beta = (
        distribution([4, 3, 2, 1]),
        torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64),
        0.7,
    )

    def loss(logits):
        policy = torch.softmax(torch.tensor(logits), 0)
        return -objective_value(policy, reference, reward, beta).item()

    found = torch.softmax(torch.tensor(minimize(loss, np.zeros(4), tol=1e-14).x), 0)
    torch.testing.assert_close(found, optimal_policy(reference, reward, beta), rtol=0, atol=1e-6)


def test_the_dpo_loss_at_the_optimum_is_bradley_terry_on_the_reward():
    reference, reward, beta = (
        distribution([4, 3, 2, 1]),
        torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64),
        0.2,
    )
    best = optimal_policy(reference, reward, beta)
    chosen, rejected = torch.tensor([2, 0, 3]), torch.tensor([1, 1, 0])
    losses = dpo_loss(best.log(), reference.log(), chosen, rejected, beta).losses
    torch.testing.assert_close(
        losses, bradley_terry_nll(reward, chosen, rejected), rtol=0, atol=1e-12
    )


def test_kl_allows_zeros_and_is_infinite_outside_the_support():
    p, q = distribution([1, 1, 0]), distribution([1, 2, 1])
    assert kl(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * 0, abs=1e-15)
    assert kl(q, p).item() == math.inf and kl(p, p).item() == 0


def test_gradients_are_finite_where_an_outcome_has_no_probability():
    logits = torch.tensor([0.2, -0.1, -math.inf], dtype=torch.float64, requires_grad=True)
    reference = distribution([1, 1, 0])
    objective_value(
        torch.softmax(logits, 0), reference, torch.tensor([1.0, 0, 2], dtype=torch.float64), 0.5
    ).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def test_rows_are_separate_and_float32_stays():
    reference = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    reward = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    both = optimal_policy(reference, reward, 0.5)
    assert both.dtype == torch.float32 and both.shape == (2, 2)
    for i in range(2):
        torch.testing.assert_close(both[i], optimal_policy(reference[i], reward[i], 0.5))


UNIFORM, REWARD = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: optimal_policy(torch.tensor([0.5, 0.6]), REWARD, 1.0),
            r"reference sums to 1\.1.*divide by their sum",
        ),
        (lambda: kl(torch.tensor([1.5, -0.5]), UNIFORM), "p is .* must not be negative"),
        (lambda: kl(UNIFORM, torch.ones(3) / 3), "p has 2 outcomes and q 3"),
        (
            lambda: optimal_policy(UNIFORM, torch.zeros(3), 1.0),
            "reward has 3 outcomes and the distribution 2",
        ),
        (lambda: optimal_policy(UNIFORM, torch.tensor([0.0, math.nan]), 1.0), "finite"),
        (lambda: optimal_policy(UNIFORM, REWARD, 0.0), "beta is 0.0; it must be a positive"),
        (lambda: value_gap(torch.tensor([0.5, 0.6]), UNIFORM, REWARD, 1.0), "policy sums to"),
        (
            lambda: implicit_reward(UNIFORM, torch.ones(3) / 3, 1.0),
            "policy has 2 outcomes and reference 3",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_list_is_no_distribution():
    with pytest.raises(TypeError, match="p must be a floating-point tensor of probabilities"):
        kl([0.5, 0.5], UNIFORM)
