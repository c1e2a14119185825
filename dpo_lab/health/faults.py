"""Eighteen faults of DPO runs, each planted by its real cause in a small run.

    run = plant("swapped_columns", Path("runs/swapped"), seed=1)

A fault changes one part of what a healthy small run (small_runs.py) is made of.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dpo_lab.batching import CompletionBatch, completion_batch
from dpo_lab.engine.arguments import checked
from dpo_lab.health.small_runs import (
    SMALL,
    RunSize,
    Setup,
    SmallTask,
    healthy,
    make_run,
    positive,
    set_up,
)
from dpo_lab.logprobs import completion_logps
from dpo_lab.loop import LoopConfig
from dpo_lab.models import load_model
from dpo_lab.preferences import Preferences, Report
from dpo_lab.train import sft_batches, train_sft

__all__ = ["FaultName", "healthy", "plant"]

FaultName = Literal[
    "identical_pairs",
    "flipped_labels",
    "swapped_columns",
    "leaked_pairs",
    "truncated_eos",
    "prompt_scored",
    "mean_instead_of_sum",
    "dropout_on",
    "other_precision",
    "wrong_reference",
    "loss_stuck_frozen",
    "loss_stuck_tiny_beta",
    "learning_rate_too_high",
    "bfloat16_weights",
    "overtraining",
    "chosen_logps_fall",
    "length_exploitation",
    "reward_hacking",
]
"""The faults: of the data, of log-probs, of optimization, of what is asked for."""

FAULT_NAMES: tuple[FaultName, ...] = get_args(FaultName)

FLIPPED = 0.4
"""fraction of labels that are flipped"""

ENDINGS = (" I loved it.", " I hated it.")
"""what a pair that is truncated differs in"""


@checked
def plant(
    fault: FaultName, folder: Path | str, *, seed: int = 0, size: RunSize = SMALL
) -> Path:
    """Make a small run that has this fault, by its real cause; its directory.

    Args:
        fault: which one.
        folder: the run directory; new or empty.
        seed: of prompts, samples and order.
        size: how many of them.

    Raises:
        ValueError: no such fault, or a directory that is not empty.
    """
    return make_run(PLANTS[fault](seed, size), folder)


# data


def _identical_pairs(seed: int, size: RunSize) -> Setup:
    """The two sides differ in their last sentence alone, which is truncated away."""
    setup = set_up(seed=seed, size=size)
    task, limit = setup.task, size.max_new_tokens
    endings = [task.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ENDINGS]

    prompt_of, completions = [], []
    for p, row in enumerate(task.samples):
        for ids in row:
            body = ids if ids[-1] != task.end else ids[:-1]
            prompt_of += [p, p]
            completions += [(body + ending)[:limit] for ending in endings]
    n = len(completions)
    pairs = Preferences(
        task.prompts,
        completions,
        np.array(prompt_of),
        np.arange(0, n, 2),
        np.arange(1, n, 2),
        report=Report(pairs=n // 2, cut=n, without_eos=n),
    )
    return replace(setup, preferences=pairs.with_reference(task.reference))


def _flipped_labels(seed: int, size: RunSize) -> Setup:
    """Two fifths of the labels are flipped at random."""
    setup = set_up(seed=seed, size=size)
    p = setup.preferences
    flipped = np.random.default_rng(seed).random(len(p.chosen)) < FLIPPED
    sides = np.where(flipped, p.rejected, p.chosen), np.where(flipped, p.chosen, p.rejected)
    return replace(setup, preferences=replace(p, chosen=sides[0], rejected=sides[1]))


def _swapped_columns(seed: int, size: RunSize) -> Setup:
    """The columns chosen and rejected are exchanged, in both splits."""
    setup = set_up(seed=seed, size=size)
    train, held_out = (
        replace(p, chosen=p.rejected, rejected=p.chosen)
        for p in (setup.preferences, setup.held_out)
    )
    return replace(setup, preferences=train, held_out=held_out)


def _leaked_pairs(seed: int, size: RunSize) -> Setup:
    """The evaluation's pairs are training pairs, drawn before the split was made."""
    setup = set_up(seed=seed, size=size, config=_config(size, epochs=4))
    p = setup.preferences
    some = np.random.default_rng(seed).permutation(len(p.chosen))[: len(setup.held_out.chosen)]
    return replace(setup, held_out=p.select(some))


def _truncated_eos(seed: int, size: RunSize) -> Setup:
    """Chosen completions are two sentences, longer than the limit: they lose their EOS."""
    setup = set_up(seed=seed, size=size, kind="sentence")
    return setup


def _prompt_scored(seed: int, size: RunSize) -> Setup:
    """Prompt and completion are one sequence, without a mask on the prompt."""
    setup = set_up(seed=seed, size=size)

    def joined(p: Preferences) -> Preferences:
        texts = [p.prompts[i][1:] + ids for i, ids in zip(p.prompt_of, p.completions)]
        bare = [prompt[:1] for prompt in p.prompts]
        changed = replace(p, prompts=bare, completions=texts, reference_logps=None)
        return changed.with_reference(setup.task.reference)

    return replace(setup, preferences=joined(setup.preferences), held_out=joined(setup.held_out))


# log-probs


def _mean_instead_of_sum(seed: int, size: RunSize) -> Setup:
    """Log-probs are means over tokens, of policy and reference."""
    setup = set_up(seed=seed, size=size)
    score = functools.partial(completion_logps, reduction="mean")

    def averaged(p: Preferences) -> Preferences:
        lengths = [len(ids) for ids in p.completions]
        return replace(p, reference_logps=p.reference_logps / lengths)

    return replace(setup, preferences=averaged(setup.preferences), score=score)


def _dropout_on(seed: int, size: RunSize) -> Setup:
    """The policy is trained in training mode, with GPT-2's dropout of 0.1."""
    setup = set_up(seed=seed, size=size)
    for module in setup.policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1

    def score(model: nn.Module, batch: CompletionBatch) -> Tensor:
        model.train()
        try:
            return completion_logps(model, batch)
        finally:
            model.eval()

    return replace(setup, score=score)


def _other_precision(seed: int, size: RunSize) -> Setup:
    """The reference was scored in bfloat16, and the policy is computed in float32."""
    setup = set_up(seed=seed, size=size)
    p = replace(setup.preferences, reference_logps=None)
    p = p.with_reference(setup.task.reference, precision="bfloat16")
    return replace(setup, preferences=replace(p, reference_precision="float32"))


def _wrong_reference(seed: int, size: RunSize) -> Setup:
    """The policy has had SFT on the chosen completions; the reference is the model before."""
    setup = set_up(seed=seed, size=size)
    batches = sft_batches(setup.preferences, 16, seed=seed)
    loop = LoopConfig(learning_rate=2e-4, schedule="constant", warmup_steps=2)
    train_sft(setup.policy, batches, 8, loop, progress=None)
    return setup


# optimization


def _config(size: RunSize, *, learning_rate: float = 2e-4, **changes):
    from dpo_lab.health.small_runs import _loop
    from dpo_lab.train import DPOConfig

    base = {"beta": 0.1, "epochs": 2, "batch_pairs": size.batch_pairs, "loop": _loop(learning_rate)}
    return DPOConfig(**base | changes)


def _loss_stuck_frozen(seed: int, size: RunSize) -> Setup:
    """The optimizer was made with the weights of a model of which the policy is a copy."""
    setup = set_up(seed=seed, size=size)
    return replace(setup, score=completion_logps, updated=copy.deepcopy(setup.policy))


def _loss_stuck_tiny_beta(seed: int, size: RunSize) -> Setup:
    """beta is 1e-6."""
    return set_up(seed=seed, size=size, config=_config(size, beta=1e-6))


def _learning_rate_too_high(seed: int, size: RunSize) -> Setup:
    """The learning rate is ten times that of a healthy run."""
    return set_up(seed=seed, size=size, config=_config(size, learning_rate=2e-3))


def _bfloat16_weights(seed: int, size: RunSize) -> Setup:
    """The policy's weights are bfloat16, whose steps are larger than most updates."""
    setup = set_up(seed=seed, size=size, config=_config(size, learning_rate=1e-5))
    policy = setup.policy.to(torch.bfloat16)
    pairs = replace(setup.preferences, reference_logps=None).with_reference(policy)
    return replace(setup, policy=policy, preferences=pairs, score=completion_logps)


def _overtraining(seed: int, size: RunSize) -> Setup:
    """A sixth of the prompts, and twenty passes over their pairs."""
    fewer = replace(size, prefixes=max(2, size.prefixes // 6))
    return set_up(seed=seed, size=fewer, config=_config(size, epochs=16, learning_rate=4e-4, beta=0.05))


# what is asked for


def _chosen_logps_fall(seed: int, size: RunSize) -> Setup:
    """The two sides of a pair share all tokens but one."""
    setup = set_up(seed=seed, size=size)
    return setup


def _length_exploitation(seed: int, size: RunSize) -> Setup:
    """Whoever labels prefers the longer sentence."""

    def longer(texts: Sequence[str], completions: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array([float(len(ids)) for ids in completions])

    return set_up(seed=seed, size=size, kind="sentence", label=longer)


def _reward_hacking(seed: int, size: RunSize) -> Setup:
    """Pairs are labeled by how many exclamation marks and praising words a text has."""
    praise = ("great", "best", "excellent", "wonderful", "love")

    def proxy(texts: Sequence[str], completions: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array([float(sum(text.lower().count(w) for w in praise)) for text in texts])

    return set_up(seed=seed, size=size, label=proxy)


PLANTS: dict[str, Callable[[int, RunSize], Setup]] = {
    name: globals()[f"_{name}"] for name in FAULT_NAMES
}
