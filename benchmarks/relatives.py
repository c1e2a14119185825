"""DPO and its relatives on the same sentiment task: reward and KL along training.

    python benchmarks/relatives.py

Each method is tuned first: its own knob and the learning rate, four settings, one seed. The setting
with the highest reward at `kl` nats is then trained on three other seeds, each with pairs of its
own, and evaluated at several steps on the held-out prefixes of the shipped optimal frontier. Writes
dpo_lab/assets/relatives.json, which notebook 05c draws. Runs that are in `--config.out` are kept;
`--config.methods` does some of them. About 30 minutes of one core.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from torch import nn

from dpo_lab.assets import ASSETS
from dpo_lab.engine.runs import open_run, provenance, write_json
from dpo_lab.evaluate import evaluate_policy
from dpo_lab.loop import LoopConfig
from dpo_lab.sentiment.results import reward_at
from dpo_lab.sentiment.task import Task, TaskConfig
from dpo_lab.theory.frontier import frontier_band, optimal_frontier
from dpo_lab.train import DPOConfig, train_dpo
from dpo_lab.variants.feedback import BinaryFeedback
from dpo_lab.variants.kto import KTOConfig, train_kto
from dpo_lab.variants.relatives import AOT, CPO, ORPO, SimPO

RESULTS = ASSETS / "relatives.json"

# by method: its own knob, and the two values that are tried
KNOBS: dict[str, tuple[str, tuple[float, float]]] = {
    "DPO": ("beta", (0.1, 0.3)),
    "IPO": ("beta", (0.03, 0.1)),
    "EXO": ("beta", (0.1, 0.3)),
    "AOT": ("beta", (0.1, 0.3)),
    "KTO": ("beta", (0.1, 0.3)),
    "CPO": ("alpha", (0.1, 1.0)),
    "SimPO": ("beta", (2.0, 10.0)),
    "ORPO": ("weight", (1.0, 10.0)),
}

# of EXO, the paper's; of SimPO, as in its paper's figures; of CPO, TRL's
SMOOTHING, GAMMA_RATIO, CPO_BETA = 1e-3, 0.5, 0.1

# strengths of the KL constraint at which the optimum is estimated
BETAS = np.geomspace(10, 0.01, 60)


@dataclass(frozen=True)
class RelativesConfig:
    """What is trained, on what, and how it is tuned."""

    methods: tuple[str, ...] = tuple(KNOBS)
    """which of them to train now; the results hold all that are finished"""
    rates: tuple[float, ...] = (6e-5, 1.2e-4)
    """learning rates that are tried with each value of the knob"""
    tuning_seed: int = 0
    """of pairs and training; no seed of the results"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """of the results, each of pairs, training and sampling of its own"""
    task: TaskConfig = field(
        default_factory=lambda: TaskConfig(
            prefixes=256, eval_prefixes=128, max_new_tokens=24, precision="float32"
        )
    )
    """the data; all seeds are evaluated on the held-out prefixes of its own seed"""
    samples: int = 48
    """of the reference per held-out prefix, for the optimal frontier"""
    tuning_prefixes: int = 64
    """of the held-out ones, while tuning"""
    batch_pairs: int = 64
    """pairs per step; as many completions as these have are a step of KTO"""
    steps: tuple[int, ...] = (4, 8, 12, 16, 20, 24)
    """after which a policy is evaluated"""
    kl: float = 2.0
    """nats, at which rewards are compared"""
    enough: float = 4.0
    """nats, past which a run ends; while tuning, it ends at `kl`"""
    out: Path = Path("runs/relatives")
    """where pairs and runs go"""


@dataclass(frozen=True)
class Setting:
    """One setting of a method."""

    method: str
    knob: float
    learning_rate: float

    def name(self, seed: int) -> str:
        """What its file is called."""
        return f"{self.method}-{self.knob:g}-{self.learning_rate:g}-seed{seed}"


def main(config: RelativesConfig, results: Path = RESULTS) -> None:
    origin = provenance()
    recorded = {name: value for name, value in asdict(config).items() if name != "out"}
    decides = {name: value for name, value in recorded.items() if name not in ("methods", "seeds")}
    open_run(config.out, decides, resume=True)

    # tune, then train the best setting of each method
    for method in config.methods:
        for setting in grid(config, method):
            finish(config, setting, config.tuning_seed)
    for seed in config.seeds:
        for method in config.methods:
            finish(config, best(config, method), seed)

    # all that is finished
    if not (config.out / "optimal.json").exists():
        write_json(config.out / "optimal.json", optimal(config))
    done = [method for method in KNOBS if finished(config, method)]
    found = {
        "tuning": [row for method in done for row in tuning_rows(config, method)],
        "rows": [row for method in done for row in final_rows(config, method)],
        "reference": [reference_row(config, seed) for seed in config.seeds],
        "optimal": json.loads((config.out / "optimal.json").read_text(encoding="utf-8")),
    }
    written = {**recorded, "methods": done}
    write_json(results, {**origin, "config": written, **found})


def optimal(config: RelativesConfig) -> dict[str, Any]:
    """The optimal frontier on the held-out prefixes, and its 90% band."""
    task = seeded(config, config.task.seed).task
    scores, _ = task.score_reference(task.held_out, config.samples)
    at = np.linspace(0, np.log(config.samples), 40)
    found = optimal_frontier(scores, BETAS)
    low, high = (np.where(np.isfinite(end), end, None) for end in frontier_band(scores, BETAS, at))
    arrays = {**found._asdict(), "at": at, "low": low, "high": high}
    return {name: array.tolist() for name, array in arrays.items()}


def grid(config: RelativesConfig, method: str) -> list[Setting]:
    """The settings that are tried."""
    _, knobs = KNOBS[method]
    return [Setting(method, knob, rate) for knob in knobs for rate in config.rates]


def best(config: RelativesConfig, method: str) -> Setting:
    """The setting with the highest reward at `config.kl`, on the tuning seed."""

    def score(setting: Setting) -> float:
        return reward_at(curve(config, setting, config.tuning_seed), config.kl)

    return max(grid(config, method), key=score)


def finished(config: RelativesConfig, method: str) -> bool:
    """Whether all runs of a method are there."""
    tuned = all(path(config, one, config.tuning_seed).exists() for one in grid(config, method))
    return tuned and all(path(config, best(config, method), seed).exists() for seed in config.seeds)


def path(config: RelativesConfig, setting: Setting, seed: int) -> Path:
    """Where a run is kept."""
    return config.out / f"{setting.name(seed)}.json"


def read(config: RelativesConfig, setting: Setting, seed: int) -> dict[str, Any]:
    """A finished run."""
    return json.loads(path(config, setting, seed).read_text(encoding="utf-8"))


def tuning_rows(config: RelativesConfig, method: str) -> Iterator[dict[str, Any]]:
    """For each setting that was tried the reward at `config.kl`, and whether it is the best."""
    for setting in grid(config, method):
        evaluations = curve(config, setting, config.tuning_seed)
        yield {
            **asdict(setting),
            "knob_name": KNOBS[method][0],
            "reward_at_kl": reward_at(evaluations, config.kl),
            "most_kl": max(row["kl"] for row in evaluations),
            "best": setting == best(config, method),
        }


def final_rows(config: RelativesConfig, method: str) -> Iterator[dict[str, Any]]:
    """For each seed the evaluations of the best setting, and the reward at `config.kl`."""
    setting = best(config, method)
    for seed in config.seeds:
        at = reward_at(curve(config, setting, seed), config.kl)
        yield {"seed": seed, "reward_at_kl": at, **read(config, setting, seed)}


def curve(config: RelativesConfig, setting: Setting, seed: int) -> list[dict[str, Any]]:
    """The evaluations of a run, with that of the reference before them."""
    return [reference_row(config, seed), *read(config, setting, seed)["evaluations"]]


def reference_row(config: RelativesConfig, seed: int) -> dict[str, Any]:
    """The evaluation of the reference, with the seed's samples."""
    return json.loads((config.out / f"reference-seed{seed}.json").read_text(encoding="utf-8"))


def finish(config: RelativesConfig, setting: Setting, seed: int) -> None:
    """Train a policy and write its evaluations, unless they are there."""
    if not path(config, setting, seed).exists():
        write_json(path(config, setting, seed), seeded(config, seed).train(setting))


def seeded(config: RelativesConfig, seed: int) -> "Seed":
    """What the methods of one seed share; that of the last seed is kept."""
    key = (config.out, seed)
    if _KEPT.get("key") != key:
        _KEPT.update(key=key, seed=Seed(config, seed))
    return _KEPT["seed"]


_KEPT: dict[str, Any] = {}


class Seed:
    """The pairs of one seed, and the evaluation on prefixes that all seeds share."""

    def __init__(self, config: RelativesConfig, seed: int):
        self.config, self.seed = config, seed
        self.task = Task.open(replace(config.task, seed=seed), config.out / f"data-seed{seed}")
        self.held_out = self.task.held_out
        if seed != config.task.seed:
            home = self.task.variant(config.out / "home", seed=config.task.seed)
            self.held_out = home.held_out
        reference = config.out / f"reference-seed{seed}.json"
        if not reference.exists():
            write_json(reference, self.evaluate(self.task.reference, 0))

    @cached_property
    def feedback(self) -> BinaryFeedback:
        """The pairs taken apart, for KTO."""
        return BinaryFeedback.from_pairs(self.task.preferences).with_reference(self.task.reference)

    def evaluate(self, policy: nn.Module, step: int) -> dict[str, Any]:
        """Reward and KL of a policy, and the mean number of tokens of its completions."""
        tuning, config = self.seed == self.config.tuning_seed, self.config
        prompts = self.held_out[: config.tuning_prefixes if tuning else None]
        found = evaluate_policy(
            policy,
            self.task.reference,
            prompts,
            partial(self.task.rewards, prompts),
            self.task.tokenizer,
            max_new_tokens=self.task.asked.max_new_tokens,
            seed=self.seed,
        )
        tokens = float(np.mean([len(ids) for ids in found.completions]))
        return {"step": step, **found.summary(), "tokens": tokens}

    def train(self, setting: Setting) -> dict[str, Any]:
        """The evaluations of a run, from its first step until it is over or far enough away."""
        evaluations: list[dict[str, Any]] = []
        config = self.config
        enough = config.kl if self.seed == config.tuning_seed else config.enough

        def callback(policy: nn.Module, step: int) -> dict[str, float]:
            if step in config.steps:
                evaluations.append(self.evaluate(policy, step))
                if evaluations[-1]["kl"] > enough:
                    raise Enough
            return {}

        began = time.process_time()
        try:
            self.run(setting, callback)
        except Enough:
            pass
        seconds = round(time.process_time() - began, 1)
        return {**asdict(setting), "evaluations": evaluations, "cpu_seconds": seconds}

    def run(self, setting: Setting, callback: Any) -> None:
        """Train by the method of a setting."""
        loop = LoopConfig(
            learning_rate=setting.learning_rate, schedule="constant", warmup_steps=4, eval_every=1
        )
        policy, pairs = self.task.new_policy(), self.config.batch_pairs
        options = {"seed": self.seed, "callback": callback, "progress": setting.name(self.seed)}
        if setting.method == "KTO":
            kto = KTOConfig(beta=setting.knob, batch_completions=2 * pairs, loop=loop)
            train_kto(policy, self.feedback, kto, **options)
            return
        dpo = DPOConfig(batch_pairs=pairs, loop=loop)
        changes, loss = method(setting)
        train_dpo(policy, self.task.preferences, replace(dpo, **changes), loss=loss, **options)


class Enough(Exception):
    """The policy is as far from the reference as is looked at."""


def method(setting: Setting) -> tuple[dict[str, Any], Any]:
    """What a setting changes in `DPOConfig`, and its loss where that has no name there."""
    knob = setting.knob
    return {
        "DPO": ({"beta": knob}, None),
        "IPO": ({"beta": knob, "loss_type": "ipo"}, None),
        "EXO": ({"beta": knob, "loss_type": "exo_pair", "label_smoothing": SMOOTHING}, None),
        "AOT": ({"beta": knob}, AOT()),
        "CPO": ({"beta": CPO_BETA}, CPO(alpha=knob)),
        "SimPO": ({"beta": knob}, SimPO(GAMMA_RATIO)),
        "ORPO": ({}, ORPO(weight=knob)),
    }[setting.method]


if __name__ == "__main__":
    tyro.cli(main)
