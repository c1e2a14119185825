"""PPO for language models: sample, score, and step towards what scored better than expected.

What RLHF does where DPO needs one loss: four models instead of one or two, and new samples at every
step (Section 3 of Rafailov et al. 2023; Ziegler et al. 2019, https://arxiv.org/abs/1909.08593;
Schulman et al. 2017, https://arxiv.org/abs/1707.06347). `theory.bandit.policy_gradient` is the same
loop on a problem small enough to see whole.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
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
from dpo_lab.engine.arguments import checked, finite_positive, folder, settled, token_lists
from dpo_lab.engine.cpu import kept_memory, matmuls_by_onednn
from dpo_lab.engine.distributed import from_main
from dpo_lab.engine.records import locked, require_unused
from dpo_lab.engine.runs import append_metrics
from dpo_lab.engine.structure import check_trainable, context_of, unwrapped, widest
from dpo_lab.logprobs import Precision, autocast, can_compact, completion_logps
from dpo_lab.loop import Callback
from dpo_lab.losses import clipped_value_loss, ppo_clip_loss
from dpo_lab.models import ScalarModel
from dpo_lab.rlhf.advantages import adapted_kl_coefficient, gae, token_rewards, whiten
from dpo_lab.sampling import sample_completions

Reward = Callable[[list[list[int]], list[list[int]]], np.ndarray]
"""From N prompts and N completions, as token ids, to N rewards."""

REWARD_SAMPLES = 512
"""completions of the reference, at most, on which the reward is normalized"""


@dataclass(frozen=True)
class PPOConfig:
    """How `train_ppo` samples and steps."""

    steps: int = 24
    """rollouts; each is followed by `epochs` passes over it"""
    batch: int = 128
    """completions per rollout, one per prompt"""
    minibatch: int = 64
    """completions per optimizer step"""
    epochs: int = 2
    """passes over a rollout, in another order each"""
    max_new_tokens: int = 48
    """longest completion"""
    temperature: float = 1.0
    """of sampling; divided out of every log-prob"""
    kl_coefficient: float = 0.1
    """what a nat of KL costs, in standard deviations of the reward on reference samples; the first
    value where it adapts"""
    kl_target: float | None = None
    """sequence KL in nats that the coefficient is adapted to; None keeps it fixed"""
    kl_gain: float = 0.5
    """how fast it adapts (Section 2.2 of Ziegler et al. 2019)"""
    clip: float = 0.2
    """how far an action's probability may move from the rollout's"""
    value_clip: float = 0.2
    """how far a value may"""
    gamma: float = 1.0
    """discount per token"""
    lam: float = 0.95
    """lambda of generalized advantage estimation"""
    whiten_rewards: bool = False
    """divide the rewards of a rollout's tokens by their standard deviation, as Ziegler et al. do;
    `value_clip` is then in these units"""
    value_coefficient: float = 0.1
    """of the value loss"""
    ptx_coefficient: float = 0.0
    """gamma of InstructGPT's PPO-ptx (Eq. 2 of Ouyang et al. 2022): weight of the language-model
    loss on `ptx` batches, in nats per token, beside PPO's loss per token, whose advantages have
    variance 1. Their 27.8 weighs gradients of other units (docs/tax.md)"""
    no_eos_penalty: float = 0.0
    """subtracted from the score of a completion truncated before its EOS, in standard deviations of
    the reward"""
    learning_rate: float = 1e-4
    """of the policy; falls linearly to zero"""
    value_learning_rate: float = 5e-4
    """of the value model; falls with it"""
    adam_eps: float = 1e-5
    """as in the original; torch's default of 1e-8 makes larger first steps"""
    max_grad_norm: float = 1.0
    """gradients of policy and value model are scaled down to this norm, each"""
    eval_every: int = 4
    """rollouts between evaluations"""


class Roles(NamedTuple):
    """The models of PPO; the fourth role, the reward, is any function, and may be a model too."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    value: ScalarModel


@dataclass(frozen=True)
class Rollout:
    """N completions of at most L tokens, and what PPO knows about each token.

    Tensors are (N, L), zero outside `mask`.
    """

    mask: Tensor
    logps: Tensor
    """under the policy that sampled, at the sampling temperature"""
    log_ratios: Tensor
    """logps minus those of the reference"""
    penalties: Tensor
    """what the tokens pay for their log-ratios, beside the score"""
    values: Tensor
    advantages: Tensor
    """whitened"""
    returns: Tensor


def text_reward(
    reward: Callable[[Sequence[str]], np.ndarray], tokenizer: PreTrainedTokenizerBase
) -> Reward:
    """A reward of texts, such as `SentimentReward`, as a reward of token ids."""

    def of_ids(prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
        ids = [[*prompt, *completion] for prompt, completion in zip(prompts, completions)]
        return reward(tokenizer.batch_decode(ids, skip_special_tokens=True))

    return of_ids


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
    """Train `policy` and `value_model` in place by PPO; one dict of metrics per rollout.

    Args:
        policy: a causal LM, at first equal to `reference`; dropout is switched off in all models.
        value_model: of the same family and vocabulary. A copy of the reference under a zero head is
            what this project uses; InstructGPT starts from the reward model (`value_model_from`).
            Any start can be passed: on the sentiment task the reward model's explained 0.6 of the
            variance of the returns in the first rollout, less than the zero head's from the second
            to the fourth, and no more at the end (benchmarks/value_start.py, 2 seeds).
        reward: called with N prompts and N completions (token ids). It is normalized by its mean
            and standard deviation on completions of the reference, so that `kl_coefficient` means
            the same for every reward.
        prompts: token ids, taken in shuffled order.
        ptx: gives a batch of text for each optimizer step, for `ptx_coefficient`
            (`sentiment.text_batches`). InstructGPT's has 8 times as many texts as completions.
        run: directory for `metrics.jsonl`, a new one for each run; without it nothing is written.
        callback: called with (policy, rollout), as by `train_dpo`.

    Metrics: `objective/*` of the rollout (reward as given; score, which is normalized; kl in nats
    per completion; non_score_reward; entropy in nats per token), `policy/*` and `value/*`, which
    are means over its updates, `kl_coefficient`, and `tokens` sampled so far.

    Raises:
        ValueError, TypeError: before the first step, naming the argument: a bad config, a prompt
            longer than the context, a value head of another size, a reward of the wrong shape or
            not finite, a `run` that another process holds or that holds an earlier run.
    """
    roles = Roles(unwrapped(policy), unwrapped(reference), value_model)
    config, run = settled(config), None if run is None else folder("run", run)
    prompts = token_lists("prompts", prompts)
    check_ppo(roles.policy, value_model, prompts, config, ptx)
    if run:
        from_main(require_unused, run)

    ppo = _PPO(roles, config, precision, eos_token_id, seed, ptx)
    ppo.normalize(reward, prompts)
    batches = _shuffled_batches(prompts, config.batch, ppo.rng)
    history, tokens = [], 0

    def log(line: dict[str, Any]) -> None:
        history.append(line)
        if run:
            append_metrics(run, line)

    def evaluate(step: int) -> None:
        if callback:
            found = callback(roles.policy, step)
            log({"step": step} | {f"eval/{name}": value for name, value in found.items()})

    bar = tqdm(total=config.steps, desc=progress, disable=progress is None, unit="rollout")
    with locked(run) if run else nullcontext(), bar:
        evaluate(0)
        for step in range(1, config.steps + 1):
            began = time.perf_counter()

            # sample, and score
            some = next(batches)
            completions = ppo.sample(roles.policy, some)
            rewards = score(reward, some, completions)
            scores = ppo.normalized(rewards, completions)

            # step towards what scored better than expected
            rollout, means = ppo_update(ppo, some, completions, scores)

            # log
            tokens += int(rollout.mask.sum())
            line = {"step": step, **_objective(rollout, rewards, scores), **means}
            line |= {"kl_coefficient": ppo.kl_coefficient, "learning_rate": ppo.learning_rate}
            log(line | {"tokens": tokens, "seconds": time.perf_counter() - began})
            reward_now, kl = line["objective/reward"], line["objective/kl"]
            bar.set_postfix(reward=f"{reward_now:.3f}", kl=f"{kl:.2f}", refresh=False)
            bar.update()

            # a smaller rate, another price of KL, and a look at the policy
            ppo.anneal(kl)
            if step % config.eval_every == 0 or step == config.steps:
                evaluate(step)
    return history


class _PPO:
    """What a run of PPO settles once, and the little that changes from rollout to rollout."""

    def __init__(
        self,
        roles: Roles,
        config: PPOConfig,
        precision: Precision,
        eos_token_id: int | Sequence[int],
        seed: int,
        ptx: Callable[[], CompletionBatch] | None,
    ):
        # no dropout, or the first ratio would not be 1
        for model in roles:
            model.eval()
        self.roles, self.config, self.precision, self.ptx = roles, config, precision, ptx
        self.rng, self.ends = np.random.default_rng(seed), set(np.ravel(eos_token_id).tolist())
        self.sampling = {
            "eos_token_id": eos_token_id,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "precision": precision,
        }

        # policy and value model step together, each at its own rate
        groups = [
            {"params": list(roles.policy.parameters()), "lr": config.learning_rate},
            {"params": list(roles.value.parameters()), "lr": config.value_learning_rate},
        ]
        self.optimizer = torch.optim.Adam(groups, eps=config.adam_eps)
        steps = {"total_iters": config.steps}
        self.annealing = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, **steps)
        self.kl_coefficient = config.kl_coefficient

    @property
    def learning_rate(self) -> float:
        """Of the policy, now."""
        return self.optimizer.param_groups[0]["lr"]

    def sample(self, model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
        """A completion of each prompt."""
        seed = int(self.rng.integers(2**31))
        rows = sample_completions(model, prompts, 1, seed=seed, **self.sampling)
        return [row[0] for row in rows]

    def normalize(self, reward: Reward, prompts: list[list[int]]) -> None:
        """Take the mean and standard deviation of the reward on completions of the reference."""
        n = min(REWARD_SAMPLES, len(prompts))
        first = [prompts[i] for i in self.rng.choice(len(prompts), n, replace=False)]
        raw = score(reward, first, self.sample(self.roles.reference, first))
        self.mean, self.deviation = raw.mean(), raw.std() or 1.0

    def normalized(self, rewards: np.ndarray, completions: list[list[int]]) -> Tensor:
        """Scores (N,) of rewards (N,): in standard deviations, minus the price of a missing EOS."""
        truncated = np.array([ids[-1] not in self.ends for ids in completions])
        scores = (rewards - self.mean) / self.deviation - self.config.no_eos_penalty * truncated
        return torch.from_numpy(scores)

    def anneal(self, kl: float) -> None:
        """Lower the learning rates, and move the KL coefficient towards its target."""
        self.annealing.step()
        target, gain = self.config.kl_target, self.config.kl_gain
        if target is not None:
            self.kl_coefficient = adapted_kl_coefficient(self.kl_coefficient, kl, target, gain)


def _shuffled_batches(
    prompts: list[list[int]], size: int, rng: np.random.Generator
) -> Iterator[list[list[int]]]:
    """Batches of `size` prompts without end, all prompts in a new order before one comes again."""
    order: list[int] = []
    while True:
        while len(order) < size:
            order += rng.permutation(len(prompts)).tolist()
        yield [prompts[i] for i in order[:size]]
        order = order[size:]


def _objective(rollout: Rollout, rewards: np.ndarray, scores: Tensor) -> dict[str, float]:
    """The metrics of a rollout, means over its completions or tokens."""
    return {
        "objective/reward": float(rewards.mean()),
        "objective/score": float(scores.mean()),
        "objective/kl": float(rollout.log_ratios.sum(1).mean()),
        "objective/non_score_reward": float(rollout.penalties.sum(1).mean()),
        "objective/entropy": -float(rollout.logps[rollout.mask].mean()),
    }


def ppo_update(
    ppo: _PPO, prompts: list[list[int]], completions: list[list[int]], scores: Tensor
) -> tuple[Rollout, dict[str, float]]:
    """Annotate a rollout, and update policy and value model in `epochs` passes over it.

    Returns the rollout, and the means of the updates' statistics.
    """
    roles, config, precision = ppo.roles, ppo.config, ppo.precision
    history: list[dict[str, float]] = []
    for epoch in range(config.epochs):
        parts = np.split(ppo.rng.permutation(config.batch), config.batch // config.minibatch)
        minibatches = [(part, batch_of(roles, prompts, completions, part)) for part in parts]

        # all that the updates need, before the first of them
        if epoch == 0:
            rollout = annotate_rollout(
                roles, completions, scores, minibatches, ppo.kl_coefficient, config, precision
            )

        for part, batch in minibatches:
            policy_loss, value_loss, stats = minibatch_losses(
                roles, rollout, part, batch, config, precision
            )
            if not history and not stats["policy/ratio_off"] <= 1e-6:
                raise ValueError(
                    "before its first update the policy's ratio is off 1 by "
                    f"{stats['policy/ratio_off']:.2g}"
                )

            # PPO-ptx: stay a good model of text as well
            loss = policy_loss + config.value_coefficient * value_loss
            if config.ptx_coefficient:
                ptx_loss = text_loss(roles.policy, ppo.ptx(), precision)
                loss = loss + config.ptx_coefficient * ptx_loss
                stats["policy/ptx_loss"] = ptx_loss.item()

            stats["policy/grad_norm"] = update(roles, ppo.optimizer, loss, config.max_grad_norm)
            history.append(stats)

    names = history[0]
    return rollout, {name: float(np.mean([stats[name] for stats in history])) for name in names}


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

    It is computed in the minibatches of the first pass, so that their ratio is exactly 1.
    """
    lengths = torch.tensor([len(ids) for ids in completions])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (N, L)
    logps, reference_logps, values = torch.zeros(3, *mask.shape, dtype=torch.float64)

    # log-probs and values of the tokens, from all three models
    for part, batch in minibatches:
        with autocast(roles.policy.device.type, precision):
            options = {"reduction": "none", "temperature": config.temperature}
            found = [completion_logps(model, batch, **options) for model in roles[:2]]
            found.append(roles.value(batch))
        for array, tokens in zip((logps, reference_logps, values), found):
            rows = torch.zeros(len(part), mask.shape[1], dtype=torch.float64)
            array[part] = rows.masked_scatter_(mask[part], tokens.cpu().double())

    # every token pays for its log-ratio, the last one gets the score
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
    """Policy loss and value loss, means over a minibatch's tokens, and statistics of the ratio."""
    # what the rollout says of these tokens, (T,) each
    inside, device = rollout.mask[part], roles.policy.device
    old, values, advantages, returns = (
        array[part][inside].to(widest(device)).to(device)
        for array in (rollout.logps, rollout.values, rollout.advantages, rollout.returns)
    )

    # what the models say now
    with autocast(device.type, precision):
        options = {"reduction": "none", "temperature": config.temperature}
        logps = completion_logps(roles.policy, batch, **options)
        new_values = roles.value(batch).to(widest(device))
    policy_loss = ppo_clip_loss(logps, old, advantages, config.clip).mean()
    value_loss = clipped_value_loss(new_values, values, returns, config.value_clip).mean()

    # how far the policy has moved
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


def batch_of(
    roles: Roles, prompts: list[list[int]], completions: list[list[int]], part: np.ndarray
) -> CompletionBatch:
    """The completions of a minibatch, their tokens in its order."""
    models = (roles.policy, roles.reference, roles.value.model)
    compact = all(can_compact(model) for model in models)
    some = [prompts[i] for i in part], [completions[i] for i in part], range(len(part))
    return completion_batch(*some, compact=compact).to(roles.policy.device)


@checked
def text_loss(policy: PreTrainedModel, batch: CompletionBatch, precision: Precision) -> Tensor:
    """The language-model loss of a batch of text, in nats per token."""
    with autocast(policy.device.type, precision):
        return -completion_logps(policy, batch.to(policy.device)).sum() / batch.tokens


def update(
    roles: Roles, optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float
) -> float:
    """One step down the gradient of `loss`; the norm of the policy's, before it is clipped."""
    with matmuls_by_onednn(roles.policy.device.type):
        loss.backward()
    norm = nn.utils.clip_grad_norm_(roles.policy.parameters(), max_grad_norm)
    nn.utils.clip_grad_norm_(roles.value.parameters(), max_grad_norm)
    if not torch.isfinite(norm):
        raise ValueError(
            f"the gradient's norm is {norm}; lower learning_rate "
            f"({optimizer.param_groups[0]['lr']:.2g} now)"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def score(reward: Reward, prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
    """The rewards of N completions, (N,). Raises ValueError unless they are N finite numbers."""
    found = np.asarray(reward(prompts, completions), dtype=np.float64)
    if found.shape != (len(completions),):
        raise ValueError(
            f"reward gave the shape {found.shape} for {len(completions)} completions; it must be "
            "(N,), one each"
        )
    if not np.isfinite(found).all():
        i = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ValueError(
            f"reward gave {found[i]} for completion {i}, {completions[i][:8]}...; every reward "
            "must be finite"
        )
    return found


@checked
def check_ppo_config(config: PPOConfig) -> None:
    """Raise ValueError for a value that `train_ppo` cannot use, named with what is allowed."""
    for name in ("steps", "batch", "minibatch", "epochs", "max_new_tokens", "eval_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")

    positive = ["temperature", "clip", "value_clip", "learning_rate", "value_learning_rate"]
    positive += ["adam_eps", "max_grad_norm"]
    positive += [] if config.kl_target is None else ["kl_target", "kl_gain"]
    for name in positive:
        finite_positive(name, getattr(config, name))

    for name in ("kl_coefficient", "value_coefficient", "ptx_coefficient", "no_eos_penalty"):
        if not (math.isfinite(value := getattr(config, name)) and value >= 0):
            raise ValueError(f"{name} is {value}; it must be finite and not negative")
    for name in ("gamma", "lam"):
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise ValueError(f"{name} is {value}; it must be in [0, 1]")

    # values that do not go together
    if config.kl_target is not None and not config.kl_coefficient:
        raise ValueError(
            "kl_coefficient is 0 with a kl_target; a coefficient of 0 stays 0, so begin with a "
            "positive one"
        )
    if config.batch % config.minibatch:
        raise ValueError(
            f"batch is {config.batch} and minibatch {config.minibatch}; a rollout must hold whole "
            "minibatches"
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
            f"ptx_coefficient is {config.ptx_coefficient} without ptx; give a function that "
            "returns batches of text"
        )
    check_trainable(policy)
    check_trainable(value_model)

    # prompts that leave room for completions
    if not prompts:
        raise ValueError("there are no prompts; give at least one, as token ids with BOS")
    context, longest = context_of(policy), max(map(len, prompts))
    if longest + config.max_new_tokens > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens, and with max_new_tokens "
            f"{config.max_new_tokens} does not fit the model's context of {context}; shorten one "
            "or the other"
        )

    # a value model of the policy's kind
    size = value_model.model.config.hidden_size
    if value_model.head.weight.shape != (1, size):
        raise ValueError(
            f"the value head has shape {tuple(value_model.head.weight.shape)}; it must be "
            f"(1, {size}), as its model"
        )
    if (found := value_model.model.config.vocab_size) != policy.config.vocab_size:
        raise ValueError(
            f"the value model has {found} tokens and the policy {policy.config.vocab_size}; they "
            "must share a vocabulary"
        )
