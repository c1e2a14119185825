"""The paper's controlled-sentiment experiment (Section 6), in a run directory.

A task, DPO on it, and an evaluation before and after.
"""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_lab.engine.arguments import checked, finite_positive, settled
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.cpu import return_freed_memory
from dpo_lab.engine.distributed import from_main, print0
from dpo_lab.engine.escaping import for_markdown
from dpo_lab.engine.records import locked, require_free
from dpo_lab.engine.runs import (
    SNAPSHOTS,
    atomic_write,
    check_run,
    open_run,
    peak_memory_mb,
    provenance,
    read_config,
    read_snapshots,
    require_space,
    require_writable,
    write_json,
)
from dpo_lab.evaluate import Evaluation
from dpo_lab.facts import completion_facts
from dpo_lab.logprobs import score_completions
from dpo_lab.loop import LoopConfig
from dpo_lab.models import end_tokens, load_model, save_policy
from dpo_lab.plots import plot_frontier, plot_loss, plot_margins, plot_rewards
from dpo_lab.preferences import Preferences
from dpo_lab.sentiment.cost import Job, Plan, fitting_prompts, measure_speed, plan_job
from dpo_lab.sentiment.summaries import chat_prompt, dialogue_prompts, replies
from dpo_lab.sentiment.task import (
    FRONTIER,
    SNAPSHOT_PAIRS,
    Task,
    TaskConfig,
    check_task,
    prefixes_during,
    task_config,
)
from dpo_lab.theory.frontier import OptimalFrontier
from dpo_lab.train import DPOConfig, check_config, train_dpo

# a run that is made to fit into some minutes has at least so many prefixes, or reviews
FEWEST = {"prefix": 100, "summary": 16}

# what the reward of each kind of prompt is called
MEASURES = {"prefix": "P(positive)", "summary": "reward"}

# questions off the task that are asked before and after
DIALOGUES = 8

# about the length of a prefix with its completion
LABELED_LETTERS = 200


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides the result of `dpo-lab train`."""

    task: TaskConfig = field(default_factory=TaskConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)


def _laptop() -> DPOConfig:
    """DPO with adapters in the last two of four blocks; settings by benchmarks/sweep.py."""
    loop = LoopConfig(learning_rate=1e-3, eval_every=200)
    return DPOConfig(beta=0.35, batch_pairs=48, lora_rank=8, lora_layers=2, loop=loop)


def _gpu() -> DPOConfig:
    """DPO with adapters in all blocks of a larger model."""
    loop = LoopConfig(learning_rate=3e-4)
    return DPOConfig(beta=0.33, batch_pairs=64, lora_rank=8, loop=loop)


def _paper() -> DPOConfig:
    """DPO of all weights, as in Section 6.1 and Appendices B and C.1.

    Gradients are clipped at a norm of 1.0; the authors' code says 10.0.
    """
    loop = LoopConfig(
        learning_rate=1e-6,
        optimizer="rmsprop",
        schedule="constant",
        warmup_steps=150,
        eval_every=100,
    )
    return DPOConfig(beta=0.1, batch_pairs=64, loop=loop)


def _chat() -> DPOConfig:
    """DPO of a chat model with adapters, in a few steps; settings by benchmarks/chat.py."""
    loop = LoopConfig(learning_rate=5e-4, warmup_steps=2)
    return DPOConfig(beta=0.1, batch_pairs=24, lora_rank=8, epochs=3, loop=loop)


# what `--config` selects
CONFIGS = {
    "laptop": ExperimentConfig(task_config("laptop"), _laptop()),
    "gpu": ExperimentConfig(task_config("gpu"), _gpu()),
    "paper": ExperimentConfig(task_config("paper"), _paper()),
    "chat": ExperimentConfig(task_config("chat"), _chat()),
}


def check_minutes(minutes: float | None) -> None:
    """Raise ValueError unless `minutes` is a time, or None."""
    if minutes is not None:
        finite_positive("minutes", minutes)


def _job_of(config: ExperimentConfig, task: Task) -> Job:
    """The work of `train` with this config, for its plan."""
    sft_batch, sft_batches = task.planned_sft()
    beginnings = [text[:LABELED_LETTERS] for text in task.reviews["train"]["text"][:64]]
    return Job(
        task.initial,
        task.prompts,
        config.dpo,
        completions=task.config.completions,
        max_new_tokens=task.config.max_new_tokens,
        eval_prefixes=task.config.eval_prefixes,
        precision=task.precision,
        frontier=FRONTIER[task.config.prompt],
        snapshot_pairs=SNAPSHOT_PAIRS[task.config.prompt],
        sft=sft_batch,
        sft_batches=sft_batches,
        reward=task.reward,
        texts=beginnings,
    )


@checked
def plan_run(
    config: ExperimentConfig, out: Path, *, data: Path | None = None, minutes: float | None = None
) -> Plan:
    """The plan of `train` with the same arguments; nothing is written."""
    began = time.perf_counter()
    check_config(config.dpo)
    check_minutes(minutes)
    task = Task(
        config.task,
        data or out / "data",
        run=out,
        beta=config.dpo.beta,
        any_size=minutes is not None,
    )
    check_task(task.asked)
    task.load()
    return _planned(config, task, out, minutes, began)


def _planned(
    config: ExperimentConfig, task: Task, out: Path, minutes: float | None, began: float
) -> Plan:
    """The plan of a run; with `minutes`, of a new run that fits into them, from `began` on."""
    job = _job_of(config, task)
    speed = measure_speed(job)

    # how many prefixes there is time for
    begun = any((folder / "config.json").exists() for folder in (out, task.folder))
    if minutes is not None and not begun:
        left = 60 * minutes - (time.perf_counter() - began)
        least = min(FEWEST[task.asked.prompt], len(job.prompts))
        n = from_main(partial(fitting_prompts, job, speed, left, least=least))
        if n < (full := len(job.prompts)):
            print0(
                f"{n:,} prefixes, which take about {minutes:g} minutes on this machine; "
                f"the full run has {full:,}: --prefixes {full}"
            )
            task.resize(n)
            job = replace(job, prompts=task.prompts)
    return plan_job(job, speed)


@checked
def train(
    config: ExperimentConfig,
    out: Path,
    *,
    data: Path | None = None,
    resume: bool = False,
    minutes: float | None = None,
) -> dict[str, Any]:
    """The whole experiment into the run directory `out`; return its summary. A finished run is not
    repeated.

    Args:
        config: what decides the result.
        out: the run directory; new, or holding this config.
        data: the folder of the task; by default inside the run directory.
        resume: continue an interrupted run.
        minutes: take fewer prefixes where a new run would last longer on this machine; one that
            was begun keeps its number.

    Raises:
        ValueError: a bad config, a directory with another one, or one that another process uses.
    """
    # the task and its config, settled
    began = time.perf_counter()
    task = Task(
        config.task,
        data or out / "data",
        run=out,
        beta=config.dpo.beta,
        any_size=minutes is not None,
    )
    config = replace(config, task=task.asked)

    # a finished run is only looked up
    finished = out / "summary.json"
    if finished.exists():
        open_run(out, asdict(config), resume=True)
        return json.loads(finished.read_text(encoding="utf-8"))

    # nothing is loaded before the config and the directories are checked
    check_config(config.dpo)
    check_minutes(minutes)
    require_free(out, "run.lock")
    require_writable(out)
    task.check()
    check_run(out, asdict(config), resume=resume)

    # and nothing is written before everything is loaded, and fits
    origin = provenance()
    task.load()
    n_bytes = sum(p.numel() * p.element_size() for p in task.initial.parameters())
    require_space(out, 8 * n_bytes)
    expected = _planned(config, task, out, minutes, began)
    print0(expected)
    expected.check()

    # the run
    config = replace(config, task=task.config)
    open_run(out, asdict(config), resume=resume)
    with locked(out, "run.lock"):
        found = _trained(config, task, out, resume)
        summary = {**found, "seconds": round(time.perf_counter() - began, 1), **origin}
        write_json(finished, summary)
    return summary


def _trained(config: ExperimentConfig, task: Task, out: Path, resume: bool) -> dict[str, Any]:
    """Data, training and evaluation of a locked run; what its summary says of them."""
    # preferences by this very reference
    preferences = task.preferences
    task.check_reference()
    preferences = preferences.with_reference(task.reference, precision=task.precision)
    pairs, some = SNAPSHOT_PAIRS[config.task.prompt], prefixes_during(len(task.held_out))
    ends = end_tokens(task.reference, task.tokenizer)

    def during(model: torch.nn.Module, step: int) -> dict[str, float]:
        result = _evaluation(task, model, some) if step else before
        save_snapshot(out, step, model, preferences, result, pairs=pairs)
        return_freed_memory()
        return {
            "reward": result.reward,
            "reward_se": result.reward_se,
            "kl/sequence": result.kl,
            "kl/sequence_se": result.kl_se,
            **completion_facts(
                result.completions[:some],
                max_new_tokens=config.task.max_new_tokens,
                end_tokens=ends,
            ),
        }

    # before, training, after
    before = _evaluation(task, task.reference, progress="evaluate before")
    policy = task.new_policy()
    metrics = train_dpo(
        policy,
        preferences,
        config.dpo,
        seed=config.task.seed,
        run=out,
        resume=resume,
        callback=during,
        progress="train",
    )
    after = _evaluation(task, policy, progress="evaluate after")
    return_freed_memory()

    # what is kept
    save_policy(policy, task.tokenizer, out / "policy")
    save_samples(out, before, after, measure=MEASURES[config.task.prompt])
    if config.task.prompt == "summary":
        save_dialogue(out, task, policy)
    save_figures(out, metrics, after, task.frontier)
    return {
        "before": before.summary(),
        "after": after.summary(),
        "pairs": preferences.report.pairs,
        "report": asdict(preferences.report),
        "steps": metrics[-1]["step"],
        "peak_memory_mb": round(peak_memory_mb()),
        "seed": config.task.seed,
        "reference": _relative_to_run(out, task.reference_name),
        "reference_weights": weights_hash(task.reference),
    }


def _evaluation(
    task: Task, model: torch.nn.Module, n: int | None = None, *, progress: str | None = None
) -> Evaluation:
    """`task.evaluate`, after freed memory has gone back to the system."""
    return_freed_memory()
    return task.evaluate(model, n, progress=progress)


def _relative_to_run(run: Path, name: str) -> str:
    """A model's name for the record of `run`.

    A folder in the run by its path from there, so that both can be moved together.
    """
    inside = Path(name).is_absolute() and Path(name).resolve().is_relative_to(run.resolve())
    return Path(name).resolve().relative_to(run.resolve()).as_posix() if inside else name


def _reference_of(run: Path, recorded: str) -> str:
    """The model that a run recorded as its reference.

    By its path from the run, or by the path that it had when the run was made.
    """
    for folder in (run / recorded, run / "data" / "sft" / "model"):
        same = folder == run / recorded or Path(recorded).parts[-2:] == folder.parts[-2:]
        if folder.is_dir() and same:
            return str(folder.absolute())
    return recorded


@checked
def evaluate(run: Path, *, eval_prefixes: int | None = None) -> dict[str, Any]:
    """Evaluate the policy of a finished run again, on as many held-out prefixes as asked, into
    `evaluation.json`.

    Raises:
        ValueError: the run is not finished, or its reference has other weights now.
    """
    if not (run / "summary.json").exists() or not (run / "policy" / "config.json").exists():
        raise ValueError(
            f"{run} holds no finished run (summary.json and policy/); make one with "
            f"`dpo-lab train --out {run}`"
        )

    # the recorded task, with the number of prefixes that is asked for
    recorded = read_config(run)
    if "task" not in recorded:
        raise ValueError(
            f"{run} is a run on the data set {recorded.get('data')!r}; its summary.json has the "
            "evaluation on held-out pairs"
        )
    config = TaskConfig(**recorded["task"])
    config = settled(replace(config, eval_prefixes=eval_prefixes or config.eval_prefixes))
    require_writable(run)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))

    # what was its reference is the model, so there is no SFT left to do
    reference = _reference_of(run, summary["reference"])
    task = Task(replace(config, model=reference, sft_epochs=0), run / "data")
    check_task(task.asked)
    task.load()
    if summary.get("reference_weights") not in (None, weights_hash(task.reference)):
        raise ValueError(
            f"the reference of {run}, {task.reference.name_or_path!r}, has other weights now than "
            "when the run was made, so its KL would be from another model; put those back"
        )

    policy = load_model(str(run / "policy"), device=config.device)
    result = task.evaluate(policy, progress="evaluate")
    found = {**result.summary(), "prefixes": config.eval_prefixes, **provenance()}
    write_json(run / "evaluation.json", found)
    return found


@checked
def save_samples(
    out: Path | str,
    before: Evaluation,
    after: Evaluation,
    n: int = 20,
    *,
    measure: str = MEASURES["prefix"],
) -> None:
    """Write `samples.md` into `out`: `n` completions before and after, side by side.

    `measure` names the reward.
    """
    rows = [f"| before | {measure} | after | {measure} |", "|---|---|---|---|"]
    for b, rb, a, ra in list(zip(before.texts, before.rewards, after.texts, after.rewards))[:n]:
        rows.append(f"| {for_markdown(b)} | {rb:.2f} | {for_markdown(a)} | {ra:.2f} |")
    with atomic_write(out / "samples.md") as temporary:
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")


@checked
def save_dialogue(out: Path, task: Task, policy: torch.nn.Module, n: int = DIALOGUES) -> None:
    """Write `dialogue.md` into `out`: greedy answers of both models to `n` questions off the task.

    They show what training on summaries has changed elsewhere.
    """
    questions = dialogue_prompts()[:n]
    prompts = [chat_prompt(task.tokenizer, question) for question in questions]
    answers = [
        replies(
            model,
            task.tokenizer,
            prompts,
            temperature=0,
            max_new_tokens=task.config.max_new_tokens,
        )
        for model in (task.reference, policy)
    ]
    rows = ["| question | before | after |", "|---|---|---|"]
    for question, (before,), (after,) in zip(questions, *answers):
        rows.append("| " + " | ".join(map(for_markdown, (question, before, after))) + " |")
    with atomic_write(out / "dialogue.md") as temporary:
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")


@checked
def save_snapshot(
    out: Path,
    step: int,
    policy: torch.nn.Module,
    preferences: Preferences,
    result: Evaluation,
    *,
    pairs: int = SNAPSHOT_PAIRS["prefix"],
    texts: int = 8,
) -> None:
    """Add a line to `snapshots.jsonl`, in place of any from this step on: what the explorers of a
    recorded run show.

    `chosen` and `rejected` are the log-ratios (nats) of the same `pairs` pairs in every line,
    spread over the data.
    """
    # log-ratios of some pairs
    p, path = preferences, out / SNAPSHOTS
    some = np.linspace(0, len(p.chosen) - 1, min(pairs, len(p.chosen))).astype(int)
    ends = np.concatenate([p.chosen[some], p.rejected[some]])
    completions = [p.completions[i] for i in ends]
    logps = score_completions(
        policy, p.prompts, completions, p.prompt_of[ends], precision=p.reference_precision
    )
    chosen, rejected = np.split(logps.numpy() - p.reference_logps[ends], 2)

    # with the evaluation and its first texts
    line = {
        "step": step,
        "chosen": chosen.tolist(),
        "rejected": rejected.tolist(),
        "texts": result.texts[:texts],
        "rewards": result.rewards[:texts],
        "reward": result.reward,
        "kl": result.kl,
    }

    # after the lines of earlier steps
    earlier = [old for old in read_snapshots(out) if old["step"] < step] if path.exists() else []
    written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*earlier, line])
    with atomic_write(path) as temporary:
        temporary.write_text(written, encoding="utf-8")


@checked
def save_figures(
    out: Path, metrics: list[dict[str, Any]], after: Evaluation, frontier: OptimalFrontier
) -> None:
    """Loss, rewards and accuracy, margins, and reward against KL, as PNG under `figures/`."""
    # the evaluations during training, and the last one on all prefixes
    names = {
        "reward": "eval/reward",
        "reward_se": "eval/reward_se",
        "kl": "eval/kl/sequence",
        "kl_se": "eval/kl/sequence_se",
    }
    evaluations = [line for line in metrics if "eval/reward" in line]
    points = [{name: line[key] for name, key in names.items()} for line in evaluations]
    points[-1] = after.summary()

    figures = {
        "loss": plot_loss(metrics),
        "rewards": plot_rewards(metrics),
        "margins": plot_margins(metrics),
        "reward_kl": plot_frontier({"DPO": points}, frontier),
    }
    for name, figure in figures.items():
        with atomic_write(out / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png")
