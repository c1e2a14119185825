"""DPO and PPO where the optimum is known: one prompt, n completions, and a policy that is a table of logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from dpo_lab.engine.arguments import integer, number
from dpo_lab.losses import ppo_clip_loss
from dpo_lab.theory.objective import objective_value

Loss = Callable[[Tensor], Tensor]  # from log-probs (n,) to a number


def all_pairs(n: int) -> tuple[Tensor, Tensor]:
    """Every ordered pair of `n` completions, chosen and rejected, (n (n - 1),) each."""
    n = integer("n", n)
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    return tuple(pairs[pairs[:, 0] != pairs[:, 1]].T)


def pair_weights(reference: Tensor, reward: Tensor) -> Tensor:
    """The share of each of `all_pairs` among labels without end, (n (n - 1),).

    Both completions are drawn from `reference` (n,), equal ones are thrown away, and Bradley-Terry on `reward` (n,) labels
    them (Eq. 1 of Rafailov et al. 2023).
    """
    chosen, rejected = all_pairs(len(reference))
    weights = (
        reference[chosen] * reference[rejected] * torch.sigmoid(reward[chosen] - reward[rejected])
    )
    return weights / weights.sum()


def sample_pairs(
    reference: Tensor, reward: Tensor, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`n` labeled pairs drawn as `pair_weights` says: chosen and rejected, (n,) each."""
    drawn = torch.multinomial(
        pair_weights(reference, reward), integer("n", n), replacement=True, generator=generator
    )
    chosen, rejected = all_pairs(len(reference))
    return chosen[drawn], rejected[drawn]


def gradient_descent(loss: Loss, reference: Tensor, *, steps: int, learning_rate: float) -> Tensor:
    """Gradient descent on logits from the reference: the policies on the way, (steps + 1, n)."""
    steps, learning_rate = integer("steps", steps), number("learning_rate", learning_rate)
    logits = reference.log().clone().requires_grad_()
    path = [reference.detach()]
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(torch.log_softmax(logits, -1)), logits)
        logits = (logits - learning_rate * gradient).detach().requires_grad_()
        path.append(torch.softmax(logits, -1).detach())
    return torch.stack(path)


def minimize(loss: Loss, reference: Tensor, *, iterations: int = 500) -> Tensor:
    """The policy (n,) of least loss, by L-BFGS from the reference. Where there is none, it is how far `iterations` came."""
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
    """The gradient by the logits (n,) of J(pi) = E_pi[r] - beta KL(pi || pi_ref) (Eq. 3), by summing over all completions."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(
        objective_value(torch.softmax(logits, -1), reference, reward, beta), logits
    )[0]


def penalized_rewards(logits: Tensor, reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """r - beta log(pi / pi_ref) of each completion, (n,): what policy gradients maximize the mean of. It has no gradient."""
    return (
        reward - number("beta", beta) * (torch.log_softmax(logits, -1) - reference.log())
    ).detach()


def reinforce_gradients(
    logits: Tensor, actions: Tensor, returns: Tensor, baseline: float | Tensor = 0.0
) -> Tensor:
    """One estimate of the gradient of the mean return for each action, (N, n): (R - b) grad log pi(a) (Williams 1992).

    The log-derivative trick: grad E[R] = sum grad pi(a) R(a) = E[R grad log pi(a)]. On a table of logits grad log pi(a) is
    onehot(a) - pi. The derivative of the penalty inside R, -beta log pi, has mean zero and is left out; so has b grad log pi
    whatever the baseline b, which takes from the variance and not from the mean. `actions` (N,) are drawn from
    softmax(`logits`), `returns` are theirs, (N,).
    """
    score = torch.nn.functional.one_hot(actions, len(logits)) - torch.softmax(logits, -1)  # (N, n)
    return (returns - baseline)[:, None] * score


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
) -> Tensor:
    """Policy gradient on logits from the reference: the policies on the way, (steps + 1, n).

    Each step draws `samples` completions from the policy and asks for their rewards. Without `clip` it is REINFORCE, with
    the batch's mean return as its baseline if asked; with `clip` it is PPO: `epochs` passes over the same samples, held near
    the policy that drew them by `ppo_clip_loss`.
    """
    steps, samples, epochs = (
        integer("steps", steps),
        integer("samples", samples),
        integer("epochs", epochs),
    )
    learning_rate = number("learning_rate", learning_rate)
    logits, path = reference.log().clone(), [reference.detach()]
    for _ in range(steps):
        policy = torch.softmax(logits, -1)
        actions = torch.multinomial(policy, samples, replacement=True, generator=generator)  # (N,)
        returns = penalized_rewards(logits, reference, reward, beta)[actions]
        advantages = returns - returns.mean() if baseline else returns
        if clip is None:
            logits = logits + learning_rate * reinforce_gradients(logits, actions, advantages).mean(
                0
            )
        else:
            old_logps = policy.log()[actions]
            for _ in range(epochs):
                logits.requires_grad_()
                loss = ppo_clip_loss(
                    torch.log_softmax(logits, -1)[actions], old_logps, advantages, clip
                ).mean()
                logits = (logits - learning_rate * torch.autograd.grad(loss, logits)[0]).detach()
        path.append(torch.softmax(logits, -1))
    return torch.stack(path)
