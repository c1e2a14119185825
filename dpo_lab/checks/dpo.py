"""Notebook 03's exercises on DPO's loss: the loss, its gradient weights and its gradient."""

import numpy as np

from dpo_lab.checks.calling import Inputs
from dpo_lab.checks.exercise import Exercise, Rung
from dpo_lab.checks.objective import BETAS
from dpo_lab.checks.preferences import indexed, pairs_of, sigma

Array = np.ndarray

# beta on the policy's log-probs, on the reference's, and in front of the loss
PLACES = {
    "": lambda beta: (beta, beta, 1),
    "forgotten": lambda beta: (1, 1, 1),
    "twice": lambda beta: (beta**2, beta**2, 1),
    "divides": lambda beta: (1 / beta, 1 / beta, 1),
    "outside": lambda beta: (1, 1, beta),
    "both": lambda beta: (beta, beta, beta),
    "policy alone": lambda beta: (beta, 1, 1),
    "reference alone": lambda beta: (1, beta, 1),
}


def margins_of(
    policy: Array,
    other: Array,
    chosen: Array,
    rejected: Array,
    places: tuple[float, float],
    reference: str,
    pair: str,
) -> Array | None:
    """The margin of each pair, (P,), or what the mistakes `reference` and `pair` make of it."""

    on_policy, on_reference = places
    if reference in ("divided", "probabilities"):
        if on_policy != on_reference:
            return None
        ratio = policy / other if reference == "divided" else np.exp(policy - other)
        w, l = on_policy * ratio[chosen], on_policy * ratio[rejected]  # noqa: E741
    else:
        # a log pi + b log pi_ref, of each side
        a, b = {"omitted": (1, 0), "added": (1, 1), "only": (0, -1)}.get(reference, (1, -1))
        on_chosen = b * on_reference * (reference != "chosen lacks it")
        on_rejected = b * on_reference * (reference != "rejected lacks it")
        w = a * on_policy * policy[chosen] + on_chosen * other[chosen]
        l = a * on_policy * policy[rejected] + on_rejected * other[rejected]  # noqa: E741
    return {
        "": lambda: w - l,
        "swapped": lambda: l - w,
        "added": lambda: w + l,
        "chosen alone": lambda: w,
        "rejected alone": lambda: -l,
        "divided": lambda: w / l,
        "absolute": lambda: abs(w - l),
    }[pair]()


# -log sigma(margin), Eq. 7


def dpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    chosen: Array,
    rejected: Array,
    beta: float,
    *,
    reference: str = "",
    pair: str = "",
    index: str = "",
    place: str = "",
    link: str = "",
    sign: str = "",
) -> Array | None:
    """-log sigma(beta (log-ratio of chosen - log-ratio of rejected)), (P,) nats."""

    chosen, rejected = indexed(chosen, rejected, len(policy_logps), index)
    *places, outside = PLACES[place](beta)
    m = margins_of(policy_logps, reference_logps, chosen, rejected, places, reference, pair)
    if m is None:
        return None
    value = {
        "": lambda: np.logaddexp(0, -m),
        "sigmoid": lambda: -sigma(m),
        "none": lambda: -m,
        "tanh": lambda: -np.tanh(m),
        "exp": lambda: np.exp(-m),
        "hinge": lambda: np.maximum(0, 1 - m),
        "ipo": lambda: (m / beta - 1 / (2 * beta)) ** 2,
        "squared": lambda: (1 - sigma(m)) ** 2,
        "bits": lambda: np.logaddexp(0, -m) / np.log(2),
        "twice": lambda: np.logaddexp(0, -sigma(m)),
    }[link]()
    return outside * (-value if sign == "negative" else value)


def completions(rng: np.random.Generator, p: int) -> Inputs:
    """Log-probs of N = 2P + 1 completions, P pairs, and a beta.

    One margin is above 1, and one is negative.
    """
    n = 2 * p + 1
    while True:
        chosen, rejected = pairs_of(rng, n, p).T
        policy, reference = -rng.uniform(0.3, 3.5, (2, n)).round(3)
        beta = float(rng.choice(BETAS))
        rewards = beta * (policy - reference)
        margins = rewards[chosen] - rewards[rejected]
        if margins.min() < -0.2 and margins.max() > 1.05 and abs(rewards).min() > 0.02:
            break
    logps = {"policy_logps": policy, "reference_logps": reference}
    return {**logps, "chosen": chosen, "rejected": rejected, "beta": beta}


def case(
    policy: list[float], reference: list[float], chosen: list[int], rejected: list[int], beta: float
) -> Inputs:
    """Inputs written out."""
    return {
        "policy_logps": np.array(policy),
        "reference_logps": np.array(reference),
        "chosen": np.array(chosen),
        "rejected": np.array(rejected),
        "beta": beta,
    }


# five log-probs of policy and reference, for completions that are in several pairs
SHARED = [-1.31, -2.07, -0.63, -3.42, -1.78], [-1.94, -1.22, -1.47, -2.53, -2.66]

# six, for three pairs that share nothing
APART = [-1.3, -0.6, -2.2, -2.1, -3.4, -1.7], [-1.9, -1.4, -2.0, -1.2, -2.5, -2.6]

# from the simplest inputs up
LADDER = (
    Rung(
        "one pair, beta 1 and no reference",
        "the sigmoid, the logarithm and the sign",
        case([-1.3, -2.1], [0.0, 0.0], [0], [1], 1.0),
    ),
    Rung("another beta", "where beta stands", case([-1.3, -2.1], [0.0, 0.0], [0], [1], 0.7)),
    Rung(
        "a reference",
        "what you do with reference_logps",
        case([-1.3, -2.1], [-1.9, -1.2], [0], [1], 0.7),
    ),
    Rung(
        "a chosen completion that is not the first",
        "how you use the indices",
        case([-2.1, -1.3], [-1.2, -1.9], [1], [0], 0.7),
    ),
    Rung(
        "three pairs",
        "what one pair has to do with the others",
        case(*APART, [0, 1, 2], [3, 4, 5], 0.7),
    ),
    Rung(
        "completions in several pairs",
        "how you use the indices",
        case(*SHARED, [2, 0, 4, 2], [1, 3, 0, 4], 0.7),
    ),
)

EXTREMES = case(
    [-10.0, -900.0, -40.0, -3.0], [-800.0, -20.0, -42.0, -2500.0], [0, 1, 2, 3], [1, 0, 1, 1], 1.0
)

DPO_LOSS = Exercise(
    "dpo_loss",
    dpo_loss,
    inputs=completions,
    unit="pair",
    differentiable="policy_logps",
    extremes=EXTREMES,
    extremes_hint="exp overflows there, and log meets 0. torch.nn.functional has -log sigma as one "
    "stable function.",
    ladder=LADDER,
)


# sigma(-margin), Section 4


def gradient_weights(
    policy_logps: Array,
    reference_logps: Array,
    chosen: Array,
    rejected: Array,
    beta: float,
    *,
    reference: str = "",
    pair: str = "",
    index: str = "",
    place: str = "",
    link: str = "",
    sign: str = "",
) -> Array | None:
    """How much the gradient weighs each pair, (P,)."""

    chosen, rejected = indexed(chosen, rejected, len(policy_logps), index)
    *places, outside = PLACES[place](beta)
    m = margins_of(policy_logps, reference_logps, chosen, rejected, places, reference, pair)
    if m is None:
        return None
    weight = {
        "": lambda: sigma(-m),
        "slope": lambda: sigma(m) * sigma(-m),
        "logged": lambda: np.logaddexp(0, m),
        "squared": lambda: sigma(-m) ** 2,
        "exp": lambda: np.exp(-m),
        "tanh": lambda: np.tanh(-m),
        "hinge": lambda: (m < 1).astype(float),
        "none": lambda: -m,
    }[link]()
    return outside * (-weight if sign == "negative" else weight)


GRADIENT_WEIGHTS = Exercise(
    "gradient_weights",
    gradient_weights,
    inputs=completions,
    unit="pair",
    extremes=EXTREMES,
    extremes_hint="exp overflows there. torch.sigmoid does not.",
    ladder=LADDER,
)


# the gradient of the summed loss, by hand


def dpo_gradient(
    policy_logps: Array,
    reference_logps: Array,
    chosen: Array,
    rejected: Array,
    beta: float,
    *,
    reference: str = "",
    pair: str = "",
    index: str = "",
    weight: str = "",
    factor: str = "",
    side: str = "",
    repeat: str = "",
    sign: str = "",
    scale: str = "",
) -> Array | None:
    """d/d policy_logps of the summed DPO loss, (N,)."""

    n = len(policy_logps)
    chosen, rejected = indexed(chosen, rejected, n, index)
    inside = 1.0 if factor in ("forgotten", "not inside") else beta
    places = (inside, inside)
    m = margins_of(policy_logps, reference_logps, chosen, rejected, places, reference, pair)
    if m is None:
        return None
    weights = {
        "": sigma(-m),
        "other": sigma(m),
        "slope": sigma(m) * sigma(-m),
        "squared": sigma(-m) ** 2,
        "none": np.ones_like(m),
        "loss": np.logaddexp(0, -m),
        "margin": -m,
        "exp": np.exp(-m),
        "tanh": np.tanh(-m),
    }[weight]
    weights = weights * {"not in front": 1.0, "forgotten": 1.0, "twice": beta**2}.get(factor, beta)

    up, down = {
        "": (-weights, weights),
        "chosen alone": (-weights, 0 * weights),
        "rejected alone": (0 * weights, weights),
        "both up": (-weights, -weights),
    }[side]
    gradient = np.zeros(n)
    if repeat == "lost":
        gradient[chosen] += up
        gradient[rejected] += down
    elif repeat == "overwritten":
        gradient[chosen] = up
        gradient[rejected] = down
    else:
        np.add.at(gradient, chosen, up)
        np.add.at(gradient, rejected, down)
    gradient = -gradient if sign == "negative" else gradient
    return gradient / {"": 1, "pairs": len(chosen), "completions": n}[scale]


DPO_GRADIENT = Exercise(
    "dpo_gradient",
    dpo_gradient,
    inputs=completions,
    unit="completion",
    extremes=EXTREMES,
    extremes_hint="exp overflows there. torch.sigmoid does not.",
    ladder=LADDER,
)

EXERCISES = (DPO_LOSS, GRADIENT_WEIGHTS, DPO_GRADIENT)
