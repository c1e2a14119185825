"""Notebook 04's exercises: REINFORCE's gradient, generalized advantages, PPO's clip."""

import numpy as np

from dpo_lab.checks.calling import Inputs
from dpo_lab.checks.exercise import Exercise, Rung

Array = np.ndarray


# an estimate of the gradient of E[return] with respect to logits


def reinforce_gradient(
    logits: Array,
    actions: Array,
    returns: Array,
    baseline: float,
    *,
    subtract: str = "",
    score: str = "",
    sign: str = "",
    reduce: str = "",
) -> Array:
    """The mean of (return - baseline) d log pi(action) / d logits over samples, (n,)."""

    n, samples = len(logits), len(actions)
    pi = np.exp(logits - logits.max())
    pi = pi / pi.sum()
    taken = np.eye(n)[actions]  # (S, n)
    gain = {
        "": returns - baseline,
        "added": returns + baseline,
        "not subtracted": returns,
        "returns omitted": np.full(samples, -baseline),
        "divided": returns / baseline,
        "own mean": returns - returns.mean(),
        "absolute": abs(returns - baseline),
    }[subtract]

    # the derivative of log pi(action)
    terms = {
        "": taken - pi,
        "minus pi lost": taken,
        "pi alone": taken * 0 - pi,
        "of pi": (taken - pi) * pi[actions][:, None],
        "uniform": taken - 1 / n,
        "over pi": taken / pi,
        "log pi": taken * np.log(pi),
        "plus pi": taken + pi,
        "logits for pi": taken - logits,
        "log pi for pi": taken - np.log(pi),
    }[score]

    # the mean over samples
    products = gain[:, None] * terms
    products = -products if sign == "negative" else products
    return {
        "": lambda: products.mean(0),
        "sum": lambda: products.sum(0),
        "one short": lambda: products.sum(0) / (samples - 1),
        "per action": lambda: products.sum(0) / np.maximum(taken.sum(0), 1),
        "over actions": lambda: products.sum(0) / n,
        "none": lambda: products,
    }[reduce]()


def _reinforce_inputs(rng: np.random.Generator, n: int) -> Inputs:
    """More samples than actions; every action is taken, one of them often."""
    samples = 2 * n + 1
    return {
        "logits": rng.normal(0, 1, n).round(3),
        "actions": rng.permutation([*range(n), *rng.integers(0, 2, samples - n)]),
        "returns": rng.permutation(np.linspace(0.3, 2.5, samples)).round(3),
        "baseline": float(rng.choice([0.6, 0.7, 0.8])),
    }


def _samples(
    logits: list[float], actions: list[int], returns: list[float], baseline: float
) -> Inputs:
    return {
        "logits": np.array(logits),
        "actions": np.array(actions),
        "returns": np.array(returns),
        "baseline": baseline,
    }


# from the simplest inputs up
REINFORCE_GRADIENT_LADDER = (
    Rung(
        "one sample of two equal actions, without a baseline",
        "the derivative of log pi",
        _samples([0.0, 0.0], [0], [1.0], 0.0),
    ),
    Rung("unequal logits", "the softmax", _samples([0.7, -0.4], [0], [1.0], 0.0)),
    Rung("a return of 2", "where the return stands", _samples([0.7, -0.4], [0], [2.0], 0.0)),
    Rung("a baseline", "what you do with it", _samples([0.7, -0.4], [0], [2.0], 0.5)),
    Rung(
        "three samples",
        "the mean over samples",
        _samples([0.7, -0.4, 0.1], [0, 2, 0], [2.0, 0.4, 1.1], 0.5),
    ),
)

REINFORCE_GRADIENT = Exercise(
    "reinforce_gradient",
    reinforce_gradient,
    inputs=_reinforce_inputs,
    unit="logit",
    extremes=_samples([900.0, 0.0, -800.0], [0, 1], [1.0, 2.0], 0.5),
    extremes_hint="exp(900) is infinite. torch.softmax subtracts the largest logit first.",
    ladder=REINFORCE_GRADIENT_LADDER,
)


# generalized advantage estimation


def gae(
    rewards: Array,
    values: Array,
    mask: Array,
    gamma: float,
    lam: float,
    *,
    bootstrap: str = "",
    discount: str = "",
    trace: str = "",
    direction: str = "",
    padding: str = "",
    output: str = "",
    sign: str = "",
) -> Array:
    """A_t = d_t + gamma lam A_(t+1), d_t = r_t + gamma V_(t+1) - V_t; zero outside, (N, L)."""

    n, length = rewards.shape
    inside = np.ones_like(mask) if padding == "counted" else mask
    g = {"": gamma, "forgotten": 1.0, "squared": gamma**2}[discount]
    decay = {
        "": g * lam,
        "lam forgotten": g,
        "gamma forgotten": lam,
        "none": 0.0,
        "gamma squared": g**2 * lam,
        "lam squared": g * lam**2,
        "added": g + lam,
    }[trace]

    # V after each token: zero after a row's last
    after = np.zeros_like(values)
    after[:, :-1] = np.where(inside[:, 1:], values[:, 1:], 0.0)
    if bootstrap == "past the end":
        after[:, :-1] = values[:, 1:]
    elif bootstrap == "same token":
        after = values
    elif bootstrap == "last value kept":
        ends = inside & ~np.pad(inside, ((0, 0), (0, 1)))[:, 1:]
        after = np.where(ends, values, after)
    elif bootstrap == "none":
        after = np.zeros_like(values)
    elif bootstrap == "not discounted":
        after = after / g
    elif bootstrap == "previous value":
        after = np.pad(values, ((0, 0), (1, 0)))[:, :-1]
    elif bootstrap == "reward for value":
        after[:, :-1] = np.where(inside[:, 1:], rewards[:, 1:], 0.0)

    # the surprises
    base = {"value not subtracted": 0 * values, "value added": -values}.get(bootstrap, values)
    if bootstrap == "swapped":
        after, base = -after, -values
    deltas = rewards + g * after - base

    advantages, running = np.zeros((n, length)), np.zeros(n)
    steps = range(length) if direction == "forwards" else reversed(range(length))
    for t in steps:
        running = np.where(inside[:, t], deltas[:, t] + decay * running, 0.0)
        advantages[:, t] = running
    advantages = np.where(mask, advantages, 0.0)
    advantages = -advantages if sign == "negative" else advantages

    if output == "returns":
        return np.where(mask, advantages + values, 0.0)
    if output == "whitened":
        some = advantages[mask]
        return np.where(mask, (advantages - some.mean()) / (some.std() + 1e-8), 0.0)
    if output == "centered":
        return np.where(mask, advantages - advantages[mask].mean(), 0.0)
    return advantages


def _rows(rng: np.random.Generator, n: int) -> Inputs:
    """Rows of different lengths; what lies behind their ends is not zero."""
    length = n + 2
    ends = rng.permutation([length, *rng.integers(2, length - 1, n - 1)])
    return {
        "rewards": rng.normal(0.3, 1, (n, length)).round(3),
        "values": rng.uniform(0.3, 2, (n, length)).round(3),
        "mask": np.arange(length) < ends[:, None],
        "gamma": float(rng.choice([0.83, 0.88, 0.92])),
        "lam": float(rng.choice([0.6, 0.7, 0.77])),
    }


def _row_case(
    rewards: list[list[float]], values: list[list[float]], mask: list, gamma: float, lam: float
) -> Inputs:
    return {
        "rewards": np.array(rewards),
        "values": np.array(values),
        "mask": np.array(mask, dtype=bool),
        "gamma": gamma,
        "lam": lam,
    }


# from the simplest inputs up
GAE_LADDER = (
    Rung("one token", "the surprise r - V", _row_case([[1.0]], [[0.3]], [[1]], 1.0, 1.0)),
    Rung(
        "two tokens, gamma = lambda = 1",
        "the value of the next token",
        _row_case([[0.2, 1.0]], [[0.3, 0.8]], [[1, 1]], 1.0, 1.0),
    ),
    Rung(
        "a gamma",
        "where gamma stands",
        _row_case([[0.2, 1.0]], [[0.3, 0.8]], [[1, 1]], 0.8, 1.0),
    ),
    Rung(
        "a lambda",
        "where lambda stands",
        _row_case([[0.2, 1.0]], [[0.3, 0.8]], [[1, 1]], 0.8, 0.5),
    ),
    Rung(
        "three tokens",
        "the direction of the sum",
        _row_case([[0.2, 0.5, 1.0]], [[0.3, 0.8, 0.6]], [[1, 1, 1]], 0.8, 0.5),
    ),
    Rung(
        "padding",
        "what lies behind a row's last token",
        _row_case([[0.2, 1.0, 3.0]], [[0.3, 0.8, 2.0]], [[1, 1, 0]], 0.8, 0.5),
    ),
    Rung(
        "two rows of different lengths",
        "whether rows are kept apart",
        _row_case(
            [[0.2, 1.0, 3.0], [0.4, -0.3, 0.9]],
            [[0.3, 0.8, 2.0], [1.2, 0.4, 0.5]],
            [[1, 1, 0], [1, 1, 1]],
            0.8,
            0.5,
        ),
    ),
)

GAE = Exercise(
    "gae",
    gae,
    inputs=_rows,
    unit="token",
    ladder=GAE_LADDER,
)


# PPO's clipped loss


def ppo_clip(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    clip: float,
    *,
    ratio: str = "",
    bound: str = "",
    choice: str = "",
    sign: str = "",
    gain: str = "",
) -> Array:
    """max(-A w, -A clip(w, 1 - c, 1 + c)) with w = pi / pi_old, per action, (N,)."""

    a = {
        "": advantages,
        "absolute": abs(advantages),
        "sign": np.sign(advantages),
        "centered": advantages - advantages.mean(),
        "whitened": (advantages - advantages.mean()) / advantages.std(),
    }[gain]

    # pi / pi_old
    w = {
        "": np.exp(logps - old_logps),
        "upside down": np.exp(old_logps - logps),
        "of logs": logps / old_logps,
        "not exponentiated": logps - old_logps,
        "shifted": 1 + logps - old_logps,
        "less one": np.expm1(logps - old_logps),
        "policy alone": np.exp(logps),
    }[ratio]

    # both terms, and which of them counts
    clipped = {
        "": lambda: w.clip(1 - clip, 1 + clip),
        "above alone": lambda: np.minimum(w, 1 + clip),
        "below alone": lambda: np.maximum(w, 1 - clip),
        "around zero": lambda: w.clip(-clip, clip),
        "of the log": lambda: np.exp(np.log(abs(w)).clip(-clip, clip)),
        "twice": lambda: w.clip(1 - 2 * clip, 1 + 2 * clip),
        "inverse": lambda: w.clip(1 / (1 + clip), 1 + clip),
        "the product": lambda: (a * w).clip(1 - clip, 1 + clip) / a,
    }[bound]()
    value = {
        "": lambda: np.maximum(-a * w, -a * clipped),
        "not clipped": lambda: -a * w,
        "without min": lambda: -a * clipped,
        "max for min": lambda: np.minimum(-a * w, -a * clipped),
        "added": lambda: -a * w - a * clipped,
        "mean of both": lambda: (-a * w - a * clipped) / 2,
        "sign of the clipped": lambda: np.maximum(-a * w, a * clipped),
        "sign of the other": lambda: np.maximum(a * w, -a * clipped),
    }[choice]()
    return -value if sign == "negative" else value


def _actions(rng: np.random.Generator, n: int) -> Inputs:
    """Actions inside and outside of the clip on either side, with advantages of either sign."""
    clip = float(rng.choice([0.15, 0.2, 0.25]))
    log_ratios = np.array([1.9, 1.6, 0.4, -1.7, -2.0, -0.5] * 2)[: 2 * n + 1] * clip
    log_ratios = log_ratios * rng.uniform(0.9, 1.1, len(log_ratios))
    signs = np.array([1, -1, 1, 1, -1, -1, -1, 1, -1, -1, 1, 1])[: len(log_ratios)]
    order = rng.permutation(len(log_ratios))
    old = -rng.uniform(1.5, 3.5, len(log_ratios)).round(3)
    size = rng.uniform(0.4, 2.0, len(log_ratios))
    return {
        "logps": (old + log_ratios)[order],
        "old_logps": old[order],
        "advantages": (signs * size)[order].round(3),
        "clip": clip,
    }


def _action_case(logps: list, old_logps: list, advantages: list, clip: float) -> Inputs:
    return {
        "logps": np.array(logps),
        "old_logps": np.array(old_logps),
        "advantages": np.array(advantages),
        "clip": clip,
    }


# from the simplest inputs up
PPO_CLIP_LADDER = (
    Rung(
        "a policy that has not moved",
        "the sign, and the ratio at 1",
        _action_case([-1.3], [-1.3], [0.8], 0.2),
    ),
    Rung("a small step", "the ratio", _action_case([-1.2], [-1.3], [0.8], 0.2)),
    Rung(
        "a step too far with a positive advantage",
        "the upper end of the clip",
        _action_case([-0.6], [-1.3], [0.8], 0.2),
    ),
    Rung(
        "a step too far the wrong way",
        "which of the two terms is taken",
        _action_case([-2.0], [-1.3], [0.8], 0.2),
    ),
    Rung(
        "a negative advantage",
        "which of the two terms is taken when the advantage is negative",
        _action_case([-2.0, -0.6], [-1.3, -1.3], [-0.8, -0.8], 0.2),
    ),
)

PPO_CLIP = Exercise(
    "ppo_clip",
    ppo_clip,
    inputs=_actions,
    unit="action",
    differentiable="logps",
    ladder=PPO_CLIP_LADDER,
)

EXERCISES = (REINFORCE_GRADIENT, GAE, PPO_CLIP)
