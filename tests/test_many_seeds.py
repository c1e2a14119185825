"""Many runs at once are the same runs as one at a time."""

import pytest
import torch

from dpo_lab.losses import dpo_loss
from dpo_lab.theory.bandit import gradient_descent, policy_gradient, sample_pairs
from dpo_lab.theory.many_seeds import at_best_rate, dpo_runs, policy_gradient_runs

REFERENCE = torch.tensor([0.35, 0.4, 0.2, 0.05], dtype=torch.float64)
REWARD = torch.tensor([-1.0, 0.0, 1.0, 1.5], dtype=torch.float64)
OPTIONS = {"steps": 6, "samples": 32, "learning_rate": 2.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("passes, clip", [(1, None), (4, 0.2)], ids=["REINFORCE", "PPO"])
def test_one_run_is_the_policy_gradient_of_the_bandit(passes, clip):
    """At a rate at which the clip acts."""
    found = policy_gradient_runs(
        REFERENCE, REWARD, 0.5, seeds=1, passes=passes, clip=clip, generator=generator(), **OPTIONS
    )
    alone = policy_gradient(
        REFERENCE, REWARD, 0.5, epochs=passes, clip=clip, generator=generator(), **OPTIONS
    )
    close(found[:, 0], alone)


def test_passes_without_a_clip_weight_by_the_ratio():
    """Against a loop over samples, whose gradient is A w grad log pi."""
    found = policy_gradient_runs(
        REFERENCE, REWARD, 0.5, seeds=2, passes=3, generator=generator(), **OPTIONS | {"steps": 1}
    )
    drawn = torch.multinomial(REFERENCE.repeat(2, 1), 32, replacement=True, generator=generator())
    for run, actions in zip(found[1], drawn):
        advantages = REWARD[actions] - REWARD[actions].mean()
        logits = REFERENCE.log()
        for _ in range(3):
            policy, gradient = torch.softmax(logits, 0), torch.zeros_like(logits)
            for action, advantage in zip(actions, advantages):
                score = -policy.clone()
                score[action] += 1
                gradient += advantage * policy[action] / REFERENCE[action] * score / 32
            logits = logits + 2.0 * gradient
        close(run, torch.softmax(logits, 0))


def test_each_run_may_have_a_reward_of_its_own():
    rewards = torch.stack([REWARD, 0 * REWARD])
    path = policy_gradient_runs(
        REFERENCE, rewards, 0.5, seeds=2, generator=generator(), **OPTIONS | {"steps": 40}
    )
    assert path.shape == (41, 2, 4) and path[-1, 0] @ REWARD > 0.9
    close(path[0], REFERENCE.repeat(2, 1))
    close(path[:, 1], REFERENCE.expand(41, 4))  # without rewards the reference is the optimum


def test_a_row_of_pairs_is_gradient_descent_on_their_loss():
    pairs = [sample_pairs(REFERENCE, REWARD, 50, generator(seed)) for seed in range(3)]
    chosen, rejected = (torch.stack(side) for side in zip(*pairs))
    found = dpo_runs(REFERENCE, chosen, rejected, 0.5, learning_rate=4.0, steps=20)
    for run, pair in zip(found, pairs):

        def loss(logps, pair=pair):
            return dpo_loss(logps, REFERENCE.log(), *pair, 0.5).losses.mean()

        path = gradient_descent(loss, REFERENCE, steps=20, learning_rate=4.0)
        close(run, path[-1], atol=1e-10)


def test_the_best_rate_is_chosen_on_other_runs_than_are_shown():
    """Two rates, two budgets; the halves disagree, and the first half decides."""
    gaps = torch.tensor(
        [[[1.0, 1.0, 9.0, 9.0], [5.0, 5.0, 1.0, 1.0]], [[2.0, 2.0, 0.0, 0.0], [3.0, 3.0, 7.0, 8.0]]]
    )
    best, shown = at_best_rate(gaps)
    assert best.tolist() == [0, 1] and shown.tolist() == [[9.0, 9.0], [7.0, 8.0]]
