"""What the full run, `dpo-lab train`, gives and costs from cold, for three seeds.

    python benchmarks/main_job.py
    python benchmarks/main_job.py --instructions avx2

Every run starts with an empty cache, in its own process. With `avx2` torch, oneDNN and MKL use no
wider instructions than those of processors without AVX-512, where float32 is the faster precision.
Writes benchmarks/results/main_job.json and the figure of the first seed to docs/reward_kl.png, or
main_job-avx2.json alone.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from dpo_lab.engine.runs import atomic_write, provenance, write_json

ROOT = Path(__file__).parent.parent

# what holds the libraries to instructions that are not the processor's newest
CONFINED = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


@dataclass(frozen=True)
class MainJobConfig:
    """Which runs."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """a run for each"""
    instructions: Literal["native", "avx2"] = "native"
    """the widest that the libraries may use"""


def main(config: MainJobConfig) -> None:
    rows, origin = [], provenance()  # before the results file changes
    for seed in config.seeds:
        with tempfile.TemporaryDirectory() as directory:
            cold = {
                **os.environ,
                **CONFINED[config.instructions],
                "DPO_LAB_CACHE": f"{directory}/cache",
                "HF_HOME": f"{directory}/hf",
            }
            run = Path(directory) / "run"
            began = time.perf_counter()
            command = [sys.executable, "-m", "dpo_lab.cli", "train"]
            subprocess.run([*command, f"--seed={seed}", f"--out={run}"], env=cold, check=True)
            seconds = time.perf_counter() - began
            summary = json.loads((run / "summary.json").read_text())
            rows.append({"seed": seed, "process_seconds": round(seconds, 1), **summary})
            if seed == config.seeds[0] and config.instructions == "native":
                with atomic_write(ROOT / "docs" / "reward_kl.png") as temporary:
                    shutil.copy(run / "figures" / "reward_kl.png", temporary)
        save(rows, origin, config)


def save(rows: list[dict], origin: dict, config: MainJobConfig) -> None:
    """Write what there is so far, and print its mean."""
    mean = {
        "reward_before": float(np.mean([row["before"]["reward"] for row in rows])),
        "reward_after": float(np.mean([row["after"]["reward"] for row in rows])),
        "kl_after": float(np.mean([row["after"]["kl"] for row in rows])),
        "process_seconds": max(row["process_seconds"] for row in rows),
        "peak_memory_mb": max(row["peak_memory_mb"] for row in rows),
    }
    name = "main_job" if config.instructions == "native" else f"main_job-{config.instructions}"
    results = {"provenance": origin, "mean": mean, "rows": rows}
    write_json(ROOT / "benchmarks" / "results" / f"{name}.json", results)
    print(json.dumps(mean, indent=2))


if __name__ == "__main__":
    main(tyro.cli(MainJobConfig))
