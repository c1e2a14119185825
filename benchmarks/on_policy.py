"""On-policy DPO in rounds against one offline round, at the same number of labels.

    python benchmarks/on_policy.py

Every method has as many completions labeled, whatever its rounds; self-play samples as many, which
nobody labels. First each method is tuned by one run for each of its betas, with a seed of its own:
the beta is kept whose last policy reaches the largest fraction of the optimal gain within 5 nats.
A method with a single beta is not tuned.
Then three seeds. Training is in the precision that is asked for; reward and KL are those of
completions sampled in float32 on the prompts from which the optimal frontier in the package was
estimated. Writes dpo_lab/assets/on_policy.json. Runs that are in `--config.out` are kept, and
`--config.only` names the methods to run now. Seconds are those of one core, without evaluations.
"""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
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
from dpo_lab.rlhf.ppo import text_reward
from dpo_lab.sentiment.results import load_sweep
from dpo_lab.sentiment.reviews import sample_continuations
from dpo_lab.sentiment.task import Task, TaskConfig
from dpo_lab.train import DPOConfig
from dpo_lab.variants.labels import Label, best_and_worst_label, bradley_terry_label
from dpo_lab.variants.online import OnlineConfig, train_online_dpo, train_spin

RESULTS = ASSETS / "on_policy.json"

# nats of KL within which methods are compared
WITHIN = 5.0

# of the runs that tune; the others have the seeds 0, 1, 2
TUNING_SEED = 100

# texts of the last policy that are kept
KEPT_TEXTS = 4


@dataclass(frozen=True)
class Method:
    """How a method samples, labels and trains."""

    rounds: int = 1
    """rounds of sampling, labeling and training"""
    labels: Literal["rewards", "extremes", "votes", "judge", "human"] = "rewards"
    """every two completions in the order of the classifier's rewards; the best against the worst of
    them; votes drawn from the rewards by Bradley-Terry; a judge that is right with probability
    `accuracy`; or none, since human text is preferred (SPIN)"""
    k: int = 4
    """completions per prompt; in SPIN one beside the human text"""
    reference: Literal["fixed", "moved"] = "fixed"
    """of the rounds after the first"""
    prompts_per_step: int = 11
    """whose pairs make a step"""
    size: int = 1
    """labeled completions, in multiples of `completions`"""
    betas: tuple[float, ...] = (0.35, 0.5)
    """that are tried; a single one is taken as it is"""
    learning_rate: float = 7e-5
    """of AdamW on all weights, in the first round; falls to zero in each"""
    tuned_as: str = ""
    """another method, whose beta it takes"""


BEST_AND_WORST = Method(labels="extremes", k=8, prompts_per_step=16, betas=(0.45, 0.7))

METHODS = {
    "offline": Method(),
    "4 rounds": Method(rounds=4, betas=(0.27, 0.35, 0.5)),
    "offline, best and worst": BEST_AND_WORST,
    "4 rounds, best and worst": replace(BEST_AND_WORST, rounds=4),
    "4 rounds, moved": Method(rounds=4, reference="moved", betas=(1.0,)),
    "8 rounds, best and worst, 8 times the labels": replace(
        BEST_AND_WORST, rounds=8, size=8, betas=(1.0, 1.6)
    ),
    "offline, judge": Method(labels="judge", betas=(0.15, 0.3)),
    "4 rounds, judge": Method(rounds=4, labels="judge", betas=(0.15, 0.3)),
    "SPIN": Method(3, "human", 1, "moved", prompts_per_step=16, betas=(0.2,)),
    "8 rounds": Method(rounds=8, betas=(0.27, 0.35)),
    "offline, best and worst, 8 times the labels": replace(
        BEST_AND_WORST, size=8, betas=(0.8, 1.2)
    ),
    "4 rounds, 8 times the labels": Method(rounds=4, size=8, betas=(0.8,)),
    "2 rounds": Method(rounds=2, betas=(0.3, 0.4)),
    "4 rounds, votes": Method(rounds=4, labels="votes", betas=(0.15, 0.3)),
}


@dataclass(frozen=True)
class OnPolicyConfig:
    """What is trained, and how it is evaluated."""

    completions: int = 1_024
    """labeled completions of a run"""
    decay: float = 0.8
    """factor on the learning rate from round to round"""
    warmup_steps: int = 2
    """of each round"""
    scale: float = 0.15
    """rewards per unit of log-odds of the Bradley-Terry votes"""
    votes: int = 8
    """on each pair"""
    accuracy: float = 0.8
    """of the judge"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the runs that are reported"""
    points: int = 3
    """evaluations along a run, the last one included"""
    task: TaskConfig = field(
        default_factory=lambda: TaskConfig(eval_prefixes=256, precision="bfloat16")
    )
    """the data, and the precision of sampling and training"""
    only: tuple[str, ...] = tuple(METHODS)
    """the methods to run now; finished runs of others are reported too"""
    minutes: float = 600.0
    """no run begins after so many"""
    out: Path = Path("runs/on-policy")
    """where every run goes"""


def main(config: OnPolicyConfig, results: Path = RESULTS) -> None:
    torch.set_num_threads(1)
    tune_cpu()
    began, origin = time.perf_counter(), provenance()
    now = ("only", "minutes", "out")
    recorded = {name: value for name, value in asdict(config).items() if name not in now}
    decides = {name: value for name, value in recorded.items() if name != "seeds"}
    open_run(config.out, decides, resume=True)
    bench = Bench(config)

    # tune, then run the seeds
    for name in config.only:
        tuned = METHODS[name].tuned_as or name
        betas = METHODS[tuned].betas if len(METHODS[tuned].betas) > 1 else ()
        tuning = [(tuned, beta, TUNING_SEED) for beta in betas]
        for run in tuning:
            bench.finish(*run, until=began + 60 * config.minutes)
        if all(bench.path(*run).exists() for run in tuning):
            for seed in config.seeds:
                bench.finish(name, bench.best_beta(tuned), seed, until=began + 60 * config.minutes)
        write_json(results, {**origin, "config": recorded, **bench.found()})


class Bench:
    """The runs of the benchmark, each in a file of its own."""

    def __init__(self, config: OnPolicyConfig):
        self.config, self.sweep = config, load_sweep()

    @cached_property
    def task(self) -> Task:
        """What every run shares."""
        return Task.open(self.config.task, self.config.out / "data")

    def path(self, name: str, beta: float, seed: int) -> Path:
        """Where a run is kept."""
        short = name.replace(",", "").replace(" ", "-")
        return self.config.out / f"{short}-beta{beta:g}-seed{seed}.json"

    def finish(self, name: str, beta: float, seed: int, *, until: float) -> None:
        """Do a run, unless it is there or it is too late."""
        path, began = self.path(name, beta, seed), time.perf_counter()
        if path.exists() or began > until:
            return
        rows = Run(self, METHODS[name], beta, seed).rows()
        write_json(path, {"method": name, "beta": beta, "seed": seed, "rows": rows})
        last = rows[-1]
        print(
            f"{name}, beta {beta:g}, seed {seed}: reward {last['reward']:.3f} at "
            f"{last['kl']:.2f} nats, {last['fraction'][0]:.1%}; {last['seconds']:.0f} s of "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )

    def best_beta(self, name: str) -> float:
        """The beta whose last policy has the largest fraction of the optimal gain within `WITHIN`
        nats, or is nearest to them where none is within; of the betas that were tried so far.
        """
        name = METHODS[name].tuned_as or name
        if len(METHODS[name].betas) == 1:
            return METHODS[name].betas[0]

        def value(beta: float) -> float:
            path = self.path(name, beta, TUNING_SEED)
            last = json.loads(path.read_text(encoding="utf-8"))["rows"][-1]
            return last["fraction"][0] if last["kl"] <= WITHIN else WITHIN - last["kl"]

        tried = [b for b in METHODS[name].betas if self.path(name, b, TUNING_SEED).exists()]
        return max(tried, key=value)

    def found(self) -> dict[str, Any]:
        """The finished runs, those that tuned apart, and the settings of each method."""
        files = sorted(self.config.out.glob("*-seed*.json"))
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        order = list(METHODS)
        runs.sort(key=lambda run: (order.index(run["method"]), run["beta"], run["seed"]))
        tuning = [run for run in runs if run["seed"] == TUNING_SEED]
        seeds = [run for run in runs if run["seed"] != TUNING_SEED]
        best = {run["method"]: self.best_beta(run["method"]) for run in seeds}
        return {
            "within": WITHIN,
            "methods": {name: asdict(method) for name, method in METHODS.items()},
            "tuning": tuning,
            "runs": [run for run in seeds if run["beta"] == best[run["method"]]],
            "other_betas": [run for run in seeds if run["beta"] != best[run["method"]]],
        }


class Run:
    """One run: a policy is trained, and evaluated along the way."""

    def __init__(self, bench: Bench, method: Method, beta: float, seed: int):
        self.config, self.task, self.sweep = bench.config, bench.task, bench.sweep
        self.method, self.beta, self.seed = method, beta, seed
        self.task.load()

        # prompts of each round together; SPIN asks all of them again in every round
        self.completions = self.config.completions * method.size
        self.prompts = self.completions // method.k
        self.steps = self.prompts // method.prompts_per_step

        # what was labeled and spent so far
        self.labels = self.sampled = 0
        self.began, self.unpaid = time.process_time(), 0.0
        self.found: list[dict[str, Any]] = []

    def rows(self) -> list[dict[str, Any]]:
        """The evaluations of the run; the last one on all held-out prompts, with some texts."""
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
            prompts = task.training_prefixes(self.prompts, self.seed)
            label = self.counted(self.label())
            lines = train_online_dpo(
                policy, task.reference, prompts, label, self.online(), **options
            )

        # tokens that a forward and a backward pass read
        steps = [line for line in lines if "tokens_per_second" in line]
        trained = sum(line["tokens_per_second"] * line["seconds"] for line in steps)
        last, found = self.row(policy, steps[-1]["step"], len(task.held_out))
        texts = list(found.texts[:KEPT_TEXTS])
        return [*self.found, {**last, "trained_tokens": round(trained), "texts": texts}]

    def online(self) -> OnlineConfig:
        """The rounds of the method."""
        config, method = self.config, self.method
        pairs = method.k * (method.k - 1) // 2
        pairs = {"extremes": 1, "human": 1, "votes": pairs * config.votes}.get(method.labels, pairs)
        loop = LoopConfig(
            learning_rate=method.learning_rate, warmup_steps=config.warmup_steps, eval_every=1
        )
        return OnlineConfig(
            rounds=method.rounds,
            k=method.k,
            reference=method.reference,
            max_new_tokens=self.task.asked.max_new_tokens,
            decay=config.decay,
            dpo=DPOConfig(self.beta, batch_pairs=method.prompts_per_step * pairs, loop=loop),
        )

    # labels

    def label(self) -> Label:
        """What says which completions are better."""
        config, task, k = self.config, self.task, self.method.k
        rewards = text_reward(task.reward, task.tokenizer)
        if self.method.labels == "votes":
            options = {"scale": config.scale, "votes": config.votes, "seed": self.seed}
            return bradley_terry_label(rewards, k=k, **options)
        if self.method.labels == "judge":
            judge = biased_judge(task.reward, accuracy=config.accuracy, seed=self.seed)
            return judge_label(judge, task.tokenizer, k=k, seed=self.seed)
        if self.method.labels == "extremes":
            return best_and_worst_label(rewards, k=k)
        return rewards

    def counted(self, label: Label) -> Label:
        """`label`, with what it is asked about counted."""

        def asked(prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
            self.labels += len(completions)
            self.sampled += sum(map(len, completions))
            return label(prompts, completions)

        return asked

    def praise(self) -> tuple[list[list[int]], list[list[int]]]:
        """Beginnings of positive reviews, and how they go on: what SPIN imitates."""
        reviews = self.task.reviews["train"]
        positive = np.flatnonzero(np.array(reviews["label"][:]) == 1)
        texts, n = reviews["text"][:], self.prompts // self.method.rounds
        return sample_continuations(
            [texts[i] for i in positive],
            self.task.tokenizer,
            n,
            seed=self.seed,
            max_new_tokens=self.task.asked.max_new_tokens,
        )

    # evaluations

    def evaluate(self, policy: nn.Module, step: int) -> dict[str, float]:
        """The callback, which is called at every step: a row at some of them, on fewer prompts."""
        points = self.config.points
        due = self.steps * (len(self.found) + 1) / points
        if len(self.found) < points - 1 and step >= due:
            row, _ = self.row(policy, step, len(self.task.held_out) // 2)
            self.found.append(row)
        return {}

    def row(self, policy: nn.Module, step: int, n: int) -> tuple[dict[str, Any], Any]:
        """A policy on the first `n` held-out prompts, and what it cost so far."""
        began, task = time.process_time(), self.task
        seconds = began - self.began - self.unpaid
        found = evaluate_policy(
            policy,
            task.reference,
            task.held_out[:n],
            task.reward,
            task.tokenizer,
            max_new_tokens=task.asked.max_new_tokens,
            seed=self.seed + 1,
        )
        row = {
            "step": step,
            "labels": self.labels,
            "sampled_tokens": self.sampled,
            "seconds": round(seconds, 1),
            **found.summary(),
            "fraction": self.sweep.fraction_bounds(found.reward, found.kl),
        }
        self.unpaid += time.process_time() - began
        return row, found


if __name__ == "__main__":
    tyro.cli(main)
