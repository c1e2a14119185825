"""The Bradley-Terry model: rewards fitted to comparisons, with confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpo_lab.engine.arguments import integer, integers
from dpo_lab.losses import check_pairs

# Newton's method squares the error: after a step of this size the next would be of size 1e-14
LAST_STEP = 1e-7


@dataclass(frozen=True)
class BradleyTerryFit:
    """Rewards fitted to comparisons by maximum likelihood."""

    rewards: np.ndarray
    """(n,) nats, with mean 0, since comparisons say nothing about a common shift"""
    covariance: np.ndarray
    """(n, n) of the rewards: the pseudo-inverse of the Fisher information"""
    nll: float
    """nats per comparison, at the fit"""

    def interval(self, a: int, b: int, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of rewards[a] - rewards[b], by the normal approximation."""
        from scipy.special import ndtri  # takes a fraction of a second to import

        direction = np.zeros(len(self.rewards))
        direction[a], direction[b] = 1, -1
        error = np.sqrt(direction @ self.covariance @ direction)
        half = ndtri(0.5 + level / 2) * error
        center = self.rewards[a] - self.rewards[b]
        return float(center - half), float(center + half)


def fit_bradley_terry(chosen: Sequence[int], rejected: Sequence[int], n: int) -> BradleyTerryFit:
    """Maximum-likelihood rewards of `n` items from P comparisons, by Newton's method.

    Eq. 1 and 2 of Rafailov et al. 2023.

    Args:
        chosen: (P,) the item preferred in each comparison.
        rejected: (P,) the other item.
        n: number of items.

    Raises:
        ValueError: there is no comparison, an index is wrong, or some items never lost to the
            others (or were never compared with them): then no finite rewards maximize the
            likelihood (Ford 1957).
    """
    from scipy.special import expit, log_expit

    chosen, rejected = integers("chosen", chosen), integers("rejected", rejected)
    n = integer("n", n)
    _check_connected(chosen, rejected, n)

    # each row picks reward of chosen minus reward of rejected
    rows, design = np.arange(len(chosen)), np.zeros((len(chosen), n))
    design[rows, chosen] = 1
    design[rows, rejected] -= 1

    rewards, nll = np.zeros(n), np.log(2)
    while True:
        # Newton's step; adding 1 / n to the information keeps the mean reward at 0
        surprise = expit(-design @ rewards)  # the model's probability of the opposite label
        information = design.T @ (design * (surprise * (1 - surprise))[:, None])
        step = np.linalg.solve(information + 1 / n, design.T @ surprise)

        if np.abs(step).max() < LAST_STEP:
            rewards = rewards + step
            nll = -log_expit(design @ rewards).mean()
            covariance = np.linalg.pinv(information, hermitian=True)
            return BradleyTerryFit(rewards, covariance, float(nll))

        # halve the step until the likelihood does not fall
        while (lower := -log_expit(design @ (rewards + step)).mean()) > nll:
            step /= 2
        rewards, nll = rewards + step, lower


def _check_connected(chosen: np.ndarray, rejected: np.ndarray, n: int) -> None:
    """Raise ValueError unless every item lost to every other, directly or by way of others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(chosen):
        raise ValueError(
            "there are no comparisons; give at least one pair of indices for every two groups "
            "of items"
        )
    check_pairs(torch.from_numpy(chosen), torch.from_numpy(rejected), n)
    losses_to = coo_array((np.ones(len(chosen)), (rejected, chosen)), shape=(n, n))
    parts, part_of = connected_components(losses_to, directed=True, connection="strong")
    if parts > 1:
        groups = [np.flatnonzero(part_of == part).tolist() for part in range(parts)]
        raise ValueError(
            f"the items fall into {parts} groups, {groups}, of which one never lost to another or "
            "was never compared with it, so their distance has no finite estimate; add "
            "comparisons between them, or fit the groups separately"
        )
