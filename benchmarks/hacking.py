"""Push PPO against rewards learned from few pairs: the score that it is given, and the true reward.

    python benchmarks/hacking.py

Fits a reward model to the pairs of 25 prefixes, several times over, each time of other ones, and
lets PPO push each of them while its KL costs hardly anything. Writes dpo_lab/assets/hacking.json,
which notebook 04c draws. About eight minutes of one core.
"""

import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from torch import nn

from dpo_lab.assets import ASSETS
from dpo_lab.engine.runs import provenance, write_json
from dpo_lab.loop import LoopConfig
from dpo_lab.models import ScalarModel, end_tokens
from dpo_lab.rlhf.ppo import PPOConfig, train_ppo
from dpo_lab.rlhf.reward_model import LearnedReward, RewardModelConfig, train_reward_model
from dpo_lab.sentiment.task import Task, TaskConfig

RESULTS = ASSETS / "hacking.json"


@dataclass(frozen=True)
class HackingConfig:
    """How much to push what."""

    rewards: int = 4
    """reward models, each fitted to prefixes of its own"""
    prefixes: int = 25
    """of each"""
    prompts: int = 1_500
    """prefixes that PPO samples at"""
    task: TaskConfig = field(default_factory=lambda: TaskConfig(eval_prefixes=64))
    """the rest of the data"""
    reward_model: RewardModelConfig = field(
        default_factory=lambda: RewardModelConfig(
            epochs=4, loop=LoopConfig(learning_rate=1e-4, warmup_steps=2, eval_every=4)
        )
    )
    """of each"""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            steps=20, batch=64, minibatch=32, kl_coefficient=0.005, learning_rate=2e-4
        )
    )
    """a nat of KL costs a two-hundredth of a standard deviation of the reward"""


def main(config: HackingConfig, out: Path = RESULTS) -> None:
    origin = provenance()
    asked = replace(config.task, prefixes=config.rewards * config.prefixes)
    with tempfile.TemporaryDirectory() as folder:
        task = Task.open(asked, Path(folder))
        _ = task.preferences
    runs = [push(config, task, i) for i in range(config.rewards)]
    recorded = asdict(replace(config, task=task.config))
    write_json(out, {**origin, "config": recorded, "runs": runs})


def push(config: HackingConfig, task: Task, i: int) -> list[dict[str, Any]]:
    """Evaluations of PPO on the `i`-th reward.

    `given` is its score, in standard deviations on the reference's completions.
    """
    # a reward model, fitted to the pairs of its own prefixes
    preferences = task.preferences
    mine = preferences.prompt_of[preferences.chosen] // config.prefixes == i
    few = preferences.select(np.flatnonzero(mine))
    model = ScalarModel(task.new_policy())
    train_reward_model(
        model, few, config.reward_model, precision=task.precision, seed=i, progress=None
    )
    learned = LearnedReward(model, precision=task.precision)

    # its scale; one that never ranked held-out pairs better than chance is constant, as it began
    prompts = [preferences.prompts[p] for p in preferences.prompt_of]
    drawn = learned(prompts, preferences.completions)
    deviation, rows = drawn.std() or 1.0, []

    def evaluate(policy: nn.Module, step: int) -> dict[str, float]:
        found = task.evaluate(policy)
        scores = learned(task.held_out, found.completions)
        given = float((np.mean(scores) - drawn.mean()) / deviation)
        row = {
            "step": step,
            "given": given,
            "reward": found.reward,
            "reward_se": found.reward_se,
            "kl": found.kl,
        }
        rows.append({**row, "text": found.texts[0]})
        return {"given": given, "reward": found.reward, "kl": found.kl}

    train_ppo(
        task.new_policy(),
        task.reference,
        ScalarModel(task.new_policy()),
        learned,
        task.training_prefixes(config.prompts, i),
        replace(config.ppo, max_new_tokens=task.config.max_new_tokens),
        eos_token_id=end_tokens(task.reference, task.tokenizer),
        precision=task.precision,
        seed=i,
        callback=evaluate,
        progress=f"reward {i}",
    )
    return rows


if __name__ == "__main__":
    tyro.cli(main)
