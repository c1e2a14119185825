"""Preferences of your own: answers sampled from models, judged by a reward, a judge or people.

`sample_answers` draws, and `judged_by_reward`, `judged_by` or `judged_by_people` give the labels;
`make_preferences` does both in one call. Every answer keeps its model, temperature and number.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpo_lab.data.rated_pairs import Disagreement, to_pairs
from dpo_lab.data.ratings import Item, RatingStore
from dpo_lab.engine.arguments import checked, floats, integer
from dpo_lab.engine.runs import write_json
from dpo_lab.engine.structure import context_of
from dpo_lab.engine.tokenizing import TokenCollector
from dpo_lab.models import end_tokens, load_model
from dpo_lab.preferences import Preferences, Report
from dpo_lab.sampling import sample_completions

Reward = Callable[[Sequence[str]], Any]
Judge = Callable[[Sequence[str], Sequence[str], Sequence[str]], Any]


@dataclass(frozen=True)
class AnswersConfig:
    """How answers are drawn, and which of them are compared."""

    k: int = 2
    """answers of each model at each temperature to each prompt"""
    temperatures: tuple[float, ...] = (1.0,)
    """0 takes the most likely token each time; then k answers are one"""
    max_new_tokens: int = 32
    """answers are truncated at this length"""
    pairs_per_prompt: int | None = None
    """pairs drawn of each prompt; None for every two of its answers"""
    seed: int = 0
    """of the answers, of the pairs, and of the order in which a judge sees them"""


class Origin(NamedTuple):
    """Where an answer was drawn."""

    model: str
    temperature: float
    number: int
    """of the answer among the k of this model and temperature"""


@dataclass(frozen=True, eq=False)
class Answers:
    """N different answers to M prompts, as tokens and as text, and Q pairs to be judged."""

    prompts: list[list[int]]
    """M lists of token ids"""
    completions: list[list[int]]
    """N lists of token ids; those of one prompt differ in text"""
    prompt_of: list[int]
    """(N,) index into prompts"""
    prompt_texts: list[str]
    """(M,)"""
    texts: list[str]
    """(N,) the answers without the prompt"""
    origins: list[list[Origin]]
    """(N,) where each answer was drawn, once or more often"""
    pairs: list[tuple[int, int]]
    """(Q,) indices into completions, in the order in which a judge sees them"""
    config: AnswersConfig
    truncated: int = 0
    """of the N, those without an end"""

    @property
    def duplicated(self) -> int:
        """Answers that had the text of another to the same prompt, and are one with it."""
        return sum(map(len, self.origins)) - len(self.texts)

    def items(self) -> list[Item]:
        """The pairs as items of `rating_widget`; it draws the sides itself."""
        return [
            Item(self.prompt_texts[self.prompt_of[a]], (self.texts[a], self.texts[b]))
            for a, b in (sorted(pair) for pair in self.pairs)
        ]

    @checked
    def save(self, path: Path) -> None:
        """Write all as JSON, so that another kernel goes on with the same answers."""
        write_json(path, asdict(self))

    @classmethod
    @checked
    def load(cls, path: Path) -> "Answers":
        """Read what `save` wrote. Raises ValueError where the file holds something else."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            found["config"]["temperatures"] = tuple(found["config"]["temperatures"])
            found["config"] = AnswersConfig(**found["config"])
            found["origins"] = [[Origin(*one) for one in some] for some in found["origins"]]
            found["pairs"] = [tuple(pair) for pair in found["pairs"]]
            return cls(**found)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} does not hold answers ({error}); write them by Answers.save"
            ) from error


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


# prompts


def template_prompts(template: str, **values: Sequence[str]) -> list[str]:
    """A prompt for each combination of values: `template_prompts("The {what} is", what=[...])`.

    Raises:
        ValueError: a name in the template has no values, or a list is empty.
    """
    for name, some in values.items():
        if isinstance(some, str) or not len(some):
            raise ValueError(f"{name} is {some!r}; it must be a list of at least one text")
    rows = [dict(zip(values, row)) for row in product(*values.values())]
    try:
        return list(dict.fromkeys(template.format(**row) for row in rows))
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"template is {template!r} and has no values for {error}; it has {list(values)}"
        ) from error


def read_prompts(source: Any, column: str = "prompt") -> list[Any]:
    """Prompts as a list of different ones, from a list, a file, or rows such as a data set's.

    Args:
        source: texts or lists of token ids; rows with a `column`, such as a `datasets.Dataset`; or
            the path of a file: .jsonl with rows, .json with a list, else one prompt per line.
        column: of the rows.

    Raises:
        ValueError, TypeError: there is no prompt, or one is something else.
    """
    if isinstance(source, Path) or (isinstance(source, str) and Path(source).is_file()):
        source = _read_file(Path(source))
    if isinstance(source, (str, Mapping)) or not isinstance(source, Iterable):
        raise TypeError(
            f"prompts is {source!r:.200} ({type(source).__name__}); give a list of texts, the path "
            f"of a file that is there, or rows with a column {column!r}"
        )
    found = []
    for i, row in enumerate(source):
        if isinstance(row, Mapping):
            if column not in row:
                raise ValueError(f"prompts[{i}] has no column {column!r}; it has {list(row)}")
            row = row[column]
        text = isinstance(row, str) and row.strip()
        if not text and (isinstance(row, str) or not hasattr(row, "__len__")):
            raise ValueError(f"prompts[{i}] is {row!r}; it must be a text, or token ids")
        found.append(row if isinstance(row, str) else tuple(row))
    if not found:
        raise ValueError("prompts is empty; give at least one")
    return list(dict.fromkeys(found))


def _read_file(path: Path) -> list[Any]:
    """The rows or lines of a file."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            return json.loads(text)
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
    return [line for line in text.splitlines() if line.strip()]


# answers


@checked
def sample_answers(
    prompts: Any,
    models: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: AnswersConfig = AnswersConfig(),
) -> Answers:
    """Answers of one or several models at one or several temperatures.

    Args:
        prompts: as `read_prompts` takes them.
        models: a causal LM; a checkpoint's folder, or another name that `load_model` takes; or
            several by name, as in {"start": model, "step 100": "runs/dpo/checkpoints/step-100"}.
            What has to be loaded is in memory one at a time.
        tokenizer: the one of all models.
        config: how many answers, at which temperatures, of which length.

    Raises:
        ValueError, TypeError: an argument is something else, a prompt is too long, or no prompt has
            two different answers.
    """
    _check(config)
    asked, named = read_prompts(prompts), _named(models)
    drawn: list[tuple[int, tuple[int, ...], Origin]] = []
    ids: list[list[int]] = []
    for m, (name, given) in enumerate(named.items()):
        model = given if isinstance(given, nn.Module) else load_model(str(given))
        if not ids:
            ids = _tokenized(asked, tokenizer, context_of(model))
        for t, temperature in enumerate(config.temperatures):
            seed = int(np.random.SeedSequence([config.seed, m, t]).generate_state(1)[0])
            rows = sample_completions(
                model,
                ids,
                config.k,
                eos_token_id=end_tokens(model, tokenizer),
                max_new_tokens=config.max_new_tokens,
                temperature=temperature,
                seed=seed,
            )
            for p, some in enumerate(rows):
                drawn += [(p, tuple(c), Origin(name, temperature, n)) for n, c in enumerate(some)]
    return _collect(ids, drawn, tokenizer, config)


def _tokenized(
    prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, context: int
) -> list[list[int]]:
    """Token ids of each prompt, with BOS where the tokenizer has one."""
    tokens = TokenCollector(tokenizer, context, None)
    for i, prompt in enumerate(prompts):
        tokens.prompt(prompt, where=f"prompts[{i}]")
    return [list(ids) for ids in tokens.prompts]


def _collect(
    ids: list[list[int]],
    drawn: Sequence[tuple[int, tuple[int, ...], Origin]],
    tokenizer: PreTrainedTokenizerBase,
    config: AnswersConfig,
) -> Answers:
    """What was drawn: answers of the same text are one, with several origins."""

    def decoded(rows: Sequence[Sequence[int]]) -> list[str]:
        return tokenizer.batch_decode(
            rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    prompt_texts = decoded(ids)
    wholes = decoded([[*ids[p], *completion] for p, completion, _ in drawn])
    places: dict[tuple[int, str], int] = {}
    completions: list[list[int]] = []
    origins: list[list[Origin]] = []
    for (p, completion, origin), whole in sorted(zip(drawn, wholes), key=lambda one: one[0][0]):
        place = places.setdefault((p, whole.removeprefix(prompt_texts[p])), len(places))
        if place == len(origins):
            completions.append(list(completion))
            origins.append([])
        origins[place].append(origin)
    ends = set(tokenizer.all_special_ids)
    answers = Answers(
        prompts=ids,
        completions=completions,
        prompt_of=[p for p, _ in places],
        prompt_texts=prompt_texts,
        texts=[text for _, text in places],
        origins=origins,
        pairs=_pairs([p for p, _ in places], config),
        config=config,
        truncated=sum(completion[-1] not in ends for completion in completions),
    )
    if not answers.pairs:
        raise ValueError(
            "no prompt has two different answers; draw more of them (k), or at a higher temperature"
        )
    return answers


def _pairs(prompt_of: Sequence[int], config: AnswersConfig) -> list[tuple[int, int]]:
    """Which answers are compared, in the order in which a judge sees them, by the seed."""
    members: dict[int, list[int]] = {}
    for place, p in enumerate(prompt_of):
        members.setdefault(p, []).append(place)
    generator = np.random.default_rng([config.seed, 1])
    found = []
    for some in members.values():
        every = list(combinations(some, 2))
        kept = range(len(every))
        if config.pairs_per_prompt is not None and config.pairs_per_prompt < len(every):
            kept = sorted(generator.choice(len(every), config.pairs_per_prompt, replace=False))
        found += [every[k][:: 1 if generator.random() < 0.5 else -1] for k in kept]
    return found


# labels


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


def _named(models: Any) -> dict[str, Any]:
    """Models, or what `load_model` takes, by name."""
    if isinstance(models, Mapping):
        found = {str(name): model for name, model in models.items()}
    elif isinstance(models, (list, tuple)):
        if any(isinstance(model, nn.Module) for model in models):
            raise TypeError("models is a list of models; give them names, as in {'sft': model}")
        found = {str(name): name for name in models}
    else:
        found = {"model" if isinstance(models, nn.Module) else str(models): models}
    for name, model in found.items():
        if not isinstance(model, (nn.Module, str, Path)):
            raise TypeError(
                f"models[{name!r}] is a {type(model).__name__}; give a causal LM, or the folder or "
                "hub id of one"
            )
    if not found:
        raise ValueError("models is empty; give at least one")
    return found


def _name_of(judge: Any) -> str:
    """What a reward or judge is called."""
    return str(getattr(judge, "name", None) or getattr(judge, "__name__", type(judge).__name__))


def _check(config: AnswersConfig) -> None:
    """Raise ValueError for counts below 1, and for no temperature or one that is there twice."""
    counts = {"k": config.k, "max_new_tokens": config.max_new_tokens}
    if config.pairs_per_prompt is not None:
        counts["pairs_per_prompt"] = config.pairs_per_prompt
    for name, value in counts.items():
        if integer(name, value) < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not config.temperatures or len(set(config.temperatures)) < len(config.temperatures):
        raise ValueError(f"temperatures is {config.temperatures}; give at least one, and each once")
