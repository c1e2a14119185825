"""A recorded run, for the explorers that walk through one."""

import json
from pathlib import Path

from dpo_lab.engine.runs import append_metrics, write_json


def record_run(run: Path) -> None:
    """Make `run` a run directory with four steps and two snapshots."""
    write_json(run / "config.json", {"dpo": {"beta": 0.5}})
    for step in range(1, 5):
        append_metrics(
            run, {"step": step, "rewards/chosen": 0.5 * step, "rewards/rejected": -1.0 * step}
        )
    snapshots = [
        {
            "step": 0,
            "chosen": [0.0, 0.0],
            "rejected": [0.0, 0.0],
            "texts": ["A <b>film</b>"],
            "rewards": [0.25],
            "reward": 0.5,
            "kl": 0.0,
        },
        {
            "step": 4,
            "chosen": [4.0, -3.0],
            "rejected": [-6.0, -1.0],
            "texts": ["A joy & more"],
            "rewards": [0.875],
            "reward": 0.75,
            "kl": 2.5,
        },
    ]
    (run / "snapshots.jsonl").write_text("".join(json.dumps(line) + "\n" for line in snapshots))
