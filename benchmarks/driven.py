"""What the function of each exercise drives, where the truth is known exactly.

`DRIVES` has one entry per exercise: what its function is for, and a measurement of a function with
given mistakes. The first number of a measurement says how far from the truth it leads; it is 0, or
what noise leaves, for the right function.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from mistaken import Settings, mistaken, singles
from torch import Tensor

from dpo_lab.checks import EXERCISES
from dpo_lab.theory import (
    all_pairs,
    fit_bradley_terry,
    kl,
    minimize,
    objective_value,
    optimal_policy,
    pair_weights,
)

Array = np.ndarray
Numbers = dict[str, float | None]

# the bandit, in float64: 4 completions
REFERENCE = torch.tensor([0.5, 0.1, 0.3, 0.1], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, 0.5, 1.5], dtype=torch.float64)
BETA = 0.5
BEST = optimal_policy(REFERENCE, REWARD, BETA)
PAIRS, WEIGHTS = all_pairs(4), pair_weights(REFERENCE, REWARD)


class Unusable(Exception):
    """Numbers of another shape than what is driven can take, or indices of nothing."""


class Drive(NamedTuple):
    """What the function of an exercise drives."""

    what: str
    measure: Callable[[Settings], Numbers]


def numbers(exercise: str, settings: Settings, **inputs: Any) -> Array:
    """What `my_{exercise}` with mistakes gives on these inputs.

    Raises:
        Unusable: in another shape than the right function.
    """
    found, right = (EXERCISES[exercise].compute(inputs, dict(s)) for s in (settings, {}))
    if found.shape != right.shape:
        raise Unusable(f"shape {found.shape} where {right.shape} is needed")
    return found


def tensors(exercise: str, settings: Settings, *inputs: Tensor | float) -> Tensor:
    """The same as a tensor that is differentiable in the first input."""
    found, right = (mistaken(exercise, s)(*inputs) for s in (settings, {}))
    if found.shape != right.shape:
        raise Unusable(f"shape {tuple(found.shape)} where {tuple(right.shape)} is needed")
    return found


def distance(policy: Tensor, to: Tensor = BEST) -> float | None:
    """KL in nats from a policy to another, the bandit's best; None of NaN."""
    if policy.isnan().any():
        return None
    policy = policy.clamp_min(1e-300) / policy.clamp_min(1e-300).sum()
    return max(0.0, float(kl(policy, to)))


def policy_of(logits: Array) -> Tensor:
    """The softmax of logits, (n,)."""
    return torch.softmax(torch.as_tensor(logits), -1)


def end_of(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The bandit's policy that minimizes a loss of log-probs, or as far as L-BFGS comes.

    It begins again twice where it stopped, since a kink may stop it early.
    """
    found = REFERENCE
    for _ in range(3):
        again = minimize(loss, found, iterations=200)
        if again.isnan().any() or (again < 1e-12).any():
            return again
        if not loss(again.log()) < loss(found.log()):
            break
        found = again
    return found


# notebook 01


def drive_kl(settings: Settings) -> Numbers:
    """The policy that maximizes the objective with this KL, and the KL that it reports of pi*."""
    found = end_of(
        lambda logps: (
            BETA * tensors("kl", settings, logps.exp()[None], REFERENCE[None]).sum()
            - logps.exp() @ REWARD
        )
    )
    reported = numbers("kl", settings, p=BEST.numpy()[None], q=REFERENCE.numpy()[None])
    return {"KL to pi*": distance(found), "reported KL of pi* to pi_ref": float(reported[0])}


def drive_optimal_policy(settings: Settings) -> Numbers:
    """The policy as it is given, and its reward."""
    inputs = {"reference": REFERENCE.numpy(), "reward": REWARD.numpy(), "beta": BETA}
    found = torch.as_tensor(numbers("optimal_policy", settings, **inputs))
    reward = float(found @ REWARD / found.sum())
    return {"KL to pi*": distance(found), "reward": reward, "sum": float(found.sum())}


def drive_log_partition(settings: Settings) -> Numbers:
    """beta log Z, which is the value of pi*, and the distance that it gives pi_ref from pi*."""
    inputs = {"reference": REFERENCE[None].numpy(), "reward": REWARD[None].numpy(), "beta": BETA}
    found = float(numbers("log_partition", settings, **inputs)[0])
    value = float(objective_value(BEST, REFERENCE, REWARD, BETA))
    of_reference = found - float(REFERENCE @ REWARD) / BETA
    return {
        "error of the value of pi*": abs(BETA * found - value),
        "value of pi*": BETA * found,
        "KL of pi_ref to pi*": of_reference,
    }


def drive_implicit_reward(settings: Settings) -> Numbers:
    """The true reward, read back from pi* up to a constant."""
    inputs = {"policy": BEST.numpy(), "reference": REFERENCE.numpy(), "beta": BETA}
    found = torch.as_tensor(numbers("implicit_reward", settings, **inputs))
    gaps, true = (r[PAIRS[0]] - r[PAIRS[1]] for r in (found, REWARD))
    wrong_way = (gaps * true.sign() <= 1e-12).double().mean()
    return {
        "largest error of a difference": float((gaps - true).abs().max()),
        "pairs in the wrong order": float(wrong_way),
    }


# notebook 02


def of_rewards(rewards: Tensor, true: Tensor = REWARD) -> Numbers:
    """How far fitted rewards are from the true ones, and the policy that is best for them."""
    if not rewards.isfinite().all():
        return {"error of the rewards": None, "KL to pi*": None}
    error = (rewards - rewards.mean() - true + true.mean()).square().mean().sqrt()
    best, wanted = (optimal_policy(REFERENCE, r, BETA) for r in (rewards, true))
    return {"error of the rewards": float(error), "KL to pi*": distance(best, wanted)}


def fitted(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The rewards that minimize a loss, from 1 on, by L-BFGS; as far as it comes."""
    rewards = torch.ones(4, dtype=torch.float64, requires_grad=True)
    options = {"tolerance_grad": 1e-14, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([rewards], max_iter=200, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(rewards)
        value.backward()
        return value

    optimizer.step(closure)
    return rewards.detach()


def drive_bt_nll(settings: Settings) -> Numbers:
    """Rewards fitted to the probabilities of the labels."""
    return of_rewards(fitted(lambda r: WEIGHTS @ tensors("bt_nll", settings, r, *PAIRS)))


# 60 games of the four completions, none of which wins all of its games
GAMES = torch.multinomial(WEIGHTS, 60, True, generator=torch.Generator().manual_seed(0))


def drive_bt_gradient(settings: Settings) -> Numbers:
    """Gradient descent by it on 60 games, beside the maximum-likelihood fit."""
    chosen, rejected = (side[GAMES].numpy() for side in PAIRS)
    rewards = np.ones(4)
    for _ in range(500):
        slope = numbers("bt_gradient", settings, rewards=rewards, chosen=chosen, rejected=rejected)
        rewards = rewards - 0.05 * slope
    best = fit_bradley_terry(chosen, rejected, 4).rewards
    return of_rewards(torch.as_tensor(rewards), torch.as_tensor(best))


ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def drive_plackett_luce(settings: Settings) -> Numbers:
    """Rewards fitted to the probabilities of all 24 rankings."""
    weights = (-mistaken("plackett_luce_nll", {})(REWARD[ORDERS])).exp()
    return of_rewards(
        fitted(lambda r: (weights * tensors("plackett_luce_nll", settings, r[ORDERS])).sum())
    )


# 6 prompts of 4 completions, three of them with a tie
SCORES = np.array(
    [[0, 2, 1, 3], [3, 1, 1, 0], [2, 2, 3, 0], [1, 3, 0, 2], [0, 1, 3, 3], [2, 0, 3, 1]]
)


def drive_pairs(settings: Settings) -> Numbers:
    """DPO on a table of policies, uniform at first, with these pairs; the mean score at the end."""
    found, right = (
        EXERCISES["pairs"].compute({"scores": SCORES.astype(float)}, dict(s)).astype(int)
        for s in (settings, {})
    )
    if found.max(initial=0) >= SCORES.size:
        raise Unusable(f"index {found.max()} of {SCORES.size} completions")
    ours, wanted = set(map(tuple, found.tolist())), set(map(tuple, right.tolist()))

    # the gradient of DPO's loss by log-probs, and by the logits of each prompt
    logits, (chosen, rejected) = np.zeros(SCORES.shape), found.T
    for _ in range(200):
        rewards = BETA * np.log(softmax(logits) / softmax(0 * logits)).ravel()
        weights = BETA / (1 + np.exp(rewards[chosen] - rewards[rejected])) / len(found)
        slope = np.bincount(rejected, weights, SCORES.size) - np.bincount(
            chosen, weights, SCORES.size
        )
        slope = slope.reshape(SCORES.shape)
        logits = logits - 20 * (slope - softmax(logits) * slope.sum(1, keepdims=True))
    return {
        "pairs false or missing": 1 - len(ours & wanted) / len(ours | wanted),
        "pairs": float(len(found)),
        "mean score after DPO": float((softmax(logits) * SCORES).sum(1).mean()),
    }


def softmax(logits: Array) -> Array:
    """Over the last dimension."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def bounded(logits: Array) -> Array:
    """Logits with mean 0 that are at most 30, so that a runaway policy keeps its log-probs."""
    return np.clip(logits - logits.mean(), -30, 30)


# notebook 03


def drive_dpo_loss(settings: Settings) -> Numbers:
    """What the loss ends at, with the probabilities of all labels."""
    return {"KL to pi*": on_bandit(mistaken("dpo_loss", settings))}


def on_bandit(loss: Callable[..., Tensor]) -> float | None:
    """KL in nats from what a loss as `my_dpo_loss` ends at to the optimal policy; None of NaN."""
    return distance(
        end_of(lambda logps: (WEIGHTS * loss(logps, REFERENCE.log(), *PAIRS, BETA)).sum())
    )


def on_pairs(logits: Array, chosen: Array, rejected: Array) -> dict[str, Any]:
    """The inputs of notebook 03's exercises for a policy of these logits."""
    return {
        "policy_logps": np.log(softmax(logits)),
        "reference_logps": REFERENCE.log().numpy(),
        "chosen": chosen,
        "rejected": rejected,
        "beta": BETA,
    }


def drive_gradient_weights(settings: Settings) -> Numbers:
    """Gradient descent with these weights of pairs, with the probabilities of all labels."""
    chosen, rejected = (side.numpy() for side in PAIRS)
    logits = REFERENCE.log().numpy()
    for _ in range(3000):
        found = numbers("gradient_weights", settings, **on_pairs(logits, chosen, rejected))
        weights = BETA * WEIGHTS.numpy() * found
        slope = np.bincount(rejected, weights, 4) - np.bincount(chosen, weights, 4)
        logits = bounded(logits - 10 * slope)
    return {"KL to pi*": distance(policy_of(logits))}


def drive_dpo_gradient(settings: Settings) -> Numbers:
    """Gradient descent by it on 60 labels, beside the policy that is best for these."""
    chosen, rejected = (side[GAMES] for side in PAIRS)
    right = mistaken("dpo_loss", {})
    best = end_of(lambda logps: right(logps, REFERENCE.log(), chosen, rejected, BETA).mean())
    logits = REFERENCE.log().numpy()
    for _ in range(3000):
        inputs = on_pairs(logits, chosen.numpy(), rejected.numpy())
        slope = numbers("dpo_gradient", settings, **inputs)
        logits = bounded(logits - 0.2 * (slope - softmax(logits) * slope.sum()))
    return {"KL to the best policy": distance(policy_of(logits), best)}


# one for which 1 / (2 beta) is not 2 beta
IPO_BETA = 0.4


def drive_ipo_loss(settings: Settings) -> Numbers:
    """What the loss ends at, beside the right one's end; and for two completions, the better of
    which always wins, the difference of log-ratios at its end, 1 / (2 beta)."""

    def end(made: Settings) -> Tensor:
        return end_of(
            lambda logps: (
                WEIGHTS @ tensors("ipo_loss", made, logps, REFERENCE.log(), *PAIRS, IPO_BETA)
            )
        )

    half = torch.full((2,), 0.5, dtype=torch.float64)
    pair = torch.tensor([0]), torch.tensor([1])
    found = minimize(
        lambda logps: tensors("ipo_loss", settings, logps, half.log(), *pair, IPO_BETA).sum(), half
    )
    gap = float(found.log()[0] - found.log()[1])
    return {
        "KL to IPO's end": distance(end(settings), end({}).clamp_min(1e-300)),
        "difference of log-ratios": gap if np.isfinite(gap) else None,
    }


def drive_smoothed_loss(settings: Settings) -> Numbers:
    """The margin at which the loss is least with e = 0.2, log(0.8 / 0.2) for the right one."""
    margins, e = np.linspace(-8, 8, 160_001), 0.2
    losses = numbers("smoothed_loss", settings, margins=margins, e=e)
    least = float(margins[losses.argmin()]) if np.isfinite(losses).all() else None
    truth = float(np.log((1 - e) / e))
    return {
        "error of the margin": None if least is None else abs(least - truth),
        "margin at the least loss": least,
    }


# notebook 04


def drive_reinforce(settings: Settings) -> Numbers:
    """The mean of the estimate beside the exact gradient, and 300 steps of ascent by it."""
    logits, actions = np.log([0.5, 0.25, 0.125, 0.125]), np.repeat(range(4), [4, 2, 1, 1])
    pi, reward = softmax(logits), REWARD.numpy()
    exact = pi * (reward - pi @ reward)
    inputs = {"logits": logits, "actions": actions, "returns": reward[actions], "baseline": 0.3}
    bias = numbers("reinforce_gradient", settings, **inputs) - exact

    ends, rng = [], np.random.default_rng(0)
    for _ in range(8):
        logits = REFERENCE.log().numpy()
        for _ in range(300):
            pi = softmax(logits)
            penalized = reward - BETA * np.log(pi / REFERENCE.numpy())
            actions = rng.choice(4, 20, p=pi)
            sampled = {"actions": actions, "returns": penalized[actions]}
            inputs = {"logits": logits, **sampled, "baseline": 0.3}
            slope = numbers("reinforce_gradient", settings, **inputs)
            logits = bounded(logits + 0.2 * np.nan_to_num(slope))
        ends.append(distance(policy_of(logits)))
    return {
        "bias of the gradient": float(np.linalg.norm(bias) / np.linalg.norm(exact)),
        "KL to pi*": float(np.mean(ends)),
        "its standard error": float(np.std(ends, ddof=1) / len(ends) ** 0.5),
    }


# a language of tokens 0, 1 and 2, in which 0 ends a completion and three tokens are the most
PREFIXES = [(), (1,), (2,), *itertools.product((1, 2), repeat=2)]
COMPLETIONS = [
    (*prefix, token) for prefix in PREFIXES for token in range(3) if token == 0 or len(prefix) == 2
]

# (15, 3), of each token: whether it is one, its prefix and its id, both 0 behind the end
MASK = np.arange(3) < np.array([len(y) for y in COMPLETIONS])[:, None]
AT = np.array([[PREFIXES.index(y[: min(t, len(y) - 1)]) for t in range(3)] for y in COMPLETIONS])
AT = np.where(MASK, AT, 0)
TOKENS = np.array([(*y, 0, 0)[:3] for y in COMPLETIONS])

# logits of the reference by prefix, and the score of each completion
TABLE = np.random.default_rng(1).normal(0, 0.5, (7, 3))
TREE_SCORES = np.random.default_rng(2).normal(0, 1, 15)


def tree_logps(logits: Array) -> Array:
    """log pi of each token, (15, 3); 0 behind the end."""
    return np.where(MASK, np.log(softmax(logits))[AT, TOKENS], 0.0)


def tree_values(rewards: Array, chances: Array) -> Array:
    """The mean of the rewards still to come before each token, (15, 3); 1 behind the end."""
    to_come = np.where(MASK, rewards, 0)[:, ::-1].cumsum(1)[:, ::-1]
    found = np.ones((15, 3))
    for at, prefix in enumerate(PREFIXES):
        t = len(prefix)
        here = MASK[:, t] & (AT[:, t] == at)
        found[here, t] = chances[here] @ to_come[here, t] / chances[here].sum()
    return found


def drive_gae(settings: Settings) -> Numbers:
    """Ascent by the mean of advantage x grad log pi over all completions of a small language."""
    exact, zero = (_ascent_by_gae(settings, share) for share in (1.0, 0.0))
    error = _error_of_gae(settings)
    return {"KL to pi*": exact, "KL to pi* with values of 0": zero, "error of advantages": error}


def _ascent_by_gae(settings: Settings, share: float) -> float | None:
    """KL to pi* at the end, with a share of the exact values as values."""
    logits, reference = TABLE.copy(), tree_logps(TABLE)
    scores = np.where(np.arange(3) == MASK.sum(1, keepdims=True) - 1, TREE_SCORES[:, None], 0.0)
    for _ in range(1500):
        logps = tree_logps(logits)
        chances = np.exp(logps.sum(1))
        rewards = np.where(MASK, scores - BETA * (logps - reference), 0.0)
        values = share * tree_values(rewards, chances)
        inputs = {"rewards": rewards, "values": values, "mask": MASK}
        advantages = numbers("gae", settings, **inputs, gamma=1.0, lam=0.95)

        # sum over tokens of A (onehot - pi), weighted by the probability of the completion
        gain, slope = np.where(MASK, chances[:, None] * advantages, 0.0), np.zeros((7, 3))
        np.add.at(slope, (AT, TOKENS), gain)
        by_prefix = np.bincount(AT.ravel(), gain.ravel(), 7)
        slope -= by_prefix[:, None] * softmax(logits)
        logits = np.clip(logits + 4 * slope, -30, 30)

    # pi* of whole completions, by Eq. 4
    best = optimal_policy(*map(torch.as_tensor, (np.exp(reference.sum(1)), TREE_SCORES)), BETA)
    found = torch.as_tensor(np.exp(tree_logps(logits).sum(1)))
    return distance(found, best)


def _error_of_gae(settings: Settings) -> float:
    """On noisy rewards and values, with gamma 0.9 and lambda 0.7, relative to their size."""
    rng = np.random.default_rng(3)
    inputs = {"rewards": rng.normal(size=(15, 3)), "values": rng.normal(size=(15, 3))}
    inputs |= {"mask": MASK, "gamma": 0.9, "lam": 0.7}
    found = numbers("gae", settings, **inputs)

    # (gamma lambda)^k times the surprise k tokens on, added up
    rewards, values = inputs["rewards"], np.where(MASK, inputs["values"], 0)
    surprises = rewards + 0.9 * np.pad(values, ((0, 0), (0, 1)))[:, 1:] - values
    surprises = np.where(MASK, surprises, 0)
    exact = sum(0.63**k * np.pad(surprises, ((0, 0), (0, k)))[:, k:] for k in range(3))
    exact = np.where(MASK, exact, 0)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def drive_ppo_clip(settings: Settings) -> Numbers:
    """Forty batches of eight steps each, with exact means over the policy that drew a batch."""
    logits, reward, largest = REFERENCE.log().numpy(), REWARD.numpy(), 0.0
    for _ in range(40):
        old = np.log(softmax(logits))
        penalized = reward - BETA * (old - REFERENCE.log().numpy())
        inputs = {"advantages": penalized - np.exp(old) @ penalized, "clip": 0.2}

        def loss(logps: Array, inputs: dict = inputs, old: Array = old) -> float:
            found = numbers("ppo_clip", settings, logps=logps, old_logps=old, **inputs)
            return float(np.exp(old) @ found)

        for _ in range(8):
            pi = softmax(logits)
            steps = 1e-6 * np.eye(4)
            slope = np.array([loss(np.log(pi) + h) - loss(np.log(pi) - h) for h in steps]) / 2e-6
            logits = np.clip(logits - 2.0 * (slope - pi * slope.sum()), -100, 100)
        moved = distance(policy_of(logits), torch.as_tensor(np.exp(old)).clamp_min(1e-300))
        largest = max(largest, moved or 0.0)
    return {"KL to pi*": distance(policy_of(logits)), "largest KL of a batch": largest}


# notebook 05


def drive_sequence_logps(settings: Settings) -> Numbers:
    """All completions of a small language after a prompt: their probabilities, which sum to 1, and
    the implicit rewards of one policy beside another."""
    found, right = (
        [numbers("sequence_logps", made, **_rows(table)) for table in (TABLE, 2 * TABLE[::-1])]
        for made in (settings, {})
    )
    rewards, wanted = found[1] - found[0], right[1] - right[0]
    gaps, true = (np.subtract.outer(r, r) for r in (rewards, wanted))
    real = abs(true) > 1e-9
    return {
        "largest error": float(abs(found[0] - right[0]).max()),
        "sum of probabilities": float(np.exp(found[0]).sum()),
        "margins of the other sign": float((gaps * true <= 0)[real].mean()),
    }


def _rows(table: Array) -> dict[str, Array]:
    """Padded rows of a prompt of two tokens and every completion, with the logits of a policy."""
    ids = np.concatenate([np.tile([2, 1], (15, 1)), TOKENS], 1)
    mask = np.concatenate([np.zeros((15, 2), bool), MASK], 1)
    logits = np.tile(np.random.default_rng(4).normal(size=(1, 5, 3)), (15, 1, 1))
    logits[:, 1:4] = np.where(MASK[..., None], table[AT], logits[:, 1:4])
    return {"logits": logits, "input_ids": ids, "completion_mask": mask}


def drive_sequence_kl(settings: Settings) -> Numbers:
    """The KL of pi* to pi_ref, from 10,000 samples that occur as often as pi* says."""
    drawn = np.repeat(range(4), np.round(10_000 * BEST.numpy()).astype(int))
    logps = {"policy_logps": BEST.log().numpy()[drawn]}
    logps |= {"reference_logps": REFERENCE.log().numpy()[drawn]}
    found = float(numbers("sequence_kl", settings, **logps))
    return {"error of the KL": abs(found - float(kl(BEST, REFERENCE))), "reported KL": found}


def drive_dpo_step(settings: Settings) -> Numbers:
    """The direction of the gradient on a small model, and the loss where policy is reference."""
    inputs = dict(EXERCISES["dpo_step"].cases(0)[0])
    made = dict(settings)
    if made.pop("scorer", "") == "policy":
        # its log-probs are held fixed, as those of a reference
        inputs["reference"] = inputs["policy"]
    start = numbers("dpo_step", settings, **{**inputs, "reference": inputs["policy"]})
    slopes = [_slope_of_step(inputs, made), _right_slope_of_step()]
    sizes = [np.linalg.norm(slope) for slope in slopes]
    cosine = float(slopes[0] @ slopes[1] / (sizes[0] * sizes[1])) if sizes[0] > 1e-9 else 0.0
    return {
        "degrees from the right gradient": float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))),
        "size beside the right gradient": float(sizes[0] / sizes[1]),
        "loss at policy = reference": float(start),
    }


@functools.cache
def _right_slope_of_step() -> Array:
    return _slope_of_step(EXERCISES["dpo_step"].cases(0)[0], {})


def _slope_of_step(inputs: dict[str, Any], settings: Settings) -> Array:
    """The gradient of a step by the policy's weights, by central differences."""
    policy, found = inputs["policy"], []
    for name, weights in policy.named_parameters():
        for i in range(weights.numel()):
            sides = []
            for change in (1e-5, -1e-5):
                moved = type(policy)(*policy.embedding.shape, 0)
                moved.load_state_dict(policy.state_dict())
                moved.train(policy.training)
                with torch.no_grad():
                    dict(moved.named_parameters())[name].view(-1)[i] += change
                sides.append(
                    EXERCISES["dpo_step"].compute({**inputs, "policy": moved}, dict(settings))
                )
            found.append(float(sides[0] - sides[1]) / 2e-5)
    return np.array(found)


DRIVES = {
    "kl": Drive("the objective of Eq. 3, maximized with it as the penalty", drive_kl),
    "optimal_policy": Drive("the policy itself", drive_optimal_policy),
    "log_partition": Drive("beta log Z, the value of pi*", drive_log_partition),
    "implicit_reward": Drive("the reward, read back from pi*", drive_implicit_reward),
    "bt_nll": Drive("rewards fitted to the probabilities of all labels", drive_bt_nll),
    "bt_gradient": Drive("500 steps of gradient descent on 60 games", drive_bt_gradient),
    "plackett_luce_nll": Drive("rewards fitted to all 24 rankings of four", drive_plackett_luce),
    "pairs": Drive("DPO on 24 completions of 6 prompts", drive_pairs),
    "dpo_loss": Drive("the bandit's policy, by its loss", drive_dpo_loss),
    "gradient_weights": Drive("the bandit's policy, by gradient descent", drive_gradient_weights),
    "dpo_gradient": Drive("gradient descent on 60 labels", drive_dpo_gradient),
    "ipo_loss": Drive("the bandit's policy, by its loss", drive_ipo_loss),
    "smoothed_loss": Drive("the margin of a pair, with e = 0.2", drive_smoothed_loss),
    "reinforce_gradient": Drive("policy-gradient ascent, 8 runs of 300 steps", drive_reinforce),
    "gae": Drive("policy-gradient ascent on a language of 15 completions", drive_gae),
    "ppo_clip": Drive("40 batches of 8 steps each", drive_ppo_clip),
    "sequence_logps": Drive("probabilities of all 15 completions", drive_sequence_logps),
    "sequence_kl": Drive("the KL that an evaluation reports", drive_sequence_kl),
    "dpo_step": Drive("a gradient step of a small model", drive_dpo_step),
}


def measured(exercise: str) -> list[dict[str, Any]]:
    """A row per mistake, the right function first: its numbers, or why there are none."""
    rows = []
    for name, settings in singles(EXERCISES[exercise]):
        row = {"name": name, "settings": dict(settings)}
        with np.errstate(all="ignore"):
            try:
                found = DRIVES[exercise].measure(settings)
            except Unusable as reason:
                row["unusable"] = str(reason)
                found = {}
        row["numbers"] = {
            key: value if value is not None and np.isfinite(value) else None
            for key, value in found.items()
        }
        rows.append(row)
    return rows
