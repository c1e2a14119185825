"""Answers to prompts from one or several models, at one or several temperatures, and their pairs.

Every answer keeps its model, temperature and number; answers of the same text are one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpo_lab.data.prompts import read_prompts
from dpo_lab.data.ratings import Item
from dpo_lab.engine.arguments import checked, integer
from dpo_lab.engine.runs import write_json
from dpo_lab.engine.structure import context_of
from dpo_lab.engine.tokenizing import TokenCollector
from dpo_lab.models import end_tokens, load_model
from dpo_lab.sampling import sample_completions


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
