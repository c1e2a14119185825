"""A small run of DPO as a user makes one: data, training and evaluation in a run directory.

    run = healthy(Path("runs/healthy"), seed=1)

The directory holds what `train_dpo(run=...)` writes there, the pairs that it was trained on in
`data/preferences`, held-out pairs in `data/held_out`, and the config in `config.json`. The metrics
have evaluations under `eval/`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_lab.batching import CompletionBatch
from dpo_lab.engine.arguments import checked
from dpo_lab.engine.arguments import folder as a_folder
from dpo_lab.engine.checkpoints import save_checkpoint
from dpo_lab.engine.records import training_run, weights_record
from dpo_lab.engine.runs import append_metrics, open_run
from dpo_lab.evaluate import evaluate_policy
from dpo_lab.facts import completion_facts, record_facts, record_held_out
from dpo_lab.health.run_size import SMALL, RunSize
from dpo_lab.logprobs import score_completions
from dpo_lab.loop import LoopConfig, evaluates, make_optimizers, some_weights
from dpo_lab.models import load_model, load_tokenizer
from dpo_lab.preferences import Preferences, from_scores
from dpo_lab.sampling import sample_completions, texts_of
from dpo_lab.sentiment.reviews import load_imdb, sample_prefixes
from dpo_lab.sentiment.reward import SentimentReward
from dpo_lab.train import DPOConfig, DPOObjective, pairs_hash, train_dpo

Kind = Literal["prefix", "sentence"]
"""What a completion is: the next tokens of a review, or all of them up to a full stop."""

Label = Callable[[Sequence[str], Sequence[Sequence[int]]], np.ndarray]
"""What labels pairs: from N texts and the token ids of their completions to scores (N,)."""

ScoreBatch = Callable[[nn.Module, CompletionBatch], Tensor]
"""From N completions to their log-probs (N,), by a model."""


def small_config(
    size: RunSize, *, learning_rate: float = 5e-5, beta: float = 0.1, epochs: int = 2
) -> DPOConfig:
    """How a small run is trained; the defaults are those of a healthy one."""
    loop = LoopConfig(
        learning_rate=learning_rate,
        schedule="constant",
        warmup_steps=4,
        eval_every=9,
        save_every=10_000,
    )
    return DPOConfig(beta=beta, epochs=epochs, batch_pairs=size.batch_pairs, loop=loop)


@functools.cache
def judged() -> tuple[list[str], list[str], SentimentReward]:
    """Training reviews, held-out reviews, and P(positive) as fitted to the former."""
    reviews = load_imdb()
    texts = list(reviews["train"]["text"])
    return (
        texts,
        list(reviews["test"]["text"]),
        SentimentReward.tfidf(texts, list(reviews["train"]["label"])),
    )


def positive(texts: Sequence[str], completions: Sequence[Sequence[int]]) -> np.ndarray:
    """P(positive) of each text, (N,)."""
    return judged()[2](texts)


class SmallTask:
    """Prompts, completions of the reference and their texts: what all runs of a seed share.

    Args:
        kind: "prefix", or "sentence", in which the full stop is the EOS token.
        seed: decides prompts and samples.
        size: how many.
    """

    @checked
    def __init__(self, kind: Kind, seed: int, size: RunSize):
        self.kind, self.seed, self.size = kind, seed, size
        self.tokenizer, self.limit = load_tokenizer(), size.max_new_tokens
        if kind == "sentence":
            self.tokenizer.eos_token, self.limit = ".", 3 * size.max_new_tokens // 2
        self.reference = self.new_policy()

        # prompts of both splits
        train, test, _ = judged()
        self.prompts = sample_prefixes(train, self.tokenizer, size.prefixes, seed=seed)
        drawn = sample_prefixes(
            test, self.tokenizer, size.held_out + size.eval_prefixes, seed=1_000 + seed
        )
        self.held_out, self.eval_prompts = drawn[: size.held_out], drawn[size.held_out :]

    @property
    def end(self) -> int:
        """The token that ends a completion."""
        return int(self.tokenizer.eos_token_id)

    def new_policy(self) -> PreTrainedModel:
        """The embedded model, which stops at this task's end token."""
        model = load_model()
        model.generation_config.eos_token_id = self.end
        return model

    @functools.cached_property
    def samples(self) -> list[list[list[int]]]:
        """Completions of the training prompts."""
        return self.sample(self.reference, self.prompts, seed=self.seed)

    @functools.cached_property
    def held_out_samples(self) -> list[list[list[int]]]:
        """Completions of the held-out prompts."""
        return self.sample(self.reference, self.held_out, seed=2_000 + self.seed)

    def sample(
        self, model: nn.Module, prompts: list[list[int]], *, seed: int
    ) -> list[list[list[int]]]:
        """Completions of `prompts` by `model`; of sentences as many of those that end."""
        k = self.size.completions
        drawn = sample_completions(
            model,
            prompts,
            k if self.kind == "prefix" else 2 * k,
            eos_token_id=self.end,
            max_new_tokens=self.limit,
            seed=seed,
        )
        if self.kind == "prefix":
            return drawn
        return [[ids for ids in row if ids[-1] == self.end][:k] for row in drawn]

    def texts(self, prompts: list[list[int]], completions: list[list[list[int]]]) -> list[str]:
        """Prompt and completion of each sample as one text."""
        return [text for row in texts_of(self.tokenizer, prompts, completions) for text in row]

    def pairs(
        self,
        label: Label = positive,
        *,
        prompts: list[list[int]] | None = None,
        completions: list[list[list[int]]] | None = None,
    ) -> Preferences:
        """All pairs of the samples of a prompt as `label` ranks them, by default of training."""
        prompts = self.prompts if prompts is None else prompts
        completions = self.samples if completions is None else completions
        flat = [ids for row in completions for ids in row]
        scores = label(self.texts(prompts, completions), flat)
        counts = np.cumsum([len(row) for row in completions])[:-1]
        return from_scores(
            prompts, completions, np.split(scores, counts), self.tokenizer, context=256
        )


@functools.lru_cache(maxsize=4)
def small_task(kind: Kind, seed: int, size: RunSize) -> SmallTask:
    """The task of a seed, made once."""
    return SmallTask(kind, seed, size)


@dataclass(frozen=True)
class Setup:
    """Everything that a run is made of. A fault is a change of one part."""

    task: SmallTask
    policy: PreTrainedModel
    """what is trained"""
    preferences: Preferences
    """the pairs that it is trained on, with reference log-probs"""
    held_out: Preferences
    """pairs that it is evaluated on, with reference log-probs"""
    config: DPOConfig
    label: Label = positive
    """what labels pairs, and is reported as the reward"""
    score: ScoreBatch | None = None
    """how a loop written by hand computes log-probs; None for `train_dpo`"""
    updated: nn.Module | None = None
    """the model whose weights that loop updates; None for the policy"""


@checked
def set_up(
    *,
    seed: int = 0,
    size: RunSize = SMALL,
    kind: Kind = "prefix",
    config: DPOConfig | None = None,
    label: Label = positive,
) -> Setup:
    """What a healthy run is made of."""
    task = small_task(kind, seed, size)
    held_out = task.pairs(label, prompts=task.held_out, completions=task.held_out_samples)
    return Setup(
        task,
        task.new_policy(),
        task.pairs(label).with_reference(task.reference),
        held_out.with_reference(task.reference),
        config or small_config(size),
        label,
    )


@checked
def healthy(
    folder: Path | str,
    *,
    seed: int = 0,
    size: RunSize = SMALL,
    kind: Kind = "prefix",
    beta: float = 0.1,
    learning_rate: float = 5e-5,
    epochs: int = 2,
) -> Path:
    """Make a small run without a fault; its directory.

    Args:
        folder: the run directory; new or empty.
        seed: of prompts, samples and order.
        size: how many of them.
        kind: "prefix" (completions of a fixed length) or "sentence" (which end).
        beta: strength of the KL constraint.
        learning_rate: peak learning rate of AdamW.
        epochs: passes over the pairs.
    """
    config = small_config(size, learning_rate=learning_rate, beta=beta, epochs=epochs)
    return make_run(set_up(seed=seed, size=size, kind=kind, config=config), folder)


def make_run(setup: Setup, folder: Path | str) -> Path:
    """Train and evaluate what is set up, in the run directory `folder`.

    Raises:
        ValueError: the directory is not empty.
    """
    run = a_folder("folder", folder)
    task = setup.task
    described = {"model": "embedded", "prompt": task.kind, "seed": task.seed, **asdict(task.size)}
    open_run(run, {"task": described, "dpo": asdict(setup.config)}, resume=False)
    setup.preferences.save(run / "data" / "preferences")
    setup.held_out.save(run / "data" / "held_out")
    record_held_out(run, setup.held_out)

    callback = functools.partial(evaluation, setup)
    if setup.score is None:
        options = {"seed": task.seed, "run": run, "callback": callback, "progress": None}
        train_dpo(setup.policy, setup.preferences, setup.config, **options)
    else:
        train_by_hand(setup, run, callback)
    return run


def train_by_hand(setup: Setup, run: Path, callback: Callable) -> None:
    """DPO by a loop of one's own, which does not notice what `train_dpo` would refuse."""
    config, policy, preferences = setup.config, setup.policy, setup.preferences

    def describe() -> dict[str, Any]:
        found = {"method": "DPO", "config": asdict(config), "seed": setup.task.seed}
        found |= {"precision": preferences.reference_precision, "data": pairs_hash(preferences)}
        return found | weights_record(policy)

    objective = DPOObjective(policy, preferences, config, setup.task.seed)
    optimizers = make_optimizers(setup.updated or policy, config.loop)
    steps = len(objective.plan)

    with training_run(run, describe, resume=False, logps=preferences.reference_logps):
        record_facts(run, policy, preferences, steps=steps)
        _log_evaluation(run, callback, policy, 0)
        for step in range(1, steps + 1):
            evaluating = evaluates(step, steps, config.loop)
            looks = step == 1 or evaluating

            # forward and backward
            (micro,) = objective.micro_batches(step - 1, 1)
            loss, sums = objective.loss(functools.partial(setup.score, policy), micro)
            pairs = objective.weight(micro)
            (loss / pairs).backward()
            line = {"loss": loss.item() / pairs}
            line |= {name: float(value) / pairs for name, value in sums.items()}

            # warm-up, clip, update
            rate = config.loop.learning_rate * min(1, step / config.loop.warmup_steps)
            norm = nn.utils.clip_grad_norm_(policy.parameters(), config.loop.max_grad_norm)
            before = some_weights(policy) if looks else {}
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
            policy.zero_grad()
            if looks:
                line["weights/changed"] = _changed(before, some_weights(policy))

            # log and evaluate
            line |= {"grad_norm": float(norm), "learning_rate": rate}
            append_metrics(run, {"step": step, **line})
            if evaluating:
                _log_evaluation(run, callback, policy, step)
        save_checkpoint(run, steps, policy, optimizers)


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """The fraction of weights that a step changed."""
    differ = [(before[name] != after[name]).float() for name in before]
    return torch.cat(differ).mean().item()


def _log_evaluation(run: Path, callback: Callable, policy: nn.Module, step: int) -> None:
    found = callback(policy, step)
    append_metrics(run, {"step": step} | {f"eval/{name}": v for name, v in found.items()})


def evaluation(setup: Setup, policy: nn.Module, step: int) -> dict[str, float]:
    """What a run logs of its policy: on sampled completions, and on held-out pairs.

    `reward` (what labeled the pairs), `true_reward` (P(positive)), `kl/sequence` in nats, the
    numbers of `completion_facts`, and of held-out pairs `accuracy`, `margin` and `held_out_loss`.
    """
    task = setup.task
    found = evaluate_policy(
        policy,
        task.reference if step else policy,
        task.eval_prompts,
        judged()[2],
        task.tokenizer,
        max_new_tokens=task.limit,
        seed=task.seed,
    )
    rewards = setup.label(found.texts, found.completions)
    metrics = {
        "reward": float(rewards.mean()),
        "reward_se": float(rewards.std(ddof=1) / np.sqrt(len(rewards))),
        "true_reward": found.reward,
        "true_reward_se": found.reward_se,
        "kl/sequence": found.kl,
        "kl/sequence_se": found.kl_se,
    }
    metrics |= completion_facts(found.completions, max_new_tokens=task.limit, end_tokens=[task.end])

    # held-out pairs, each completion scored once
    p, beta = setup.held_out, setup.config.beta
    used, chosen, rejected = p.completions_of(range(len(p.chosen)))
    completions = [p.completions[i] for i in used]
    logps = score_completions(policy, p.prompts, completions, p.prompt_of[used]).double().numpy()
    rewards = beta * (logps - p.reference_logps[used])
    margins = rewards[chosen] - rewards[rejected]
    return metrics | {
        "accuracy": float(((np.sign(margins.round(6)) + 1) / 2).mean()),
        "margin": float(margins.mean()),
        "held_out_loss": float(np.logaddexp(0, -margins).mean()),
    }
