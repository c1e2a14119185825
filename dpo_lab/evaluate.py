"""How good a policy is: mean reward and sequence KL to the reference, against the best that any policy can do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpo_lab.imdb import sample_completions, texts_of
from dpo_lab.logprobs import Precision, score_completions


@dataclass(frozen=True)
class Evaluation:
    """Mean reward and sequence KL(policy || reference) in nats over sampled completions, with standard errors."""

    reward: float
    reward_se: float
    kl: float
    kl_se: float
    texts: tuple[str, ...]  # prompt and completion, in the order of the prompts
    rewards: tuple[float, ...]


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
    completions = sample_completions(
        policy,
        prompts,
        1,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=max_new_tokens,
        seed=seed,
        precision=precision,
        progress=progress,
    )
    texts = [row[0] for row in texts_of(tokenizer, prompts, completions)]
    flat, owners = [row[0] for row in completions], range(len(prompts))
    log_ratios = np.zeros(len(flat))
    if policy is not reference:
        scored = [score_completions(model, prompts, flat, owners) for model in (policy, reference)]
        log_ratios = (scored[0] - scored[1]).numpy()
    rewards = reward(texts)
    error = np.sqrt(len(prompts))
    return Evaluation(
        reward=float(rewards.mean()),
        reward_se=float(rewards.std(ddof=1) / error),
        kl=float(log_ratios.mean()),
        kl_se=float(log_ratios.std(ddof=1) / error),
        texts=tuple(texts),
        rewards=tuple(float(r) for r in rewards),
    )


def optimal_frontier(scores: np.ndarray, betas: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reward and sequence KL of the optimal policy pi_ref exp(r / beta) / Z, estimated from reference samples.

    Args:
        scores: (M, K) rewards of K completions of each of M prompts, sampled from the reference.
        betas: (B,) strengths of the KL constraint, positive.

    Returns:
        mean reward (B,), KL = E*[r] / beta - log Z in nats (B,), and the smallest mean effective sample size (B,) of the K
        samples a prompt. By self-normalised importance sampling; where the effective size nears 1 it is no longer valid:
        the KL cannot exceed log K.
    """
    scores, betas = np.asarray(scores, dtype=np.float64), np.asarray(betas, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] < 2 or not (betas > 0).all():
        raise ValueError(f"scores has shape {scores.shape} and betas {betas}; need (M, K) scores with K >= 2 and positive betas")
    tilt = scores / betas[:, None, None]  # (B, M, K)
    top = tilt.max(-1, keepdims=True)
    weights = np.exp(tilt - top)
    log_z = np.log(weights.mean(-1)) + top[..., 0]  # (B, M)
    weights /= weights.sum(-1, keepdims=True)
    best = (weights * scores).sum(-1)  # (B, M)
    kl = best / betas[:, None] - log_z
    return best.mean(1), kl.mean(1), (1 / (weights**2).sum(-1)).mean(1)
