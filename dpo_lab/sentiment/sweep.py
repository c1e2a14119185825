"""The paper's methods on one task under one evaluation (Section 6.1 and Figure 2 of Rafailov et al.
2023): 22 runs as there, divided among the methods by `paper_runs`.

DPO, PPO with a learned reward, PPO with the true one (PPO-GT), unlikelihood and Preferred-FT, from
one reference and one set of preferences; best-of-N and the reference itself need no training.
"""

import csv
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from tqdm.auto import tqdm

from dpo_lab.engine.arguments import checked, one_of
from dpo_lab.engine.cpu import tune_cpu
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
from dpo_lab.models import ScalarModel, end_tokens
from dpo_lab.rlhf.ppo import PPOConfig, Reward, check_ppo_config, text_reward, train_ppo
from dpo_lab.rlhf.reward_model import (
    LearnedReward,
    RewardModelConfig,
    check_reward_model,
    train_reward_model,
)
from dpo_lab.sentiment.results import COLUMNS, Repeated, Run, paper_runs
from dpo_lab.sentiment.task import Task, TaskConfig, check_task
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

# texts that are kept of each run's last evaluation
KEPT_TEXTS = 8


@dataclass(frozen=True)
class FrontierConfig:
    """The sweep."""

    task: TaskConfig = field(default_factory=lambda: TaskConfig(prefixes=2_400, eval_prefixes=256))
    """prefixes, completions, reward; the same preferences for every run"""
    batch_pairs: int = 64
    """pairs per step of DPO, unlikelihood and Preferred-FT; the paper's"""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(eval_every=128))
    """of DPO, unlikelihood and Preferred-FT"""
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(steps=20, eval_every=5))
    """of PPO and PPO-GT"""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """of PPO"""
    samples: int = 256
    """completions of the reference per held-out prefix, for best of N and the optimal frontier"""
    jobs: int | None = None
    """runs at a time, each a process of 2 GB; by default one per core, at most 4, one on a GPU"""


@checked
def frontier(
    config: FrontierConfig, out: Path, *, runs: list[Run] | None = None
) -> list[dict[str, Any]]:
    """Do every run that has not finished yet, and write the evaluations of all finished runs to
    `out/frontier.csv`.

    Each run has its own directory under `out`; an interrupted run begins again, a finished one is
    kept.

    Raises:
        ValueError: a bad config, a directory with another one, or one that another process uses.
    """
    if launched() > 1:
        raise ValueError(
            f"frontier was launched {launched()} times; it starts processes of its own (jobs), so "
            "launch it once"
        )

    # config and directory, checked before anything is loaded
    runs = paper_runs(config.task.seed) if runs is None else runs
    check_frontier(config, runs)
    began, origin = time.perf_counter(), provenance()
    task = Task(config.task, out / "data", run=out)
    config = replace(config, task=task.asked)
    require_free(out, "frontier.lock")
    require_writable(out)
    check_run(out, settings(config), resume=True)

    # the runs that are left
    todo = [run for run in runs if not (out / run.name / "rows.json").exists()]
    if todo or not (out / "baselines.json").exists():
        task.load()
        if config.loop.gradient_checkpointing or config.reward_model.loop.gradient_checkpointing:
            # which says so where there are none
            blocks_of(task.initial)
        config = replace(config, task=task.config)
        open_run(out, settings(config), resume=True)
        with locked(out, "frontier.lock"):
            _finish_all(config, task, todo, len(runs), out, origin)

    found = _finished(out)
    seconds = round(time.perf_counter() - began) if len(todo) == len(found) else None
    return _write_tables(config, out, found, origin, seconds)


def _finished(out: Path) -> dict[str, dict[str, Any]]:
    """What every finished run found, by the name of its directory, in order of methods."""
    found = {
        file.parent.name: json.loads(file.read_text(encoding="utf-8"))
        for file in out.glob("*/rows.json")
    }
    order = ("method", "setting", "seed")
    names = sorted(found, key=lambda name: [found[name]["rows"][0][key] for key in order])
    return {name: found[name] for name in names}


def _write_tables(
    config: FrontierConfig,
    out: Path,
    found: dict[str, dict[str, Any]],
    origin: dict[str, str],
    seconds: int | None,
) -> list[dict[str, Any]]:
    """Write `frontier.csv` and `frontier.json`; return the evaluations."""
    reference = json.loads((out / "baselines.json").read_text(encoding="utf-8"))
    tables = [reference, *found.values()]
    rows = [row for table in tables for row in table["rows"]]

    # the evaluations
    with (
        atomic_write(out / "frontier.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)

    # runs that were kept have commits of their own
    commits = ", ".join(dict.fromkeys(table["commit"] for table in tables))
    kept = {
        name: {key: run[key] for key in ("samples", "scores", "peak_memory_mb")}
        for name, run in found.items()
    }
    written = {
        **origin,
        "commit": commits,
        "seconds": seconds,
        "config": settings(config),
        "optimal": reference["optimal"],
        "runs": kept,
    }
    write_json(out / "frontier.json", written)
    return rows


def _finish_all(
    config: FrontierConfig,
    task: Task,
    todo: list[Run],
    total: int,
    out: Path,
    origin: dict[str, str],
) -> None:
    """Finish the baselines and the runs that are left of `total`, some at a time."""
    # what the runs share is made first
    _ = task.preferences
    task.check_reference()
    if any(run.method == "ppo" for run in todo):
        reward_model(config, task, out)

    work = [finish_baselines, *(partial(finish_run, run) for run in todo)]
    jobs = config.jobs or (min(4, torch.get_num_threads()) if config.task.device == "cpu" else 1)
    with tqdm(desc="frontier", initial=total - len(todo), total=total, unit="run") as bar:
        # in this process, one after the other
        if jobs == 1:
            for one in work:
                bar.update(one(config, task, out, origin))
            return

        # or each in its own, which loads the task itself
        task.release()
        threads = max(1, torch.get_num_threads() // jobs)
        with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
            started = [pool.submit(finish_alone, one, config, out, origin, threads) for one in work]
            try:
                for finished in as_completed(started):
                    bar.update(finished.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@checked
def check_frontier(config: FrontierConfig, runs: list[Run]) -> None:
    """Raise ValueError for a value that no run can have, named with what is allowed."""
    check_task(config.task)
    check_loop(config.loop)
    check_reward_model(config.reward_model)
    check_ppo_config(config.ppo)
    check_epochs(1, config.batch_pairs)
    if config.loop.tensorboard:
        raise ValueError(
            "tensorboard is on, and the runs of a sweep have no run directories to log to; "
            "switch it off"
        )
    if config.samples < BEST_OF[-1]:
        raise ValueError(
            f"samples is {config.samples}; it must be at least {BEST_OF[-1]}, "
            f"for best-of-{BEST_OF[-1]}"
        )
    if config.task.prompt != "prefix":
        raise ValueError(
            f"prompt is {config.task.prompt!r}; the sweep compares methods on prefixes of reviews, "
            "so it must be 'prefix': give --config laptop, gpu or paper"
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
    finish: Callable[..., int],
    config: FrontierConfig,
    out: Path,
    origin: dict[str, str],
    threads: int,
) -> int:
    """`finish_baselines` or `finish_run` in a process of its own."""
    torch.set_num_threads(threads)
    tune_cpu()
    return finish(config, Task(config.task, out / "data"), out, origin)


@checked
def finish_baselines(config: FrontierConfig, task: Task, out: Path, origin: dict[str, str]) -> int:
    """Write what the reference's samples say, unless it is there; 0, for no run finished."""
    path = out / "baselines.json"
    if not path.exists():
        write_json(path, {**baselines(task, config.samples), **origin})
    return 0


@checked
def finish_run(
    run: Run, config: FrontierConfig, task: Task, out: Path, origin: dict[str, str]
) -> int:
    """Do a run and write what it found; 1, the number of runs that this finishes."""
    found = train_run(run, config, task, out)
    found = {**found, "peak_memory_mb": round(peak_memory_mb()), **origin}
    write_json(out / run.name / "rows.json", found)
    return 1


class Evaluations:
    """The callback of a run: evaluates its policy, and keeps a row for each evaluation.

    Rows have the columns `COLUMNS`; seconds leave out the evaluations themselves, which no method
    is charged with.
    """

    def __init__(self, run: Run, task: Task):
        self.run, self.task = run, task
        self.rows: list[dict[str, Any]] = []
        self.samples: list[tuple[str, float]] = []
        self.tokens = 0
        self._began, self._spent = time.perf_counter(), 0.0

    def __call__(self, model: torch.nn.Module, step: int) -> dict[str, float]:
        start = time.perf_counter()
        result = self.task.evaluate(model)

        # the row, and the first texts with their rewards
        row = {
            "method": self.run.method,
            "setting": self.run.setting,
            "seed": self.run.seed,
            "step": step,
            "tokens": self.tokens,
            **result.summary(),
            "seconds": round(start - self._began - self._spent, 1),
        }
        self.rows.append(row)
        self.samples = list(zip(result.texts, result.rewards))[:KEPT_TEXTS]

        self._spent += time.perf_counter() - start
        return {"reward": result.reward, "kl": result.kl}

    def counted(self, reward: Reward) -> Reward:
        """`reward`, with the tokens of the completions that it scores counted."""

        def score(prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
            self.tokens += sum(map(len, completions))
            return reward(prompts, completions)

        return score


@checked
def train_run(run: Run, config: FrontierConfig, task: Task, out: Path) -> dict[str, Any]:
    """Train a policy by one method: `rows`, a row per evaluation, and `samples`, the first texts of
    the last one.

    `scores` are PPO's: the mean of the reward it was given in every rollout, in standard deviations
    on the reference's completions.
    """
    one_of("method", run.method, Repeated)
    preferences, evaluations, scores = task.preferences, Evaluations(run, task), []

    # PPO samples its own completions
    if run.method.startswith("ppo"):
        scores = _train_ppo(run, config, task, evaluations, out)
        return {"rows": evaluations.rows, "samples": evaluations.samples, "scores": scores}

    # the others read those of the preferences
    evaluations.tokens = sum(map(len, preferences.completions))
    policy, options = (
        task.new_policy(),
        {"seed": run.seed, "callback": evaluations, "progress": None},
    )
    if run.method == "dpo":
        train_dpo(policy, preferences, dpo_config(run, config), **options)
    else:
        # Preferred-FT is unlikelihood with alpha = 0, which is its setting
        train_unlikelihood(
            policy,
            preferences,
            run.setting,
            config.loop,
            batch_pairs=config.batch_pairs,
            **options,
        )
    return {"rows": evaluations.rows, "samples": evaluations.samples, "scores": scores}


def _train_ppo(
    run: Run, config: FrontierConfig, task: Task, evaluations: Evaluations, out: Path
) -> list[float]:
    """PPO against the true reward or a learned one; the mean score of every rollout."""
    policy = task.new_policy()
    reward = text_reward(task.reward, task.tokenizer)
    if run.method == "ppo":
        reward = LearnedReward(reward_model(config, task, out), precision=task.precision)

    metrics = train_ppo(
        policy,
        task.reference,
        ScalarModel(task.new_policy()),
        evaluations.counted(reward),
        task.training_prefixes(config.task.prefixes, run.seed),
        ppo_config(run, config),
        eos_token_id=end_tokens(task.reference, task.tokenizer),
        precision=task.precision,
        seed=run.seed,
        callback=evaluations,
        progress=None,
    )
    return [line["objective/score"] for line in metrics if "objective/score" in line]


@checked
def reward_model(config: FrontierConfig, task: Task, out: Path) -> ScalarModel:
    """The learned reward of all PPO runs, fitted once and kept in `reward_model.safetensors`."""
    model, path = ScalarModel(task.new_policy()), out / "reward_model.safetensors"
    if not path.exists():
        metrics = train_reward_model(
            model,
            task.preferences,
            config.reward_model,
            precision=task.precision,
            seed=config.task.seed,
        )
        with atomic_write(path) as temporary:
            save_weights(model, str(temporary))
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        with atomic_write(out / "reward_model.jsonl") as temporary:
            temporary.write_text(lines, encoding="utf-8")
    load_weights(model, str(path))
    return model


@checked
def baselines(task: Task, k: int) -> dict[str, Any]:
    """What `k` samples of the reference per held-out prefix say, without training.

    Rows of best-of-N for N = 1 (the reference itself), 2, 4, ..., 16, and the optimal frontier with
    its 90 % band.
    """
    # draw and score them
    began = time.perf_counter()
    scores, completions = task.score_reference(task.held_out, k)
    n = scores.size
    seconds_each = (time.perf_counter() - began) / n
    tokens_each = sum(len(ids) for row in completions for ids in row) / n

    rows = [_best_of_row(task, scores, best_of, seconds_each, tokens_each) for best_of in BEST_OF]

    # the optimum at each beta, and the band of its reward at each KL
    betas, at = np.geomspace(10, 0.001, 100), np.linspace(0, np.log(k), 60)
    optimal, band = optimal_frontier(scores, betas), frontier_band(scores, betas, at)
    low, high = (np.where(np.isfinite(end), end, None).tolist() for end in band)
    found = {name: array.tolist() for name, array in optimal._asdict().items()}
    return {"rows": rows, "optimal": {**found, "at": at.tolist(), "low": low, "high": high}}


def _best_of_row(
    task: Task, scores: np.ndarray, n: int, seconds_each: float, tokens_each: float
) -> dict[str, Any]:
    """The row of best-of-N; its KL is at most log N - (N - 1) / N."""
    best, prompts = best_of_n(scores, n), len(scores)
    return {
        "method": "best-of-n" if n > 1 else "sft",
        "setting": n,
        "seed": task.asked.seed,
        "step": 0,
        "reward": float(best.mean()),
        "reward_se": float(best.std(ddof=1) / len(best) ** 0.5),
        "kl": float(np.log(n) - (n - 1) / n),
        "kl_se": 0.0,
        "seconds": round(n * seconds_each * prompts, 2),
        "tokens": round(n * tokens_each * prompts),
    }
