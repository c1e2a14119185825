"""The training loop: it can be stopped at any step and resumed to the byte."""

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
from typing import Any, Literal

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
from dpo_lab.logprobs import Precision, autocast, completion_logps, logit_path

Callback = Callable[[nn.Module, int], dict[str, float]]

NO_MEMORY = (
    "Free the memory that others hold and continue with --resume, or start anew with gradient_checkpointing, bfloat16, "
    "smaller batches, shorter completions or a smaller model"
)


class Interrupted(Exception):
    """Training stopped between two steps on Ctrl-C or SIGTERM; a checkpoint holds everything up to there."""


@dataclass(frozen=True)
class LoopConfig:
    """How parameters are updated, whatever the loss."""

    learning_rate: float = 3.5e-5
    """peak learning rate"""
    optimizer: Literal["adamw", "rmsprop", "muon"] = "adamw"
    """rmsprop is the paper's; muon is for training from scratch: Muon on matrices, AdamW at learning_rate on the rest"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """from the peak to zero after warm-up; the paper's is constant"""
    warmup_steps: int = 10
    """steps of linear warm-up"""
    weight_decay: float = 0.0
    """decoupled weight decay (adamw, muon)"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    gradient_accumulation_steps: int = 1
    """forward passes a step; the gradient is that of the whole batch; doubled when a GPU runs out of memory"""
    gradient_checkpointing: bool = False
    """compute the activations of a block again in the backward pass instead of keeping them: a third more work, little memory"""
    eval_every: int = 80
    """steps between evaluations; the first interval is halved four times, for a policy moves most at the start"""
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
            "tensorboard is on, and its package is not installed: pip install tensorboard, or switch it off"
        )


@checked
def check_policy(model: nn.Module, config: LoopConfig, *, adapters: bool = False) -> None:
    """Raise ValueError for a model that has no log-probs or cannot be trained, itself or by `adapters` that are to come."""
    model = unwrapped(model)
    logit_path(model)
    if not adapters:
        check_trainable(model)
    if config.gradient_checkpointing:
        blocks_of(model)


def warn_of_warmup(steps: int, config: LoopConfig) -> None:
    """Warn where a run of `steps` steps ends before its learning rate has reached the peak."""
    config = settled(config)
    if config.warmup_steps > steps and is_main():
        peak, last = config.learning_rate, config.learning_rate * steps / config.warmup_steps
        warnings.warn(
            f"warmup_steps is {config.warmup_steps} and there are {steps} steps, so the learning rate ends at {last:.2g} and never "
            f"reaches learning_rate ({peak:.2g}); lower warmup_steps, or train for more steps",
            stacklevel=2,
        )


@checked
@kept_memory()
def fit(
    model: nn.Module,
    steps: int,
    micro_batches: Callable[[int, int], list[Any]],
    loss_of: Callable[[Callable, Any], tuple[Tensor, dict[str, Tensor]]],
    weigh: Callable[[Any], int],
    config: LoopConfig,
    *,
    precision: Precision,
    run: Path | None,
    resume: bool,
    callback: Callback | None,
    progress: str | None,
    scorer: Callable[[nn.Module], nn.Module] | None = None,
    data_of: Callable[[int], str] | None = None,
) -> list[dict[str, Any]]:
    """Update `model` for `steps` steps on the mean of `loss_of` over what `weigh` counts (pairs, tokens, prompts).

    `micro_batches(step, gradient_accumulation_steps)` gives the forward passes of a step (0-based), `gradient_accumulation_steps` of them where it can split
    the batch: a step that runs out of a GPU's memory is done again with twice as many, and so are all that follow.
    `loss_of(score, micro_batch)` gives a sum and more sums to log, tensors all, which are read at the end of the step; `score`
    computes `completion_logps`, or what `scorer(model)` does. A micro-batch is a `CompletionBatch`, or a dataclass of tensors with one as its field `batch`.
    Of several processes each gives its share of a step's micro-batches, or none; the mean is that of all of them.
    A caller that gives a `run` holds it by `records.training_run`; `data_of(step)` names the data of the steps up to `step`,
    where the record does not.
    """
    check_loop(config)
    if config.tensorboard and run is None:
        raise ValueError(
            "tensorboard is on, and there is no run directory to log to; give run, or switch it off"
        )
    model = unwrapped(model)
    if scorer is None:
        check_policy(model, config)
    check_trainable(model)

    # one process of several, dropout off
    setup(next(model.parameters()).device.type)
    warn_of_warmup(steps, config)
    if world_size() > 1 and next(model.parameters()).is_cuda:
        model.cuda()  # each process has a GPU of its own
    model.eval()  # no dropout: the reference was scored without it

    # optimizers, and where an earlier run ended
    optimizers = make_optimizers(model, config)
    start = load_checkpoint(run, model, optimizers, data_of=data_of) if run and resume else 0

    # what computes log-probs, shared among the processes
    scoring: nn.Module = _InPrecision(
        (scorer or _Scorer)(copy.deepcopy(model) if sharding() else model), precision
    )
    if sharding():
        shard(scoring, model, optimizers)
    elif world_size() > 1:
        scoring = DistributedDataParallel(scoring, find_unused_parameters=scorer is not None)
    blocks = blocks_of(scoring) if config.gradient_checkpointing else []
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    # metrics up to there, and where new ones go
    history = from_main(read_metrics, run, start) if run and start else []
    if run:
        with atomic_write(run / "metrics.jsonl") as temporary:
            temporary.write_text("")
        for line in history:
            append_metrics(run, line)
    board = _tensorboard(run, config) if run and config.tensorboard and is_main() else None
    gradient_accumulation_steps = max(
        [
            config.gradient_accumulation_steps,
            *(
                line["gradient_accumulation_steps"]
                for line in history
                if "gradient_accumulation_steps" in line
            ),
        ]
    )

    def save(step: int) -> None:
        save_checkpoint(run, step, model, optimizers, data=data_of and data_of(step))

    def log(line: dict[str, Any]) -> None:
        history.append(line)
        if run:
            append_metrics(run, line)
        for name, value in line.items() if board else ():
            board.add_scalar(name, value, line["step"])

    # the evaluation before the first step, then the steps
    if start == 0 and callback:
        log({"step": 0} | {f"eval/{k}": v for k, v in callback(model, 0).items()})
    with (
        checkpointed(blocks),
        board or nullcontext(),
        interruptible() if run else nullcontext() as stop,
        tqdm(
            total=steps,
            initial=start,
            desc=progress,
            disable=progress is None or not is_main(),
            unit="step",
        ) as bar,
    ):
        for step in range(start + 1, steps + 1):
            began = time.perf_counter()
            scale = _schedule(step, steps, config)
            for optimizer, rates in zip(optimizers, peaks):
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * scale

            # the gradient, in more and smaller parts where memory is short
            before = gradient_accumulation_steps
            while True:
                micros, reason = micro_batches(step - 1, gradient_accumulation_steps), ""
                try:
                    line, tokens = _backward(scoring, micros, loss_of, weigh)
                    break
                except torch.OutOfMemoryError as error:
                    reason = str(error)  # not the error itself, whose frames hold tensors
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                if world_size() > 1 or len(
                    micro_batches(step - 1, 2 * gradient_accumulation_steps)
                ) == len(micros):
                    if run and step - 1 > start:
                        save(step - 1)
                    raise ValueError(
                        f"step {step} does not fit in memory in {len(micros)} forward passes ({reason}). {NO_MEMORY}"
                    )
                gradient_accumulation_steps *= 2
                if progress:
                    bar.write(
                        f"{progress}: out of memory at step {step}; from here on gradient_accumulation_steps is {gradient_accumulation_steps}, the batch the same"
                    )

            # clip, and update unless it is not finite
            if gradient_accumulation_steps != before:
                line["gradient_accumulation_steps"] = gradient_accumulation_steps
            line["grad_norm"] = float(
                full_tensor(nn.utils.clip_grad_norm_(scoring.parameters(), config.max_grad_norm))
            )
            if not math.isfinite(line["grad_norm"]):
                raise ValueError(
                    f"the gradient at step {step} is {line['grad_norm']}; lower learning_rate ({config.learning_rate})"
                )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            # log, and evaluate where it is due
            seconds = time.perf_counter() - began
            line |= {
                "learning_rate": peaks[0][0] * scale,
                "tokens_per_second": tokens / seconds,
                "seconds": seconds,
            }
            log({"step": step, **line})
            bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
            bar.update()
            if callback and evaluates(step, steps, config):
                gather_weights(scoring, model)
                log({"step": step} | {f"eval/{k}": v for k, v in callback(model, step).items()})

            # a checkpoint where it is due, or where somebody stops the run
            stopping = run is not None and any(all_gather(stop.is_set())) and step < steps
            if run and (stopping or step % config.save_every == 0 or step == steps):
                gather_weights(scoring, model)
                save(step)
            if stopping:
                raise Interrupted(
                    f"stopped after step {step} of {steps}; its checkpoint is in {run}. Continue with --resume, or resume=True"
                )

    # whole weights in every process
    gather_weights(scoring, model)
    return history


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformers model, for `checkpointed`.

    Raises:
        ValueError: it does not say which of its modules they are, or its virtual tokens lie in a cache (PEFT's prefix tuning),
            which blocks that are computed again would fill again.
    """
    adapters = [
        one
        for module in model.modules()
        for one in (getattr(module, "peft_config", None) or {}).values()
    ]
    if any(one.peft_type in ("PREFIX_TUNING", "CARTRIDGE") for one in adapters):
        raise ValueError(
            "gradient_checkpointing is on, and prefix tuning does not allow it; switch it off, or take prompt tuning"
        )
    blocks = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not blocks:
        raise ValueError(
            f"gradient_checkpointing is on, and {type(model).__name__} has no blocks that allow it; switch it off"
        )
    return blocks


@contextmanager
def checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """Keep only the input of each block for the backward pass, and compute the rest of it again there.

    transformers' own switch works in training mode alone, which turns dropout on, and takes the cache from sampling.
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


def _tensorboard(run: Path, config: LoopConfig) -> Any:
    """A writer of what TensorBoard shows, in `run/tensorboard`."""
    from torch.utils.tensorboard import SummaryWriter  # takes a second

    writer = SummaryWriter(run / "tensorboard")
    writer.add_hparams(asdict(config), {})
    return writer


class _InPrecision(nn.Module):
    """A module whose forward computes in `precision`."""

    def __init__(self, scoring: nn.Module, precision: Precision):
        super().__init__()
        self.scoring, self.precision = scoring, precision

    def forward(self, batch: CompletionBatch) -> Tensor:
        with autocast(batch.sources.device.type, self.precision):
            return self.scoring(batch)


class _Scorer(nn.Module):
    """`completion_logps` as a module's forward, which is where gradients are synchronized between processes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: CompletionBatch) -> Tensor:
        return completion_logps(self.model, batch)


@checked
def make_optimizers(model: nn.Module, config: LoopConfig) -> list[Optimizer]:
    """The optimizer of `config`, or Muon and AdamW side by side. The first one's learning rate is the logged one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "rmsprop":
        return [torch.optim.RMSprop(parameters, lr=lr)]
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=True)]
    if config.optimizer == "muon":
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        matrices = [p for p in parameters if p.ndim == 2 and id(p) not in embeddings]
        chosen = {id(p) for p in matrices}
        rest = [p for p in parameters if id(p) not in chosen]
        return [
            torch.optim.AdamW(
                rest, lr=lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True
            ),
            torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=decay),
        ]
    raise ValueError(f"optimizer {config.optimizer!r}")


MUON_LEARNING_RATE = 0.02  # the update is orthogonal, so its size does not depend on the model


def evaluates(step: int, steps: int, config: LoopConfig) -> bool:
    """Whether an evaluation follows `step` (1-based)."""
    early = [step * 2**halving for halving in range(1, 5)]
    return step % config.eval_every == 0 or config.eval_every in early or step == steps


def _schedule(step: int, steps: int, config: LoopConfig) -> float:
    """Factor on the learning rate at `step` (1-based): warm-up, then constant, linear or cosine decay to zero."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps + 1)
    return {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[config.schedule]


NOTHING = completion_batch([[0]], [[0]], [0])


def _backward(
    scoring: nn.Module,
    micros: list[Any],
    loss_of: Callable[[Callable, Any], tuple[Tensor, dict[str, Tensor]]],
    weigh: Callable[[Any], int],
) -> tuple[dict[str, float], int]:
    """Add up the gradient of a step; its mean loss and logged means, and its tokens, over all processes.

    A GPU is waited for once, after the last backward pass.
    """
    device = next(scoring.parameters()).device
    weights = all_gather([weigh(micro) for micro in micros])
    total, passes = sum(map(sum, weights)), max(map(len, weights))
    line, tokens, logged = {"loss": 0.0}, 0, []
    for k in range(passes):
        waits = k < passes - 1 and isinstance(scoring, DistributedDataParallel)
        with scoring.no_sync() if waits else nullcontext(), matmuls_by_onednn(device.type):
            if k >= len(micros):  # the others wait for this process's part in the gradient
                (0 * scoring(NOTHING.to(device)).sum()).backward()
                continue
            micro = _to(micros[k], device)
            loss, sums = loss_of(scoring, micro)
            (
                loss * world_size() / total
            ).backward()  # for the gradients are averaged over processes
        tokens += getattr(micro, "batch", micro).tokens
        logged.append({"loss": loss.detach(), **sums})
    values = (
        torch.stack(
            [value.to(widest(value.device)) for sums in logged for value in sums.values()]
        ).tolist()
        if logged
        else []
    )
    for name, value in zip((name for sums in logged for name in sums), values):
        line[name] = line.get(name, 0.0) + value / total
    return _added(all_gather(line)), sum(all_gather(tokens))


def _added(parts: list[dict[str, float]]) -> dict[str, float]:
    """The sum of dictionaries, name by name; names stand as in the first."""
    first, *others = parts
    for part in others:
        for name, value in part.items():
            first[name] = first.get(name, 0.0) + value
    return first


def _to(micro: Any, device: torch.device) -> Any:
    if hasattr(micro, "to"):
        return micro.to(device)
    moved = []
    for part in vars(micro).values():
        if isinstance(part, CompletionBatch):
            moved.append(part.to(device))
            continue
        if part.dtype == torch.float64:
            part = part.to(widest(device))
        moved.append(part.to(device, non_blocking=device.type != "cpu"))
    return type(micro)(*moved)
