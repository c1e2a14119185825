"""How good a policy is: mean reward and sequence KL to the reference, against the best that any policy can do."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpo_lab.engine.arguments import checked, floats, integer, token_lists
from dpo_lab.engine.cpu import return_freed_memory
from dpo_lab.logprobs import Precision, score_completions
from dpo_lab.models import end_tokens
from dpo_lab.sampling import sample_completions, texts_of


@dataclass(frozen=True)
class Evaluation:
    """Mean reward and sequence KL(policy || reference) in nats over sampled completions, with standard errors."""

    reward: float
    reward_se: float
    kl: float
    kl_se: float
    texts: tuple[str, ...]  # prompt and completion, in the order of the prompts
    rewards: tuple[float, ...]
    completions: tuple[tuple[int, ...], ...]  # token ids


@checked
def evaluate_policy(
    policy: nn.Module,
    reference: nn.Module,
    prompts: list[list[int]],
    reward: Callable[[Sequence[str]], np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    seed: int = 0,
    precision: Precision = "float32",
    progress: str | None = None,
) -> Evaluation:
    """Sample one completion a prompt from `policy` at temperature 1, in `precision`, and score it in float32.

    The KL is the mean of log pi(y|x) - log pi_ref(y|x) over y ~ pi, which is unbiased; single values may be negative.
    """
    prompts = token_lists("prompts", prompts)
    completions = sample_completions(
        policy,
        prompts,
        1,
        eos_token_id=end_tokens(policy, tokenizer),
        max_new_tokens=max_new_tokens,
        seed=seed,
        precision=precision,
        progress=progress,
    )
    return_freed_memory()  # what sampling needed, before scoring needs other sizes
    texts = [row[0] for row in texts_of(tokenizer, prompts, completions)]
    flat, owners = [row[0] for row in completions], range(len(prompts))
    log_ratios = np.zeros(len(flat))
    if policy is not reference:
        scored = [score_completions(model, prompts, flat, owners) for model in (policy, reference)]
        log_ratios = (scored[0] - scored[1]).numpy()
    rewards = floats("reward", reward(texts))
    if rewards.shape != (len(texts),):
        raise ValueError(
            f"reward gave the shape {rewards.shape} for {len(texts)} texts; it must be (N,), one number each"
        )
    error = np.sqrt(len(prompts))
    return Evaluation(
        reward=float(rewards.mean()),
        reward_se=float(rewards.std(ddof=1) / error),
        kl=float(log_ratios.mean()),
        kl_se=float(log_ratios.std(ddof=1) / error),
        texts=tuple(texts),
        rewards=tuple(float(r) for r in rewards),
        completions=tuple(map(tuple, flat)),
    )


def win_rate(
    rewards: Sequence[float], baseline: Sequence[float], *, level: float = 0.95
) -> tuple[float, float, float]:
    """Share of prompts whose completion has a higher reward than the baseline's, ties one half, and its interval (Wilson).

    Raises:
        ValueError: not as many rewards as baseline rewards, or none.
    """
    gap = floats("rewards", rewards) - floats("baseline", baseline)
    if gap.ndim != 1 or not len(gap):
        raise ValueError(
            f"rewards and baseline give {gap.shape} differences; give two lists of one reward a prompt"
        )
    rate, z = float(np.mean((gap > 0) + (gap == 0) / 2)), norm.ppf(0.5 + level / 2)
    center, half = (
        rate + z**2 / (2 * len(gap)),
        z * math.sqrt(rate * (1 - rate) / len(gap) + (z / (2 * len(gap))) ** 2),
    )
    return (
        rate,
        float((center - half) / (1 + z**2 / len(gap))),
        float((center + half) / (1 + z**2 / len(gap))),
    )


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of the completions' tokens (Li et al. 2016, https://arxiv.org/abs/1510.03055).

    It falls when completions repeat themselves or each other, and with their number: compare only as many with as many.
    """
    completions, n = token_lists("completions", completions), integer("n", n)
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least 1 token")
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    if not grams:
        raise ValueError(f"no completion has {n} tokens, so there is no {n}-gram; take a smaller n")
    return len(set(grams)) / len(grams)
