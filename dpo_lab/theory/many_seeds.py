"""Policy gradients and DPO on a bandit, many independent runs at once.

What `bandit` shows for one run, step by step, is here a row of a tensor, so that a comparison can
have many seeds and every method its best learning rate.
"""

import torch
from torch import Tensor

from dpo_lab.engine.arguments import integer, number
from dpo_lab.losses import check_beta, ppo_clip_loss
from dpo_lab.theory.bandit import all_pairs


def policy_gradient_runs(
    reference: Tensor,
    reward: Tensor,
    beta: float,
    *,
    seeds: int,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
    samples: int = 64,
    passes: int = 1,
    clip: float | None = None,
) -> Tensor:
    """Policy gradient on logits with the mean return as the baseline, in `seeds` runs.

    Returns the policies along the way, (steps + 1, seeds, n); each run starts at the reference.

    Args:
        reference: (n,) probabilities.
        reward: (n,) rewards, or (seeds, n) where each run has its own.
        beta: strength of the KL penalty.
        seeds: independent runs.
        steps: times that completions are drawn.
        learning_rate: of gradient ascent on the logits.
        generator: draws the completions.
        samples: completions per run and step.
        passes: gradient steps on the same completions.
        clip: PPO's clip range; None weights by the ratio pi / pi_old without a clip. Without it one
            pass is REINFORCE.
    """
    seeds, steps = integer("seeds", seeds), integer("steps", steps)
    samples, passes = integer("samples", samples), integer("passes", passes)
    learning_rate, beta = number("learning_rate", learning_rate), check_beta(beta)
    logits = reference.log().repeat(seeds, 1)
    path = [torch.softmax(logits, -1)]
    for _ in range(steps):
        # draw completions: the fraction of each
        old = torch.log_softmax(logits, -1)  # (seeds, n)
        drawn = torch.multinomial(old.exp(), samples, replacement=True, generator=generator)
        one = torch.ones_like(drawn, dtype=old.dtype)
        fractions = torch.zeros_like(old).scatter_add(1, drawn, one) / samples

        # what each is worth, above the mean of those drawn
        returns = reward - beta * (old - reference.log())
        advantages = returns - (fractions * returns).sum(1, keepdim=True)

        # one or more steps on the same completions
        for _ in range(passes):
            logits.requires_grad_()
            logps = torch.log_softmax(logits, -1)
            losses = (
                -advantages * (logps - old).exp()
                if clip is None
                else ppo_clip_loss(logps, old, advantages, clip)
            )
            (gradient,) = torch.autograd.grad((fractions * losses).sum(), logits)
            logits = (logits - learning_rate * gradient).detach()

        path.append(torch.softmax(logits, -1))
    return torch.stack(path)


def dpo_runs(
    reference: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    *,
    learning_rate: float,
    steps: int,
) -> Tensor:
    """Gradient descent on DPO's mean loss, a run per row of pairs, from the reference.

    Returns the policies at the end, (seeds, n).

    Args:
        reference: (n,) probabilities.
        chosen: (seeds, P) index of the preferred completion of each pair.
        rejected: (seeds, P) index of the other.
        beta: as in `dpo_loss`.
        learning_rate: of gradient descent on the logits.
        steps: of it, each on all pairs.
    """
    steps, learning_rate = integer("steps", steps), number("learning_rate", learning_rate)
    beta, n, (seeds, pairs) = check_beta(beta), len(reference), chosen.shape

    # the fraction of every ordered pair of completions, (seeds, n (n - 1))
    first, second = all_pairs(n)
    one = torch.ones_like(chosen, dtype=reference.dtype)
    counts = reference.new_zeros(seeds, n * n).scatter_add(1, n * chosen + rejected, one)
    fractions = counts[:, n * first + second] / pairs

    logits = reference.log().repeat(seeds, 1)
    for _ in range(steps):
        logits.requires_grad_()
        log_ratios = torch.log_softmax(logits, -1) - reference.log()
        margins = beta * (log_ratios[:, first] - log_ratios[:, second])
        loss = -(fractions * torch.nn.functional.logsigmoid(margins)).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - learning_rate * gradient).detach()
    return torch.softmax(logits, -1)


def at_best_rate(gaps: Tensor) -> tuple[Tensor, Tensor]:
    """At every budget the index of the best rate (B,), and what it gives on other runs (B, S / 2).

    The rate with the lowest median over the first half of the runs is taken; the second half, on
    which it was not chosen, is returned.

    Args:
        gaps: (rates, B, S): how far each of S runs is from its goal, at each rate and budget.
    """
    half = gaps.shape[2] // 2
    best = gaps[:, :, :half].median(2).values.argmin(0)  # (B,)
    return best, gaps[best, torch.arange(gaps.shape[1]), half:]
