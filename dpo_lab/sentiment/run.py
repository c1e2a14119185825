"""The paper's controlled-sentiment experiment (Section 6): a task, DPO on it, an evaluation, in a run directory."""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_lab.engine.arguments import checked, settled
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.cpu import return_freed_memory
from dpo_lab.engine.distributed import print0, setup
from dpo_lab.engine.escaping import for_markdown
from dpo_lab.engine.records import locked, require_free
from dpo_lab.engine.runs import (
    SNAPSHOTS,
    atomic_write,
    check_run,
    open_run,
    peak_memory_mb,
    provenance,
    read_snapshots,
    require_space,
    require_writable,
    write_json,
)
from dpo_lab.evaluate import Evaluation
from dpo_lab.logprobs import score_completions
from dpo_lab.loop import LoopConfig
from dpo_lab.models import load_model
from dpo_lab.plots import plot_frontier, plot_loss, plot_margins, plot_rewards
from dpo_lab.preferences import Preferences
from dpo_lab.sentiment.cost import Plan, plan
from dpo_lab.sentiment.reviews import sample_prefixes
from dpo_lab.sentiment.task import (
    Parts,
    TaskConfig,
    check_reference,
    check_task,
    data_config,
    held_out_prefixes,
    initial_policy,
    label,
    load_parts,
    located,
    measured_precision,
    planned_sft,
    recorded_precision,
    reference_frontier,
    save_policy,
    sft,
    task_evaluation,
)
from dpo_lab.theory.frontier import OptimalFrontier
from dpo_lab.train import DPOConfig, check_config, train_dpo


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides the result of `dpo-lab train`."""

    task: TaskConfig = field(default_factory=TaskConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)


CONFIGS = {
    "laptop": ExperimentConfig(  # benchmarks/sweep.py
        dpo=DPOConfig(beta=0.33, batch_pairs=64, lora_rank=8, loop=LoopConfig(learning_rate=3e-4))
    ),
    "paper": ExperimentConfig(  # Section 6.1 and Appendices B and C.1
        TaskConfig(lane="gpu", imdb="hub", prefixes=25_000, sft_epochs=1),
        DPOConfig(
            beta=0.1,
            batch_pairs=64,
            loop=LoopConfig(
                learning_rate=1e-6,
                optimizer="rmsprop",
                schedule="constant",
                warmup_steps=150,
                eval_every=100,
            ),
        ),
    ),
}


@checked
def planned(config: ExperimentConfig, parts: Parts) -> Plan:
    """What `train` with this config will cost on this machine; its precision must be measured already."""
    task = config.task
    sft_batch, sft_batches = planned_sft(task, parts)
    return plan(
        parts.reference,
        sample_prefixes(
            list(parts.reviews["train"]["text"]), parts.tokenizer, task.prefixes, seed=task.seed
        ),
        config.dpo,
        completions=task.completions,
        max_new_tokens=task.max_new_tokens,
        eval_prefixes=task.eval_prefixes,
        precision=task.precision,
        sft=sft_batch,
        sft_batches=sft_batches,
    )


@checked
def plan_run(config: ExperimentConfig, out: Path, *, data: Path | None = None) -> Plan:
    """The plan of `train` with the same arguments; nothing is written."""
    config = replace(
        config, task=recorded_precision(located(config.task), out, data or out / "data")
    )
    check_config(config.dpo)
    parts = load_parts(config.task)
    return planned(
        replace(config, task=measured_precision(config.task, parts, config.dpo.beta)), parts
    )


@checked
def train(
    config: ExperimentConfig, out: Path, *, data: Path | None = None, resume: bool = False
) -> dict[str, Any]:
    """The whole experiment into the run directory `out`; return its summary. A finished run is not repeated.

    Raises:
        ValueError: a bad config, a directory with another one, or one in which another process is at work.
    """
    setup(config.task.device)
    began = time.perf_counter()
    finished, data = out / "summary.json", data or out / "data"
    config = replace(config, task=recorded_precision(located(config.task), out, data))
    if finished.exists():
        open_run(out, asdict(config), resume=True)
        return json.loads(finished.read_text(encoding="utf-8"))
    check_config(config.dpo)
    check_task(config.task)
    require_free(out, "run.lock")
    for directory in (out, data):
        require_writable(directory)
    check_run(out, asdict(config), resume=resume)
    check_run(data, data_config(config.task), resume=True)
    origin = provenance()
    parts = load_parts(config.task)
    require_space(out, 8 * sum(p.numel() * p.element_size() for p in parts.reference.parameters()))
    config = replace(config, task=measured_precision(config.task, parts, config.dpo.beta))
    expected = planned(config, parts)
    print0(expected)
    expected.check()
    open_run(out, asdict(config), resume=resume)
    with locked(out, "run.lock"):
        found = _trained(config, out, data, parts, resume)
        summary = {**found, "seconds": round(time.perf_counter() - began, 1), **origin}
        write_json(finished, summary)
    return summary


def _trained(
    config: ExperimentConfig, out: Path, data: Path, parts: Parts, resume: bool
) -> dict[str, Any]:
    """Data, training and evaluation of a run whose directory is this process's; what its summary says of them."""
    preferences = label(config.task, data, parts)
    parts = sft(config.task, data, parts)
    check_reference(preferences, parts, data)
    preferences = preferences.with_reference(parts.reference, precision=config.task.precision)
    prompts = held_out_prefixes(config.task, parts)

    def evaluation(model: torch.nn.Module, n: int, progress: str | None = None) -> Evaluation:
        return_freed_memory()  # else what one phase kept in odd places adds to what the next one needs
        return task_evaluation(config.task, parts, model, prompts[:n], progress)

    def during(model: torch.nn.Module, step: int) -> dict[str, float]:
        result = evaluation(model, max(8, len(prompts) // 4)) if step else before
        save_snapshot(out, step, model, preferences, result)
        return_freed_memory()
        return {
            "reward": result.reward,
            "reward_se": result.reward_se,
            "kl/sequence": result.kl,
            "kl/sequence_se": result.kl_se,
        }

    before = evaluation(parts.reference, len(prompts), "evaluate before")
    policy = load_model(initial_policy(config.task, data), device=config.task.device)
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
    after = evaluation(policy, len(prompts), "evaluate after")
    return_freed_memory()
    save_policy(policy, parts.tokenizer, out / "policy")
    save_samples(out, before, after)
    save_figures(out, metrics, after, reference_frontier(config.task, parts, prompts))
    return {
        "before": _summary(before),
        "after": _summary(after),
        "pairs": preferences.report.pairs,
        "report": asdict(preferences.report),
        "steps": metrics[-1]["step"],
        "peak_memory_mb": round(peak_memory_mb()),
        "seed": config.task.seed,
        "reference": _from(out, initial_policy(config.task, data)),
        "reference_weights": weights_hash(parts.reference),
    }


def _from(run: Path, name: str) -> str:
    """A model's name for the record of `run`: a folder in it by its path from there, so that both can be moved."""
    inside = Path(name).is_absolute() and Path(name).resolve().is_relative_to(run.resolve())
    return Path(name).resolve().relative_to(run.resolve()).as_posix() if inside else name


def _reference_of(run: Path, recorded: str) -> str:
    """The model that a run recorded as its reference, by `_from` or by the path that it had when the run was made."""
    for folder in (run / recorded, run / "data" / "sft" / "model"):
        if folder.is_dir() and (
            Path(recorded).parts[-2:] == folder.parts[-2:] or folder == run / recorded
        ):
            return str(folder.absolute())
    return recorded


@checked
def evaluate(run: Path, *, eval_prefixes: int | None = None) -> dict[str, Any]:
    """Evaluate the trained policy of a run directory again, on as many held-out prefixes as asked, into `evaluation.json`.

    Raises:
        ValueError: the run is not finished, or its reference has other weights now.
    """
    if not (run / "summary.json").exists() or not (run / "policy" / "config.json").exists():
        raise ValueError(
            f"{run} holds no finished run (summary.json and policy/); make one with `dpo-lab train --out {run}`"
        )
    recorded = json.loads((run / "config.json").read_text(encoding="utf-8"))
    task = TaskConfig(**recorded["task"])
    task = settled(replace(task, eval_prefixes=eval_prefixes or task.eval_prefixes))
    require_writable(run)
    setup(task.device)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    parts = load_parts(replace(task, model=_reference_of(run, summary["reference"])))
    if summary.get("reference_weights") not in (None, weights_hash(parts.reference)):
        raise ValueError(
            f"the reference of {run}, {parts.reference.name_or_path!r}, has other weights now than when the run was made, so its KL "
            "would be from another model; put those back"
        )
    policy = load_model(str(run / "policy"), device=task.device)
    result = task_evaluation(task, parts, policy, held_out_prefixes(task, parts), "evaluate")
    summary = {**_summary(result), "prefixes": task.eval_prefixes, **provenance()}
    write_json(run / "evaluation.json", summary)
    return summary


@checked
def save_samples(out: Path | str, before: Evaluation, after: Evaluation, n: int = 20) -> None:
    """The first `n` held-out prefixes with their completions before and after, side by side, as `samples.md` in `out`."""
    rows = ["| before | P(positive) | after | P(positive) |", "|---|---|---|---|"]
    for b, rb, a, ra in list(zip(before.texts, before.rewards, after.texts, after.rewards))[:n]:
        rows.append(f"| {for_markdown(b)} | {rb:.2f} | {for_markdown(a)} | {ra:.2f} |")
    with atomic_write(out / "samples.md") as temporary:
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")


@checked
def save_snapshot(
    out: Path,
    step: int,
    policy: torch.nn.Module,
    preferences: Preferences,
    result: Evaluation,
    *,
    pairs: int = 128,
    texts: int = 8,
) -> None:
    """Add a line to `snapshots.jsonl`, in place of any from this step on: what the explorers of a recorded run show.

    `chosen` and `rejected` are the log-ratios (nats) of the same `pairs` pairs in every line, spread over the data.
    """
    p, path = preferences, out / SNAPSHOTS
    some = np.linspace(0, len(p.chosen) - 1, min(pairs, len(p.chosen))).astype(int)
    ends = np.concatenate([p.chosen[some], p.rejected[some]])
    logps = score_completions(
        policy,
        p.prompts,
        [p.completions[i] for i in ends],
        p.prompt_of[ends],
        precision=p.reference_precision,
    )
    chosen, rejected = np.split(logps.numpy() - p.reference_logps[ends], 2)
    line = {"step": step, "chosen": chosen.tolist(), "rejected": rejected.tolist()}
    line |= {
        "texts": result.texts[:texts],
        "rewards": result.rewards[:texts],
        "reward": result.reward,
        "kl": result.kl,
    }
    earlier = [old for old in read_snapshots(out) if old["step"] < step] if path.exists() else []
    with atomic_write(path) as temporary:
        temporary.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*earlier, line]),
            encoding="utf-8",
        )


@checked
def save_figures(
    out: Path, metrics: list[dict[str, Any]], after: Evaluation, frontier: OptimalFrontier
) -> None:
    """Loss, rewards and accuracy, margins, and reward against KL, as PNG under `figures/`."""
    points = [
        {
            "reward": m["eval/reward"],
            "reward_se": m["eval/reward_se"],
            "kl": m["eval/kl/sequence"],
            "kl_se": m["eval/kl/sequence_se"],
        }
        for m in metrics
        if "eval/reward" in m
    ]
    points[-1] = _summary(after)
    figures = {
        "loss": plot_loss(metrics),
        "rewards": plot_rewards(metrics),
        "margins": plot_margins(metrics),
        "reward_kl": plot_frontier({"DPO": points}, frontier),
    }
    for name, figure in figures.items():
        with atomic_write(out / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png")


def _summary(result: Evaluation) -> dict[str, float]:
    return {
        "reward": result.reward,
        "reward_se": result.reward_se,
        "kl": result.kl,
        "kl_se": result.kl_se,
    }
