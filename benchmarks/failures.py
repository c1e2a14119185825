"""Curves of small runs with each of the faults of `dpo_lab.health`, three seeds each.

    python benchmarks/failures.py

Plants every fault by its real cause (dpo_lab/health/faults.py), and makes healthy runs of both
kinds. Writes dpo_lab/assets/failures.json, whose curves notebook 08 draws behind its own. A run
whose curves are in `--out` is not repeated. About eight minutes of one core.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro

from dpo_lab.engine.runs import atomic_write, provenance, write_json
from dpo_lab.health.catalog import FAULTS
from dpo_lab.health.faults import plant
from dpo_lab.health.gallery import RECORDED, read_curves
from dpo_lab.health.run_size import GALLERY, RunSize
from dpo_lab.health.small_runs import healthy

SEEDS = (0, 1, 2)

HEALTHY = {"healthy": "prefix", "healthy sentence": "sentence"}
"""What is made without a fault, and its kind of completions."""


def main(
    out: Path = Path("runs/failures"),
    results: Path = RECORDED,
    seeds: tuple[int, ...] = SEEDS,
    size: RunSize = GALLERY,
) -> None:
    """Make what is not there yet, seed by seed; write what is there after every run."""
    origin, rows = provenance(), []
    for seed in seeds:
        for name in (*HEALTHY, *FAULTS):
            kept = out / f"{name}-seed{seed}.json"
            if not kept.exists():
                write_json(kept, recorded(name, seed, size, out / "now"))
            rows.append(json.loads(kept.read_text(encoding="utf-8")))
            found = {**origin, "size": asdict(size), "runs": rows}
            with atomic_write(results) as temporary:
                text = json.dumps(found, separators=(",", ":")) + "\n"
                temporary.write_text(text, encoding="utf-8")


def recorded(name: str, seed: int, size: RunSize, folder: Path) -> dict[str, Any]:
    """Make a run in `folder`, read its curves, and delete it."""
    shutil.rmtree(folder, ignore_errors=True)
    if name in HEALTHY:
        healthy(folder, seed=seed, size=size, kind=HEALTHY[name])
    else:
        plant(name, folder, seed=seed, size=size)
    curves = {
        metric: [[int(step), float(f"{value:.4g}")] for step, value in points]
        for metric, points in read_curves(folder).items()
    }
    shutil.rmtree(folder)
    kind = HEALTHY.get(name, "")
    return {"planted": name.split()[0], "kind": kind, "seed": seed, "curves": curves}


if __name__ == "__main__":
    tyro.cli(main)
