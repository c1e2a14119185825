"""Win rate against sampling temperature, for several policies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from dpo_lab.engine.arguments import checked, floats, integer, token_lists
from dpo_lab.judges.rates import Answers, Order, WinRate, win_rates
from dpo_lab.judges.verdicts import Judge, check_texts

Sampler = Callable[[float, int], Answers]
"""Answers to all prompts, given a temperature and a seed"""

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class TemperatureSweep:
    """The win rate of each policy at each temperature."""

    temperatures: tuple[float, ...]
    """(T,)"""
    curves: dict[str, tuple[WinRate, ...]]
    """by policy, (T,)"""

    def rows(self) -> list[dict[str, Any]]:
        """One row per policy and temperature, in plain numbers: rate, low, high, missing_pairs."""
        return [
            {
                "policy": name,
                "temperature": temperature,
                **{key: getattr(rate, key) for key in ("rate", "low", "high", "missing_pairs")},
            }
            for name, curve in self.curves.items()
            for temperature, rate in zip(self.temperatures, curve)
        ]


@checked
def temperature_sweep(
    policies: Mapping[str, Sampler],
    prompts: Sequence[str],
    judge: Judge,
    baseline: Answers,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    order: Order = "swapped",
    seed: int = 0,
) -> TemperatureSweep:
    """Win rates of policies against one baseline at several sampling temperatures.

    As in Figures 2 and 3 of Rafailov et al. 2023: a temperature of 0 is greedy search.

    Args:
        policies: by name, a function of (temperature, seed) that gives the answers to all prompts:
            `policy_answers` makes one of a model.
        prompts: (M,) texts, as the judge sees them.
        judge, baseline, order: as in `win_rates`.
        temperatures: each 0 or more.
        seed: of the samples, the bootstrap and the random order.

    Raises:
        ValueError, TypeError: no policy, a negative temperature, or as `win_rates`.
    """
    check_texts(prompts=prompts)
    found = floats("temperatures", temperatures)
    if not len(policies):
        raise ValueError("there is no policy; give at least one, by name")
    if found.ndim != 1 or not len(found) or not ((found >= 0) & np.isfinite(found)).all():
        raise ValueError(
            f"temperatures are {temperatures}; give at least one, each 0 (greedy) or more"
        )
    plain = tuple(found.tolist())
    curves = {
        name: tuple(
            win_rates(judge, prompts, sampler(t, seed), baseline, order=order, seed=seed)
            for t in plain
        )
        for name, sampler in policies.items()
    }
    return TemperatureSweep(plain, curves)


def policy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    best_of: int = 1,
    reward: Callable[[Sequence[str]], Sequence[float]] | None = None,
    progress: str | None = None,
) -> Sampler:
    """A function of (temperature, seed) that samples one answer to each prompt, as text.

    Args:
        model: a causal LM.
        tokenizer: its own.
        prompts: (M,) token ids.
        max_new_tokens: answers are truncated at this length.
        best_of: answers sampled per prompt, of which the one with the highest reward is given
            (best of N). At temperature 0 they are all the same.
        reward: called with texts, prompt and answer together, gives their rewards; needed where
            `best_of` is more than 1.
        progress: a name for a progress bar; without it there is none.

    Raises:
        ValueError, TypeError: `best_of` is below 1, or more than 1 without a reward; when called,
            as `sample_completions`.
    """
    from dpo_lab.models import end_tokens
    from dpo_lab.sampling import sample_completions, texts_of

    prompts, best_of = token_lists("prompts", prompts), integer("best_of", best_of)
    if best_of < 1:
        raise ValueError(f"best_of is {best_of}; it must be at least 1")
    if best_of > 1 and reward is None:
        raise ValueError(f"best_of is {best_of} and there is no reward to choose by; give one")

    def sampler(temperature: float, seed: int) -> list[str]:
        k = best_of if temperature > 0 else 1
        completions = sample_completions(
            model,
            prompts,
            k,
            eos_token_id=end_tokens(model, tokenizer),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            progress=progress,
        )
        texts = texts_of(tokenizer, prompts, completions)

        # the best of each prompt
        if k > 1:
            flat = floats("reward", reward([text for row in texts for text in row]))
            best = flat.reshape(len(prompts), k).argmax(1)
            texts = [[row[i]] for row, i in zip(texts, best)]
            completions = [[row[i]] for row, i in zip(completions, best)]
        return answers_in(tokenizer, prompts, completions, texts)

    return sampler


def answers_in(
    tokenizer: Any,
    prompts: Sequence[list[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    texts: Sequence[Sequence[str]],
) -> list[str]:
    """The answer in each prompt's first text: what follows the prompt, its space included."""
    heads = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    return [
        row[0][len(head) :]
        if row[0].startswith(head)
        else tokenizer.decode(ids[0], skip_special_tokens=True)
        for head, row, ids in zip(heads, texts, completions)
    ]
