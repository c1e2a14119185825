"""From the score of a completion to the advantage of each of its tokens.

Section 2.2 of Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593) and generalized advantage
estimation (Schulman et al. 2015, https://arxiv.org/abs/1506.02438). Rows are completions of at most
L tokens, (N, L), with a mask that is True on their tokens.
"""

import numpy as np
import torch
from torch import Tensor

from dpo_lab.engine.arguments import number


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Rewards (N, L) of tokens: their penalties (N, L), and scores (N,) at the last of each row."""
    last = torch.nn.functional.one_hot(mask.sum(1) - 1, mask.shape[1])  # (N, L)
    return torch.where(mask, penalties + last * scores[:, None], 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, L) of tokens, by generalized advantage estimation.

    A_t = d_t + gamma lam A_(t+1) with d_t = r_t + gamma V_(t+1) - V_t; after a row's last token V
    and A are zero. `mask` (N, L) is True from the first token of a row to its last. Returns are
    advantages plus values. Schulman et al. 2015, arXiv:1506.02438.
    """
    gamma, lam = number("gamma", gamma), number("lam", lam)
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], surprise + gamma * lam * next_advantage, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Values (N, L) with mean 0 and variance 1 over `mask`, zero outside.

    With `keep_mean` the mean stays what it was.
    """
    some = values[mask]
    mean = some.mean()
    white = (values - mean) / (some.var(correction=0) + 1e-8).sqrt()
    return torch.where(mask, white + mean if keep_mean else white, 0.0)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, gain: float) -> float:
    """The coefficient after a rollout with a mean sequence KL of `kl` nats.

    coefficient (1 + gain e) with e = clip(kl / target - 1, -0.2, 0.2): it moves by a fifth of
    `gain` at most (Section 2.2 of Ziegler et al. 2019).
    """
    coefficient, gain = number("coefficient", coefficient), number("gain", gain)
    kl, target = number("kl", kl), number("target", target)
    return coefficient * (1 + gain * float(np.clip(kl / target - 1, -0.2, 0.2)))
