"""Curves of small runs with each fault beside healthy ones: recorded runs, and a run directory's.

The recorded ones (benchmarks/failures.py) come with the package.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_lab.assets import ASSETS
from dpo_lab.engine.arguments import checked
from dpo_lab.engine.runs import read_metrics
from dpo_lab.health.catalog import FAULTS, FaultName

RECORDED = ASSETS / "failures.json"

GROUPS: dict[str, tuple[FaultName, ...]] = {
    "data": (
        "identical_pairs",
        "flipped_labels",
        "swapped_columns",
        "leaked_pairs",
        "truncated_eos",
    ),
    "scoring": (
        "prompt_scored",
        "mean_instead_of_sum",
        "dropout_on",
        "other_precision",
        "wrong_reference",
    ),
    "optimization": (
        "loss_stuck_frozen",
        "bfloat16_weights",
        "learning_rate_too_high",
        "overtraining",
    ),
    "objective": (
        "loss_stuck_tiny_beta",
        "chosen_logps_fall",
        "length_exploitation",
        "reward_hacking",
    ),
}
"""The faults by where they lie: in the pairs, in their log-probs, in the updates, in what is asked
for."""

METRICS = {
    "loss": "loss",
    "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected",
    "rewards/accuracies": "training accuracy",
    "rewards/margins": "margin",
    "logps/chosen": "log-prob of chosen",
    "start": "size of rewards",
    "grad_norm": "gradient norm",
    "eval/reward": "reward of samples",
    "eval/true_reward": "true reward",
    "eval/kl/sequence": "KL (nats)",
    "eval/length": "tokens per sample",
    "eval/truncated": "samples without end",
    "eval/distinct_2": "distinct-2",
    "eval/accuracy": "held-out accuracy",
    "eval/held_out_loss": "held-out loss",
}
"""What is kept of a run's metrics, and what a figure calls each."""

TELLTALES: dict[FaultName, str] = {
    "identical_pairs": "grad_norm",
    "flipped_labels": "rewards/accuracies",
    "swapped_columns": "eval/reward",
    "leaked_pairs": "eval/accuracy",
    "truncated_eos": "eval/truncated",
    "prompt_scored": "logps/chosen",
    "mean_instead_of_sum": "logps/chosen",
    "dropout_on": "start",
    "other_precision": "start",
    "wrong_reference": "start",
    "loss_stuck_frozen": "eval/kl/sequence",
    "bfloat16_weights": "eval/kl/sequence",
    "learning_rate_too_high": "rewards/chosen",
    "overtraining": "eval/held_out_loss",
    "loss_stuck_tiny_beta": "eval/kl/sequence",
    "chosen_logps_fall": "rewards/chosen",
    "length_exploitation": "eval/length",
    "reward_hacking": "eval/true_reward",
}
"""The curve by which one recognizes each fault."""

LOGARITHMIC = ("start", "grad_norm")
"""Curves whose values span many powers of ten."""

LEAST = 1e-8
"""What a logarithmic axis shows in place of 0."""

SENTENCES = ("truncated_eos", "length_exploitation")
"""Faults of runs on sentences, which end; the others are on the beginnings of reviews."""


@dataclass(frozen=True)
class Curves:
    """The curves of one run."""

    planted: str
    """a fault, or "healthy" """
    kind: str
    """of a healthy run, what a completion is: "prefix" or "sentence" """
    seed: int
    """of prompts, samples and order"""
    curves: Mapping[str, np.ndarray]
    """(T, 2) steps and values, by a name of METRICS"""


@checked
def read_curves(run: Path | str) -> dict[str, np.ndarray]:
    """The curves of a run directory, (T, 2) steps and values by name.

    `start` is the mean absolute value of the two implicit rewards, which is 0 at the first step of
    a healthy run.
    """
    lines, found = read_metrics(run), {}
    for name in METRICS:
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            found[name] = np.array(points, dtype=np.float64)
    sides = [np.abs(found[f"rewards/{side}"][:, 1]) for side in ("chosen", "rejected")]
    found["start"] = np.stack([found["rewards/chosen"][:, 0], (sides[0] + sides[1]) / 2], 1)
    return found


@functools.cache
def load_failures() -> tuple[Curves, ...]:
    """Recorded runs with each fault, three seeds each, and healthy ones of both kinds."""
    recorded: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return tuple(
        Curves(
            row["planted"],
            row["kind"],
            row["seed"],
            {name: np.array(points) for name, points in row["curves"].items()},
        )
        for row in recorded["runs"]
    )


def kind_of(fault: str) -> str:
    """Which kind of healthy run a run with this fault is compared with."""
    return "sentence" if fault in SENTENCES else "prefix"


def panel_of(
    metric: str, fault: str, here: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """A panel for `plots.plot_failures`: recorded curves of a metric, and one from `here`.

    Args:
        metric: a name in METRICS.
        fault: one of FAULTS, or "healthy" for healthy runs alone.
        here: the curves of a run, as `read_curves` gives them.

    Raises:
        ValueError: no such metric or fault.
    """
    for name, value, known in (("metric", metric, METRICS), ("fault", fault, [*FAULTS, "healthy"])):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    kind = kind_of(fault)

    def shown(curves: Mapping[str, np.ndarray]) -> np.ndarray:
        least = [-np.inf, LEAST if metric in LOGARITHMIC else -np.inf]
        return np.maximum(curves[metric], least)

    recorded = [run for run in load_failures() if metric in run.curves]
    return {
        "label": METRICS[metric],
        "healthy": [
            shown(run.curves) for run in recorded if (run.planted, run.kind) == ("healthy", kind)
        ],
        "with_fault": [shown(run.curves) for run in recorded if run.planted == fault != "healthy"],
        "here": shown(here) if here and metric in here else None,
        "logarithmic": metric in LOGARITHMIC,
        "line": math.log(2) if metric == "loss" else None,
    }


def panels_of(fault: str, here: Mapping[str, np.ndarray] | None = None) -> list[dict[str, Any]]:
    """The loss of runs with a fault, and the curve by which one recognizes it."""
    return [panel_of(metric, fault, here) for metric in ("loss", TELLTALES[fault])]


def recorded_faults() -> list[FaultName]:
    """The faults that recorded runs show, with healthy ones to compare them with, by group."""
    made = {(run.planted, run.kind) for run in load_failures()}
    return [
        fault
        for group in GROUPS.values()
        for fault in group
        if (fault, "") in made and ("healthy", kind_of(fault)) in made
    ]
