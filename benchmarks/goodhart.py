"""Push DPO against the true reward itself, and ask others what they think of the result.

    python benchmarks/goodhart.py

The true reward of the experiment is a classifier of words. For each beta and seed: DPO on pairs
that it labels; then, on completions of the trained policy, its own verdict, that of a second judge,
which was fitted to other texts through other features, and two measures of fluency. Writes
dpo_lab/assets/goodhart.json, which notebook 05 draws. Runs that are in `--config.out` are kept.
About 25 minutes of one core.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from torch import nn

from dpo_lab.assets import ASSETS
from dpo_lab.engine.runs import open_run, provenance, write_json
from dpo_lab.logprobs import score_completions
from dpo_lab.loop import LoopConfig
from dpo_lab.sentiment.reviews import HELD_OUT_SENTENCES, load_rotten_tomatoes
from dpo_lab.sentiment.task import Task, TaskConfig
from dpo_lab.train import DPOConfig, train_dpo

RESULTS = ASSETS / "goodhart.json"

# reviews that a word must occur in to count as known; texts that are kept of each run
KNOWN_FROM, KEPT_TEXTS = 5, 3


@dataclass(frozen=True)
class GoodhartConfig:
    """How much to push, from which starts."""

    betas: tuple[float, ...] = (0.05, 0.1, 0.3, 1.0, 5.0)
    """of DPO; the paper's, and 0.3 between them"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """each of pairs, training and evaluation of its own"""
    task: TaskConfig = field(
        default_factory=lambda: TaskConfig(prefixes=800, eval_prefixes=256, precision="float32")
    )
    """the data; float32, so that the KL is that of the distribution that was sampled"""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(schedule="constant", eval_every=10_000)
    )
    """of DPO, by AdamW; evaluated before and after"""
    batch_pairs: int = 64
    """pairs per step"""
    out: Path = Path("runs/goodhart")
    """where the pairs and the texts of every evaluation go"""


def main(config: GoodhartConfig, results: Path = RESULTS) -> None:
    origin = provenance()
    recorded = {name: value for name, value in asdict(config).items() if name != "out"}
    decides = {name: value for name, value in recorded.items() if name not in ("betas", "seeds")}
    open_run(config.out, decides, resume=True)

    # train what is not there yet
    for seed in config.seeds:
        task = Task.open(replace(config.task, seed=seed), config.out / f"data-seed{seed}")
        for beta in config.betas:
            path = _path(config, beta, seed)
            if not path.exists():
                write_json(path, push(config, task, beta))

    # ask the others
    judge, accuracy = second_judge()
    known = known_words(task.reviews["train"]["text"])
    rows = [
        {"beta": beta, "seed": seed, **verdict(evaluation, judge, known)}
        for seed in config.seeds
        for beta in config.betas
        for evaluation in _first_and_last(_path(config, beta, seed))
    ]
    found = {"second_judge": {"held_out": HELD_OUT_SENTENCES, "accuracy": accuracy}, "rows": rows}
    write_json(results, {**origin, "config": recorded, **found})


def _path(config: GoodhartConfig, beta: float, seed: int) -> Path:
    """Where the evaluations of a run are kept."""
    return config.out / f"beta{beta:g}-seed{seed}.json"


def _first_and_last(path: Path) -> list[dict[str, Any]]:
    """The evaluations of a run before and after training."""
    first, *_, last = json.loads(path.read_text(encoding="utf-8"))
    return [first, last]


def push(config: GoodhartConfig, task: Task, beta: float) -> list[dict[str, Any]]:
    """Evaluations of a policy that DPO trains with this beta, with their texts."""
    rows: list[dict[str, Any]] = []

    def evaluate(policy: nn.Module, step: int) -> dict[str, float]:
        found = task.evaluate(policy)
        completions = [list(ids) for ids in found.completions]
        owners = range(len(completions))
        logps = score_completions(task.reference, task.held_out, completions, owners)
        row = {
            "step": step,
            **found.summary(),
            "texts": found.texts,
            "completions": task.tokenizer.batch_decode(completions, skip_special_tokens=True),
            "lengths": [len(ids) for ids in completions],
            "reference_logps": logps.tolist(),
        }
        rows.append(row)
        return {"reward": found.reward, "kl": found.kl}

    train_dpo(
        task.new_policy(),
        task.preferences,
        DPOConfig(beta=beta, batch_pairs=config.batch_pairs, loop=config.loop),
        seed=task.asked.seed,
        callback=evaluate,
        progress=f"beta {beta:g}, seed {task.asked.seed}",
    )
    return rows


def second_judge() -> tuple[Pipeline, float]:
    """A classifier of sentences from Rotten Tomatoes by groups of 3 to 5 letters, and its accuracy
    on sentences that it has not seen.
    """
    train, held_out = (
        (part["text"][:], part["label"][:]) for part in load_rotten_tomatoes().values()
    )
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=5, sublinear_tf=True)
    judge = make_pipeline(letters, LogisticRegression(solver="liblinear", random_state=0))
    judge.fit(*train)
    return judge, float(judge.score(*held_out))


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[a-z']+", text.lower())


def known_words(texts: list[str]) -> set[str]:
    """The words that occur in at least `KNOWN_FROM` of the texts."""
    counts = Counter(word for text in texts for word in set(words_of(text)))
    return {word for word, n in counts.items() if n >= KNOWN_FROM}


def verdict(evaluation: dict[str, Any], judge: Pipeline, known: set[str]) -> dict[str, Any]:
    """What an evaluation found, and what the others say to its texts.

    `second` is the second judge's mean P(positive), `reference_logp` the reference's mean log-prob
    of a token in nats, `known` the fraction of words that are known.
    """
    words = [word for text in evaluation["completions"] for word in words_of(text)]
    numbers = ("step", "reward", "reward_se", "kl", "kl_se")
    return {
        **{name: evaluation[name] for name in numbers},
        "second": float(judge.predict_proba(evaluation["texts"])[:, 1].mean()),
        "reference_logp": sum(evaluation["reference_logps"]) / sum(evaluation["lengths"]),
        "known": sum(word in known for word in words) / max(1, len(words)),
        "texts": evaluation["texts"][:KEPT_TEXTS],
    }


if __name__ == "__main__":
    tyro.cli(main)
