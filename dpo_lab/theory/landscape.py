"""Every method on one landscape: the paths of the exact gradient, REINFORCE, PPO, DPO and IPO.

One prompt has n completions. The height above a policy is the objective of Eq. 3 of Rafailov et
al. 2023. All methods take plain gradient steps on a table of logits, from one start; none has a
loss of its own here: the losses are those of `dpo_lab.losses`, which train the language model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_lab.engine.arguments import integer
from dpo_lab.losses import bradley_terry_nll, check_beta, dpo_loss
from dpo_lab.theory.bandit import (
    Loss,
    all_pairs,
    gradient_descent,
    pair_weights,
    policy_gradient,
    sample_pairs,
)
from dpo_lab.theory.objective import kl, objective_value, optimal_policy

METHODS = ("exact gradient", "REINFORCE", "PPO", "reward model + PPO", "DPO", "IPO")

# what a method asks for: the reward of completions that it draws, or labels of pairs
SAMPLERS, LABELED = METHODS[1:3], METHODS[3:]

# PPO: passes over the samples of a step, and how far a probability may move in them
EPOCHS, CLIP = 4, 0.2

# samples per step of PPO on a reward model, whose rewards cost no labels
MODEL_SAMPLES = 64

# the reward model's descent; below 4 it cannot diverge, since the loss's curvature is at most 1/2
FIT_STEPS, FIT_RATE = 100, 3.0


@dataclass(frozen=True)
class Landscape:
    """One prompt with n completions, and the price of a nat."""

    reference: Tensor
    """(n,) probabilities, none of them zero"""
    reward: Tensor
    """(n,) rewards"""
    beta: float
    """what a nat of KL to the reference costs, in units of the reward"""

    @property
    def optimum(self) -> Tensor:
        """(n,), the policy of the largest height (Eq. 4)."""
        return optimal_policy(self.reference, self.reward, self.beta)

    def height(self, policy: Tensor) -> Tensor:
        """J of policies (..., n), (...) in units of the reward (Eq. 3)."""
        reference = self.reference.expand_as(policy)
        return objective_value(policy, reference, self.reward, self.beta)

    def distance(self, policy: Tensor) -> Tensor:
        """KL(pi || pi*) of policies (..., n), (...) nats: the height they lack, divided by beta."""
        return kl(policy, self.optimum.expand_as(policy)).clamp(min=0.0)


def learning_rate(method: str, landscape: Landscape) -> float:
    """The step size of a method, with which it settles at every beta.

    The curvature of J is proportional to beta, that of DPO's loss to beta squared, and that of
    IPO's does not depend on it. DPO's is at most beta^2 / 2 and IPO's at most 4, so that these two
    cannot diverge. For a small beta the slope of the reward counts in place of the curvature.
    """
    spread = float(landscape.reward.max() - landscape.reward.min())
    of_objective = 1 / max(landscape.beta, spread / 10)
    return {
        "exact gradient": 2 * of_objective,
        "REINFORCE": 2 * of_objective,
        "PPO": of_objective / 2,
        "reward model + PPO": of_objective / 2,
        "DPO": 3 / landscape.beta**2,
        "IPO": 0.4,
    }[method]


def method_paths(
    method: str,
    landscape: Landscape,
    start: Tensor,
    *,
    labels: int | None = None,
    samples: int = 16,
    steps: int = 30,
    seeds: int = 10,
) -> Tensor:
    """The policies of a method along its way, for several seeds, (steps + 1, seeds, n).

    DPO, IPO and the reward model learn from the same labeled pairs, as `sample_pairs` draws them.
    REINFORCE and PPO are told the true reward of every completion that they draw.

    Args:
        method: one of `METHODS`.
        landscape: the objective.
        start: (n,) the policy where every path starts, with no probability zero.
        labels: labeled pairs per seed; None stands for infinitely many.
        samples: completions that REINFORCE and PPO draw per step.
        steps: updates.
        seeds: independent data sets or draws; the exact gradient is the same for all.

    Raises:
        ValueError: the method is unknown, a probability of start or reference is zero, or a count
            is not positive.
    """
    steps, seeds = _check_paths(method, landscape, start, labels, samples, steps, seeds)
    starts, rate = start.expand(seeds, -1), learning_rate(method, landscape)
    descent = {"steps": steps, "learning_rate": rate}

    if method == "exact gradient":
        uphill = gradient_descent(lambda logps: -landscape.height(logps.exp()), start, **descent)
        return uphill[:, None].expand(-1, seeds, -1)
    if method in SAMPLERS:
        rewards = landscape.reward.expand(seeds, -1)
        return _ascent(method, landscape, rewards, starts, samples=samples, **descent)

    weights = label_weights(landscape, labels, seeds)
    if method == "reward model + PPO":
        rewards = fitted_rewards(weights, len(start))
        return _ascent("PPO", landscape, rewards, starts, samples=MODEL_SAMPLES, **descent)
    loss = _preference_loss(landscape, weights, {"DPO": "sigmoid", "IPO": "ipo"}[method])
    return gradient_descent(loss, starts, **descent)


def label_weights(landscape: Landscape, labels: int | None, seeds: int) -> Tensor:
    """The fraction of each of `all_pairs` among the labeled pairs of each seed, (seeds, P)."""
    reference, reward = landscape.reference, landscape.reward
    if labels is None:
        return pair_weights(reference, reward).expand(seeds, -1)
    n, rows = len(reference), []
    for seed in range(seeds):
        pairs = sample_pairs(reference, reward, labels, torch.Generator().manual_seed(seed))
        counts = reference.new_zeros(n, n).index_put(
            pairs, reference.new_ones(labels), accumulate=True
        )
        rows.append(counts[all_pairs(n)] / labels)
    return torch.stack(rows)


def fitted_rewards(weights: Tensor, n: int) -> Tensor:
    """Rewards (seeds, n) of a reward model trained on labels, given as `label_weights`.

    Gradient descent on the loss that trains the language model's reward model
    (`bradley_terry_nll`); at convergence these are the rewards of `fit_bradley_terry`, up to a
    shift. Where a completion never lost there are no finite ones, and the descent ends on its way.
    """
    seeds = len(weights)
    chosen, rejected = _pairs_of_all(n, seeds)

    def loss(rewards: Tensor) -> Tensor:
        return weights.flatten() @ bradley_terry_nll(rewards.flatten(), chosen, rejected)

    # the loss sees differences of rewards alone, so log-probs can stand for them
    equal = weights.new_full((seeds, n), 1 / n)
    return gradient_descent(loss, equal, steps=FIT_STEPS, learning_rate=FIT_RATE)[-1].log()


def _ascent(
    kind: str,
    landscape: Landscape,
    rewards: Tensor,
    starts: Tensor,
    *,
    samples: int,
    steps: int,
    learning_rate: float,
) -> Tensor:
    """REINFORCE or PPO on rewards (seeds, n), (steps + 1, seeds, n)."""
    clipped = {"clip": CLIP, "epochs": EPOCHS} if kind == "PPO" else {}
    return policy_gradient(
        landscape.reference,
        rewards,
        landscape.beta,
        steps=steps,
        samples=samples,
        learning_rate=learning_rate,
        generator=torch.Generator().manual_seed(0),
        start=starts,
        **clipped,
    )


def _preference_loss(landscape: Landscape, weights: Tensor, loss_type: str) -> Loss:
    """The mean of `dpo_loss` over the labels of each seed, as a function of log-probs (seeds, n).

    The seeds are summed: the gradient of each is that of its own mean.
    """
    seeds = len(weights)
    chosen, rejected = _pairs_of_all(len(landscape.reference), seeds)
    reference = landscape.reference.log().repeat(seeds)

    def loss(logps: Tensor) -> Tensor:
        pairs = logps.flatten(), reference, chosen, rejected
        return weights.flatten() @ dpo_loss(*pairs, landscape.beta, loss_type=loss_type).losses

    return loss


def _pairs_of_all(n: int, seeds: int) -> tuple[Tensor, Tensor]:
    """`all_pairs` of every seed, as indices into the completions of all seeds, (seeds P,) each."""
    first = n * torch.arange(seeds)[:, None]
    return tuple((first + side).flatten() for side in all_pairs(n))


def _check_paths(
    method: str,
    landscape: Landscape,
    start: Tensor,
    labels: int | None,
    samples: int,
    steps: int,
    seeds: int,
) -> tuple[int, int]:
    """`steps` and `seeds` as integers, when all arguments of `method_paths` are right."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    check_beta(landscape.beta)
    for name, policy in (("start", start), ("landscape.reference", landscape.reference)):
        if not (policy > 0).all():
            raise ValueError(
                f"{name} is {policy.tolist()}; every probability must be positive: on logits no "
                "gradient leads away from zero"
            )
    counts = {"samples": samples, "steps": steps, "seeds": seeds}
    counts |= {} if labels is None else {"labels": labels}
    for name, count in counts.items():
        if integer(name, count) < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")
    return integer("steps", steps), integer("seeds", seeds)
