"""How beta and learning rate of `dpo-lab train` were chosen: runs on the same preferences.

    python benchmarks/sweep.py --betas 0.1 0.3 --rates 1e-4 3e-4

Every run is `dpo-lab train` in a process of its own. Rows go to benchmarks/results/sweep.json as
they finish; a row that is there already is not run again.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from dpo_lab.engine.runs import provenance, read_metrics, write_json
from dpo_lab.sentiment.run import CONFIGS

RESULTS = Path(__file__).parent / "results" / "sweep.json"


@dataclass(frozen=True)
class SweepConfig:
    """The grid."""

    betas: tuple[float, ...] = (0.31, 0.33, 0.35)
    """values of beta, at the default learning rate"""
    rates: tuple[float, ...] = (1.5e-4, 6e-4)
    """peak learning rates, at the default beta"""
    seed: int = 0
    """seed of every run"""
    fresh: bool = False
    """forget the rows that are there"""
    out: Path = Path("runs/sweep")
    """where the runs and their common preferences go"""


def main(config: SweepConfig) -> None:
    origin = provenance()  # before the results file changes
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() and not config.fresh else []
    default = CONFIGS["laptop"].dpo
    grid = [(beta, default.loop.learning_rate) for beta in config.betas] + [
        (default.beta, rate) for rate in config.rates
    ]
    for beta, rate in grid:
        key = {"beta": beta, "learning_rate": rate, "seed": config.seed}
        if any(key.items() <= row.items() for row in rows):
            continue
        run = config.out / f"beta{beta}-lr{rate}-seed{config.seed}"
        options = [f"--beta={beta}", f"--learning-rate={rate}", f"--seed={config.seed}"]
        data = config.out / f"data-seed{config.seed}"
        command = [
            sys.executable,
            "-m",
            "dpo_lab.cli",
            "train",
            *options,
            "--out",
            str(run),
            "--data",
            str(data),
        ]
        subprocess.run([*command, *(["--resume"] if run.exists() else [])], check=True)
        summary = json.loads((run / "summary.json").read_text())
        curve = [
            {k.removeprefix("eval/"): line[k] for k in ("step", "eval/reward", "eval/kl/sequence")}
            for line in read_metrics(run)
            if "eval/reward" in line
        ]
        rows.append(
            key
            | {k: summary[k] for k in ("before", "after", "steps", "pairs", "seconds")}
            | {"curve": curve}
        )
        write_json(RESULTS, {"provenance": origin, "rows": rows})
    print(f"{'beta':>6} {'rate':>8} {'reward':>7} {'KL':>6} {'seconds':>8}")
    for row in sorted(rows, key=lambda row: -row["after"]["reward"]):
        after = row["after"]
        print(
            f"{row['beta']:>6} {row['learning_rate']:>8} {after['reward']:>7.3f} "
            f"{after['kl']:>6.2f} {row['seconds']:>8.0f}"
        )


if __name__ == "__main__":
    main(tyro.cli(SweepConfig))
