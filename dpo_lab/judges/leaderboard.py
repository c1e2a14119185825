"""Bradley-Terry ratings of many models from pairwise verdicts, with intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dpo_lab.engine.arguments import checked, floats, integers, number
from dpo_lab.judges.intervals import LEVEL, Estimate, normal_quantile
from dpo_lab.judges.rates import Order, WinRate, win_rates
from dpo_lab.judges.simple import sigmoid
from dpo_lab.judges.verdicts import Judge
from dpo_lab.theory.bradley_terry import fit_bradley_terry


@dataclass(frozen=True, eq=False)
class ModelRatings:
    """Ratings of n models in nats: model i beats j with probability sigma(r_i - r_j)."""

    names: tuple[str, ...]
    """(n,)"""
    ratings: np.ndarray
    """(n,) nats, with mean 0"""
    covariance: np.ndarray
    """(n, n), clustered by prompt"""

    def rating(self, name: str, *, level: float = LEVEL) -> Estimate:
        """A model's rating against the mean of all, in nats."""
        direction = np.zeros(len(self.names))
        direction[self._place(name)] = 1
        return self._estimate(direction - 1 / len(self.names), level)

    def difference(self, one: str, other: str, *, level: float = LEVEL) -> Estimate:
        """Rating of one model minus that of another, in nats."""
        direction = np.zeros(len(self.names))
        direction[self._place(one)] += 1
        direction[self._place(other)] -= 1
        return self._estimate(direction, level)

    def win_rate(self, one: str, other: str, *, level: float = LEVEL) -> Estimate:
        """Probability that one model beats another: sigma of the difference."""
        gap = self.difference(one, other, level=level)
        return Estimate(*(float(sigmoid(x)) for x in (gap.value, gap.low, gap.high)))

    def ranked(self) -> list[str]:
        """The names, best first."""
        return [self.names[i] for i in np.argsort(-self.ratings, kind="stable")]

    def _place(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"there is no model {name!r}; there are {', '.join(self.names)}")
        return self.names.index(name)

    def _estimate(self, direction: np.ndarray, level: float) -> Estimate:
        value = float(direction @ self.ratings)
        error = math.sqrt(max(direction @ self.covariance @ direction, 0.0))
        half = normal_quantile(level) * error
        return Estimate(value, value - half, value + half)


@checked
def ratings_of_models(
    judge: Judge,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    *,
    order: Order = "swapped",
    prior: float = 0.0,
    seed: int = 0,
) -> tuple[ModelRatings, dict[tuple[str, str], WinRate]]:
    """Ratings of models from their answers to the same prompts, every two models compared.

    Args:
        judge: any function of (prompts, answers A, answers B); see `verdicts.Judge`.
        prompts: (M,) texts.
        answers: by model, (M,) texts or lists of texts.
        order: as in `win_rates`.
        prior: as in `fit_ratings`.
        seed: as in `win_rates`.

    Returns:
        The ratings, and the win rate of each pair of models by their names.

    Raises:
        ValueError, TypeError: as `win_rates` and `fit_ratings`.
    """
    names = list(answers)
    if len(names) < 2:
        raise ValueError(f"there are answers of {len(names)} models; ratings take at least two")
    rates = {
        (one, other): win_rates(
            judge, prompts, answers[one], answers[other], order=order, seed=seed
        )
        for one, other in combinations(names, 2)
    }
    first = [one for one, _ in rates for _ in prompts]
    second = [other for _, other in rates for _ in prompts]
    points = [p for rate in rates.values() for p in rate.points]
    owners = [i for _ in rates for i in range(len(prompts))]
    return fit_ratings(first, second, points, prompt_of=owners, prior=prior), rates


def fit_ratings(
    first: Sequence[str],
    second: Sequence[str],
    points: Sequence[float],
    *,
    prompt_of: Sequence[int] | None = None,
    prior: float = 0.0,
) -> ModelRatings:
    """Ratings of models from P comparisons, by `fit_bradley_terry`.

    A comparison in which the first model gets a fraction of the points counts as that fraction of a
    win and as the rest of a loss; so a tie is half a win for each. Intervals are clustered by
    prompt (a sandwich covariance), since comparisons on the same prompt need not be independent.

    Args:
        first: (P,) name of one model of each comparison.
        second: (P,) name of the other.
        points: (P,) what the first gets, in [0, 1]: 1 for a win, 1/2 for a tie; NaN where there is
            no verdict, which is left out. `Verdicts.points` and `WinRate.points` are such numbers.
        prompt_of: (P,) the prompt of each comparison; by default each has its own.
        prior: ties between every two models that are added, which keep the rating of a model
            without a defeat finite and pull all ratings together. 1 is a mild one.

    Raises:
        ValueError, TypeError: lists that do not go together, or points outside [0, 1]; or a model
            won or lost all its comparisons, or some models were never compared, and there is no
            prior: then no finite rating maximizes the likelihood.
    """
    points, prior = floats("points", points), number("prior", prior)
    owner = np.arange(len(points)) if prompt_of is None else integers("prompt_of", prompt_of)
    _check_comparisons(first, second, points, owner, prior)

    # names as indices, without the missing
    names = tuple(dict.fromkeys([*first, *second]))
    place, there = {name: i for i, name in enumerate(names)}, ~np.isnan(points)
    a = np.array([place[name] for name in first])[there]
    b = np.array([place[name] for name in second])[there]
    points, n = points[there], len(names)

    # a win and a loss of each comparison, and the prior's ties
    i, j = np.triu_indices(n, 1)
    half = np.full(len(i), prior / 2)
    chosen, rejected = np.concatenate([a, b, i, j]), np.concatenate([b, a, j, i])
    weights = np.concatenate([points, 1 - points, half, half])
    counts = weights > 0
    _check_finite(names, chosen[counts], rejected[counts])
    fit = fit_bradley_terry(chosen, rejected, n, weights=weights)

    # the sandwich: the inverse information around the prompts' scores
    gap = points - sigmoid(fit.rewards[a] - fit.rewards[b])
    _, prompt = np.unique(owner[there], return_inverse=True)
    prompts = prompt.max() + 1
    scores = np.zeros((prompts, n))
    np.add.at(scores, (prompt, a), gap)
    np.add.at(scores, (prompt, b), -gap)
    scale = prompts / (prompts - 1) if prompts > 1 else np.nan
    covariance = scale * fit.covariance @ (scores.T @ scores) @ fit.covariance
    return ModelRatings(names, fit.rewards, covariance)


def _check_comparisons(
    first: Sequence[str],
    second: Sequence[str],
    points: np.ndarray,
    owner: np.ndarray,
    prior: float,
) -> None:
    """Raise ValueError for what cannot be fitted, by name."""
    if not len(first) == len(second) == len(points) == len(owner):
        raise ValueError(
            f"{len(first)} names in first, {len(second)} in second, {len(points)} points and "
            f"{len(owner)} values in prompt_of; need one each per comparison"
        )
    same = [i for i, (one, other) in enumerate(zip(first, second)) if one == other]
    if same:
        raise ValueError(
            f"comparison {same[0]} has {first[same[0]]!r} against itself; leave it out"
        )
    if ((points < 0) | (points > 1)).any():
        raise ValueError("points must lie in [0, 1], or be NaN where there is no verdict")
    if np.isnan(points).all():
        raise ValueError("no comparison has a verdict; there is nothing to rate models by")
    if not 0 <= prior < math.inf:
        raise ValueError(f"prior is {prior}; it must be a number of ties, 0 or more")


def _check_finite(names: tuple[str, ...], chosen: np.ndarray, rejected: np.ndarray) -> None:
    """Raise ValueError unless every model lost to every other, directly or by way of others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(names)
    losses_to = coo_array((np.ones(len(chosen)), (rejected, chosen)), shape=(n, n))
    parts, part_of = connected_components(losses_to, directed=True, connection="strong")
    if parts > 1:
        groups = [[names[i] for i in np.flatnonzero(part_of == part)] for part in range(parts)]
        raise ValueError(
            f"the models fall into {parts} groups, {groups}, of which one never lost to another or "
            "was never compared with it, so their distance has no finite estimate; judge more "
            "prompts, or give prior=1, which adds one tie between every two models"
        )
