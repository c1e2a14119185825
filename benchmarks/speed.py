"""DPO steps of dpo_lab, TRL and a textbook loop, side by side: `make bench`, or python benchmarks/speed.py

Every measurement is a process of its own (`benchmarks/contender.py`); contenders take turns. Writes
benchmarks/results/cpu.json.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from contender import WORKLOADS, make_preferences

from dpo_lab.runs import provenance, write_json

RESULTS = Path(__file__).parent / "results" / "cpu.json"
CONTENDERS = (
    ("dpo_lab", "float32"),
    ("dpo_lab", "bfloat16"),
    ("trl_default", "bfloat16"),
    ("trl_best", "float32"),
    ("trl_best", "bfloat16"),
    ("textbook", "float32"),
)


@dataclass(frozen=True)
class SpeedConfig:
    """The grid."""

    workloads: tuple[str, ...] = ("paper", "short", "long", "embedded")
    """names in contender.WORKLOADS"""
    repeats: int = 2
    """processes of each contender on each workload"""
    steps: int = 4
    """optimizer steps a process; the first one is not timed"""
    seed: int = 0
    """of weights and pairs"""


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a matmul of the MLP's shape at 124M, median of 20."""
    a, b = torch.randn(1024, 768, dtype=dtype), torch.randn(768, 3072, dtype=dtype)
    seconds = []
    for _ in range(23):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * a.numel() * b.shape[1] / statistics.median(seconds[3:])


def least_flops(name: str, steps: int, seed: int) -> float:
    """FLOPs that one pass over the pairs cannot do without: each prompt and completion once, forward, backward and reference.

    Matmuls of the blocks for every token that predicts or is seen, of the LM head for completion tokens; attention's own
    products are left out.
    """
    workload = WORKLOADS[name]
    preferences = make_preferences(workload, steps, seed)
    predicted = sum(map(len, preferences.completions))
    seen = sum(map(len, preferences.prompts)) + predicted - len(preferences.completions)
    blocks, head = 12 * workload.layers * workload.width**2, workload.width * workload.vocabulary
    forward = 2 * (blocks * seen + head * predicted)
    return 4 * forward  # policy forward 1, backward 2, reference 1


def main(config: SpeedConfig) -> None:
    rows = []
    for name in config.workloads:
        for _ in range(config.repeats):
            for contender, precision in CONTENDERS:
                arguments = [f"--contender={contender}", f"--precision={precision}", f"--workload={name}"]
                arguments += [f"--steps={config.steps}", f"--seed={config.seed}"]
                script = Path(__file__).with_name("contender.py")
                output = subprocess.check_output([sys.executable, str(script), *arguments], text=True)
                rows.append(json.loads(output.strip().splitlines()[-1]))
                print(rows[-1], flush=True)
    rates = {name: matmul_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    table = []
    for name in config.workloads:
        flops = least_flops(name, config.steps, config.seed)
        for contender, precision in CONTENDERS:
            runs = [r for r in rows if (r["workload"], r["contender"], r["precision"]) == (name, contender, precision)]
            speeds = [r["pairs"] / (r["training_seconds"] + r["reference_seconds"]) for r in runs]
            without = [r["pairs"] / r["training_seconds"] for r in runs]
            rate = statistics.median(speeds)
            table.append(
                {
                    "workload": name,
                    "contender": contender,
                    "precision": precision,
                    "pairs_per_second": rate,
                    "spread": [min(speeds), max(speeds)],
                    "pairs_per_second_without_reference": statistics.median(without),
                    "completion_tokens_per_second": rate * runs[0]["completion_tokens"] / runs[0]["pairs"],
                    "peak_memory_mb": statistics.median(r["peak_memory_mb"] for r in runs),
                    "share_of_limit": flops / runs[0]["pairs"] * rate / rates[precision],
                    "loss": runs[0]["loss"],
                }
            )
        losses = {r["contender"]: r["loss"] for r in rows if r["workload"] == name and r["precision"] == "float32"}
        if max(losses.values()) - min(losses.values()) > 1e-4:
            raise SystemExit(f"the contenders do not compute the same loss on {name}: {losses}")
    write_json(RESULTS, {"provenance": provenance(), "matmul_flops_per_second": rates, "table": table, "runs": rows})
    for row in table:
        print(
            f"{row['workload']:<9} {row['contender']:<12} {row['precision']:<9} {row['pairs_per_second']:8.2f} pairs/s "
            f"{row['peak_memory_mb']:8,.0f} MB  {row['share_of_limit']:5.0%} of the limit"
        )


if __name__ == "__main__":
    main(tyro.cli(SpeedConfig))
