"""What the full run, `dpo-lab train`, gives and costs from cold, for three seeds.

    python benchmarks/main_job.py [SEED ...]

Every run starts with an empty cache, in its own process. Writes benchmarks/results/main_job.json,
and the figure of the first seed to docs/reward_kl.png.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dpo_lab.engine.runs import atomic_write, provenance, write_json

ROOT = Path(__file__).parent.parent
SEEDS = [int(seed) for seed in sys.argv[1:]] or [0, 1, 2]


def main() -> None:
    rows, origin = [], provenance()  # before the results file changes
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as directory:
            cold = {
                **os.environ,
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
            if seed == SEEDS[0]:
                with atomic_write(ROOT / "docs" / "reward_kl.png") as temporary:
                    shutil.copy(run / "figures" / "reward_kl.png", temporary)
        save(rows, origin)


def save(rows: list[dict], origin: dict) -> None:
    """Write what there is so far, and print its mean."""
    mean = {
        "reward_before": float(np.mean([row["before"]["reward"] for row in rows])),
        "reward_after": float(np.mean([row["after"]["reward"] for row in rows])),
        "kl_after": float(np.mean([row["after"]["kl"] for row in rows])),
        "process_seconds": max(row["process_seconds"] for row in rows),
        "peak_memory_mb": max(row["peak_memory_mb"] for row in rows),
    }
    write_json(
        ROOT / "benchmarks" / "results" / "main_job.json",
        {"provenance": origin, "mean": mean, "rows": rows},
    )
    print(json.dumps(mean, indent=2))


if __name__ == "__main__":
    main()
