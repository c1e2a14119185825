"""What a run will cost, before it starts: tokens, FLOPs, memory and seconds.

Tokens and FLOPs follow from the config; seconds and activations come from a pass of a few rows on this machine.
"""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import comb
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpo_lab.batching import CompletionBatch, completion_batch
from dpo_lab.engine.arguments import checked
from dpo_lab.engine.cpu import kept_memory, matmuls_by_onednn, return_freed_memory
from dpo_lab.engine.lm_head import SOFTMAX_ROWS, logits_budget
from dpo_lab.engine.pieces import ROUND
from dpo_lab.engine.runs import peak_memory_mb
from dpo_lab.logprobs import Precision, autocast, can_compact, completion_logps, completion_states
from dpo_lab.loop import (
    LoopConfig,
    blocks_of,
    checkpointed,
    evaluates,
    make_optimizers,
    warn_of_warmup,
)
from dpo_lab.models import lora
from dpo_lab.sampling import rows_on, sample_completions
from dpo_lab.train import DPOConfig, check_config, plan_prompts

TRIAL_FLOPS = (
    3e10  # of a measured pass on a CPU: a fraction of a second; a thousand times that on a GPU
)

TRIAL_TOKENS = 6  # sampled to measure how fast that goes

SLACK = 0.3  # of activations and logits, as bytes that a CPU's allocator holds in gaps too small for the next tensor: measured

FRONTIER = (32, 64)  # prompts and completions of each, from which the optimal frontier is estimated

SNAPSHOT_PAIRS = 128  # scored at every evaluation

MOMENTS = {
    "AdamW": 2,
    "RMSprop": 1,
    "Muon": 1,
}  # tensors of the parameter's size that an optimizer keeps

COUNTER_BYTES = {"AdamW": 4, "RMSprop": 4, "Muon": 0}  # of each parameter's step


@dataclass(frozen=True)
class Plan:
    """Tokens, FLOPs and seconds of each phase (SFT where there is one, sample, train, evaluate), and memory by part."""

    tokens: dict[str, int]
    """completion tokens, if none ends before `max_new_tokens`: an upper bound; of SFT, those that are predicted"""
    flops: dict[str, float]
    """matmuls and attention"""
    seconds: dict[str, float]
    """on this machine; what is neither sampling nor training nor evaluation (reviews, labels, figures) is left out"""
    sampling: dict[str, int]
    """bytes by part while it samples"""
    training: dict[str, int]
    """bytes by part in a step"""
    available: int | None
    """bytes that this process can have, with those that it has; None where the system does not tell"""
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
                f"this run needs about {_gb(self.peak)} of memory, most of it in {part}, and there are {_gb(self.available)}. "
                "Take a smaller --model; a smaller --batch-pairs, or a larger --accumulate; --gradient-checkpointing; "
                "--lora-rank 8, which trains adapters; or --precision bfloat16"
            )

    def __str__(self) -> str:
        lines = [f"{'plan':<10}{'tokens':>14}{'TFLOPs':>12}{'seconds':>10}"]
        for name in self.tokens:
            lines.append(
                f"{name:<10}{self.tokens[name]:>14,}{self.flops[name] / 1e12:>12,.2f}{self.seconds[name]:>10,.0f}"
            )
        total = sum(self.seconds.values())
        lines.append(
            f"{'all':<10}{sum(self.tokens.values()):>14,}{sum(self.flops.values()) / 1e12:>12,.2f}{total:>10,.0f}"
        )
        for name, parts in (
            ("SFT", self.tuning),
            ("sampling", self.sampling),
            ("training", self.training),
        ):
            if not parts:
                continue
            listed = ", ".join(f"{part} {n_bytes / 1e6:,.0f}" for part, n_bytes in parts.items())
            lines.append(f"{name + ', MB':<14}{sum(parts.values()) / 1e6:>10,.0f} = {listed}")
        there = "unknown" if self.available is None else _gb(self.available)
        return "\n".join([*lines, f"peak {_gb(self.peak)}, of {there} that there are"])


@checked
@kept_memory()
def plan(
    reference: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: DPOConfig,
    *,
    completions: int,
    max_new_tokens: int,
    eval_prefixes: int,
    precision: Precision = "float32",
    sft: CompletionBatch | None = None,
    sft_batches: int = 0,
) -> Plan:
    """The cost of `experiment.train` with these prompts and the first weights of the policy, which are `reference`'s.

    SFT before that takes `sft_batches` forward and backward passes of batches like `sft`.

    A forward pass takes 2 FLOPs a weight and token, a backward pass 4 (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361,
    Section 2.1): for the weights of the blocks at every position, for those of the LM head at completion tokens only, and
    once more forward for what is computed again. Attention's two products take 4 x width x layers for each query and key
    (sdpa visits all of a padded row), and twice that backward.

    Raises:
        ValueError: nothing to train on.
    """
    check_config(config)
    if not prompts:
        raise ValueError("there are no prompts; give at least one, as token ids with BOS")
    n, k, device = len(prompts), completions, next(reference.parameters()).device
    groups = [list(range(comb(k, 2)))] * n
    steps = plan_prompts(groups, config.epochs, config.batch_pairs, 0)
    some = prompts[: -(-len(steps[0]) // config.loop.gradient_accumulation_steps)]
    micro = _batch(reference, some, k, max_new_tokens)
    again = config.loop.gradient_checkpointing
    warn_of_warmup(len(steps), config.loop)
    evaluations = sum(evaluates(step, len(steps), config.loop) for step in range(1, len(steps) + 1))
    m, (few, many) = eval_prefixes, FRONTIER
    sampled = 2 * m + evaluations * max(8, m // 4) + min(few, m) * many
    scored = 2 * (m + evaluations * max(8, m // 4)) + (evaluations + 1) * 2 * min(
        SNAPSHOT_PAIRS, n * comb(k, 2)
    )
    completed = {"sample": n * k, "train": config.epochs * n * k, "evaluate": sampled + scored}

    forward = forward_flops(reference, micro) / micro.n
    trained_on = (
        training_flops(reference, micro, precision, again=again, rank=config.lora_rank) / micro.n
    )
    drawn = sampling_flops(reference, sum(map(len, prompts)) / n, max_new_tokens)
    flops = {
        "sample": n * k * drawn,
        "train": config.epochs * n * k * trained_on,
        "evaluate": sampled * drawn + scored * forward,
    }
    trial = _batch(
        reference,
        prompts[: _rows(reference, max_new_tokens, device.type, n * k) // k + 1],
        k,
        max_new_tokens,
    )
    rate = {p: training_rate(reference, trial.to(device), p) for p in {"float32", precision}}
    drawing = sampling_rate(reference, prompts, k, max_new_tokens, precision)
    seconds = {
        "sample": flops["sample"] / drawing,
        "train": flops["train"] / rate[precision],
        "evaluate": sampled * drawn / drawing + scored * forward / rate["float32"],
    }
    return_freed_memory()  # what the measured passes held
    weights = sum(p.numel() * p.element_size() for p in reference.parameters())
    always = {"process": max(0, held_bytes(device) - weights), "weights": 2 * weights}
    if config.lora_rank:
        always["adapters"] = sum(
            p.numel() * p.element_size() for p in trained(reference, config.lora_rank).parameters()
        )
    rows, longest = min(rows_on(device), max(n * k, m)), max(map(len, prompts)) + max_new_tokens
    tokens, tuning = {name: count * max_new_tokens for name, count in completed.items()}, {}
    if sft is not None:
        tuned = sft_batches * training_flops(reference, sft, precision)
        tokens, flops = {"SFT": sft_batches * sft.tokens} | tokens, {"SFT": tuned} | flops
        seconds = {"SFT": tuned / rate[precision]} | seconds
        tuning = {"process": always["process"], "weights": weights}
        tuning |= training_bytes(reference, sft, trial.to(device), DPOConfig(), precision)
    return Plan(
        tokens,
        flops,
        seconds,
        always | sampling_bytes(reference, rows, longest, precision),
        always | training_bytes(reference, micro, trial.to(device), config, precision),
        available_bytes(device),
        tuning,
    )


def forward_flops(model: nn.Module, batch: CompletionBatch) -> float:
    """FLOPs of `completion_logps` without gradients."""
    squares = (
        sum(r * length**2 for (r, length), _ in batch.rows)
        or batch.input_ids.numel() * batch.input_ids.shape[1]
    )
    blocks = 2 * block_weights(model) * batch.input_ids.numel()
    return blocks + _head_flops(model, batch) + 4 * _attention_width(model) * squares


@checked
def training_flops(
    model: nn.Module,
    batch: CompletionBatch,
    precision: Precision,
    *,
    again: bool = False,
    rank: int = 0,
) -> float:
    """FLOPs of `completion_logps` and its backward pass; `again` says whether that computes the blocks a second time.

    With LoRA adapters of `rank` the frozen weights need no gradients of their own: 2 FLOPs a weight and token backward.
    """
    forward, head, positions = (
        forward_flops(model, batch),
        _head_flops(model, batch),
        batch.input_ids.numel(),
    )
    total = 3 * forward + again * (forward - head)
    if _logits_bytes(model, batch, precision) > logits_budget(model.device.type)[0]:
        total += head
    if rank:
        total -= head + 2 * block_weights(model) * positions
        total += 6 * sum(p.numel() for p in trained(model, rank).parameters()) * positions
    return total


def sampling_flops(model: nn.Module, prompt_tokens: float, new_tokens: int) -> float:
    """FLOPs of a completion of `new_tokens` after a prompt: each position once, its keys and values from the cache."""
    read = prompt_tokens + new_tokens - 1
    head = model.get_output_embeddings().weight.numel()
    return (
        2 * block_weights(model) * read
        + 2 * head * new_tokens
        + 4 * _attention_width(model) * read * (read + 1) / 2
    )


def block_weights(model: nn.Module) -> int:
    """Weights of the decoder that multiply every position: its matrices, but for embeddings."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(
        p.numel()
        for p in model.get_decoder().parameters()
        if p.ndim == 2 and id(p) not in looked_up
    )


def trained(model: nn.Module, rank: int) -> nn.Module:
    """What the optimizer gets: the model itself, or LoRA's two matrices of each linear layer of its decoder."""
    if not rank:
        return model
    shapes = [
        m.weight.shape for m in model.get_decoder().modules() if isinstance(m, nn.Linear | Conv1D)
    ]
    return nn.ParameterList(
        torch.empty(rank, size, dtype=model.dtype) for shape in shapes for size in shape
    )


@checked
def training_rate(model: nn.Module, batch: CompletionBatch, precision: Precision) -> float:
    """FLOP/s of a forward and a backward pass of `batch`; the second of two counts."""
    parameters, device = (
        [p for p in model.parameters() if p.requires_grad],
        batch.sources.device.type,
    )
    for _ in range(2):
        began = time.perf_counter()
        with autocast(device, precision), matmuls_by_onednn(device):
            scored = completion_logps(model, batch)
            torch.autograd.grad(scored.sum(), parameters, allow_unused=True)
        scored.sum().item()
    return training_flops(model, batch, precision) / (time.perf_counter() - began)


@checked
def sampling_rate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    k: int,
    max_new_tokens: int,
    precision: Precision,
) -> float:
    """FLOP/s of a few tokens sampled in a batch as large as the run's, or as a fraction of a second allows.

    Prompts are cut to one length: what is read token by token beside those that sample weighs little in a long completion.
    """
    device, new = next(model.parameters()).device, min(max_new_tokens, TRIAL_TOKENS)
    shortest = min(map(len, prompts))
    some = [
        list(ids[:shortest])
        for ids in prompts[
            : max(1, _rows(model, new, device.type, min(rows_on(device), len(prompts) * k)) // k)
        ]
    ]
    for _ in range(2):
        began = time.perf_counter()
        sample_completions(model, some, k, eos_token_id=-1, max_new_tokens=new, precision=precision)
    seconds = time.perf_counter() - began
    return len(some) * k * sampling_flops(model, shortest, new) / seconds


@checked
def training_bytes(
    model: nn.Module,
    batch: CompletionBatch,
    trial: CompletionBatch,
    config: DPOConfig,
    precision: Precision,
) -> dict[str, int]:
    """Bytes of a step beside the weights: gradients, optimizer state, activations of `batch`, logits, slack.

    Activations are what autograd saves in the decoder, extrapolated from `trial` and a part of it. Logits are those that
    wait for the backward pass, a chunk of them, a few rows that are normalized, the gradient of the head before it is added to
    the others, and the head in bfloat16 where that is not its own precision.
    """
    head, module = model.get_output_embeddings().weight, trained(model, config.lora_rank)
    kept, (most_kept, chunk) = (
        _logits_bytes(model, batch, precision),
        logits_budget(trial.sources.device.type),
    )
    with (
        lora(model, config.lora_rank) if config.lora_rank else nullcontext(model) as policy
    ):  # adapters save inputs of their own
        activations = activation_bytes(
            policy, batch, trial, precision, again=config.loop.gradient_checkpointing
        )
    parts = {
        "gradients": sum(
            p.numel() * p.element_size() for p in module.parameters() if p.requires_grad
        ),
        "optimizer": optimizer_bytes(module, config.loop),
        "activations": activations,
        "logits": kept * (kept <= most_kept)
        + chunk
        + 3 * 4 * SOFTMAX_ROWS * len(head)
        + (not config.lora_rank) * head.numel() * head.element_size()
        + (precision == "bfloat16" and head.dtype != torch.bfloat16)
        * head.numel()
        * torch.bfloat16.itemsize,
    }
    if trial.sources.device.type == "cpu":
        parts["slack"] = round(SLACK * (parts["activations"] + parts["logits"]))
    return parts


@checked
def optimizer_bytes(model: nn.Module, config: LoopConfig) -> int:
    """Bytes of optimizer state after the first step."""
    total = 0
    for optimizer in make_optimizers(model, config):
        kind = type(optimizer).__name__
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            total += MOMENTS[kind] * p.numel() * p.element_size() + COUNTER_BYTES[kind]
    return total


@checked
def activation_bytes(
    model: nn.Module,
    batch: CompletionBatch,
    trial: CompletionBatch,
    precision: Precision,
    *,
    again: bool = False,
) -> int:
    """Bytes that autograd saves in the decoder for `batch`: a line through those for two batches that are small.

    With gradient checkpointing (`again`), those of the blocks' inputs, and of the one block that is computed again.
    """
    small = _batch(model, [[0]], 1, 8).to(trial.sources.device)
    sizes = [b.input_ids.numel() for b in (small, trial)]

    def extrapolated() -> float:
        low, high = (saved_bytes(model, b, precision) for b in (small, trial))
        return low + (high - low) / (sizes[1] - sizes[0]) * (batch.input_ids.numel() - sizes[0])

    if not again:
        return round(extrapolated())
    with checkpointed(blocks_of(model)):
        inputs = extrapolated()
    return round(inputs + extrapolated() / model.config.num_hidden_layers)


@checked
def saved_bytes(model: nn.Module, batch: CompletionBatch, precision: Precision) -> int:
    """Bytes that autograd saves in the decoder for the backward pass of `batch`, without the weights themselves."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        autocast(batch.sources.device.type, precision),
    ):
        states = completion_states(model, batch)
    return sum(saved.values()) + states.numel() * states.element_size()


@checked
def sampling_bytes(
    model: nn.Module, rows: int, length: int, precision: Precision
) -> dict[str, int]:
    """Bytes of sampling `rows` at a time, `length` positions each: keys and values, and logits with their softmax."""
    config, item = model.config, torch.finfo(getattr(torch, precision)).bits // 8
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = _head_width(model) * heads
    return {
        "cache": 2 * config.num_hidden_layers * rows * length * width * item,
        "logits": rows * len(model.get_output_embeddings().weight) * (item + 3 * 4),
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
    """Bytes that this process can come to hold: all of the GPU's memory, or what is available beside what it has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 + held_bytes(device)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _batch(
    model: nn.Module, prompts: Sequence[Sequence[int]], k: int, tokens: int
) -> CompletionBatch:
    """`k` completions of each prompt, all of `tokens` tokens, as training lays them out."""
    owners = [p for p in range(len(prompts)) for _ in range(k)]
    return completion_batch(
        prompts, [[0] * tokens] * len(owners), owners, compact=can_compact(model)
    )


def _rows(model: nn.Module, tokens: int, device: str, most: int) -> int:
    """Rows of a measured pass: as many as its FLOPs allow, 4 to 512."""
    flops_a_row = 6 * tokens * (block_weights(model) + model.get_output_embeddings().weight.numel())
    return int(
        min(most, 512, max(4, (1000 if device == "cuda" else 1) * TRIAL_FLOPS / flops_a_row))
    )


def _logits_bytes(model: nn.Module, batch: CompletionBatch, precision: Precision) -> int:
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
