"""DPO, unlikelihood and SFT: what each of them minimizes, in one loop."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_lab.batching import CompletionBatch, completion_batch, split
from dpo_lab.engine.arguments import checked, folder, integer, number, settled
from dpo_lab.engine.distributed import local_shard, world_size
from dpo_lab.engine.records import data_hash, training_run, weights_record
from dpo_lab.logprobs import Precision, can_compact
from dpo_lab.loop import Callback, LoopConfig, check_loop, check_policy, fit
from dpo_lab.losses import LossType, check_beta, check_loss_type, dpo_loss, unlikelihood_loss
from dpo_lab.models import check_adaptable, check_lora, lora
from dpo_lab.preferences import SAME_LOGPS, PairBatch, Preferences, check_epochs, plan_prompts


@dataclass(frozen=True)
class DPOConfig:
    """What `train_dpo` minimizes, and how."""

    beta: float = 0.37
    """strength of the KL constraint"""
    loss_type: LossType = "sigmoid"
    """sigmoid (DPO; cDPO with label_smoothing), robust, ipo or hinge"""
    label_smoothing: float = 0.0
    """assumed share of flipped labels, in [0, 0.5)"""
    epochs: int = 1
    """passes over the pairs"""
    batch_pairs: int = 128
    """pairs a step; those that share completions stay together"""
    lora_rank: int = 0
    """rank of LoRA adapters, which want about ten times the learning rate (Schulman et al. 2025); 0 trains all weights"""
    loop: LoopConfig = field(default_factory=LoopConfig)


@checked
def check_config(config: DPOConfig) -> None:
    """Raise ValueError for a value that cannot be trained with, named with what is allowed."""
    check_beta(config.beta)
    check_loss_type(config.loss_type, config.label_smoothing)
    check_lora(config.lora_rank)
    check_loop(config.loop)
    if config.lora_rank and config.loop.optimizer == "muon":
        raise ValueError(
            "optimizer is 'muon' with a lora_rank; train adapters by 'adamw' or 'rmsprop'"
        )
    check_epochs(config.epochs, config.batch_pairs)


def check_alpha(alpha: float) -> float:
    """`alpha` of the unlikelihood loss as a float. Raises ValueError unless it is in [0, 1]."""
    if not 0 <= (found := number("alpha", alpha)) <= 1:
        raise ValueError(
            f"alpha is {found}; it must be in [0, 1], the weight of the rejected completion"
        )
    return found


@checked
def train_dpo(
    policy: nn.Module,
    preferences: Preferences,
    config: DPOConfig,
    *,
    seed: int = 0,
    run: Path | str | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    progress: str | None = "DPO",
) -> list[dict[str, Any]]:
    """Train `policy` in place by DPO (Eq. 7 of Rafailov et al. 2023) and return the metrics, one dict a step.

    Args:
        policy: a causal LM; dropout is switched off, so at step 0 every implicit reward is 0 and the loss is log 2. With a
            `lora_rank` adapters are trained, and merged into it at the end; `callback` gets it with them.
        preferences: pairs with stored `reference_logps`, in whose precision the policy is computed; the reference model
            itself is not needed.
        seed: decides the order of the prompts, and how LoRA's adapters begin.
        run: directory for metrics and checkpoints, and `training.json`, which records config, seed, data and weights; without
            it nothing is written.
        resume: continue the run that is recorded in `run` from its newest checkpoint, or begin it; the result has the bytes of
            an uninterrupted run. With a `lora_rank` the policy must have the weights that it began with.
        callback: called with (policy, step) before the first step, as `eval_every` says, and after the last; what it
            returns is added to the metrics, under `eval/`.

    Metrics have TRL's names; rewards and margins are in units of beta x nats, `logps/*` in nats a completion.

    Raises:
        ValueError: a bad argument; reference log-probs that are missing; a `run` that another process holds, that holds the
            checkpoints of an earlier run (without `resume`), or whose run has another config, seed, model or other data (with
            it). Then the directory and the policy are as they were.
        Interrupted: Ctrl-C or SIGTERM with a `run`, after its checkpoint was written.
    """
    check_config(config)
    if preferences.reference_logps is None:
        raise ValueError(
            "preferences has no reference_logps; call preferences.with_reference(model) with the reference model"
        )
    if config.lora_rank:
        check_adaptable(policy, config.lora_rank)
    check_policy(policy, config.loop, adapters=bool(config.lora_rank))

    def loss_of(
        score: Callable[[CompletionBatch], Tensor], micro: PairBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logps = score(micro.completions)
        result = dpo_loss(
            logps,
            micro.reference_logps,
            micro.chosen,
            micro.rejected,
            config.beta,
            loss_type=config.loss_type,
            label_smoothing=config.label_smoothing,
            check_values=logps.device.type == "cpu",
        )
        wins = (torch.sign(result.margins) + 1) / 2
        per_pair = {
            "rewards/chosen": result.rewards[micro.chosen],
            "rewards/rejected": result.rewards[micro.rejected],
            "rewards/accuracies": wins,
            "rewards/margins": result.margins,
            "logps/chosen": logps.detach()[micro.chosen],
            "logps/rejected": logps.detach()[micro.rejected],
            "gradient_weight/mean": result.gradient_weights,
        }
        return result.losses.sum(), {name: values.sum() for name, values in per_pair.items()}

    run = None if run is None else folder("run", run)

    def describe() -> dict[str, Any]:
        found = {"method": "DPO", "config": asdict(settled(config)), "seed": integer("seed", seed)}
        found |= {"precision": preferences.reference_precision, "data": pairs_hash(preferences)}
        return found | weights_record(policy, adapters=bool(config.lora_rank))

    logps, atol = preferences.reference_logps, SAME_LOGPS[preferences.reference_precision]
    options = {"run": run, "resume": resume, "callback": callback, "progress": progress}
    with (
        training_run(run, describe, resume=resume, logps=logps, atol=atol) as began_with,
        lora(policy, config.lora_rank, seed=seed)
        if config.lora_rank
        else nullcontext(policy) as trained,
    ):
        p = preferences if began_with is logps else replace(preferences, reference_logps=began_with)
        return _fit_pairs(
            trained, p, loss_of, config.epochs, config.batch_pairs, config.loop, seed, **options
        )


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
    """Minimize -log pi(chosen) + alpha log pi(rejected) a pair: the paper's baseline (Section 6), which degenerates.

    The rest is as in `train_dpo`; no reference is needed.
    """
    check_loop(config)
    check_epochs(epochs, batch_pairs)
    alpha = check_alpha(alpha)

    def loss_of(
        score: Callable[[CompletionBatch], Tensor], micro: PairBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logps = score(micro.completions)
        sums = {
            f"logps/{side}": logps.detach()[index].sum()
            for side, index in (("chosen", micro.chosen), ("rejected", micro.rejected))
        }
        return unlikelihood_loss(logps, micro.chosen, micro.rejected, alpha).sum(), sums

    return _fit_pairs(
        policy,
        preferences,
        loss_of,
        epochs,
        batch_pairs,
        config,
        seed,
        callback=callback,
        progress=progress,
    )


def _fit_pairs(
    policy: nn.Module,
    preferences: Preferences,
    loss_of: Callable[[Callable, PairBatch], tuple[Tensor, dict[str, Tensor]]],
    epochs: int,
    batch_pairs: int,
    loop: LoopConfig,
    seed: int,
    *,
    run: Path | None = None,
    resume: bool = False,
    callback: Callback | None,
    progress: str | None,
) -> list[dict[str, Any]]:
    """`fit` on the mean over pairs, those that share completions kept together, in the precision of the reference log-probs."""
    groups, compact = preferences.linked_pairs(), can_compact(policy)
    plan = plan_prompts(groups, epochs, batch_pairs, seed)

    def micro_batches(step: int, gradient_accumulation_steps: int) -> list[PairBatch]:
        parts = np.array_split(
            np.array(plan[step]), min(gradient_accumulation_steps * world_size(), len(plan[step]))
        )
        return [
            preferences.batch([pair for g in part for pair in groups[g]], compact=compact)
            for part in local_shard(parts)
        ]

    def weigh(micro: PairBatch) -> int:
        return len(micro.chosen)

    precision = preferences.reference_precision
    options = {"run": run, "resume": resume, "callback": callback, "progress": progress}
    return fit(
        policy, len(plan), micro_batches, loss_of, weigh, loop, precision=precision, **options
    )


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
    """Maximize the log-likelihood of completions; the loss is nats a completion token. Preferred-FT is SFT on chosen.

    `batches(step)` gives the forward passes of a step, the same ones whenever it is asked (a sequence is cycled through, one
    batch a step). The rest is as in `train_dpo`; `sft_batches` makes the batches from preferences.
    """
    check_loop(config)
    run, listed = (
        None if run is None else folder("run", run),
        None if callable(batches) else list(batches),
    )
    newest: list[Any] = [None, None]  # the step asked for last, and its batches
    read = [""]  # after each number of steps, what names all batches so far
    if listed is not None and not listed:
        raise ValueError("batches is empty; give at least one, as sft_batches makes them")
    if run:
        check_policy(policy, config)  # before the record of the run is written

    def batches_of(step: int) -> list[CompletionBatch]:
        if newest[0] != step:
            newest[:] = step, batches(step) if listed is None else [listed[step % len(listed)]]
        return newest[1]

    def data_of(steps: int) -> str:
        while len(read) <= steps:
            read.append(data_hash(read[-1], batches_of(len(read) - 1)))
        return read[steps]

    def micro_batches(step: int, gradient_accumulation_steps: int) -> list[CompletionBatch]:
        if run and listed is None:
            data_of(step + 1)
        return local_shard(
            [
                part
                for batch in batches_of(step)
                for part in split(batch, gradient_accumulation_steps * world_size())
            ]
        )

    def loss_of(
        score: Callable[[CompletionBatch], Tensor], batch: CompletionBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logps = score(batch)
        return -logps.sum(), {}

    def weigh(batch: CompletionBatch) -> int:
        return batch.tokens

    def describe() -> dict[str, Any]:
        found = {
            "method": "SFT",
            "config": asdict(settled(config)),
            "steps": integer("steps", steps),
            "precision": precision,
        }
        return (
            found | {"data": None if listed is None else data_hash(listed)} | weights_record(policy)
        )

    with training_run(run, describe, resume=resume):
        return fit(
            policy,
            steps,
            micro_batches,
            loss_of,
            weigh,
            config,
            precision=precision,
            run=run,
            resume=resume,
            callback=callback,
            progress=progress,
            data_of=data_of if listed is None else None,
        )


def pairs_hash(preferences: Preferences) -> str:
    """16 hexadecimal digits that name prompts, completions and pairs, without scores and reference log-probs."""
    p = preferences
    return data_hash(
        p.tokens_hash(),
        np.asarray(p.chosen, dtype=np.int64),
        np.asarray(p.rejected, dtype=np.int64),
    )


def sft_batches(
    preferences: Preferences,
    size: int,
    *,
    chosen_only: bool = True,
    compact: bool = False,
    seed: int = 0,
) -> list[CompletionBatch]:
    """One epoch of shuffled batches of `size` completions: the chosen one of every pair (Preferred-FT), or all of them (SFT).

    `compact` is that of `completion_batch`: faster, and exact where `can_compact` says so of the model.
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
