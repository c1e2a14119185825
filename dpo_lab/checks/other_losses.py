"""Notebook 03's exercises on other losses of pairs: IPO, and labels that are wrong sometimes."""

import numpy as np

from dpo_lab.checks.calling import Inputs
from dpo_lab.checks.dpo import LADDER, completions, margins_of
from dpo_lab.checks.exercise import Exercise, Rung
from dpo_lab.checks.preferences import indexed, sigma

Array = np.ndarray


# IPO


def ipo_loss(
    policy_logps: Array,
    reference_logps: Array,
    chosen: Array,
    rejected: Array,
    beta: float,
    *,
    reference: str = "",
    pair: str = "",
    index: str = "",
    target: str = "",
    scale: str = "",
    link: str = "",
    sign: str = "",
) -> Array | None:
    """(difference of log-ratios - 1 / (2 beta))^2, (P,)."""

    chosen, rejected = indexed(chosen, rejected, len(policy_logps), index)
    places = (1.0, 1.0)
    h = margins_of(policy_logps, reference_logps, chosen, rejected, places, reference, pair)
    if h is None:
        return None
    h = h * {"": 1.0, "beta": beta, "over beta": 1 / beta}[scale]
    goal = {
        "": 1 / (2 * beta),
        "one over beta": 1 / beta,
        "half beta": beta / 2,
        "two beta": 2 * beta,
        "zero": 0.0,
        "half": 0.5,
    }[target]
    error = h - goal
    value = {
        "": lambda: error**2,
        "absolute": lambda: abs(error),
        "not squared": lambda: error,
        "halved": lambda: error**2 / 2,
        "log sigma": lambda: np.logaddexp(0, -error),
        "one-sided": lambda: np.maximum(0, -error) ** 2,
        "root": lambda: np.sqrt(1 + error**2),
    }[link]()
    return -value if sign == "negative" else value


IPO_LOSS = Exercise(
    "ipo_loss",
    ipo_loss,
    inputs=completions,
    unit="pair",
    differentiable="policy_logps",
    ladder=LADDER,
)


# labels that are wrong with probability e


def smoothed_loss(
    margins: Array,
    e: float,
    *,
    mix: str = "",
    link: str = "",
    pair: str = "",
    sign: str = "",
    scale: str = "",
) -> Array:
    """-(1 - e) log sigma(margin) - e log sigma(-margin), (P,) nats: cDPO."""

    m = -margins if pair == "swapped" else margins
    right, flipped = {
        "": (np.logaddexp(0, -m), np.logaddexp(0, m)),
        "no log": (-sigma(m), -sigma(-m)),
        "hinge": (np.maximum(0, 1 - m), np.maximum(0, 1 + m)),
        "bits": (np.logaddexp(0, -m) / np.log(2), np.logaddexp(0, m) / np.log(2)),
        "margins": (-m, m),
    }[link]

    # how the two are mixed
    value = {
        "": lambda: (1 - e) * right + e * flipped,
        "robust": lambda: ((1 - e) * right - e * flipped) / (1 - 2 * e),
        "subtracted": lambda: (1 - e) * right - e * flipped,
        "second lost": lambda: (1 - e) * right,
        "first lost": lambda: e * flipped,
        "e on both": lambda: e * right + e * flipped,
        "second not weighted": lambda: (1 - e) * right + flipped,
        "not weighted": lambda: right + flipped,
        "first not weighted": lambda: right + e * flipped,
        "twice": lambda: (1 - 2 * e * (1 - e)) * right + 2 * e * (1 - e) * flipped,
        "double": lambda: (1 - 2 * e) * right + 2 * e * flipped,
        "halved": lambda: (1 - e / 2) * right + e / 2 * flipped,
        "inside": lambda: -np.log((1 - e) * sigma(m) + e * sigma(-m)),
        "on the margin": lambda: np.logaddexp(0, -(1 - 2 * e) * m),
        "ignored": lambda: right,
    }[mix]()
    value = value / (1 - 2 * e) if scale == "divided" else value
    return -value if sign == "negative" else value


def _smoothed_case(margins: list[float], e: float) -> Inputs:
    return {"margins": np.array(margins), "e": e}


# from the simplest inputs up
SMOOTHED_LOSS_LADDER = (
    Rung("labels without error", "the loss of a right label", _smoothed_case([0.8], 0.0)),
    Rung("a negative margin", "the sign", _smoothed_case([-0.8], 0.0)),
    Rung("labels with error", "the term of the flipped label", _smoothed_case([0.8], 0.3)),
    Rung("several pairs", "whether pairs are kept apart", _smoothed_case([0.8, -1.1, 2], 0.3)),
)

SMOOTHED_LOSS = Exercise(
    "smoothed_loss",
    smoothed_loss,
    inputs=lambda rng, p: {
        "margins": rng.permutation([*rng.uniform(0.4, 3, p), *-rng.uniform(0.4, 3, p - 1)]).round(
            3
        ),
        "e": float(rng.choice([0.12, 0.17, 0.23, 0.31])),
    },
    unit="pair",
    differentiable="margins",
    extremes=_smoothed_case([900.0, -800.0, 3.0], 0.2),
    extremes_hint="exp overflows there, and log meets 0. torch.nn.functional has log sigma as one "
    "stable function.",
    ladder=SMOOTHED_LOSS_LADDER,
)

EXERCISES = (IPO_LOSS, SMOOTHED_LOSS)
