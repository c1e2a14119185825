"""Every method on one landscape takes its exact step, and ends where the theory says."""

import itertools

import numpy as np
import pytest
import torch

from dpo_lab.losses import ppo_clip_loss
from dpo_lab.rlhf.ppo import gae
from dpo_lab.theory import landscape as landscapes
from dpo_lab.theory.bandit import all_pairs, exact_gradient, penalized_rewards, sample_pairs
from dpo_lab.theory.bradley_terry import fit_bradley_terry
from dpo_lab.theory.landscape import (
    METHODS,
    Landscape,
    fitted_rewards,
    label_weights,
    learning_rate,
    method_paths,
)
from dpo_lab.theory.objective import kl, objective_value, optimal_policy

REFERENCE = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
STARTS = torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.9, 0.05], [0.3, 0.1, 0.6]], dtype=torch.float64)
BETAS = (0.4, 0.8, 2.5)


def of(beta):
    return Landscape(REFERENCE, REWARD, beta)


def centered(logits):
    return logits - logits.mean(-1, keepdim=True)


def logits_of(logits):
    """Policies of a path as logits with mean 0."""
    return centered(logits.log())


@pytest.mark.parametrize("beta", BETAS)
def test_the_distance_is_the_missing_height_divided_by_beta(beta):
    drawn = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    landscape, policies = of(beta), torch.softmax(drawn, -1)
    best = objective_value(optimal_policy(REFERENCE, REWARD, beta), REFERENCE, REWARD, beta)
    for policy, height, distance in zip(
        policies, landscape.height(policies), landscape.distance(policies)
    ):
        assert height == objective_value(policy, REFERENCE, REWARD, beta)
        assert float(distance) == pytest.approx(float(best - height) / beta, abs=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("start", STARTS)
def test_the_exact_gradient_takes_its_step_and_ends_at_the_optimum(start, beta):
    landscape = of(beta)
    paths = method_paths("exact gradient", landscape, start, seeds=2, steps=60)
    assert paths.shape == (61, 2, 3) and torch.equal(paths[0], start.expand(2, 3))
    step = exact_gradient(start.log(), REFERENCE, REWARD, beta)
    expected = start.log() + learning_rate("exact gradient", landscape) * step
    torch.testing.assert_close(paths[1, 0], torch.softmax(expected, -1))
    assert landscape.distance(paths[-1]).max() < 1e-5
    heights = landscape.height(paths[:, 0])
    assert (heights.diff() > -1e-12).all()


def test_the_mean_step_of_reinforce_is_the_exact_gradient(monkeypatch):
    """Over all samples of 2, each as often as it is drawn; its own mean costs a factor 1 - 1/2."""
    landscape, start = of(0.8), STARTS[2]
    drawn = torch.tensor(list(itertools.product(range(3), repeat=2)))  # (9, 2)
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: drawn)
    paths = method_paths("REINFORCE", landscape, start, samples=2, steps=1, seeds=9)
    chances = start[drawn].prod(1)
    mean = chances @ (logits_of(paths[1]) - logits_of(paths[0]))
    exact = exact_gradient(start.log(), REFERENCE, REWARD, 0.8)
    torch.testing.assert_close(mean, learning_rate("REINFORCE", landscape) * exact / 2)


def test_the_advantages_of_ppo_are_those_of_one_token_with_the_mean_as_its_value(monkeypatch):
    """One step with the advantages of `rlhf.ppo` (not whitened), and its passes one by one."""
    landscape, start = of(0.8), STARTS[1]
    drawn = torch.tensor([[0, 0, 1, 2], [1, 1, 1, 0]])
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: drawn)
    paths = method_paths("PPO", landscape, start, samples=4, steps=1, seeds=2)
    rate = learning_rate("PPO", landscape)
    for actions, end in zip(drawn, paths[1]):
        logits = start.log()
        returns = penalized_rewards(logits, REFERENCE, REWARD, 0.8)[actions][:, None]
        values, mask = returns.mean().expand(4, 1), torch.ones(4, 1, dtype=torch.bool)
        advantages = gae(returns, values, mask, 1.0, 0.95)[0][:, 0]
        for _ in range(landscapes.EPOCHS):
            logits.requires_grad_()
            logps = torch.log_softmax(logits, -1)[actions]
            loss = ppo_clip_loss(logps, start.log()[actions], advantages, landscapes.CLIP).mean()
            logits = (logits - rate * torch.autograd.grad(loss, logits)[0]).detach()
        torch.testing.assert_close(end, torch.softmax(logits, -1))


def test_the_clip_of_ppo_acts(monkeypatch):
    clipped = method_paths("PPO", of(0.8), STARTS[0])
    monkeypatch.setattr(landscapes, "CLIP", 1e6)
    free = method_paths("PPO", of(0.8), STARTS[0])
    assert (clipped[1] - free[1]).abs().max() > 0.05


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("method", ["DPO", "reward model + PPO"])
def test_with_labels_without_end_dpo_and_rlhf_end_at_the_optimum(method, start, beta):
    landscape = of(beta)
    paths = method_paths(method, landscape, start, seeds=2, steps=120)
    assert landscape.distance(paths[-1]).max() < 1e-5


@pytest.mark.parametrize("beta", BETAS)
def test_with_labels_without_end_ipo_ends_where_its_own_least_squares_say(beta):
    """Elsewhere than the optimum: it fits half the advantage in win rate, not the reward."""
    chosen, rejected = (side.numpy() for side in all_pairs(3))
    weights = label_weights(of(beta), None, 1)[0].numpy()
    design = np.eye(3)[chosen] - np.eye(3)[rejected]
    root = np.sqrt(weights)
    log_ratios = np.linalg.lstsq(design * root[:, None], root / (2 * beta), rcond=None)[0]
    expected = torch.softmax(REFERENCE.log() + torch.from_numpy(log_ratios), -1)
    end = method_paths("IPO", of(beta), STARTS[1], seeds=1, steps=60)[-1, 0]
    torch.testing.assert_close(end, expected, rtol=0, atol=1e-9)
    assert of(beta).distance(end) > 0.01


@pytest.mark.parametrize("labels", [None, 700])
def test_the_weights_are_the_labels_of_each_seed_counted_one_by_one(labels):
    weights = label_weights(of(0.8), labels, 3)
    assert weights.shape == (3, 6)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    for seed in range(3 if labels else 0):
        pairs = sample_pairs(REFERENCE, REWARD, labels, torch.Generator().manual_seed(seed))
        drawn = list(zip(*(side.tolist() for side in pairs)))
        expected = [drawn.count(pair) / labels for pair in zip(*(s.tolist() for s in all_pairs(3)))]
        assert weights[seed].tolist() == expected
    assert labels is None or not torch.equal(weights[0], weights[1])


def test_the_reward_model_is_the_fit_of_maximum_likelihood():
    fitted = fitted_rewards(label_weights(of(0.8), 900, 4), 3)
    for seed, rewards in enumerate(fitted):
        pairs = sample_pairs(REFERENCE, REWARD, 900, torch.Generator().manual_seed(seed))
        best = fit_bradley_terry(*(side.numpy() for side in pairs), 3).rewards
        assert centered(rewards).numpy() == pytest.approx(best, abs=1e-4)
    true = fitted_rewards(label_weights(of(0.8), None, 1), 3)[0]
    assert centered(true).numpy() == pytest.approx(centered(REWARD).numpy(), abs=1e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_and_rlhf_end_at_one_policy_when_they_have_the_same_labels(beta):
    """At the optimum of the fitted rewards, which is not the optimum of the true ones."""
    landscape = of(beta)
    rewards = fitted_rewards(label_weights(landscape, 640, 5), 3)
    fitted = optimal_policy(REFERENCE.expand(5, 3), rewards, beta)
    for method in ("DPO", "reward model + PPO"):
        ends = method_paths(method, landscape, STARTS[0], labels=640, seeds=5, steps=120)[-1]
        assert kl(ends, fitted).max() < 1e-5
    assert landscape.distance(fitted).min() > 1e-5


def test_with_a_true_reward_the_noise_goes_as_the_optimum_comes_near():
    """There every completion has the same penalized reward, so every sample says: stay."""
    for method in ("REINFORCE", "PPO"):
        paths = method_paths(method, of(0.8), STARTS[0], samples=16, steps=60)
        assert not torch.equal(paths[1, 0], paths[1, 1])
        assert of(0.8).distance(paths[-1]).max() < 1e-8


def test_sixteen_times_the_labels_cut_the_distance_by_sixteen():
    few, many = (
        of(0.8).distance(
            method_paths("DPO", of(0.8), STARTS[0], labels=labels, steps=80, seeds=40)[-1]
        )
        for labels in (1_000, 16_000)
    )
    assert 10 < few.mean() / many.mean() < 25


@pytest.mark.parametrize("method", ["DPO", "IPO", "exact gradient"])
def test_several_seeds_at_once_are_each_seed_alone(method):
    several = method_paths(method, of(0.8), STARTS[1], labels=300, steps=5, seeds=3)
    alone = method_paths(method, of(0.8), STARTS[1], labels=300, steps=5, seeds=1)
    torch.testing.assert_close(several[:, :1], alone)


@pytest.mark.parametrize("method", METHODS)
def test_float32_stays_float32_and_one_call_gives_one_path(method):
    landscape = Landscape(REFERENCE.float(), REWARD.float(), 0.8)
    paths = method_paths(method, landscape, STARTS[1].float(), labels=100, steps=3, seeds=2)
    again = method_paths(method, landscape, STARTS[1].float(), labels=100, steps=3, seeds=2)
    assert paths.dtype == torch.float32 and paths.shape == (4, 2, 3) and torch.equal(paths, again)
    assert torch.isfinite(paths).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("method", METHODS)
def test_rewards_of_any_size_and_starts_anywhere_give_finite_policies(method, scale):
    for beta, start in itertools.product((0.2, 5.0), ([0.98, 0.01, 0.01], [0.004, 0.006, 0.99])):
        landscape = Landscape(REFERENCE, scale * REWARD, beta)
        paths = method_paths(
            method, landscape, torch.tensor(start).double(), labels=40, samples=2, steps=10, seeds=2
        )
        assert torch.isfinite(landscape.height(paths)).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "SARSA"}, "method is 'SARSA'; it must be one of exact gradient"),
        ({"start": torch.tensor([1.0, 0.0, 0.0])}, "start is .*must be positive"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"labels": 0}, "labels is 0; it must be at least 1"),
        ({"samples": -1}, "samples is -1; it must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused(change, message):
    given = {"method": "DPO", "landscape": of(0.8), "start": STARTS[0], **change}
    with pytest.raises(ValueError, match=message):
        method_paths(**given)


def test_a_reference_that_excludes_a_completion_is_refused():
    bad = Landscape(torch.tensor([0.5, 0.5, 0.0]).double(), REWARD, 0.8)
    with pytest.raises(ValueError, match="landscape.reference is .*must be positive"):
        method_paths("DPO", bad, STARTS[0])
