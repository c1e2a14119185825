"""The Bradley-Terry model: rewards fitted to comparisons, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit
from scipy.stats import norm

from dpo_lab.engine.arguments import integer, integers
from dpo_lab.losses import check_pairs


@dataclass(frozen=True)
class BradleyTerryFit:
    """Rewards fitted to comparisons by maximum likelihood."""

    rewards: np.ndarray  # (n,) nats, with mean 0: comparisons say nothing about a common shift
    covariance: (
        np.ndarray
    )  # (n, n) of the estimates, the inverse of the information on vectors of mean 0
    nll: float  # nats a comparison, at the fit

    def interval(self, a: int, b: int, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of rewards[a] - rewards[b], by the normal approximation."""
        direction = np.zeros(len(self.rewards))
        direction[a], direction[b] = 1, -1
        half = norm.ppf(0.5 + level / 2) * np.sqrt(direction @ self.covariance @ direction)
        center = self.rewards[a] - self.rewards[b]
        return float(center - half), float(center + half)


def fit_bradley_terry(chosen: Sequence[int], rejected: Sequence[int], n: int) -> BradleyTerryFit:
    """Maximum-likelihood rewards of `n` items from P comparisons (Eq. 1-2 of Rafailov et al. 2023), by Newton's method.

    Raises:
        ValueError: there is no comparison, an index is wrong, or some items never lost to the others (or were never
            compared with them): then no finite rewards are most likely (Ford 1957).
    """
    chosen, rejected, n = (
        integers("chosen", chosen),
        integers("rejected", rejected),
        integer("n", n),
    )
    if not len(chosen):
        raise ValueError(
            "there are no comparisons; give at least one pair of indices for every two groups of items"
        )
    check_pairs(torch.from_numpy(chosen), torch.from_numpy(rejected), n)
    losses_to = coo_array((np.ones(len(chosen)), (rejected, chosen)), shape=(n, n))
    parts, part_of = connected_components(losses_to, directed=True, connection="strong")
    if parts > 1:
        groups = [np.flatnonzero(part_of == part).tolist() for part in range(parts)]
        raise ValueError(
            f"the items fall into {parts} groups, {groups}, of which one never lost to another or was never compared with it, so "
            "their distance has no finite estimate; add comparisons between them, or fit the groups apart"
        )
    difference = np.zeros((len(chosen), n))
    difference[np.arange(len(chosen)), chosen] = 1
    difference[np.arange(len(chosen)), rejected] -= 1
    rewards, nll = np.zeros(n), np.log(2)
    while True:
        lost = expit(-difference @ rewards)  # the chance that the model gives to the other outcome
        information = difference.T @ (difference * (lost * (1 - lost))[:, None])
        step = np.linalg.solve(
            information + 1 / n, difference.T @ lost
        )  # 1 / n keeps the mean at 0
        if (
            np.abs(step).max() < 1e-7
        ):  # Newton's error is squared: the step after this one would be of 1e-14
            rewards = rewards + step
            nll = -log_expit(difference @ rewards).mean()
            return BradleyTerryFit(rewards, np.linalg.pinv(information, hermitian=True), float(nll))
        while (lower := -log_expit(difference @ (rewards + step)).mean()) > nll:
            step /= 2
        rewards, nll = rewards + step, lower
