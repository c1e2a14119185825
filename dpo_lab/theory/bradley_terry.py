"""Rewards fitted to choices, with intervals: Bradley-Terry of pairs, Plackett-Luce of rankings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpo_lab.engine.arguments import floats, integer, integers
from dpo_lab.losses import check_pairs, check_rankings

# Newton's method squares the error: after a step of this size the next would be of size 1e-14
LAST_STEP = 1e-7

# nats by which the mean log-likelihood of two rewards may differ through rounding alone; near the
# maximum a step of 1e-6 changes it by less
ROUNDING = 1e-12


@dataclass(frozen=True)
class BradleyTerryFit:
    """Rewards fitted to comparisons, or to rankings, by maximum likelihood."""

    rewards: np.ndarray
    """(n,) nats, with mean 0, since comparisons say nothing about a common shift"""
    covariance: np.ndarray
    """(n, n) of the rewards, the pseudo-inverse of the Fisher information"""
    nll: float
    """nats per comparison or ranking, at the fit"""

    def interval(self, a: int, b: int, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of rewards[a] - rewards[b], by the normal approximation."""
        from scipy.special import ndtri  # takes a fraction of a second to import

        direction = np.zeros(len(self.rewards))
        direction[a], direction[b] = 1, -1
        error = np.sqrt(direction @ self.covariance @ direction)
        half = ndtri(0.5 + level / 2) * error
        center = self.rewards[a] - self.rewards[b]
        return float(center - half), float(center + half)


def fit_bradley_terry(
    chosen: Sequence[int],
    rejected: Sequence[int],
    n: int,
    *,
    weights: Sequence[float] | None = None,
) -> BradleyTerryFit:
    """Maximum-likelihood rewards of `n` items from P comparisons, by Newton's method.

    Eq. 1 and 2 of Rafailov et al. 2023.

    Args:
        chosen: (P,) the item preferred in each comparison.
        rejected: (P,) the other item.
        n: number of items.
        weights: (P,) how much each comparison counts, 0 or more; by default 1. A tie is one half of
            a comparison each way.

    Raises:
        ValueError: there is no comparison, an index or a weight is wrong, or some items never lost
            to the others (or were never compared with them): then no finite rewards maximize the
            likelihood (Ford 1957).
    """
    chosen, rejected = integers("chosen", chosen), integers("rejected", rejected)
    n = integer("n", n)
    check_pairs(torch.from_numpy(chosen), torch.from_numpy(rejected), n)
    pairs = np.stack([chosen, rejected], 1)
    if weights is None:
        return _fit(pairs, n, np.ones(len(pairs)))

    # a comparison that does not count connects nothing
    weights = floats("weights", weights)
    if weights.shape != (len(pairs),) or not ((weights >= 0) & np.isfinite(weights)).all():
        raise ValueError(
            f"weights have the shape {weights.shape} and the smallest is "
            f"{weights.min(initial=0)}; give one finite number, 0 or more, for each of "
            f"{len(pairs)} comparisons"
        )
    return _fit(pairs[weights > 0], n, weights[weights > 0])


def fit_plackett_luce(rankings: Sequence[Sequence[int]], n: int) -> BradleyTerryFit:
    """Maximum-likelihood rewards of `n` items from R rankings, by Newton's method.

    Eq. 18 of Rafailov et al. 2023: the first is chosen among all K items of a ranking, the second
    among those that remain, and so on. K = 2 is `fit_bradley_terry`.

    Args:
        rankings: (R, K) items, best first; a ranking may hold any K >= 2 of the `n`.
        n: number of items.

    Raises:
        ValueError, TypeError: `rankings` is not of this shape, holds an item twice in a row or an
            index that is wrong, or has no finite estimate (see `fit_bradley_terry`).
    """
    rankings, n = integers("rankings", rankings, any_shape=True), integer("n", n)
    check_rankings(torch.from_numpy(rankings), n)
    return _fit(rankings, n, np.ones(len(rankings)))


def _fit(rankings: np.ndarray, n: int, weights: np.ndarray) -> BradleyTerryFit:
    """The fit of rankings (R, K) that have been checked, and count by `weights` (R,)."""
    from scipy.special import log_softmax

    _check_connected(rankings, n)

    # every place but the last is a choice among the items that remain, (C, n)
    placed = np.eye(n)[rankings]  # (R, K, n)
    remain = placed[:, ::-1].cumsum(1)[:, -1:0:-1].reshape(-1, n)
    winner = placed[:, :-1].reshape(-1, n)
    counts = np.repeat(weights, rankings.shape[1] - 1)  # (C,)

    def log_p(rewards: np.ndarray) -> np.ndarray:
        """(C, n) log-probability that each item is chosen."""
        return log_softmax(np.where(remain, rewards, -np.inf), axis=1)

    def nll_of(rewards: np.ndarray) -> float:
        return -(counts @ log_p(rewards)[winner > 0]) / weights.sum()

    rewards = np.zeros(n)
    nll = nll_of(rewards)
    while True:
        # Newton's step; adding 1 / n to the information keeps the mean reward at 0
        p = np.exp(log_p(rewards))
        information = np.diag(counts @ p) - (counts[:, None] * p).T @ p
        step = np.linalg.solve(information + 1 / n, counts @ (winner - p))

        if np.abs(step).max() < LAST_STEP:
            rewards = rewards + step
            covariance = np.linalg.inv(information + 1 / n) - 1 / n  # the pseudo-inverse
            return BradleyTerryFit(rewards, covariance, float(nll_of(rewards)))

        # halve the step until the likelihood does not fall, by more than rounding makes it
        while (lower := nll_of(rewards + step)) > nll + ROUNDING:
            step /= 2
        rewards, nll = rewards + step, lower


def _check_connected(rankings: np.ndarray, n: int) -> None:
    """Raise ValueError unless every item lost to every other, directly or by way of others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(rankings):
        raise ValueError(
            "there are no comparisons; give at least one pair of indices for every two groups "
            "of items"
        )

    # an item lost to the one that is placed before it, and so to all before
    chosen, rejected = rankings[:, :-1].ravel(), rankings[:, 1:].ravel()
    losses_to = coo_array((np.ones(len(chosen)), (rejected, chosen)), shape=(n, n))
    parts, part_of = connected_components(losses_to, directed=True, connection="strong")
    if parts > 1:
        groups = [np.flatnonzero(part_of == part).tolist() for part in range(parts)]
        raise ValueError(
            f"the items fall into {parts} groups, {groups}, of which one never lost to another or "
            "was never compared with it, so their distance has no finite estimate; add "
            "comparisons between them, or fit the groups separately"
        )
