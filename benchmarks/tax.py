"""The alignment tax in small: what PPO, PPO-ptx and DPO cost a model that writes movie reviews.

    python benchmarks/tax.py

A reward model is fitted to pairs, and PPO is run against it. The runs differ in one of two
coefficients, as in Figures 33 and 34 of Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155): that
of the pretraining loss (PPO-ptx) and that of the KL. DPO reads the same pairs, alone and with a
term of SFT on the chosen completions. The seeds of a setting share pairs and reward model. Reward,
KL and tax are measured half way through each run and at its end. Writes dpo_lab/assets/tax.json,
which notebook 04c draws. Runs that are in `--config.out` are kept. About 35 minutes of one core.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tyro
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_lab.assets import ASSETS
from dpo_lab.batching import CompletionBatch
from dpo_lab.engine.runs import atomic_write, open_run, provenance, write_json
from dpo_lab.evaluate import evaluate_policy
from dpo_lab.loop import Callback, LoopConfig
from dpo_lab.losses import dpo_loss
from dpo_lab.models import ScalarModel, end_tokens
from dpo_lab.rlhf.ppo import PPOConfig, train_ppo
from dpo_lab.rlhf.reward_model import LearnedReward, RewardModelConfig, train_reward_model
from dpo_lab.sentiment.probes import TaxItems, tax_items
from dpo_lab.sentiment.reviews import text_batches
from dpo_lab.sentiment.task import Task, TaskConfig
from dpo_lab.sentiment.tax import Tax, measure_rudeness, measure_tax
from dpo_lab.train import DPOConfig, train_dpo

RESULTS = ASSETS / "tax.json"

# texts of each run's last evaluation that are kept
KEPT_TEXTS = 2


@dataclass(frozen=True)
class TaxConfig:
    """What is trained, and what is measured."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """of the order of the prompts and of PPO's samples"""
    ptx_coefficients: tuple[float, ...] = (0.25, 1.0, 4.0)
    """of PPO-ptx, at the first of `kl_coefficients`; Figure 33"""
    kl_coefficients: tuple[float, ...] = (0.02, 0.1, 0.5, 2.0)
    """of PPO without text; Figure 34"""
    task: TaskConfig = field(
        default_factory=lambda: TaskConfig(
            prefixes=600, max_new_tokens=32, eval_prefixes=128, precision="bfloat16"
        )
    )
    """the data; bfloat16 is how it is sampled and trained, everything is measured in float32"""
    reward_model: RewardModelConfig = field(
        default_factory=lambda: RewardModelConfig(
            batch_pairs=48, loop=LoopConfig(learning_rate=2e-4, warmup_steps=4, eval_every=20)
        )
    )
    """of PPO"""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            steps=12, batch=64, minibatch=16, epochs=1, learning_rate=1.5e-4, eval_every=6
        )
    )
    """of all runs of PPO but for their two coefficients"""
    ptx_reviews: int = 3_000
    """that the text comes from; the model was pretrained on them"""
    ptx_rows: int = 4
    """rows of text for each optimizer step of PPO-ptx"""
    ptx_length: int = 128
    """tokens of a row: all of them are as many as the completions of a minibatch have"""
    dpo: DPOConfig = field(
        default_factory=lambda: DPOConfig(
            beta=0.1,
            batch_pairs=48,
            loop=LoopConfig(learning_rate=5e-5, warmup_steps=4, eval_every=38),
        )
    )
    """of DPO, with and without SFT"""
    sft_coefficient: float = 1.0
    """of the SFT term beside DPO's loss, per nat per token of the chosen completion"""
    items: int = 120
    """texts of each kind, and questions of each probe"""
    out: Path = Path("runs/tax")
    """where pairs, reward models and the measurements of each run go"""


@dataclass(frozen=True)
class Setting:
    """One run."""

    method: str
    """"ppo" (PPO-ptx, where its coefficient is positive), "dpo" or "dpo-sft" """
    seed: int
    kl_coefficient: float = 0.0
    ptx_coefficient: float = 0.0

    @property
    def name(self) -> str:
        """What its file is called."""
        told = f"-kl{self.kl_coefficient:g}-ptx{self.ptx_coefficient:g}"
        return self.method + (told if self.method == "ppo" else "") + f"-seed{self.seed}"


def settings(config: TaxConfig) -> Iterator[Setting]:
    """All runs, the seeds of one setting after those of another."""
    first, *others = config.kl_coefficients
    pairs = [(first, 0.0), *((first, gamma) for gamma in config.ptx_coefficients)]
    pairs += [(coefficient, 0.0) for coefficient in others]
    for kl, gamma in pairs:
        yield from (Setting("ppo", seed, kl, gamma) for seed in config.seeds)
    for method in ("dpo", "dpo-sft"):
        yield from (Setting(method, seed) for seed in config.seeds)


def main(
    config: TaxConfig, results: Path = RESULTS, minutes: float = float("inf"), only: str = ""
) -> None:
    """Do the runs that are left, and write the settings that are finished in all seeds.

    With `only` those runs whose names begin so, and with `minutes` none that would begin later; the
    next call goes on.
    """
    origin, began = provenance(), time.perf_counter()
    recorded = {name: value for name, value in asdict(config).items() if name != "out"}
    grids = ("seeds", "ptx_coefficients", "kl_coefficients")
    decides = {name: value for name, value in recorded.items() if name not in grids}
    open_run(config.out, decides, resume=True)

    # what is not there yet
    shared, before = Shared(config), config.out / "before.json"
    if not before.exists():
        write_json(before, shared.before_training())
    for setting in settings(config):
        path = config.out / f"{setting.name}.json"
        late = time.perf_counter() - began > 60 * minutes
        if not path.exists() and setting.name.startswith(only) and not late:
            write_json(path, {**asdict(setting), **shared.run(setting)})

    # the settings that are finished in all seeds
    files = {each: config.out / f"{each.name}.json" for each in settings(config)}
    left = [each for each, path in files.items() if not path.exists()]
    unfinished = {replace(each, seed=0) for each in left}
    found = json.loads(before.read_text(encoding="utf-8"))
    found["runs"] = [
        json.loads(path.read_text(encoding="utf-8"))
        for each, path in files.items()
        if replace(each, seed=0) not in unfinished
    ]
    write_json(results, {**origin, "config": recorded, **found})
    print(f"{len(left)} runs are left: {', '.join(each.name for each in left)}")


class Shared:
    """What all runs share: pairs, the reward model, and the model before training."""

    def __init__(self, config: TaxConfig):
        self.config = config
        self.task = Task.open(config.task, config.out / "data")

    @cached_property
    def items(self) -> TaxItems:
        """What the tax is measured on."""
        held_out = self.task.reviews["test"]["text"][:]
        return tax_items(held_out, self.task.tokenizer, n=self.config.items)

    @cached_property
    def before(self) -> Tax:
        """The tax of the model that all runs begin with."""
        return measure_tax(self.task.reference, self.task.tokenizer, self.items)

    @cached_property
    def learned(self) -> LearnedReward:
        """The reward model that is fitted to the pairs."""
        model, precision = ScalarModel(self.task.new_policy()), self.task.precision
        path = self.config.out / "reward_model.safetensors"
        if not path.exists():
            metrics = train_reward_model(
                model, self.task.preferences, self.config.reward_model, precision=precision
            )
            write_json(path.with_suffix(".json"), [x for x in metrics if "eval/accuracy" in x])
            with atomic_write(path) as temporary:
                save_weights(model, str(temporary))
        load_weights(model, str(path))
        return LearnedReward(model, precision=precision)

    def tax(self, model: nn.Module) -> Tax:
        """What a model does elsewhere, but for rude words."""
        return measure_tax(model, self.task.tokenizer, self.items, completions=0)

    def before_training(self) -> dict[str, Any]:
        """The model before training, what it was measured on, and how many there are of each."""
        items = self.items
        return {
            "before": {**self.evaluation(self.task.reference), **self.before.summary()},
            "sizes": {
                "texts": {kind: len(texts) for kind, texts in items.texts.items()},
                "bytes": {kind: int(n.sum()) for kind, n in items.n_bytes.items()},
                "probes": {name: len(questions) for name, questions in items.probes.items()},
                "prompts": {name: len(prompts) for name, prompts in items.prompts.items()},
            },
            "hashes": items.hashes,
        }

    def evaluation(self, model: nn.Module) -> dict[str, Any]:
        """Reward and KL on held-out prefixes, in float32, and the first texts."""
        task = self.task
        found = evaluate_policy(
            model,
            task.reference,
            task.held_out,
            lambda texts: task.rewards(task.held_out, texts),
            task.tokenizer,
            max_new_tokens=task.asked.max_new_tokens,
        )
        return {**found.summary(), "texts": found.texts[:KEPT_TEXTS]}

    def run(self, setting: Setting) -> dict[str, Any]:
        """Train a policy; a row for each evaluation, and of PPO what each rollout was given."""
        rows: list[dict[str, Any]] = []
        before = self.before

        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            if not step:
                return {}
            tax = self.tax(model)
            row = {"step": step, **self.evaluation(model), **tax.summary()}
            rows.append({**row, "change": tax.minus(before)})
            return {"reward": row["reward"], "kl": row["kl"]}

        # train, and ask for rude words at the end
        policy = self.task.new_policy()
        train = self.ppo if setting.method == "ppo" else self.dpo
        began = time.perf_counter()
        lines = train(policy, setting, evaluate)
        seconds = time.perf_counter() - began
        rude = Tax({}, {}, measure_rudeness(policy, self.task.tokenizer, self.items))
        rows[-1]["rude"] = rude.summary()["rude"]
        rows[-1]["change"]["rude"] = rude.minus(before)["rude"]
        return {"rows": rows, "rollouts": lines, "seconds": round(seconds)}

    def ppo(self, policy: PreTrainedModel, setting: Setting, evaluate: Callback) -> list[Any]:
        """Train a policy by PPO, or PPO-ptx; score, KL and the loss on text by rollout."""
        task, config = self.task, self.config
        gamma = setting.ptx_coefficient
        lines = train_ppo(
            policy,
            task.reference,
            ScalarModel(task.new_policy()),
            self.learned,
            task.prompts,
            replace(
                config.ppo,
                kl_coefficient=setting.kl_coefficient,
                ptx_coefficient=gamma,
                max_new_tokens=task.asked.max_new_tokens,
            ),
            eos_token_id=end_tokens(task.reference, task.tokenizer),
            precision=task.precision,
            seed=setting.seed,
            ptx=self.text(setting.seed) if gamma else None,
            callback=evaluate,
            progress=setting.name,
        )
        kept = ("objective/score", "objective/kl", "policy/ptx_loss")
        return [
            {name: line[name] for name in kept if name in line}
            for line in lines
            if "objective/kl" in line
        ]

    def text(self, seed: int) -> Callable[[], CompletionBatch]:
        """Batches of reviews that the model was pretrained on."""
        config = self.config
        return text_batches(
            self.task.reviews["train"]["text"][: config.ptx_reviews],
            self.task.tokenizer,
            rows=config.ptx_rows,
            length=config.ptx_length,
            seed=seed,
        )

    def dpo(self, policy: PreTrainedModel, setting: Setting, evaluate: Callback) -> list[Any]:
        """Train a policy by DPO, with or without SFT."""
        per_token = self.config.sft_coefficient / self.task.asked.max_new_tokens

        def with_sft(
            logps: Tensor, reference: Tensor, chosen: Tensor, rejected: Tensor, beta: float
        ) -> Tensor:
            return (
                dpo_loss(logps, reference, chosen, rejected, beta).losses
                - per_token * (logps[chosen])
            )

        train_dpo(
            policy,
            self.task.preferences,
            self.config.dpo,
            loss=with_sft if setting.method == "dpo-sft" else None,
            seed=setting.seed,
            callback=evaluate,
            progress=setting.name,
        )
        return []


if __name__ == "__main__":
    tyro.cli(main)
