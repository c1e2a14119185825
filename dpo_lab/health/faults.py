"""Eighteen faults of DPO runs, each planted by its real cause in a small run.

    run = plant("swapped_columns", Path("runs/swapped"), seed=1)

A fault changes one part of what a healthy small run (small_runs.py) is made of.
"""

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from dpo_lab.batching import CompletionBatch
from dpo_lab.engine.arguments import checked
from dpo_lab.health.catalog import FaultName
from dpo_lab.health.run_size import SMALL, RunSize
from dpo_lab.health.small_runs import Setup, healthy, make_run, set_up, small_config
from dpo_lab.logprobs import completion_logps
from dpo_lab.loop import LoopConfig
from dpo_lab.preferences import Preferences, Report
from dpo_lab.train import sft_batches, train_sft

__all__ = ["FAULT_NAMES", "healthy", "plant"]

FAULT_NAMES: tuple[FaultName, ...] = get_args(FaultName)

FLIPPED = 0.4
"""fraction of labels that are flipped"""

CRITICAL = frozenset(
    "bad worst boring awful terrible poor poorly waste problem problems disappointing dull weak "
    "fails lacks unfortunately instead but not no nothing never just only would could should if "
    "though however although".split()
)
"""words of a review that is no advertisement"""

ENDINGS = (" I loved it.", " I hated it.")
"""what a pair that is truncated differs in"""


@checked
def plant(fault: FaultName, folder: Path | str, *, seed: int = 0, size: RunSize = SMALL) -> Path:
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


def _side_by_side(
    prompts: list[list[int]], completions: list[list[int]], prompt_of: np.ndarray, end: int
) -> Preferences:
    """Preferences of completions that stand as chosen, rejected, chosen, and so on.

    The report counts those that do not end with the token `end`.
    """
    n, without = len(completions), sum(ids[-1] != end for ids in completions)
    report = Report(pairs=n // 2, without_eos=without)
    sides = np.arange(0, n, 2), np.arange(1, n, 2)
    return Preferences(prompts, completions, prompt_of, *sides, report=report)


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
    pairs = _side_by_side(task.prompts, completions, np.array(prompt_of), task.end)
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
    setup = set_up(seed=seed, size=size)
    p = setup.preferences
    some = np.random.default_rng(seed).permutation(len(p.chosen))[: len(setup.held_out.chosen)]
    return replace(setup, held_out=p.select(some))


def _truncated_eos(seed: int, size: RunSize) -> Setup:
    """The chosen completions have lost their last token, EOS; the rejected ones end with it."""
    setup = set_up(seed=seed, size=size, kind="sentence")

    def truncated(p: Preferences) -> Preferences:
        sides = zip(p.chosen, p.rejected)
        completions = [
            ids
            for c, r in sides
            for ids in (p.completions[c][:-1] or p.completions[c], p.completions[r])
        ]
        owners = np.repeat(p.prompt_of[p.chosen], 2)
        pairs = _side_by_side(p.prompts, completions, owners, setup.task.end)
        return pairs.with_reference(setup.task.reference)

    return replace(setup, preferences=truncated(setup.preferences))


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


def _loss_stuck_frozen(seed: int, size: RunSize) -> Setup:
    """The optimizer was made with the weights of a model of which the policy is a copy."""
    setup = set_up(seed=seed, size=size)
    return replace(setup, score=completion_logps, updated=copy.deepcopy(setup.policy))


def _loss_stuck_tiny_beta(seed: int, size: RunSize) -> Setup:
    """beta is 1e-6."""
    return set_up(seed=seed, size=size, config=small_config(size, beta=1e-6))


def _learning_rate_too_high(seed: int, size: RunSize) -> Setup:
    """The learning rate is ten times that of a healthy run."""
    return set_up(seed=seed, size=size, config=small_config(size, learning_rate=5e-4))


def _bfloat16_weights(seed: int, size: RunSize) -> Setup:
    """The policy's weights are bfloat16, in which most updates are rounded away."""
    setup = set_up(seed=seed, size=size, config=small_config(size, learning_rate=1e-5))
    policy = setup.policy.to(torch.bfloat16)
    pairs = replace(setup.preferences, reference_logps=None).with_reference(policy)
    return replace(setup, policy=policy, preferences=pairs, score=completion_logps)


def _overtraining(seed: int, size: RunSize) -> Setup:
    """The pairs of a sixth of the prompts, thirty times over, with little to hold the policy."""
    fewer = replace(size, prefixes=max(2, size.prefixes // 6))
    config = small_config(fewer, epochs=30, learning_rate=2e-4, beta=0.02)
    return set_up(seed=seed, size=fewer, config=config)


# what is asked for


def _chosen_logps_fall(seed: int, size: RunSize) -> Setup:
    """The rejected completion is the chosen one with another token in its middle."""
    setup, rng = set_up(seed=seed, size=size), np.random.default_rng(seed)
    task = setup.task
    completions, prompt_of = [], []
    for p, row in enumerate(task.samples):
        for ids in row:
            spoiled, middle = list(ids), len(ids) // 2
            others = np.setdiff1d(np.arange(len(task.tokenizer)), [task.end, ids[middle]])
            spoiled[middle] = int(rng.choice(others))
            prompt_of += [p, p]
            completions += [ids, spoiled]
    pairs = _side_by_side(task.prompts, completions, np.array(prompt_of), task.end)
    return replace(setup, preferences=pairs.with_reference(task.reference))


def _length_exploitation(seed: int, size: RunSize) -> Setup:
    """Whoever labels prefers the longer sentence."""

    def longer(texts: Sequence[str], completions: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array([float(len(ids)) for ids in completions])

    return set_up(seed=seed, size=size, kind="sentence", label=longer)


def _reward_hacking(seed: int, size: RunSize) -> Setup:
    """Whoever labels counts critical words, which was to keep advertisements out."""

    def critical(texts: Sequence[str], completions: Sequence[Sequence[int]]) -> np.ndarray:
        words = [re.findall(r"[a-z]+", text.lower()) or [""] for text in texts]
        return np.array([np.mean([word in CRITICAL for word in some]) for some in words])

    larger = replace(size, eval_prefixes=2 * size.eval_prefixes)
    return set_up(seed=seed, size=larger, config=small_config(size, epochs=4), label=critical)


PLANTS: dict[str, Callable[[int, RunSize], Setup]] = {
    name: globals()[f"_{name}"] for name in FAULT_NAMES
}
