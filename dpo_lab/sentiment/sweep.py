"""The paper's contenders on one task under one evaluation (Section 6.1 and Figure 2 of Rafailov et al. 2023): 22 runs.

DPO, PPO with a learned reward, PPO with the true one (PPO-GT), unlikelihood and Preferred-FT, from one reference and one set
of preferences; best-of-N and the reference itself need no training.
"""

import csv
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from tqdm.auto import tqdm

from dpo_lab.engine.arguments import checked, one_of
from dpo_lab.engine.cpu import keep_freed_memory
from dpo_lab.engine.distributed import launched
from dpo_lab.engine.records import locked, require_free
from dpo_lab.engine.runs import (
    atomic_write,
    check_run,
    open_run,
    peak_memory_mb,
    provenance,
    require_writable,
    write_json,
)
from dpo_lab.loop import LoopConfig, blocks_of, check_loop
from dpo_lab.models import ScalarModel, end_tokens, load_model
from dpo_lab.preferences import Preferences
from dpo_lab.rlhf.ppo import PPOConfig, Reward, check_ppo_config, text_reward, train_ppo
from dpo_lab.rlhf.reward_model import (
    LearnedReward,
    RewardModelConfig,
    check_reward_model,
    train_reward_model,
)
from dpo_lab.sampling import sample_completions, texts_of
from dpo_lab.sentiment.results import COLUMNS, Repeated, Run, paper_runs
from dpo_lab.sentiment.reviews import sample_prefixes
from dpo_lab.sentiment.task import (
    Parts,
    TaskConfig,
    check_reference,
    check_task,
    held_out_prefixes,
    initial_policy,
    label,
    load_parts,
    located,
    measured_precision,
    recorded_precision,
    sft,
    task_evaluation,
)
from dpo_lab.theory.frontier import best_of_n, frontier_band, optimal_frontier
from dpo_lab.train import (
    DPOConfig,
    check_alpha,
    check_config,
    check_epochs,
    train_dpo,
    train_unlikelihood,
)

BEST_OF = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class FrontierConfig:
    """The sweep."""

    task: TaskConfig = field(default_factory=lambda: TaskConfig(prefixes=2_400, eval_prefixes=256))
    """prefixes, completions, reward; the same preferences for every run"""
    batch_pairs: int = 64
    """pairs a step of DPO, unlikelihood and Preferred-FT; the paper's"""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(eval_every=128))
    """of DPO, unlikelihood and Preferred-FT"""
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(steps=20, eval_every=5))
    """of PPO and PPO-GT"""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """of PPO"""
    samples: int = 256
    """completions of the reference for each held-out prefix: best-of-N and the optimal frontier"""
    jobs: int | None = None
    """runs at a time, each in a process of its own with about 2 GB; by default one a CPU core, at most four, and one on a GPU"""


@checked
def frontier(
    config: FrontierConfig, out: Path, *, runs: list[Run] | None = None
) -> list[dict[str, Any]]:
    """Run every contender that has not finished yet, and write the evaluations of all finished runs to `out/frontier.csv`.

    Each run has a directory of its own under `out`; a run that was interrupted begins again, a finished one is kept.

    Raises:
        ValueError: a bad config, a directory with another one, or one in which another process is at work.
    """
    if launched() > 1:
        raise ValueError(
            f"frontier was launched {launched()} times; it starts processes of its own (jobs), so launch it once"
        )
    runs = paper_runs(config.task.seed) if runs is None else runs
    check_frontier(config, runs)
    began = time.perf_counter()
    origin, config = (
        provenance(),
        replace(config, task=recorded_precision(located(config.task), out)),
    )
    require_free(out, "frontier.lock")
    require_writable(out)
    check_run(out, settings(config), resume=True)
    todo = [run for run in runs if not (out / run.name / "rows.json").exists()]
    if todo or not (out / "baselines.json").exists():
        parts = load_parts(config.task)
        if config.loop.gradient_checkpointing or config.reward_model.loop.gradient_checkpointing:
            blocks_of(parts.reference)  # which says so where there are none
        config = replace(config, task=measured_precision(config.task, parts))
        open_run(out, settings(config), resume=True)
        with locked(out, "frontier.lock"):
            _run_all(config, parts, todo, len(runs), out, origin)
    reference = json.loads((out / "baselines.json").read_text(encoding="utf-8"))
    found = {
        file.parent.name: json.loads(file.read_text(encoding="utf-8"))
        for file in out.glob("*/rows.json")
    }
    finished = sorted(
        found, key=lambda name: [found[name]["rows"][0][k] for k in ("method", "setting", "seed")]
    )
    tables = [reference, *(found[name] for name in finished)]
    rows = [row for table in tables for row in table["rows"]]
    with (
        atomic_write(out / "frontier.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    kept = {
        name: {k: found[name][k] for k in ("samples", "scores", "peak_memory_mb")}
        for name in finished
    }
    origin |= {
        "commit": ", ".join(dict.fromkeys(table["commit"] for table in tables))
    }  # runs that were kept have their own
    seconds = round(time.perf_counter() - began) if len(todo) == len(found) else None
    write_json(
        out / "frontier.json",
        {
            **origin,
            "seconds": seconds,
            "config": settings(config),
            "optimal": reference["optimal"],
            "runs": kept,
        },
    )
    return rows


def _run_all(
    config: FrontierConfig,
    parts: Parts,
    todo: list[Run],
    total: int,
    out: Path,
    origin: dict[str, str],
) -> None:
    """The baselines and the runs that have not finished yet, of `total`, as many at a time as there are jobs."""
    preferences = label(config.task, out / "data", parts)
    parts = sft(config.task, out / "data", parts)
    check_reference(preferences, parts, out / "data")
    if any(run.method == "ppo" for run in todo):
        reward_model(config, preferences, out)
    jobs = config.jobs or (min(4, torch.get_num_threads()) if config.task.device == "cpu" else 1)
    with tqdm(desc="frontier", initial=total - len(todo), total=total, unit="run") as bar:
        if jobs == 1:
            for run in [None, *todo]:
                bar.update(finish(run, config, parts, preferences, out, origin))
        else:
            del parts, preferences
            threads = max(1, torch.get_num_threads() // jobs)
            with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
                tasks = [
                    pool.submit(finish_alone, run, config, out, origin, threads)
                    for run in [None, *todo]
                ]
                try:
                    for task in as_completed(tasks):
                        bar.update(task.result())
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise


@checked
def check_frontier(config: FrontierConfig, runs: list[Run]) -> None:
    """Raise ValueError for a value that the sweep or one of its runs cannot work with, named with what is allowed."""
    check_task(config.task)
    check_loop(config.loop)
    check_reward_model(config.reward_model)
    check_ppo_config(config.ppo)
    check_epochs(1, config.batch_pairs)
    if config.loop.tensorboard:
        raise ValueError(
            "tensorboard is on, and the runs of a sweep have no run directories to log to; switch it off"
        )
    if config.samples < BEST_OF[-1]:
        raise ValueError(
            f"samples is {config.samples}; it must be at least {BEST_OF[-1]}, for best-of-{BEST_OF[-1]}"
        )
    if config.jobs is not None and config.jobs < 1:
        raise ValueError(f"jobs is {config.jobs}; it must be at least 1, or None")
    for run in runs:
        one_of("method", run.method, Repeated)
        if run.method == "dpo":
            check_config(dpo_config(run, config))
        elif run.method in ("ppo", "ppo-gt"):
            check_ppo_config(ppo_config(run, config))
        else:
            check_alpha(run.setting)


@checked
def dpo_config(run: Run, config: FrontierConfig) -> DPOConfig:
    """What `train_dpo` does in this run."""
    return DPOConfig(beta=run.setting, batch_pairs=config.batch_pairs, loop=config.loop)


@checked
def ppo_config(run: Run, config: FrontierConfig) -> PPOConfig:
    """What `train_ppo` does in this run."""
    return replace(config.ppo, kl_target=run.setting, max_new_tokens=config.task.max_new_tokens)


@checked
def settings(config: FrontierConfig) -> dict[str, Any]:
    """What decides the results: the config without how many run at a time."""
    return {name: value for name, value in asdict(config).items() if name != "jobs"}


@checked
def finish_alone(
    run: Run | None, config: FrontierConfig, out: Path, origin: dict[str, str], threads: int
) -> int:
    """`finish` in a process of its own."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    parts = sft(config.task, out / "data")
    return finish(run, config, parts, label(config.task, out / "data", parts), out, origin)


@checked
def finish(
    run: Run | None,
    config: FrontierConfig,
    parts: Parts,
    preferences: Preferences,
    out: Path,
    origin: dict[str, str],
) -> int:
    """Run a contender, or the baselines for None, and write what it found; the number of contenders that it finished."""
    if run is None:
        if not (out / "baselines.json").exists():
            write_json(
                out / "baselines.json", {**baselines(config.task, parts, config.samples), **origin}
            )
        return 0
    result = finish_run(run, config, parts, preferences, out)
    write_json(
        out / run.name / "rows.json",
        {**result, "peak_memory_mb": round(peak_memory_mb()), **origin},
    )
    return 1


@checked
def finish_run(
    run: Run, config: FrontierConfig, parts: Parts, preferences: Preferences, out: Path
) -> dict[str, Any]:
    """Train one contender; a row for each of its evaluations, the first eight texts of the last with their rewards, and of PPO
    the mean score of every rollout: the reward that it was given, in standard deviations on the reference's completions."""
    task = config.task  # whose seed decides the evaluation, the same for every run
    prompts, rows, samples, began = held_out_prefixes(task, parts), [], [], time.perf_counter()
    spent = 0.0  # on evaluations, which no method is charged with
    policy = load_model(initial_policy(task, out / "data"), device=task.device)
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
        result = task_evaluation(task, parts, model, prompts)
        row = {
            "method": run.method,
            "setting": run.setting,
            "seed": run.seed,
            "step": step,
            "tokens": tokens,
        }
        row |= {
            "reward": result.reward,
            "reward_se": result.reward_se,
            "kl": result.kl,
            "kl_se": result.kl_se,
        }
        rows.append(row | {"seconds": round(start - began - spent, 1)})
        samples[:] = list(zip(result.texts, result.rewards))[:8]
        spent += time.perf_counter() - start
        return {"reward": result.reward, "kl": result.kl}

    scores: list[float] = []
    common: dict[str, Any] = {"callback": evaluate, "progress": None}
    one_of("method", run.method, Repeated)
    if run.method == "dpo":
        train_dpo(policy, preferences, dpo_config(run, config), seed=run.seed, **common)
    elif run.method in (
        "unlikelihood",
        "preferred-ft",
    ):  # Preferred-FT is unlikelihood with alpha = 0, which is its setting
        train_unlikelihood(
            policy,
            preferences,
            run.setting,
            config.loop,
            batch_pairs=config.batch_pairs,
            seed=run.seed,
            **common,
        )
    else:
        reward = text_reward(parts.reward, parts.tokenizer)
        if run.method == "ppo":
            reward = LearnedReward(reward_model(config, preferences, out), precision=task.precision)
        metrics = train_ppo(
            policy,
            parts.reference,
            ScalarModel(load_model(initial_policy(task, out / "data"), device=task.device)),
            counted(reward),
            sample_prefixes(
                list(parts.reviews["train"]["text"]), parts.tokenizer, task.prefixes, seed=run.seed
            ),
            ppo_config(run, config),
            eos_token_id=end_tokens(parts.reference, parts.tokenizer),
            precision=task.precision,
            seed=run.seed,
            **common,
        )
        scores = [line["objective/score"] for line in metrics if "objective/score" in line]
    return {"rows": rows, "samples": samples, "scores": scores}


@checked
def reward_model(config: FrontierConfig, preferences: Preferences, out: Path) -> ScalarModel:
    """The learned reward of all PPO runs, fitted to the preferences once and kept in `out/reward_model.safetensors`."""
    model = ScalarModel(
        load_model(initial_policy(config.task, out / "data"), device=config.task.device)
    )
    path = out / "reward_model.safetensors"
    if not path.exists():
        metrics = train_reward_model(
            model,
            preferences,
            config.reward_model,
            precision=config.task.precision,
            seed=config.task.seed,
        )
        with atomic_write(path) as temporary:
            save_weights(model, str(temporary))
        with atomic_write(out / "reward_model.jsonl") as temporary:
            temporary.write_text(
                "".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8"
            )
    load_weights(model, str(path))
    return model


@checked
def baselines(task: TaskConfig, parts: Parts, k: int) -> dict[str, Any]:
    """From `k` samples of each held-out prefix: rows of best-of-N for N = 1 (the SFT policy itself), 2, 4, ..., 16, and the
    optimal frontier with its 90 % band."""
    prompts = held_out_prefixes(task, parts)
    began = time.perf_counter()
    completions = sample_completions(
        parts.reference,
        prompts,
        k,
        eos_token_id=end_tokens(parts.reference, parts.tokenizer),
        max_new_tokens=task.max_new_tokens,
        seed=task.seed + 1,
        precision=task.precision,
    )
    texts = [text for row in texts_of(parts.tokenizer, prompts, completions) for text in row]
    scores = parts.reward(texts).reshape(len(prompts), k)
    per_sample = (time.perf_counter() - began) / len(texts)
    mean_tokens = sum(len(ids) for row in completions for ids in row) / len(texts)
    rows = []
    for n in BEST_OF:
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
    betas, at = np.geomspace(10, 0.001, 100), np.linspace(0, np.log(k), 60)
    optimal, band = optimal_frontier(scores, betas), frontier_band(scores, betas, at)
    low, high = (np.where(np.isfinite(end), end, None).tolist() for end in band)
    found = {name: array.tolist() for name, array in optimal._asdict().items()}
    return {"rows": rows, "optimal": {**found, "at": at.tolist(), "low": low, "high": high}}
