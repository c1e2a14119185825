"""DPO and SFT steps of dpo_lab, TRL and a textbook loop, side by side.

`make bench`, or python benchmarks/speed.py

Every measurement is a process of its own (`benchmarks/contender.py`); contenders take turns. Writes
benchmarks/results/cpu.json, or a file named for another machine. On a GPU: benchmarks/gpu.py.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from contender import WORKLOADS, Workload, make_preferences, measure

from dpo_lab.engine.runs import provenance, write_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class SpeedConfig:
    """The grid."""

    workloads: tuple[str, ...] = ("paper", "short", "long", "embedded")
    """names in contender.WORKLOADS; SFT is measured on the last one"""
    repeats: int = 2
    """processes of each contender on each workload, in rounds over all of them"""
    minutes: float = 22.0
    """no workload is measured again after so many; the first round is always whole"""
    seed: int = 0
    """of weights and pairs"""
    name: str = "cpu"
    """of the file in benchmarks/results; cpu-avx2 for the second machine in README"""


def matmul_rate(dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of a matmul of the MLP's shape at 124M: median of 20, or of fewer in five seconds."""
    a, b = (torch.randn(shape, dtype=dtype) for shape in ((1024, 768), (768, 3072)))
    seconds = []
    while len(seconds) < 2 or len(seconds) < 23 and sum(seconds) < 5:
        began = clock()
        a @ b
        seconds.append(clock() - began)
    return 2 * a.numel() * b.shape[1] / statistics.median(seconds[min(3, len(seconds) - 1) :])


def contenders(job: str, fast_bfloat16: bool) -> list[tuple[str, str]]:
    """The contenders, each in its precision.

    TRL trains in bfloat16, its default, where the machine is fast in it; elsewhere that would
    flatter us.
    """
    theirs = "bfloat16" if fast_bfloat16 else "float32"
    found = [("dpo_lab", "float32"), ("trl_default", theirs), ("trl_best", theirs)]
    if fast_bfloat16:
        found.append(("dpo_lab", "bfloat16"))
    return found if job == "sft" else [*found, ("textbook", "float32")]


def steps_of(name: str, fast_bfloat16: bool) -> int:
    """Timed steps of a workload: one where a step takes long."""
    return WORKLOADS[name].steps if fast_bfloat16 else 1


def least_flops(job: str, workload: Workload, seed: int) -> float:
    """FLOPs that one pass over the data cannot do without.

    It reads each prompt and completion once, forward and backward.

    DPO adds the reference's forward pass. Matmuls of the blocks for every token that predicts or is
    seen, of the LM head for completion tokens; attention's own products are left out.
    """
    preferences = make_preferences(workload, seed)
    predicted = sum(map(len, preferences.completions))
    seen = sum(map(len, preferences.prompts)) + predicted - len(preferences.completions)
    blocks, head = 12 * workload.layers * workload.width**2, workload.width * workload.vocabulary
    return {"dpo": 4, "sft": 3}[job] * 2 * (blocks * seen + head * predicted)


def run(
    job: str, name: str, contender: str, precision: str, fast: bool, config: SpeedConfig
) -> dict[str, Any]:
    """What `benchmarks/contender.py` prints."""
    arguments = [
        f"--job={job}",
        f"--contender={contender}",
        f"--precision={precision}",
        f"--workload={name}",
    ]
    # a step of TRL's defaults takes two minutes where bfloat16 is slow, of which page faults are
    # little
    arguments += [f"--seed={config.seed}", f"--untimed={1 + fast}"]
    arguments += [f"--change={json.dumps({'steps': steps_of(name, fast)})}"]
    result = measure(*arguments)
    print(result, flush=True)
    return result


def summary(runs: list[dict[str, Any]], flops: float, rates: dict[str, float]) -> dict[str, Any]:
    """A row of the table, from the runs of one contender."""
    first = runs[0]
    rate = statistics.median(
        r["pairs"] / (r["training_seconds"] + r["reference_seconds"]) for r in runs
    )
    steps = [
        r["pairs"] / (r["steps"] * seconds + r["reference_seconds"])
        for r in runs
        for seconds in r["step_seconds"]
    ]
    apart = [
        r["completion_tokens"] / r["reference_seconds"] if r["reference_seconds"] else None
        for r in runs
    ]
    return {
        **{name: first[name] for name in ("job", "workload", "contender", "precision", "loss")},
        "pairs_per_second": rate,
        "spread": [min(steps), max(steps)],
        "pairs_per_second_without_reference": statistics.median(
            r["pairs"] / r["training_seconds"] for r in runs
        ),
        "completion_tokens_per_second": rate * first["completion_tokens"] / first["pairs"],
        "reference_tokens_per_second": None if None in apart else statistics.median(apart),
        "peak_memory_mb": statistics.median(r["peak_memory_mb"] for r in runs),
        "share_of_limit": flops / first["pairs"] * rate / rates[first["precision"]],
    }


def main(config: SpeedConfig) -> None:
    rates = {name: matmul_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    fast = rates["bfloat16"] > rates["float32"]
    jobs = [*(("dpo", name) for name in config.workloads), ("sft", config.workloads[-1])]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {job: [] for job in jobs}
    began = time.perf_counter()
    for i in range(config.repeats):
        for job, name in jobs:
            if i and time.perf_counter() - began > 60 * config.minutes:
                break
            runs[job, name] += [
                run(job, name, *contender, fast, config) for contender in contenders(job, fast)
            ]
            losses = {
                r["contender"]: r["loss"] for r in runs[job, name] if r["precision"] == "float32"
            }
            if max(losses.values()) - min(losses.values()) > 1e-4:
                raise SystemExit(
                    f"the contenders do not compute the same loss of {job} on {name}: {losses}"
                )
    table = []
    for (job, name), found in runs.items():
        workload = replace(WORKLOADS[name], steps=steps_of(name, fast))
        flops = least_flops(job, workload, config.seed)
        losses = {r["contender"]: r["loss"] for r in found if r["precision"] == "float32"}
        for contender in dict.fromkeys((r["contender"], r["precision"]) for r in found):
            row = summary(
                [r for r in found if (r["contender"], r["precision"]) == contender], flops, rates
            )
            table.append(row)
            print(
                f"{job} {name:<9} {row['contender']:<12} {row['precision']:<9} "
                f"{row['pairs_per_second']:8.2f} pairs/s "
                f"{row['peak_memory_mb']:8,.0f} MB  {row['share_of_limit']:5.0%} of the limit  "
                f"loss off by {abs(row['loss'] - losses['dpo_lab']):.0e}"
            )
    rows = [run for found in runs.values() for run in found]
    write_json(
        RESULTS / f"{config.name}.json",
        {
            "provenance": provenance(),
            "matmul_flops_per_second": rates,
            "table": table,
            "runs": rows,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(SpeedConfig))
