"""Labels of sampled completions, and the pairs that they make: rewards, votes, human text."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from dpo_lab.engine.arguments import finite_positive, floats, integer, token_lists
from dpo_lab.engine.records import data_hash
from dpo_lab.preferences import Preferences, Report

Label = Callable[[list[list[int]], list[list[int]]], Any]
"""A labeler: called with N prompts and N completions as token ids, the completions of one prompt
one after the other. It gives N rewards, of which the higher one of a prompt is chosen; or pairs
(P, 2), the index of the chosen completion and that of the rejected one. `rlhf.text_reward` makes
one of a reward of texts, `judges.judge_label` one of a judge."""


def bradley_terry_label(
    reward: Label, *, k: int, scale: float, votes: int = 1, seed: int = 0
) -> Label:
    """A labeler whose votes on every two completions of a prompt are drawn by Bradley-Terry.

    A vote prefers the first completion with probability sigma((r_1 - r_2) / scale). These are the
    labels that DPO's derivation assumes: its optimum is then that of the objective with the reward
    r / scale, while labels without error have none for a single pair. Many votes stand for the
    probability itself.

    Args:
        reward: gives N rewards.
        k: completions per prompt, as in `OnlineConfig`.
        scale: rewards per unit of log-odds, positive.
        votes: on each pair, at least 1; each becomes a pair.
        seed: of the votes, with the rewards.

    Raises:
        ValueError, TypeError: a bad argument; when asked: rewards of another shape.

    Source: Eq. 1 of Rafailov et al. 2023.
    """
    scale, k, votes = finite_positive("scale", scale), _checked_k(k), integer("votes", votes)
    if votes < 1:
        raise ValueError(f"votes is {votes}; it must be at least 1")

    def label(prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
        rewards = _rewards(reward, prompts, completions, k).ravel()

        # every two completions of a prompt, and how many votes the first of them gets
        i, j = np.triu_indices(k, 1)
        firsts = np.arange(0, len(rewards), k)[:, None]
        pairs = np.stack([firsts + i, firsts + j], -1).reshape(-1, 2)
        log_odds = (rewards[pairs[:, 0]] - rewards[pairs[:, 1]]) / scale
        rng = np.random.default_rng([seed, int(data_hash(rewards), 16)])
        won = rng.binomial(votes, np.exp(-np.logaddexp(0, -log_odds)))
        both = np.concatenate([pairs, pairs[:, ::-1]])
        return np.repeat(both, np.concatenate([won, votes - won]), axis=0)

    return label


def best_and_worst_label(reward: Label, *, k: int) -> Label:
    """A labeler that compares only the best and the worst of the k completions of a prompt.

    Two completions of k are trained on, and their rewards differ most. All k are labeled. A prompt
    with equal rewards makes no pair.

    Args:
        reward: gives N rewards.
        k: completions per prompt, as in `OnlineConfig`.

    Raises:
        ValueError, TypeError: as `bradley_terry_label`.
    """
    k = _checked_k(k)

    def label(prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
        rows = _rewards(reward, prompts, completions, k)
        firsts = k * np.arange(len(rows))
        pairs = np.stack([firsts + rows.argmax(1), firsts + rows.argmin(1)], 1)
        return pairs[rows.max(1) > rows.min(1)]

    return label


def labeled_preferences(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    labels: Any,
) -> Preferences:
    """Preferences of M prompts with completions of each, as sampled, from what a `Label` gave.

    Args:
        prompts: token ids.
        completions: a list for each prompt, N completions in all.
        labels: (N,) rewards, of which every two of a prompt make a pair, equal ones left out; or
            (P, 2) pairs, the chosen and the rejected completion as indices into the N.

    Raises:
        ValueError, TypeError: labels of another shape, a reward that is not finite, an index that
            is none; or no pair is left.
    """
    prompts = token_lists("prompts", prompts)
    sizes = [len(row) for row in completions]
    flat = token_lists("completions", [ids for row in completions for ids in row])
    values, n = floats("labels", labels), len(flat)
    scores, ties = None, 0

    if values.shape == (n,):
        _check_rewards(values)
        scores, pairs = values, _ranked(values, sizes)
        ties = sum(size * (size - 1) // 2 for size in sizes) - len(pairs)
    elif values.ndim == 2 and values.shape[1] == 2:
        pairs = _checked_pairs(values, n)
    else:
        raise ValueError(
            f"labels have the shape {values.shape} for {n} completions; they must be (N,), a "
            "reward each, or (P, 2), the indices of each pair's chosen and rejected completion"
        )

    # what is the same text teaches nothing
    differ = np.array([flat[c] != flat[r] for c, r in pairs], dtype=bool)
    kept = pairs[differ]
    report = Report(
        pairs=len(kept),
        ties=ties,
        identical=len(pairs) - len(kept),
        duplicated=len(kept) - len(np.unique(kept, axis=0)),
    )
    owners = np.repeat(np.arange(len(prompts)), sizes)
    sides = {"chosen": kept[:, 0], "rejected": kept[:, 1]}
    return Preferences(prompts, flat, owners, scores=scores, report=report, **sides)


def spin_preferences(
    prompts: Sequence[Sequence[int]],
    human: Sequence[Sequence[int]],
    samples: Sequence[Sequence[Sequence[int]]],
) -> Preferences:
    """Pairs of self-play: the human completion of each prompt is chosen over the policy's own.

    Args:
        prompts: token ids of M prompts.
        human: token ids of the completion that a person wrote to each, with EOS where it ends.
        samples: token ids of k completions of each that the policy drew.

    Raises:
        ValueError, TypeError: there are not equally many of each, or no sample differs from the
            human text.

    Source: SPIN, Chen et al. 2024, https://arxiv.org/abs/2401.01335.
    """
    prompts, human = token_lists("prompts", prompts), token_lists("human", human)
    if not len(prompts) == len(human) == len(samples):
        raise ValueError(
            f"{len(prompts)} prompts, {len(human)} human completions, {len(samples)} lists of "
            "samples; one each"
        )
    rows = [[text, *own] for text, own in zip(human, samples)]
    firsts = np.cumsum([0] + [len(row) for row in rows[:-1]])
    pairs = [(first, first + j) for first, row in zip(firsts, rows) for j in range(1, len(row))]
    return labeled_preferences(prompts, rows, np.array(pairs, dtype=np.int64).reshape(-1, 2))


def joined(parts: Sequence[Preferences]) -> Preferences:
    """The pairs of several preferences as one; prompts and completions stay apart.

    Reference log-probs are kept, without their key, where all of `parts` have them.
    """
    prompts = np.cumsum([0] + [len(part.prompts) for part in parts[:-1]])
    firsts = np.cumsum([0] + [len(part.completions) for part in parts[:-1]])
    known = all(part.reference_logps is not None for part in parts)
    return Preferences(
        [ids for part in parts for ids in part.prompts],
        [ids for part in parts for ids in part.completions],
        np.concatenate([part.prompt_of + first for part, first in zip(parts, prompts)]),
        np.concatenate([part.chosen + first for part, first in zip(parts, firsts)]),
        np.concatenate([part.rejected + first for part, first in zip(parts, firsts)]),
        reference_logps=np.concatenate([p.reference_logps for p in parts]) if known else None,
        reference_precision=parts[0].reference_precision,
        report=Report(pairs=sum(len(part.chosen) for part in parts)),
    )


def _checked_k(k: int) -> int:
    k = integer("k", k)
    if k < 2:
        raise ValueError(f"k is {k}; a pair needs at least 2 completions of a prompt")
    return k


def _rewards(
    reward: Label, prompts: list[list[int]], completions: list[list[int]], k: int
) -> np.ndarray:
    """The rewards of `k` completions of each of M prompts, (M, k)."""
    rewards, n = floats("reward", reward(prompts, completions)), len(completions)
    if rewards.shape != (n,) or n % k:
        raise ValueError(
            f"reward gave the shape {rewards.shape} for {n} completions, {k} of each prompt; it "
            "must be (N,), and k the number that was drawn"
        )
    _check_rewards(rewards)
    return rewards.reshape(-1, k)


def _ranked(rewards: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Every two completions of a prompt with different rewards, the higher one first, (P, 2)."""
    found = []
    for first, size in zip(np.cumsum([0, *sizes]), sizes):
        for a, b in combinations(range(first, first + size), 2):
            if rewards[a] != rewards[b]:
                found.append((a, b) if rewards[a] > rewards[b] else (b, a))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _check_rewards(rewards: np.ndarray) -> None:
    wrong = np.flatnonzero(~np.isfinite(rewards))
    if len(wrong):
        raise ValueError(f"labels[{wrong[0]}] is {rewards[wrong[0]]}; a reward must be finite")


def _checked_pairs(values: np.ndarray, n: int) -> np.ndarray:
    """(P, 2) indices of completions; `Preferences` checks that both are of one prompt."""
    pairs = values.astype(np.int64)
    wrong = np.argwhere((pairs != values) | (pairs < 0) | (pairs >= n))
    if len(wrong):
        i, j = wrong[0]
        raise ValueError(
            f"labels[{i}, {j}] is {values[i, j]:g}; with {n} completions the index of one must be "
            f"an integer in 0..{n - 1}"
        )
    return pairs
