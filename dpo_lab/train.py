"""DPO, unlikelihood and SFT: what each of them minimizes, in one loop."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_lab.batching import CompletionBatch, completion_batch, split
from dpo_lab.engine.arguments import checked, folder, integer, settled
from dpo_lab.engine.checkpoints import checkpoints_of
from dpo_lab.engine.distributed import from_main, local_shard, world_size
from dpo_lab.engine.records import data_hash, training_run, weights_record
from dpo_lab.facts import record_facts
from dpo_lab.logprobs import Precision, can_compact
from dpo_lab.loop import Callback, LoopConfig, Score, check_loop, check_policy, fit
from dpo_lab.losses import (
    LossType,
    check_alpha,
    check_beta,
    check_finite,
    check_loss_type,
    dpo_terms,
    unlikelihood_loss,
)
from dpo_lab.models import check_adaptable, check_lora, lora
from dpo_lab.own_loss import OwnLoss, call_loss, loss_record, needs_reference, try_loss
from dpo_lab.preferences import SAME_LOGPS, PairBatch, Preferences, check_epochs, plan_prompts


@dataclass(frozen=True)
class DPOConfig:
    """What `train_dpo` minimizes, and how."""

    beta: float = 0.1
    """strength of the KL constraint"""
    loss_type: LossType = "sigmoid"
    """sigmoid (DPO; cDPO with label_smoothing), robust (unbounded below: see `dpo_loss`), ipo,
    hinge, exo_pair (with label_smoothing), or a name that you added to MARGIN_LOSSES"""
    label_smoothing: float = 0.0
    """assumed fraction of flipped labels, in [0, 0.5)"""
    epochs: int = 1
    """passes over the pairs"""
    batch_pairs: int = 128
    """pairs per step; those that share completions stay together"""
    lora_rank: int = 0
    """rank of LoRA adapters, which want about ten times the learning rate (Schulman et al. 2025); 0
    trains all weights"""
    lora_layers: int = 0
    """blocks with adapters, from the last one back; 0 for all, as in a model with no more. The
    blocks below them cost nothing in a backward pass"""
    loop: LoopConfig = field(default_factory=LoopConfig)


@checked
def check_config(config: DPOConfig) -> None:
    """Raise ValueError for a value that cannot be trained with, named with what is allowed."""
    check_beta(config.beta)
    check_loss_type(config.loss_type, config.label_smoothing)
    check_lora(config.lora_rank, config.lora_layers)
    check_loop(config.loop)
    if config.lora_rank and config.loop.optimizer == "muon":
        raise ValueError(
            "optimizer is 'muon' with a lora_rank; train adapters by 'adamw' or 'rmsprop'"
        )
    check_epochs(config.epochs, config.batch_pairs)


@checked
def train_dpo(
    policy: nn.Module,
    preferences: Preferences,
    config: DPOConfig,
    *,
    loss: OwnLoss | None = None,
    seed: int = 0,
    run: Path | str | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    progress: str | None = "DPO",
) -> list[dict[str, Any]]:
    """Train `policy` in place by DPO (Eq. 7 of Rafailov et al. 2023); one dict of metrics per step.

    Args:
        policy: a causal LM; dropout is switched off, so at step 0 every implicit reward is 0 and
            the loss is log 2. With a `lora_rank` adapters are trained and merged into it at the
            end; `callback` gets it with them.
        preferences: pairs with stored `reference_logps`, in whose precision the policy is computed;
            the reference model itself is not needed. A `loss` without a reference needs no
            `reference_logps` either.
        loss: a relative of DPO, such as `SimPO()` of `dpo_lab.variants`, or your own loss, in
            place of the config's `loss_type`: a function of policy_logps (N,), reference_logps
            (N,), chosen (P,), rejected (P,) and beta, as `dpo_loss` is, and of `lengths` (N,) in
            tokens if it has a parameter of that name, that returns losses (P,) or a `DPOLoss`. It
            is tried on the first batch before training.
        seed: decides the order of the prompts, and how LoRA's adapters begin.
        run: directory for metrics, checkpoints and `training.json`, which records config, seed,
            loss, data and weights; without it nothing is written.
        resume: continue the run recorded in `run` from its newest checkpoint, or begin it; the
            result is bit-identical to that of an uninterrupted run. With a `lora_rank` the policy
            must have the weights that it began with.
        callback: called with (policy, step) before the first step, as `eval_every` says, and after
            the last; what it returns is added to the metrics, under `eval/`.

    Metrics have TRL's names; rewards and margins are in units of beta x nats, `logps/*` and
    `reference_logps/*` in nats per completion. At the first step and at evaluations
    `weights/changed` is the fraction of some trained weights that the step changed, and
    `weights/relative_change` the size of that change over their norm. `gradient_weight/mean` is
    missing where your own loss returns losses alone. A `run` also gets what `dpo_lab.health` reads
    (facts.py).

    Raises:
        ValueError, TypeError: a bad argument; missing reference log-probs; a `loss` that returns
            something else; a `run` that another process holds, that holds the checkpoints of an
            earlier run (without `resume`), or whose run has another config, seed, loss, model or
            other data (with it). The directory and the policy are then as they were.
        Interrupted: Ctrl-C or SIGTERM with a `run`, after its checkpoint was written.
    """
    _check_dpo_training(policy, preferences, config, loss)
    run = None if run is None else folder("run", run)
    if loss is not None:
        _check_loss(loss, policy, preferences, config, seed)

    def describe() -> dict[str, Any]:
        found = {"method": "DPO", "config": asdict(settled(config)), "seed": integer("seed", seed)}
        found |= {} if loss is None else {"loss": loss_record(loss)}
        found |= {"precision": preferences.reference_precision, "data": pairs_hash(preferences)}
        return found | weights_record(policy, adapters=bool(config.lora_rank))

    # the run's record, which gives a resumed run the reference log-probs that it began with
    logps, precision = preferences.reference_logps, preferences.reference_precision
    options = {"resume": resume, "logps": logps, "atol": SAME_LOGPS[precision]}
    adapted = adapters(policy, config, seed)
    with training_run(run, describe, **options) as began_with, adapted as trained:
        if began_with is not logps:
            preferences = replace(preferences, reference_logps=began_with)

        objective = DPOObjective(trained, preferences, config, seed, loss)
        steps = len(objective.plan)
        if run and not checkpoints_of(run):
            from_main(partial(record_facts, run, trained, preferences, steps=steps))
        options = {"run": run, "resume": resume, "callback": callback, "progress": progress}
        return fit(trained, objective, steps, config.loop, precision=precision, **options)


@checked
def train_unlikelihood(
    policy: nn.Module,
    preferences: Preferences,
    alpha: float,
    config: LoopConfig,
    *,
    epochs: int = 1,
    batch_pairs: int = DPOConfig.batch_pairs,
    seed: int = 0,
    callback: Callback | None = None,
    progress: str | None = "unlikelihood",
) -> list[dict[str, Any]]:
    """Minimize -log pi(chosen) + alpha log pi(rejected) per pair: the paper's baseline (Section 6).

    It degenerates. No reference is needed; all else is as in `train_dpo`.
    """
    check_loop(config)
    check_epochs(epochs, batch_pairs)
    alpha = check_alpha(alpha)

    pairs = (policy, preferences, epochs, batch_pairs, seed)
    objective = UnlikelihoodObjective(*pairs, alpha=alpha)
    options = {"callback": callback, "progress": progress}
    precision, steps = preferences.reference_precision, len(objective.plan)
    return fit(policy, objective, steps, config, precision=precision, **options)


@checked
def train_sft(
    policy: nn.Module,
    batches: Sequence[CompletionBatch] | Callable[[int], list[CompletionBatch]],
    steps: int,
    config: LoopConfig,
    *,
    precision: Precision = "float32",
    run: Path | str | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    progress: str | None = "SFT",
) -> list[dict[str, Any]]:
    """Maximize the log-likelihood of completions; the loss is in nats per completion token.

    `batches(step)` gives the forward passes of a step, the same ones whenever it is asked; a
    sequence is cycled through, one batch per step. `sft_batches` makes them from preferences.
    Preferred-FT is SFT on the chosen completions. All else is as in `train_dpo`.
    """
    check_loop(config)
    run = None if run is None else folder("run", run)
    objective = SFTObjective(batches, recorded=run is not None)
    if run:
        # before the record of the run is written
        check_policy(policy, config)

    def describe() -> dict[str, Any]:
        found = {"method": "SFT", "config": asdict(settled(config))}
        found |= {"steps": integer("steps", steps), "precision": precision}
        data = None if objective.listed is None else data_hash(objective.listed)
        return found | {"data": data} | weights_record(policy)

    options = {"run": run, "resume": resume, "callback": callback, "progress": progress}
    with training_run(run, describe, resume=resume):
        return fit(policy, objective, steps, config, precision=precision, **options)


class PairObjective:
    """The pairs of each step, in the order of `Preferences.steps`; the mean is over pairs."""

    def __init__(
        self,
        policy: nn.Module,
        preferences: Preferences,
        epochs: int,
        batch_pairs: int,
        seed: int,
    ):
        self.preferences, self.compact = preferences, can_compact(policy)
        self.groups = preferences.linked_pairs()
        self.plan = plan_prompts(self.groups, epochs, batch_pairs, seed)

    def micro_batches(self, step: int, n: int) -> list[PairBatch]:
        """The pairs of a step in `n` parts per process, those that share completions together."""
        groups = self.plan[step]
        parts = np.array_split(np.array(groups), min(n * world_size(), len(groups)))
        return [
            self.preferences.batch(
                np.concatenate([self.groups[g] for g in part]), compact=self.compact
            )
            for part in local_shard(parts)
        ]

    def weight(self, micro: PairBatch) -> int:
        """Pairs."""
        return len(micro.chosen)


class DPOObjective(PairObjective):
    """The loss of `dpo_loss`, or a user's own, and TRL's metrics."""

    @checked
    def __init__(
        self,
        policy: nn.Module,
        preferences: Preferences,
        config: DPOConfig,
        seed: int,
        own: OwnLoss | None = None,
    ):
        super().__init__(policy, preferences, config.epochs, config.batch_pairs, seed)
        self.config, self.own = config, own

        # pairs are checked when preferences are made, log-probs of the reference here
        if preferences.reference_logps is None:
            return
        sides = {"chosen": preferences.chosen, "rejected": preferences.rejected}
        used = np.unique(np.concatenate(list(sides.values())))
        reference = np.zeros(len(preferences.completions))
        reference[used] = preferences.reference_logps[used]
        if not np.isfinite(reference).all():
            tensors = {name: torch.from_numpy(index) for name, index in sides.items()}
            check_finite("reference_logps", torch.from_numpy(reference), tensors)

    def loss(self, score: Score, micro: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of the pairs, and sums of what is logged."""
        logps, config = score(micro.completions), self.config
        data = (logps, micro.reference_logps, micro.chosen, micro.rejected, config.beta)
        if self.own is not None:
            result = call_loss(self.own, *data, micro.completions.lengths)
        else:
            # a look at the values would wait for a GPU, where the loop looks at the gradient alone
            if logps.device.type == "cpu":
                sides = {"chosen": micro.chosen, "rejected": micro.rejected}
                check_finite("policy_logps", logps, sides)
            result = dpo_terms(*data, config.loss_type, config.label_smoothing)

        wins = (torch.sign(result.margins) + 1) / 2
        per_pair = {
            "rewards/chosen": result.rewards[micro.chosen],
            "rewards/rejected": result.rewards[micro.rejected],
            "rewards/accuracies": wins,
            "rewards/margins": result.margins,
            "logps/chosen": logps.detach()[micro.chosen],
            "logps/rejected": logps.detach()[micro.rejected],
        }
        if micro.reference_logps is not None:
            per_pair["reference_logps/chosen"] = micro.reference_logps[micro.chosen]
            per_pair["reference_logps/rejected"] = micro.reference_logps[micro.rejected]
        if result.gradient_weights is not None:
            per_pair["gradient_weight/mean"] = result.gradient_weights
        return result.losses.sum(), {name: values.sum() for name, values in per_pair.items()}


class UnlikelihoodObjective(PairObjective):
    """The paper's unlikelihood baseline."""

    def __init__(self, *pairs: Any, alpha: float):
        super().__init__(*pairs)
        self.alpha = alpha

    def loss(self, score: Score, micro: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of the pairs, and the summed log-probs of each side."""
        logps = score(micro.completions)
        sums = {
            "logps/chosen": logps.detach()[micro.chosen].sum(),
            "logps/rejected": logps.detach()[micro.rejected].sum(),
        }
        losses = unlikelihood_loss(logps, micro.chosen, micro.rejected, self.alpha)
        return losses.sum(), sums


class SFTObjective:
    """The negative log-likelihood of completions; the mean is over their tokens."""

    def __init__(
        self,
        batches: Sequence[CompletionBatch] | Callable[[int], list[CompletionBatch]],
        *,
        recorded: bool,
    ):
        self.batches = batches
        self.listed = None if callable(batches) else list(batches)
        if self.listed is not None and not self.listed:
            raise ValueError("batches is empty; give at least one, as sft_batches makes them")

        # what a function gives is not in the run's record: it is hashed as it is read
        self.data_of = self._hash_up_to if recorded and self.listed is None else None
        self._hashes = [""]
        self._newest: tuple[int, list[CompletionBatch]] = (-1, [])

    def micro_batches(self, step: int, n: int) -> list[CompletionBatch]:
        """The batches of a step, each of them in `n` parts per process."""
        if self.data_of is not None:
            self.data_of(step + 1)
        parts = [part for batch in self._read(step) for part in split(batch, n * world_size())]
        return local_shard(parts)

    def loss(self, score: Score, micro: CompletionBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed negative log-likelihood, in nats."""
        return -score(micro).sum(), {}

    def weight(self, micro: CompletionBatch) -> int:
        """Completion tokens."""
        return micro.tokens

    def _read(self, step: int) -> list[CompletionBatch]:
        """The batches of a step; those of the newest are kept, for they may be asked for again."""
        if self.listed is not None:
            return [self.listed[step % len(self.listed)]]
        if self._newest[0] != step:
            self._newest = step, self.batches(step)
        return self._newest[1]

    def _hash_up_to(self, steps: int) -> str:
        """What names all batches of the first `steps` steps."""
        while len(self._hashes) <= steps:
            newest = self._read(len(self._hashes) - 1)
            self._hashes.append(data_hash(self._hashes[-1], newest))
        return self._hashes[steps]


def sft_batches(
    preferences: Preferences,
    size: int,
    *,
    chosen_only: bool = True,
    compact: bool = False,
    seed: int = 0,
) -> list[CompletionBatch]:
    """One epoch of shuffled batches of `size` completions.

    The chosen one of every pair (Preferred-FT), or all completions (SFT). `compact` is that of
    `completion_batch`: faster, and exact where `can_compact` says so of the model.
    """
    p = preferences
    which = p.chosen if chosen_only else np.arange(len(p.completions))
    order = np.random.default_rng(seed).permutation(which)
    return [
        completion_batch(
            p.prompts,
            [p.completions[i] for i in part],
            [p.prompt_of[i] for i in part],
            compact=compact,
        )
        for part in np.split(order, range(size, len(order), size))
    ]


def pairs_hash(preferences: Preferences) -> str:
    """16 hexadecimal digits that name prompts, completions and pairs.

    Scores and reference log-probs are not in it.
    """
    sides = [
        np.asarray(side, dtype=np.int64) for side in (preferences.chosen, preferences.rejected)
    ]
    return data_hash(preferences.tokens_hash(), *sides)


@checked
def adapters(
    model: nn.Module, config: DPOConfig, seed: int = 0
) -> AbstractContextManager[nn.Module]:
    """A block in which `model` has the adapters of `config`; itself where that asks for none."""
    rank, layers = config.lora_rank, config.lora_layers
    return lora(model, rank, layers=layers, seed=seed) if rank else nullcontext(model)


def _check_dpo_training(
    policy: nn.Module, preferences: Preferences, config: DPOConfig, loss: OwnLoss | None
) -> None:
    """Raise ValueError for what `train_dpo` cannot train, or not with."""
    check_config(config)
    if preferences.reference_logps is None and needs_reference(loss):
        raise ValueError(
            "preferences has no reference_logps; call preferences.with_reference(model) with the "
            "reference model"
        )
    if config.lora_rank:
        check_adaptable(policy, config.lora_rank, config.lora_layers)
    check_policy(policy, config.loop, adapters=bool(config.lora_rank))


def _check_loss(
    loss: OwnLoss, policy: nn.Module, preferences: Preferences, config: DPOConfig, seed: int
) -> None:
    """Raise for a user's loss that cannot be trained with; nothing else is computed or changed."""
    if config.loss_type != "sigmoid" or config.label_smoothing:
        raise ValueError(
            f"loss is given with loss_type={config.loss_type!r} and label_smoothing="
            f"{config.label_smoothing!r}, which it does not see; leave them at their defaults"
        )

    first = preferences.steps(config.batch_pairs, seed=seed)[0]
    try_loss(loss, preferences, first, config.beta, next(policy.parameters()).device)
