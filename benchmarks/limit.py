"""What keeps a DPO step from the limit that its matmuls alone set: python benchmarks/limit.py

One step of the workload "short" (GPT-2, 124M weights) by dpo_lab, in one thread, in both
precisions: reference log-probs, a pass forward and backward, and AdamW. The clock is the CPU time
of that thread, which depends little on what else runs; torch's profiler tells what it goes to.
Writes benchmarks/results/limit.json. About a minute of one core.
"""

import json
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
from torch.profiler import ProfilerActivity, profile

from dpo_lab.engine.runs import provenance, write_json
from dpo_lab.logprobs import Precision, autocast, can_compact, completion_logps
from dpo_lab.losses import dpo_loss

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
    result = {"provenance": origin, "matmul_flops_per_second": best, "steps": table}
    write_json(RESULTS, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(LimitConfig))
