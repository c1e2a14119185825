"""A judge as the labeler of sampled completions, for on-policy DPO (`dpo_lab.variants.online`)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from dpo_lab.engine.arguments import integer
from dpo_lab.judges.verdicts import Judge, ask, ask_both_orders


def judge_label(
    judge: Judge, tokenizer: Any, *, k: int, both_orders: bool = False, seed: int = 0
) -> Callable[[list[list[int]], list[list[int]]], np.ndarray]:
    """A labeler for `train_online_dpo` that asks a judge about every two completions of a prompt.

    Ties, missing verdicts, and verdicts that change with the order make no pair.

    Args:
        judge: see `Judge`.
        tokenizer: of the policy.
        k: completions per prompt, as in `OnlineConfig`.
        both_orders: ask about each pair in both orders, twice as many questions. Otherwise the
            order in which two answers are shown is drawn at random.
        seed: of those orders.

    Returns:
        A function of prompts and completions, N each as token ids, that gives pairs (P, 2).

    Raises:
        ValueError, TypeError: `k` below 2; when asked: N is no multiple of `k`, or the judge
            returns something other than verdicts.
    """
    k = integer("k", k)
    if k < 2:
        raise ValueError(f"k is {k}; a judge compares at least 2 completions of a prompt")

    def label(prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
        n = len(completions)
        if n % k:
            raise ValueError(f"there are {n} completions, no multiple of k ({k}); pass the k drawn")
        asked, said = (
            tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, completions)
        )

        # every two completions of a prompt, and which of them is shown first
        i, j = np.triu_indices(k, 1)
        firsts = k * np.arange(n // k)[:, None]
        pairs = np.stack([firsts + i, firsts + j], -1).reshape(-1, 2)
        swapped = np.random.default_rng([seed, n]).random(len(pairs)) < 0.5
        pairs[swapped] = pairs[swapped, ::-1]

        # the points of the first one: 1, 0, or something between where nothing was decided
        texts = (
            [asked[a] for a, _ in pairs],
            [said[a] for a, _ in pairs],
            [said[b] for _, b in pairs],
        )
        points = (ask_both_orders if both_orders else ask)(judge, *texts).points
        return np.concatenate([pairs[points == 1], pairs[points == 0][:, ::-1]])

    return label
