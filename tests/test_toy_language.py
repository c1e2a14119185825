"""On a language of two tokens the policy gradient and its variance are exact, by plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lab.rlhf.advantages import gae, token_rewards
from dpo_lab.theory import toy_language as toy
from dpo_lab.theory.objective import objective_value


@st.composite
def languages(draw):
    """Logits of a policy and of a reference, (n + 1, n) each, and a reward per completion."""
    n = draw(st.integers(2, 4))
    numbers = st.lists(st.floats(-2, 2), min_size=(n + 1) * n, max_size=(n + 1) * n)
    tables = [torch.tensor(draw(numbers), dtype=torch.float64).reshape(n + 1, n) for _ in range(2)]
    rewards = draw(st.lists(st.floats(-3, 3), min_size=n * n, max_size=n * n))
    return *tables, torch.tensor(rewards, dtype=torch.float64)


def softmax(row):
    weights = [math.exp(x) for x in row]
    return [weight / sum(weights) for weight in weights]


def by_loop(logits):
    """For each completion its two tokens and their probabilities."""
    table = [softmax(row) for row in logits.tolist()]
    n = len(table[0])
    return [((i, j), (table[0][i], table[1 + i][j])) for i in range(n) for j in range(n)]


def close(found, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@given(languages())
@settings(deadline=None, max_examples=30)
def test_log_probs_are_those_of_a_double_loop(language):
    logits, _, _ = language
    expected = by_loop(logits)
    assert toy.every_completion(logits.shape[1]).tolist() == [list(ids) for ids, _ in expected]
    close(toy.token_logps(logits), [[math.log(p) for p in both] for _, both in expected])
    close(toy.token_logps(logits).sum(1).exp().sum(), 1.0)


@given(languages())
@settings(deadline=None, max_examples=20)
def test_a_score_is_one_hot_minus_probabilities_in_the_token_s_row(language):
    logits, _, _ = language
    n, table = logits.shape[1], torch.softmax(logits, -1)
    expected = torch.zeros(n * n, 2, n + 1, n, dtype=torch.float64)
    for k, ((i, j), _) in enumerate(by_loop(logits)):
        for place, row, token in ((0, 0, i), (1, 1 + i, j)):
            expected[k, place, row] = -table[row]
            expected[k, place, row, token] += 1
    close(toy.token_scores(logits), expected.flatten(2))


@given(languages())
@settings(deadline=None, max_examples=20)
def test_values_are_means_over_what_may_follow(language):
    logits, _, rewards = language
    n = logits.shape[1]
    rewards = torch.stack([rewards, rewards.flip(0)], 1)
    second = [
        sum(p * float(r[1]) for ((i, _), (_, p)), r in zip(by_loop(logits), rewards) if i == a)
        for a in range(n)
    ]
    first = sum(p * q * float(r.sum()) for (_, (p, q)), r in zip(by_loop(logits), rewards))
    expected = [[first, second[i]] for (i, _), _ in by_loop(logits)]
    close(toy.prefix_values(logits, rewards), expected)


@given(languages(), st.floats(0.05, 2))
@settings(deadline=None, max_examples=20)
def test_every_unbiased_credit_has_the_exact_gradient_as_its_mean(language, beta):
    """The trajectory gradient, a baseline, the value, and the surprise under exact values."""
    logits, reference, reward = language
    logps, reference_logps = toy.token_logps(logits), toy.token_logps(reference)
    policy, mask = logps.sum(1).exp(), torch.ones_like(logps, dtype=torch.bool)
    moving = logits.clone().requires_grad_()
    distributions = toy.token_logps(moving).sum(1).exp(), reference_logps.sum(1).exp()
    value = objective_value(*distributions, reward, beta)
    (exact,) = torch.autograd.grad(value, moving)

    rewards = token_rewards(reward, -beta * (logps - reference_logps), mask)
    values = toy.prefix_values(logits, rewards)
    credits = [
        rewards.sum(1, keepdim=True).expand_as(rewards),
        rewards.sum(1, keepdim=True) - torch.full_like(rewards, 1.7),
        *(gae(rewards, values, mask, 1.0, lam)[0] for lam in (0.0, 0.4, 1.0)),
    ]
    for credit in credits:
        estimates = (credit[:, :, None] * toy.token_scores(logits)).sum(1)
        close(toy.gradient_moments(policy, estimates)[0], exact.flatten())


def test_the_variance_is_that_of_a_plain_loop():
    chances, estimates = [0.2, 0.5, 0.3], [[1.0, 2.0], [-1.0, 0.0], [3.0, 5.0]]
    mean, variance = toy.gradient_moments(torch.tensor(chances), torch.tensor(estimates))
    expected = [sum(p * row[d] for p, row in zip(chances, estimates)) for d in (0, 1)]
    spread = sum(
        p * (row[d] - expected[d]) ** 2 for p, row in zip(chances, estimates) for d in (0, 1)
    )
    assert mean.tolist() == pytest.approx(expected) and variance == pytest.approx(spread)


@pytest.mark.parametrize("shape", [(3,), (3, 3), (2, 3)])
def test_another_table_of_logits_is_refused(shape):
    with pytest.raises(ValueError, match=r"logits has shape .*; it must be \(n \+ 1, n\)"):
        toy.token_logps(torch.zeros(shape))
