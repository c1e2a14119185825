"""Rounds of DPO on a bandit: each against another way to compute it, and where they end."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lab.losses import dpo_loss
from dpo_lab.theory.bandit import all_pairs, gradient_descent, minimize
from dpo_lab.theory.objective import kl, optimal_policy, value_gap
from dpo_lab.theory.on_policy import exact_rounds, on_policy_runs, self_play_rounds, tuned_runs

REFERENCE = torch.tensor([0.5, 0.3, 0.19, 0.01], dtype=torch.float64)
REWARD = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
OPTIONS = {"labels": 24, "rounds": 3, "seeds": 2, "steps": 20}
FOUR = list(itertools.product((False, True), ("all", "newest")))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("moved, pairs", FOUR)
def test_a_round_is_gradient_descent_on_the_dpo_loss_of_its_labels(moved, pairs):
    """By autograd, on a list of pairs, for which reference and labels are written out here.

    In log-probs the gradient is beta times that in the implicit rewards, and the rewards are beta
    times the log-probs, so the rate is divided by the square of beta.
    """
    beta, rate = 0.7, 0.9
    found = on_policy_runs(
        *(REFERENCE, REWARD, beta),
        **OPTIONS,
        generator=generator(),
        moved=moved,
        pairs=pairs,
        learning_rate=rate,
    )
    assert found.policies.shape == (4, 2, 4) and found.labels.shape == (3, 2, 4, 4)
    close(found.policies[0], REFERENCE.repeat(2, 1))
    for t, seed in itertools.product(range(3), range(2)):
        rounds = range(t + 1) if pairs == "all" else [t]
        listed = [
            (i, j)
            for k in rounds
            for i, j in itertools.product(range(4), repeat=2)
            for _ in range(int(found.labels[k, seed, i, j]))
        ]
        assert len(listed) == 8 * len(rounds)
        chosen, rejected = torch.tensor(listed).T
        start = found.policies[t, seed]
        base = start if moved else REFERENCE

        def loss(logps, base=base, chosen=chosen, rejected=rejected):
            return dpo_loss(logps, base.log(), chosen, rejected, beta).losses.mean()

        path = gradient_descent(loss, start, steps=20, learning_rate=rate / beta**2)
        close(found.policies[t + 1, seed], path[-1], 1e-10)


def test_labels_come_from_the_current_policy_and_from_bradley_terry():
    """Each round's 200,000 labels have the frequencies that its first policy would give them."""
    options = OPTIONS | {"labels": 400_000, "rounds": 2, "seeds": 1}
    found = on_policy_runs(REFERENCE, REWARD, 1.0, generator=generator(), **options)
    for policy, labels in zip(found.policies[:, 0], found.labels[:, 0]):
        gaps = REWARD[:, None] - REWARD
        expected = policy[:, None] * policy * torch.sigmoid(gaps)
        expected.fill_diagonal_(0)
        expected /= expected.sum()
        error = (expected * (1 - expected) / 200_000).sqrt()
        assert ((labels / 200_000 - expected).abs() <= 4.5 * error).all()
    assert not torch.allclose(found.policies[1], found.policies[0], atol=0.05)


def test_the_reward_as_a_judge_makes_no_error_and_tosses_a_coin_between_equals():
    reward = torch.tensor([0.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    options = OPTIONS | {"labels": 3_000, "rounds": 1}
    found = on_policy_runs(REFERENCE, reward, 1.0, generator=generator(), label="reward", **options)
    counts = found.labels[0].sum(0)
    worse = reward[:, None] < reward
    assert counts[worse].sum() == 0 and counts[~worse].sum() == 6_000
    either = counts[1, 2] + counts[2, 1]
    assert (counts[1, 2] - either / 2).abs() < 2.5 * either.sqrt() and either > 100


def test_one_round_does_not_know_which_pairs_or_reference_others_take():
    runs = [
        on_policy_runs(
            *(REFERENCE, REWARD, 0.5),
            **OPTIONS | {"rounds": 1},
            generator=generator(3),
            moved=moved,
            pairs=pairs,
        )
        for moved, pairs in FOUR
    ]
    for found in runs[1:]:
        close(found.policies, runs[0].policies)
        close(found.labels, runs[0].labels)


def test_each_run_may_have_a_rate_of_its_own_and_the_best_is_shown_on_other_runs():
    rates = torch.tensor([0.01, 3.0], dtype=torch.float64)
    found = on_policy_runs(
        *(REFERENCE, REWARD, 0.5),
        **OPTIONS | {"seeds": 8},
        generator=generator(),
        learning_rate=rates.repeat_interleave(4),
    )
    gaps = value_gap(found.policies[-1], REFERENCE, REWARD, 0.5).view(2, 2, 2)
    assert gaps[1, 0].mean() < gaps[0, 0].mean()
    options = OPTIONS | {"seeds": 2, "generator": generator()}
    tuned = tuned_runs(REFERENCE, REWARD, 0.5, learning_rates=rates, **options)
    assert tuned.learning_rate == 3
    close(tuned.gaps, gaps[1, 1])
    close(tuned.policies, found.policies[:, 6:])
    close(tuned.labels, found.labels[:, 6:])


def test_rounds_with_a_moved_reference_are_tuned_at_rounds_times_beta():
    options = OPTIONS | {"learning_rates": [2.0], "generator": generator(), "moved": True}
    tuned = tuned_runs(REFERENCE, REWARD, 0.5, **options)
    alone = {"seeds": 4, "learning_rate": 2.0, "generator": generator(), "moved": True}
    found = on_policy_runs(REFERENCE, REWARD, 1.5, **OPTIONS | alone)
    close(tuned.policies, found.policies[:, 2:])
    close(tuned.gaps, value_gap(found.policies[-1, 2:], REFERENCE, REWARD, 0.5))


def test_many_labels_lead_every_kind_of_round_to_the_same_optimum():
    beta, best = 1.0, optimal_policy(REFERENCE, REWARD, 1.0)
    options = {"labels": 200_000, "rounds": 2, "seeds": 2, "steps": 1_500, "learning_rate": 4.0}
    for moved, pairs in FOUR:
        found = on_policy_runs(
            *(REFERENCE, REWARD, 2 * beta if moved else beta),
            generator=generator(),
            moved=moved,
            pairs=pairs,
            **options,
        )
        assert (kl(found.policies[-1], best.repeat(2, 1)) < 2e-3).all(), (moved, pairs)


@pytest.mark.parametrize("beta", [0.4, 1.0, 3.0])
def test_exact_rounds_end_at_the_optimum_of_beta_or_of_beta_over_the_rounds(beta):
    fixed = exact_rounds(REFERENCE, REWARD, beta, rounds=2)
    close(fixed[1:], optimal_policy(REFERENCE, REWARD, beta).repeat(2, 1), 1e-6)
    moved = exact_rounds(REFERENCE, REWARD, beta, rounds=3, moved=True)
    for r in (1, 2, 3):
        tilted = REFERENCE.log() + r * REWARD / beta
        close(moved[r], torch.softmax(tilted, 0), 1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 5))
def test_a_round_of_self_play_minimizes_dpos_loss_of_data_against_the_policy(seed, beta):
    policy, data = torch.softmax(
        torch.randn(2, 4, dtype=torch.float64, generator=generator(seed)), -1
    )
    chosen, rejected = all_pairs(4)
    weights = data[chosen] * policy[rejected]

    def loss(logps):
        return weights @ dpo_loss(logps, policy.log(), chosen, rejected, beta).losses

    path = self_play_rounds(policy, data, beta, rounds=1)
    close(path[0], policy)
    close(path[1], minimize(loss, policy), 1e-5)


def test_self_play_stops_at_the_data_and_only_there():
    data = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    close(self_play_rounds(REFERENCE, data, 1.0, rounds=1)[-1], data)
    close(self_play_rounds(data, data, 0.1, rounds=5)[-1], data)

    # log(pi / data) is multiplied by 1 - 1 / beta, up to a constant
    for beta, factor in ((4.0, 0.75), (0.8, -0.25), (0.4, -1.5)):
        path = self_play_rounds(REFERENCE, data, beta, rounds=3)
        away = (path / data).log()
        away -= away.mean(-1, keepdim=True)
        for r in range(4):
            close(away[r], factor**r * away[0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": 25}, "labels is 25 with 3 rounds; it must be a multiple of the rounds, such"),
        ({"labels": 2}, "such as 3"),
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"rounds": 0}, "rounds is 0"),
        ({"label": "coin"}, "label is 'coin'"),
        ({"pairs": "old"}, "pairs is 'old'"),
        ({"learning_rate": torch.ones(3)}, "learning_rate has 3 values for 2 seeds"),
    ],
)
def test_a_wrong_argument_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        on_policy_runs(REFERENCE, REWARD, 1.0, generator=generator(), **OPTIONS | changes)
    with pytest.raises(ValueError, match="beta is 0"):
        exact_rounds(REFERENCE, REWARD, 0, rounds=1)
    with pytest.raises(ValueError, match="beta is -1"):
        self_play_rounds(REFERENCE, REFERENCE, -1, rounds=1)
