"""How good a policy is: reward and sequence KL over sampled completions, and accuracy on pairs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import norm
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpo_lab.engine.arguments import checked, floats, integer, token_lists
from dpo_lab.engine.cpu import return_freed_memory
from dpo_lab.logprobs import Precision, score_completions
from dpo_lab.losses import check_beta
from dpo_lab.models import check_same_vocabulary, end_tokens
from dpo_lab.preferences import Preferences
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


@dataclass(frozen=True)
class PairEvaluation:
    """How a policy's implicit reward orders pairs whose order is known."""

    pairs: int
    """how many"""
    accuracy: float
    """fraction of pairs whose chosen answer has the higher implicit reward, ties counting half"""
    accuracy_low: float
    """lower end of its Wilson interval at 95 %"""
    accuracy_high: float
    """upper end"""
    margin: float
    """mean difference of the implicit rewards, in units of beta x nats"""
    margin_se: float
    """standard error of the mean margin"""
    logps_chosen: float
    """mean log-prob of the chosen answers, nats per answer"""
    logps_rejected: float
    """mean log-prob of the rejected answers, nats per answer"""
    log_ratio_chosen: float
    """mean log-ratio to the reference of the chosen answers, in nats; below 0 it has lost
    probability"""
    log_ratio_rejected: float
    """mean log-ratio of the rejected answers, in nats"""

    def summary(self) -> dict[str, float]:
        """The fields, as they are recorded."""
        return asdict(self)


@checked
def evaluate_pairs(
    policy: nn.Module | None,
    preferences: Preferences,
    beta: float,
    *,
    progress: str | None = None,
) -> PairEvaluation:
    """Accuracy and margin of the implicit reward beta log(pi/pi_ref) on pairs, held-out ones.

    Pairs that share a prompt count as independent in the interval.

    Args:
        policy: a causal LM, computed in the precision of the reference log-probs; None for the
            reference itself, whose margins are 0.
        preferences: P pairs, at least two, with stored `reference_logps`.
        beta: strength of the KL constraint.
        progress: a name for a progress bar; without it there is none.

    Raises:
        ValueError: no reference log-probs, fewer than two pairs, or a beta that is not positive.
    """
    p, beta = preferences, check_beta(beta)
    if p.reference_logps is None:
        raise ValueError(
            "preferences has no reference_logps; call preferences.with_reference(model) with the "
            "reference model"
        )
    if len(p.chosen) < 2:
        raise ValueError(f"preferences has {len(p.chosen)} pair; an error bar needs at least 2")

    # the completions of the pairs, each scored once
    used, chosen, rejected = p.completions_of(range(len(p.chosen)))
    reference = p.reference_logps[used]
    logps = reference
    if policy is not None:
        completions = [p.completions[i] for i in used]
        options = {"precision": p.reference_precision, "progress": progress}
        logps = score_completions(policy, p.prompts, completions, p.prompt_of[used], **options)
        logps = logps.double().cpu().numpy()

    ratios = logps - reference
    margins = beta * (ratios[chosen] - ratios[rejected])
    accuracy, low, high = win_rate(margins, np.zeros(len(margins)))
    return PairEvaluation(
        pairs=len(margins),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        margin=float(margins.mean()),
        margin_se=float(margins.std(ddof=1) / np.sqrt(len(margins))),
        logps_chosen=float(logps[chosen].mean()),
        logps_rejected=float(logps[rejected].mean()),
        log_ratio_chosen=float(ratios[chosen].mean()),
        log_ratio_rejected=float(ratios[rejected].mean()),
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
