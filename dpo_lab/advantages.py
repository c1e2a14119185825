"""From rewards of completions to advantages of tokens: what PPO computes between sampling and stepping."""

import numpy as np
import torch
from torch import Tensor

from dpo_lab.arguments import number


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Rewards (N, L) of tokens: each pays its penalty (N, L), and the last one of a completion gets the score (N,)."""
    last = torch.nn.functional.one_hot(mask.sum(1) - 1, mask.shape[1])  # (N, L)
    return torch.where(mask, penalties + last * scores[:, None], 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, L) of tokens, by generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438).

    A_t = d_t + gamma lam A_(t+1) with d_t = r_t + gamma V_(t+1) - V_t; behind a row's last token V and A are zero. `mask`
    (N, L) is True from the first token of a row to its last. Returns are advantages plus values.
    """
    gamma, lam = number("gamma", gamma), number("lam", lam)
    advantages, after, next_value = (
        torch.zeros_like(rewards),
        rewards.new_zeros(len(rewards)),
        rewards.new_zeros(len(rewards)),
    )
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = after = torch.where(mask[:, t], surprise + gamma * lam * after, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Values (N, L) with mean 0 and variance 1 over `mask`, zero outside; with `keep_mean` the mean stays what it was."""
    some = values[mask]
    mean = some.mean()
    white = (values - mean) / (some.var(correction=0) + 1e-8).sqrt()
    return torch.where(mask, white + mean if keep_mean else white, 0.0)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, gain: float) -> float:
    """The coefficient after a rollout of mean sequence KL `kl` nats: up by at most a fifth of `gain` where it is above target.

    beta (1 + gain e) with e = clip(kl / target - 1, -0.2, 0.2) (Section 2.2 of Ziegler et al. 2019).
    """
    coefficient, gain, kl, target = (
        number(name, value)
        for name, value in (
            ("coefficient", coefficient),
            ("gain", gain),
            ("kl", kl),
            ("target", target),
        )
    )
    return coefficient * (1 + gain * float(np.clip(kl / target - 1, -0.2, 0.2)))
