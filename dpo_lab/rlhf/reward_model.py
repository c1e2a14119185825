"""The learned reward of RLHF: a scalar head on a causal LM, fitted to pairs or rankings.

Eq. 2 of Rafailov et al. 2023.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_lab.batching import CompletionBatch, Tokens, completion_batch
from dpo_lab.engine.arguments import checked
from dpo_lab.engine.distributed import local_shard, world_size
from dpo_lab.engine.structure import unwrapped
from dpo_lab.logprobs import Precision, autocast, can_compact
from dpo_lab.loop import LoopConfig, Score, check_loop, fit
from dpo_lab.losses import bradley_terry_nll
from dpo_lab.models import ScalarModel
from dpo_lab.preferences import Preferences, check_epochs, plan_prompts


@dataclass(frozen=True)
class RewardModelConfig:
    """What `train_reward_model` does."""

    epochs: int = 1
    """passes over the prompts; InstructGPT's reward model overfits after one"""
    batch_pairs: int = 64
    """pairs per step, in whole prompts"""
    held_out: float = 0.1
    """fraction of the prompts on which the accuracy is measured, in (0, 1)"""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(learning_rate=1e-4, eval_every=20))


class LearnedReward:
    """The reward of a model at the last token of each completion.

    Call it with prompts and completions as token ids.
    """

    @checked
    def __init__(
        self, model: ScalarModel, *, precision: Precision = "float32", batch_size: int = 128
    ):
        self.model, self.batch_size = unwrapped(model), batch_size
        self.scorer = _LastValues(self.model, precision)

    @torch.no_grad()
    def __call__(self, prompts: Tokens, completions: Tokens) -> np.ndarray:
        """Rewards (N,) of N completions, each of the prompt at its place."""
        device, rewards = self.model.head.weight.device, []
        for i in range(0, len(completions), self.batch_size):
            part = slice(i, i + self.batch_size)
            some = completions[part]
            batch = self.batch(prompts[part], some, range(len(some))).to(device)
            rewards.append(self.scorer(batch).cpu().double().numpy())
        return np.concatenate(rewards) if rewards else np.empty(0)

    def batch(
        self, prompts: Tokens, completions: Tokens, prompt_of: Sequence[int]
    ) -> CompletionBatch:
        """The batch in which the last state of each completion has seen all its tokens."""
        # a batch leaves out the last token, from which nothing is predicted: here it stands twice
        longer = [[*ids, ids[-1]] for ids in completions]
        return completion_batch(prompts, longer, prompt_of, compact=can_compact(self.model.model))


class _LastValues(nn.Module):
    """The model's value at the last token of each completion."""

    def __init__(self, model: ScalarModel, precision: Precision):
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, batch: CompletionBatch) -> Tensor:
        """Values (N,) of N completions."""
        with autocast(batch.sources.device.type, self.precision):
            values = self.model(batch)  # (T,)
        places = torch.arange(len(values), device=values.device)
        none = torch.zeros(batch.n, dtype=places.dtype, device=places.device)
        return values[none.scatter_reduce(0, batch.owners, places, "amax")]


@checked
def check_reward_model(config: RewardModelConfig) -> None:
    """Raise ValueError for a value that `train_reward_model` cannot work with, by name."""
    check_loop(config.loop)
    check_epochs(config.epochs, config.batch_pairs)
    if not 0 < config.held_out < 1:
        raise ValueError(f"held_out is {config.held_out}; give a fraction in (0, 1) of the prompts")
    if config.loop.tensorboard:
        raise ValueError(
            "tensorboard is on, and a reward model has no run directory to log to; switch it off"
        )


@checked
def train_reward_model(
    model: ScalarModel,
    preferences: Preferences,
    config: RewardModelConfig | None = None,
    *,
    precision: Precision = "float32",
    seed: int = 0,
    progress: str | None = "reward model",
) -> list[dict[str, Any]]:
    """Fit `model` in place to preferences; the metrics, with `eval/accuracy` on held-out prompts.

    The loss of a prompt is the mean of -log sigma(r_chosen - r_rejected) over its pairs, so that a
    ranking of K completions counts as much as a pair: `reward_model_loss` (Eq. 1 of Ouyang et al.
    2022). The model ends with the weights of its most accurate evaluation.

    Raises:
        ValueError: a value of `config` that cannot be trained with, or fewer than two prompts.
    """
    config = config or RewardModelConfig()
    check_reward_model(config)
    model, groups = unwrapped(model), preferences.pairs_by_prompt()
    if len(groups) < 2:
        raise ValueError(
            f"held_out is {config.held_out} of {len(groups)} prompts; give a fraction in (0, 1) of "
            "at least 2 prompts"
        )

    # some prompts are held out
    order = np.random.default_rng(seed).permutation(len(groups))
    n = min(max(1, round(config.held_out * len(groups))), len(groups) - 1)
    held_out, trained = [groups[g] for g in order[:n]], [groups[g] for g in order[n:]]

    # train on the others, and keep the best evaluation's weights
    reward = LearnedReward(model, precision=precision)
    best = _BestWeights(reward, preferences, np.concatenate(held_out))
    plan = plan_prompts(trained, config.epochs, config.batch_pairs, seed)
    objective = RewardObjective(reward, preferences, trained, plan)
    options = {"precision": precision, "callback": best, "progress": progress}
    metrics = fit(model.eval(), objective, len(plan), config.loop, **options)
    model.load_state_dict(best.weights)
    return metrics


@torch.no_grad()
def value_model_from(reward: LearnedReward, prompts: Tokens, completions: Tokens) -> ScalarModel:
    """A value model that begins as the reward model, as InstructGPT's does (Appendix C.4 of Ouyang
    et al. 2022); a copy.

    `train_ppo` gives the score in standard deviations of the reward on completions of the
    reference, so the head is scaled and shifted into these units.

    Args:
        reward: the learned reward.
        prompts, completions: N completions of the reference, each of the prompt at its place, such
            as those of the preferences; their mean is 0 in the new units and their standard
            deviation 1.

    Raises:
        ValueError: the rewards of the completions are all the same, or there are none.
    """
    scores = reward(prompts, completions)
    if not len(scores) or not scores.std() > 0:
        raise ValueError(
            f"the {len(scores)} completions have the same reward; give several to a model that has "
            "learned to tell them apart"
        )
    model = copy.deepcopy(reward.model)
    model.head.weight.div_(scores.std())
    model.head.bias.sub_(scores.mean()).div_(scores.std())
    return model


@dataclass(frozen=True)
class RankedBatch:
    """Completions of whole prompts, and the pairs among them."""

    completions: CompletionBatch
    chosen: Tensor
    """(P,) index into the completions"""
    rejected: Tensor
    """(P,) index into the completions"""
    weights: Tensor
    """(P,) one over the number of pairs of the prompt"""

    @property
    def tokens(self) -> int:
        """Completion tokens in the batch."""
        return self.completions.tokens

    def to(self, device: torch.device) -> "RankedBatch":
        """The same batch on `device`. A copy from the CPU to a GPU is not waited for."""
        wait = torch.device(device).type == "cpu"
        pairs = (self.chosen, self.rejected, self.weights)
        moved = [values.to(device, non_blocking=not wait) for values in pairs]
        return RankedBatch(self.completions.to(device), *moved)


class RewardObjective:
    """InstructGPT's loss of a reward model; the mean is over prompts."""

    scorer = _LastValues

    def __init__(
        self,
        reward: LearnedReward,
        preferences: Preferences,
        groups: list[list[int]],
        plan: list[list[int]],
    ):
        self.reward, self.preferences, self.groups, self.plan = reward, preferences, groups, plan

    def micro_batches(self, step: int, n: int) -> list[RankedBatch]:
        """The prompts of a step in `n` parts per process."""
        prompts = self.plan[step]
        parts = np.array_split(np.array(prompts), min(n * world_size(), len(prompts)))
        return [self._ranked([self.groups[g] for g in part]) for part in local_shard(parts)]

    def _ranked(self, groups: list[list[int]]) -> RankedBatch:
        """The pairs of some prompts, and the completions they use."""
        p = self.preferences
        used, chosen, rejected = p.completions_of(np.concatenate(groups))
        completions = [p.completions[i] for i in used]
        batch = self.reward.batch(p.prompts, completions, [p.prompt_of[i] for i in used])
        weights = torch.tensor([1 / len(group) for group in groups for _ in group])
        return RankedBatch(batch, torch.from_numpy(chosen), torch.from_numpy(rejected), weights)

    def loss(self, score: Score, micro: RankedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over prompts of their mean loss, and of their fraction of pairs in order."""
        rewards = score(micro.completions)
        losses = micro.weights * bradley_terry_nll(rewards, micro.chosen, micro.rejected)
        correct = micro.weights * (rewards[micro.chosen] > rewards[micro.rejected])
        return losses.sum(), {"accuracy": correct.sum()}

    def weight(self, micro: RankedBatch) -> int:
        """Prompts."""
        return round(float(micro.weights.sum()))


class _BestWeights:
    """A callback that measures the accuracy on pairs and keeps the best weights so far."""

    def __init__(self, reward: LearnedReward, preferences: Preferences, pairs: np.ndarray):
        p, self.reward = preferences, reward
        used, self.chosen, self.rejected = p.completions_of(pairs)
        self.prompts = [p.prompts[p.prompt_of[i]] for i in used]
        self.completions = [p.completions[i] for i in used]
        self.accuracy, self.weights = -1.0, {}

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        rewards = self.reward(self.prompts, self.completions)
        margins = rewards[self.chosen] - rewards[self.rejected]

        # a tie is half right
        accuracy = float(np.mean((margins > 0) + (margins == 0) / 2))
        if accuracy > self.accuracy:
            self.accuracy = accuracy
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}
        return {"accuracy": accuracy, "loss": float(np.logaddexp(0, -margins).mean())}
