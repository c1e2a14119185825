"""Win rates over the sampling temperature: SFT, DPO, PPO and best of N against people's own words.

    python benchmarks/win_rates.py

For each seed: DPO and PPO from the same pairs, then answers of every method at each temperature, to
beginnings of IMDb reviews and, out of distribution, of sentences from Rotten Tomatoes. The baseline
is how the review itself went on, truncated at the same length. Two judges decide: the classifier
that labeled the pairs, and a second one, which was fitted to other texts through other features.
A third judge is the classifier with planted errors and biases. Writes
dpo_lab/assets/win_rates.json, which notebook 07 draws. Answers that are in `--config.out` are kept.
About 25 minutes of one core.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from goodhart import second_judge, words_of
from transformers import PreTrainedModel

from dpo_lab.assets import ASSETS
from dpo_lab.engine.runs import open_run, provenance, write_json
from dpo_lab.judges.rates import WinRate, win_rate_difference, win_rates
from dpo_lab.judges.simple import biased_judge, reward_judge
from dpo_lab.judges.verdicts import Judge
from dpo_lab.loop import LoopConfig
from dpo_lab.models import ScalarModel, end_tokens
from dpo_lab.rlhf.ppo import PPOConfig, train_ppo
from dpo_lab.rlhf.reward_model import LearnedReward, RewardModelConfig, train_reward_model
from dpo_lab.sampling import sample_completions
from dpo_lab.sentiment.reviews import (
    HELD_OUT_SENTENCES,
    load_rotten_tomatoes,
    sample_continuations,
)
from dpo_lab.sentiment.task import Task, TaskConfig
from dpo_lab.train import DPOConfig, train_dpo

RESULTS = ASSETS / "win_rates.json"

METHODS = ("sft", "dpo", "ppo", "best-of-n")
SOURCES = ("imdb", "rotten_tomatoes")

# planted into the third judge
BIASES = {"accuracy": 0.75, "position_bias": 0.1, "length_bias": 0.1}

# prompts of the first seed whose answers are kept
KEPT_TEXTS = 3


@dataclass(frozen=True)
class WinRatesConfig:
    """What is trained, and what is asked."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """each of pairs, policies and prompts of its own"""
    temperatures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """of sampling; the paper's, 0 is greedy"""
    prompts: int = 200
    """of each seed and each source of texts"""
    best_of: int = 8
    """answers of SFT, of which the reward model keeps the best"""
    task: TaskConfig = field(
        default_factory=lambda: TaskConfig(prefixes=800, eval_prefixes=200, precision="float32")
    )
    """the data; float32, so that the KL is that of the distribution that was sampled"""
    dpo: DPOConfig = field(
        default_factory=lambda: DPOConfig(
            beta=0.3, batch_pairs=64, loop=LoopConfig(schedule="constant", eval_every=10_000)
        )
    )
    """that of goodhart.py, which ends about 6 nats from the reference"""
    reward_model: RewardModelConfig = field(
        default_factory=lambda: RewardModelConfig(
            loop=LoopConfig(learning_rate=2e-4, warmup_steps=4, eval_every=20)
        )
    )
    """of PPO and of best of N"""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            steps=14, minibatch=32, kl_target=6.0, learning_rate=1e-4, eval_every=10_000
        )
    )
    """as far from the reference as DPO"""
    out: Path = Path("runs/win-rates")
    """where the pairs and all answers go"""


def main(config: WinRatesConfig, results: Path = RESULTS) -> None:
    origin = provenance()
    recorded = {name: value for name, value in asdict(config).items() if name != "out"}
    decides = {name: value for name, value in recorded.items() if name != "seeds"}
    open_run(config.out, decides, resume=True)

    # what is not there yet
    for seed in config.seeds:
        collect(config, seed)

    # ask the judges
    answers = Answers(config)
    judges, accuracy = judges_of(Seed(config, config.seeds[0]).task)
    found = {
        "second_judge": {"held_out": HELD_OUT_SENTENCES, "accuracy": accuracy},
        "biased_judge": BIASES,
        "evaluations": answers.evaluations(),
        "rows": [row for source in SOURCES for row in answers.rows(source, judges)],
        "differences": [row for source in SOURCES for row in answers.differences(source, judges)],
        "texts": [text for source in SOURCES for text in answers.kept(source)],
    }
    write_json(results, {**origin, "config": recorded, **found})


# answers


def collect(config: WinRatesConfig, seed: int) -> None:
    """Train the policies of a seed, and write the answers of every method."""
    seeded = Seed(config, seed)
    if not (path := config.out / f"prompts-seed{seed}.json").exists():
        write_json(path, seeded.texts())
    for method in METHODS:
        if not (path := config.out / f"{method}-seed{seed}.json").exists():
            write_json(path, seeded.answers(method))


class Seed:
    """What the methods of one seed share: pairs, prompts and the reward model."""

    def __init__(self, config: WinRatesConfig, seed: int):
        self.config, self.seed = config, seed
        asked = replace(config.task, seed=seed)
        self.task = Task.open(asked, config.out / f"data-seed{seed}")

    @cached_property
    def prompts(self) -> dict[str, tuple[list[list[int]], list[list[int]]]]:
        """By source: beginnings of held-out texts, and how each goes on."""
        sources = {"imdb": self.task.reviews, "rotten_tomatoes": load_rotten_tomatoes()}
        return {
            name: sample_continuations(
                reviews["test"]["text"][:],
                self.task.tokenizer,
                self.config.prompts,
                seed=self.seed,
                max_new_tokens=self.task.asked.max_new_tokens,
            )
            for name, reviews in sources.items()
        }

    def texts(self) -> dict[str, dict[str, list[str]]]:
        """By source: the `prompts` and the `baseline` as text."""
        return {
            name: {"prompts": self.decoded(prompts), "baseline": self.decoded(continuations)}
            for name, (prompts, continuations) in self.prompts.items()
        }

    def decoded(self, ids: list[list[int]]) -> list[str]:
        """Token ids as text, without BOS and EOS."""
        return self.task.tokenizer.batch_decode(ids, skip_special_tokens=True)

    @cached_property
    def learned(self) -> LearnedReward:
        """The reward model that is fitted to the pairs."""
        model = ScalarModel(self.task.new_policy())
        train_reward_model(model, self.task.preferences, self.config.reward_model, seed=self.seed)
        return LearnedReward(model)

    def answers(self, method: str) -> dict[str, Any]:
        """The answers of a method as text, by source and temperature, and how far it is from SFT.

        One answer per prompt. Best of N answers the reviews alone, since it trains no policy.
        """
        policy = self.policy(method)
        k = self.config.best_of if method == "best-of-n" else 1
        sources = ("imdb",) if k > 1 else tuple(self.prompts)
        found = {
            source: {
                f"{temperature:g}": self.answer(policy, source, temperature, k)
                for temperature in self.config.temperatures
            }
            for source in sources
        }
        return {"evaluation": self.task.evaluate(policy).summary(), "answers": found}

    def answer(self, policy: PreTrainedModel, source: str, temperature: float, k: int) -> list[str]:
        """One answer to each prompt: of k that are drawn, the one that the reward model prefers."""
        prompts, _ = self.prompts[source]
        k = 1 if temperature == 0 else k
        drawn = sample_completions(
            policy,
            prompts,
            k,
            eos_token_id=end_tokens(policy, self.task.tokenizer),
            max_new_tokens=self.task.asked.max_new_tokens,
            temperature=temperature,
            seed=self.seed,
        )
        if k > 1:
            owners = [prompt for prompt in prompts for _ in range(k)]
            flat = [ids for row in drawn for ids in row]
            best = self.learned(owners, flat).reshape(-1, k).argmax(1)
            drawn = [[row[i]] for row, i in zip(drawn, best)]
        return self.decoded([row[0] for row in drawn])

    def policy(self, method: str) -> PreTrainedModel:
        """The model that a method samples from."""
        trained: dict[str, Callable[[PreTrainedModel], Any]] = {"dpo": self.dpo, "ppo": self.ppo}
        if method not in trained:
            return self.task.reference
        policy = self.task.new_policy()
        trained[method](policy)
        return policy

    def dpo(self, policy: PreTrainedModel) -> None:
        """Train a policy by DPO."""
        train_dpo(policy, self.task.preferences, self.config.dpo, seed=self.seed)

    def ppo(self, policy: PreTrainedModel) -> None:
        """Train a policy by PPO, on the prefixes that DPO's pairs begin with."""
        task = self.task
        train_ppo(
            policy,
            task.reference,
            ScalarModel(task.new_policy()),
            self.learned,
            task.prompts,
            replace(self.config.ppo, max_new_tokens=task.asked.max_new_tokens),
            eos_token_id=end_tokens(task.reference, task.tokenizer),
            precision=task.precision,
            seed=self.seed,
        )


# judging


class Answers:
    """The answers of all seeds as text, those of one seed after those of another."""

    def __init__(self, config: WinRatesConfig):
        def read(name: str) -> list[dict[str, Any]]:
            files = [config.out / f"{name}-seed{seed}.json" for seed in config.seeds]
            return [json.loads(file.read_text(encoding="utf-8")) for file in files]

        self.seeds = config.seeds
        self.texts, self.found = read("prompts"), {method: read(method) for method in METHODS}

    def asked(self, source: str) -> tuple[list[str], list[str]]:
        """The prompts of a source, and how the texts themselves went on."""
        prompts, baseline = (
            [text for one in self.texts for text in one[source][name]]
            for name in ("prompts", "baseline")
        )
        return prompts, baseline

    def sweeps(self, source: str) -> dict[tuple[str, str], list[str]]:
        """By method and temperature: its answers to a source."""
        return {
            (method, temperature): [t for one in seeds for t in one["answers"][source][temperature]]
            for method, seeds in self.found.items()
            for temperature in seeds[0]["answers"].get(source, {})
        }

    def rows(self, source: str, judges: dict[str, Judge]) -> Iterator[dict[str, Any]]:
        """The win rates of every method and temperature by each judge."""
        prompts, baseline = self.asked(source)
        for (method, temperature), answers in self.sweeps(source).items():
            where = {"source": source, "method": method, "temperature": float(temperature)}
            told = {"characters": np.mean([len(t) for t in answers]), "distinct": distinct(answers)}
            for name, judge in judges.items():
                found = win_rates(judge, prompts, answers, baseline)
                yield {**where, "judge": name, **told, **self.summary(found)}

    def summary(self, found: WinRate) -> dict[str, Any]:
        """A win rate with its interval over all prompts, and the rate of each seed."""
        controlled = found.length_controlled
        return {
            "rate": found.rate,
            "low": found.low,
            "high": found.high,
            "seeds": self.by_seed(found.points),
            "length_controlled": [controlled.value, controlled.low, controlled.high],
        }

    def by_seed(self, points: np.ndarray) -> list[float]:
        """The mean of each seed's prompts; all seeds have as many."""
        return points.reshape(len(self.seeds), -1).mean(1).tolist()

    def differences(self, source: str, judges: dict[str, Judge]) -> Iterator[dict[str, Any]]:
        """The win rate of DPO minus that of PPO on the same prompts."""
        prompts, baseline = self.asked(source)
        sweeps = self.sweeps(source)
        for method, temperature in sweeps:
            for name, judge in judges.items() if method == "dpo" else ():
                dpo, ppo = (
                    win_rates(judge, prompts, sweeps[one, temperature], baseline, resamples=1)
                    for one in ("dpo", "ppo")
                )
                found = win_rate_difference(dpo, ppo)
                where = {"source": source, "judge": name, "temperature": float(temperature)}
                ends = {"difference": found.value, "low": found.low, "high": found.high}
                yield {**where, **ends, "seeds": self.by_seed(dpo.points - ppo.points)}

    def evaluations(self) -> list[dict[str, Any]]:
        """Reward and KL of every policy at temperature 1, on held-out prefixes."""
        return [
            {"method": method, "seed": seed, **one["evaluation"]}
            for method, seeds in self.found.items()
            for seed, one in zip(self.seeds, seeds)
        ]

    def kept(self, source: str) -> list[dict[str, Any]]:
        """The first prompts of a source, and what every method answered at each temperature."""
        prompts, baseline = self.asked(source)
        sweeps = self.sweeps(source)
        return [
            {
                "source": source,
                "prompt": prompts[i],
                "baseline": baseline[i],
                "answers": [
                    {"method": method, "temperature": float(temperature), "text": answers[i]}
                    for (method, temperature), answers in sweeps.items()
                ],
            }
            for i in range(KEPT_TEXTS)
        ]


def distinct(texts: list[str]) -> float:
    """Mean over texts of the fraction of three words in a row that did not occur before in it.

    Texts of fewer than three words have nothing that could be repeated, and count as 1.
    """
    found = []
    for text in texts:
        words = words_of(text)
        grams = list(zip(words, words[1:], words[2:]))
        found.append(len(set(grams)) / len(grams) if grams else 1.0)
    return float(np.mean(found))


def judges_of(task: Task) -> tuple[dict[str, Judge], float]:
    """The three judges, and the accuracy of the second on sentences it was not fitted to."""
    second, accuracy = second_judge()
    classifier = remembered(task.reward)
    other = remembered(lambda texts: second.predict_proba(texts)[:, 1])
    judges = {
        "classifier": reward_judge(classifier),
        "second": reward_judge(other),
        "biased": biased_judge(classifier, **BIASES),
    }
    return judges, accuracy


def remembered(reward: Callable[[list[str]], np.ndarray]) -> Callable[[Sequence[str]], np.ndarray]:
    """A reward that scores each text once."""
    known: dict[str, float] = {}

    def score(texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, reward(new)))
        return np.array([known[text] for text in texts])

    return score


if __name__ == "__main__":
    tyro.cli(main)
