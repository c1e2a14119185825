"""What each mistake does: to what its function drives, and to a language model.

    python benchmarks/mistakes.py

Every mistake that the checks name is made in the function of its exercise, and the function drives
what it is for, where the truth is known exactly (`driven.py`, two minutes). Those that reach a
training run train the embedded language model (`trained.py`, 25 minutes). Writes
benchmarks/results/mistakes.json; `--part exact` or `--part model` measures one and keeps the other.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from driven import DRIVES, measured
from trained import TrainingConfig, train_all

from dpo_lab import tune_cpu
from dpo_lab.engine.runs import provenance, write_json

RESULTS = Path(__file__).parent / "results" / "mistakes.json"


@dataclass(frozen=True)
class MistakesConfig:
    """What is measured."""

    part: Literal["both", "exact", "model"] = "both"
    """the exact truths, the language model, or both"""
    training: TrainingConfig = field(default_factory=TrainingConfig)


def main(config: MistakesConfig) -> None:
    """Measure, print a line for each mistake, and write what was found."""
    tune_cpu()
    if config.part != "model":
        _keep("exact", exactly())
    if config.part != "exact":
        _keep("model", with_model(config.training))


def _keep(part: str, found: dict[str, Any]) -> None:
    """Write one part of the results beside the other."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept = {name: results[name] for name in ("exact", "model") if name in results}
    write_json(RESULTS, kept | {part: found})


def exactly() -> dict[str, Any]:
    """What each function drives, and where it ends with each mistake."""
    began, found = provenance(), {}
    for exercise, drive in DRIVES.items():
        rows = measured(exercise)
        found[exercise] = {"what": drive.what, "rows": rows}
        for row in rows:
            print(f"{exercise}: {_line(row['name'], row['numbers'])}", flush=True)
    return {"provenance": began, "exercises": found}


def with_model(config: TrainingConfig) -> dict[str, Any]:
    """What comes of training, by exercise: one row per mistake, with a value per seed."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}

    def record(exercise: str, name: str, seed: int, found: dict[str, Any]) -> None:
        settings = found.pop("settings")
        new = {"name": name, "settings": settings, "seeds": []}
        row = rows.setdefault(exercise, {}).setdefault(str(settings), new)
        row["seeds"].append(seed)
        for key, value in found.items():
            row.setdefault(key, []).append(value)
        print(f"{exercise}, seed {seed}: {_line(name, found)}", flush=True)

    began = provenance()
    train_all(config, record)
    found = {exercise: list(some.values()) for exercise, some in rows.items()}
    return {"provenance": began, "config": asdict(config), "exercises": found}


def _line(name: str, found: dict[str, Any]) -> str:
    numbers = [
        f"{key} {value:.3g}" if isinstance(value, float) and math.isfinite(value) else f"{value}"
        for key, value in found.items()
    ]
    return f"{name:<32} " + ", ".join(numbers)


if __name__ == "__main__":
    main(tyro.cli(MistakesConfig, description=__doc__))
