"""The paper's controlled-sentiment experiment (Section 6), step by step, each step cached in a directory."""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_lab.evaluate import Evaluation, OptimalFrontier, evaluate_policy, optimal_frontier
from dpo_lab.imdb import load_imdb, sample_completions, sample_prefixes, texts_of
from dpo_lab.layout import CompletionBatch, completion_batch
from dpo_lab.logprobs import score_completions
from dpo_lab.loop import LoopConfig
from dpo_lab.models import (
    check_sampling,
    context_of,
    end_tokens,
    load_model,
    load_tokenizer,
    measure_precision,
    return_freed_memory,
)
from dpo_lab.plan import Plan, plan
from dpo_lab.plots import plot_frontier, plot_loss, plot_margins, plot_rewards
from dpo_lab.preferences import Preferences, from_scores
from dpo_lab.pretrain import pack
from dpo_lab.processes import from_main, join, say
from dpo_lab.rewards import SentimentReward
from dpo_lab.runs import (
    SNAPSHOTS,
    open_run,
    peak_memory_mb,
    provenance,
    read_config,
    read_snapshots,
    require_space,
    write_json,
    write_whole,
)
from dpo_lab.train import DPOConfig, check_config, plan_prompts, train_dpo, train_sft

LONGEST_PREFIX = 8  # tokens; the paper's prefixes have 2 to 8
LANES = {
    "laptop": {"model": "embedded", "reward": "tfidf"},
    "gpu": {"model": "openai-community/gpt2-large", "reward": "siebert/sentiment-roberta-large-english"},
}


@dataclass(frozen=True)
class TaskConfig:
    """The data: prefixes, completions, and the reward that labels them."""

    lane: Literal["laptop", "gpu"] = "laptop"
    """laptop: the embedded GPT-2 and TF-IDF on the CPU; gpu: GPT-2 large and a RoBERTa classifier on CUDA"""
    model: str | None = None
    """reference and initial policy: "embedded", a folder or a hub id; by default the lane's"""
    reward: str | None = None
    """"tfidf", or a sequence classifier: a folder or a hub id; by default the lane's"""
    imdb: Literal["package", "hub"] = "package"
    """where the reviews come from"""
    prefixes: int = 2_600
    """training reviews whose first 2 to 8 tokens are prompts"""
    completions: int = 4
    """completions sampled a prefix; 4 give 6 pairs"""
    max_new_tokens: int = 48
    """longest completion"""
    eval_prefixes: int = 512
    """held-out prefixes of the evaluation before and after; a quarter of them during training"""
    sft_epochs: int = 0
    """epochs of SFT on the training reviews, before anything else, that make the reference; the embedded model has had them"""
    sft_learning_rate: float = 1e-5
    """of SFT; falls to zero"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of sampling and training (the evaluation's log-probs are float32); auto: bfloat16 where this machine is fast in it"""
    seed: int = 0
    """decides everything random"""

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return "cuda" if self.lane == "gpu" else "cpu"


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides the result of `dpo-lab train`."""

    task: TaskConfig = field(default_factory=TaskConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)


CONFIGS = {
    "laptop": ExperimentConfig(),
    "paper": ExperimentConfig(  # Section 6.1 and Appendices B and C.1
        TaskConfig(lane="gpu", imdb="hub", prefixes=25_000, sft_epochs=1),
        DPOConfig(
            beta=0.1,
            batch_pairs=64,
            loop=LoopConfig(learning_rate=1e-6, optimizer="rmsprop", schedule="constant", warmup_steps=150, eval_every=100),
        ),
    ),
}


@dataclass(frozen=True)
class Parts:
    """What every step needs, loaded and checked before anything is written."""

    reviews: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel
    reward: SentimentReward


def load_parts(config: TaskConfig) -> Parts:
    """Reviews, tokenizer, reference and reward of a task. Errors are those of the loaders."""
    if config.completions < 2 or config.max_new_tokens < 1 or config.prefixes < 1 or config.eval_prefixes < 8:
        raise ValueError(f"{config}: needs completions >= 2, max_new_tokens >= 1, prefixes >= 1 and eval_prefixes >= 8")
    if config.sft_epochs < 0 or not config.sft_learning_rate > 0:
        raise ValueError(
            f"sft_epochs is {config.sft_epochs} and sft_learning_rate {config.sft_learning_rate}; epochs must be 0 or more, the rate positive"
        )
    names = LANES[config.lane]
    name = config.model or names["model"]
    reference = load_model(name, device=config.device)
    tokenizer, context = load_tokenizer(name), context_of(reference)
    check_sampling(reference, tokenizer)
    if config.max_new_tokens + LONGEST_PREFIX + 1 > context:
        raise ValueError(
            f"max_new_tokens is {config.max_new_tokens}; with a prefix of {LONGEST_PREFIX} tokens and BOS the model's context of "
            f"{context} allows at most {context - LONGEST_PREFIX - 1}"
        )
    reviews = load_imdb(config.imdb)
    if config.eval_prefixes > (held_out := len(reviews["test"])):
        raise ValueError(
            f"eval_prefixes is {config.eval_prefixes}, and there are {held_out} held-out reviews; ask for at most as many"
        )
    if (reward := config.reward or names["reward"]) == "tfidf":
        judge = SentimentReward.tfidf(list(reviews["train"]["text"]), list(reviews["train"]["label"]))
    else:
        judge = SentimentReward.hub(reward, device=config.device)
    return_freed_memory()
    return Parts(reviews, tokenizer, reference, judge)


def recorded_precision(config: TaskConfig, *directories: Path) -> TaskConfig:
    """`config` with the precision that one of `directories` was begun in, where it asks for "auto"."""
    for directory in directories:
        if config.precision == "auto" and (directory / "config.json").exists():
            found = read_config(directory)
            config = replace(config, precision=found.get("task", found).get("precision", "auto"))
    return config


def measured_precision(config: TaskConfig, parts: Parts, beta: float = DPOConfig.beta) -> TaskConfig:
    """`config` with the precision that is faster here, where it asks for "auto"; prints the measurement."""
    if config.precision != "auto":
        return config
    rows = parts.tokenizer(list(parts.reviews["train"]["text"][:64]))["input_ids"]
    batch = completion_batch([row[:1] for row in rows], [row[1 : 1 + config.max_new_tokens] for row in rows], range(len(rows)))
    test = from_main(measure_precision, parts.reference, batch.to(config.device), beta)
    say(test)
    return replace(config, precision=test.choice)


def planned(config: ExperimentConfig, parts: Parts) -> Plan:
    """What `train` with this config will cost on this machine; its precision must be measured already."""
    task = config.task
    return plan(
        parts.reference,
        sample_prefixes(list(parts.reviews["train"]["text"]), parts.tokenizer, task.prefixes, seed=task.seed),
        config.dpo,
        completions=task.completions,
        max_new_tokens=task.max_new_tokens,
        eval_prefixes=task.eval_prefixes,
        precision=task.precision,
    )


def plan_run(config: ExperimentConfig, out: Path, *, data: Path | None = None) -> Plan:
    """The plan of `train` with the same arguments; nothing is written."""
    config = replace(config, task=recorded_precision(config.task, out, data or out / "data"))
    check_config(config.dpo)
    parts = load_parts(config.task)
    return planned(replace(config, task=measured_precision(config.task, parts, config.dpo.beta)), parts)


def data_config(config: TaskConfig) -> dict[str, Any]:
    """What decides samples and labels: the task without the size of its evaluation."""
    return {name: value for name, value in asdict(config).items() if name != "eval_prefixes"}


def initial_policy(config: TaskConfig, data: Path) -> str:
    """Where the weights come from that policy and reference begin with: the lane's model, or what `sft` made of it."""
    return str((data / "sft" / "model").absolute()) if config.sft_epochs else config.model or LANES[config.lane]["model"]


def sft(config: TaskConfig, data: Path, parts: Parts | None = None) -> Parts:
    """Fine-tune on the training reviews for `sft_epochs`, into `data/sft`, once; return the parts with that as the reference.

    Rows of at most 256 tokens, 64 a step. An interrupted call continues at its last checkpoint.
    """
    join(config.device)
    config = recorded_precision(config, data)
    parts = parts or load_parts(config)
    if not config.sft_epochs:
        return parts
    run, model = data / "sft", Path(initial_policy(config, data))
    if not model.exists():
        config = measured_precision(config, parts)
        tokenizer, length = parts.tokenizer, min(256, parts.reference.config.max_position_embeddings)
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        encoded = tokenizer(list(parts.reviews["train"]["text"]), add_special_tokens=False)["input_ids"]
        rows = pack([[start, *ids] for ids in encoded], length, tokenizer.eos_token_id)
        plan = plan_prompts([[0]] * len(rows), config.sft_epochs, 64, config.seed)
        loop = LoopConfig(learning_rate=config.sft_learning_rate, accumulate=8)
        open_run(data, data_config(config), resume=True)
        open_run(run, asdict(loop) | {"steps": len(plan)}, resume=True)

        def batches(step: int) -> list[CompletionBatch]:
            some = [rows[i] for i in plan[step]]
            return [completion_batch([row[:1] for row in some], [row[1:] for row in some], range(len(some)))]

        train_sft(parts.reference, batches, len(plan), loop, precision=config.precision, run=run, resume=True, progress="SFT")
        save_policy(parts.reference, tokenizer, model)
    return replace(parts, reference=load_model(str(model), device=config.device))


def sample(config: TaskConfig, data: Path, parts: Parts | None = None) -> dict[str, Any]:
    """Sample completions of training prefixes from the reference into `data/samples.json`; return what is in it."""
    join(config.device)
    path = data / "samples.json"
    config = recorded_precision(config, data)
    if (data / "config.json").exists() and path.exists():
        open_run(data, data_config(config), resume=True)
        return json.loads(path.read_text(encoding="utf-8"))
    parts = parts or load_parts(config)
    config = measured_precision(config, parts)
    require_space(data, 4_000 * config.prefixes * config.completions)
    prompts = sample_prefixes(list(parts.reviews["train"]["text"]), parts.tokenizer, config.prefixes, seed=config.seed)
    open_run(data, data_config(config), resume=True)
    parts = sft(config, data, parts)
    completions = sample_completions(
        parts.reference,
        prompts,
        config.completions,
        eos_token_id=end_tokens(parts.reference, parts.tokenizer),
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        precision=config.precision,
        progress="sample",
    )
    samples = {"prompts": prompts, "completions": completions, "texts": texts_of(parts.tokenizer, prompts, completions)}
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return samples


def label(config: TaskConfig, data: Path, parts: Parts | None = None) -> Preferences:
    """Turn samples into preferences by the reward, with reference log-probs, in `data/preferences`."""
    join(config.device)
    config = recorded_precision(config, data)
    if (data / "config.json").exists() and (data / "preferences").exists():
        open_run(data, data_config(config), resume=True)
        return Preferences.load(data / "preferences")
    parts = parts or load_parts(config)
    config = measured_precision(config, parts)
    samples = sample(config, data, parts)
    parts = sft(config, data, parts)
    flat = [text for row in samples["texts"] for text in row]
    scores = parts.reward(flat).reshape(len(samples["prompts"]), config.completions)
    preferences = from_scores(
        samples["prompts"],
        samples["completions"],
        scores,
        parts.tokenizer,
        context=context_of(parts.reference),
    ).with_reference(parts.reference, precision=config.precision, progress="reference log-probs")
    preferences.save(data / "preferences")
    return preferences


def train(config: ExperimentConfig, out: Path, *, data: Path | None = None, resume: bool = False) -> dict[str, Any]:
    """The whole experiment into the run directory `out`; return its summary. A finished run is not repeated."""
    join(config.task.device)
    began = time.perf_counter()
    finished, data = out / "summary.json", data or out / "data"
    config = replace(config, task=recorded_precision(config.task, out, data))
    if finished.exists():
        open_run(out, asdict(config), resume=True)
        return json.loads(finished.read_text(encoding="utf-8"))
    check_config(config.dpo)
    if (data / "config.json").exists():
        open_run(data, data_config(config.task), resume=True)
    origin = provenance()
    parts = load_parts(config.task)
    require_space(out, 8 * sum(p.numel() * p.element_size() for p in parts.reference.parameters()))
    config = replace(config, task=measured_precision(config.task, parts, config.dpo.beta))
    expected = planned(config, parts)
    say(expected)
    expected.check()
    open_run(out, asdict(config), resume=resume)
    preferences = label(config.task, data, parts)
    parts = sft(config.task, data, parts)
    preferences = preferences.with_reference(parts.reference, precision=config.task.precision)
    prompts = held_out_prefixes(config.task, parts)

    def evaluation(model: torch.nn.Module, n: int, progress: str | None = None) -> Evaluation:
        return_freed_memory()  # else what one phase kept in odd places adds to what the next one needs
        return evaluate_policy(
            model,
            parts.reference,
            prompts[:n],
            parts.reward,
            parts.tokenizer,
            max_new_tokens=config.task.max_new_tokens,
            seed=config.task.seed,
            precision=config.task.precision,
            progress=progress,
        )

    def during(model: torch.nn.Module, step: int) -> dict[str, float]:
        result = evaluation(model, max(8, len(prompts) // 4)) if step else before
        save_snapshot(out, step, model, preferences, result)
        return {"reward": result.reward, "reward_se": result.reward_se, "kl/sequence": result.kl, "kl/sequence_se": result.kl_se}

    before = evaluation(parts.reference, len(prompts), "evaluate before")
    policy = load_model(initial_policy(config.task, data), device=config.task.device)
    metrics = train_dpo(
        policy, preferences, config.dpo, seed=config.task.seed, run=out, resume=resume, evaluate=during, progress="train"
    )
    after = evaluation(policy, len(prompts), "evaluate after")
    save_policy(policy, parts.tokenizer, out / "policy")
    save_samples(out, before, after)
    save_figures(out, metrics, after, reference_frontier(config.task, parts, prompts))
    summary = {
        "before": _summary(before),
        "after": _summary(after),
        "pairs": preferences.report.pairs,
        "report": asdict(preferences.report),
        "steps": metrics[-1]["step"],
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory_mb": round(peak_memory_mb()),
        "seed": config.task.seed,
        "reference": initial_policy(config.task, data),
        **origin,
    }
    write_json(finished, summary)
    return summary


def evaluate(run: Path, *, eval_prefixes: int | None = None) -> dict[str, Any]:
    """Evaluate the trained policy of a run directory again, on as many held-out prefixes as asked, into `evaluation.json`."""
    if not (run / "summary.json").exists() or not (run / "policy" / "config.json").exists():
        raise ValueError(f"{run} holds no finished run (summary.json and policy/); make one with `dpo-lab train --out {run}`")
    recorded = json.loads((run / "config.json").read_text(encoding="utf-8"))
    task = TaskConfig(**recorded["task"])
    task = replace(task, eval_prefixes=eval_prefixes or task.eval_prefixes)
    join(task.device)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    parts = load_parts(replace(task, model=summary["reference"]))
    result = evaluate_policy(
        load_model(str(run / "policy"), device=task.device),
        parts.reference,
        held_out_prefixes(task, parts),
        parts.reward,
        parts.tokenizer,
        max_new_tokens=task.max_new_tokens,
        seed=task.seed,
        precision=task.precision,
        progress="evaluate",
    )
    summary = {**_summary(result), "prefixes": task.eval_prefixes, **provenance()}
    write_json(run / "evaluation.json", summary)
    return summary


def held_out_prefixes(config: TaskConfig, parts: Parts) -> list[list[int]]:
    """Prefixes of held-out reviews, the same for every seed but for `seed` itself."""
    return sample_prefixes(list(parts.reviews["test"]["text"]), parts.tokenizer, config.eval_prefixes, seed=config.seed)


def reference_frontier(config: TaskConfig, parts: Parts, prompts: list[list[int]]) -> OptimalFrontier:
    """The optimal reward-KL frontier, from 64 reference completions of 32 held-out prefixes."""
    few = prompts[:32]
    completions = sample_completions(
        parts.reference,
        few,
        64,
        eos_token_id=end_tokens(parts.reference, parts.tokenizer),
        max_new_tokens=config.max_new_tokens,
        seed=config.seed + 1,
        precision=config.precision,
        progress="optimal frontier",
    )
    texts = texts_of(parts.tokenizer, few, completions)
    scores = parts.reward([text for row in texts for text in row]).reshape(len(few), 64)
    return optimal_frontier(scores, np.geomspace(10, 0.02, 40))


def save_policy(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Model and tokenizer as `AutoModelForCausalLM` and `AutoTokenizer` load them, whole or not at all."""
    with write_whole(path, directory=True) as temporary:
        policy.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def save_samples(out: Path, before: Evaluation, after: Evaluation, n: int = 20) -> None:
    """The first `n` held-out prefixes with their completions before and after, side by side, as `samples.md`."""
    rows = ["| before | P(positive) | after | P(positive) |", "|---|---|---|---|"]
    for b, rb, a, ra in list(zip(before.texts, before.rewards, after.texts, after.rewards))[:n]:
        rows.append(f"| {b.replace('|', '/')} | {rb:.2f} | {a.replace('|', '/')} | {ra:.2f} |")
    with write_whole(out / "samples.md") as temporary:
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")


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
        policy, p.prompts, [p.completions[i] for i in ends], p.prompt_of[ends], precision=p.reference_precision
    )
    chosen, rejected = np.split(logps.numpy() - p.reference_logps[ends], 2)
    line = {"step": step, "chosen": chosen.tolist(), "rejected": rejected.tolist()}
    line |= {"texts": result.texts[:texts], "rewards": result.rewards[:texts], "reward": result.reward, "kl": result.kl}
    earlier = [old for old in read_snapshots(out) if old["step"] < step] if path.exists() else []
    with write_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*earlier, line]), encoding="utf-8")


def save_figures(out: Path, metrics: list[dict[str, Any]], after: Evaluation, frontier: OptimalFrontier) -> None:
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
        with write_whole(out / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png")


def _summary(result: Evaluation) -> dict[str, float]:
    return {"reward": result.reward, "reward_se": result.reward_se, "kl": result.kl, "kl_se": result.kl_se}
