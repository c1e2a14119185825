"""On-policy DPO in rounds against one offline round, at the same number of labels.

    python benchmarks/on_policy.py

Every method but self-play has `completions` completions labeled, 4 of each prompt, whatever the
number of rounds, and so as many pairs but for ties. First each method is tuned: one run for each
beta of the grid with a seed of its own; the beta whose last policy reaches the largest fraction of
the optimal gain within 5 nats is kept. Then three seeds. Reward and KL are those of completions
sampled in float32, on the prompts from which the optimal frontier of the package was estimated.
Writes dpo_lab/assets/on_policy.json. Runs that are in `--config.out` are kept; `--config.only`
names the methods to run now. Seconds are those of one core, without the evaluations.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import nn

from dpo_lab.assets import ASSETS
from dpo_lab.engine.cpu import tune_cpu
from dpo_lab.engine.runs import open_run, provenance, write_json
from dpo_lab.evaluate import evaluate_policy
from dpo_lab.judges import biased_judge, judge_label
from dpo_lab.loop import LoopConfig
from dpo_lab.models import end_tokens
from dpo_lab.online import Label, OnlineConfig, bradley_terry_label, train_online_dpo, train_spin
from dpo_lab.rlhf.ppo import text_reward
from dpo_lab.sentiment.results import load_sweep
from dpo_lab.sentiment.reviews import sample_continuations
from dpo_lab.sentiment.task import Task, TaskConfig
from dpo_lab.train import DPOConfig

RESULTS = ASSETS / "on_policy.json"

# nats of KL within which methods are compared
WITHIN = 5.0

# of the seed that tunes; the others are 0, 1, 2, ...
TUNING_SEED = 100

# texts of the last policy that are kept
KEPT_TEXTS = 4


@dataclass(frozen=True)
class Method:
    """How a method samples and labels."""

    rounds: int = 1
    """rounds of sampling, labeling and training"""
    reference: Literal["fixed", "moved"] = "fixed"
    """of the rounds after the first"""
    labels: Literal["classifier", "bradley-terry", "judge", "human"] = "classifier"
    """the order of the classifier's rewards; votes drawn from them by Bradley-Terry; a judge that
    is right with probability `accuracy`; or none, since human text is preferred (SPIN)"""
    size: float = 1.0
    """completions, in multiples of `completions`"""
    decay: float = 1.0
    """of the learning rate from round to round"""


METHODS = {
    "offline": Method(),
    "2 rounds": Method(rounds=2),
    "4 rounds": Method(rounds=4),
    "8 rounds": Method(rounds=8),
    "4 rounds, moved": Method(rounds=4, reference="moved"),
    "offline, votes": Method(labels="bradley-terry"),
    "4 rounds, votes": Method(rounds=4, labels="bradley-terry"),
    "offline, judge": Method(labels="judge"),
    "4 rounds, judge": Method(rounds=4, labels="judge"),
    "SPIN": Method(rounds=3, reference="moved", labels="human"),
}


@dataclass(frozen=True)
class OnPolicyConfig:
    """What is trained, and how it is evaluated."""

    completions: int = 2_048
    """labeled completions of a run"""
    k: int = 4
    """completions per prompt"""
    betas: tuple[float, ...] = (0.2, 0.35)
    """that are tried with each method"""
    moved_betas: tuple[float, ...] = (0.5, 1.0)
    """that are tried where the reference moves, which lets the policy go as far again each round"""
    scale: float = 0.15
    """rewards per unit of log-odds of the Bradley-Terry votes"""
    votes: int = 8
    """on each pair"""
    accuracy: float = 0.8
    """of the judge"""
    prompts_per_step: int = 11
    """whose pairs make a step: 66 pairs, or as many times the votes; of SPIN's pairs 44"""
    learning_rate: float = 5e-5
    """of AdamW on all weights; falls to zero in each round"""
    warmup_steps: int = 2
    """in each round"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the runs that are reported"""
    points: int = 4
    """evaluations along a run, the last one included"""
    last_repeats: int = 2
    """completions per held-out prompt in the last one"""
    task: TaskConfig = field(
        default_factory=lambda: TaskConfig(prefixes=7_500, eval_prefixes=256, precision="bfloat16")
    )
    """the data, and the precision of sampling and training"""
    only: tuple[str, ...] = tuple(METHODS)
    """the methods to run now; finished runs of others are reported too"""
    out: Path = Path("runs/on-policy")
    """where every run goes"""


def main(config: OnPolicyConfig, results: Path = RESULTS) -> None:
    torch.set_num_threads(1)
    tune_cpu()
    origin = provenance()
    recorded = {name: value for name, value in asdict(config).items() if name != "out"}
    grown = ("only", "seeds", "betas", "moved_betas")
    decides = {name: value for name, value in recorded.items() if name not in grown}
    open_run(config.out, decides, resume=True)
    bench = Bench(config)

    # tune, then run the seeds
    for name in config.only:
        for beta in bench.betas(name):
            bench.finish(name, beta, TUNING_SEED)
        for seed in config.seeds:
            bench.finish(name, bench.best_beta(name), seed)
        write_json(results, {**origin, "config": recorded, **bench.found()})


class Bench:
    """The runs of the benchmark, each in a file of its own."""

    def __init__(self, config: OnPolicyConfig):
        self.config = config
        self.task = Task.open(config.task, config.out / "data")
        self.sweep = load_sweep()

    def betas(self, name: str) -> tuple[float, ...]:
        """The grid of a method."""
        moved = METHODS[name].reference == "moved"
        return self.config.moved_betas if moved else self.config.betas

    def path(self, name: str, beta: float, seed: int) -> Path:
        """Where a run is kept."""
        short = name.replace(",", "").replace(" ", "-")
        return self.config.out / f"{short}-beta{beta:g}-seed{seed}.json"

    def finish(self, name: str, beta: float, seed: int) -> None:
        """Do a run, unless it is there."""
        path = self.path(name, beta, seed)
        if not path.exists():
            began = time.perf_counter()
            rows = Run(self, METHODS[name], beta, seed).rows()
            write_json(path, {"method": name, "beta": beta, "seed": seed, "rows": rows})
            last = rows[-1]
            print(
                f"{name}, beta {beta:g}, seed {seed}: reward {last['reward']:.3f} at "
                f"{last['kl']:.2f} nats, {last['fraction'][0]:.0%}; {last['seconds']:.0f} s of "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )

    def best_beta(self, name: str) -> float:
        """The beta with the largest fraction of the optimal gain within `WITHIN` nats, of the
        tuning runs; the one that ends nearest where none ends within."""

        def value(beta: float) -> float:
            path = self.path(name, beta, TUNING_SEED)
            last = json.loads(path.read_text(encoding="utf-8"))["rows"][-1]
            return last["fraction"][0] if last["kl"] <= WITHIN else WITHIN - last["kl"]

        return max(self.betas(name), key=value)

    def found(self) -> dict[str, Any]:
        """The finished runs: `tuning` and `runs`, and the settings of each method."""
        files = sorted(self.config.out.glob("*-seed*.json"))
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        order = list(METHODS)
        runs.sort(key=lambda run: (order.index(run["method"]), run["beta"], run["seed"]))
        return {
            "within": WITHIN,
            "methods": {name: asdict(method) for name, method in METHODS.items()},
            "tuning": [run for run in runs if run["seed"] == TUNING_SEED],
            "runs": [run for run in runs if run["seed"] != TUNING_SEED],
        }


class Run:
    """One run: a policy is trained, and evaluated along the way."""

    def __init__(self, bench: "Bench", method: Method, beta: float, seed: int):
        self.config, self.task, self.sweep = bench.config, bench.task, bench.sweep
        self.method, self.beta, self.seed = method, beta, seed
        self.n = round(self.config.completions * method.size) // self.config.k
        self.labels = self.sampled = 0
        self.began, self.spent = time.process_time(), 0.0
        self.found: list[dict[str, Any]] = []

    def rows(self) -> list[dict[str, Any]]:
        """The evaluations of the run; the last one on more completions, with some texts."""
        policy, task = self.task.new_policy(), self.task
        options = {
            "eos_token_id": end_tokens(policy, task.tokenizer),
            "precision": task.precision,
            "seed": self.seed,
            "callback": self.evaluate,
            "progress": None,
        }
        if self.method.labels == "human":
            lines = train_spin(policy, *self.praise(), self.online(), **options)
            self.sampled = max(line.get("tokens", 0) for line in lines)
        else:
            prompts, label = task.training_prefixes(self.n, self.seed), self.counted(self.label())
            lines = train_online_dpo(
                policy, task.reference, prompts, label, self.online(), **options
            )
        trained = [line for line in lines if "tokens_per_second" in line]
        tokens = sum(line["tokens_per_second"] * line["seconds"] for line in trained)
        last = self.row(policy, trained[-1]["step"], self.config.last_repeats, texts=True)
        return [*self.found, {**last, "trained_tokens": round(tokens)}]

    def online(self) -> OnlineConfig:
        """The rounds of the method."""
        config, method = self.config, self.method
        pairs = config.k * (config.k - 1) // 2
        pairs *= config.votes if method.labels == "bradley-terry" else 1
        spin = method.labels == "human"
        loop = LoopConfig(
            learning_rate=config.learning_rate, warmup_steps=config.warmup_steps, eval_every=1
        )
        return OnlineConfig(
            rounds=method.rounds,
            k=1 if spin else config.k,
            reference=method.reference,
            max_new_tokens=self.task.asked.max_new_tokens,
            decay=method.decay,
            dpo=DPOConfig(
                beta=self.beta,
                batch_pairs=config.prompts_per_step * (config.k if spin else pairs),
                loop=loop,
            ),
        )

    # labels

    def label(self) -> Label:
        """What says which completions are better."""
        config, task = self.config, self.task
        rewards = text_reward(task.reward, task.tokenizer)
        if self.method.labels == "bradley-terry":
            options = {"k": config.k, "scale": config.scale, "votes": config.votes}
            return bradley_terry_label(rewards, seed=self.seed, **options)
        if self.method.labels == "judge":
            judge = biased_judge(task.reward, accuracy=config.accuracy, seed=self.seed)
            return judge_label(judge, task.tokenizer, k=config.k, seed=self.seed)
        return rewards

    def counted(self, label: Label) -> Label:
        """`label`, with the completions that it is asked about counted."""

        def asked(prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
            self.labels += len(completions)
            self.sampled += sum(map(len, completions))
            return label(prompts, completions)

        return asked

    def praise(self) -> tuple[list[list[int]], list[list[int]]]:
        """Beginnings of positive reviews, and how they go on: what SPIN imitates.

        As many as make the sampled completions of all rounds as many as those of the others.
        """
        reviews = self.task.reviews["train"]
        texts = [text for text, label in zip(reviews["text"], reviews["label"]) if label == 1]
        n = self.config.k * self.n // self.method.rounds
        length = self.task.asked.max_new_tokens
        tokenizer = self.task.tokenizer
        return sample_continuations(texts, tokenizer, n, seed=self.seed, max_new_tokens=length)

    # evaluations

    def evaluate(self, policy: nn.Module, step: int) -> dict[str, float]:
        """The callback: a row at some steps."""
        steps = self.config.k * self.n if self.method.labels == "human" else self.n
        if self.method.labels == "human":
            steps //= self.config.k
        every = max(1, round(steps / self.config.prompts_per_step / self.config.points))
        if step and step % every == 0 and len(self.found) < self.config.points - 1:
            self.found.append(self.row(policy, step, 0))
        return {}

    def row(
        self, policy: nn.Module, step: int, repeats: int, *, texts: bool = False
    ) -> dict[str, Any]:
        """Reward and KL on the held-out prompts, half of them where `repeats` is 0."""
        began, task = time.process_time(), self.task
        seconds = began - self.began - self.spent
        prompts = task.held_out * repeats if repeats else task.held_out[: len(task.held_out) // 2]
        found = evaluate_policy(
            policy,
            task.reference,
            prompts,
            task.reward,
            task.tokenizer,
            max_new_tokens=task.asked.max_new_tokens,
            seed=self.seed + 1,
        )
        self.spent += time.process_time() - began
        low, high = self.sweep.fraction_bounds(found.reward, found.kl)
        return {
            "step": step,
            "labels": self.labels,
            "sampled_tokens": self.sampled,
            "seconds": round(seconds, 1),
            **found.summary(),
            "fraction": [low, high],
            **({"texts": found.texts[:KEPT_TEXTS]} if texts else {}),
        }


if __name__ == "__main__":
    main(tyro.cli(OnPolicyConfig))
