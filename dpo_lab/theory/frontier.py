"""The optimal reward-KL frontier, estimated from samples of the reference, and best of N."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_lab.engine.arguments import floats, integer


def best_of_n(scores: np.ndarray, n: int) -> np.ndarray:
    """Mean reward of the best of `n` samples for each prompt, (M,), from K of them (M, K): over all subsets of n, exactly.

    The policy that returns it has a KL to the sampled one of at most log n - (n - 1) / n nats (Beirami et al. 2024,
    https://arxiv.org/abs/2401.01879), with equality where no two completions are the same.
    """
    scores, n = floats("scores", scores), integer("n", n)
    if scores.ndim != 2 or not 1 <= n <= scores.shape[1]:
        raise ValueError(
            f"n is {n} with scores of shape {scores.shape}; it must be from 1 to K for scores (M, K)"
        )
    k = scores.shape[1]
    chances = np.array([math.comb(i, n - 1) for i in range(k)], dtype=np.float64) / math.comb(
        k, n
    )  # that i is the best
    return np.sort(scores, axis=1) @ chances


class OptimalFrontier(NamedTuple):
    """The best that any policy can do, at each of B strengths of the KL constraint."""

    reward: np.ndarray  # (B,) mean reward
    kl: np.ndarray  # (B,) nats
    effective: np.ndarray  # (B,) mean effective number of the samples a prompt that it rests on

    @property
    def valid(self) -> np.ndarray:
        """Where enough samples bear the estimate, (B,) of bool."""
        return self.effective >= LEAST_EFFECTIVE

    def reward_at(self, kl: float | np.ndarray) -> np.ndarray:
        """The best mean reward at a KL in nats; NaN where the estimate stops being valid."""
        order = np.argsort(self.kl[self.valid])
        return np.interp(
            kl, self.kl[self.valid][order], self.reward[self.valid][order], right=np.nan
        )

    def most_at(self, kl: float) -> float:
        """A reward that no policy can exceed at a KL in nats: the estimate, and past its end the chord through its last two
        points, under which the frontier stays because it is concave in the KL."""
        order = np.argsort(self.kl[self.valid])
        kls, rewards = self.kl[self.valid][order], self.reward[self.valid][order]
        if kl <= kls[-1]:
            return float(self.reward_at(kl))
        return float(
            rewards[-1] + (kl - kls[-1]) * (rewards[-1] - rewards[-2]) / (kls[-1] - kls[-2])
        )

    def share(
        self, reward: float | np.ndarray, kl: float | np.ndarray, before: float
    ) -> np.ndarray:
        """The share of the optimal gain over the reference's reward `before` that a policy reaches at its KL."""
        return (np.asarray(reward) - before) / (self.reward_at(kl) - before)


LEAST_EFFECTIVE = 5  # samples a prompt


def optimal_frontier(scores: np.ndarray, betas: Sequence[float]) -> OptimalFrontier:
    """Reward and sequence KL of the optimal policy pi_ref exp(r / beta) / Z, estimated from reference samples.

    Args:
        scores: (M, K) rewards of K completions of each of M prompts, sampled from the reference.
        betas: (B,) strengths of the KL constraint, positive.

    KL = E*[r] / beta - log Z, by self-normalized importance sampling. Where the effective number of samples nears 1 it is no
    longer valid: the KL cannot exceed log K.
    """
    scores, betas = floats("scores", scores), floats("betas", betas)
    if scores.ndim != 2 or scores.shape[1] < 2 or not (betas > 0).all():
        raise ValueError(
            f"scores has shape {scores.shape} and betas {betas}; need (M, K) scores with K >= 2 and positive betas"
        )
    tilt = scores / betas[:, None, None]  # (B, M, K)
    top = tilt.max(-1, keepdims=True)
    weights = np.exp(tilt - top)
    log_z = np.log(weights.mean(-1)) + top[..., 0]  # (B, M)
    weights /= weights.sum(-1, keepdims=True)
    best = (weights * scores).sum(-1)  # (B, M)
    kl = best / betas[:, None] - log_z
    return OptimalFrontier(best.mean(1), kl.mean(1), (1 / (weights**2).sum(-1)).mean(1))


def frontier_band(
    scores: np.ndarray,
    betas: Sequence[float],
    at: Sequence[float],
    *,
    level: float = 0.9,
    resamples: int = 200,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end, (A,) each, of the best mean reward at each KL of `at` (A,), by bootstrap.

    Prompts are drawn again with replacement, and the samples of each; `level` is the share of resamples inside. NaN where
    fewer than half of the resamples are valid.
    """
    scores, at, rng = floats("scores", scores), floats("at", at), np.random.default_rng(seed)
    found = np.empty((integer("resamples", resamples), len(at)))
    for row in found:
        prompts = rng.integers(len(scores), size=len(scores))
        samples = rng.integers(scores.shape[1], size=scores.shape)
        row[:] = optimal_frontier(np.take_along_axis(scores[prompts], samples, 1), betas).reward_at(
            at
        )
    enough = np.isfinite(found).mean(0) >= 0.5
    ends = np.full((2, len(at)), np.nan)
    ends[:, enough] = np.nanquantile(found[:, enough], ((1 - level) / 2, (1 + level) / 2), axis=0)
    return ends[0], ends[1]
