"""On a bandit DPO has an exact answer, and finds it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lab.losses import dpo_loss, ppo_clip_loss
from dpo_lab.theory.bandit import (
    all_pairs,
    exact_gradient,
    gradient_descent,
    minimize,
    pair_weights,
    penalized_rewards,
    policy_gradient,
    reinforce_gradients,
    sample_pairs,
)
from dpo_lab.theory.objective import kl, optimal_policy

REFERENCE = torch.tensor([0.35, 0.4, 0.2, 0.05], dtype=torch.float64)
REWARD = torch.tensor([-1.0, 0.0, 1.0, 1.5], dtype=torch.float64)


def population_loss(reference, reward, beta, **options):
    chosen, rejected = all_pairs(len(reference))
    weights = pair_weights(reference, reward)
    return lambda logps: (
        weights @ dpo_loss(logps, reference.log(), chosen, rejected, beta, **options).losses
    )


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.floats(0.05, 1), min_size=3, max_size=5),
    st.lists(st.floats(-2, 2), min_size=5, max_size=5),
    st.floats(0.2, 3),
)
def test_with_labels_without_end_dpo_ends_at_the_optimal_policy(weights, rewards, beta):
    reference = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    reward = torch.tensor(rewards[: len(weights)], dtype=torch.float64)
    found = minimize(population_loss(reference, reward, beta), reference)
    assert kl(found, optimal_policy(reference, reward, beta)) < 1e-8


def test_pairs_and_their_shares_are_those_of_a_double_loop():
    chosen, rejected = all_pairs(4)
    assert list(zip(chosen.tolist(), rejected.tolist())) == [
        (i, j) for i in range(4) for j in range(4) if i != j
    ]
    by_loop = [
        REFERENCE[i] * REFERENCE[j] / (1 + torch.exp(REWARD[j] - REWARD[i]))
        for i in range(4)
        for j in range(4)
        if i != j
    ]
    expected = torch.stack(by_loop) / sum(by_loop)
    torch.testing.assert_close(pair_weights(REFERENCE, REWARD), expected, rtol=0, atol=1e-15)


def test_sampled_pairs_come_as_often_as_their_shares_say():
    chosen, rejected = sample_pairs(REFERENCE, REWARD, 100_000, torch.Generator().manual_seed(0))
    counts = (
        torch.zeros(4, 4).index_put((chosen, rejected), torch.ones(100_000), accumulate=True)
        / 100_000
    )
    expected = torch.zeros(4, 4, dtype=torch.float64).index_put(
        all_pairs(4), pair_weights(REFERENCE, REWARD)
    )
    assert (counts - expected).abs().max() < 0.006 and (chosen != rejected).all()


def test_descent_takes_the_gradient_step_and_starts_at_the_reference():
    path = gradient_descent(
        population_loss(REFERENCE, REWARD, 0.5), REFERENCE, steps=2, learning_rate=0.1
    )
    assert path.shape == (3, 4) and torch.equal(path[0], REFERENCE)
    logits, eps, slope = REFERENCE.log(), 1e-6, torch.zeros(4, dtype=torch.float64)
    loss = population_loss(REFERENCE, REWARD, 0.5)
    for i in range(4):
        up, down = logits.clone(), logits.clone()
        up[i] += eps
        down[i] -= eps
        slope[i] = (loss(torch.log_softmax(up, 0)) - loss(torch.log_softmax(down, 0))) / (2 * eps)
    torch.testing.assert_close(path[1], torch.softmax(logits - 0.1 * slope, 0), rtol=0, atol=1e-10)


def by_hand(beta, steps, rate, optimizer):
    """Where a loop in plain arithmetic ends: gradient descent, or Adam of Kingma and Ba 2015."""
    logits = REFERENCE.log().clone()
    mean, square = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    chosen, rejected = all_pairs(4)
    pairs = list(zip(chosen, rejected, pair_weights(REFERENCE, REWARD)))
    for t in range(1, steps + 1):
        # d margin / d logits is beta (e_chosen - e_rejected), since the normalizer cancels
        log_ratios, gradient = logits - REFERENCE.log(), torch.zeros(4, dtype=torch.float64)
        for i, j, weight in pairs:
            slope = -weight * beta * torch.sigmoid(-beta * (log_ratios[i] - log_ratios[j]))
            gradient[i] += slope
            gradient[j] -= slope
        if optimizer is torch.optim.SGD:
            logits = logits - rate * gradient
        else:
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            size = (square / (1 - 0.999**t)).sqrt() + 1e-8
            logits = logits - rate * mean / (1 - 0.9**t) / size
    return torch.softmax(logits, 0)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("beta", [0.05, 2.0])
def test_descent_is_that_of_the_optimizer_by_hand(optimizer, beta):
    path = gradient_descent(
        population_loss(REFERENCE, REWARD, beta),
        REFERENCE,
        steps=7,
        learning_rate=0.1,
        optimizer=optimizer,
    )
    torch.testing.assert_close(path[-1], by_hand(beta, 7, 0.1, optimizer), rtol=0, atol=1e-12)


def test_a_small_beta_moves_less_by_gradient_descent_and_not_by_adam():
    """The gradient at the reference is proportional to beta, the KL to the square of the step."""

    def moved(beta, optimizer, rate):
        path = gradient_descent(
            population_loss(REFERENCE, REWARD, beta),
            REFERENCE,
            steps=5,
            learning_rate=rate,
            optimizer=optimizer,
        )
        return kl(path[-1], REFERENCE).item()

    assert moved(2e-3, torch.optim.SGD, 0.3) == pytest.approx(
        4 * moved(1e-3, torch.optim.SGD, 0.3), rel=0.01
    )
    assert moved(2e-3, torch.optim.Adam, 0.1) == pytest.approx(
        moved(1e-3, torch.optim.Adam, 0.1), rel=0.01
    )
    assert moved(2.0, torch.optim.Adam, 0.1) < 0.8 * moved(1e-3, torch.optim.Adam, 0.1)


def test_descent_reaches_the_optimum_too():
    path = gradient_descent(
        population_loss(REFERENCE, REWARD, 1.0), REFERENCE, steps=3_000, learning_rate=3.0
    )
    gaps = kl(path, optimal_policy(REFERENCE, REWARD, 1.0).expand_as(path))
    assert gaps[-1] < 1e-8 and gaps[0] > 0.1


@pytest.mark.parametrize("kind", ["ipo", "hinge", "robust"])
def test_other_losses_end_elsewhere(kind):
    found = minimize(
        population_loss(REFERENCE, REWARD, 1.0, loss_type=kind), REFERENCE, iterations=100
    )
    assert torch.isfinite(found).all()
    # without smoothing, robust is sigmoid
    assert (kl(found, optimal_policy(REFERENCE, REWARD, 1.0)) < 1e-8) == (kind == "robust")


LOGITS = torch.tensor([0.3, -0.2, 0.1, -1.0], dtype=torch.float64)


@pytest.mark.parametrize("baseline", ["none", "mean return", "a constant"])
def test_the_policy_gradient_s_mean_is_the_exact_gradient(baseline):
    """Within 3 standard errors in every direction, whatever the baseline."""
    actions = torch.multinomial(
        torch.softmax(LOGITS, 0),
        200_000,
        replacement=True,
        generator=torch.Generator().manual_seed(0),
    )
    returns = penalized_rewards(LOGITS, REFERENCE, REWARD, 0.5)[actions]
    b = {"none": 0.0, "mean return": returns.mean(), "a constant": 3.0}[baseline]
    estimates = reinforce_gradients(LOGITS, actions, returns, b)
    error = estimates.std(0) / len(actions) ** 0.5
    assert (
        (estimates.mean(0) - exact_gradient(LOGITS, REFERENCE, REWARD, 0.5)).abs() < 3 * error
    ).all()


def test_a_baseline_takes_from_the_variance():
    actions = torch.multinomial(
        torch.softmax(LOGITS, 0),
        20_000,
        replacement=True,
        generator=torch.Generator().manual_seed(0),
    )
    returns = penalized_rewards(LOGITS, REFERENCE, REWARD + 5, 0.5)[actions]
    spread = [
        reinforce_gradients(LOGITS, actions, returns, b).var(0).sum() for b in (0.0, returns.mean())
    ]
    assert spread[1] < spread[0] / 10


def test_ppo_s_first_gradient_is_that_of_reinforce():
    actions = torch.tensor([0, 1, 1, 3, 2])
    advantages = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0], dtype=torch.float64)
    logits = LOGITS.clone().requires_grad_()
    logps = torch.log_softmax(logits, 0)[actions]
    (gradient,) = torch.autograd.grad(
        -ppo_clip_loss(logps, logps.detach(), advantages).mean(), logits
    )
    torch.testing.assert_close(
        gradient, reinforce_gradients(LOGITS, actions, advantages).mean(0), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"baseline": False}, {"clip": 0.2, "epochs": 4}],
    ids=["baseline", "plain", "ppo"],
)
def test_policy_gradients_come_near_the_optimal_policy(options):
    best = optimal_policy(REFERENCE, REWARD, 0.5)
    generator = torch.Generator().manual_seed(0)
    path = policy_gradient(
        REFERENCE,
        REWARD,
        0.5,
        steps=400,
        samples=256,
        learning_rate=0.2,
        generator=generator,
        **options,
    )
    assert path.shape == (401, 4) and torch.equal(path[0], REFERENCE)
    torch.testing.assert_close(path.sum(1), torch.ones(401, dtype=torch.float64))
    assert kl(path[-1], best) < 0.01 < kl(REFERENCE, best) / 50
