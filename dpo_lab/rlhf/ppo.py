"""PPO for language models: sample, score, and step towards what scored better, near the reference and near the last policy.

What RLHF does where DPO needs one loss: four models instead of one or two, and new samples at every step (Section 3 of
Rafailov et al. 2023; Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; Schulman et al. 2017,
https://arxiv.org/abs/1707.06347). `bandit.policy_gradient` is the same loop where it can be seen whole.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_lab.batching import CompletionBatch, completion_batch
from dpo_lab.engine.arguments import checked, finite_positive, folder, number, settled, token_lists
from dpo_lab.engine.cpu import kept_memory, matmuls_by_onednn
from dpo_lab.engine.distributed import from_main
from dpo_lab.engine.records import locked, require_unused
from dpo_lab.engine.runs import append_metrics
from dpo_lab.engine.structure import check_trainable, context_of, unwrapped, widest
from dpo_lab.logprobs import Precision, autocast, can_compact, completion_logps
from dpo_lab.loop import Callback
from dpo_lab.losses import clipped_value_loss, ppo_clip_loss
from dpo_lab.models import ScalarModel
from dpo_lab.sampling import sample_completions


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Rewards (N, L) of tokens: each pays its penalty (N, L), and the last one of a completion gets the score (N,)."""
    last = torch.nn.functional.one_hot(mask.sum(1) - 1, mask.shape[1])  # (N, L)
    return torch.where(mask, penalties + last * scores[:, None], 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, L) of tokens, by generalized advantage estimation (Schulman et al. 2015, arXiv:1506.02438).

    A_t = d_t + gamma lam A_(t+1) with d_t = r_t + gamma V_(t+1) - V_t; behind a row's last token V and A are zero. `mask`
    (N, L) is True from the first token of a row to its last. Returns are advantages plus values.
    """
    gamma, lam = number("gamma", gamma), number("lam", lam)
    advantages, after, next_value = (
        torch.zeros_like(rewards),
        rewards.new_zeros(len(rewards)),
        rewards.new_zeros(len(rewards)),
    )
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = after = torch.where(mask[:, t], surprise + gamma * lam * after, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Values (N, L) with mean 0 and variance 1 over `mask`, zero outside; with `keep_mean` the mean stays what it was."""
    some = values[mask]
    mean = some.mean()
    white = (values - mean) / (some.var(correction=0) + 1e-8).sqrt()
    return torch.where(mask, white + mean if keep_mean else white, 0.0)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, gain: float) -> float:
    """The coefficient after a rollout of mean sequence KL `kl` nats: up by at most a fifth of `gain` where it is above target.

    beta (1 + gain e) with e = clip(kl / target - 1, -0.2, 0.2) (Section 2.2 of Ziegler et al. 2019).
    """
    coefficient, gain, kl, target = (
        number(name, value)
        for name, value in (
            ("coefficient", coefficient),
            ("gain", gain),
            ("kl", kl),
            ("target", target),
        )
    )
    return coefficient * (1 + gain * float(np.clip(kl / target - 1, -0.2, 0.2)))


Reward = Callable[
    [list[list[int]], list[list[int]]], np.ndarray
]  # from N prompts and N completions to N rewards


@dataclass(frozen=True)
class PPOConfig:
    """How `train_ppo` samples and steps."""

    steps: int = 24
    """rollouts; each is followed by `epochs` passes over it"""
    batch: int = 128
    """completions a rollout, one a prompt"""
    minibatch: int = 64
    """completions an optimizer step"""
    epochs: int = 2
    """passes over a rollout, in another order each"""
    max_new_tokens: int = 48
    """longest completion"""
    temperature: float = 1.0
    """of sampling; divided out of every log-prob"""
    kl_coefficient: float = 0.1
    """what a nat of KL costs, in standard deviations of the reward on reference samples; the first value where it adapts"""
    kl_target: float | None = None
    """sequence KL in nats that the coefficient is adapted to; None keeps it fixed"""
    kl_gain: float = 0.5
    """how fast it adapts (Section 2.2 of Ziegler et al. 2019)"""
    clip: float = 0.2
    """how far an action's probability may move from the rollout's"""
    value_clip: float = 0.2
    """how far a value may"""
    gamma: float = 1.0
    """discount a token"""
    lam: float = 0.95
    """lambda of generalized advantage estimation"""
    whiten_rewards: bool = False
    """divide the rewards of a rollout's tokens by their standard deviation, as Ziegler et al. do; `value_clip` is then in these"""
    value_coefficient: float = 0.1
    """of the value loss"""
    ptx_coefficient: float = 0.0
    """gamma of InstructGPT's PPO-ptx: weight of the language-model loss on `ptx` batches, nats a token"""
    no_eos_penalty: float = 0.0
    """taken from the score of a completion that was cut before its EOS, in standard deviations of the reward"""
    learning_rate: float = 1e-4
    """of the policy; falls linearly to zero"""
    value_learning_rate: float = 5e-4
    """of the value model; falls with it"""
    adam_eps: float = 1e-5
    """as in the original; torch's default of 1e-8 makes larger first steps"""
    max_grad_norm: float = 1.0
    """gradients of policy and of value model are scaled down to this norm, each"""
    eval_every: int = 4
    """rollouts between evaluations"""


class Roles(NamedTuple):
    """The models of PPO; the fourth role, the reward, is any function, and may be a model too."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    value: ScalarModel


@dataclass(frozen=True)
class Rollout:
    """N completions of at most L tokens and what PPO knows about each token; arrays are (N, L), zero outside `mask`."""

    mask: Tensor
    logps: Tensor  # under the policy that sampled, at the sampling temperature
    log_ratios: Tensor  # logps less those of the reference
    penalties: Tensor  # what the tokens pay for their log-ratios, beside the score
    values: Tensor
    advantages: Tensor  # whitened
    returns: Tensor


def text_reward(
    reward: Callable[[Sequence[str]], np.ndarray], tokenizer: PreTrainedTokenizerBase
) -> Reward:
    """A reward of texts, such as `SentimentReward`, as a reward of token ids."""

    def score(prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
        ids = [[*prompt, *completion] for prompt, completion in zip(prompts, completions)]
        return reward(tokenizer.batch_decode(ids, skip_special_tokens=True))

    return score


@checked
@kept_memory()
def train_ppo(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    value_model: ScalarModel,
    reward: Reward,
    prompts: list[list[int]],
    config: PPOConfig,
    *,
    eos_token_id: int | Sequence[int],
    precision: Precision = "float32",
    seed: int = 0,
    ptx: Callable[[], CompletionBatch] | None = None,
    run: Path | str | None = None,
    callback: Callback | None = None,
    progress: str | None = "PPO",
) -> list[dict[str, Any]]:
    """Train `policy` and `value_model` in place by PPO on the reward, and return the metrics, one dict a rollout.

    Args:
        policy: a causal LM, at first equal to `reference`; dropout is switched off in all models.
        value_model: of the same family and vocabulary; a copy of the reference under a zero head.
        reward: called with N prompts and N completions (token ids). It is normalized by its mean and standard deviation on
            completions of the reference, so that `kl_coefficient` means the same for every reward.
        prompts: token ids, taken in shuffled order.
        ptx: gives a batch of text for each optimizer step, for `ptx_coefficient`.
        run: directory for `metrics.jsonl`, a new one for each run; without it nothing is written.
        callback: called with (policy, rollout), as by `train_dpo`.

    Metrics: `objective/*` of the rollout (reward as given; score, normalized; kl in nats a completion; non_score_reward;
    entropy in nats a token), `policy/*` and `value/*`, means over its updates, `kl_coefficient`, `tokens` sampled so far.

    Raises:
        ValueError, TypeError: before the first step, naming the argument: a bad config, a prompt longer than the context, a value head
            of another size, a reward of the wrong shape or not finite, a `run` that another process holds or that holds an
            earlier run.
    """
    policy, reference = unwrapped(policy), unwrapped(reference)
    config, run = settled(config), None if run is None else folder("run", run)
    prompts = token_lists("prompts", prompts)
    check_ppo(policy, value_model, prompts, config, ptx)
    if run:
        from_main(require_unused, run)
    roles, rng = (
        Roles(policy.eval(), reference.eval(), value_model.eval()),
        np.random.default_rng(seed),
    )
    stops = set(np.ravel(eos_token_id).tolist())
    options = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "precision": precision,
    }

    def sample(model: PreTrainedModel, some: list[list[int]]) -> list[list[int]]:
        rows = sample_completions(
            model, some, 1, eos_token_id=eos_token_id, seed=int(rng.integers(2**31)), **options
        )
        return [row[0] for row in rows]

    first = [prompts[i] for i in rng.choice(len(prompts), min(512, len(prompts)), replace=False)]
    raw = score(reward, first, sample(reference, first))
    mean, deviation = raw.mean(), raw.std() or 1.0
    groups = [
        {"params": list(policy.parameters()), "lr": config.learning_rate},
        {"params": list(value_model.parameters()), "lr": config.value_learning_rate},
    ]
    optimizer = torch.optim.Adam(groups, eps=config.adam_eps)
    annealing = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=config.steps)
    coefficient, tokens, order, history = config.kl_coefficient, 0, [], []

    def log(line: dict[str, Any]) -> None:
        history.append(line)
        if run:
            append_metrics(run, line)

    with (
        locked(run) if run else nullcontext(),
        tqdm(total=config.steps, desc=progress, disable=progress is None, unit="rollout") as bar,
    ):
        if callback:
            log({"step": 0} | {f"eval/{k}": v for k, v in callback(policy, 0).items()})
        for step in range(1, config.steps + 1):
            began = time.perf_counter()
            while len(order) < config.batch:
                order += rng.permutation(len(prompts)).tolist()
            some, order = [prompts[i] for i in order[: config.batch]], order[config.batch :]
            completions = sample(policy, some)
            raw = score(reward, some, completions)
            cut = np.array([ids[-1] not in stops for ids in completions])
            scores = torch.from_numpy((raw - mean) / deviation - config.no_eos_penalty * cut)
            rollout, means = ppo_update(
                roles,
                optimizer,
                some,
                completions,
                scores,
                coefficient,
                config,
                precision,
                rng,
                ptx,
            )
            kl = float(rollout.log_ratios.sum(1).mean())
            tokens += int(rollout.mask.sum())
            objective = {
                "reward": float(raw.mean()),
                "score": float(scores.mean()),
                "kl": kl,
                "non_score_reward": float(rollout.penalties.sum(1).mean()),
                "entropy": -float(rollout.logps[rollout.mask].mean()),
            }
            log(
                {"step": step}
                | {f"objective/{name}": value for name, value in objective.items()}
                | means
                | {
                    "kl_coefficient": coefficient,
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "tokens": tokens,
                }
                | {"seconds": time.perf_counter() - began}
            )
            annealing.step()
            if config.kl_target is not None:
                coefficient = adapted_kl_coefficient(
                    coefficient, kl, config.kl_target, config.kl_gain
                )
            bar.set_postfix(reward=f"{raw.mean():.3f}", kl=f"{kl:.2f}", refresh=False)
            bar.update()
            if callback and (step % config.eval_every == 0 or step == config.steps):
                log({"step": step} | {f"eval/{k}": v for k, v in callback(policy, step).items()})
    return history


@checked
def ppo_update(
    roles: Roles,
    optimizer: torch.optim.Optimizer,
    prompts: list[list[int]],
    completions: list[list[int]],
    scores: Tensor,
    kl_coefficient: float,
    config: PPOConfig,
    precision: Precision,
    rng: np.random.Generator,
    ptx: Callable[[], CompletionBatch] | None,
) -> tuple[Rollout, dict[str, float]]:
    """Assess a rollout, update policy and value model in `epochs` passes over it, and return the means of the statistics."""
    history = []
    for epoch in range(config.epochs):
        parts = np.split(rng.permutation(config.batch), config.batch // config.minibatch)
        minibatches = [(part, batch_of(roles, prompts, completions, part)) for part in parts]
        if epoch == 0:
            rollout = annotate_rollout(
                roles, completions, scores, minibatches, kl_coefficient, config, precision
            )
        for part, batch in minibatches:
            policy_loss, value_loss, stats = minibatch_losses(
                roles, rollout, part, batch, config, precision
            )
            if not history and not stats["policy/ratio_off"] <= 1e-6:
                raise ValueError(
                    f"before its first update the policy's ratio is off 1 by {stats['policy/ratio_off']:.2g}"
                )
            loss = policy_loss + config.value_coefficient * value_loss
            if config.ptx_coefficient:
                ptx_loss = text_loss(roles.policy, ptx(), precision)
                loss = loss + config.ptx_coefficient * ptx_loss
                stats["policy/ptx_loss"] = ptx_loss.item()
            stats["policy/grad_norm"] = update(roles, optimizer, loss, config.max_grad_norm)
            history.append(stats)
    return rollout, {
        name: float(np.mean([stats[name] for stats in history])) for name in history[0]
    }


def batch_of(
    roles: Roles, prompts: list[list[int]], completions: list[list[int]], part: np.ndarray
) -> CompletionBatch:
    """The completions of a minibatch, their tokens in its order."""
    share = all(map(can_compact, (roles.policy, roles.reference, roles.value.model)))
    batch = completion_batch(
        [prompts[i] for i in part], [completions[i] for i in part], range(len(part)), compact=share
    )
    return batch.to(roles.policy.device)


@torch.no_grad()
@checked
def annotate_rollout(
    roles: Roles,
    completions: list[list[int]],
    scores: Tensor,
    minibatches: list[tuple[np.ndarray, CompletionBatch]],
    kl_coefficient: float,
    config: PPOConfig,
    precision: Precision,
) -> Rollout:
    """Everything about sampled completions and their scores (N,) that the updates need.

    It is computed in the minibatches of the first pass, so that their ratio is 1 to the last bit.
    """
    lengths = torch.tensor([len(ids) for ids in completions])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (N, L)
    logps, reference_logps, values = torch.zeros(3, *mask.shape, dtype=torch.float64)
    for part, batch in minibatches:
        with autocast(roles.policy.device.type, precision):
            found = [
                completion_logps(m, batch, reduction="none", temperature=config.temperature)
                for m in roles[:2]
            ]
            found.append(roles.value(batch))
        for array, tokens in zip((logps, reference_logps, values), found):
            rows = torch.zeros(len(part), mask.shape[1], dtype=torch.float64)
            array[part] = rows.masked_scatter_(mask[part], tokens.cpu().double())
    log_ratios = logps - reference_logps
    penalties = -kl_coefficient * log_ratios
    rewards = token_rewards(scores, penalties, mask)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    return Rollout(mask, logps, log_ratios, penalties, values, whiten(advantages, mask), returns)


@checked
def minibatch_losses(
    roles: Roles,
    rollout: Rollout,
    part: np.ndarray,
    batch: CompletionBatch,
    config: PPOConfig,
    precision: Precision,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Policy loss and value loss, means over the tokens of a minibatch, and statistics of the ratio pi / pi_old."""
    inside, device = rollout.mask[part], roles.policy.device
    old, values, advantages, returns = (
        array[part][inside].to(widest(device)).to(device)
        for array in (rollout.logps, rollout.values, rollout.advantages, rollout.returns)
    )  # (T,) each
    with autocast(device.type, precision):
        logps = completion_logps(
            roles.policy, batch, reduction="none", temperature=config.temperature
        )
        new_values = roles.value(batch).to(widest(device))
    policy_loss = ppo_clip_loss(logps, old, advantages, config.clip).mean()
    value_loss = clipped_value_loss(new_values, values, returns, config.value_clip).mean()
    moved = logps.detach() - old
    off = torch.expm1(moved).abs()
    stats = {
        "policy/loss": policy_loss.item(),
        "value/loss": value_loss.item(),
        "value/explained": 1 - float((returns - values).var() / returns.var()),
        "policy/ratio": float(moved.exp().mean()),
        "policy/ratio_off": float(off.max()),
        "policy/approx_kl": float((moved**2).mean() / 2),
        "policy/clip_fraction": float((off > config.clip).to(off.dtype).mean()),
    }
    return policy_loss, value_loss, stats


@checked
def text_loss(policy: PreTrainedModel, batch: CompletionBatch, precision: Precision) -> Tensor:
    """The language-model loss of a batch of text, nats a token."""
    with autocast(policy.device.type, precision):
        return -completion_logps(policy, batch.to(policy.device)).sum() / batch.tokens


def update(
    roles: Roles, optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float
) -> float:
    """One step down the gradient of `loss`; returns the norm of the policy's, before it is cut."""
    with matmuls_by_onednn(roles.policy.device.type):
        loss.backward()
    norm = nn.utils.clip_grad_norm_(roles.policy.parameters(), max_grad_norm)
    nn.utils.clip_grad_norm_(roles.value.parameters(), max_grad_norm)
    if not torch.isfinite(norm):
        raise ValueError(
            f"the gradient's norm is {norm}; lower learning_rate ({optimizer.param_groups[0]['lr']:.2g} now)"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def score(reward: Reward, prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
    """The rewards of N completions, (N,). Raises ValueError unless they are N finite numbers."""
    found = np.asarray(reward(prompts, completions), dtype=np.float64)
    if found.shape != (len(completions),):
        raise ValueError(
            f"reward gave the shape {found.shape} for {len(completions)} completions; it must be (N,), one each"
        )
    if not np.isfinite(found).all():
        i = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ValueError(
            f"reward gave {found[i]} for completion {i}, {completions[i][:8]}...; every reward must be finite"
        )
    return found


@checked
def check_ppo_config(config: PPOConfig) -> None:
    """Raise ValueError for a value that `train_ppo` cannot work with, named with what is allowed."""
    for name in ("steps", "batch", "minibatch", "epochs", "max_new_tokens", "eval_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    positive = (
        "temperature",
        "clip",
        "value_clip",
        "learning_rate",
        "value_learning_rate",
        "adam_eps",
        "max_grad_norm",
    )
    for name in positive if config.kl_target is None else (*positive, "kl_target", "kl_gain"):
        finite_positive(name, getattr(config, name))
    for name in ("kl_coefficient", "value_coefficient", "ptx_coefficient", "no_eos_penalty"):
        if not (math.isfinite(value := getattr(config, name)) and value >= 0):
            raise ValueError(f"{name} is {value}; it must be finite and not negative")
    for name in ("gamma", "lam"):
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise ValueError(f"{name} is {value}; it must be in [0, 1]")
    if config.kl_target is not None and not config.kl_coefficient:
        raise ValueError(
            "kl_coefficient is 0 with a kl_target; a coefficient of 0 stays 0, so begin with a positive one"
        )
    if config.batch % config.minibatch:
        raise ValueError(
            f"batch is {config.batch} and minibatch {config.minibatch}; a rollout must hold whole minibatches"
        )


@checked
def check_ppo(
    policy: PreTrainedModel,
    value_model: ScalarModel,
    prompts: list[list[int]],
    config: PPOConfig,
    ptx: Callable[[], CompletionBatch] | None = None,
) -> None:
    """Raise ValueError for what `train_ppo` cannot work with, named with what is allowed."""
    check_ppo_config(config)
    if config.ptx_coefficient and ptx is None:
        raise ValueError(
            f"ptx_coefficient is {config.ptx_coefficient} without ptx; give a function that returns batches of text"
        )
    check_trainable(policy)
    check_trainable(value_model)
    if not prompts:
        raise ValueError("there are no prompts; give at least one, as token ids with BOS")
    context, longest = context_of(policy), max(map(len, prompts))
    if longest + config.max_new_tokens > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens, and with max_new_tokens {config.max_new_tokens} does not fit the model's "
            f"context of {context}; shorten one or the other"
        )
    size = value_model.model.config.hidden_size
    if value_model.head.weight.shape != (1, size):
        raise ValueError(
            f"the value head has shape {tuple(value_model.head.weight.shape)}; it must be (1, {size}), as its model"
        )
    if (found := value_model.model.config.vocab_size) != policy.config.vocab_size:
        raise ValueError(
            f"the value model has {found} tokens and the policy {policy.config.vocab_size}; they must share a vocabulary"
        )
