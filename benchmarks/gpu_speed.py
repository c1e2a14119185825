"""Stage `speed` of benchmarks/gpu.py: steps of DPO by dpo_lab, TRL and a textbook loop on GPT-2's shapes, in bfloat16.

Every contender trains random weights on the same pairs by its own whole loop, as in benchmarks/contender.py; one process
for all, since a GPU's time is short. The clock is a CUDA event behind each `Optimizer.step`: two steps of warm-up, then
the median of three. A contender takes as few forward passes per step as fit into memory.
"""

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import contender
import torch
from accelerate.state import AcceleratorState, GradientState
from contender import BETA, LEARNING_RATE, ContenderConfig, Workload, make_models, make_preferences
from gpu import Report, Settings
from speed import least_flops
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

from dpo_lab import loop
from dpo_lab import preferences as data_format
from dpo_lab.loop import LoopConfig
from dpo_lab.models import prepare_model
from dpo_lab.train import DPOConfig, train_dpo

SIZES = {"large": (36, 1280), "small": (12, 768), "medium": (24, 1024)}  # layers and width of GPT-2's; heads of 64
WARM, TIMED = 2, 3
WORKLOADS = {  # those of benchmarks/contender.py, a step of which fills a GPU: 66 pairs, or 64
    "paper": Workload(prompts=11, completions=4, prompt_tokens=(2, 8), steps=WARM + TIMED),
    "long": Workload(prompts=64, completions=2, prompt_tokens=(64, 192), steps=WARM + TIMED),
    "short": Workload(prompts=64, completions=2, prompt_tokens=(4, 16), steps=WARM + TIMED),
}
CONTENDERS = ("dpo_lab", "trl_best", "trl_default", "textbook")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Clock:
    """When each optimizer step ended on the device, in seconds from the first one."""

    def __init__(self, device: str):
        self.device, self.marks = device, []

    def mark(self, *_: object) -> None:
        """Called behind `Optimizer.step`."""
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def steps(self) -> list[float]:
        """Seconds of the timed steps."""
        marks = self.marks[-TIMED - 1 :]
        if self.device == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:])]
        return [b - a for a, b in zip(marks, marks[1:])]


@contextmanager
def clean(device: str) -> Iterator[Clock]:
    """A process as it was before the last contender: accelerate's state, what was replaced in dpo_lab, memory; and a clock."""
    kept = loop.make_optimizers, data_format.weights_hash
    clock = Clock(device)
    handle = register_optimizer_step_post_hook(clock.mark)
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield clock
    finally:
        handle.remove()
        loop.make_optimizers, data_format.weights_hash = kept


def matmul_rate(device: str, n: int) -> float:
    """FLOP/s of a product of two random n x n matrices in bfloat16, the median of twenty."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(25):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            a @ b
            end.record()
            torch.cuda.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(seconds[5:])


def run_contender(name: str, workload: Workload, device: str) -> dict[str, Any]:
    """Steps of one contender, in as few forward passes as fit."""
    runs: dict[str, Callable] = {"dpo_lab": contender.run_dpo_lab, "textbook": contender.run_textbook}
    for passes in (1, 2, 4, 8):
        shape = replace(workload, passes=passes)
        config = ContenderConfig(contender=name, precision="bfloat16", device=device, untimed=0)
        preferences, short = make_preferences(shape, 0), contender.short_step(shape, 0)
        with clean(device) as clock:
            try:
                result = runs.get(name, contender.run_trl)(config, shape, preferences, short)
                seconds = clock.steps()
                break
            except torch.OutOfMemoryError:
                if passes == 8:
                    raise
        gc.collect()
    gc.collect()
    pairs = len(preferences.chosen) / workload.steps
    step = statistics.median(seconds) + result["reference_seconds"] / workload.steps
    return {
        "contender": name,
        "pairs_per_second": pairs / step,
        "step_seconds": seconds,
        "reference_seconds_per_step": result["reference_seconds"] / workload.steps,
        "passes": passes,
        "loss": result["loss"],
        "peak_memory_mb": round(torch.cuda.max_memory_allocated() / 1e6) if device == "cuda" else None,
    }


def profiled(workload: Workload, device: str) -> dict[str, Any]:
    """Where the time of a step of dpo_lab goes: busy kernels, launches, waits for the device, and copies from it."""
    workload = replace(workload, steps=4)
    policy, reference = (prepare_model(model) for model in make_models(workload, 0, device))
    preferences = make_preferences(workload, 0).with_reference(reference, precision="bfloat16")
    del reference
    settings = LoopConfig(learning_rate=LEARNING_RATE, warmup_steps=0)
    config = DPOConfig(beta=BETA, batch_pairs=len(preferences.chosen) // workload.steps, loop=settings)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    with clean(device):
        train_dpo(policy, preferences, config, progress=None)
        with profile(activities=activities) as found:
            lines = train_dpo(policy, preferences, config, progress=None)
    kernels = Counter()
    for event in found.key_averages():
        if str(event.device_type).endswith("CUDA"):
            kernels[event.key] += event.self_device_time_total / 1e6
    counted = Counter(event.name for event in found.events())
    waits = {key: counted[key] / workload.steps for key in WAITS if counted[key]}
    copies = sum(n for key, n in counted.items() if "DtoH" in key or "Device -> Pageable" in key) / workload.steps
    return {
        "seconds_per_step": statistics.median(line["seconds"] for line in lines),
        "kernel_seconds_per_step": sum(kernels.values()) / workload.steps,
        "launches_per_step": (counted["cudaLaunchKernel"] + counted["cudaLaunchKernelExC"]) / workload.steps,
        "waits_per_step": waits,
        "copies_to_the_cpu_per_step": copies,
        "kernels": [{"name": key[:90], "seconds_per_step": s / workload.steps} for key, s in kernels.most_common(12)],
    }


def run(settings: Settings, report: Report) -> None:
    device = settings.device
    rate = report.attempt("matmul_flops_per_second", lambda: matmul_rate(device, 256 if settings.tiny else 8192))
    sizes, workloads = SIZES, WORKLOADS
    if settings.tiny:
        sizes = {"small": (2, 64)}
        workloads = {"paper": replace(WORKLOADS["paper"], prompts=2, vocabulary=512, most=16)}
    jobs = [(size, name) for name in workloads for size in sizes]
    jobs.sort(key=lambda job: (job[1] != "paper", job[0] != "large"))  # of the most worth first
    first, longest = True, 0.0
    for size, name in jobs:
        layers, width = sizes[size]
        workload = replace(workloads[name], layers=layers, width=width)
        flops = least_flops("dpo", workload, 0) / len(make_preferences(workload, 0).chosen)
        for who in CONTENDERS:
            key = f"{name}/{size}/{who}"
            if settings.left < 1.5 * longest + 3:
                report.add(key, {"error": "not begun: the time was over"})
                continue
            began = time.perf_counter()
            found = report.attempt(key, lambda who=who, workload=workload: run_contender(who, workload, device))
            longest = max(longest, time.perf_counter() - began)
            if found and rate:
                found["fraction_of_matmul_rate"] = found["pairs_per_second"] * flops / rate
                report.add(key, found)
        if first:
            report.attempt("profile", lambda workload=workload: profiled(workload, device))
            gc.collect()
            first = False
