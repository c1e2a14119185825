"""How good a policy is: mean reward and sequence KL to the reference, over sampled completions."""

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
from dpo_lab.models import check_same_vocabulary, end_tokens
from dpo_lab.sampling import sample_completions, texts_of


@dataclass(frozen=True)
class Evaluation:
    """Mean reward and sequence KL(policy || reference) over sampled completions."""

    reward: float
    """mean reward"""
    reward_se: float
    """standard error of the mean reward"""
    kl: float
    """sequence KL in nats"""
    kl_se: float
    """standard error of the sequence KL"""
    texts: tuple[str, ...]
    """prompt and completion, in the order of the prompts"""
    rewards: tuple[float, ...]
    """the reward of each text"""
    completions: tuple[tuple[int, ...], ...]
    """token ids of each completion"""

    def summary(self) -> dict[str, float]:
        """The means and their standard errors, as they are recorded."""
        return {name: getattr(self, name) for name in ("reward", "reward_se", "kl", "kl_se")}


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
    """Sample one completion per prompt from `policy` at temperature 1, and score it.

    The KL is the mean of log pi(y|x) - log pi_ref(y|x) over y ~ pi; single values may be negative.
    It is unbiased where y is drawn in the precision in which it is scored, float32: bfloat16 draws
    from a slightly different distribution than pi. Where `policy` is `reference` itself it is 0 by
    definition, and not computed.

    Args:
        policy, reference: causal LMs with the same vocabulary.
        prompts: token ids of each prompt.
        reward: gives the rewards (N,) of N texts, prompt and completion together.
        tokenizer: the one of both models.
        max_new_tokens: completions are truncated at this length.
        seed: of the samples.
        precision: in which samples are drawn; log-probs are always computed in float32.
        progress: a name for a progress bar; without it there is none.

    Raises:
        ValueError: as `sample_completions`; the models have different vocabularies; or `reward`
            does not give one number per text.
    """
    prompts = token_lists("prompts", prompts)
    check_same_vocabulary(policy, reference)
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

    # what sampling needed, before scoring needs other sizes
    return_freed_memory()

    # log-ratios (N,), which are 0 without a difference
    flat, owners = [row[0] for row in completions], range(len(prompts))
    log_ratios = np.zeros(len(flat))
    if policy is not reference:
        scored = [score_completions(model, prompts, flat, owners) for model in (policy, reference)]
        log_ratios = (scored[0] - scored[1]).numpy()

    texts = [row[0] for row in texts_of(tokenizer, prompts, completions)]
    rewards = floats("reward", reward(texts))
    if rewards.shape != (len(texts),):
        raise ValueError(
            f"reward gave the shape {rewards.shape} for {len(texts)} texts; it must be (N,), one "
            "number each"
        )

    root_n = np.sqrt(len(prompts))
    return Evaluation(
        reward=float(rewards.mean()),
        reward_se=float(rewards.std(ddof=1) / root_n),
        kl=float(log_ratios.mean()),
        kl_se=float(log_ratios.std(ddof=1) / root_n),
        texts=tuple(texts),
        rewards=tuple(float(r) for r in rewards),
        completions=tuple(map(tuple, flat)),
    )


def win_rate(
    rewards: Sequence[float], baseline: Sequence[float], *, level: float = 0.95
) -> tuple[float, float, float]:
    """Fraction of prompts on which the reward is higher than the baseline's, ties counting half.

    Returns the rate and the ends of its Wilson interval at `level`.

    Raises:
        ValueError: not as many rewards as baseline rewards, or none.
    """
    gap = floats("rewards", rewards) - floats("baseline", baseline)
    if gap.ndim != 1 or not len(gap):
        raise ValueError(
            f"rewards and baseline give {gap.shape} differences; give two lists of one reward per "
            "prompt"
        )
    n, rate, z = len(gap), float(np.mean((gap > 0) + (gap == 0) / 2)), norm.ppf(0.5 + level / 2)

    # Wilson: pulled toward one half, by as much as z**2 further prompts would
    center = rate + z**2 / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    scale = 1 + z**2 / n
    return rate, float((center - half) / scale), float((center + half) / scale)


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of the completions' tokens.

    It falls when completions repeat themselves or each other, and with sample size: compare equal
    numbers. Li et al. 2016, https://arxiv.org/abs/1510.03055

    Raises:
        ValueError: n below 1, or no completion that long.
    """
    completions, n = token_lists("completions", completions), integer("n", n)
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least 1 token")
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    if not grams:
        raise ValueError(f"no completion has {n} tokens, so there is no {n}-gram; take a smaller n")
    return len(set(grams)) / len(grams)
