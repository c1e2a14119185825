"""Notebook 05's exercises: log-probs of completions, their KL, and one whole step of DPO."""

import copy
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_lab.checks.calling import Inputs
from dpo_lab.checks.dpo import dpo_loss
from dpo_lab.checks.exercise import Exercise, Rung
from dpo_lab.checks.objective import BETAS

Array = np.ndarray


def log_softmax(logits: Array, axis: int = -1) -> Array:
    """Stable in float64."""
    shifted = logits - logits.max(axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))


# log pi(y|x) from logits, ids and a mask


def sequence_logps(
    logits: Array,
    input_ids: Array,
    completion_mask: Array,
    *,
    shift: str = "",
    mask: str = "",
    normal: str = "",
    reduce: str = "",
    sign: str = "",
) -> Array:
    """logits (B, L, V), input_ids (B, L), completion_mask (B, L) -> (B,) nats."""

    length = input_ids.shape[1]
    table = {
        "": log_softmax(logits),
        "raw": logits,
        "probabilities": np.exp(log_softmax(logits)),
        "over positions": log_softmax(logits, 1),
        "over positions kept": np.pad(log_softmax(logits[:, :-1], 1), ((0, 0), (0, 1), (0, 0))),
        "sigmoid": -np.logaddexp(0, -logits),
        "bits": log_softmax(logits) / np.log(2),
    }[normal]

    # which scores meet which targets
    scores, targets, m = {
        "": (table[:, :-1], input_ids[:, 1:], completion_mask[:, 1:]),
        "unshifted": (table, input_ids, completion_mask),
        "backwards": (table[:, 1:], input_ids[:, :-1], completion_mask[:, :-1]),
        "mask unshifted": (table[:, :-1], input_ids[:, 1:], completion_mask[:, :-1]),
        "by two": (table[:, :-2], input_ids[:, 2:], completion_mask[:, 2:]),
    }[shift]

    # which of them count
    start = completion_mask.argmax(1)[:, None]
    end = (length - completion_mask[:, ::-1].argmax(1))[:, None]
    first = 0 if shift in ("backwards", "unshifted") else length - targets.shape[1]
    place = np.arange(first, first + targets.shape[1])[None]
    m = {
        "": m,
        "everything": np.ones_like(m),
        "prompt counted": place < end,
        "padding counted": place >= start,
        "inverted": ~m,
        "last dropped": m & (place != end - 1),
        "first dropped": m & (place != start),
        "zero is padding": m & (targets != 0),
    }[mask]
    tokens = np.take_along_axis(scores, targets[..., None], -1)[..., 0]
    if reduce == "product":
        return np.where(m, tokens, 1).prod(1)

    tokens = np.where(m, -tokens if sign == "negative" else tokens, 0)
    return {
        "": lambda: tokens.sum(1),
        "mean": lambda: tokens.sum(1) / m.sum(1),
        "mean over length": lambda: tokens.mean(1),
        "over batch": lambda: tokens.sum(0),
        "tokens": lambda: tokens,
        "probability": lambda: np.exp(tokens.sum(1)),
        "log of sum": lambda: np.log(np.where(m, np.exp(tokens), 0).sum(1)),
    }[reduce]()


def _sequence_inputs(rng: np.random.Generator, b: int) -> Inputs:
    """Completions of several lengths; each holds token 0, and a token twice."""
    length, v = b + 4, 2 * b + 5
    mask = np.zeros((b, length), bool)
    ids = rng.integers(1, v, (b, length))
    for i in range(b):
        start = int(rng.integers(1, 3)) if i else 2
        n = int(rng.integers(2, 4))
        mask[i, start : start + n] = True
        ids[i, start] = 0
    ids[0, 3] = 0
    return {
        "logits": rng.normal(0, 1.5, (b, length, v)).round(3),
        "input_ids": ids,
        "completion_mask": mask,
    }


def _sequence_case(length: int, mask: list[list[int]], v: int = 3, seed: int = 3) -> Inputs:
    rng = np.random.default_rng(seed)
    return {
        "logits": rng.normal(0, 1, (len(mask), length, v)).round(2),
        "input_ids": rng.integers(0, v, (len(mask), length)),
        "completion_mask": np.array(mask, bool),
    }


# from the simplest inputs up
SEQUENCE_LOGPS_LADDER = (
    Rung(
        "one completion token after one of prompt",
        "which logits predict which token, and the softmax",
        _sequence_case(2, [[0, 1]]),
    ),
    Rung("a completion of two tokens", "the sum", _sequence_case(3, [[0, 1, 1]])),
    Rung(
        "a longer prompt",
        "what happens to the prompt's tokens",
        _sequence_case(5, [[0, 0, 0, 1, 1]]),
    ),
    Rung("padding", "what happens to the padding", _sequence_case(6, [[0, 0, 1, 1, 0, 0]])),
    Rung(
        "two completions of different lengths",
        "whether one row depends on the other",
        _sequence_case(6, [[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]]),
    ),
)

SEQUENCE_LOGPS = Exercise(
    "sequence_logps",
    sequence_logps,
    inputs=_sequence_inputs,
    unit="completion",
    differentiable="logits",
    extremes={
        "logits": np.array([[[0.0, 200.0, -200.0], [150.0, 0.0, -150.0], [0.0, 0.0, 0.0]]]),
        "input_ids": np.array([[0, 2, 1]]),
        "completion_mask": np.array([[False, True, True]]),
    },
    extremes_hint="softmax gives 0 there, and its log is minus infinity. Take the log-softmax in "
    "one step.",
    ladder=SEQUENCE_LOGPS_LADDER,
)


# KL(pi || pi_ref) of sequences, from samples of pi


def sequence_kl(
    policy_logps: Array,
    reference_logps: Array,
    *,
    form: str = "",
    scale: str = "",
    sign: str = "",
) -> Array:
    """The mean of log pi - log pi_ref over samples of pi, () nats."""
    x = policy_logps - reference_logps
    weights = np.exp(policy_logps - policy_logps.max())
    found = {
        "": lambda: x.mean(),
        "absolute": lambda: abs(x).mean(),
        "squared": lambda: (x**2).mean() / 2,
        "mean square": lambda: (x**2).mean(),
        "k3": lambda: (np.exp(-x) - 1 + x).mean(),
        "exponentiated": lambda: np.exp(x).mean(),
        "log of mean": lambda: np.log(np.exp(x).mean()),
        "weighted again": lambda: (weights * x).sum() / weights.sum(),
        "probability weight": lambda: (np.exp(policy_logps) * x).sum(),
        "F.kl_div": lambda: (np.exp(reference_logps) * -x).mean(),
        "policy alone": lambda: policy_logps.mean(),
        "reference alone": lambda: -reference_logps.mean(),
        "median": lambda: np.median(x),
        "difference of probabilities": lambda: (
            np.exp(policy_logps) - np.exp(reference_logps)
        ).mean(),
        "logs divided": lambda: (policy_logps / reference_logps).mean(),
        "not averaged": lambda: x,
    }[form]()
    n = len(x)
    found = found * {"": 1, "sum": n, "one short": n / max(1, n - 1), "bits": 1 / np.log(2)}[scale]
    return np.asarray(-found if sign == "reversed" else found)


def _sample_inputs(rng: np.random.Generator, n: int) -> Inputs:
    """Log-ratios of either sign, most of them small and some large."""
    policy = -rng.uniform(0.5, 4, 2 * n + 1)
    log_ratios = rng.permutation(np.geomspace(0.2, 3.3, 2 * n + 1) - rng.uniform(0.7, 0.8))
    return {"policy_logps": policy.round(3), "reference_logps": (policy - log_ratios).round(3)}


def _logps_case(policy: list[float], reference: list[float]) -> Inputs:
    return {"policy_logps": np.array(policy), "reference_logps": np.array(reference)}


# from the simplest inputs up
SEQUENCE_KL_LADDER = (
    Rung("one sample", "the log-ratio and its sign", _logps_case([-1.2], [-2.0])),
    Rung("a negative log-ratio", "what is done to a sign", _logps_case([-2.0], [-1.2])),
    Rung("three samples", "the mean", _logps_case([-1.2, -2.0, -0.7], [-2.0, -1.2, -3.3])),
)

SEQUENCE_KL = Exercise(
    "sequence_kl",
    sequence_kl,
    inputs=_sample_inputs,
    unit="set of samples",
    ladder=SEQUENCE_KL_LADDER,
)


# one step of DPO on two models


class Toy(nn.Module):
    """A small causal model: the mean of the embeddings so far, a dropout, and a head.

    Its dropout leaves out every third channel, always the same ones, so that a step with dropout on
    has numbers of its own. In training mode it is on, as in a model that has just been made.
    """

    def __init__(self, vocabulary: int, width: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        self.embedding = nn.Parameter(1.5 * draw(vocabulary, width))
        self.head = nn.Parameter(1.5 * draw(width, vocabulary) / width**0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, L, V) of each next token, from ids (B, L)."""
        steps = torch.arange(1, input_ids.shape[1] + 1, dtype=self.embedding.dtype)
        past = torch.tanh(self.embedding[input_ids].cumsum(1) / steps[:, None])
        if self.training:
            kept = torch.arange(past.shape[2]) % 3 > 0
            past = past * kept * 1.5
        return past @ self.head

    @functools.cache  # noqa: B019 (as few as there are seeds)
    @torch.no_grad()
    def token_logps(self, ids: tuple[int, ...], dropout: bool, table: str = "") -> Array:
        """The log-prob of each token but the first given those before it, (L - 1,)."""
        found = copy.deepcopy(self).train(dropout)(torch.tensor([ids]))[0].numpy()
        if table != "raw":
            found = log_softmax(found)
        if table == "probabilities":
            found = np.exp(found)
        return np.take_along_axis(found[:-1], np.array(ids)[1:, None], 1)[:, 0]


def dpo_step(
    policy: Toy,
    reference: Toy,
    prompts: list[list[int]],
    chosen: list[list[int]],
    rejected: list[list[int]],
    beta: float,
    *,
    dropout: str = "",
    scorer: str = "",
    count: str = "",
    table: str = "",
    normal: str = "",
    place: str = "",
    pair: str = "",
    link: str = "",
    reduce: str = "",
    sign: str = "",
) -> Array | None:
    """The mean DPO loss of pairs given as token ids, () nats."""

    on_policy, on_reference = dropout in ("on", "on policy"), dropout in ("on", "on reference")
    longest = max(len(x) + len(y) for x, y in zip(prompts * 2, chosen + rejected))

    def score(model: Toy, on: bool, x: list[int], y: list[int], longest_of_side: int) -> float:
        n = len(x)
        padded = {"padding counted": longest, "padding of its side": longest_of_side}
        ids = x + y + [0] * (padded.get(count, 0) - len(x + y))
        logps = model.token_logps(tuple(ids), on, table)[n - 1 :]
        kept = {"EOS dropped": slice(0, -1), "first dropped": slice(1, None)}
        logps = logps[kept.get(count, slice(None))]
        return {
            "": lambda: logps.sum(),
            "mean": lambda: logps.mean(),
            "mean over length": lambda: logps.sum() / (longest - 1),
            "root": lambda: logps.sum() / len(logps) ** 0.5,
        }[normal]()

    def scores(model: Toy, on: bool, side: list[list[int]]) -> Array:
        longest_of_side = max(len(x) + len(y) for x, y in zip(prompts, side))
        return np.array([score(model, on, x, y, longest_of_side) for x, y in zip(prompts, side)])

    ours = np.concatenate([scores(policy, on_policy, side) for side in (chosen, rejected)])
    other = policy if scorer == "policy" else reference
    theirs = np.concatenate([scores(other, on_reference, side) for side in (chosen, rejected)])
    first, second = np.arange(len(prompts)), np.arange(len(prompts)) + len(prompts)
    of_reference = {
        "reference omitted": "omitted",
        "reference added": "added",
        "policy omitted": "only",
    }.get(pair, "")
    names = {"reference": of_reference, "pair": "" if of_reference else pair}
    names |= {"place": place, "link": link}
    losses = dpo_loss(ours, theirs, first, second, beta, **names)
    if losses is None:
        return None
    losses = -losses if sign == "negative" else losses
    return {"": losses.mean, "sum": losses.sum, "none": lambda: losses}[reduce]()


def _step_inputs(rng: np.random.Generator, p: int) -> Inputs:
    """Texts of different lengths, all completions closed by token 0; one margin is below 1/2."""
    vocabulary = 2 * p + 3

    def texts(low: int, closed: bool) -> list[list[int]]:
        lengths = rng.permutation(np.arange(p) + low)
        return [rng.integers(1, vocabulary, n).tolist() + [0] * closed for n in lengths]

    while True:
        policy, reference = (Toy(vocabulary, 6, int(seed)) for seed in rng.integers(0, 2**31, 2))
        inputs = {
            "policy": policy,
            "reference": reference,
            "prompts": texts(1, False),
            "chosen": texts(2, True),
            "rejected": texts(1, True),
            "beta": float(rng.choice(BETAS)),
        }
        minus_margins = dpo_step(**inputs, link="none", reduce="none")
        assert minus_margins is not None
        if minus_margins.max() > -0.5:
            return inputs


def _step_case(prompts: list, chosen: list, rejected: list, beta: float) -> Inputs:
    return {
        "policy": Toy(5, 6, 0).eval(),
        "reference": Toy(5, 6, 1).eval(),
        "prompts": prompts,
        "chosen": chosen,
        "rejected": rejected,
        "beta": beta,
    }


def gradients_of_step(value: Tensor, given: dict[str, Any]) -> tuple[str, str] | None:
    """The name of a mistake in the gradient of a step, and what to say; None without one."""
    if not value.requires_grad:
        return "no gradient", (
            "no gradient flows back to the policy: training would change nothing. Stay in torch "
            "from end to end."
        )
    for name, wanted in (("policy", True), ("reference", False)):
        weights = list(given[name].parameters())
        found = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        reached = any(gradient is not None for gradient in found)
        if reached and not wanted:
            return "reference has a gradient", (
                "a gradient flows into the reference, which takes memory and would train it if an "
                "optimizer held it. Compute its log-probs under torch.no_grad()."
            )
        if wanted and not reached:
            return "no gradient", "no gradient flows back to the policy: is a part detached?"
    return None


# from the simplest inputs up
DPO_STEP_LADDER = (
    Rung(
        "one pair of completions of one token",
        "the log-probs of one row",
        _step_case([[1, 2]], [[3]], [[4]], 1.0),
    ),
    Rung(
        "completions of one length",
        "the sum over tokens",
        _step_case([[1, 2]], [[3, 1, 0]], [[4, 4, 0]], 1.0),
    ),
    Rung("another beta", "where beta stands", _step_case([[1, 2]], [[3, 0]], [[4, 0]], 0.5)),
    Rung(
        "completions of different lengths",
        "padding and mask",
        _step_case([[1, 2]], [[3, 1, 0]], [[4, 0]], 0.5),
    ),
    Rung(
        "two prompts of different lengths",
        "where each completion begins",
        _step_case([[1, 2], [4, 3, 1]], [[3, 1, 0], [2, 0]], [[4, 0], [1, 1, 0]], 0.5),
    ),
)

DPO_STEP = Exercise(
    "dpo_step",
    dpo_step,
    inputs=_step_inputs,
    unit="batch",
    also=gradients_of_step,
    ladder=DPO_STEP_LADDER,
)

EXERCISES = (SEQUENCE_LOGPS, SEQUENCE_KL, DPO_STEP)
