"""What keeps a DPO step from the limit that its matmuls alone set: python benchmarks/limit.py

One step of the workload "short" (GPT-2, 124M weights) by dpo_lab, in one thread, in both
precisions: reference log-probs, a pass forward and backward, and AdamW. The clock is the CPU time
of that thread, which depends little on what else runs; torch's profiler tells what it goes to.
Beside it, a block of that model alone, forward and backward, as torch runs it operation by
operation and as torch.compile fuses it, where there is a C++ compiler. Writes
benchmarks/results/limit.json. About two minutes of one core.
"""

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from contender import BETA, LEARNING_RATE, WORKLOADS, make_models, make_preferences, tuned
from speed import least_flops, matmul_rate
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_lab.engine.runs import provenance, write_json
from dpo_lab.logprobs import Precision, autocast, can_compact, completion_logps
from dpo_lab.losses import dpo_loss
from dpo_lab.models import prepare_model

RESULTS = Path(__file__).parent / "results" / "limit.json"

# what an operation is for, by the beginning of its name behind aten::; the first that fits
KINDS = {
    "matmuls": ("mm", "addmm", "bmm"),
    "attention": ("_scaled_dot_product", "index_select", "index_add"),
    "activation": ("gelu",),
    "layer norm": ("native_layer_norm",),
    "softmax of the LM head": ("_log_softmax", "exp_", "gather", "scatter_add_"),
    "AdamW and the gradient's norm": ("_fused_adamw_", "_foreach", "linalg_vector_norm"),
    "casts and copies": ("copy_", "_to_copy", "clone", "cat"),
}


@dataclass(frozen=True)
class LimitConfig:
    """How much to measure."""

    repeats: int = 1
    """steps of each kind after the first, which is not counted"""
    block_tokens: int = 1_024
    """tokens that a block alone computes"""
    block_repeats: int = 15
    """passes of a block whose median counts"""
    seed: int = 0
    """of weights and pairs"""


def kind_of(operation: str) -> str:
    """What an operation of the profiler is for."""
    name = operation.removeprefix("aten::")
    for kind, beginnings in KINDS.items():
        if name.startswith(beginnings):
            return kind
    return "other"


def steps(config: LimitConfig) -> dict[str, Callable[[], float]]:
    """A DPO step of each kind, which gives its loss; all of them train the same model."""
    preferences = make_preferences(WORKLOADS["short"], config.seed)
    policy, reference = make_models(WORKLOADS["short"], config.seed, "cpu")
    policy, reference = tuned(policy, "cpu"), tuned(reference, "cpu")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, fused=True)
    batch = preferences.batch(np.arange(len(preferences.chosen)), compact=can_compact(policy))

    def step(precision: Precision) -> float:
        with autocast("cpu", precision):
            with torch.no_grad():
                known = completion_logps(reference, batch.completions)
            logps = completion_logps(policy, batch.completions)
        losses = dpo_loss(logps, known, batch.chosen, batch.rejected, BETA).losses
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses.mean().item()

    return {name: partial(step, name) for name in ("float32", "bfloat16")}


def measure(step: Callable[[], float]) -> dict[str, Any]:
    """CPU seconds of a step, and those that its operations take themselves, by what they are for.

    The profiler's clock runs on while other processes have the processor.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.process_time()
        loss = step()
        taken = time.process_time() - began
    kinds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return {"loss": loss, "cpu_seconds": taken, "kinds": kinds}


def block_seconds(block: nn.Module, tokens: int, precision: Precision, repeats: int) -> float:
    """Median CPU seconds of a forward and a backward pass of a block of GPT-2's shape."""
    states, times = torch.randn(1, tokens, 768, requires_grad=True), []
    for turn in range(repeats + 3):
        began = time.process_time()
        with autocast("cpu", precision):
            found = block(states)
        found = found[0] if isinstance(found, tuple) else found
        found.float().square().mean().backward()
        if turn >= 3:
            times.append(time.process_time() - began)
    return float(np.median(times))


def fused_blocks(config: LimitConfig) -> dict[str, dict[str, float]]:
    """CPU seconds of a block by precision, as it is and compiled; empty without a compiler."""
    if shutil.which("g++") is None:
        return {}
    torch.manual_seed(config.seed)
    shape = GPT2Config(n_layer=1, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)
    block = prepare_model(GPT2LMHeadModel(shape)).eval().transformer.h[0]
    ways = {"as it is": block, "compiled": torch.compile(block, fullgraph=True)}
    names: tuple[Precision, ...] = ("float32", "bfloat16")
    size = (config.block_tokens, config.block_repeats)
    return {
        name: {way: block_seconds(one, size[0], name, size[1]) for way, one in ways.items()}
        for name in names
    }


def main(config: LimitConfig) -> None:
    torch.set_num_threads(1)
    origin = provenance()
    flops = least_flops("dpo", WORKLOADS["short"], config.seed)
    measured: dict[str, list[dict[str, Any]]] = defaultdict(list)
    rates: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    todo = steps(config)
    for turn in range(1 + config.repeats):
        for name, values in rates.items():
            values.append(matmul_rate(getattr(torch, name), time.process_time))
        for name, step in todo.items():
            if turn == 0:
                step()
                continue
            measured[name].append(measure(step))
            print(name, json.dumps(measured[name][-1]), flush=True)

    best, table = {name: max(values) for name, values in rates.items()}, {}
    for name, turns in measured.items():
        least = min(turn["cpu_seconds"] for turn in turns)
        kinds = {
            kind: min(turn["kinds"].get(kind, 0.0) for turn in turns) for kind in turns[0]["kinds"]
        }
        limit = flops / best[name]
        table[name] = {"seconds": least, "limit_seconds": limit, "kinds": kinds}
    result = {
        "provenance": origin,
        "matmul_flops_per_second": best,
        "steps": table,
        "block": {"tokens": config.block_tokens, "cpu_seconds": fused_blocks(config)},
    }
    write_json(RESULTS, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(LimitConfig))
