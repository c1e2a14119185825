"""DPO where the optimum is known: one prompt, n completions, and a policy that is a table of logits."""

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]  # from log-probs (n,) to a number


def all_pairs(n: int) -> tuple[Tensor, Tensor]:
    """Every ordered pair of `n` completions, chosen and rejected, (n (n - 1),) each."""
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    return tuple(pairs[pairs[:, 0] != pairs[:, 1]].T)


def pair_weights(reference: Tensor, reward: Tensor) -> Tensor:
    """The share of each of `all_pairs` among labels without end, (n (n - 1),).

    Both completions are drawn from `reference` (n,), equal ones are thrown away, and Bradley-Terry on `reward` (n,) labels
    them (Eq. 1 of Rafailov et al. 2023).
    """
    chosen, rejected = all_pairs(len(reference))
    weights = reference[chosen] * reference[rejected] * torch.sigmoid(reward[chosen] - reward[rejected])
    return weights / weights.sum()


def sample_pairs(reference: Tensor, reward: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`n` labelled pairs drawn as `pair_weights` says: chosen and rejected, (n,) each."""
    drawn = torch.multinomial(pair_weights(reference, reward), n, replacement=True, generator=generator)
    chosen, rejected = all_pairs(len(reference))
    return chosen[drawn], rejected[drawn]


def descend(loss: Loss, reference: Tensor, *, steps: int, learning_rate: float) -> Tensor:
    """Gradient descent on logits from the reference: the policies on the way, (steps + 1, n)."""
    logits = reference.log().clone().requires_grad_()
    path = [reference.detach()]
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(torch.log_softmax(logits, -1)), logits)
        logits = (logits - learning_rate * gradient).detach().requires_grad_()
        path.append(torch.softmax(logits, -1).detach())
    return torch.stack(path)


def minimise(loss: Loss, reference: Tensor, *, iterations: int = 500) -> Tensor:
    """The policy (n,) of least loss, by L-BFGS from the reference. Where there is none, it is how far `iterations` came."""
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=iterations, tolerance_grad=1e-14, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(torch.log_softmax(logits, -1))
        value.backward()
        return value

    optimizer.step(closure)
    return torch.softmax(logits.detach(), -1)
