"""GAE, whitening, KL control and token rewards against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lab.rlhf.advantages import adapted_kl_coefficient, gae, token_rewards, whiten

numbers = st.floats(-5, 5)


@st.composite
def rows(draw):
    """Rewards and values of rows of 1 to 6 tokens, as lists and as tensors with junk as padding."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    rewards, values = (
        [draw(st.lists(numbers, min_size=n, max_size=n)) for n in lengths] for _ in range(2)
    )
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = [torch.full(mask.shape, 77.0, dtype=torch.float64) for _ in range(2)]
    for tensor, lists in zip(padded, (rewards, values)):
        for row, numbers_of_row in zip(tensor, lists):
            row[: len(numbers_of_row)] = torch.tensor(numbers_of_row, dtype=torch.float64)
    return rewards, values, *padded, mask


def equal_inside(found, mask, expected):
    """The rows of `found` hold `expected`, and zeros behind."""
    for row, some, numbers_of_row in zip(found, mask, expected):
        torch.testing.assert_close(
            row[some], torch.tensor(numbers_of_row, dtype=torch.float64), rtol=0, atol=1e-9
        )
        assert not row[~some].any()


@given(rows(), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_gae_is_the_discounted_sum_of_later_surprises(data, gamma, lam):
    rewards, values, padded_rewards, padded_values, mask = data
    expected = []
    for r, v in zip(rewards, values):
        surprises = [
            r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))
        ]
        expected.append(
            [
                math.fsum((gamma * lam) ** (k - t) * surprises[k] for k in range(t, len(r)))
                for t in range(len(r))
            ]
        )
    advantages, returns = gae(padded_rewards, padded_values, mask, gamma, lam)
    equal_inside(advantages, mask, expected)
    equal_inside(
        returns, mask, [[a + x for a, x in zip(row, v)] for row, v in zip(expected, values)]
    )


@given(rows())
@settings(deadline=None)
def test_with_gamma_and_lambda_one_an_advantage_is_the_return_less_the_value(data):
    rewards, values, padded_rewards, padded_values, mask = data
    advantages, _ = gae(padded_rewards, padded_values, mask, 1.0, 1.0)
    equal_inside(
        advantages,
        mask,
        [[math.fsum(r[t:]) - v[t] for t in range(len(r))] for r, v in zip(rewards, values)],
    )


@given(rows(), st.booleans())
@settings(deadline=None)
def test_whitening_sees_only_what_is_inside_the_mask(data, keep_mean):
    rewards, _, padded, _, mask = data
    flat = [x for row in rewards for x in row]
    mean = math.fsum(flat) / len(flat)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)
    expected = [
        [(x - mean) / deviation + (mean if keep_mean else 0.0) for x in row] for row in rewards
    ]
    equal_inside(whiten(padded, mask, keep_mean=keep_mean), mask, expected)


@given(st.floats(1e-3, 10), st.floats(-5, 50), st.floats(0.1, 20), st.floats(0, 1))
def test_the_coefficient_moves_towards_the_target_by_a_fifth_of_the_gain_at_most(
    coefficient, kl, target, gain
):
    error = kl / target - 1
    error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
    found = adapted_kl_coefficient(coefficient, kl, target, gain)
    assert found == pytest.approx(coefficient + coefficient * gain * error)
    assert found > 0


@given(rows())
@settings(deadline=None)
def test_the_score_goes_to_the_last_token_beside_every_token_s_penalty(data):
    penalties, scores, padded, _, mask = data
    scores = [row[0] for row in scores]
    expected = [[*row[:-1], row[-1] + score] for row, score in zip(penalties, scores)]
    equal_inside(
        token_rewards(torch.tensor(scores, dtype=torch.float64), padded, mask), mask, expected
    )
