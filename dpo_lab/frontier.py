"""The paper's contenders on one task under one evaluation (Section 6.1 and Figure 2 of Rafailov et al. 2023): 22 runs.

DPO, PPO with a learned reward, PPO with the true one (PPO-GT), unlikelihood and Preferred-FT, from one reference and one set
of preferences; best-of-N and the reference itself need no training.
"""

import csv
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from tqdm.auto import tqdm

from dpo_lab.evaluate import best_of_n, evaluate_policy
from dpo_lab.experiment import (
    LANES,
    Parts,
    TaskConfig,
    held_out_prefixes,
    label,
    load_parts,
    measured_precision,
    recorded_precision,
)
from dpo_lab.imdb import sample_completions, sample_prefixes, texts_of
from dpo_lab.logprobs import can_share
from dpo_lab.models import ScalarModel, load_model
from dpo_lab.ppo import PPOConfig, Reward, text_reward, train_ppo
from dpo_lab.preferences import Preferences
from dpo_lab.reward_model import LearnedReward, RewardModelConfig, train_reward_model
from dpo_lab.runs import open_run, provenance, write_json, write_whole
from dpo_lab.train import DPOConfig, LoopConfig, sft_batches, train_dpo, train_sft, train_unlikelihood

BETAS, TARGETS, ALPHAS, SEEDS = (0.05, 0.1, 1.0, 5.0), (3.0, 6.0, 9.0, 12.0), (0.05, 0.1, 0.5, 1.0), (0, 1, 2, 3, 4, 5)
COLUMNS = ("method", "setting", "seed", "step", "reward", "reward_se", "kl", "kl_se", "seconds", "tokens")


@dataclass(frozen=True)
class Contender:
    """One run: a method, what is varied of it, and a seed."""

    method: str
    setting: float
    seed: int

    @property
    def name(self) -> str:
        """What its directory is called."""
        return f"{self.method}-{self.setting:g}-seed{self.seed}"


def contenders(seed: int = 0) -> list[Contender]:
    """The paper's 22 runs: beta of DPO, target KL of PPO and PPO-GT, alpha of unlikelihood, seeds of Preferred-FT."""
    grid = {"dpo": BETAS, "ppo": TARGETS, "ppo-gt": TARGETS, "unlikelihood": ALPHAS}
    runs = [Contender(method, setting, seed) for method, settings in grid.items() for setting in settings]
    return runs + [Contender("preferred-ft", 0.0, seed + i) for i in SEEDS]


@dataclass(frozen=True)
class FrontierConfig:
    """The sweep."""

    task: TaskConfig = field(default_factory=lambda: TaskConfig(eval_prefixes=256))
    """prefixes, completions, reward; the same preferences for every run"""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(eval_every=20))
    """of DPO, unlikelihood and Preferred-FT"""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """of PPO and PPO-GT"""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """of PPO"""


def frontier(config: FrontierConfig, out: Path, *, runs: list[Contender] | None = None) -> list[dict[str, Any]]:
    """Run every contender that has not finished yet, and write all their evaluations to `out/frontier.csv`.

    Each run has a directory of its own under `out`; a run that was interrupted begins again, a finished one is kept.
    """
    runs = contenders(config.task.seed) if runs is None else runs
    origin, config = provenance(), replace(config, task=recorded_precision(config.task, out))
    if (out / "config.json").exists():
        open_run(out, asdict(config), resume=True)
    todo = [run for run in runs if not (out / run.name / "rows.json").exists()]
    if todo:
        parts = load_parts(config.task)
        config = replace(config, task=measured_precision(config.task, parts))
        open_run(out, asdict(config), resume=True)
        preferences = label(config.task, out / "data", parts)
        for run in tqdm(todo, desc="frontier", initial=len(runs) - len(todo), total=len(runs), unit="run"):
            rows = run_contender(run, config, parts, preferences, out)
            write_json(out / run.name / "rows.json", {"rows": rows, **origin})
        if not (out / "baselines.json").exists():
            write_json(out / "baselines.json", {"rows": baselines(config.task, parts), **origin})
    files = [out / "baselines.json", *(out / run.name / "rows.json" for run in runs)]
    rows = [row for file in files if file.exists() for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    with write_whole(out / "frontier.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    write_json(out / "frontier.json", {"rows": len(rows), **origin})
    return rows


def run_contender(
    run: Contender, config: FrontierConfig, parts: Parts, preferences: Preferences, out: Path
) -> list[dict[str, Any]]:
    """Train one contender and return a row for each of its evaluations."""
    task = config.task  # whose seed decides the evaluation, the same for every run
    prompts, rows, began = held_out_prefixes(task, parts), [], time.perf_counter()
    spent = 0.0  # on evaluations, which no method is charged with
    policy = load_model(task.model or LANES[task.lane]["model"], device=task.device)
    tokens = sum(map(len, preferences.completions)) if not run.method.startswith("ppo") else 0

    def counted(reward: Reward) -> Reward:
        def score(prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
            nonlocal tokens
            tokens += sum(map(len, completions))
            return reward(prompts, completions)

        return score

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        nonlocal spent
        start = time.perf_counter()
        result = evaluate_policy(
            model,
            parts.reference,
            prompts,
            parts.reward,
            parts.tokenizer,
            max_new_tokens=task.max_new_tokens,
            seed=task.seed,
            precision=task.precision,
        )
        row = {"method": run.method, "setting": run.setting, "seed": run.seed, "step": step, "tokens": tokens}
        row |= {"reward": result.reward, "reward_se": result.reward_se, "kl": result.kl, "kl_se": result.kl_se}
        rows.append(row | {"seconds": round(start - began - spent, 1)})
        spent += time.perf_counter() - start
        return {"reward": result.reward, "kl": result.kl}

    common: dict[str, Any] = {"evaluate": evaluate, "progress": run.name}
    if run.method == "dpo":
        train_dpo(policy, preferences, DPOConfig(beta=run.setting, loop=config.loop), seed=run.seed, **common)
    elif run.method == "unlikelihood":
        train_unlikelihood(policy, preferences, run.setting, config.loop, seed=run.seed, **common)
    elif run.method == "preferred-ft":
        batches = sft_batches(preferences, 64, share=can_share(policy), seed=run.seed)
        train_sft(policy, batches, len(batches), config.loop, precision=task.precision, **common)
    else:
        reward = text_reward(parts.reward, parts.tokenizer)
        if run.method == "ppo":
            reward = LearnedReward(reward_model(config, preferences, out), precision=task.precision)
        train_ppo(
            policy,
            parts.reference,
            ScalarModel(load_model(task.model or LANES[task.lane]["model"], device=task.device)),
            counted(reward),
            sample_prefixes(list(parts.reviews["train"]["text"]), parts.tokenizer, task.prefixes, seed=run.seed),
            replace(config.ppo, kl_target=run.setting, max_new_tokens=task.max_new_tokens),
            eos_token_id=parts.tokenizer.eos_token_id,
            precision=task.precision,
            seed=run.seed,
            **common,
        )
    return rows


def reward_model(config: FrontierConfig, preferences: Preferences, out: Path) -> ScalarModel:
    """The learned reward of all PPO runs, fitted to the preferences once and kept in `out/reward_model.safetensors`."""
    model = ScalarModel(load_model(config.task.model or LANES[config.task.lane]["model"], device=config.task.device))
    path = out / "reward_model.safetensors"
    if not path.exists():
        metrics = train_reward_model(
            model, preferences, config.reward_model, precision=config.task.precision, seed=config.task.seed
        )
        with write_whole(path) as temporary:
            save_weights(model, str(temporary))
        with write_whole(out / "reward_model.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    load_weights(model, str(path))
    return model


def baselines(task: TaskConfig, parts: Parts, k: int = 64) -> list[dict[str, Any]]:
    """Best-of-N of the reference for N = 1 (the SFT policy itself), 2, 4, ..., 16, from `k` samples of each held-out prefix."""
    prompts = held_out_prefixes(task, parts)
    began = time.perf_counter()
    completions = sample_completions(
        parts.reference,
        prompts,
        k,
        eos_token_id=parts.tokenizer.eos_token_id,
        max_new_tokens=task.max_new_tokens,
        seed=task.seed + 1,
        precision=task.precision,
        progress="best of N",
    )
    texts = [text for row in texts_of(parts.tokenizer, prompts, completions) for text in row]
    scores = parts.reward(texts).reshape(len(prompts), k)
    per_sample = (time.perf_counter() - began) / len(texts)
    mean_tokens = sum(len(ids) for row in completions for ids in row) / len(texts)
    rows = []
    for n in (1, 2, 4, 8, 16):
        best = best_of_n(scores, n)
        rows.append(
            {
                "method": "best-of-n" if n > 1 else "sft",
                "setting": n,
                "seed": task.seed,
                "step": 0,
                "reward": float(best.mean()),
                "reward_se": float(best.std(ddof=1) / len(best) ** 0.5),
                "kl": float(np.log(n) - (n - 1) / n),
                "kl_se": 0.0,
                "seconds": round(n * per_sample * len(prompts), 2),
                "tokens": round(n * mean_tokens * len(prompts)),
            }
        )
    return rows
