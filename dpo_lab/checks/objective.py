"""Notebook 01's exercises: the KL divergence, the optimal policy, log Z, the implicit reward."""

import numpy as np

from dpo_lab.checks.calling import Inputs
from dpo_lab.checks.exercise import Exercise, Rung

Array = np.ndarray

# beta, far from 1, from its square and from its inverse
BETAS = (0.35, 0.45, 0.6, 0.7, 1.4, 1.7)


def distribution(rng: np.random.Generator, *shape: int) -> Array:
    """Probabilities over the last dimension, none of them near zero."""
    weights = rng.uniform(0.5, 3.0, shape)
    return weights / weights.sum(-1, keepdims=True)


# KL(p || q)


def kl(
    p: Array,
    q: Array,
    *,
    direction: str = "",
    weight: str = "",
    ratio: str = "",
    base: str = "",
    sign: str = "",
    reduce: str = "",
) -> Array | None:
    """sum p log(p / q) over the last dimension, (..., n) -> (...)."""

    if direction == "reversed":
        p, q = q, p
    log_ratio = {
        "": lambda: np.log(p / q),
        "no log": lambda: p / q,
        "difference": lambda: p - q,
        "log of difference": lambda: np.log(abs(p - q)),
        "p alone": lambda: np.log(p),
        "q alone": lambda: -np.log(q),
        "logs divided": lambda: np.log(p) / np.log(q),
        "squared": lambda: np.log(p / q) ** 2 / 2,
        "logs added": lambda: np.log(p * q),
        "q not logged": lambda: np.log(p) - q,
        "p not logged": lambda: p - np.log(q),
    }[ratio]()
    if weight == "each its own":
        # p log p - q log q
        if ratio:
            return None
        p, q, log_ratio, weight = np.ones_like(p), q, p * np.log(p) - q * np.log(q), ""
    weights = {"": p, "q": q, "none": np.ones_like(p), "mean of both": (p + q) / 2}[weight]

    # 0 log 0 is 0
    terms = np.where(weights == 0, 0.0, weights * log_ratio)
    terms = terms / {"": 1.0, "bits": np.log(2), "ten": np.log(10)}[base]
    terms = {"": terms, "absolute": abs(terms), "negative": -terms}[sign]
    return {
        "": lambda: terms.sum(-1),
        "mean": lambda: terms.mean(-1),
        "not summed": lambda: terms,
        "first dimension": lambda: terms.sum(0),
    }[reduce]()


# from the simplest inputs up
KL_LADDER = (
    Rung(
        "two outcomes",
        "the formula",
        {"p": np.array([0.5, 0.5]), "q": np.array([0.9, 0.1])},
    ),
    Rung(
        "unequal outcomes",
        "which of the two weights the mean",
        {"p": np.array([0.3, 0.7]), "q": np.array([0.6, 0.4])},
    ),
    Rung(
        "a batch of distributions",
        "the dimension of the sum",
        {
            "p": np.array([[0.5, 0.4, 0.1], [0.2, 0.1, 0.7]]),
            "q": np.array([[0.8, 0.1, 0.1], [0.3, 0.3, 0.4]]),
        },
    ),
)

KL = Exercise(
    "kl",
    kl,
    inputs=lambda rng, n: {"p": distribution(rng, n, n + 2), "q": distribution(rng, n, n + 2)},
    unit="distribution",
    extremes={"p": np.array([[1.0, 0.0], [0.25, 0.75]]), "q": np.array([[0.5, 0.5], [0.5, 0.5]])},
    extremes_name="0 log 0",
    extremes_hint="An outcome that p never gives adds nothing: the limit of p log p at 0 is 0. "
    "torch.xlogy and torch.where know such cases.",
    ladder=KL_LADDER,
)


# pi* of Eq. 4


def optimal_policy(
    reference: Array,
    reward: Array,
    beta: float,
    *,
    prior: str = "",
    scale: str = "",
    sign: str = "",
    link: str = "",
    normal: str = "",
) -> Array | None:
    """reference exp(reward / beta) / Z, (n,)."""

    tilt = reward * {"": 1 / beta, "times": beta, "forgotten": 1.0, "twice": 1 / beta**2}[scale]
    tilt = -tilt if sign == "negative" else tilt
    if prior == "not logged":
        # the softmax of reference + reward / beta
        if link:
            return None
        weights = np.exp(reference + tilt)
    else:
        factor = {"": np.exp(tilt), "no exp": tilt, "base two": 2**tilt, "sigmoid": _sigma(tilt)}
        weights = {
            "": lambda f: reference * f,
            "omitted": lambda f: f,
            "divided": lambda f: f / reference,
            "added": lambda f: reference + f,
            "squared": lambda f: reference**2 * f,
        }[prior](factor[link])
    return {
        "": lambda: weights / weights.sum(),
        "none": lambda: weights,
        "by the largest": lambda: weights / weights.max(),
        "divided by n": lambda: weights / len(weights),
        "softmax again": lambda: np.exp(weights) / np.exp(weights).sum(),
        "argmax": lambda: (np.arange(len(weights)) == weights.argmax()).astype(float),
    }[normal]()


def _sigma(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _policy_case(reference: list[float], reward: list[float], beta: float) -> Inputs:
    return {"reference": np.array(reference), "reward": np.array(reward), "beta": beta}


# from the simplest inputs up
OPTIMAL_POLICY_LADDER = (
    Rung(
        "a uniform reference and beta 1",
        "the exponential and the normalizer",
        _policy_case([0.5, 0.5], [1.0, 0.3], 1.0),
    ),
    Rung("another beta", "where beta stands", _policy_case([0.5, 0.5], [1.0, 0.3], 0.4)),
    Rung(
        "an uneven reference",
        "what you do with the reference",
        _policy_case([0.8, 0.2], [1.0, 0.3], 0.4),
    ),
    Rung(
        "three completions and a negative reward",
        "the sign, and the sum in the normalizer",
        _policy_case([0.5, 0.2, 0.3], [1.0, -0.6, 0.3], 0.4),
    ),
)

OPTIMAL_POLICY = Exercise(
    "optimal_policy",
    optimal_policy,
    inputs=lambda rng, n: {
        "reference": distribution(rng, n + 1),
        "reward": rng.uniform(0.2, 2.0, n + 1).round(3),
        # a smaller beta makes a softmax of the weights an argmax
        "beta": float(rng.choice(BETAS[2:])),
    },
    unit="completion",
    differentiable="reward",
    extremes=_policy_case([0.5, 0.3, 0.2], [2.0, 1.5, -3.0], 0.01),
    extremes_hint="exp(200) is infinite in float32. What may be subtracted from every exponent "
    "without changing the policy? torch.softmax does it.",
    ladder=OPTIMAL_POLICY_LADDER,
)


# log Z


def log_partition(
    reference: Array,
    reward: Array,
    beta: float,
    *,
    prior: str = "",
    scale: str = "",
    sign: str = "",
    form: str = "",
    factor: str = "",
    reduce: str = "",
) -> Array | None:
    """log sum reference exp(reward / beta) over the last dimension, (B, n) -> (B,) nats."""

    tilt = reward * {"": 1 / beta, "times": beta, "forgotten": 1.0, "twice": 1 / beta**2}[scale]
    tilt = -tilt if sign == "in the exponent" else tilt
    weights = {
        "": reference,
        "omitted": np.ones_like(reference),
        "uniform": np.full_like(reference, 1 / reference.shape[-1]),
        "not logged": np.exp(reference),
    }[prior]

    # something else than the log of a sum
    if form == "mean of rewards":
        # by Jensen's inequality below log Z
        found = (weights * tilt).sum(-1)
    elif form == "largest":
        found = tilt.max(-1)
    elif form == "largest term":
        found = (np.log(weights) + tilt).max(-1)
    elif form == "log inside":
        found = np.log(weights * np.exp(tilt)).sum(-1)
    else:
        terms = weights * np.exp(tilt)
        z = {
            "": lambda: terms.sum(-1),
            "mean": lambda: terms.mean(-1),
            "not summed": lambda: terms,
            "first dimension": lambda: terms.sum(0),
        }[reduce]()
        found = z if form == "no log" else np.log(z)
    if form and reduce:
        return None
    return {"": found, "beta": beta * found, "negative": -found}[factor]


def _partition_case(reference: list, reward: list, beta: float) -> Inputs:
    return {"reference": np.array(reference), "reward": np.array(reward), "beta": beta}


# from the simplest inputs up
LOG_PARTITION_LADDER = (
    Rung(
        "a uniform reference and beta 1",
        "the sum and the logarithm",
        _partition_case([[0.5, 0.5]], [[1.0, 0.3]], 1.0),
    ),
    Rung("another beta", "where beta stands", _partition_case([[0.5, 0.5]], [[1.0, 0.3]], 0.4)),
    Rung(
        "an uneven reference",
        "what you do with the reference",
        _partition_case([[0.8, 0.2]], [[1.0, 0.3]], 0.4),
    ),
    Rung(
        "two prompts",
        "the dimension of the sum",
        _partition_case([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]], [[1, 0.2, 0.3], [0, 2, 1.1]], 0.4),
    ),
)

LOG_PARTITION = Exercise(
    "log_partition",
    log_partition,
    inputs=lambda rng, n: {
        "reference": distribution(rng, n, n + 1),
        "reward": rng.uniform(0.2, 2.0, (n, n + 1)).round(3),
        "beta": float(rng.choice(BETAS)),
    },
    unit="prompt",
    differentiable="reward",
    extremes=_partition_case([[0.5, 0.3, 0.2]], [[2.0, 1.5, -3.0]], 0.01),
    extremes_hint="exp(200) is infinite in float32. torch.logsumexp takes the largest exponent "
    "out of the sum first; log(reference) can stand in the exponent.",
    ladder=LOG_PARTITION_LADDER,
)


# the implicit reward of Eq. 5, without beta log Z


def implicit_reward(
    policy: Array,
    reference: Array,
    beta: float,
    *,
    ratio: str = "",
    scale: str = "",
    base: str = "",
    shift: str = "",
) -> Array:
    """beta log(policy / reference), (n,) in units of the reward."""

    log_ratio = {
        "": lambda: np.log(policy / reference),
        "upside down": lambda: np.log(reference / policy),
        "not logged": lambda: policy / reference,
        "difference": lambda: policy - reference,
        "omitted": lambda: np.log(policy),
        "added": lambda: np.log(policy * reference),
        "logs divided": lambda: np.log(policy) / np.log(reference),
        "policy omitted": lambda: -np.log(reference),
        "weighted": lambda: policy * np.log(policy / reference),
    }[ratio]()
    log_ratio = log_ratio / np.log(2) if base == "bits" else log_ratio
    factor = {"": beta, "forgotten": 1.0, "divided": 1 / beta, "twice": beta**2}[scale]
    value = factor * log_ratio
    return {
        "": lambda: value,
        "centered": lambda: value - value.mean(),
        "from zero": lambda: value - value.min(),
        "exponentiated": lambda: np.exp(value),
        "absolute": lambda: abs(value),
    }[shift]()


def _reward_case(policy: list[float], reference: list[float], beta: float) -> Inputs:
    return {"policy": np.array(policy), "reference": np.array(reference), "beta": beta}


# from the simplest inputs up
IMPLICIT_REWARD_LADDER = (
    Rung(
        "a uniform reference and beta 1",
        "the logarithm of the ratio",
        _reward_case([0.7, 0.3], [0.5, 0.5], 1.0),
    ),
    Rung("another beta", "where beta stands", _reward_case([0.7, 0.3], [0.5, 0.5], 0.4)),
    Rung(
        "an uneven reference",
        "what you do with the reference",
        _reward_case([0.7, 0.3], [0.2, 0.8], 0.4),
    ),
    Rung(
        "three completions",
        "whether one completion changes the others",
        _reward_case([0.5, 0.3, 0.2], [0.2, 0.7, 0.1], 0.4),
    ),
)

IMPLICIT_REWARD = Exercise(
    "implicit_reward",
    implicit_reward,
    inputs=lambda rng, n: {
        "policy": distribution(rng, n + 1),
        "reference": distribution(rng, n + 1),
        "beta": float(rng.choice(BETAS)),
    },
    unit="completion",
    differentiable="policy",
    ladder=IMPLICIT_REWARD_LADDER,
)

EXERCISES = (KL, OPTIMAL_POLICY, LOG_PARTITION, IMPLICIT_REWARD)
