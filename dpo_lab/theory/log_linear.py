"""DPO on prompts that share parameters, with a fixed number of labels per pair.

The policy is log-linear: pi(y|x) is proportional to pi_ref(y|x) exp(theta . phi(x, y)), with
features phi and the same d parameters theta for all prompts. The reward is linear in the features,
so that the optimal policy is of this form too. S independent runs are computed side by side.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_lab.engine.arguments import integer, number
from dpo_lab.losses import dpo_loss


class Prompts(NamedTuple):
    """P prompts in each of S runs, with n completions each and one pair of them to compare."""

    features: Tensor
    """(S, P, n, d) phi of each completion"""
    reference: Tensor
    """(S, P, n) pi_ref of each completion"""
    reward: Tensor
    """(S, P, n) reward of each completion, in nats"""
    first: Tensor
    """(S, P) which of the n completions is the first of the pair"""
    second: Tensor
    """(S, P) which is the second"""


def draw_prompts(
    truth: Tensor, prompts: int, completions: int, generator: torch.Generator
) -> Prompts:
    """Prompts with standard normal features, rewards truth . phi, and one pair each.

    The reference is a softmax of standard normal logits. The two completions of a pair are drawn
    from it, the second one among those that are left.

    Args:
        truth: (S, d) parameters of the reward, one row per run, in nats.
        prompts: P, for each run.
        completions: n, for each prompt, at least 2.
        generator: draws everything.
    """
    shape = (len(truth), _at_least("prompts", prompts, 1), _at_least("completions", completions, 2))
    options = {"generator": generator, "dtype": truth.dtype}
    features = torch.randn(*shape, truth.shape[1], **options)
    reference = torch.softmax(torch.randn(*shape, **options), -1)
    pairs = torch.multinomial(reference.flatten(0, 1), 2, generator=generator)
    first, second = pairs.T.reshape(2, *shape[:2])
    return Prompts(features, reference, _scores(truth, features), first, second)


def log_linear_policy(theta: Tensor, prompts: Prompts) -> Tensor:
    """log pi(y|x) of every completion under parameters (S, d), in nats, (S, P, n)."""
    return torch.log_softmax(prompts.reference.log() + _scores(theta, prompts.features), -1)


def label_pairs(prompts: Prompts, labels: int | None, generator: torch.Generator) -> Tensor:
    """The fraction of a pair's labels that prefer its first completion, (S, P).

    Each label follows the Bradley-Terry model on the rewards (Eq. 1 of Rafailov et al. 2023).

    Args:
        prompts: S runs with P pairs each.
        labels: how many there are for each pair; None is infinitely many.
        generator: draws them.
    """
    first, second = (
        prompts.reward.gather(2, side[..., None]).squeeze(-1)
        for side in (prompts.first, prompts.second)
    )
    probability = torch.sigmoid(first - second)
    if labels is None:
        return probability
    labels = _at_least("labels", labels, 1)
    counts = torch.full_like(probability, labels)
    return torch.binomial(counts, probability, generator=generator) / labels


def labeled_loss(
    logps: Tensor, prompts: Prompts, wins: Tensor, beta: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """The mean of `dpo_loss` over the labels of each pair, and its margin, (S, P) each.

    The margin is positive where the policy prefers the completion that most labels prefer.

    Args:
        logps: (S, P, n) log-probs of the policy in nats.
        prompts: S runs with P pairs each.
        wins: (S, P) fraction of labels that prefer the first completion.
        beta: strength of the KL constraint, positive.
        options: `loss_type` and `label_smoothing` of `dpo_loss`.
    """
    # indices into all completions of all runs
    runs, count, n = logps.shape
    start = torch.arange(0, logps.numel(), n).reshape(runs, count)
    first, second = ((start + side).flatten() for side in (prompts.first, prompts.second))

    # every pair in both orders
    chosen, rejected = torch.cat([first, second]), torch.cat([second, first])
    reference_logps = prompts.reference.log().flatten()
    result = dpo_loss(logps.flatten(), reference_logps, chosen, rejected, beta, **options)
    ahead, behind = result.losses.reshape(2, runs, count)
    margins = result.margins[: len(first)].reshape(runs, count)
    return wins * ahead + (1 - wins) * behind, torch.where(wins > 0.5, margins, -margins)


def log_linear_descent(
    loss: Callable[[Tensor], Tensor], prompts: Prompts, *, steps: int, learning_rate: float
) -> Tensor:
    """Gradient descent on the parameters of every run, starting at the reference, theta = 0.

    Returns the parameters along the way, (steps + 1, S, d).

    Args:
        loss: maps log-probs (S, P, n) to the losses (S, P) of the pairs; each run descends its
            mean.
        prompts: S runs with P pairs each.
        steps: over all pairs each.
        learning_rate: the step is this times the gradient.
    """
    steps, learning_rate = integer("steps", steps), number("learning_rate", learning_rate)
    runs, *_, dimension = prompts.features.shape
    path = [prompts.features.new_zeros(runs, dimension)]
    for _ in range(steps):
        leaf = path[-1].clone().requires_grad_()
        value = loss(log_linear_policy(leaf, prompts)).mean(1).sum()
        path.append(path[-1] - learning_rate * torch.autograd.grad(value, leaf)[0])
    return torch.stack(path)


def _scores(theta: Tensor, features: Tensor) -> Tensor:
    """theta . phi of every completion, (S, P, n)."""
    return (features.flatten(1, 2) @ theta[:, :, None]).reshape(features.shape[:-1])


def _at_least(name: str, value: int, least: int) -> int:
    """`value` as an int, which must be `least` or more."""
    value = integer(name, value)
    if value < least:
        raise ValueError(f"{name} is {value}; it must be {least} or more")
    return value
