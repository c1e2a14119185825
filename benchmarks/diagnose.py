"""What `diagnose` says of planted faults and of healthy runs: the confusion matrix.

    python benchmarks/diagnose.py

Each fault is planted by its real cause in a small run (dpo_lab/health/faults.py), two runs of other
seeds and sizes for each, and 24 healthy runs differ in size, beta, learning rate, number of passes
and seed; four of those, and two with a fault, are trained by TRL's DPOTrainer. The thresholds of
the rules were fixed on runs of seeds 100 and above; the runs that are reported have seeds below.
Writes dpo_lab/assets/diagnose.json, which notebook 08 and docs/failures.md show. Runs whose verdict
is in `--out` are not repeated. It needs TRL (`pip install trl`) for its runs.
About 15 minutes of one core.
"""

import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from json import loads
from pathlib import Path
from typing import Any, Literal

import tyro

from dpo_lab.assets import ASSETS
from dpo_lab.engine.runs import provenance, write_json
from dpo_lab.health.catalog import FAULTS
from dpo_lab.health.diagnosis import diagnose
from dpo_lab.health.faults import plant
from dpo_lab.health.run_size import GALLERY, RunSize
from dpo_lab.health.small_runs import healthy, small_task

RESULTS = ASSETS / "diagnose.json"

SIZES = {
    "a": GALLERY,
    "b": RunSize(prefixes=32, max_new_tokens=20, eval_prefixes=48, held_out=16, batch_pairs=16),
    "c": RunSize(prefixes=48, max_new_tokens=12, eval_prefixes=32, held_out=16, batch_pairs=36),
    "d": RunSize(prefixes=48, max_new_tokens=24, eval_prefixes=96, held_out=16, batch_pairs=24),
}
"""Names of the sizes of runs."""

# faults that need more training, or more samples, before they are there
LARGER = ("chosen_logps_fall", "reward_hacking")


@dataclass(frozen=True)
class Planned:
    """A run that is made and diagnosed."""

    planted: str
    """a fault, or "healthy" """
    seed: int
    """of prompts, samples and order; below 100"""
    size: str
    """a name in SIZES"""
    source: Literal["dpo-lab", "trl"] = "dpo-lab"
    """who trains"""
    settings: dict[str, Any] = field(default_factory=dict)
    """of a healthy run, and of TRL's"""

    @property
    def name(self) -> str:
        """Of its directory."""
        changed = "".join(f"-{name}-{value}" for name, value in self.settings.items())
        return f"{self.planted}-{self.source}-{self.size}-seed{self.seed}{changed}"


def planned(first_seed: int = 0) -> list[Planned]:
    """All runs, in an order in which any beginning of the list has runs of each kind."""
    found = []
    for seed, size in ((0, "a"), (1, "b")):
        for fault in FAULTS:
            found.append(Planned(fault, seed, "d" if fault in LARGER else size))

    # thresholds of these were changed after the first two seeds had been looked at
    again = ("overtraining", "chosen_logps_fall")
    found = [replace(r, seed=r.seed + 2) if r.planted in again else r for r in found]

    # healthy ones
    others = []
    for i, (beta, epochs) in enumerate(
        [(0.1, 1), (0.3, 2), (0.05, 1), (1.0, 2), (0.1, 2), (0.2, 1), (0.5, 2), (0.1, 3), (2.0, 2)]
    ):
        for k, kind in enumerate(("prefix", "sentence")):
            settings = {"beta": beta, "epochs": epochs, "kind": kind}
            if i % 3 == 2:
                settings["learning_rate"] = 2e-5
            # of three passes, one run had an alarm of a rule that was changed then
            seed = (84 if epochs == 3 else 20 + 2 * i) + k
            others.append(Planned("healthy", seed, "abc"[(i + k) % 3], settings=settings))
    others += [Planned("healthy", 60 + i, size) for i, size in enumerate("ab")]
    for i, beta in enumerate((0.05, 0.1, 0.3, 1.0)):
        others.append(Planned("healthy", 70 + i, "abca"[i], "trl", {"beta": beta}))
    others.append(Planned("loss_stuck_tiny_beta", 80, "a", "trl", {"beta": 1e-6}))
    others.append(
        Planned("learning_rate_too_high", 81, "b", "trl", {"beta": 0.1, "learning_rate": 2e-3})
    )

    # mixed, two faults to one other
    mixed = []
    while found or others:
        mixed += found[:2] + others[:1]
        found, others = found[2:], others[1:]
    return [replace(run, seed=run.seed + first_seed) for run in mixed]


def main(
    out: Path = Path("runs/diagnose"),
    results: Path = RESULTS,
    minutes: float = 600.0,
    first_seed: int = 0,
) -> None:
    """Make and diagnose what is not there yet, for at most some minutes; write the table.

    Args:
        out: where the verdicts are kept.
        results: the table.
        minutes: after these no further run is begun.
        first_seed: is added to the seeds; 100 makes the runs that thresholds are fixed on.
    """
    origin, began, rows = provenance(), time.perf_counter(), []
    for run in planned(first_seed):
        kept = out / f"{run.name}.json"
        if not kept.exists():
            if time.perf_counter() - began > 60 * minutes:
                continue
            write_json(kept, judged(run, out / "now"))
        rows.append(loads(kept.read_text(encoding="utf-8")))
        write_json(results, {**origin, **table(rows)})


def judged(run: Planned, folder: Path) -> dict[str, Any]:
    """Make a run in `folder`, diagnose it, and delete it; a row of the table."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.process_time()
    if run.source == "trl":
        trained_by_trl(run, folder)
    elif run.planted == "healthy":
        healthy(folder, seed=run.seed, size=SIZES[run.size], **run.settings)
    else:
        plant(run.planted, folder, seed=run.seed, size=SIZES[run.size])
    found = diagnose(folder)
    shutil.rmtree(folder)
    row = {**asdict(run), "seconds": round(time.process_time() - began, 1)}
    return row | {
        "found": list(found.faults),
        "findings": [
            {name: getattr(f, name) for name in ("fault", "severity", "evidence")}
            for f in found.findings
        ],
        "not_looked": sorted(found.not_looked),
    }


def trained_by_trl(run: Planned, folder: Path) -> None:
    """A run of TRL's DPOTrainer on the pairs of a small run."""
    from trl import DPOConfig, DPOTrainer

    size = SIZES[run.size]
    task = small_task("prefix", run.seed, size)
    pairs = task.pairs().as_text(task.tokenizer)
    settings = {"learning_rate": 5e-5, "num_train_epochs": 1} | run.settings
    arguments = DPOConfig(
        output_dir=str(folder),
        seed=run.seed,
        per_device_train_batch_size=size.batch_pairs,
        logging_steps=1,
        save_strategy="epoch",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    DPOTrainer(
        task.new_policy(),
        ref_model=task.reference,
        args=arguments,
        train_dataset=pairs.to_trl(task.tokenizer),
        processing_class=task.tokenizer,
    ).train()


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written: the rows, and how many runs of each kind showed which fault."""
    names = [*FAULTS, "healthy"]
    matrix = {}
    for name in names:
        some = [row for row in rows if row["planted"] == name]
        counts = Counter(fault for row in some for fault in row["found"])
        matrix[name] = {"runs": len(some), "found": {f: counts[f] for f in FAULTS if counts[f]}}
    return {
        "sizes": {name: asdict(size) for name, size in SIZES.items()},
        "faults": list(FAULTS),
        "matrix": matrix,
        "runs": rows,
    }


if __name__ == "__main__":
    tyro.cli(main)
