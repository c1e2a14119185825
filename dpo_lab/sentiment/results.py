"""The paper's contenders, and what a finished sweep of them found (Section 6.1 and Figure 2 of Rafailov et al. 2023)."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpo_lab.assets import ASSETS
from dpo_lab.engine.arguments import checked, integer, number, one_of
from dpo_lab.theory.frontier import OptimalFrontier

BETAS, TARGETS, ALPHAS, SEEDS = (
    (0.05, 0.1, 1.0, 5.0),
    (3.0, 6.0, 9.0, 12.0),
    (0.05, 0.1, 0.5, 1.0),
    (0, 1, 2, 3, 4, 5),
)

Method = Literal["dpo", "ppo", "ppo-gt", "unlikelihood", "preferred-ft", "best-of-n", "sft"]

LABELS: dict[Method, tuple[str, str]] = {  # and what is varied of it
    "dpo": ("DPO", "beta"),
    "ppo": ("PPO, learned reward", "target KL"),
    "ppo-gt": ("PPO, true reward", "target KL"),
    "unlikelihood": ("unlikelihood", "alpha"),
    "preferred-ft": ("Preferred-FT", "seed"),
    "best-of-n": ("best of N", "N"),
    "sft": ("SFT", ""),
}

Repeated = Literal["dpo", "ppo", "ppo-gt", "unlikelihood", "preferred-ft"]

REPEAT_SETTINGS: dict[Repeated, float] = {  # settings that end within 5 nats
    "dpo": 0.37,
    "ppo": 4.8,
    "ppo-gt": 5.1,
    "unlikelihood": 0.5,
    "preferred-ft": 0.0,
}

REPEATS = [ASSETS / name for name in ("repeats", "repeats-ppo-gt", "repeats-likelihood")]  # shipped

COLUMNS = (
    "method",
    "setting",
    "seed",
    "step",
    "reward",
    "reward_se",
    "kl",
    "kl_se",
    "seconds",
    "tokens",
)


@dataclass(frozen=True)
class Run:
    """One run: a method, what is varied of it, and a seed."""

    method: Method
    setting: float
    seed: int

    def __post_init__(self) -> None:
        plain = {"setting": number("setting", self.setting), "seed": integer("seed", self.seed)}
        for name, value in {"method": one_of("method", self.method, Method), **plain}.items():
            object.__setattr__(self, name, value)

    @property
    def label(self) -> str:
        """What a reader calls it."""
        name, what = LABELS[self.method]
        if self.method == "best-of-n":
            return f"{name} = {self.setting:g}"
        return (
            f"{name}, {what} {self.seed if self.method == 'preferred-ft' else format(self.setting, 'g')}"
            if what
            else name
        )

    @property
    def name(self) -> str:
        """What its directory is called."""
        short = format(self.setting, "g")
        return f"{self.method}-{short if float(short) == self.setting else repr(self.setting)}-seed{self.seed}"


def paper_runs(seed: int = 0) -> list[Run]:
    """The paper's 22 runs: beta of DPO, target KL of PPO and PPO-GT, alpha of unlikelihood, seeds of Preferred-FT."""
    grid = {"dpo": BETAS, "ppo": TARGETS, "ppo-gt": TARGETS, "unlikelihood": ALPHAS}
    runs = [Run(method, setting, seed) for method, settings in grid.items() for setting in settings]
    return runs + [Run("preferred-ft", 0.0, seed + i) for i in SEEDS]


@checked
def repeats(*methods: Repeated) -> list[Run]:
    """The setting of `REPEATED` of each of these methods in three seeds."""
    return [Run(method, REPEAT_SETTINGS[method], seed) for seed in range(3) for method in methods]


@dataclass(frozen=True)
class SweepResults:
    """A finished sweep."""

    rows: list[dict[str, Any]]
    """the evaluations, as in `frontier.csv`, in the order of training"""
    optimal: OptimalFrontier
    """estimated from the reference's samples"""
    band: np.ndarray
    """(3, A): KLs in nats, and the lower and upper end of the optimal reward's 90 % band there"""
    samples: dict[str, list[tuple[str, float]]]
    """of each run, by its name, the first texts of its last policy and their rewards"""
    scores: dict[str, list[float]]
    """of each PPO run, the mean of every rollout: the reward that it was given, in standard deviations on the reference"""
    peak_memory_mb: dict[str, int]
    """of each run's process"""
    provenance: dict[str, str]
    seconds: int | None
    """wall clock of the sweep, data and reward model included; None where more than one call of `dpo-lab frontier` made it"""

    @property
    def before(self) -> float:
        """Mean reward of the reference."""
        return next(row["reward"] for row in self.rows if row["method"] == "sft")

    def runs(self) -> dict[Run, list[dict[str, Any]]]:
        """The evaluations of every run."""
        found: dict[Run, list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault(Run(row["method"], row["setting"], row["seed"]), []).append(row)
        return found

    def by_method(self) -> dict[str, list[dict[str, Any]]]:
        """The evaluations of every method, by what a reader calls it."""
        found = {
            label: [row for row in self.rows if row["method"] == method]
            for method, (label, _) in LABELS.items()
        }
        return {label: rows for label, rows in found.items() if rows}

    def summary(self, at_most: float = 5.0) -> list[dict[str, Any]]:
        """Of each method the evaluation with the highest reward within `at_most` nats, with its run's label and the share of
        the optimal gain."""
        found: dict[str, dict[str, Any]] = {}
        for run, rows in self.runs().items():
            for row in rows:
                if (
                    row["kl"] <= at_most
                    and row["reward"] > found.get(run.method, {"reward": -np.inf})["reward"]
                ):
                    found[run.method] = {**row, "label": run.label, "share": self.share(row)}
        return list(found.values())

    def spread(self) -> list[dict[str, Any]]:
        """Of each method and setting that ran with more than one seed: its name, the number of seeds and, of its last evaluations,
        mean and standard deviation of the reward, mean KL, `share_bounds` at the means, the least gain over the reference, and
        the largest peak memory of a run's process in MB."""
        groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for run, rows in self.runs().items():
            memory = self.peak_memory_mb.get(run.name)
            groups.setdefault((run.method, run.setting), []).append(
                {**rows[-1], "peak_memory_mb": memory}
            )
        found = []
        for (method, setting), rows in groups.items():
            if len(rows) > 1:
                rewards = [row["reward"] for row in rows]
                reward, kl = float(np.mean(rewards)), float(np.mean([row["kl"] for row in rows]))
                label, what = LABELS[method]
                name = label if what == "seed" else f"{label}, {what} {setting:g}"
                line = {"name": name, "seeds": len(rows), "reward": reward, "kl": kl}
                line |= {
                    "reward_sd": float(np.std(rewards, ddof=1)),
                    "share": self.share_bounds(reward, kl),
                }
                memory = max(row["peak_memory_mb"] for row in rows)
                found.append(
                    line | {"least_gain": min(rewards) - self.before, "peak_memory_mb": memory}
                )
        return found

    def share_bounds(self, reward: float, kl: float) -> tuple[float, float]:
        """Between which shares of the optimal gain a policy lies. Past the estimate's end the optimum is at least what it was
        there, and at most `OptimalFrontier.most_at`, or 1, the highest reward there is."""
        lowest = float(self.optimal.reward_at(min(kl, self.optimal.kl[self.optimal.valid].max())))
        return tuple(
            (reward - self.before) / (best - self.before)
            for best in (min(self.optimal.most_at(kl), 1.0), lowest)
        )

    def share(self, row: Mapping[str, Any]) -> float:
        """The share of the optimal gain that an evaluation reaches at its KL; NaN below 0.1 nats and past the estimate."""
        return (
            float(self.optimal.share(row["reward"], row["kl"], self.before))
            if row["kl"] >= 0.1
            else float("nan")
        )


@checked
def load_sweep(folder: Path | str | None = None) -> SweepResults:
    """The sweep that `dpo-lab frontier` left in `folder`; by default the one that comes with the package."""
    folder = ASSETS if folder is None else folder
    for name in ("frontier.csv", "frontier.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder / name} is not there; give the directory of a finished `dpo-lab frontier`"
            )
    with open(folder / "frontier.csv", newline="", encoding="utf-8") as file:
        rows = [
            {k: v if k == "method" else float(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]
    for row in rows:
        row |= {name: int(row[name]) for name in ("seed", "step", "tokens")}
    found = json.loads((folder / "frontier.json").read_text(encoding="utf-8"))
    optimal = found["optimal"]
    return SweepResults(
        rows,
        OptimalFrontier(*(np.array(optimal[name]) for name in OptimalFrontier._fields)),
        np.array([optimal[name] for name in ("at", "low", "high")], dtype=np.float64),
        {
            name: [(text, reward) for text, reward in run["samples"]]
            for name, run in found["runs"].items()
        },
        {name: run["scores"] for name, run in found["runs"].items() if run["scores"]},
        {name: run["peak_memory_mb"] for name, run in found["runs"].items()},
        {name: found[name] for name in ("commit", "command", "machine", "versions")},
        found.get("seconds"),
    )
