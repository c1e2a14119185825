"""A language whose completions have two tokens: there are few, so that every mean is a sum.

What a policy gradient estimates from samples, token by token, is computed here exactly, and so is
its variance. A vocabulary of n tokens has n^2 completions. A policy is a table of logits,
(n + 1, n): row 0 is for the first token, row 1 + i for the second token after token i.
"""

import torch
from torch import Tensor

from dpo_lab.engine.arguments import integer


def every_completion(n: int) -> Tensor:
    """The completions of `n` tokens, (n^2, 2): the first token changes slowest."""
    tokens = torch.arange(integer("n", n))
    return torch.cartesian_prod(tokens, tokens)


def token_logps(logits: Tensor) -> Tensor:
    """log pi of both tokens of every completion, (n^2, 2) in nats, for logits (n + 1, n).

    The sum over a row is the log-probability of the completion.
    """
    first, second = every_completion(_vocabulary(logits)).T
    logps = torch.log_softmax(logits, -1)
    return torch.stack([logps[0, first], logps[1 + first, second]], 1)


def token_scores(logits: Tensor) -> Tensor:
    """The gradient of each of `token_logps` in the logits, (n^2, 2, (n + 1) n).

    Its mean under the policy is zero for the first token, and for the second after every first one.
    """
    return torch.func.jacrev(token_logps)(logits).flatten(2)


def prefix_values(logits: Tensor, rewards: Tensor) -> Tensor:
    """The value before each token, (n^2, 2): the mean of the rewards that are still to come.

    `rewards` are (n^2, 2), one per token; the mean is over what the policy may write next.
    """
    n = _vocabulary(logits)
    policy = torch.softmax(logits, -1)
    of_pairs = rewards.reshape(n, n, 2)

    # before the second token: the mean of its reward
    second = (policy[1:] * of_pairs[:, :, 1]).sum(1)  # (n,), by first token

    # before the first one: the mean of both rewards
    first = policy[0] @ (policy[1:] * of_pairs.sum(2)).sum(1)
    return torch.stack([first.expand(n * n), second.repeat_interleave(n)], 1)


def gradient_moments(probabilities: Tensor, estimates: Tensor) -> tuple[Tensor, float]:
    """Mean (D,) and total variance of an estimate that is `estimates[i]` with probability p_i.

    The variance is summed over the D directions: E|g|^2 - |E g|^2.

    Args:
        probabilities: (N,), which sum to 1.
        estimates: (N, D).
    """
    mean = probabilities @ estimates
    return mean, float(probabilities @ estimates.square().sum(1) - mean.square().sum())


def _vocabulary(logits: Tensor) -> int:
    """n, for logits (n + 1, n). Raises ValueError for another shape."""
    if logits.ndim != 2 or len(logits) != logits.shape[1] + 1:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}; it must be (n + 1, n): a row for the first "
            "token, and a row for the second after each of n"
        )
    return logits.shape[1]
