"""What a DPO step costs as its parts grow, and what each saving is worth: python benchmarks/cost.py

Every point is measured in its own process (`benchmarks/contender.py`). Writes
benchmarks/results/cost.json and docs/cost.png.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import contender
import tyro
from contender import WORKLOADS
from matplotlib.figure import Figure

from dpo_lab.engine.cpu import onednn_is_exact
from dpo_lab.engine.runs import atomic_write, provenance, write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cost.json"
CURVES: dict[str, dict[float, dict[str, Any]]] = {
    "completion tokens (mean)": {n: {"mean": n, "most": 3 * n} for n in (16, 64, 128)},
    "prompt tokens": {n: {"prompt_tokens": [n, n]} for n in (8, 64, 256)},
    "completions per prompt": {k: {"completions": k, "prompts": 16 // k} for k in (2, 4, 16)},
    "vocabulary (thousands)": {n: {"vocabulary": 1_000 * n} for n in (8, 32, 64)},
    "prompts per step": {n: {"prompts": n} for n in (2, 8, 16)},
    "parameters of the blocks (M)": {
        round(12 * layers * width**2 / 1e6): {"layers": layers, "width": width}
        for layers, width in ((4, 256), (6, 512), (12, 768))
    },
}
# of every measurement but the curve over the size; with GPT-2's vocabulary
MEDIUM = {"layers": 6, "width": 512}
SAVINGS = ("sharing", "packing", "stored logits", "fused gelu", "oneDNN", "kept memory")


@dataclass(frozen=True)
class CostConfig:
    """How long to measure."""

    steps: int = 1
    """timed optimizer steps per point"""


@cache
def run(workload: str, change: str, without: tuple[str, ...]) -> dict[str, Any]:
    """What `benchmarks/contender.py` prints of dpo_lab in float32; equal points are one run."""
    arguments = [
        f"--workload={workload}",
        f"--change={change}",
        *(["--without", *without] if without else []),
    ]
    result = contender.measure(*arguments)
    print(result, flush=True)
    return result


def measure(
    workload: str, steps: int, change: dict[str, Any], without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """One run, in `steps`."""
    whole = asdict(replace(WORKLOADS[workload], steps=steps, **(MEDIUM | change)))
    return run(workload, json.dumps(whole), without)


def plot(curves: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """A panel for each curve: seconds per step, and peak memory on the right axis."""
    figure = Figure(figsize=(11, 6.4), dpi=120, layout="constrained")
    for axes, (name, points) in zip(figure.subplots(2, 3).flat, curves.items()):
        x = [float(value) for value in points]
        memory = axes.twinx()
        seconds = [p["training_seconds"] / p["steps"] for p in points.values()]
        gigabytes = [p["peak_memory_mb"] / 1e3 for p in points.values()]
        axes.plot(x, seconds, "o-", color="#2c5f9e")
        memory.plot(x, gigabytes, "s--", color="#c0392b")
        axes.set(
            xlabel=name.replace(" a ", " per "),
            xlim=(0, 1.08 * max(x)),
            ylim=(0, 1.15 * max(seconds)),
        )
        memory.set_ylim(0, 1.4 * max(gigabytes))  # apart from the other curve
        axes.set_ylabel("seconds per step (solid)", color="#2c5f9e")
        memory.set_ylabel("peak memory, GB (dashed)", color="#c0392b")
        axes.spines["top"].set_visible(False)
        memory.spines["top"].set_visible(False)
    return figure


def main(config: CostConfig) -> None:
    curves = {
        name: {str(x): measure("short", config.steps, change) for x, change in points.items()}
        for name, points in CURVES.items()
    }
    # oneDNN is not exact on every processor
    savings = tuple(name for name in SAVINGS if name != "oneDNN" or onednn_is_exact())
    saved = {
        workload: {
            "all": measure(workload, config.steps, {}),
            **{name: measure(workload, config.steps, {}, (name,)) for name in savings},
            "none": measure(workload, config.steps, {}, savings),
        }
        for workload in ("paper", "long")
    }
    write_json(RESULTS, {"provenance": provenance(), "curves": curves, "savings": saved})
    with atomic_write(ROOT / "docs" / "cost.png") as temporary:
        plot(curves).savefig(temporary, format="png")


if __name__ == "__main__":
    main(tyro.cli(CostConfig))
