"""What a number of prompts can say: intervals by resampling prompts, their width, and power."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dpo_lab.engine.arguments import integer, number

# of every interval, unless another level is asked for
LEVEL = 0.95

# resamples whose weights are in memory at a time
CHUNK = 250


@dataclass(frozen=True)
class Estimate:
    """An estimate with the ends of its confidence interval; NaN where nothing can be said."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def __contains__(self, value: float) -> bool:
        """Whether the interval holds `value`."""
        return self.low <= value <= self.high


NOTHING = Estimate(math.nan, math.nan, math.nan)


def wilson(fraction: float, n: float, level: float = LEVEL) -> Estimate:
    """Wilson's score interval of a fraction of `n` independent outcomes.

    Wilson 1927. It has a width where the fraction is 0 or 1 too.
    """
    return score_interval(fraction, n, normal_quantile(level))


def score_interval(fraction: float, n: float, z: float) -> Estimate:
    """Wilson's interval with a quantile of the caller's."""
    scale = 1 + z**2 / n
    center = (fraction + z**2 / (2 * n)) / scale
    half = z * math.sqrt(fraction * (1 - fraction) / n + (z / (2 * n)) ** 2) / scale
    return Estimate(fraction, float(max(center - half, 0.0)), float(min(center + half, 1.0)))


def constant(value: float, n: int, z: float, lowest: float = 0.0) -> Estimate:
    """The interval of a mean where all `n` numbers, which lie in [lowest, 1], are the same.

    A fraction of them could have been others, up to the upper end of Wilson's interval for 0 of
    `n`; the ends are where those had been the lowest, or 1. For 0 and 1 that is Wilson's interval.
    """
    other = score_interval(0.0, n, z).high
    return Estimate(value, value - other * (value - lowest), value + other * (1 - value))


def normal_quantile(level: float) -> float:
    """The z of a two-sided interval at this level.

    Raises:
        ValueError: the level is not between 0 and 1.
    """
    from scipy.special import ndtri  # takes a fraction of a second to import

    level = number("level", level)
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1, as 0.95 does")
    return float(ndtri(0.5 + level / 2))


# how much n prompts can say


def half_width(n: int, rate: float = 0.5, *, level: float = LEVEL) -> float:
    """Half the width of Wilson's interval of a win rate that `n` prompts give.

    One verdict per prompt, without ties: ties, and both orders of a pair, make it narrower.

    Raises:
        ValueError, TypeError: no prompt, or a rate outside [0, 1].
    """
    found = wilson(_checked_rate(rate), _checked_n(n), level)
    return (found.high - found.low) / 2


def power(n: int, rate: float, *, level: float = LEVEL) -> float:
    """Probability that Wilson's interval from `n` prompts excludes 1/2 where the true rate is
    `rate`: exact, summed over the binomial distribution of the wins.

    Raises:
        ValueError, TypeError: no prompt, or a rate outside [0, 1].
    """
    from scipy.stats import binom

    n, rate, z = _checked_n(n), _checked_rate(rate), normal_quantile(level)
    wins = np.arange(n + 1)
    # the interval excludes 1/2 where the score test rejects it
    rejects = np.abs(wins / n - 0.5) > z * 0.5 / math.sqrt(n)
    return float(binom.pmf(wins, n, rate)[rejects].sum())


def prompts_needed(rate: float, *, power: float = 0.8, level: float = LEVEL) -> int:
    """Prompts with which a true win rate of `rate` is told from 1/2 with this power.

    By the normal approximation of the score test, one verdict per prompt.

    Raises:
        ValueError, TypeError: the rate is 1/2 or outside [0, 1], or the power outside (0, 1).
    """
    from scipy.special import ndtri

    rate, power = _checked_rate(rate), number("power", power)
    if rate == 0.5:
        raise ValueError("rate is 0.5; no number of prompts tells it from one half")
    if not 0 < power < 1:
        raise ValueError(f"power is {power}; it must lie between 0 and 1, as 0.8 does")
    z, reach = normal_quantile(level), ndtri(power) * math.sqrt(rate * (1 - rate))
    return math.ceil(((z / 2 + reach) / (rate - 0.5)) ** 2)


def _checked_n(n: int) -> int:
    n = integer("n", n)
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1 prompt")
    return n


def _checked_rate(rate: float) -> float:
    rate = number("rate", rate)
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}; a win rate lies in [0, 1]")
    return rate


# the bootstrap over prompts


def resampled_weights(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `n` prompts is drawn in each resample, (r, n) for a chunk of resamples."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, CHUNK):
        rows = min(CHUNK, resamples - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, resamples: int, seed: int
) -> Estimate:
    """A statistic of `n` prompts, with its percentile interval over resampled prompts.

    Efron 1979. What belongs to one prompt stays together.

    Args:
        statistic: gives (r,) values for weights (r, n), how often each prompt counts; NaN where it
            is not defined.
        resamples: number of resamples.
        seed: of the resampling.
    """
    value = float(statistic(np.ones((1, n)))[0])
    drawn = np.concatenate([statistic(w) for w in resampled_weights(n, resamples, seed)])
    defined = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(defined):
        return NOTHING
    if n == 1:
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def mean_by_prompt(points: np.ndarray, resamples: int, seed: int) -> Estimate:
    """The mean of a number per prompt, (M,), with its bootstrap interval.

    Where all prompts have the same number, resampling says nothing: see `constant`.
    """
    if not len(points):
        return NOTHING
    if np.ptp(points) == 0:
        return constant(float(points[0]), len(points), normal_quantile(LEVEL))
    return bootstrap(lambda w: w @ points / w.sum(1), len(points), resamples, seed)


def difference_by_prompt(gaps: np.ndarray, resamples: int, seed: int) -> Estimate:
    """The mean of a difference per prompt, (M,), with its bootstrap interval."""
    if not len(gaps):
        return NOTHING
    if np.ptp(gaps) == 0:
        return constant(float(gaps[0]), len(gaps), normal_quantile(LEVEL), lowest=-1.0)
    return bootstrap(lambda w: w @ gaps / w.sum(1), len(gaps), resamples, seed)


def means_of(values: np.ndarray, owner: np.ndarray, n: int) -> np.ndarray:
    """(n,) mean of the values that each of n has; NaN where one has none."""
    count = np.bincount(owner, minlength=n)
    total = np.bincount(owner, values, n)
    return np.divide(total, count, out=np.full(n, np.nan), where=count > 0)
