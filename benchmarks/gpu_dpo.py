"""Stage `dpo` of benchmarks/gpu.py: train a GPT-2 from scratch on IMDb, then follow the paper.

The protocol (Section 6 and Appendix C.1 of Rafailov et al. 2023), as far as time allows: prefixes
of IMDb reviews, 4 completions each, 6 pairs labeled by a sentiment classifier, RMSprop at 1e-6 with
batches of 64 pairs, beta 0.1. Here the reference is a model of GPT-2 small's shape with this
project's tokenizer, or GPT-2 itself where it is given; and then the embedded model.
"""

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import DatasetDict
from gpu import Report, Settings
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from dpo_lab.batching import CompletionBatch, completion_batch, pack
from dpo_lab.engine.runs import peak_memory_mb
from dpo_lab.loop import LoopConfig
from dpo_lab.models import load_model, load_tokenizer
from dpo_lab.preferences import Preferences
from dpo_lab.sentiment.pretrain import PretrainConfig, gpt2_config, held_out_loss
from dpo_lab.sentiment.reviews import load_imdb
from dpo_lab.sentiment.reward import SentimentReward
from dpo_lab.sentiment.run import CONFIGS
from dpo_lab.sentiment.task import Task, TaskConfig, prefixes_during
from dpo_lab.train import DPOConfig, train_dpo, train_sft


@dataclass(frozen=True)
class Size:
    """How large the stage is."""

    model: PretrainConfig
    """architecture and rows per step of the model that is trained from scratch"""
    prefixes: int
    """at most so many; fewer where the time is short"""
    eval_prefixes: int
    """held-out prefixes of the evaluations"""
    max_new_tokens: int
    """of a completion"""
    trial: int
    """prefixes of the trial that says how many fit into the time"""
    steps: int = 10**9
    """at most so many of the training from scratch; fewer where the time is short"""


MUON = LoopConfig(
    learning_rate=1e-3,
    optimizer="muon",
    schedule="linear",
    warmup_steps=20,
    weight_decay=0.05,
    eval_every=10**9,
)
FULL = Size(
    PretrainConfig(context=256, width=768, layers=12, heads=12, rows=64, loop=MUON),
    prefixes=25_000,
    eval_prefixes=1_024,
    max_new_tokens=48,
    trial=256,
)
TINY = Size(
    PretrainConfig(context=64, width=64, layers=2, heads=2, rows=4, loop=MUON),
    prefixes=12,
    eval_prefixes=8,
    max_new_tokens=6,
    trial=6,
    steps=6,
)
RESERVE = 0.25  # of the time of a run, for its evaluations and for an estimate that was too low


class Loaded(NamedTuple):
    """What a task would load."""

    reviews: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    reward: SentimentReward


class Watch:
    """Seconds of phases on the device, and its peak memory."""

    def __init__(self, device: str):
        self.device, self.seconds = device, {}
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def time(self, name: str, call: Any, *arguments: Any, **options: Any) -> Any:
        """Call it, and note how long it took."""
        began = time.perf_counter()
        result = call(*arguments, **options)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = round(time.perf_counter() - began, 2)
        return result

    @property
    def peak_mb(self) -> int:
        """Memory at its highest, of the GPU or of the process."""
        return round(
            torch.cuda.max_memory_allocated() / 1e6 if self.device == "cuda" else peak_memory_mb()
        )


def fit_reward(texts: list[str], labels: list[int]) -> str:
    """Fit the classifier into the cache, in a process of its own while the GPU trains."""
    return SentimentReward.tfidf(texts, labels).name


def pretrain(
    size: Size,
    reviews: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    seconds: float,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A GPT-2 of this size, trained from random weights for some seconds, and its description."""
    config, watch = size.model, Watch(device)
    set_seed(0)
    with torch.device(device):
        model = GPT2LMHeadModel(gpt2_config(replace(config, vocabulary=len(tokenizer))))
    rows = pack(
        tokenizer(list(reviews["train"]["text"]))["input_ids"],
        config.context,
        tokenizer.eos_token_id,
    )
    order = np.random.default_rng(0).permutation(len(rows))

    def batches(step: int) -> list[CompletionBatch]:
        some = [rows[order[(step * config.rows + i) % len(rows)]] for i in range(config.rows)]
        return [
            completion_batch([row[:1] for row in some], [row[1:] for row in some], range(len(some)))
        ]

    # the schedule must know the number of steps: as many as fit, by the pace of a few on a copy of
    # the weights
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trial = train_sft(model, batches, 8, config.loop, precision="bfloat16", progress=None)
    model.load_state_dict(first)
    pace = statistics.median(line["seconds"] for line in trial[3:])
    steps = max(4, min(size.steps, int(seconds / pace)))
    lines = watch.time(
        "train", train_sft, model, batches, steps, config.loop, precision="bfloat16", progress=None
    )
    held_out = list(reviews["test"]["text"][: size.eval_prefixes])
    found = watch.time("held-out loss", held_out_loss, model, tokenizer, held_out)
    return model, {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": steps * config.rows * config.context,
        "seconds_per_step": pace,
        "loss": [line["loss"] for line in (lines[0], lines[-1])],
        "held_out": found,
        "seconds": watch.seconds,
        "peak_memory_mb": watch.peak_mb,
    }


def paper(size: Size) -> DPOConfig:
    """The paper's settings of DPO, without checkpoints and with a few evaluations."""
    config = CONFIGS["paper"].dpo
    return replace(config, loop=replace(config.loop, eval_every=500, save_every=10**9))


def affordable(task: Task, size: Size, seconds: float) -> int:
    """Prefixes that fit into the time, by the pace of the few of `task`."""
    # sampling and labeling
    began = time.perf_counter()
    preferences = task.preferences
    each = (time.perf_counter() - began) / size.trial

    # and training on their pairs
    config = paper(size)
    lines = train_dpo(load_copy(task.reference), preferences, config, progress=None)
    step = statistics.median(line["seconds"] for line in lines[-10:])
    each += step * len(preferences.chosen) / size.trial / config.batch_pairs
    return max(size.trial, min(size.prefixes, int(seconds * (1 - RESERVE) / each)))


def load_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A policy with the weights of the reference."""
    with torch.device(model.device):
        copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def open_trial(name: str, loaded: Loaded, size: Size, device: str, work: Path) -> Task:
    """A task of a few prefixes with what is loaded already."""
    config = TaskConfig(
        device="cuda" if device == "cuda" else "cpu",
        model=name,
        prefixes=size.trial,
        eval_prefixes=size.eval_prefixes,
        max_new_tokens=size.max_new_tokens,
        precision="bfloat16",
    )
    task = Task.open(config, work / f"{name}-trial")
    task.reviews, task.tokenizer, task.initial, task.reward = loaded
    return task


def protocol(
    name: str, loaded: Loaded, size: Size, device: str, seconds: float, work: Path
) -> dict[str, Any]:
    """The paper's protocol from this model: reward and KL before and after, seconds, memory."""
    # as many prefixes as there is time for
    began, watch = time.perf_counter(), Watch(device)
    trial = open_trial(name, loaded, size, device, work)
    n = watch.time("trial", affordable, trial, size, seconds)
    task = trial.variant(work / name, prefixes=n)

    # data, and the evaluation before
    samples = watch.time("sample", lambda: task.samples)
    preferences: Preferences = watch.time("label", lambda: task.preferences)
    before = watch.time("evaluate", task.evaluate, task.reference)
    policy = load_copy(task.reference)

    def during(model: torch.nn.Module, step: int) -> dict[str, float]:
        if step == 0:
            return {}
        return task.evaluate(model, prefixes_during(len(task.held_out))).summary()

    # training, and the evaluation after
    lines = watch.time(
        "train", train_dpo, policy, preferences, paper(size), callback=during, progress=None
    )
    after = watch.time("evaluate after", task.evaluate, policy)

    steps = [line["seconds"] for line in lines if "seconds" in line]
    tokens = sum(len(ids) for row in samples["completions"] for ids in row)
    numbers = {
        "prefixes": n,
        "completions": task.config.completions,
        "eval_prefixes": len(task.held_out),
    }
    return {
        "config": asdict(paper(size)) | numbers,
        "pairs": preferences.report.pairs,
        "steps": len(steps),
        "before": before.summary(),
        "after": after.summary(),
        "curve": [
            {"step": line["step"]} | {k[5:]: v for k, v in line.items() if k != "step"}
            for line in lines
            if "eval/kl" in line
        ],
        "seconds_per_step": statistics.median(steps),
        "seconds_per_step_p90": float(np.quantile(steps, 0.9)),
        "pairs_per_second": 64 / statistics.median(steps),
        "sampled_tokens_per_second": tokens / watch.seconds["sample"],
        "seconds": watch.seconds | {"all": round(time.perf_counter() - began, 2)},
        "peak_memory_mb": watch.peak_mb,
        "samples": [list(pair) for pair in zip(before.texts[:3], after.texts[:3])],
    }


def run(settings: Settings, report: Report) -> None:
    size, device, work = TINY if settings.tiny else FULL, settings.device, settings.work
    reviews = load_imdb()
    if settings.tiny:
        reviews = DatasetDict({name: part.select(range(600)) for name, part in reviews.items()})
    texts, labels = list(reviews["train"]["text"]), list(reviews["train"]["label"])
    tokenizer, seconds = load_tokenizer("embedded"), settings.left

    # the classifier is fitted beside the training from scratch, which needs the GPU alone
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        fitting = pool.submit(fit_reward, texts, labels)
        if settings.model:
            reference, tokenizer = (
                load_model(settings.model, device=device),
                load_tokenizer(settings.model),
            )
        else:
            reference, found = pretrain(size, reviews, tokenizer, device, 0.42 * seconds)
            report.add("from scratch", found)
        fitting.result()
    reward = SentimentReward.tfidf(texts, labels)

    # the reference that was just made, then the embedded one in what is left of the time
    made = Loaded(reviews, tokenizer, reference, reward)
    report.attempt(
        "protocol", lambda: protocol("reference", made, size, device, 0.6 * settings.left, work)
    )
    embedded = made._replace(
        tokenizer=load_tokenizer("embedded"), model=load_model("embedded", device=device)
    )
    report.attempt(
        "protocol, embedded",
        lambda: protocol("embedded", embedded, size, device, settings.left - 5, work),
    )
