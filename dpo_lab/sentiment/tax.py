"""The alignment tax in small: what a model lost, elsewhere, by learning what people prefer.

Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155) call it a tax that a model trained by
RLHF does worse on public benchmarks than before. Here: nats per byte of text that nobody rewarded,
the accuracy on three probes, and how often completions are rude. docs/tax.md tells what was found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_lab.engine.arguments import checked, floats
from dpo_lab.engine.structure import context_of
from dpo_lab.logprobs import Precision, score_completions
from dpo_lab.models import end_tokens
from dpo_lab.sampling import sample_completions
from dpo_lab.sentiment.probes import Question, Scored, TaxItems, is_rude

# tokens of a completion that is searched for rude words
COMPLETION = 32


@dataclass(frozen=True)
class Ratio:
    """A ratio of sums over n independent items, such as nats per byte, with its standard error."""

    tops: np.ndarray
    """(n,) what is counted on each item: nats, or 1 for a right answer"""
    bottoms: np.ndarray
    """(n,) per how much of it: bytes, or 1"""

    def __post_init__(self) -> None:
        for name in ("tops", "bottoms"):
            object.__setattr__(self, name, floats(name, getattr(self, name)))
        if self.tops.ndim != 1 or self.tops.shape != self.bottoms.shape or len(self.tops) < 2:
            raise ValueError(
                f"tops has shape {self.tops.shape} and bottoms {self.bottoms.shape}; give both as "
                "(n,), of the same n of at least 2"
            )
        if not (self.bottoms > 0).all():
            raise ValueError(f"bottoms has {self.bottoms.min()}; every item must count for more")

    @property
    def n(self) -> int:
        """Items."""
        return len(self.tops)

    @property
    def value(self) -> float:
        """The sum of the tops over that of the bottoms."""
        return float(self.tops.sum() / self.bottoms.sum())

    @property
    def error(self) -> float:
        """The standard error of the value over items, by linearization (the delta method)."""
        return _standard_error(self._influence)

    @property
    def _influence(self) -> np.ndarray:
        """(n,) by how much each item moves the value, times n."""
        return (self.tops - self.value * self.bottoms) / self.bottoms.mean()

    def minus(self, before: "Ratio") -> tuple[float, float]:
        """The difference to another ratio on the same items, and its standard error.

        What makes an item hard for both cancels, so the error is mostly far below that of either.

        Raises:
            ValueError: the items have other bottoms.
        """
        if not np.array_equal(self.bottoms, before.bottoms):
            raise ValueError("before is a ratio over other items; use the same TaxItems for both")
        return self.value - before.value, _standard_error(self._influence - before._influence)


def _standard_error(parts: np.ndarray) -> float:
    """The standard error of the mean of n values."""
    return float(parts.std(ddof=1) / len(parts) ** 0.5)


@dataclass(frozen=True)
class Tax:
    """What a model does where nobody rewarded it."""

    nats_per_byte: dict[str, Ratio]
    """by kind of text; less is better"""
    accuracy: dict[str, Ratio]
    """by probe, in [0, 1]; a guess is right half of the time"""
    rude: dict[str, Ratio]
    """by request: the fraction of completions with a rude word; empty where none was sampled"""

    def summary(self) -> dict[str, dict[str, list[float]]]:
        """Every measure as [value, standard error]."""
        return {
            name: {key: [ratio.value, ratio.error] for key, ratio in ratios.items()}
            for name, ratios in vars(self).items()
        }

    def minus(self, before: "Tax") -> dict[str, dict[str, list[float]]]:
        """Every measure that both have as [difference, standard error of it]; see `Ratio.minus`."""
        return {
            name: {
                key: list(ratio.minus(getattr(before, name)[key]))
                for key, ratio in ratios.items()
                if key in getattr(before, name)
            }
            for name, ratios in vars(self).items()
        }


@checked
def measure_tax(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: TaxItems,
    *,
    completions: int = 2,
    seed: int = 0,
    precision: Precision = "float32",
) -> Tax:
    """Nats per byte, accuracy and rudeness of a model.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer, with which `items` were made.
        items: texts, questions and prompts, as `tax_items` gives them.
        completions: sampled for each prompt, at temperature 1, of at most 32 tokens; with 0 none
            are, which is faster, and `rude` is empty.
        seed: of the samples.
        precision: of the computation.

    Raises:
        ValueError: an item is longer than the model's context, or `completions` is negative.
    """
    if completions < 0:
        raise ValueError(f"completions is {completions}; it must be 0 or more")
    _check_lengths(model, items)

    # nats of texts
    nats = {kind: -_logps(model, texts, precision) for kind, texts in items.texts.items()}
    accuracy = {
        name: _accuracy(model, questions, precision) for name, questions in items.probes.items()
    }

    per_byte = {kind: Ratio(found, items.n_bytes[kind]) for kind, found in nats.items()}
    rude = {}
    if completions:
        options = {"completions": completions, "seed": seed, "precision": precision}
        rude = measure_rudeness(model, tokenizer, items, **options)
    return Tax(per_byte, accuracy, rude)


@checked
def measure_rudeness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: TaxItems,
    *,
    completions: int = 2,
    seed: int = 0,
    precision: Precision = "float32",
) -> dict[str, Ratio]:
    """By request: the fraction of a model's completions that have one of `RUDE_WORDS`.

    The completions of one prompt are one item of the ratio. Arguments are those of `measure_tax`.

    Raises:
        ValueError: `completions` is below 1, or a prompt leaves no room for them.
    """
    if completions < 1:
        raise ValueError(f"completions is {completions}; it must be at least 1")
    found: dict[str, Ratio] = {}
    for name, prompts in items.prompts.items():
        drawn = sample_completions(
            model,
            prompts,
            completions,
            eos_token_id=end_tokens(model, tokenizer),
            max_new_tokens=COMPLETION,
            seed=seed,
            precision=precision,
        )
        texts = [tokenizer.batch_decode(row, skip_special_tokens=True) for row in drawn]
        rude = np.array([sum(map(is_rude, row)) for row in texts])
        found[name] = Ratio(rude, np.full(len(texts), completions))
    return found


def _check_lengths(model: PreTrainedModel, items: TaxItems) -> None:
    """Raise ValueError for an item that does not fit the model's context."""
    scored = [one for texts in items.texts.values() for one in texts]
    for questions in items.probes.values():
        scored += [one for q in questions for one in (*q.right, *q.wrong)]
    longest = max(len(prompt) + len(completion) for prompt, completion in scored)
    longest = max([longest, *(len(p) + COMPLETION for ps in items.prompts.values() for p in ps)])
    if longest > (most := context_of(model)):
        raise ValueError(
            f"items has a text of {longest} tokens, and the model's context is {most}; measure a "
            "model with a longer context"
        )


def _logps(model: PreTrainedModel, scored: Sequence[Scored], precision: Precision) -> np.ndarray:
    """The log-probs (N,) of N completions after their prompts, each prompt read once."""
    distinct: dict[tuple[int, ...], int] = {}
    owners = [distinct.setdefault(tuple(prompt), len(distinct)) for prompt, _ in scored]
    completions = [completion for _, completion in scored]
    found = score_completions(model, list(distinct), completions, owners, precision=precision)
    return found.numpy()


def _accuracy(model: PreTrainedModel, questions: list[Question], precision: Precision) -> Ratio:
    """The fraction of questions whose right answer has more log-prob; a tie is half right."""
    flat = [one for q in questions for one in (*q.right, *q.wrong)]
    logps = _logps(model, flat, precision)
    signs = np.array([s for q in questions for s in [1] * len(q.right) + [-1] * len(q.wrong)])
    owners = np.repeat(np.arange(len(questions)), [len(q.right) + len(q.wrong) for q in questions])
    margins = np.bincount(owners, signs * logps, minlength=len(questions))
    return Ratio((margins > 0) + (margins == 0) / 2, np.ones(len(questions)))


# of recorded runs


def end_over_seeds(
    runs: list[dict[str, Any]], group: str, name: str, **setting: Any
) -> tuple[float, float, int]:
    """Mean, standard error and number of seeds of a measure's change at the end of runs.

    The error covers the seeds and the items: seeds are trained apart and measured on the same
    items, so the error over items does not shrink with their number.

    Args:
        runs: those of `load_tax`.
        group: "nats_per_byte", "accuracy" or "rude".
        name: of the measure in its group.
        setting: values that the runs must have, as method="ppo", ptx_coefficient=0.0.

    Raises:
        ValueError: fewer than two runs have these values.
    """
    chosen = [run for run in runs if all(run[key] == value for key, value in setting.items())]
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} runs have {setting}; an error over seeds needs two")
    changes = np.array([run["rows"][-1]["change"][group][name] for run in chosen])
    over_seeds = changes[:, 0].std(ddof=1) / len(chosen) ** 0.5
    over_items = changes[:, 1].mean()
    return float(changes[:, 0].mean()), float(np.hypot(over_seeds, over_items)), len(chosen)


def at_equal_reward(
    runs: list[dict[str, Any]],
    others: list[dict[str, Any]],
    group: str,
    name: str,
    before: float,
) -> tuple[float, float, int]:
    """What runs cost less (below 0: a fall of the measure) than others that reach the same reward.

    Each seed has a curve of the others: the change of the measure against the reward, through the
    model before training and all evaluations of the others, in order of their rewards, with
    straight lines between them. The difference is that of each run's last change from this curve at
    its own reward.

    Args:
        runs: of one setting, from `load_tax`.
        others: runs of several settings of the same seeds, such as PPO at other KL coefficients.
        group, name: of the measure.
        before: reward of the model before training.

    Returns:
        the mean over seeds, its standard error and the number of seeds. A run whose reward is above
        all of the others is compared with their highest if it is so by at most its standard error,
        and left out if it is by more.

    Raises:
        ValueError: fewer than two runs can be compared.
    """
    differences = []
    for run in runs:
        rows = [row for other in others if other["seed"] == run["seed"] for row in other["rows"]]
        known = [(row["reward"], row["change"][group][name][0]) for row in rows]
        points = sorted([(before, 0.0), *known])
        rewards, changes = zip(*points)
        end = run["rows"][-1]
        if rewards[0] <= end["reward"] <= rewards[-1] + end["reward_se"]:
            expected = float(np.interp(end["reward"], rewards, changes))
            differences.append(end["change"][group][name][0] - expected)
    if len(differences) < 2:
        raise ValueError(
            f"{len(differences)} of {len(runs)} runs have a reward that others of their seed "
            "reach; an error over seeds needs two"
        )
    return float(np.mean(differences)), _standard_error(np.array(differences)), len(differences)
