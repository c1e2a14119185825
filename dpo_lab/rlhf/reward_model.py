"""The learned reward of RLHF: a scalar head on a causal LM, fitted to pairs or rankings (Eq. 2 of Rafailov et al. 2023)."""

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
from dpo_lab.loop import LoopConfig, check_loop, fit
from dpo_lab.losses import bradley_terry_nll
from dpo_lab.models import ScalarModel
from dpo_lab.preferences import Preferences
from dpo_lab.train import check_epochs, plan_prompts


@dataclass(frozen=True)
class RewardModelConfig:
    """What `train_reward_model` does."""

    epochs: int = 1
    """passes over the prompts; the paper of InstructGPT overfits after one"""
    batch_pairs: int = 64
    """pairs a step, in whole prompts"""
    held_out: float = 0.1
    """share of the prompts on which the accuracy is measured, in (0, 1)"""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(learning_rate=1e-4, eval_every=20))


class LearnedReward:
    """The reward of a model at the last token of each completion: call it with prompts and completions, token ids."""

    @checked
    def __init__(
        self, model: ScalarModel, *, precision: Precision = "float32", batch_size: int = 128
    ):
        self.model, self.precision, self.batch_size = unwrapped(model), precision, batch_size

    def batch(
        self, prompts: Tokens, completions: Tokens, prompt_of: Sequence[int]
    ) -> CompletionBatch:
        """The batch whose last state of each completion has seen all its tokens."""
        longer = [
            [*ids, ids[-1]] for ids in completions
        ]  # for the last token of a completion is not read
        return completion_batch(prompts, longer, prompt_of, compact=can_compact(self.model.model))

    @torch.no_grad()
    def __call__(self, prompts: Tokens, completions: Tokens) -> np.ndarray:
        """Rewards (N,) of N completions, each of the prompt at its place."""
        device, rewards = self.model.head.weight.device, []
        for i in range(0, len(completions), self.batch_size):
            part = slice(i, i + self.batch_size)
            batch = self.batch(prompts[part], completions[part], range(len(completions[part]))).to(
                device
            )
            with autocast(device.type, self.precision):
                rewards.append(last_values(self.model(batch), batch).cpu().double().numpy())
        return np.concatenate(rewards) if rewards else np.empty(0)


def last_values(values: Tensor, batch: CompletionBatch) -> Tensor:
    """Of values (T,), the last one of each completion, (N,)."""
    places = torch.arange(len(values), device=values.device)
    return values[
        torch.zeros(batch.n, dtype=places.dtype, device=places.device).scatter_reduce(
            0, batch.owners, places, "amax"
        )
    ]


@dataclass(frozen=True)
class _RankedBatch:
    batch: CompletionBatch
    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    weights: Tensor  # (P,) one over the number of pairs of the prompt


class _Rewarder(nn.Module):
    def __init__(self, model: ScalarModel):
        super().__init__()
        self.model = model

    def forward(self, batch: CompletionBatch) -> Tensor:
        return last_values(self.model(batch), batch)


@checked
def check_reward_model(config: RewardModelConfig) -> None:
    """Raise ValueError for a value that `train_reward_model` cannot work with, named with what is allowed."""
    check_loop(config.loop)
    check_epochs(config.epochs, config.batch_pairs)
    if not 0 < config.held_out < 1:
        raise ValueError(f"held_out is {config.held_out}; give a share in (0, 1) of the prompts")
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
    """Fit `model` in place to preferences and return the metrics; `eval/accuracy` is that on held-out prompts.

    The loss of a prompt is the mean of -log sigma(r_chosen - r_rejected) over its pairs, so that a ranking of K completions
    counts as much as a pair: `reward_model_loss` (Eq. 1 of Ouyang et al. 2022). The model ends with the weights of the
    evaluation of the highest accuracy.

    Raises:
        ValueError: a value of `config` that cannot be trained with, or fewer than two prompts.
    """
    config = config or RewardModelConfig()
    check_reward_model(config)
    model, p = unwrapped(model), preferences
    groups = p.pairs_by_prompt()
    if len(groups) < 2:
        raise ValueError(
            f"held_out is {config.held_out} of {len(groups)} prompts; give a share in (0, 1) of at least 2 prompts"
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    n = min(max(1, round(config.held_out * len(groups))), len(groups) - 1)
    held, groups = [groups[g] for g in order[:n]], [groups[g] for g in order[n:]]
    plan = plan_prompts(groups, config.epochs, config.batch_pairs, seed)
    reward, best = LearnedReward(model, precision=precision), {}

    def micro_batches(step: int, gradient_accumulation_steps: int) -> list[_RankedBatch]:
        parts = np.array_split(
            np.array(plan[step]), min(gradient_accumulation_steps * world_size(), len(plan[step]))
        )
        return [ranked([groups[g] for g in part]) for part in local_shard(parts)]

    def ranked(some: list[list[int]]) -> _RankedBatch:
        pairs = np.concatenate(some)
        used, local = np.unique(
            np.concatenate([p.chosen[pairs], p.rejected[pairs]]), return_inverse=True
        )
        batch = reward.batch(
            p.prompts, [p.completions[i] for i in used], [p.prompt_of[i] for i in used]
        )
        chosen, rejected = torch.from_numpy(local).chunk(2)
        weights = torch.tensor([1 / len(group) for group in some for _ in group])
        return _RankedBatch(batch, chosen, rejected, weights)

    def loss_of(score: Any, micro: _RankedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        rewards = score(micro.batch)
        losses = micro.weights * bradley_terry_nll(rewards, micro.chosen, micro.rejected)
        right = micro.weights * (rewards[micro.chosen] > rewards[micro.rejected])
        return losses.sum(), {"accuracy": right.sum()}

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        pairs = np.concatenate(held)
        used, local = np.unique(
            np.concatenate([p.chosen[pairs], p.rejected[pairs]]), return_inverse=True
        )
        rewards = reward(
            [p.prompts[p.prompt_of[i]] for i in used], [p.completions[i] for i in used]
        )
        margins = np.subtract(*rewards[local.reshape(2, -1)])
        accuracy = float(np.mean((margins > 0) + (margins == 0) / 2))
        if accuracy > best.get("accuracy", -1):
            best.update(
                accuracy=accuracy,
                step=step,
                state={k: v.clone() for k, v in model.state_dict().items()},
            )
        return {"accuracy": accuracy, "loss": float(np.logaddexp(0, -margins).mean())}

    metrics = fit(
        model.eval(),
        len(plan),
        micro_batches,
        loss_of,
        lambda micro: round(float(micro.weights.sum())),
        config.loop,
        precision=precision,
        run=None,
        resume=False,
        callback=evaluate,
        progress=progress,
        scorer=_Rewarder,
    )
    model.load_state_dict(best["state"])
    return metrics
