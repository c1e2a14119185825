"""KTO: training on completions that are each called desirable or undesirable, without pairs.

Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306. The loss is `relatives.kto_loss`, the data
`feedback.BinaryFeedback`.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_lab.engine.arguments import at_least, checked, folder, integer, settled
from dpo_lab.engine.distributed import local_shard, world_size
from dpo_lab.engine.records import data_hash, training_run, weights_record
from dpo_lab.logprobs import can_compact
from dpo_lab.loop import Callback, LoopConfig, Score, check_loop, check_policy, fit
from dpo_lab.losses import check_beta
from dpo_lab.preferences import SAME_LOGPS, plan_prompts
from dpo_lab.variants.feedback import BinaryFeedback, FeedbackBatch
from dpo_lab.variants.relatives import check_kto_weights, kto_loss, kto_reference_point


@dataclass(frozen=True)
class KTOConfig:
    """What `train_kto` minimizes, and how."""

    beta: float = 0.1
    """scale of the log-ratios: the larger, the sooner a completion counts as settled"""
    desirable_weight: float = 1.0
    """the paper's lambda_D; where one kind is rarer, its weight times its number should be about
    that of the other"""
    undesirable_weight: float = 1.0
    """the paper's lambda_U"""
    epochs: int = 1
    """passes over the feedback"""
    batch_completions: int = 128
    """rated completions per step"""
    loop: LoopConfig = field(default_factory=LoopConfig)


@checked
def check_kto(config: KTOConfig) -> None:
    """Raise ValueError for a value that cannot be trained with, named with what is allowed."""
    check_beta(config.beta)
    check_kto_weights(config.desirable_weight, config.undesirable_weight)
    at_least(config, {"epochs": 1, "batch_completions": 2})
    check_loop(config.loop)


@checked
def train_kto(
    policy: nn.Module,
    feedback: BinaryFeedback,
    config: KTOConfig,
    *,
    seed: int = 0,
    run: Path | str | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    progress: str | None = "KTO",
) -> list[dict[str, Any]]:
    """Train `policy` in place by KTO (Ethayarajh et al. 2024); one dict of metrics per step.

    The reference point z0 of a step is measured on the completions of its batch's prompts with
    completions of other prompts, without a gradient, and is at least 0; with
    gradient_accumulation_steps, of each forward pass. Which completion is put after which prompt is
    decided once, for the whole feedback, so that the reference is scored only once.

    Args:
        policy: a causal LM; dropout is switched off.
        feedback: ratings with reference log-probs, as
            `BinaryFeedback.from_pairs(preferences).with_reference(model)` gives them.
        seed: decides the order of the completions.
        run, resume, callback, progress: as in `train_dpo`.

    Metrics have TRL's names. `rewards/chosen` is the mean implicit reward of desirable ratings, in
    units of beta x nats, and `rewards/rejected` that of undesirable ones; `kl` is z0 in nats.

    Raises:
        ValueError, TypeError: a bad argument; missing reference log-probs; a `run` as `train_dpo`
            refuses it.
        Interrupted: Ctrl-C or SIGTERM with a `run`, after its checkpoint was written.
    """
    _check_kto_training(policy, feedback, config)
    run = None if run is None else folder("run", run)

    def describe() -> dict[str, Any]:
        found = {"method": "KTO", "config": asdict(settled(config)), "seed": integer("seed", seed)}
        data = (feedback.prompts, feedback.completions, feedback.prompt_of)
        data = data_hash(*data, feedback.rated, feedback.desirable.astype(np.int64))
        precision = {"precision": feedback.reference_precision, "data": data}
        return found | precision | weights_record(policy)

    # a resumed run takes the reference log-probs that it began with
    logps = np.concatenate([feedback.reference_logps, feedback.mismatched_logps])
    precision = feedback.reference_precision
    options = {"resume": resume, "logps": logps, "atol": SAME_LOGPS[precision]}
    with training_run(run, describe, **options) as began_with:
        own, mismatched = np.split(began_with, 2)
        feedback = replace(feedback, reference_logps=own, mismatched_logps=mismatched)
        objective = KTOObjective(policy, feedback, config, seed)
        options = {"run": run, "resume": resume, "callback": callback, "progress": progress}
        steps = len(objective.plan)
        return fit(policy, objective, steps, config.loop, precision=precision, **options)


class KTOObjective:
    """The ratings of each step, in shuffled order; the mean is over ratings."""

    @checked
    def __init__(self, policy: nn.Module, feedback: BinaryFeedback, config: KTOConfig, seed: int):
        self.feedback, self.config, self.compact = feedback, config, can_compact(policy)

        # the ratings of one completion stay together
        groups: dict[int, list[int]] = {}
        for rating, completion in enumerate(feedback.rated.tolist()):
            groups.setdefault(completion, []).append(rating)
        self.groups = list(groups.values())
        size = config.batch_completions
        self.plan = plan_prompts(self.groups, config.epochs, size, integer("seed", seed))

    def micro_batches(self, step: int, n: int) -> list[FeedbackBatch]:
        """The ratings of a step in `n` parts per process."""
        groups = self.plan[step]
        parts = np.array_split(np.array(groups), min(n * world_size(), len(groups)))
        rows = [rating for g in groups for rating in self.groups[g]]
        fraction = float(self.feedback.desirable[rows].mean())
        ratings = [np.concatenate([self.groups[g] for g in part]) for part in local_shard(parts)]
        return [self.feedback.batch(some, fraction, compact=self.compact) for some in ratings]

    def loss(self, score: Score, micro: FeedbackBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of the ratings, and sums of what is logged."""
        with torch.no_grad():
            z0 = kto_reference_point(score(micro.mismatched), micro.mismatched_logps)
        logps, config = score(micro.completions), self.config
        found = kto_loss(
            logps[micro.rated],
            micro.reference_logps[micro.rated],
            micro.desirable,
            z0,
            config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )

        # a mean over one kind is a sum over it, divided by all ratings and by its fraction of them
        sides = {
            "chosen": (micro.desirable, micro.fraction),
            "rejected": (~micro.desirable, 1 - micro.fraction),
        }
        sums = {
            f"rewards/{name}": found.rewards[which].sum() / fraction
            for name, (which, fraction) in sides.items()
            if fraction
        }
        n = len(micro.rated)
        sums |= {"kl": z0 * n, "gradient_weight/mean": found.gradient_weights.sum()}
        return found.losses.sum(), sums

    def weight(self, micro: FeedbackBatch) -> int:
        """Ratings."""
        return len(micro.rated)


def _check_kto_training(policy: nn.Module, feedback: BinaryFeedback, config: KTOConfig) -> None:
    """Raise for what `train_kto` cannot train, or not with."""
    check_kto(config)
    if not isinstance(feedback, BinaryFeedback):
        raise TypeError(
            f"feedback is a {type(feedback).__name__}; it must be a BinaryFeedback, which "
            "BinaryFeedback.from_pairs(preferences) makes of pairs"
        )
    if feedback.reference_logps is None or feedback.mismatched_logps is None:
        raise ValueError(
            "feedback has no log-probs of the reference, or none of mismatched completions; call "
            "feedback.with_reference(model) with the reference model"
        )
    check_policy(policy, config.loop)
