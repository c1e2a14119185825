"""How beta, learning rate and adapters of `dpo-lab train` were chosen, on the same preferences.

    python benchmarks/sweep.py --fresh

Every run is `dpo-lab train` in a process of its own, on fewer prefixes, with one setting other than
the defaults. Each beta is run with every seed, the rest with the first. Rows go to
benchmarks/results/sweep.json as they finish; a row that is there already is not run again. About
two minutes per run where bfloat16 is fast.
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

    betas: tuple[float, ...] = (0.33, 0.35, 0.37)
    """values of beta"""
    rates: tuple[float, ...] = (2e-3,)
    """peak learning rates"""
    layers: tuple[int, ...] = (0,)
    """blocks with adapters, from the last one back; 0 for all"""
    prefixes: int = 3_600
    """prefixes of every run"""
    seeds: tuple[int, ...] = (3, 4)
    """seeds, other than those of the results that are reported"""
    fresh: bool = False
    """forget the rows that are there"""
    out: Path = Path("runs/sweep")
    """where the runs and their common preferences go"""


def main(config: SweepConfig) -> None:
    origin = provenance()  # before the results file changes
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() and not config.fresh else []
    default = CONFIGS["laptop"].dpo
    usual = {
        "beta": default.beta,
        "learning_rate": default.loop.learning_rate,
        "lora_layers": default.lora_layers,
        "prefixes": config.prefixes,
    }
    betas = [{"beta": beta, "seed": seed} for seed in config.seeds for beta in config.betas]
    others = [{"learning_rate": rate} for rate in config.rates]
    others += [{"lora_layers": layers} for layers in config.layers]
    others = [change | {"seed": config.seeds[0]} for change in others]
    for change in [*betas, *others]:
        key = usual | change
        if any(key.items() <= row.items() for row in rows):
            continue
        names = [f"{name}-{value:g}" for name, value in key.items()]
        run = config.out / "-".join(names)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in key.items()]
        data = config.out / f"data-seed{key['seed']}"
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
    for row in rows:
        after = row["after"]
        settings = " ".join(f"{name} {row[name]:g}" for name in key)
        print(f"{settings}: reward {after['reward']:.3f}, KL {after['kl']:.2f}")


if __name__ == "__main__":
    main(tyro.cli(SweepConfig))
