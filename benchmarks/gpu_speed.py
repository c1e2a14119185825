"""Stage `speed` of benchmarks/gpu.py: steps of DPO on GPT-2's shapes, in bfloat16.

The contenders are dpo_lab, TRL and a textbook loop. Each trains random weights on the same pairs by
its own whole loop, as in benchmarks/contender.py; one process for all, since a GPU's time is short.
The clock is a CUDA event behind each `Optimizer.step`: one pass over the pairs for warm-up, then
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

# layers and width of GPT-2's sizes; heads of 64
SIZES = {"large": (36, 1280), "small": (12, 768), "medium": (24, 1024)}
STEPS, TIMED = 2, 3  # in a pass over the pairs, and passes
WORKLOADS = {  # those of benchmarks/contender.py, with more pairs per step: 66, or 64
    "paper": Workload(prompts=11, completions=4, prompt_tokens=(2, 8), steps=STEPS),
    "long": Workload(prompts=64, completions=2, prompt_tokens=(64, 192), steps=STEPS),
    "short": Workload(prompts=64, completions=2, prompt_tokens=(4, 16), steps=STEPS),
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

    def passes(self) -> list[float]:
        """Seconds of each of the timed passes over the pairs, the last ones."""
        marks = self.marks[-STEPS * TIMED - 1 :: STEPS]
        if self.device == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:])]
        return [b - a for a, b in zip(marks, marks[1:])]


@contextmanager
def clean(device: str) -> Iterator[Clock]:
    """A process as it was before the last contender, and a clock.

    Restores accelerate's state, what was replaced in dpo_lab, and memory.
    """
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
    began = time.perf_counter()
    runs: dict[str, Callable] = {
        "dpo_lab": contender.run_dpo_lab,
        "textbook": contender.run_textbook,
    }
    for passes in (1, 2, 4, 8):
        shape = replace(workload, passes=passes)
        config = ContenderConfig(contender=name, precision="bfloat16", device=device, untimed=TIMED)
        preferences, short = make_preferences(shape, 0), contender.short_step(shape, 0)
        with clean(device) as clock:
            try:
                result = runs.get(name, contender.run_trl)(config, shape, preferences, short)
                assert len(clock.marks) == 1 + STEPS * (TIMED + 1), (
                    f"{name} made {len(clock.marks)} steps"
                )
                seconds = clock.passes()
                break
            except torch.OutOfMemoryError:
                if passes == 8:
                    raise
        gc.collect()
    gc.collect()
    pairs, reference = len(preferences.chosen), result["reference_seconds"]
    return {
        "contender": name,
        "pairs_per_second": pairs / (statistics.median(seconds) + reference),
        "pairs_per_second_without_reference": pairs / statistics.median(seconds),
        "step_seconds": [each / STEPS for each in seconds],
        "reference_seconds_per_step": reference / STEPS,
        "passes": passes,
        "loss": result["loss"],
        "peak_memory_mb": round(torch.cuda.max_memory_allocated() / 1e6)
        if device == "cuda"
        else None,
        "seconds": round(time.perf_counter() - began, 1),
    }


def profiled(workload: Workload, device: str) -> dict[str, Any]:
    """Where the time of a dpo_lab step goes: kernels, launches, waits for the GPU, its copies."""
    workload = replace(workload, steps=4)
    policy, reference = (prepare_model(model) for model in make_models(workload, 0, device))
    preferences = make_preferences(workload, 0).with_reference(reference, precision="bfloat16")
    del reference
    settings = LoopConfig(learning_rate=LEARNING_RATE, warmup_steps=0)
    config = DPOConfig(
        beta=BETA, batch_pairs=len(preferences.chosen) // workload.steps, loop=settings
    )
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    with clean(device):
        train_dpo(policy, preferences, config, progress=None)
        with profile(activities=activities) as found:
            lines = train_dpo(policy, preferences, config, progress=None)
    kernels = Counter()
    for event in found.key_averages():
        # an optimizer's event spans kernels
        if str(event.device_type).endswith("CUDA") and not event.key.startswith("Optimizer."):
            kernels[event.key] += event.self_device_time_total / 1e6
    counted = Counter(event.name for event in found.events())
    waits = {key: counted[key] / workload.steps for key in WAITS if counted[key]}
    copies = (
        sum(n for key, n in counted.items() if "DtoH" in key or "Device -> Pageable" in key)
        / workload.steps
    )
    return {
        "seconds_per_step": statistics.median(line["seconds"] for line in lines),
        "kernel_seconds_per_step": sum(kernels.values()) / workload.steps,
        "launches_per_step": (counted["cudaLaunchKernel"] + counted["cudaLaunchKernelExC"])
        / workload.steps,
        "waits_per_step": waits,
        "copies_to_the_cpu_per_step": copies,
        "kernels": [
            {"name": key[:90], "seconds_per_step": s / workload.steps}
            for key, s in kernels.most_common(12)
        ],
    }


def run(settings: Settings, report: Report) -> None:
    device = settings.device
    rate = report.attempt(
        "matmul_flops_per_second", lambda: matmul_rate(device, 256 if settings.tiny else 8192)
    )
    sizes, workloads = SIZES, WORKLOADS
    if settings.tiny:
        sizes = {"small": (2, 64)}
        workloads = {"paper": replace(WORKLOADS["paper"], prompts=2, vocabulary=512, most=16)}
    # the most important first: the paper's protocol at GPT-2 large, then the two that matter most
    # on every workload
    first, *others = [(name, size) for name in workloads for size in sizes]
    jobs = [(*first, who) for who in CONTENDERS]
    jobs += [
        (*job, who) for group in (CONTENDERS[:2], CONTENDERS[2:]) for job in others for who in group
    ]
    for number, (name, size, who) in enumerate(jobs):
        if number == len(CONTENDERS):
            workload = replace(
                workloads[first[0]], layers=sizes[first[1]][0], width=sizes[first[1]][1]
            )
            report.attempt("profile", lambda workload=workload: profiled(workload, device))
            gc.collect()
        if settings.left < 5:
            report.add("not begun", ["/".join(job) for job in jobs[number:]])
            break
        layers, width = sizes[size]
        workload = replace(workloads[name], layers=layers, width=width)
        found = report.attempt(
            f"{name}/{size}/{who}", lambda who=who, w=workload: run_contender(who, w, device)
        )
        if found and rate:
            flops = least_flops("dpo", workload, 0) / len(make_preferences(workload, 0).chosen)
            report.add(
                f"{name}/{size}/{who}",
                found | {"fraction_of_matmul_rate": found["pairs_per_second"] * flops / rate},
            )
