"""Two starts of PPO's value model: a zero head on the SFT model, and the reward model.

    python benchmarks/value_start.py

InstructGPT starts the value model from the reward model. For each seed this fits a reward model and
runs PPO against it twice, and prints how much of the variance of the returns the value model
explains in each rollout, and where the policy ends. About five minutes per seed on one core.
"""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from dpo_lab.loop import LoopConfig
from dpo_lab.models import ScalarModel, end_tokens
from dpo_lab.rlhf.ppo import PPOConfig, train_ppo
from dpo_lab.rlhf.reward_model import (
    LearnedReward,
    RewardModelConfig,
    train_reward_model,
    value_model_from,
)
from dpo_lab.sentiment.task import Task, TaskConfig


@dataclass(frozen=True)
class ValueStartConfig:
    """What is trained."""

    seeds: int = 2
    """each has its own pairs, reward model and samples"""
    task: TaskConfig = field(default_factory=lambda: TaskConfig(prefixes=400, eval_prefixes=64))
    """the data"""
    reward_model: RewardModelConfig = field(
        default_factory=lambda: RewardModelConfig(
            loop=LoopConfig(learning_rate=1e-4, warmup_steps=2, eval_every=5)
        )
    )
    """its training"""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(steps=8, batch=128, minibatch=32, eval_every=8)
    )
    """the same for both starts"""


def main(config: ValueStartConfig) -> None:
    for seed in range(config.seeds):
        with tempfile.TemporaryDirectory() as folder:
            task = Task.open(replace(config.task, seed=seed), Path(folder))
            compare(config, task, seed)


def compare(config: ValueStartConfig, task: Task, seed: int) -> None:
    """Fit a reward model, and print a line for each start."""
    preferences, model = task.preferences, ScalarModel(task.new_policy())
    options = {"precision": task.precision, "seed": seed, "progress": None}
    train_reward_model(model, preferences, config.reward_model, **options)
    learned = LearnedReward(model, precision=task.precision)

    prompts = [preferences.prompts[i] for i in preferences.prompt_of]
    started = value_model_from(learned, prompts, preferences.completions)
    for name, value in {"zero head": ScalarModel(task.new_policy()), "reward": started}.items():
        policy = task.new_policy()
        lines = train_ppo(
            policy,
            task.reference,
            value,
            learned,
            preferences.prompts,
            config.ppo,
            eos_token_id=end_tokens(task.reference, task.tokenizer),
            **options,
        )
        explained = [line["value/explained"] for line in lines if "value/explained" in line]
        end = task.evaluate(policy)
        print(f"seed {seed}, {name}: explained", *(f"{part:.2f}" for part in explained), end="; ")
        print(f"reward {end.reward:.2f} ± {end.reward_se:.2f} at {end.kl:.1f} nats", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
