"""Notebook 02's exercises: Bradley-Terry's loss and its gradient, Plackett-Luce, index pairs."""

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_lab.checks.calling import Inputs
from dpo_lab.checks.exercise import Exercise, Rung

Array = np.ndarray


def pairs_of(rng: np.random.Generator, n: int, p: int) -> Array:
    """(P, 2) chosen and rejected of `n` items.

    One item is in two pairs, once on each side; one is in two on the same side; one is only chosen.
    """
    while True:
        pairs = np.array([rng.permutation(n)[:2] for _ in range(p)])
        pairs[1, 0] = pairs[0, 1]
        chosen, rejected = pairs.T
        ordered = (np.diff(chosen) > 0).all()
        twice = max(len(chosen) - len(set(chosen)), len(rejected) - len(set(rejected)))
        only_chosen = set(chosen) - set(rejected)
        if (chosen != rejected).all() and not ordered and twice and only_chosen:
            return pairs


def sigma(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def indexed(chosen: Array, rejected: Array, n: int, index: str) -> tuple[Array, Array]:
    """The indices of the pairs, or what a mistake makes of them."""
    p = len(chosen)
    return {
        "": (chosen, rejected),
        "stacked": (np.arange(p) % n, np.arange(p, 2 * p) % n),
        "alternating": (2 * np.arange(p) % n, (2 * np.arange(p) + 1) % n),
        "off by one": ((chosen - 1) % n, (rejected - 1) % n),
    }[index]


# -log sigma(r_w - r_l)


def bt_nll(
    rewards: Array,
    chosen: Array,
    rejected: Array,
    *,
    index: str = "",
    pair: str = "",
    link: str = "",
    sign: str = "",
) -> Array:
    """-log p(chosen beats rejected) of each pair, (P,) nats."""

    chosen, rejected = indexed(chosen, rejected, len(rewards), index)
    w, l = rewards[chosen], rewards[rejected]  # noqa: E741
    margin = {
        "": w - l,
        "swapped": l - w,
        "added": w + l,
        "chosen alone": w,
        "rejected alone": -l,
        "divided": w / l,
        "absolute": abs(w - l),
    }[pair]
    value = {
        "": lambda: np.logaddexp(0, -margin),
        "strengths": lambda: np.log1p(l / w),
        "no log": lambda: -sigma(margin),
        "none": lambda: -margin,
        "tanh": lambda: -np.tanh(margin),
        "exp": lambda: np.exp(-margin),
        "hinge": lambda: np.maximum(0, 1 - margin),
        "squared": lambda: (1 - sigma(margin)) ** 2,
        "one minus": lambda: sigma(-margin),
        "bits": lambda: np.logaddexp(0, -margin) / np.log(2),
        "sigmoid twice": lambda: np.logaddexp(0, -sigma(margin)),
    }[link]()
    return -value if sign == "negative" else value


def _games(rewards: list[float], chosen: list[int], rejected: list[int]) -> Inputs:
    return {
        "rewards": np.array(rewards),
        "chosen": np.array(chosen),
        "rejected": np.array(rejected),
    }


def _game_inputs(rng: np.random.Generator, p: int) -> Inputs:
    """Positive rewards of N = 2P + 1 items, and P pairs with expected wins and upsets."""
    n = 2 * p + 1
    while True:
        chosen, rejected = pairs_of(rng, n, p).T
        rewards = rng.uniform(0.3, 3.0, n).round(3)
        margins = rewards[chosen] - rewards[rejected]
        if margins.min() < -0.2 and margins.max() > 0.2:
            return {"rewards": rewards, "chosen": chosen, "rejected": rejected}


GAMES = (
    Rung("one pair", "the sigmoid and the logarithm", _games([1.2, 0.5], [0], [1])),
    Rung("an upset", "the sign of the difference", _games([0.5, 1.2], [0], [1])),
    Rung("a negative reward", "whether a reward may be negative", _games([-0.5, 1.2], [1], [0])),
    Rung(
        "three items",
        "how you use the indices",
        _games([0.3, 2.1, 1.2], [2, 1], [0, 2]),
    ),
    Rung(
        "an item in several pairs",
        "how you use the indices",
        _games([0.3, 2.1, 1.2, 0.7], [2, 1, 2], [0, 2, 3]),
    ),
)

BT_NLL = Exercise(
    "bt_nll",
    bt_nll,
    inputs=_game_inputs,
    unit="pair",
    differentiable="rewards",
    extremes=_games([900.0, -800.0, 3.0], [1, 0, 2], [0, 1, 0]),
    extremes_hint="exp overflows there, and log meets 0. torch.nn.functional has -log sigma as one "
    "stable function.",
    ladder=GAMES,
)


# the gradient of the summed loss, by hand


def bt_gradient(
    rewards: Array,
    chosen: Array,
    rejected: Array,
    *,
    index: str = "",
    pair: str = "",
    weight: str = "",
    side: str = "",
    repeat: str = "",
    sign: str = "",
    scale: str = "",
) -> Array:
    """d/dr of the sum of -log sigma(r_chosen - r_rejected), (N,)."""

    chosen, rejected = indexed(chosen, rejected, len(rewards), index)
    w, l = rewards[chosen], rewards[rejected]  # noqa: E741
    margin = w + l if pair == "added" else w - l
    s = sigma(-margin)
    weights = {
        "": s,
        "other": 1 - s,
        "slope": s * (1 - s),
        "squared": s**2,
        "none": np.ones_like(s),
        "logged": -np.log(s),
        "margin": -margin,
        "exp": np.exp(-margin),
        "tanh": np.tanh(-margin),
    }[weight]
    on_chosen, on_rejected = {
        "": (-weights, weights),
        "chosen alone": (-weights, 0 * weights),
        "rejected alone": (0 * weights, weights),
        "both up": (weights, weights),
    }[side]

    gradient = np.zeros_like(rewards)
    if repeat == "lost":
        # the last pair of an item overwrites the others
        gradient[chosen] += on_chosen
        gradient[rejected] += on_rejected
    elif repeat == "overwritten":
        gradient[chosen] = on_chosen
        gradient[rejected] = on_rejected
    else:
        np.add.at(gradient, chosen, on_chosen)
        np.add.at(gradient, rejected, on_rejected)
    gradient = -gradient if sign == "negative" else gradient
    return gradient / {"": 1, "mean": len(chosen), "items": len(rewards)}[scale]


BT_GRADIENT = Exercise(
    "bt_gradient",
    bt_gradient,
    inputs=_game_inputs,
    unit="reward",
    extremes=_games([900.0, -800.0, 3.0], [1, 0, 2], [0, 1, 0]),
    extremes_hint="exp overflows there. torch.sigmoid does not.",
    ladder=GAMES,
)


# Plackett-Luce, Eq. 18


def plackett_luce_nll(
    ranked_rewards: Array,
    *,
    order: str = "",
    pool: str = "",
    terms: str = "",
    link: str = "",
    sign: str = "",
    scale: str = "",
    reduce: str = "",
) -> Array | None:
    """-log p(this ranking), (B,) nats, from the rewards (B, K) of K items, best first."""

    r = ranked_rewards[:, ::-1] if order == "reversed" else ranked_rewards
    b, k = r.shape
    if terms in ("pairs", "mean of pairs"):
        # Bradley-Terry of all pairs
        if pool or link or reduce:
            return None
        better, worse = np.triu_indices(k, 1)
        losses = np.logaddexp(0, r[:, worse] - r[:, better])
        value = losses.sum(1) if terms == "pairs" else losses.mean(1)
    else:
        # each place is a choice among those that are left
        e = r if link == "no exp" else np.exp(r)
        pools = {
            "": lambda i: e[:, i:].sum(1),
            "all": lambda i: e.sum(1),
            "without itself": lambda i: e[:, i + 1 :].sum(1) if i < k - 1 else np.ones(b),
            "over prompts": lambda i: np.broadcast_to(e[:, i].sum(), b),
        }[pool]
        choices = np.stack([e[:, i] / pools(i) for i in range(k)], axis=1)  # (B, K)

        # minus their logs
        kept = {"": slice(None), "first": slice(0, 1), "last pair": slice(-2, None)}[terms]
        choices, chosen = choices[:, kept], r[:, kept]
        if link in ("not logged", "summed"):
            if reduce:
                return None
            value = -choices.prod(1) if link == "not logged" else -np.log(choices.sum(1))
        else:
            losses = {
                "": lambda: -np.log(choices),
                "no exp": lambda: -np.log(choices),
                "bits": lambda: -np.log2(choices),
                "sum of rewards": lambda: r[:, ::-1].cumsum(1)[:, ::-1][:, kept] - chosen,
                "reward omitted": lambda: chosen - np.log(choices),
                "reward added": lambda: 2 * chosen - np.log(choices),
            }[link]()  # (B, K)

            # one number per ranking
            value = {
                "": lambda: losses.sum(1),
                "not summed": lambda: losses,
                "over rankings": lambda: losses.sum(0),
            }[reduce]()
        if link == "sum of rewards" and pool:
            return None
    value = -value if sign == "negative" else value
    return value / {"": 1, "places": k, "choices": k - 1}[scale]


# from the simplest inputs up
PLACKETT_LUCE_NLL_LADDER = (
    Rung("two items", "the formula", {"ranked_rewards": np.array([[1.2, 0.5]])}),
    Rung("two items, the worse first", "the sign", {"ranked_rewards": np.array([[0.5, 1.2]])}),
    Rung(
        "three items",
        "who is left to choose from at each place",
        {"ranked_rewards": np.array([[1.2, 0.5, 0.9]])},
    ),
    Rung(
        "a negative reward",
        "whether a reward may be negative",
        {"ranked_rewards": np.array([[1.2, -0.5, 0.9]])},
    ),
    Rung(
        "two rankings",
        "the dimension of the sum",
        {"ranked_rewards": np.array([[1.2, -0.5, 0.9], [0.1, 0.7, 2.1]])},
    ),
)

PLACKETT_LUCE_NLL = Exercise(
    "plackett_luce_nll",
    plackett_luce_nll,
    inputs=lambda rng, b: {"ranked_rewards": rng.uniform(0.2, 2.5, (b, b + 1)).round(3)},
    unit="ranking",
    differentiable="ranked_rewards",
    extremes={"ranked_rewards": np.array([[300.0, 0.0, -300.0], [-300.0, 1.0, 300.0]])},
    extremes_hint="exp overflows there. torch.logcumsumexp sums exponentials from one end without "
    "leaving the logarithm; flip turns it round.",
    ladder=PLACKETT_LUCE_NLL_LADDER,
)


# all pairs of scored completions

# where the completions of a prompt begin, of B prompts with K each
OFFSETS = {
    "from one": lambda prompt, b, k: prompt * k + 1,
    "steps of B": lambda prompt, b, k: prompt * b,
    "steps of one": lambda prompt, b, k: prompt,
    "one prompt late": lambda prompt, b, k: (prompt + 1) * k,
}


def pairs(
    scores: Array,
    *,
    order: str = "",
    ties: str = "",
    scope: str = "",
    index: str = "",
    which: str = "",
) -> Array | None:
    """(P, 2) chosen and rejected among B * K completions, sorted: every pair of unequal scores."""

    b, k = scores.shape
    flat = scores.ravel()
    found = []
    for i, j in itertools.permutations(range(b * k), 2):
        same_prompt = i // k == j // k
        if scope != "across prompts" and not same_prompt:
            continue
        gap = flat[i] - flat[j]
        better = gap < 0 if order == "lower is better" else gap > 0
        tied = gap == 0 and (ties == "kept" and i < j or ties in ("both ways", "greater or equal"))
        if order == "both":
            better = gap != 0
        if order == "as they stand":
            better = i < j and gap != 0
        if better or tied:
            found.append((i, j))

    # some mistakes take only a part of them
    if which:
        if scope or order in ("both", "as they stand"):
            return None
        found = [pair for pair in found if _kept(scores, pair, which)]
    if ties in ("with itself", "greater or equal"):
        found += [(i, i) for i in range(b * k)]
    chosen, rejected = np.array(sorted(found), dtype=float).reshape(-1, 2).T
    if index == "within the prompt":
        chosen, rejected = chosen % k, rejected % k
    elif index == "prompt first":
        # as if completions of different prompts alternated
        chosen, rejected = (x % k * b + x // k for x in (chosen, rejected))
    elif index in OFFSETS:
        offset = OFFSETS[index]
        chosen, rejected = (x % k + offset(x // k, b, k) for x in (chosen, rejected))
    elif index == "chosen within":
        chosen = chosen % k
    elif index == "rejected within":
        rejected = rejected % k
    return _sorted(np.stack([chosen, rejected], axis=1))


def _kept(scores: Array, pair: tuple[int, int], which: str) -> bool:
    """Whether a mistake that takes only some pairs takes this one."""
    k, flat = scores.shape[1], scores.ravel()
    row = np.sort(np.unique(scores[pair[0] // k]))
    places = sorted(int(np.searchsorted(row, flat[i])) for i in pair)
    if which == "best and worst":
        return places == [0, len(row) - 1]
    if which == "neighbors":
        return places[1] - places[0] == 1
    return places[1] == len(row) - 1


def _sorted(found: Array) -> Array:
    return np.array(sorted(map(tuple, found.tolist())), dtype=float).reshape(-1, 2)


def read_pairs(value: Any) -> Array:
    """Two tensors of indices as sorted pairs (P, 2)."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError("there must be two of them")
    sides = [torch.as_tensor(side) for side in value]
    for side in sides:
        if not isinstance(side, Tensor) or side.is_floating_point() or side.ndim != 1:
            raise TypeError(f"one has dtype {side.dtype} and shape {tuple(side.shape)}")
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"{len(sides[0])} chosen and {len(sides[1])} rejected")
    return _sorted(torch.stack(sides, 1).double().numpy())


def _score_inputs(rng: np.random.Generator, b: int) -> Inputs:
    """Scores with a tie in each of the first two prompts, none of them sorted."""
    while True:
        scores = rng.permuted(np.tile(np.arange(b + 1.0), (b, 1)), axis=1)
        scores[:2, 1] = scores[:2, 2]
        steps = np.diff(scores, axis=1)
        if (steps.min(1) < 0).all() and (steps.max(1) > 0).all():
            return {"scores": scores / 2}


# from the simplest inputs up
PAIRS_LADDER = (
    Rung("one prompt with two completions", "the order", {"scores": np.array([[0.2, 0.9]])}),
    Rung(
        "three completions",
        "which pairs there are",
        {"scores": np.array([[0.5, 0.2, 0.9]])},
    ),
    Rung("a tie", "equal scores", {"scores": np.array([[0.5, 0.2, 0.5]])}),
    Rung(
        "two prompts",
        "the indices of the second prompt's completions",
        {"scores": np.array([[0.5, 0.2, 0.9], [0.1, 0.7, 0.3]])},
    ),
)

PAIRS = Exercise(
    "pairs",
    pairs,
    inputs=_score_inputs,
    unit="pair",
    read=read_pairs,
    returns="two tensors of integers: chosen (P,) and rejected (P,)",
    ladder=PAIRS_LADDER,
)

EXERCISES = (BT_NLL, BT_GRADIENT, PLACKETT_LUCE_NLL, PAIRS)
