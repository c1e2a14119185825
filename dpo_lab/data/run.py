"""DPO on a public preference data set (Section 6 of the paper), in a run directory.

SFT on the chosen answers where there is no SFT model, DPO, and an evaluation on held-out pairs.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_lab.data.catalog import find_dataset
from dpo_lab.data.public import Style, load_preferences
from dpo_lab.engine.arguments import at_least, checked, finite_positive
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.cpu import return_freed_memory
from dpo_lab.engine.distributed import print0, setup
from dpo_lab.engine.escaping import for_markdown
from dpo_lab.engine.records import locked, require_free
from dpo_lab.engine.runs import (
    atomic_write,
    check_run,
    open_run,
    peak_memory_mb,
    provenance,
    require_space,
    require_writable,
    write_json,
)
from dpo_lab.engine.structure import context_of
from dpo_lab.evaluate import Evaluation, evaluate_pairs, evaluate_policy
from dpo_lab.facts import record_held_out
from dpo_lab.logprobs import Precision, can_compact
from dpo_lab.loop import LoopConfig
from dpo_lab.models import check_sampling, load_model, load_tokenizer, save_policy
from dpo_lab.plots import plot_loss, plot_margins, plot_rewards
from dpo_lab.preferences import Preferences, from_rows
from dpo_lab.train import DPOConfig, check_config, sft_batches, train_dpo, train_sft

# chosen answers per step of SFT
SFT_ROWS = 64

# rows that are tokenized together to see which fit
CHUNK = 1_000


@dataclass(frozen=True)
class PublicRunConfig:
    """Everything that decides the result of `dpo-lab train --data NAME`."""

    data: str = "hh"
    """a data set of `dpo_lab.data.DATASETS`, after a colon its part"""
    folder: str = ""
    """where it lies, laid out as on the hub; by default the Hugging Face cache, or the hub"""
    style: Style = "text"
    """messages are rendered by the chat template of the model"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where models run"""
    model: str = "embedded"
    """reference and initial policy: "embedded", a folder or a hub id"""
    pairs: int = 2_000
    """training pairs, drawn at random; 0 takes all"""
    held_out: int = 512
    """held-out pairs of the evaluation, drawn at random; 0 takes all"""
    max_completion_tokens: int = 96
    """answers are truncated at this length; pairs whose prompt leaves less room are dropped"""
    sampled: int = 64
    """held-out prompts that are answered before and after, for the sequence KL"""
    sft_epochs: int = 1
    """epochs of SFT on the chosen answers, which makes the reference; 0 for an SFT model"""
    sft_learning_rate: float = 1e-5
    """of SFT; falls to zero"""
    precision: Precision = "float32"
    """of sampling and training"""
    seed: int = 0
    """decides everything random"""
    dpo: DPOConfig = field(default_factory=DPOConfig)


@checked
def check_public_run(config: PublicRunConfig) -> None:
    """Raise ValueError for a value that no run can have, named with what is allowed."""
    find_dataset(config.data)
    check_config(config.dpo)
    least = {
        "pairs": 0,
        "held_out": 0,
        "max_completion_tokens": 1,
        "sampled": 2,
        "sft_epochs": 0,
        "seed": 0,
    }
    at_least(config, least)
    finite_positive("sft_learning_rate", config.sft_learning_rate)


@checked
def train_public(config: PublicRunConfig, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """SFT, DPO and evaluation on a public data set into the run directory `out`; its summary.

    A finished run is not repeated.

    Args:
        config: what decides the result.
        out: the run directory; new, or holding this config.
        resume: continue an interrupted run; the result is bit-identical.

    Raises:
        ValueError: a bad config, a directory with another one, or one that another process uses;
            too few pairs of the data set fit into the model's context.
        FileNotFoundError: the data set or the model is not on this machine nor on the hub.
    """
    began = time.perf_counter()
    check_public_run(config)
    config = _located(config)
    setup(config.device)

    # a finished run is only looked up
    finished = out / "summary.json"
    if finished.exists():
        open_run(out, asdict(config), resume=True)
        return json.loads(finished.read_text(encoding="utf-8"))

    # nothing is loaded before the directory is checked, nor written before all is loaded
    require_free(out, "run.lock")
    require_writable(out)
    check_run(out, asdict(config), resume=resume)
    origin, task = provenance(), PublicTask(config, out)
    n_bytes = sum(p.numel() * p.element_size() for p in task.initial.parameters())
    require_space(out, 8 * n_bytes)
    print0(task)

    # the run
    open_run(out, asdict(config), resume=resume)
    with locked(out, "run.lock"):
        summary = _trained(task, resume)
        summary |= {"seconds": round(time.perf_counter() - began, 1), **origin}
        write_json(finished, summary)
    return summary


def _located(config: PublicRunConfig) -> PublicRunConfig:
    """`config` with absolute paths: its record is read from other working directories."""
    places = {name: Path(getattr(config, name)).expanduser() for name in ("folder", "model")}
    found = {name: str(path.absolute()) for name, path in places.items() if path.exists()}
    return replace(config, **{name: path for name, path in found.items() if getattr(config, name)})


class PublicTask:
    """The data, the models and the evaluation of a run in `out`."""

    @checked
    def __init__(self, config: PublicRunConfig, out: Path):
        self.config, self.out = config, out
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model)
        self.initial: PreTrainedModel = load_model(config.model, device=config.device)
        check_sampling(self.initial, self.tokenizer)
        self.reports: dict[str, str] = {}
        self.train = self._drawn("train", config.pairs)
        self.test = self._drawn("test", config.held_out)

    def __str__(self) -> str:
        steps = len(self.train.steps(self.config.dpo.batch_pairs, epochs=self.config.dpo.epochs))
        lines = [f"{name}: {said}" for name, said in self.reports.items()]
        return "\n".join([*lines, f"{len(self.train.chosen):,} training pairs, {steps:,} steps"])

    def _drawn(self, split: Literal["train", "test"], n: int) -> Preferences:
        """`n` pairs of a split that fit into the context, drawn with the seed; or all that do."""
        config, context = self.config, context_of(self.initial)
        options = {"style": config.style, "folder": config.folder or None}
        loaded = load_preferences(config.data, split, **options)
        order = np.random.default_rng(config.seed).permutation(len(loaded))
        fitting = self._fitting([loaded[i] for i in order], context - config.max_completion_tokens)
        rows = list(islice(fitting, n or None))
        if len(rows) < 2:
            raise ValueError(
                f"of the {len(loaded)} pairs of {config.data} ({split}) {len(rows)} have a prompt "
                f"that leaves room for max_completion_tokens={config.max_completion_tokens} in the "
                f"model's context of {context}; lower it, or take a model with a longer context"
            )
        limit = config.max_completion_tokens
        found = from_rows(
            rows, self.tokenizer, context=context, max_completion_tokens=limit, bad="drop"
        )
        self.reports[split] = f"{loaded.report}; drawn: {replace(found.report, unread=())}"
        return found

    def _fitting(self, rows: list[dict[str, Any]], most: int) -> Iterator[dict[str, Any]]:
        """The rows whose prompt has fewer than `most` tokens, in their order."""
        for start in range(0, len(rows), CHUNK):
            some = rows[start : start + CHUNK]
            prompts = [row["prompt"] for row in some]
            if self.config.style == "messages":
                options = {"tokenize": False, "add_generation_prompt": True}
                prompts = [self.tokenizer.apply_chat_template(p, **options) for p in prompts]
            lengths = map(len, self.tokenizer(prompts, add_special_tokens=False)["input_ids"])
            yield from (row for row, length in zip(some, lengths) if length < most)

    @property
    def reference_name(self) -> str:
        """Where the reference's weights are: the model, or what SFT made of it."""
        tuned = (self.out / "sft" / "model").absolute()
        return str(tuned) if self.config.sft_epochs else self.config.model

    @cached_property
    def reference(self) -> PreTrainedModel:
        """The model after SFT on the chosen answers, as for dialogue in the paper (Section 6).

        Interrupted SFT continues at its last checkpoint.
        """
        config, tuned = self.config, Path(self.reference_name)
        if not config.sft_epochs:
            return self.initial
        if not tuned.exists():
            compact = can_compact(self.initial)
            batches = sft_batches(self.train, SFT_ROWS, compact=compact, seed=config.seed)
            steps = config.sft_epochs * len(batches)
            loop = LoopConfig(
                learning_rate=config.sft_learning_rate,
                warmup_steps=min(LoopConfig.warmup_steps, steps),
                gradient_accumulation_steps=config.dpo.loop.gradient_accumulation_steps,
                gradient_checkpointing=config.dpo.loop.gradient_checkpointing,
            )
            options = {"precision": config.precision, "run": self.out / "sft", "resume": True}
            train_sft(self.initial, batches, steps, loop, **options)
            save_policy(self.initial, self.tokenizer, tuned)
        self.__dict__.pop("initial")
        return load_model(str(tuned), device=config.device)

    @checked
    def with_reference(self, name: Literal["train", "test"]) -> Preferences:
        """The pairs of a split with the reference's log-probs, which are kept in `data`."""
        kept, pairs = self.out / "data" / name, getattr(self, name)
        if kept.exists():
            stored = Preferences.load(kept)
            if stored.tokens_hash() == pairs.tokens_hash():
                pairs = stored
        pairs = pairs.with_reference(
            self.reference, precision=self.config.precision, progress=f"reference, {name}"
        )
        pairs.save(kept)
        return pairs

    def sample(self, policy: PreTrainedModel, *, progress: str) -> Evaluation:
        """One answer to some held-out prompts, and the sequence KL; no reward is known."""
        prompts = self.test.prompts[: self.config.sampled]
        return evaluate_policy(
            policy,
            self.reference,
            prompts,
            lambda texts: np.zeros(len(texts)),
            self.tokenizer,
            max_new_tokens=self.config.max_completion_tokens,
            seed=self.config.seed,
            precision=self.config.precision,
            progress=progress,
        )


def _trained(task: PublicTask, resume: bool) -> dict[str, Any]:
    """SFT, training and evaluation of a locked run; what its summary says of them."""
    config, out = task.config, task.out
    train, test = task.with_reference("train"), task.with_reference("test")

    def during(model: PreTrainedModel, step: int) -> dict[str, float]:
        result = evaluate_pairs(model if step else None, test, config.dpo.beta)
        return_freed_memory()
        return {"accuracy": result.accuracy, "margin": result.margin}

    # before, training, after
    record_held_out(out, test)
    first = task.sample(task.reference, progress="sample before")
    policy = load_model(task.reference_name, device=config.device)
    metrics = train_dpo(
        policy,
        train,
        config.dpo,
        seed=config.seed,
        run=out,
        resume=resume,
        callback=during,
        progress="train",
    )
    last = task.sample(policy, progress="sample after")
    before, after = (evaluate_pairs(m, test, config.dpo.beta) for m in (None, policy))

    # what is kept
    save_policy(policy, task.tokenizer, out / "policy")
    _save_answers(task, first, last)
    for name, plot in (("loss", plot_loss), ("rewards", plot_rewards), ("margins", plot_margins)):
        with atomic_write(out / "figures" / f"{name}.png") as temporary:
            plot(metrics).savefig(temporary, format="png")
    return {
        "before": before.summary(),
        "after": {**after.summary(), "kl": last.kl, "kl_se": last.kl_se},
        "pairs": len(train.chosen),
        "reports": task.reports,
        "steps": metrics[-1]["step"],
        "peak_memory_mb": round(peak_memory_mb()),
        "seed": config.seed,
        "reference_weights": weights_hash(task.reference),
    }


def _save_answers(task: PublicTask, first: Evaluation, last: Evaluation, n: int = 20) -> None:
    """Write `samples.md`: held-out prompts with an answer before and after, side by side."""
    rows = ["| prompt | before | after |", "|---|---|---|"]
    for k, (before, after) in enumerate(list(zip(first.completions, last.completions))[:n]):
        texts = task.tokenizer.batch_decode(
            [task.test.prompts[k], before, after], skip_special_tokens=True
        )
        rows.append(f"| {' | '.join(map(for_markdown, texts))} |")
    with atomic_write(task.out / "samples.md") as temporary:
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")
