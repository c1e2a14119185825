"""The optimal reward-KL frontier, estimated from samples of the reference, and best of N."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_lab.engine.arguments import floats, integer

# the estimate is valid from this effective number of samples per prompt on
LEAST_EFFECTIVE = 5


class OptimalFrontier(NamedTuple):
    """The best that any policy can do, at each of B strengths of the KL constraint."""

    reward: np.ndarray
    """(B,) mean reward"""
    kl: np.ndarray
    """(B,) nats"""
    effective: np.ndarray
    """(B,) effective number of samples per prompt that the estimate rests on"""

    @property
    def valid(self) -> np.ndarray:
        """Where the estimate rests on enough samples, (B,) of bool."""
        return self.effective >= LEAST_EFFECTIVE

    def reward_at(self, kl: float | np.ndarray) -> np.ndarray:
        """The best mean reward at a KL in nats; NaN where the estimate is no longer valid."""
        kls, rewards = self._by_kl()
        return np.interp(kl, kls, rewards, right=np.nan)

    def most_at(self, kl: float) -> float:
        """A mean reward that no policy can exceed at a KL in nats.

        It is the estimate, and beyond its end the chord through its last two points: the frontier
        is concave in the KL, so it stays below.
        """
        kls, rewards = self._by_kl()
        if kl <= kls[-1]:
            return float(self.reward_at(kl))
        slope = (rewards[-1] - rewards[-2]) / (kls[-1] - kls[-2])
        return float(rewards[-1] + (kl - kls[-1]) * slope)

    def share(
        self, reward: float | np.ndarray, kl: float | np.ndarray, before: float
    ) -> np.ndarray:
        """The fraction of the optimal gain that a policy with this reward reaches at its KL.

        The gain is over the reference's mean reward `before`.
        """
        return (np.asarray(reward) - before) / (self.reward_at(kl) - before)

    def _by_kl(self) -> tuple[np.ndarray, np.ndarray]:
        """KL and reward of the valid points, in the order of the KL."""
        order = np.argsort(self.kl[self.valid])
        return self.kl[self.valid][order], self.reward[self.valid][order]


def optimal_frontier(scores: np.ndarray, betas: Sequence[float]) -> OptimalFrontier:
    """Reward and sequence KL of the optimal policy pi_ref exp(r / beta) / Z at each beta.

    Estimated by self-normalized importance sampling; KL = E*[r] / beta - log Z. It is no longer
    valid where the effective number of samples nears 1, since the estimated KL cannot exceed log K.

    Args:
        scores: (M, K) rewards of K completions of each of M prompts, sampled from the reference.
        betas: (B,) strengths of the KL constraint, positive.

    Raises:
        ValueError: scores that are not (M, K) with K of at least 2, or a beta that is not positive.
    """
    scores, betas = floats("scores", scores), floats("betas", betas)
    if scores.ndim != 2 or scores.shape[1] < 2 or not (betas > 0).all():
        raise ValueError(
            f"scores has shape {scores.shape} and betas {betas}; "
            "need (M, K) scores with K >= 2 and positive betas"
        )

    # weights exp(r / beta) of the samples, (B, M, K), the largest of a prompt brought to 1
    tilt = scores / betas[:, None, None]
    top = tilt.max(-1, keepdims=True)
    weights = np.exp(tilt - top)
    log_z = np.log(weights.mean(-1)) + top[..., 0]  # (B, M)

    # self-normalized: the mean reward under the optimal policy, (B, M)
    weights /= weights.sum(-1, keepdims=True)
    best = (weights * scores).sum(-1)
    kl = best / betas[:, None] - log_z
    effective = 1 / (weights**2).sum(-1)
    return OptimalFrontier(best.mean(1), kl.mean(1), effective.mean(1))


def frontier_band(
    scores: np.ndarray,
    betas: Sequence[float],
    at: Sequence[float],
    *,
    level: float = 0.9,
    resamples: int = 200,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Confidence band of the best mean reward at each KL of `at`, by bootstrap.

    Prompts are resampled with replacement, and the samples of each prompt.

    Args:
        scores: (M, K), as in `optimal_frontier`.
        betas: (B,), as in `optimal_frontier`.
        at: (A,) nats.
        level: fraction of the resamples inside the band.
        resamples: number of resamples.
        seed: decides the resamples.

    Returns:
        Lower and upper end, (A,) each; NaN where fewer than half of the resamples are valid.
    """
    scores, at, rng = floats("scores", scores), floats("at", at), np.random.default_rng(seed)
    found = np.empty((integer("resamples", resamples), len(at)))
    for row in found:
        prompts = rng.integers(len(scores), size=len(scores))
        samples = rng.integers(scores.shape[1], size=scores.shape)
        resampled = np.take_along_axis(scores[prompts], samples, 1)
        row[:] = optimal_frontier(resampled, betas).reward_at(at)

    enough = np.isfinite(found).mean(0) >= 0.5
    ends = np.full((2, len(at)), np.nan)
    ends[:, enough] = np.nanquantile(found[:, enough], ((1 - level) / 2, (1 + level) / 2), axis=0)
    return ends[0], ends[1]


def best_of_n(scores: np.ndarray, n: int) -> np.ndarray:
    """Mean reward of the best of `n` samples for each prompt, (M,), out of K samples (M, K).

    Exact: the mean over all subsets of `n` of the K. The policy that returns the best of `n` has a
    KL to the sampled one of at most log n - (n - 1) / n nats (Beirami et al. 2024,
    https://arxiv.org/abs/2401.01879), with equality where no two completions are the same.

    Raises:
        ValueError: `n` is not in 1..K, or scores is not (M, K).
    """
    scores, n = floats("scores", scores), integer("n", n)
    if scores.ndim != 2 or not 1 <= n <= scores.shape[1]:
        raise ValueError(
            f"n is {n} with scores of shape {scores.shape}; "
            "it must be from 1 to K for scores (M, K)"
        )

    # the probability that the i-th smallest of K is the best of n: C(i, n - 1) / C(K, n)
    k = scores.shape[1]
    subsets = np.array([math.comb(i, n - 1) for i in range(k)], dtype=np.float64)
    return np.sort(scores, axis=1) @ (subsets / math.comb(k, n))
