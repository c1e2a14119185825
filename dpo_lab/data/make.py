"""Preferences of your own: sampled answers, judged by a reward, a judge or people.

`judged_by_reward`, `judged_by` and `judged_by_people` give labels to the answers that
`sample_answers` drew; `make_preferences` does both in one call.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_lab.data.answers import Answers, AnswersConfig, Origin, sample_answers
from dpo_lab.data.rated_pairs import Disagreement, to_pairs
from dpo_lab.data.ratings import RatingStore
from dpo_lab.engine.arguments import checked, floats
from dpo_lab.preferences import Preferences, Report

Reward = Callable[[Sequence[str]], Any]
Judge = Callable[[Sequence[str], Sequence[str], Sequence[str]], Any]


@dataclass(frozen=True, eq=False)
class MadePreferences:
    """Preferences, and where their answers and labels come from."""

    preferences: Preferences
    origins: list[list[Origin]]
    """(N,) where each completion was drawn"""
    judge: str
    """who judged"""
    pairs: int
    """pairs that were judged"""
    ties: int
    """of these, pairs without a winner; they are dropped"""
    missing: dict[str, int]
    """pairs without a verdict, by reason; they are dropped"""
    duplicated: int
    """answers that were drawn more than once"""
    config: AnswersConfig
    margins: np.ndarray | None = field(default=None, repr=False)
    """(P,) by which the chosen completion is better, where the judge says so"""

    def __str__(self) -> str:
        kept, lost = len(self.preferences.chosen), sum(self.missing.values())
        return (
            f"{self.pairs} pairs judged by {self.judge}: {kept} kept, {self.ties} ties, {lost} "
            f"without a verdict; {self.duplicated} duplicated answers"
        )


def judged_by_reward(answers: Answers, reward: Reward) -> MadePreferences:
    """The answer with the higher reward is chosen; equal rewards are a tie.

    Args:
        answers: of `sample_answers`.
        reward: gives the rewards (N,) of N texts, prompt and answer together.

    Raises:
        ValueError: it does not give one finite number per text, or all pairs are tied.
    """
    whole = [answers.prompt_texts[p] + text for p, text in zip(answers.prompt_of, answers.texts)]
    scores = floats("reward's values", reward(whole))
    if scores.shape != (len(whole),) or not np.isfinite(scores).all():
        raise ValueError(
            f"reward gave {scores.shape} values for {len(whole)} texts; one finite number each"
        )
    signs = [float(np.sign(scores[a] - scores[b])) for a, b in answers.pairs]
    margins = [float(abs(scores[a] - scores[b])) for a, b in answers.pairs]
    return _made(answers, signs, _name_of(reward), margins=margins, scores=scores)


def judged_by(answers: Answers, judge: Judge) -> MadePreferences:
    """The answer that the judge names is chosen; each pair is shown once, in an order drawn.

    Args:
        answers: of `sample_answers`.
        judge: a function of (prompts, answers A, answers B), as those of `dpo_lab.judges`: it gives
            "A", "B", "tie" or None for each, or an object with these as `letters`.

    Raises:
        ValueError: it gives something else, or no pair has a winner.
    """
    columns = [
        (answers.prompt_texts[answers.prompt_of[a]], answers.texts[a], answers.texts[b])
        for a, b in answers.pairs
    ]
    said = judge(*map(list, zip(*columns)))
    reasons = getattr(said, "missing", None)
    letters = getattr(said, "letters", said)
    if isinstance(letters, tuple) and len(letters) == 2 and isinstance(letters[0], list):
        letters = letters[0]  # the second are confidences
    if len(letters) != len(columns):
        raise ValueError(f"the judge gave {len(letters)} verdicts for {len(columns)} pairs")
    known = {"A": 1.0, "B": -1.0, "tie": 0.0, None: np.nan, "": np.nan}
    for i, letter in enumerate(letters):
        if letter not in known:
            raise ValueError(f"verdict {i} is {letter!r}; it must be 'A', 'B', 'tie' or None")
    signs = [known[letter] for letter in letters]
    lost = [(reasons[i] if reasons else "") or "none" for i, s in enumerate(signs) if np.isnan(s)]
    return _made(answers, signs, _name_of(judge), missing=Counter(lost))


@checked
def judged_by_people(
    answers: Answers,
    store: RatingStore | Path | str,
    *,
    rater: str | None = None,
    pass_number: int | None = None,
    disagreement: Disagreement = "last",
) -> MadePreferences:
    """The answers that people chose in the rating form, over `answers.items()`.

    Arguments but the first are those of `to_pairs`. Pairs that nobody rated, or that raters do not
    settle, count as missing. With disagreement="all" each vote is a pair.

    Raises:
        ValueError: no pair has a winner.
    """
    store = store if isinstance(store, RatingStore) else RatingStore(store)
    items, options = answers.items(), {"rater": rater, "pass_number": pass_number}
    found = to_pairs(store, items, disagreement=disagreement, **options)
    places = {
        (answers.prompt_texts[p], text): place
        for place, (p, text) in enumerate(zip(answers.prompt_of, answers.texts))
    }
    mine = [places[one] for one in zip(found.prompts, found.answers)]
    names = [rater] if rater else dict.fromkeys(r.rater for r in store.ratings(**options))
    chosen, rejected = ([mine[i] for i in some] for some in (found.chosen, found.rejected))
    return MadePreferences(
        preferences=_preferences(answers, chosen, rejected, ties=found.ties),
        origins=answers.origins,
        judge=f"people ({', '.join(names)})",
        pairs=found.votes if disagreement == "all" else len(items),
        ties=found.ties,
        missing={k: n for k in ("unrated", "dropped") if (n := getattr(found, k))},
        duplicated=answers.duplicated,
        config=answers.config,
        margins=found.margins,
    )


@checked
def make_preferences(
    prompts: Any,
    models: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reward: Reward | None = None,
    judge: Judge | None = None,
    config: AnswersConfig = AnswersConfig(),
) -> MadePreferences:
    """Sample answers and let a reward or a judge choose: `sample_answers`, then the labels.

    People take longer: give `sample_answers(...).items()` to `rating_widget`, and later call
    `judged_by_people`.

    Raises:
        ValueError, TypeError: not one of reward and judge is given; or as in those functions.
    """
    if (reward is None) == (judge is None):
        raise ValueError(
            "give either reward or judge; for people, see sample_answers and judged_by_people"
        )
    answers = sample_answers(prompts, models, tokenizer, config)
    return judged_by_reward(answers, reward) if reward else judged_by(answers, judge)


def _made(
    answers: Answers,
    signs: Sequence[float],
    judge: str,
    *,
    margins: Sequence[float] | None = None,
    missing: Mapping[str, int] = {},  # noqa: B006
    scores: np.ndarray | None = None,
) -> MadePreferences:
    """Preferences by a sign per pair: 1 where the first answer wins, NaN without a verdict."""
    won = [k for k, sign in enumerate(signs) if abs(sign) == 1]
    ordered = [answers.pairs[k][:: int(signs[k])] for k in won]
    ties = sum(sign == 0 for sign in signs)
    chosen, rejected = ([pair[side] for pair in ordered] for side in (0, 1))
    return MadePreferences(
        preferences=_preferences(answers, chosen, rejected, ties=ties, scores=scores),
        origins=answers.origins,
        judge=judge,
        pairs=len(signs),
        ties=ties,
        missing=dict(missing),
        duplicated=answers.duplicated,
        config=answers.config,
        margins=None if margins is None else np.array([margins[k] for k in won]),
    )


def _preferences(
    answers: Answers,
    chosen: list[int],
    rejected: list[int],
    *,
    ties: int,
    scores: np.ndarray | None = None,
) -> Preferences:
    repeated = len(chosen) - len(set(zip(chosen, rejected)))
    report = Report(
        pairs=len(chosen), ties=ties, duplicated=repeated, without_eos=answers.truncated
    )
    return Preferences(
        prompts=answers.prompts,
        completions=answers.completions,
        prompt_of=np.array(answers.prompt_of),
        chosen=np.array(chosen, dtype=np.int64),
        rejected=np.array(rejected, dtype=np.int64),
        scores=scores,
        report=report,
    )


def _name_of(judge: Any) -> str:
    """What a reward or judge is called."""
    return str(getattr(judge, "name", None) or getattr(judge, "__name__", type(judge).__name__))
