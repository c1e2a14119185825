"""Five bugs that leave DPO's loss at log 2 before the first step, and a look at what is scored.

The policy begins as the reference, and both are scored by the same batch. So every log-ratio is 0
and every loss log 2, whichever tokens the batch scores. Notebook 05 injects these bugs and finds
each of them by other means.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dpo_lab.batching import CompletionBatch, completion_batch
from dpo_lab.engine.arguments import integer, one_of
from dpo_lab.plots import token_html
from dpo_lab.preferences import PairBatch, Preferences

SilentBug = Literal[
    "the prompt is scored too",
    "the last token is dropped",
    "labels are not shifted",
    "chosen and rejected are swapped",
    "the prompt is another one",
]
SILENT_BUGS: tuple[SilentBug, ...] = get_args(SilentBug)


def with_bug(preferences: Preferences, pairs: Sequence[int], bug: SilentBug) -> PairBatch:
    """`preferences.batch(pairs)` as a program with this bug would make it, without reference logps.

    Raises:
        ValueError, TypeError: no such bug, no such pair, or pairs of one prompt alone where the
            bug takes another one.
    """
    one_of("bug", bug, SilentBug)
    used, chosen, rejected = preferences.completions_of(pairs)
    owners = preferences.prompt_of[used]
    if bug == "the prompt is another one":
        owners = _next_prompt(owners)
    prompts = [preferences.prompts[p] for p in owners]
    completions = [preferences.completions[i] for i in used]

    # what counts as the completion
    if bug == "the prompt is scored too":
        completions = [prompt[1:] + ids for prompt, ids in zip(prompts, completions)]
        prompts = [prompt[:1] for prompt in prompts]
    elif bug == "the last token is dropped":
        completions = [ids[:-1] or ids for ids in completions]
    batch = completion_batch(prompts, completions, range(len(used)))

    # the logits after a token are compared with that token, not with the next one
    if bug == "labels are not shifted":
        batch = replace(batch, targets=batch.input_ids.flatten()[batch.sources])

    if bug == "chosen and rejected are swapped":
        chosen, rejected = rejected, chosen
    return PairBatch(batch, None, torch.from_numpy(chosen), torch.from_numpy(rejected))


def _next_prompt(owners: np.ndarray) -> np.ndarray:
    """For the prompt of each completion the next one in the batch, in a circle."""
    different = np.unique(owners)
    if len(different) == 1:
        raise ValueError("pairs are of one prompt alone; take pairs of at least two prompts")
    return np.roll(different, -1)[np.searchsorted(different, owners)]


def scored_tokens(batch: CompletionBatch, i: int) -> tuple[list[int], list[int]]:
    """What the model has read before completion `i`, and the tokens that are scored, as ids.

    Args:
        batch: one completion per row, as `completion_batch` lays them out unless it is `compact`.
        i: index of the completion.

    Raises:
        ValueError: the batch is compact, or has no such completion.
    """
    if batch.segments is not None or batch.spread is not None:
        raise ValueError("batch is compact; lay it out with compact=False to look at its rows")
    i = integer("i", i)
    if not 0 <= i < batch.n:
        raise ValueError(f"i is {i}; with {batch.n} completions it must be in 0..{batch.n - 1}")

    own = batch.owners == i
    row, first = divmod(int(batch.sources[own][0]), batch.input_ids.shape[1])
    return batch.input_ids[row, : first + 1].tolist(), batch.targets[own].tolist()


def scored_html(
    batch: PairBatch, i: int, tokenizer: PreTrainedTokenizerBase, title: str = ""
) -> str:
    """A row of a batch as HTML: the tokens that are scored for completion `i` in blue, after what
    the model has read before them.

    Raises:
        ValueError: as `scored_tokens`.
    """
    read, scored = scored_tokens(batch.completions, i)
    tokens = [tokenizer.decode([token]) for token in read + scored]
    return token_html(tokens, [0.0] * len(read) + [0.4] * len(scored), limit=1.0, title=title)
