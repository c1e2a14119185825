"""The paper's methods, and what a finished sweep of them found.

Section 6.1 and Figure 2 of Rafailov et al. 2023.
"""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpo_lab.assets import ASSETS
from dpo_lab.data.ratings import RatingStore
from dpo_lab.engine.arguments import checked, integer, number, one_of
from dpo_lab.theory.frontier import OptimalFrontier

# the settings of the paper's runs
BETAS = (0.05, 0.1, 1.0, 5.0)
TARGETS = (3.0, 6.0, 9.0, 12.0)
ALPHAS = (0.05, 0.1, 0.5, 1.0)
SEEDS = (0, 1, 2, 3, 4, 5)

Method = Literal["dpo", "ppo", "ppo-gt", "unlikelihood", "preferred-ft", "best-of-n", "sft"]

Repeated = Literal["dpo", "ppo", "ppo-gt", "unlikelihood", "preferred-ft"]

# what a reader calls each method, and what is varied in its runs
LABELS: dict[Method, tuple[str, str]] = {
    "dpo": ("DPO", "beta"),
    "ppo": ("PPO, learned reward", "target KL"),
    "ppo-gt": ("PPO, true reward", "target KL"),
    "unlikelihood": ("unlikelihood", "alpha"),
    "preferred-ft": ("Preferred-FT", "seed"),
    "best-of-n": ("best of N", "N"),
    "sft": ("SFT", ""),
}

# the settings that are repeated in several seeds: they end within 5 nats
REPEAT_SETTINGS: dict[Repeated, float] = {
    "dpo": 0.37,
    "ppo": 4.8,
    "ppo-gt": 5.1,
    "unlikelihood": 0.5,
    "preferred-ft": 0.0,
}

# the repeated runs that come with the package
REPEATS = [ASSETS / name for name in ("repeats", "repeats-ppo-gt", "repeats-likelihood")]

# of `frontier.csv`
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
    """One run: a method, its setting, and a seed."""

    method: Method
    setting: float
    seed: int

    def __post_init__(self) -> None:
        found = {
            "method": one_of("method", self.method, Method),
            "setting": number("setting", self.setting),
            "seed": integer("seed", self.seed),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def label(self) -> str:
        """What a reader calls it."""
        name, what = LABELS[self.method]
        if self.method == "best-of-n":
            return f"{name} = {self.setting:g}"
        if self.method == "preferred-ft":
            return f"{name}, {what} {self.seed}"
        return f"{name}, {what} {self.setting:g}" if what else name

    @property
    def name(self) -> str:
        """What its directory is called."""
        short = format(self.setting, "g")
        setting = short if float(short) == self.setting else repr(self.setting)
        return f"{self.method}-{setting}-seed{self.seed}"


def paper_runs(seed: int = 0) -> list[Run]:
    """As many runs as in the paper, 22, divided among the methods by us.

    The paper gives the grids and the total (Section 6.1): beta for DPO, the target KL for PPO,
    alpha for unlikelihood, seeds for Preferred-FT. How many runs each method had it does not say.
    Here both kinds of PPO have the whole grid, and Preferred-FT has the six runs that remain.
    """
    grid = {"dpo": BETAS, "ppo": TARGETS, "ppo-gt": TARGETS, "unlikelihood": ALPHAS}
    runs = [Run(method, setting, seed) for method, settings in grid.items() for setting in settings]
    return runs + [Run("preferred-ft", 0.0, seed + i) for i in SEEDS]


@checked
def repeats(*methods: Repeated) -> list[Run]:
    """The setting of each of these methods in `REPEAT_SETTINGS`, in three seeds."""
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
    """by the name of the run: the first texts of its last policy, and their rewards"""
    scores: dict[str, list[float]]
    """by the name of a PPO run: mean reward given per rollout, in reference standard deviations"""
    peak_memory_mb: dict[str, int]
    """of each run's process"""
    provenance: dict[str, str]
    """commit, command, machine and versions"""
    seconds: int | None
    """wall clock of the whole sweep; None where it took several calls of `dpo-lab frontier`"""

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
        found: dict[str, list[dict[str, Any]]] = {}
        for method, (label, _) in LABELS.items():
            if rows := [row for row in self.rows if row["method"] == method]:
                found[label] = rows
        return found

    def summary(self, at_most: float = 5.0) -> list[dict[str, Any]]:
        """For each method the evaluation with the highest reward within `at_most` nats.

        With the label of its run, and the fraction of the optimal gain.
        """
        best: dict[str, dict[str, Any]] = {}
        for run, rows in self.runs().items():
            for row in rows:
                highest = best[run.method]["reward"] if run.method in best else -np.inf
                if row["kl"] <= at_most and row["reward"] > highest:
                    best[run.method] = {
                        **row,
                        "label": run.label,
                        "fraction": self.fraction(row),
                    }
        return list(best.values())

    def spread(self) -> list[dict[str, Any]]:
        """For each method and setting with several seeds, its last evaluations in numbers.

        Its name, the number of seeds, mean and standard deviation of the reward, mean KL,
        `fraction_bounds` at the means, the least gain over the reference, and the largest peak
        memory of a run's process in MB.
        """
        # the last evaluations of one method and setting
        groups: dict[tuple[Method, float], list[dict[str, Any]]] = {}
        for run, rows in self.runs().items():
            last = {**rows[-1], "peak_memory_mb": self.peak_memory_mb.get(run.name)}
            groups.setdefault((run.method, run.setting), []).append(last)
        several = {group: rows for group, rows in groups.items() if len(rows) > 1}
        return [
            self._spread_of(method, setting, rows) for (method, setting), rows in several.items()
        ]

    def _spread_of(
        self, method: Method, setting: float, rows: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The line of `spread` for one method and setting."""
        label, what = LABELS[method]
        rewards = [row["reward"] for row in rows]
        reward, kl = float(np.mean(rewards)), float(np.mean([row["kl"] for row in rows]))
        return {
            "name": label if what == "seed" else f"{label}, {what} {setting:g}",
            "seeds": len(rows),
            "reward": reward,
            "kl": kl,
            "reward_sd": float(np.std(rewards, ddof=1)),
            "fraction": self.fraction_bounds(reward, kl),
            "least_gain": min(rewards) - self.before,
            "peak_memory_mb": max(row["peak_memory_mb"] for row in rows),
        }

    def fraction_bounds(self, reward: float, kl: float) -> tuple[float, float]:
        """The lowest and the highest fraction of the optimal gain that a policy may have reached.

        Past the estimate's end the optimum is at least what it was there, and at most
        `OptimalFrontier.most_at`, or 1, the highest reward there is.
        """
        end = self.optimal.kl[self.optimal.valid].max()
        least = float(self.optimal.reward_at(min(kl, end)))
        most = min(self.optimal.most_at(kl), 1.0)
        gain = reward - self.before
        return gain / (most - self.before), gain / (least - self.before)

    def fraction(self, row: Mapping[str, Any]) -> float:
        """The fraction of the optimal gain that an evaluation reaches at its KL.

        NaN below 0.1 nats and past the estimate's end.
        """
        if row["kl"] < 0.1:
            return float("nan")
        return float(self.optimal.share(row["reward"], row["kl"], self.before))


@checked
def load_sweep(folder: Path | str | None = None) -> SweepResults:
    """The sweep that `dpo-lab frontier` left in `folder`, or the one in the package."""
    folder = ASSETS if folder is None else folder
    for name in ("frontier.csv", "frontier.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder / name} is not there; give the directory of a finished `dpo-lab frontier`"
            )
    found = json.loads((folder / "frontier.json").read_text(encoding="utf-8"))
    optimal, runs = found["optimal"], found["runs"]
    return SweepResults(
        _read_rows(folder / "frontier.csv"),
        OptimalFrontier(*(np.array(optimal[name]) for name in OptimalFrontier._fields)),
        np.array([optimal[name] for name in ("at", "low", "high")], dtype=np.float64),
        samples={
            name: [(text, reward) for text, reward in run["samples"]] for name, run in runs.items()
        },
        scores={name: run["scores"] for name, run in runs.items() if run["scores"]},
        peak_memory_mb={name: run["peak_memory_mb"] for name, run in runs.items()},
        provenance={name: found[name] for name in ("commit", "command", "machine", "versions")},
        seconds=found.get("seconds"),
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `frontier.csv`, with numbers as numbers."""
    rows: list[dict[str, Any]] = []
    with open(path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            row = {k: v if k == "method" else float(v) for k, v in line.items()}
            rows.append(row | {name: int(row[name]) for name in ("seed", "step", "tokens")})
    return rows


def load_hacking() -> dict[str, Any]:
    """What PPO made of rewards learned from few pairs (benchmarks/hacking.py), as it comes with the
    package.

    `runs` holds for each reward the evaluations of its policy: the mean score `given`, in standard
    deviations on the reference's completions, and the true `reward` and `kl`.
    """
    return json.loads((ASSETS / "hacking.json").read_text(encoding="utf-8"))


def load_goodhart() -> dict[str, Any]:
    """What DPO made of the true reward, and what others say to it (benchmarks/goodhart.py), as it
    comes with the package.

    `rows` holds two evaluations of each run, at its first and last step: `beta`, `seed`, the
    `reward` of the classifier that labels, P(positive) by a `second` judge, the `kl` in nats, the
    reference's log-prob of a token `reference_logp` in nats, the fraction of `known` words, and the
    first `texts`.
    """
    return json.loads((ASSETS / "goodhart.json").read_text(encoding="utf-8"))


def load_labels() -> dict[str, Any]:
    """What notebook 06 asks its reader to label (benchmarks/labels.py), and what was recorded in
    place of a reader, as they come with the package.

    `items` holds `pairs`, each a prompt with two completions of the embedded model, and `rated`,
    each a prompt with five, all as texts and as token ids. `guidelines` go by number, `recorded` is
    the `RatingStore` of the recorded labels, and `rater` and `note` say whose they are.
    """
    found = json.loads((ASSETS / "labels.json").read_text(encoding="utf-8"))
    return found | {"recorded": RatingStore(ASSETS / "labels.jsonl")}


def load_chat() -> dict[str, Any]:
    """What DPO made of a chat model that summarizes reviews (benchmarks/chat.py), as it comes with
    the package.

    `rows` holds one row per seed: evaluations `before` and `after`, the mean probability of the
    review's label `label_before` and `label_after`, `win_rates` of DPO against the model before, by
    the `reward` and by that probability (`label`), the `metrics` of training, the first `samples`
    (the review i is `load_imdb()["test"]["text"][i]`), and `seconds` by phase. The texts are a
    model's: escape them before they are shown as HTML.
    """
    return json.loads((ASSETS / "chat.json").read_text(encoding="utf-8"))


def load_win_rates() -> dict[str, Any]:
    """Win rates over the sampling temperature (benchmarks/win_rates.py), as they come with the
    package.

    `rows` holds a win rate for each `source` of prompts ("imdb", "rotten_tomatoes"), `method`,
    `temperature` and `judge`: its `rate` with the ends `low` and `high` of a 95% interval over all
    prompts, the rates of the `seeds`, the `length_controlled` rate with its interval, the mean
    number of `characters` of an answer, and the `distinct` fraction of its three-word sequences.
    `differences` holds DPO's rate minus PPO's on the same prompts, `evaluations` reward and KL of
    every policy, and `texts` some answers.
    """
    return json.loads((ASSETS / "win_rates.json").read_text(encoding="utf-8"))


def load_tax() -> dict[str, Any]:
    """The alignment tax of PPO, PPO-ptx and DPO (benchmarks/tax.py), as it comes with the package.

    `before` holds the measures of the model that all runs begin with, and `runs` one entry per run:
    its `method` ("ppo", "dpo" or "dpo-sft"), `seed`, `kl_coefficient` and `ptx_coefficient`
    (PPO-ptx where it is positive), the `seconds` it took, for each rollout of PPO its score, KL and
    loss on text (`rollouts`), and `rows`, one per evaluation. A row holds `step`, `reward`, `kl`
    and their standard errors, the first `texts`, and three groups of measures, `nats_per_byte` by
    kind of text, `accuracy` by probe and `rude` by request (at the end of a run alone), each as
    [value, standard error]; `change` has the differences from `before`, on the same items.
    `sizes` and `hashes` say what was measured on, `config` how everything was trained. The texts
    are a model's: escape them before they are shown as HTML.
    """
    return json.loads((ASSETS / "tax.json").read_text(encoding="utf-8"))
