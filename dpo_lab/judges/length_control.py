"""The win rate at equal lengths, by logistic regression on the difference in length."""

from collections.abc import Sequence

import numpy as np

from dpo_lab.engine.arguments import floats, integers
from dpo_lab.judges.intervals import NOTHING, Estimate, bootstrap, mean_by_prompt, means_of
from dpo_lab.judges.simple import sigmoid

# standard deviation of the normal prior of the length coefficient, in logits: it decides only where
# the longer answer wins always, or never
LENGTH_PRIOR = 5.0

# logits by which Newton's method moves at most in a step, and below which it has converged
LONGEST_STEP, LAST_STEP = 2.0, 1e-9


def length_controlled_rate(
    points: Sequence[float],
    gaps: Sequence[float],
    prompt_of: Sequence[int] | None = None,
    *,
    resamples: int = 2_000,
    seed: int = 0,
) -> Estimate:
    """The win rate that the judge would give if both answers had the same length.

    A logistic regression of the points on the difference in length,

        P(win) = sigma(theta + phi tanh(gap / std(gap))),

    of which sigma(theta) is the rate at gap 0. This is the model of length-controlled AlpacaEval
    (Dubois et al. 2024, https://arxiv.org/abs/2404.04475) without its term for the difficulty of an
    instruction, which takes many models to estimate, and with a weak normal prior on phi (standard
    deviation 5) in place of its cross-validated penalty. What comes with length counts as length:
    where longer answers are better, part of what makes them better is removed too.

    Args:
        points: (P,) what the answer got of each pair, in [0, 1].
        gaps: (P,) its length minus the baseline's, such as in characters.
        prompt_of: (P,) the prompt of each pair; by default each has its own. Prompts count equally.
        resamples, seed: of the bootstrap over prompts.

    Raises:
        ValueError, TypeError: the lists differ in length, or hold points outside [0, 1].
    """
    points, gaps = floats("points", points), floats("gaps", gaps)
    owner = np.arange(len(points)) if prompt_of is None else integers("prompt_of", prompt_of)
    if not len(points) == len(gaps) == len(owner):
        raise ValueError(
            f"{len(points)} points, {len(gaps)} gaps and {len(owner)} values in prompt_of; need "
            "one each"
        )
    if not ((points >= 0) & (points <= 1)).all() or not np.isfinite(gaps).all():
        raise ValueError("points must lie in [0, 1], and gaps must be finite")
    if not len(points):
        return NOTHING

    # the regressor, the same in all resamples; 0 where all lengths are equal
    spread = gaps.std(ddof=1) if len(gaps) > 1 else 0.0
    x = np.tanh(gaps / spread) if spread > 0 else np.zeros(len(gaps))
    _, place, pairs = np.unique(owner, return_inverse=True, return_counts=True)
    if np.ptp(points) == 0 or not x.any():
        return mean_by_prompt(means_of(points, place, len(pairs)), resamples, seed)

    def rate(weights: np.ndarray) -> np.ndarray:
        return _rate_at_equal_length(points, x, (weights / pairs)[:, place])

    return bootstrap(rate, len(pairs), resamples, seed)


def _rate_at_equal_length(points: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sigma(theta) for each row of weights (r, P): the maximum of the penalized likelihood."""
    total = weights.sum(1)
    mean = weights @ points / total
    clear = (mean > 0) & (mean < 1)  # otherwise theta is infinite, and the rate is the mean
    weights, precision = weights[clear], LENGTH_PRIOR**-2
    theta, phi = np.log(mean[clear] / (1 - mean[clear])), np.zeros(clear.sum())

    # Newton's method in two unknowns, for all rows at once
    while len(theta):
        p = sigmoid(theta[:, None] + phi[:, None] * x)
        slope, curve = weights * (points - p), weights * p * (1 - p)
        g, h = slope.sum(1), slope @ x - precision * phi
        aa, ab, bb = curve.sum(1), curve @ x, curve @ x**2 + precision
        scale = aa * bb - ab**2
        step = np.stack([bb * g - ab * h, aa * h - ab * g]) / scale
        step *= np.minimum(1, LONGEST_STEP / np.maximum(np.abs(step).max(0), LAST_STEP))
        theta, phi = theta + step[0], phi + step[1]
        if np.abs(step).max() < LAST_STEP:
            break

    rates = mean.copy()
    rates[clear] = sigmoid(theta)
    return rates
