"""DPO and policy gradients where the optimum is known: a bandit.

There is one prompt with n completions, and the policy is a table of logits, one per completion.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dpo_lab.engine.arguments import integer, number
from dpo_lab.losses import ppo_clip_loss
from dpo_lab.theory.objective import objective_value

# a loss maps log-probs (n,), or (..., n) of several policies at once, to a number
Loss = Callable[[Tensor], Tensor]


def all_pairs(n: int) -> tuple[Tensor, Tensor]:
    """Every ordered pair of `n` completions: chosen and rejected, (n (n - 1),) each."""
    n = integer("n", n)
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    return tuple(pairs[pairs[:, 0] != pairs[:, 1]].T)


def pair_weights(reference: Tensor, reward: Tensor) -> Tensor:
    """The fraction of each of `all_pairs` among infinitely many labeled pairs, (n (n - 1),).

    Both completions are drawn from `reference` (n,), equal ones are thrown away, and the
    Bradley-Terry model on `reward` (n,) labels them (Eq. 1 of Rafailov et al. 2023).
    """
    chosen, rejected = all_pairs(len(reference))
    drawn = reference[chosen] * reference[rejected]
    weights = drawn * torch.sigmoid(reward[chosen] - reward[rejected])
    return weights / weights.sum()


def sample_pairs(
    reference: Tensor, reward: Tensor, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`n` labeled pairs drawn with `pair_weights`: chosen and rejected, (n,) each."""
    weights = pair_weights(reference, reward)
    drawn = torch.multinomial(weights, integer("n", n), replacement=True, generator=generator)
    chosen, rejected = all_pairs(len(reference))
    return chosen[drawn], rejected[drawn]


def gradient_descent(
    loss: Loss,
    reference: Tensor,
    *,
    steps: int,
    learning_rate: float,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
) -> Tensor:
    """Gradient descent on logits, starting at the reference or at any other policies.

    Returns the policies along the way, (steps + 1, ..., n).

    Args:
        loss: maps log-probs (..., n) to a number.
        reference: (..., n) probabilities; several rows are several descents at once.
        steps: how many.
        learning_rate: of the optimizer.
        optimizer: a class of `torch.optim`. SGD is plain gradient descent, since the loss is exact;
            with Adam the size of a step does not depend on that of the gradient.
    """
    steps, learning_rate = integer("steps", steps), number("learning_rate", learning_rate)
    logits = reference.log().clone().requires_grad_()
    descent = optimizer([logits], lr=learning_rate)
    path = [reference.detach()]
    for _ in range(steps):
        (logits.grad,) = torch.autograd.grad(loss(torch.log_softmax(logits, -1)), logits)
        descent.step()
        path.append(torch.softmax(logits, -1).detach())
    return torch.stack(path)


def minimize(loss: Loss, reference: Tensor, *, iterations: int = 500) -> Tensor:
    """The policy (n,) that minimizes the loss, by L-BFGS from the reference.

    Where the loss has no minimum, it is as far as `iterations` iterations came.
    """
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=integer("iterations", iterations),
        tolerance_grad=1e-14,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(torch.log_softmax(logits, -1))
        value.backward()
        return value

    optimizer.step(closure)
    return torch.softmax(logits.detach(), -1)


def exact_gradient(logits: Tensor, reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The gradient of J(pi) = E_pi[r] - beta KL(pi || pi_ref) (Eq. 3) in the logits, (n,).

    It is exact: a sum over all completions.
    """
    logits = logits.detach().requires_grad_()
    value = objective_value(torch.softmax(logits, -1), reference, reward, beta)
    (gradient,) = torch.autograd.grad(value, logits)
    return gradient


def penalized_rewards(logits: Tensor, reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """r - beta log(pi / pi_ref) of each completion, (n,), without a gradient.

    Policy-gradient methods maximize its mean under the policy.
    """
    log_ratios = torch.log_softmax(logits, -1) - reference.log()
    return (reward - number("beta", beta) * log_ratios).detach()


def reinforce_gradients(
    logits: Tensor, actions: Tensor, returns: Tensor, baseline: float | Tensor = 0.0
) -> Tensor:
    """One estimate of the gradient of the mean return per action, (..., N, n) (Williams 1992).

    Each is (R - b) grad log pi(a), by the log-derivative trick: grad E[R] = sum grad pi(a) R(a) =
    E[R grad log pi(a)]. On a table of logits grad log pi(a) is onehot(a) - pi. The derivative of
    the penalty inside R, -beta log pi, has mean zero and is left out. So has b grad log pi for
    every baseline b: it lowers the variance and leaves the mean.

    Args:
        logits: (..., n) of the policy.
        actions: (..., N) completions drawn from softmax(`logits`).
        returns: (..., N) their returns.
        baseline: b, a number or (..., N).
    """
    policy = torch.softmax(logits, -1)[..., None, :]
    score = torch.nn.functional.one_hot(actions, logits.shape[-1]) - policy  # (..., N, n)
    return (returns - baseline)[..., None] * score


def policy_gradient(
    reference: Tensor,
    reward: Tensor,
    beta: float,
    *,
    steps: int,
    samples: int,
    learning_rate: float,
    generator: torch.Generator,
    baseline: bool = True,
    epochs: int = 1,
    clip: float | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Policy gradient on logits: REINFORCE, or PPO with `clip`.

    Returns the policies along the way, (steps + 1, ..., n).

    Args:
        reference: (n,) probabilities.
        reward: (n,) rewards, or (..., n): other rewards for each run.
        beta: strength of the KL penalty.
        steps: updates of the policy that draws the samples.
        samples: completions drawn, and rewards asked for, per step.
        learning_rate: of gradient ascent on the logits.
        generator: draws the samples.
        baseline: subtract the mean return of the batch.
        epochs: passes over the samples of a step; only with `clip`.
        clip: PPO's clip range: the policy is held near the one that drew the samples by
            `ppo_clip_loss`. None is REINFORCE.
        start: (..., n) where the runs start, all at once; None is one run from the reference.
    """
    steps, samples = integer("steps", steps), integer("samples", samples)
    epochs, learning_rate = integer("epochs", epochs), number("learning_rate", learning_rate)
    start = reference if start is None else start
    logits, path = start.log().clone(), [start.detach()]
    for _ in range(steps):
        # draw completions and score them, (..., N)
        policy = torch.softmax(logits, -1)
        actions = torch.multinomial(policy, samples, replacement=True, generator=generator)
        returns = penalized_rewards(logits, reference, reward, beta).gather(-1, actions)
        advantages = returns - returns.mean(-1, keepdim=True) if baseline else returns

        # one step of REINFORCE, or several of PPO on the same samples
        if clip is None:
            gradient = reinforce_gradients(logits, actions, advantages).mean(-2)
            logits = logits + learning_rate * gradient
        else:
            old_logps = policy.log().gather(-1, actions)
            for _ in range(epochs):
                logits.requires_grad_()
                logps = torch.log_softmax(logits, -1).gather(-1, actions)
                loss = ppo_clip_loss(logps, old_logps, advantages, clip).mean(-1).sum()
                logits = (logits - learning_rate * torch.autograd.grad(loss, logits)[0]).detach()

        path.append(torch.softmax(logits, -1))
    return torch.stack(path)
