"""All pairs of a prompt as one element of a batch, or shuffled: what a reward model learns.

    python benchmarks/batch_element.py

InstructGPT's reason to keep the pairs of a prompt together (Section 3.5 of Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155). Rankings of 9 completions come from a noisy labeler: every
completion's reward gets an error, which is in all of its pairs. One pass over the prompts, or over
the same pairs in random order, with equally many pairs per step. Writes the loss on the pairs that
were trained on and on those of unseen prompts to runs/batch_element.json, and prints it. About two
minutes of one core.
"""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm.auto import tqdm

from dpo_lab.engine.runs import open_run, provenance, write_json
from dpo_lab.loop import LoopConfig, fit
from dpo_lab.models import ScalarModel
from dpo_lab.preferences import Preferences, plan_prompts
from dpo_lab.rlhf.ppo import text_reward
from dpo_lab.rlhf.reward_model import LearnedReward, RewardObjective
from dpo_lab.sentiment.task import Task, TaskConfig

RESULTS = Path("runs/batch_element.json")


@dataclass(frozen=True)
class BatchElementConfig:
    """What is ranked, and what is fitted to it."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """of the split, the labeler's errors and the order"""
    learning_rates: tuple[float, ...] = (1e-3,)
    """both ways are trained at each"""
    prompts: int = 16
    """to train on"""
    held_out: int = 16
    """others, for the loss on unseen pairs"""
    noise: float = 1.0
    """standard deviation of a labeler's error, in those of the reward's logit"""
    batch_pairs: int = 36
    """pairs per step: one whole prompt, or as many pairs"""
    task: TaskConfig = field(
        default_factory=lambda: TaskConfig(completions=9, eval_prefixes=8, precision="bfloat16")
    )
    """the rest of the data"""
    out: Path = Path("runs/batch_element")
    """where pairs and the measurements of each fit go; those that are there are kept"""


def main(config: BatchElementConfig, results: Path = RESULTS) -> None:
    origin = provenance()
    recorded = {name: value for name, value in asdict(config).items() if name != "out"}
    open_run(config.out, recorded, resume=True)
    asked = replace(config.task, prefixes=config.prompts + config.held_out)
    task = Task.open(asked, config.out / "data")

    # what is not there yet
    arms = list(product(config.seeds, config.learning_rates, (False, True)))
    paths = [config.out / f"seed{s}-{rate:g}-shuffled{way:d}.json" for s, rate, way in arms]
    for arm, path in zip(tqdm(arms), paths):
        if not path.exists():
            write_json(path, fitted(config, task, *arm))

    # all of it
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    write_json(results, {**origin, "config": recorded, "rows": rows})
    for row in rows:
        print({name: round(value, 4) for name, value in row.items()})


def fitted(
    config: BatchElementConfig, task: Task, seed: int, rate: float, shuffled: bool
) -> dict[str, Any]:
    """Fit one reward model in one pass: its losses and accuracies, and what that took."""
    rng = np.random.default_rng(seed)
    preferences = noisy(task, config.noise, rng)

    # some prompts are held out; shuffled, every pair is an element of its own
    groups = preferences.pairs_by_prompt()
    order = rng.permutation(len(groups))
    trained = [groups[g] for g in order[config.held_out :]]
    unseen = [pair for g in order[: config.held_out] for pair in groups[g]]
    elements = [[pair] for group in trained for pair in group] if shuffled else trained

    # one pass
    model = ScalarModel(task.new_policy())
    reward = LearnedReward(model, precision=task.precision)
    plan = plan_prompts(elements, 1, config.batch_pairs, seed)
    objective = RewardObjective(reward, preferences, elements, plan)
    loop = LoopConfig(learning_rate=rate, schedule="constant", warmup_steps=2)
    began = time.perf_counter()
    fit(model.eval(), objective, len(plan), loop, precision=task.precision, progress=None)
    row = {"seed": seed, "learning_rate": rate, "shuffled": shuffled, "steps": len(plan)}
    row["seconds"] = time.perf_counter() - began
    pairs = {"trained": [pair for group in trained for pair in group], "unseen": unseen}
    for name, some in pairs.items():
        row[f"{name}_loss"], row[f"{name}_accuracy"] = measured(reward, preferences, some)
    return row


def noisy(task: Task, noise: float, rng: np.random.Generator) -> Preferences:
    """The task's pairs, ordered by the logit of the reward and one error per completion."""
    p = task.preferences
    prompts = [p.prompts[i] for i in p.prompt_of]
    reward = np.clip(text_reward(task.reward, task.tokenizer)(prompts, p.completions), 1e-6, 1)
    logit = np.log(reward) - np.log1p(1e-6 - reward)
    told = logit + noise * logit.std() * rng.standard_normal(len(logit))
    wrong = told[p.chosen] < told[p.rejected]
    chosen, rejected = np.where(wrong, (p.rejected, p.chosen), (p.chosen, p.rejected))
    return replace(p, chosen=chosen, rejected=rejected)


def measured(
    reward: LearnedReward, preferences: Preferences, pairs: list[int]
) -> tuple[float, float]:
    """Loss in nats per pair, and the fraction in order; a tie is one half."""
    p = preferences
    used, chosen, rejected = p.completions_of(np.array(pairs))
    prompts = [p.prompts[p.prompt_of[i]] for i in used]
    scores = reward(prompts, [p.completions[i] for i in used])
    margins = scores[chosen] - scores[rejected]
    accuracy = np.mean((margins > 0) + (margins == 0) / 2)
    return float(np.logaddexp(0, -margins).mean()), float(accuracy)


if __name__ == "__main__":
    tyro.cli(main)
