"""The training loop, whatever is minimized: it stops at any step and resumes bit-identically."""

import copy
import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_lab.batching import CompletionBatch, completion_batch
from dpo_lab.engine.arguments import checked, finite_positive, settled
from dpo_lab.engine.checkpoints import interruptible, load_checkpoint, save_checkpoint
from dpo_lab.engine.cpu import kept_memory, matmuls_by_onednn
from dpo_lab.engine.distributed import (
    all_gather,
    from_main,
    full_tensor,
    gather_weights,
    is_main,
    setup,
    shard,
    sharding,
    world_size,
)
from dpo_lab.engine.runs import append_metrics, atomic_write, read_metrics
from dpo_lab.engine.structure import check_trainable, unwrapped, widest
from dpo_lab.logprobs import Precision, Scorer, logit_path

Callback = Callable[[nn.Module, int], dict[str, float]]
"""Called with (policy, step); what it returns is added to the metrics, under `eval/`."""

Score = Callable[[CompletionBatch], Tensor]
"""From N completions to their log-probs (N,), by the policy that is trained."""

NO_MEMORY = (
    "Free the memory that others hold and continue with --resume, or start again with "
    "gradient_checkpointing, bfloat16, smaller batches, shorter completions or a smaller model"
)

MUON_LEARNING_RATE = 0.02
"""Muon's update is orthogonal, so its size does not depend on the model."""


class Interrupted(Exception):
    """Training stopped between two steps on Ctrl-C or SIGTERM; a checkpoint holds all of it."""


class MicroBatch(Protocol):
    """What one forward pass reads, such as a `CompletionBatch` or a `PairBatch`."""

    @property
    def tokens(self) -> int:
        """Completion tokens, for the tokens per second."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`."""


class Objective(Protocol):
    """What `fit` minimizes: the mean of `loss` over what `weight` counts.

    Two attributes are optional. `scorer(model, precision)` makes the module that `loss` gets as
    `score`, where that is not `logprobs.Scorer`. `data_of(step)` names the data read up to `step`,
    where the record of the run does not.
    """

    def micro_batches(self, step: int, n: int) -> list[MicroBatch]:
        """The forward passes of a step (from 0): its batch in `n` parts, or as many as it has.

        Of several processes each gives the parts that it takes, which may be none.
        """

    def loss(self, score: Score, micro: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of a micro-batch, and other sums to log by name, all of them tensors."""

    def weight(self, micro: Any) -> int:
        """How many pairs, tokens or prompts the sums of a micro-batch are over."""


@dataclass(frozen=True)
class LoopConfig:
    """How parameters are updated, whatever the loss."""

    learning_rate: float = 3.5e-5
    """peak learning rate"""
    optimizer: Literal["adamw", "rmsprop", "muon"] = "adamw"
    """rmsprop is the paper's; muon is for training from scratch: Muon on matrices, AdamW at
    learning_rate on the rest"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """from the peak to zero after warm-up; the paper's is constant"""
    warmup_steps: int = 10
    """steps of linear warm-up"""
    weight_decay: float = 0.0
    """decoupled weight decay (adamw, muon)"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    gradient_accumulation_steps: int = 1
    """forward passes per step; the gradient is that of the whole batch; doubled when a GPU runs out
    of memory"""
    gradient_checkpointing: bool = False
    """recompute the activations of a block in the backward pass instead of keeping them: a third
    more work, little memory"""
    eval_every: int = 80
    """steps between evaluations; plus 1/2, 1/4, 1/8 and 1/16 of the first interval, when the policy
    moves fastest"""
    save_every: int = 100
    """steps between checkpoints"""
    tensorboard: bool = False
    """log to TensorBoard too, in the run directory"""


@checked
def check_loop(config: LoopConfig) -> None:
    """Raise ValueError for a value that cannot be trained with, named with what is allowed."""
    for name in ("learning_rate", "max_grad_norm"):
        finite_positive(name, getattr(config, name))
    for name in ("gradient_accumulation_steps", "eval_every", "save_every"):
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    for name in ("warmup_steps", "weight_decay"):
        if not 0 <= (value := getattr(config, name)) < math.inf:
            raise ValueError(f"{name} is {value}; it must be finite and not negative")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard is on, and its package is not installed: pip install tensorboard, or "
            "switch it off"
        )


@checked
def check_policy(model: nn.Module, config: LoopConfig, *, adapters: bool = False) -> None:
    """Raise ValueError for a model without log-probs, or one that cannot be trained.

    With `adapters`, which are still to come, its own weights may all be frozen.
    """
    model = unwrapped(model)
    logit_path(model)
    if not adapters:
        check_trainable(model)
    if config.gradient_checkpointing:
        blocks_of(model)


def warn_of_warmup(steps: int, config: LoopConfig) -> None:
    """Warn when a run of `steps` steps ends before its learning rate has reached the peak."""
    config = settled(config)
    if config.warmup_steps > steps and is_main():
        peak, last = config.learning_rate, config.learning_rate * steps / config.warmup_steps
        warnings.warn(
            f"warmup_steps is {config.warmup_steps} and there are {steps} steps, so the learning "
            f"rate ends at {last:.2g} and never reaches learning_rate ({peak:.2g}); lower "
            "warmup_steps, or train for more steps",
            stacklevel=2,
        )


@checked
@kept_memory()
def fit(
    model: nn.Module,
    objective: Objective,
    steps: int,
    config: LoopConfig,
    *,
    precision: Precision = "float32",
    run: Path | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    progress: str | None = None,
) -> list[dict[str, Any]]:
    """Update `model` in place for `steps` steps down the gradient of `objective`; the metrics.

    A caller that gives a `run` holds it by `records.training_run`. A step that runs out of a GPU's
    memory is computed again in twice as many forward passes, and so are all that follow.
    """
    _check_fit(model, objective, config, run)
    model = unwrapped(model)
    setup(next(model.parameters()).device.type)
    warn_of_warmup(steps, config)
    training = _Training(model, objective, config, precision, run, resume)

    # the policy before the first step
    if training.start == 0 and callback:
        training.evaluate(callback, step=0)

    with training.running(steps, progress) as (bar, stop):
        for step in range(training.start + 1, steps + 1):
            began = time.perf_counter()
            rate = training.set_learning_rate(_schedule(step, steps, config))

            # forward and backward, in smaller parts where memory is short
            line, tokens = _gradient(training, objective, step, progress)

            # clip, check, update
            looks = (step == 1 or evaluates(step, steps, config)) and not sharding()
            before = some_weights(model) if looks else {}
            line["grad_norm"] = _update(training, step, config)
            line |= _weight_change(before, model)

            # log
            seconds = time.perf_counter() - began
            line |= {"learning_rate": rate, "tokens_per_second": tokens / seconds}
            training.log({"step": step, **line, "seconds": seconds})
            bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
            bar.update()

            # look at the policy
            if callback and evaluates(step, steps, config):
                training.evaluate(callback, step)

            # keep it, and stop if asked to
            stopping = run is not None and any(all_gather(stop.is_set())) and step < steps
            if run and (stopping or step % config.save_every == 0 or step == steps):
                training.save(step)
            if stopping:
                raise Interrupted(
                    f"stopped after step {step} of {steps}; its checkpoint is in {run}. Continue "
                    "with --resume, or resume=True"
                )

    gather_weights(training.scoring, model)
    return training.history


def _check_fit(
    model: nn.Module, objective: Objective, config: LoopConfig, run: Path | None
) -> None:
    """Raise ValueError for what `fit` cannot work with."""
    check_loop(config)
    if config.tensorboard and run is None:
        raise ValueError(
            "tensorboard is on, and there is no run directory to log to; give run, or switch it off"
        )
    if not hasattr(objective, "scorer"):
        check_policy(model, config)
    check_trainable(unwrapped(model))


class _Training:
    """A run of the loop: what is updated, what computes with it, and what was done so far."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: LoopConfig,
        precision: Precision,
        run: Path | None,
        resume: bool,
    ):
        # a GPU per process; no dropout, since the reference was scored without it
        if world_size() > 1 and next(model.parameters()).is_cuda:
            model.cuda()
        self.model, self.run = model.eval(), run

        # optimizers, and the newest checkpoint
        self.optimizers = make_optimizers(model, config)
        self.data_of = getattr(objective, "data_of", None)
        load = partial(load_checkpoint, run, model, self.optimizers, data_of=self.data_of)
        self.start = load() if run and resume else 0
        self.peaks = [[group["lr"] for group in one.param_groups] for one in self.optimizers]

        # what computes log-probs, in all processes
        self.scoring = _scoring(model, objective, precision, self.optimizers)
        self.blocks = blocks_of(self.scoring) if config.gradient_checkpointing else []

        # the metrics so far, and where new ones go
        self.history = _metrics_so_far(run, self.start)
        board = run and config.tensorboard and is_main()
        self.board = _tensorboard(run, config) if board else None

        # as many forward passes per step as an earlier process came to need
        name = "gradient_accumulation_steps"
        known = [line[name] for line in self.history if name in line]
        self.passes = max([config.gradient_accumulation_steps, *known])

    @contextmanager
    def running(self, steps: int, progress: str | None) -> Iterator[tuple[tqdm, Any]]:
        """A progress bar, and an event that Ctrl-C and SIGTERM set, while the loop runs."""
        silent = progress is None or not is_main()
        bar = tqdm(total=steps, initial=self.start, desc=progress, disable=silent, unit="step")
        interrupts = interruptible() if self.run else nullcontext()
        with checkpointed(self.blocks), self.board or nullcontext(), interrupts as stop, bar:
            yield bar, stop

    def set_learning_rate(self, scale: float) -> float:
        """Scale all learning rates from their peaks; the first of them, which is logged."""
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * scale
        return self.peaks[0][0] * scale

    def log(self, line: dict[str, Any]) -> None:
        """Keep a line of metrics: in memory, in `metrics.jsonl` and on TensorBoard."""
        self.history.append(line)
        if self.run:
            append_metrics(self.run, line)
        for name, value in line.items() if self.board else ():
            self.board.add_scalar(name, value, line["step"])

    def evaluate(self, callback: Callback, step: int) -> None:
        """Log what `callback` says of the policy."""
        gather_weights(self.scoring, self.model)
        found = callback(self.model, step)
        self.log({"step": step} | {f"eval/{name}": value for name, value in found.items()})

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        gather_weights(self.scoring, self.model)
        data = self.data_of and self.data_of(step)
        save_checkpoint(self.run, step, self.model, self.optimizers, data=data)


def _scoring(
    model: nn.Module, objective: Objective, precision: Precision, optimizers: list[Optimizer]
) -> nn.Module:
    """The module whose forward pass scores a batch; of several processes, in step with theirs."""
    scorer = getattr(objective, "scorer", Scorer)
    if sharding():
        scoring = scorer(copy.deepcopy(model), precision)
        shard(scoring, model, optimizers)
        return scoring
    scoring = scorer(model, precision)
    if world_size() > 1:
        return DistributedDataParallel(scoring, find_unused_parameters=scorer is not Scorer)
    return scoring


def _metrics_so_far(run: Path | None, start: int) -> list[dict[str, Any]]:
    """The metrics up to `start`; the file loses those of later steps, which are done again."""
    history = from_main(read_metrics, run, start) if run and start else []
    if run:
        with atomic_write(run / "metrics.jsonl") as temporary:
            temporary.write_text("")
        for line in history:
            append_metrics(run, line)
    return history


def _tensorboard(run: Path, config: LoopConfig) -> Any:
    """A writer of what TensorBoard shows, in `run/tensorboard`."""
    # imported here, since that takes a second
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run / "tensorboard")
    writer.add_hparams(asdict(config), {})
    return writer


def _gradient(
    training: _Training, objective: Objective, step: int, progress: str | None
) -> tuple[dict[str, float], int]:
    """Compute the gradient of a step (from 1); the mean loss and logged means, and the tokens.

    When a GPU runs out of memory, twice as many forward passes from here on.
    """
    before = training.passes
    while True:
        micros = objective.micro_batches(step - 1, training.passes)
        try:
            line, tokens = _backward(training.scoring, micros, objective)
            break
        except torch.OutOfMemoryError as error:
            # not the error itself, whose frames hold tensors
            reason = str(error)

        # give back what the failed pass holds
        for optimizer in training.optimizers:
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()

        # more and smaller parts, if the batch has them
        more = world_size() == 1 and objective.micro_batches(step - 1, 2 * training.passes)
        if not more or len(more) == len(micros):
            if training.run and step - 1 > training.start:
                training.save(step - 1)
            raise ValueError(
                f"step {step} does not fit in memory in {len(micros)} forward passes ({reason}). "
                f"{NO_MEMORY}"
            )
        training.passes *= 2
        if progress:
            tqdm.write(
                f"{progress}: out of memory at step {step}; from here on "
                f"gradient_accumulation_steps is {training.passes}, the batch the same"
            )

    if training.passes != before:
        line["gradient_accumulation_steps"] = training.passes
    return line, tokens


NOTHING = completion_batch([[0]], [[0]], [0])
"""What a process reads that has no part left of a step."""


def _backward(
    scoring: nn.Module, micros: list[Any], objective: Objective
) -> tuple[dict[str, float], int]:
    """Add up the gradient over micro-batches; mean loss, logged means and tokens of all processes.

    A GPU is waited for once, after the last backward pass.
    """
    # what the mean is over, and how many forward passes the busiest process takes
    device = next(scoring.parameters()).device
    weights = all_gather([objective.weight(micro) for micro in micros])
    total, passes = sum(map(sum, weights)), max(map(len, weights))

    tokens, logged = 0, []
    for k in range(passes):
        # processes exchange gradients in the last pass
        waits = k < passes - 1 and isinstance(scoring, DistributedDataParallel)
        with scoring.no_sync() if waits else nullcontext(), matmuls_by_onednn(device.type):
            # nothing left here, but the others wait for this process
            if k >= len(micros):
                (0 * scoring(NOTHING.to(device)).sum()).backward()
                continue

            # times the processes, over which gradients are averaged
            micro = micros[k].to(device)
            loss, sums = objective.loss(scoring, micro)
            (loss * world_size() / total).backward()

        tokens += micro.tokens
        logged.append({"loss": loss.detach(), **sums})

    return _means(logged, total), sum(all_gather(tokens))


def _means(logged: list[dict[str, Tensor]], total: int) -> dict[str, float]:
    """The sums of all micro-batches and processes by name, over `total`."""
    # all values of this process at once
    line = {"loss": 0.0}
    named = [(name, value) for sums in logged for name, value in sums.items()]
    if named:
        values = torch.stack([value.to(widest(value.device)) for _, value in named]).tolist()
        for (name, _), value in zip(named, values):
            line[name] = line.get(name, 0.0) + value / total

    # plus those of the others; names stand as in the first
    first, *others = all_gather(line)
    for line in others:
        for name, value in line.items():
            first[name] = first.get(name, 0.0) + value
    return first


def _update(training: _Training, step: int, config: LoopConfig) -> float:
    """Clip the gradient and take a step; the norm that it had.

    Raises:
        ValueError: the norm is not finite; nothing is updated then.
    """
    parameters = training.scoring.parameters()
    norm = float(full_tensor(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)))
    if not math.isfinite(norm):
        raise ValueError(
            f"the gradient at step {step} is {norm}; lower learning_rate ({config.learning_rate})"
        )
    for optimizer in training.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def some_weights(model: nn.Module, most: int = 256) -> dict[str, Tensor]:
    """Up to `most` values of each trained parameter but embeddings, as they are now.

    Rows of an embedding that no text uses do not move, whatever the training.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    flat = {
        name: p.detach().reshape(-1)
        for name, p in model.named_parameters()
        if p.requires_grad and p.numel() and id(p) not in embeddings
    }
    return {name: p[:: -(-p.numel() // most)].clone() for name, p in flat.items()}


def _weight_change(before: dict[str, Tensor], model: nn.Module) -> dict[str, float]:
    """What a step did to `some_weights`: the fraction that changed, and the distance over the norm.

    Nothing where none were kept.
    """
    if not before:
        return {}
    old, new = (torch.cat([p.float() for p in w.values()]) for w in (before, some_weights(model)))
    changed = (new != old).float().mean()
    moved = (new - old).norm() / old.norm().clamp_min(torch.finfo(old.dtype).tiny)
    found = torch.stack([changed, moved]).tolist()
    return dict(zip(("weights/changed", "weights/relative_change"), found))


@checked
def make_optimizers(model: nn.Module, config: LoopConfig) -> list[Optimizer]:
    """The optimizer of `config`, or Muon and AdamW side by side.

    The first one's learning rate is the logged one.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "rmsprop":
        return [torch.optim.RMSprop(parameters, lr=lr)]
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=True)]

    # Muon takes the matrices of the blocks, AdamW embeddings, biases and norms
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in embeddings]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    options = {"betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0, "fused": True}
    return [
        torch.optim.AdamW(rest, lr=lr, **options),
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=decay),
    ]


def evaluates(step: int, steps: int, config: LoopConfig) -> bool:
    """Whether an evaluation follows `step` (from 1)."""
    early = [step * 2**halving for halving in range(1, 5)]
    return step % config.eval_every == 0 or config.eval_every in early or step == steps


def _schedule(step: int, steps: int, config: LoopConfig) -> float:
    """The factor on the learning rate at `step` (from 1): warm-up, then the schedule's decay."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps + 1)
    return {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[config.schedule]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformers model, for `checkpointed`.

    Raises:
        ValueError: the model does not say which of its modules they are; or its virtual tokens lie
            in a cache (PEFT's prefix tuning), which recomputed blocks would fill again.
    """
    adapters = [
        adapter
        for module in model.modules()
        for adapter in (getattr(module, "peft_config", None) or {}).values()
    ]
    if any(adapter.peft_type in ("PREFIX_TUNING", "CARTRIDGE") for adapter in adapters):
        raise ValueError(
            "gradient_checkpointing is on, and prefix tuning does not allow it; switch it off, or "
            "use prompt tuning"
        )
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ValueError(
            f"gradient_checkpointing is on, and {type(model).__name__} has no blocks that allow "
            "it; switch it off"
        )
    return found


@contextmanager
def checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """Keep only the input of each block for the backward pass, and recompute the rest there.

    transformers' own switch works in training mode alone, which turns dropout on, and it denies
    sampling its cache.
    """
    for block in blocks:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
