"""What a run will cost, before it starts: tokens, FLOPs, memory and seconds.

Tokens and FLOPs follow from the config; seconds and activations come from passes of a few rows on
this machine.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, comb
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_lab.batching import CompletionBatch, completion_batch
from dpo_lab.engine.arguments import checked
from dpo_lab.engine.cpu import kept_memory, matmuls_by_onednn, return_freed_memory
from dpo_lab.engine.distributed import from_main
from dpo_lab.engine.lm_head import SOFTMAX_ROWS, logits_budget
from dpo_lab.engine.pieces import ROUND
from dpo_lab.engine.prepacked import prepacked_bytes
from dpo_lab.engine.prompt_rows import prompt_rows, query_key_pairs
from dpo_lab.engine.runs import peak_memory_mb
from dpo_lab.logprobs import (
    Precision,
    autocast,
    can_compact,
    completion_logps,
    completion_states,
    goes_part_by_part,
    score_completions,
)
from dpo_lab.loop import (
    LoopConfig,
    blocks_of,
    checkpointed,
    evaluates,
    make_optimizers,
    warn_of_warmup,
)
from dpo_lab.models import lora_targets
from dpo_lab.sampling import reads_once, rows_on, sample_completions
from dpo_lab.sentiment.task import (
    FRONTIER,
    SNAPSHOT_PAIRS,
    prefixes_during,
)
from dpo_lab.train import DPOConfig, adapters, check_config, plan_prompts

# of a measured pass on a CPU: about a second; on a GPU a thousand times as many
TRIAL_FLOPS = 1e11

# fraction of activations and logits lost to heap fragmentation on a CPU: measured
SLACK = 0.3

# tensors of the parameter's size that an optimizer keeps
MOMENTS = {"AdamW": 2, "RMSprop": 1, "Muon": 1}

# bytes of each parameter's step counter
COUNTER_BYTES = {"AdamW": 4, "RMSprop": 4, "Muon": 0}


@dataclass(frozen=True)
class Plan:
    """Tokens, FLOPs and seconds of each phase of a run, and memory by part.

    The phases are SFT (where there is any), sample, train and evaluate.
    """

    tokens: dict[str, int]
    """completion tokens if none ends early, an upper bound; for SFT, predicted tokens"""
    flops: dict[str, float]
    """matmuls and attention"""
    seconds: dict[str, float]
    """on this machine; loading the reviews and drawing the figures are left out"""
    sampling: dict[str, int]
    """bytes by part while it samples"""
    training: dict[str, int]
    """bytes by part in a step"""
    available: int | None
    """bytes that this process can have in all; None where the system does not tell"""
    tuning: dict[str, int] = field(default_factory=dict)
    """bytes by part in a step of SFT, where there is one"""

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return max(sum(parts.values()) for parts in (self.sampling, self.training, self.tuning))

    def check(self) -> None:
        """Raise ValueError, with advice, when the peak is more than there is."""
        if self.available is not None and self.peak > self.available:
            needs = max(self.training, self.tuning, key=lambda parts: sum(parts.values()))
            part = max(needs, key=needs.__getitem__)
            raise ValueError(
                f"this run needs about {_gb(self.peak)} of memory, most of it in {part}, and there "
                f"are {_gb(self.available)}. Take a smaller --model; a smaller --batch-pairs, or a "
                "larger --gradient-accumulation-steps; --gradient-checkpointing; --lora-rank 8, "
                "which trains adapters; or --precision bfloat16"
            )

    def __str__(self) -> str:
        # a row per phase
        lines = [f"{'plan':<10}{'tokens':>14}{'TFLOPs':>12}{'seconds':>10}"]
        rows = [
            (name, self.tokens[name], self.flops[name], self.seconds[name]) for name in self.tokens
        ]
        numbers = (self.tokens, self.flops, self.seconds)
        rows.append(("all", *(sum(found.values()) for found in numbers)))
        for name, tokens, flops, seconds in rows:
            lines.append(f"{name:<10}{tokens:>14,}{flops / 1e12:>12,.2f}{seconds:>10,.0f}")

        # memory by part
        memory = {"SFT": self.tuning, "sampling": self.sampling, "training": self.training}
        for name, parts in memory.items():
            if parts:
                listed = ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in parts.items())
                total = sum(parts.values()) / 1e6
                lines.append(f"{name + ', MB':<14}{total:>10,.0f} = {listed}")
        there = "unknown" if self.available is None else _gb(self.available)
        return "\n".join([*lines, f"peak {_gb(self.peak)}, of {there} available"])


@dataclass(frozen=True)
class Job:
    """What a run does, as far as its cost goes."""

    reference: nn.Module
    """whose first weights are the policy's"""
    prompts: Sequence[Sequence[int]]
    """training prefixes, as token ids with BOS"""
    config: DPOConfig
    """how the policy is trained"""
    completions: int
    """per prompt"""
    max_new_tokens: int
    """of a completion"""
    eval_prefixes: int
    """held-out prefixes of the evaluations"""
    precision: str = "float32"
    """of sampling and training"""
    frontier: tuple[int, int] = FRONTIER["prefix"]
    """held-out prompts for the optimal frontier, and completions of each"""
    snapshot_pairs: int = SNAPSHOT_PAIRS["prefix"]
    """pairs whose completions are scored at every evaluation"""
    sft: CompletionBatch | None = None
    """a batch of SFT, where there is any"""
    sft_batches: int = 0
    """how many of them are read"""
    reward: Callable[[list[str]], Any] | None = None
    """what labels the texts; its time is not planned where there is none"""
    texts: Sequence[str] = ()
    """some of about the length that it will get"""

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.reference.parameters()).device

    @cached_property
    def steps(self) -> list[list[int]]:
        """The prompts of each step, by their indices."""
        pairs = list(range(comb(self.completions, 2)))
        groups = [pairs] * len(self.prompts)
        return plan_prompts(groups, self.config.epochs, self.config.batch_pairs, 0)

    @cached_property
    def micro_batch(self) -> CompletionBatch:
        """A forward pass of training."""
        n = ceil(len(self.steps[0]) / self.config.loop.gradient_accumulation_steps)
        return self.batch(self.prompts[:n])

    @cached_property
    def trial_prompts(self) -> list[list[int]]:
        """Those of a forward pass that can be measured in a second."""
        most = len(self.prompts) * self.completions
        rows = _trial_rows(self.reference, self.max_new_tokens, most)
        n = min(rows // self.completions + 1, max(2, len(self.steps[0])))
        return [list(ids) for ids in self.prompts[:n]]

    @cached_property
    def trial(self) -> CompletionBatch:
        """As much of a forward pass of training as can be measured in a second, on its device."""
        return self.batch(self.trial_prompts).to(self.device)

    @property
    def trial_flops(self) -> float:
        """FLOPs of scoring the trial."""
        return forward_flops(self.reference, self.trial)

    def batch(self, prompts: Sequence[Sequence[int]]) -> CompletionBatch:
        """The completions of these prompts as training lays them out, none of them ended."""
        return _batch(self.reference, prompts, self.completions, self.max_new_tokens)


@dataclass(frozen=True)
class Speed:
    """What this machine does, measured on a few rows.

    During training a policy is evaluated with its adapters, on one batch of prefixes.
    """

    sampling: float
    """FLOP/s of sampling, as many batches at a time as there are threads"""
    sampling_during: float
    """FLOP/s of sampling in an evaluation during training"""
    training: float
    """FLOP/s of forward and backward passes, with adapters where they are trained"""
    tuning: float
    """FLOP/s of forward and backward passes of all weights, as in SFT"""
    scoring: float
    """FLOP/s of forward passes in float32"""
    scoring_during: float
    """FLOP/s of forward passes in float32 during training"""
    labeling: float
    """seconds per text of the reward"""


class Counts(NamedTuple):
    """Completions that a run samples and scores."""

    drawn: int
    """sampled to train on"""
    sampled: int
    """sampled before and after training, and for the optimal frontier"""
    sampled_during: int
    """sampled in evaluations during training"""
    scored: int
    """scored by the reference, or by the policy after training"""
    scored_during: int
    """scored by the policy during training, with those of the snapshots"""


@checked
def plan(
    reference: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: DPOConfig,
    *,
    completions: int,
    max_new_tokens: int,
    eval_prefixes: int,
    precision: Precision = "float32",
) -> Plan:
    """The cost of `run.train` with these prompts and a policy that begins with the weights of
    `reference`.

    A forward pass takes 2 FLOPs per weight and token, a backward pass 4 (Kaplan et al. 2020,
    https://arxiv.org/abs/2001.08361, Section 2.1): for the weights of the blocks at every position,
    for those of the LM head at completion tokens only; what is recomputed takes 2 more.
    Attention's two products take 4 x width x layers for each query and key (sdpa visits all of a
    padded row), and twice that backward.

    Raises:
        ValueError: nothing to train on.
    """
    check_config(config)
    if not prompts:
        raise ValueError("there are no prompts; give at least one, as token ids with BOS")
    job = Job(
        reference, prompts, config, completions, max_new_tokens, eval_prefixes, precision=precision
    )
    return plan_job(job, measure_speed(job))


@kept_memory()
def plan_job(job: Job, speed: Speed) -> Plan:
    """The cost of a job on a machine of this speed."""
    warn_of_warmup(len(job.steps), job.config.loop)
    tokens, flops, seconds = costs(job, speed)
    sampling, training, tuning = memory(job)
    return Plan(
        tokens, flops, seconds, sampling, training, available_bytes(job.device), tuning=tuning
    )


def costs(job: Job, speed: Speed) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    """Tokens, FLOPs and seconds of each phase."""
    counts = completions_of(job)
    trained = job.config.epochs * counts.drawn
    model = job.reference

    # FLOPs per completion: sampled, scored, trained on
    mean_prompt = sum(map(len, job.prompts)) / len(job.prompts)
    once = job.completions if reads_once(model, job.prompts) else 1
    to_draw = sampling_flops(model, mean_prompt, job.max_new_tokens, once)
    to_evaluate = sampling_flops(model, mean_prompt, job.max_new_tokens)
    to_score = forward_flops(model, job.micro_batch) / job.micro_batch.n
    step = training_flops(model, job.micro_batch, job.config, job.precision)
    to_train = step / job.micro_batch.n

    # each phase
    sampled = counts.sampled + counts.sampled_during
    scored = counts.scored + counts.scored_during
    phases = {"sample": counts.drawn, "train": trained, "evaluate": sampled + scored}
    tokens = {name: count * job.max_new_tokens for name, count in phases.items()}
    flops = {
        "sample": counts.drawn * to_draw,
        "train": trained * to_train,
        "evaluate": sampled * to_evaluate + scored * to_score,
    }
    seconds = {
        "sample": flops["sample"] / speed.sampling + counts.drawn * speed.labeling,
        "train": flops["train"] / speed.training,
        "evaluate": counts.sampled * to_evaluate / speed.sampling
        + counts.sampled_during * to_evaluate / speed.sampling_during
        + counts.scored * to_score / speed.scoring
        + counts.scored_during * to_score / speed.scoring_during
        + sampled * speed.labeling,
    }

    # SFT before them
    if job.sft is not None:
        tuned = job.sft_batches * training_flops(model, job.sft, DPOConfig(), job.precision)
        tokens = {"SFT": job.sft_batches * job.sft.tokens} | tokens
        flops = {"SFT": tuned} | flops
        seconds = {"SFT": tuned / speed.tuning} | seconds
    return tokens, flops, seconds


def completions_of(job: Job) -> Counts:
    """How many completions each part of a run samples and scores."""
    n, steps, loop = job.eval_prefixes, len(job.steps), job.config.loop
    evaluations = sum(evaluates(step, steps, loop) for step in range(1, steps + 1))
    during = evaluations * prefixes_during(n)

    # snapshots are taken at step 0, too
    pairs = len(job.prompts) * comb(job.completions, 2)
    snapshots = (evaluations + 1) * 2 * min(job.snapshot_pairs, pairs)

    # policy and reference score what the policy samples; before training they are one
    return Counts(
        drawn=len(job.prompts) * job.completions,
        sampled=2 * n + min(job.frontier[0], n) * job.frontier[1],
        sampled_during=during,
        scored=2 * n + during,
        scored_during=during + snapshots,
    )


def fitting_prompts(job: Job, speed: Speed, seconds: float, *, least: int) -> int:
    """As many of a job's prompts, from `least` on, as there is time for."""

    def fits(n: int) -> bool:
        smaller = replace(job, prompts=job.prompts[:n])
        return sum(costs(smaller, speed)[2].values()) <= seconds

    # bisection: `low` fits or is the least, `high` does not fit
    low, high = least, len(job.prompts)
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@kept_memory()
def measure_speed(job: Job) -> Speed:
    """The speed of this machine at what a job does; the main process's, where there are several."""
    model, precision = job.reference, job.precision
    rows = rows_on(job.device) * sampling_threads(job.device)
    prompts = [ids for ids in job.prompts[:rows] for _ in range(job.completions)]
    batch = job.trial

    # all weights, as in sampling, SFT and scoring by the reference
    sampling = sampling_rate(model, prompts[:rows], job.max_new_tokens, precision)
    tuning = training_flops(model, batch, DPOConfig(), precision) / pass_seconds(
        model, batch, precision
    )
    scoring = job.trial_flops / scoring_seconds(model, job)

    # the policy during training, with adapters where those are trained
    some, training, scoring_during = prompts[: prefixes_during(job.eval_prefixes)], tuning, scoring
    with adapters(model, job.config) as policy:
        sampling_during = sampling_rate(policy, some, job.max_new_tokens, precision, base=model)
        if job.config.lora_rank:
            seconds = pass_seconds(policy, batch, precision)
            training = training_flops(model, batch, job.config, precision) / seconds
            scoring_during = job.trial_flops / scoring_seconds(policy, job)

    found = Speed(
        sampling,
        sampling_during,
        training,
        tuning,
        scoring,
        scoring_during,
        labeling=labeling_seconds(job),
    )
    return_freed_memory()
    return from_main(lambda: found)


def memory(job: Job) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Bytes by part: while a job samples, in a step of its training, in one of its SFT."""
    model, device = job.reference, job.device
    return_freed_memory()

    # what is always there: the process, policy and reference
    weights = _bytes(model.parameters())
    always = {"process": max(0, held_bytes(device) - weights), "weights": 2 * weights}
    if job.config.lora_rank:
        always["adapters"] = _bytes(trained(model, job.config).parameters())

    # one batch of rows on a GPU, one per thread on a CPU
    most = max(len(job.prompts) * job.completions, job.eval_prefixes)
    rows = min(rows_on(device) * sampling_threads(device), most)
    length = max(map(len, job.prompts)) + job.max_new_tokens
    sampling = always | sampling_bytes(model, rows, length, job.precision)
    training = always | training_bytes(model, job.micro_batch, job.trial, job.config, job.precision)

    # SFT comes before there are two models
    tuning: dict[str, int] = {}
    if job.sft is not None:
        tuning = {"process": always["process"], "weights": weights}
        tuning |= training_bytes(model, job.sft, job.trial, DPOConfig(), job.precision)
    return sampling, training, tuning


def sampling_threads(device: torch.device) -> int:
    """Batches that `sample_completions` works on at a time."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def forward_flops(model: nn.Module, batch: CompletionBatch) -> float:
    """FLOPs of `completion_logps` without gradients."""
    # query-key pairs: of the parts of shared rows, of packed rows, of all positions of padded ones
    width = batch.input_ids.shape[1]
    squares = sum(r * length**2 for (r, length), _ in batch.rows) or batch.input_ids.numel() * width
    if goes_part_by_part(model, batch):
        squares = query_key_pairs(prompt_rows(batch.spans, width))

    blocks = 2 * block_weights(model) * batch.input_ids.numel()
    return blocks + _head_flops(model, batch) + 4 * _attention_width(model) * squares


@checked
def training_flops(
    model: nn.Module, batch: CompletionBatch, config: DPOConfig, precision: Precision
) -> float:
    """FLOPs of `completion_logps` and its backward pass.

    With LoRA adapters the frozen weights need no gradients of their own: 2 FLOPs
    per weight and token backward, and none in the blocks below the first adapter. With gradient
    checkpointing the blocks of the backward pass are computed again.
    """
    head, positions = _head_flops(model, batch), batch.input_ids.numel()
    blocks, adapted = forward_flops(model, batch) - head, adapted_fraction(model, config)

    # forward, twice that backward, and what is recomputed
    total = 3 * head + blocks + 2 * adapted * blocks
    if config.loop.gradient_checkpointing:
        total += adapted * blocks
    if _logits_bytes(model, batch, precision) > logits_budget(model.device.type)[0]:
        total += head

    # no gradients of the frozen weights, but the adapters' forward and backward
    if config.lora_rank:
        total -= head + 2 * adapted * block_weights(model) * positions
        total += 6 * sum(p.numel() for p in trained(model, config).parameters()) * positions
    return total


@checked
def adapted_fraction(model: nn.Module, config: DPOConfig) -> float:
    """The fraction of a model's blocks that a backward pass goes through."""
    n = model.config.num_hidden_layers
    return min(config.lora_layers, n) / n if config.lora_rank and config.lora_layers else 1.0


def sampling_flops(model: nn.Module, prompt_tokens: float, new_tokens: int, k: int = 1) -> float:
    """FLOPs of a completion of `new_tokens` after a prompt, with a key-value cache.

    The prompt but for its last token is read once for `k` completions, which share the cost.
    """
    read = prompt_tokens + new_tokens - 1
    shared = (prompt_tokens - 1) * (1 - 1 / k)
    blocks = 2 * block_weights(model) * (read - shared)
    head = 2 * model.get_output_embeddings().weight.numel() * new_tokens
    attention = 4 * _attention_width(model) * (read * (read + 1) - shared * prompt_tokens) / 2
    return blocks + head + attention


def block_weights(model: nn.Module) -> int:
    """Weights of the decoder that multiply every position: its matrices, but for embeddings."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(
        p.numel()
        for p in model.get_decoder().parameters()
        if p.ndim == 2 and id(p) not in looked_up
    )


@checked
def trained(model: nn.Module, config: DPOConfig) -> nn.Module:
    """What the optimizer gets: the model, or the LoRA matrices of its linear layers."""
    if not config.lora_rank:
        return model
    named = dict(model.named_modules())
    shapes = [named[name].weight.shape for name in lora_targets(model, config.lora_layers)]
    return nn.ParameterList(
        torch.empty(config.lora_rank, size, dtype=model.dtype) for shape in shapes for size in shape
    )


@checked
def pass_seconds(model: nn.Module, batch: CompletionBatch, precision: Precision) -> float:
    """Seconds of a forward and a backward pass of `batch`.

    The faster of two passes counts, after one that is not timed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device, times = batch.sources.device.type, []
    for _ in range(3):
        began = time.perf_counter()
        with autocast(device, precision), matmuls_by_onednn(device):
            scored = completion_logps(model, batch)
            torch.autograd.grad(scored.sum(), parameters, allow_unused=True)
        scored.sum().item()
        times.append(time.perf_counter() - began)
    return min(times[1:])


@checked
def sampling_rate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    precision: Precision,
    *,
    base: nn.Module | None = None,
) -> float:
    """FLOP/s of sampling a completion of each prompt, whole where that takes seconds.

    For a larger model the completions are shorter, and then fewer. FLOPs are counted for `base`,
    the model without its adapters.
    """
    base = model if base is None else base
    allowed = 3 * _trial_flops(next(base.parameters()).device) / sampling_flops(base, 1, 1)

    # some tokens of all rows, if that is allowed
    rows = max(1, min(len(prompts), round(allowed / min(4, max_new_tokens))))
    new = max(1, min(max_new_tokens, round(allowed / rows)))
    some = [list(ids) for ids in prompts[:rows]]

    def sampled(tokens: int) -> float:
        began = time.perf_counter()
        sample_completions(
            model, some, 1, eos_token_id=-1, max_new_tokens=tokens, precision=precision
        )
        return time.perf_counter() - began

    # the first pass is not timed
    sampled(1)
    seconds = sampled(new)
    return sum(sampling_flops(base, len(ids), new) for ids in some) / seconds


def scoring_seconds(model: nn.Module, job: Job) -> float:
    """Seconds in which `model` scores a job's trial in float32.

    The faster of two times counts, after one that is not timed.
    """
    owners = [i for i in range(len(job.trial_prompts)) for _ in range(job.completions)]
    completions = [[0] * job.max_new_tokens] * len(owners)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        score_completions(model, job.trial_prompts, completions, owners)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def labeling_seconds(job: Job) -> float:
    """Seconds per text of the reward; 0 where a job has none."""
    if job.reward is None or not job.texts:
        return 0.0
    texts = list(job.texts)
    job.reward(texts[:2])
    began = time.perf_counter()
    job.reward(texts)
    return (time.perf_counter() - began) / len(texts)


@checked
def training_bytes(
    model: nn.Module,
    batch: CompletionBatch,
    trial: CompletionBatch,
    config: DPOConfig,
    precision: Precision,
) -> dict[str, int]:
    """Bytes of a step beside the weights: gradients, optimizer state, activations of `batch`,
    logits, slack.

    Activations are what autograd saves in the decoder, extrapolated from `trial` and a part of it.
    """
    # adapters save inputs of their own
    again = config.loop.gradient_checkpointing
    blocks = round(adapted_fraction(model, config) * model.config.num_hidden_layers)
    with adapters(model, config) as policy:
        activations = activation_bytes(policy, batch, trial, precision, again=again, blocks=blocks)

    module = trained(model, config)
    device = trial.sources.device.type
    parts = {
        "gradients": _bytes(p for p in module.parameters() if p.requires_grad),
        "optimizer": optimizer_bytes(module, config.loop),
        "activations": activations,
        "logits": _logits_peak(model, batch, precision, device, trains_head=not config.lora_rank),
    }
    if device == "cpu":
        parts["slack"] = round(SLACK * (parts["activations"] + parts["logits"]))
    return parts


def _logits_peak(
    model: nn.Module, batch: CompletionBatch, precision: str, device: str, *, trains_head: bool
) -> int:
    """Bytes of logits and of the head beside its weights, in a backward pass."""
    head, stored = model.get_output_embeddings().weight, _logits_bytes(model, batch, precision)
    most_stored, chunk = logits_budget(device)

    # logits that wait for the backward pass, a chunk of them, and a few rows that are normalized
    total = chunk + 3 * 4 * SOFTMAX_ROWS * len(head)
    if stored <= most_stored:
        total += stored

    # the head's gradient before it is added to the others, and the head in bfloat16
    if trains_head:
        total += head.numel() * head.element_size()
    if precision == "bfloat16" and head.dtype != torch.bfloat16:
        total += head.numel() * torch.bfloat16.itemsize
    return total


@checked
def optimizer_bytes(model: nn.Module, config: LoopConfig) -> int:
    """Bytes of optimizer state after the first step."""
    total = 0
    for optimizer in make_optimizers(model, config):
        name = type(optimizer).__name__
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            total += MOMENTS[name] * p.numel() * p.element_size() + COUNTER_BYTES[name]
    return total


@checked
def activation_bytes(
    model: nn.Module,
    batch: CompletionBatch,
    trial: CompletionBatch,
    precision: Precision,
    *,
    again: bool = False,
    blocks: int = 1,
) -> int:
    """Bytes that autograd saves in the decoder for `batch`: a line through those for two batches
    that are small.

    With gradient checkpointing (`again`), those of the blocks' inputs, and of the one block that is
    recomputed, of the `blocks` that the backward pass goes through.
    """
    small = _batch(model, [[0]], 1, 8).to(trial.sources.device)
    sizes = [b.input_ids.numel() for b in (small, trial)]

    def extrapolated() -> float:
        low, high = (saved_bytes(model, b, precision) for b in (small, trial))
        slope = (high - low) / (sizes[1] - sizes[0])
        return low + slope * (batch.input_ids.numel() - sizes[0])

    if not again:
        return round(extrapolated())
    with checkpointed(blocks_of(model)):
        inputs = extrapolated()
    return round(inputs + extrapolated() / blocks)


@checked
def saved_bytes(model: nn.Module, batch: CompletionBatch, precision: Precision) -> int:
    """Bytes that autograd saves in the decoder for a backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = batch.sources.device.type
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, autocast(device, precision):
        states = completion_states(model, batch)
    return sum(saved.values()) + states.numel() * states.element_size()


@checked
def sampling_bytes(
    model: nn.Module, rows: int, length: int, precision: Precision
) -> dict[str, int]:
    """Bytes of sampling `rows` at a time, `length` positions each.

    Keys and values, logits with their softmax, and copies of the weights on a CPU.
    """
    config, item = model.config, torch.finfo(getattr(torch, precision)).bits // 8
    with autocast("cpu", precision):
        copied = prepacked_bytes(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = _head_width(model) * heads
    return {
        "cache": 2 * config.num_hidden_layers * rows * length * width * item,
        "logits": rows * len(model.get_output_embeddings().weight) * (item + 3 * 4),
        "prepacked weights": copied,
    }


def held_bytes(device: torch.device) -> int:
    """Bytes that this process holds now: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return round(peak_memory_mb() * 1e6)


def available_bytes(device: torch.device) -> int | None:
    """Bytes that this process can come to hold.

    All of the GPU's memory, or what is available beside what the process has.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 + held_bytes(device)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # on Windows
    except (AttributeError, ValueError, OSError):
        return None


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _batch(
    model: nn.Module, prompts: Sequence[Sequence[int]], k: int, tokens: int
) -> CompletionBatch:
    """`k` completions of each prompt, all of `tokens` tokens, as training lays them out."""
    owners = [p for p in range(len(prompts)) for _ in range(k)]
    completions = [[0] * tokens] * len(owners)
    return completion_batch(prompts, completions, owners, compact=can_compact(model))


def _trial_flops(device: torch.device) -> float:
    """FLOPs that a measured pass may take."""
    return TRIAL_FLOPS * (1000 if device.type == "cuda" else 1)


def _trial_rows(model: nn.Module, tokens: int, most: int) -> int:
    """Rows of a measured pass: as many as its FLOPs allow, 4 to 512."""
    weights = block_weights(model) + model.get_output_embeddings().weight.numel()
    allowed = _trial_flops(next(model.parameters()).device) / (6 * tokens * weights)
    return int(min(most, 512, max(4, allowed)))


def _logits_bytes(model: nn.Module, batch: CompletionBatch, precision: str) -> int:
    weight = model.get_output_embeddings().weight
    item = 2 if precision == "bfloat16" else weight.element_size()
    return _predicted(batch) * len(weight) * item


def _head_flops(model: nn.Module, batch: CompletionBatch) -> float:
    return 2 * model.get_output_embeddings().weight.numel() * _predicted(batch)


def _predicted(batch: CompletionBatch) -> int:
    return batch.tokens + -batch.tokens % ROUND


def _head_width(model: nn.Module) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _attention_width(model: nn.Module) -> int:
    return model.config.num_hidden_layers * model.config.num_attention_heads * _head_width(model)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB"
