"""Preferences as data: prompts, completions and pairs of completion indices, tokenized in one place.

Prompt and completion are tokenized apart and joined as ids, so no token straddles the boundary; a prompt begins with BOS
where the tokenizer has one, a completion ends with EOS unless it was cut, and neither is written twice. What was cut,
dropped or found twice is counted in a report, never silent.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpo_lab.batching import CompletionBatch, begun, completion_batch, ended
from dpo_lab.engine.arguments import (
    checked,
    floats,
    folder,
    integer,
    integers,
    one_of,
    token_ids,
    token_lists,
)
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.runs import atomic_write
from dpo_lab.engine.structure import unwrapped, widest
from dpo_lab.logprobs import Precision, score_completions
from dpo_lab.losses import check_pairs

SAME_LOGPS = {
    "float32": 1e-2,
    "bfloat16": 0.75,
}  # nats a completion by which batches of other shapes may differ

EXAMPLE = {"prompt": "This movie", "chosen": " was a joy.", "rejected": " was a bore."}

OPTIONAL = ("tools", "chat_template_kwargs")  # columns of TRL's that the chat template is given

PICTURES = ("image", "images")  # columns of TRL's that no tokenizer reads

JOINED = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # a chat template that adds nothing

Bad = Literal["error", "drop"]


@dataclass(frozen=True)
class Report:
    """What became of the rows, rankings or scores that preferences were made from."""

    pairs: int = 0
    """pairs kept"""
    cut: int = 0
    """completions shortened to fit, which lost their EOS"""
    without_eos: int = 0
    """completions that do not end with EOS, the cut ones included"""
    dropped: int = 0
    """rows dropped because a completion was empty or both were the same text (`bad="drop"`)"""
    identical: int = 0
    """pairs dropped because both completions are the same tokens, after cutting"""
    duplicated: int = 0
    """pairs that stood there already; they are kept, and count twice in the loss"""
    ties: int = 0
    """pairs dropped because both completions have the same score"""
    retokenized: int = 0
    """pairs dropped by `as_text` because their text has other tokens"""
    inner_eos: int = 0
    """completions with EOS, or BOS, before their end: their text spells it out, or they were padded with it"""
    prompt_repeated: int = 0
    """completions that begin with their whole prompt (of three tokens or more), as what `model.generate` returns does"""
    unread: tuple[str, ...] = ()
    """columns of the rows that `from_rows` does not read"""

    def __str__(self) -> str:
        counts = {name: value for name, value in asdict(self).items() if name != "unread"}
        said = [f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items()]
        return ", ".join(
            [*said, *([f"columns not read: {', '.join(self.unread)}"] if self.unread else [])]
        )


@dataclass(frozen=True)
class PairBatch:
    """P pairs with the N completions that they are made of, each completion once: what one step of training reads."""

    completions: CompletionBatch
    reference_logps: Tensor | None
    """(N,) nats; None where the preferences have none"""
    chosen: Tensor
    """(P,) index into the N completions"""
    rejected: Tensor
    """(P,) index into the N completions"""

    @property
    def tokens(self) -> int:
        """Completion tokens in the batch."""
        return self.completions.tokens

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch on `device`. A copy from the CPU to a GPU is not waited for."""
        device, reference = torch.device(device), self.reference_logps
        if reference is not None:
            reference = reference.to(widest(device))
        if self.chosen.device == device and reference is self.reference_logps:
            return self
        wait = device.type == "cpu"
        if reference is not None:
            reference = reference.to(device, non_blocking=not wait)
        return PairBatch(
            self.completions.to(device),
            reference,
            self.chosen.to(device, non_blocking=not wait),
            self.rejected.to(device, non_blocking=not wait),
        )


@dataclass(frozen=True)
class Preferences:
    """P pairs among N completions of M prompts, as lists of ints and as arrays; sequences, arrays and tensors become that.

    Raises ValueError when the parts disagree, and TypeError for values of another kind, by name.
    """

    prompts: list[list[int]]  # M lists of token ids, BOS included where the tokenizer has one
    completions: list[list[int]]  # N lists of token ids
    prompt_of: np.ndarray  # (N,) index into prompts
    chosen: np.ndarray  # (P,) index into completions
    rejected: np.ndarray  # (P,) index into completions
    scores: np.ndarray | None = None  # (N,) what the pairs were labeled by
    reference_logps: np.ndarray | None = None  # (N,) nats
    reference_key: str = ""  # which weights and tokens reference_logps belong to
    reference_precision: Precision = (
        "float32"  # they were computed in; the policy is trained in the same
    )
    report: Report = Report()

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {
            name: token_lists(name, getattr(self, name)) for name in ("prompts", "completions")
        }
        plain |= {
            name: integers(name, getattr(self, name))
            for name in ("prompt_of", "chosen", "rejected")
        }
        optional = {name: getattr(self, name) for name in ("scores", "reference_logps")}
        plain |= {
            name: floats(name, values) for name, values in optional.items() if values is not None
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        one_of("reference_precision", self.reference_precision, Precision)
        n, m = len(self.completions), len(self.prompts)
        for name, values in (
            ("prompt_of", self.prompt_of),
            ("scores", self.scores),
            ("reference_logps", self.reference_logps),
        ):
            if values is not None and len(values) != n:
                raise ValueError(
                    f"{name} has {len(values)} values for {n} completions; there must be one each"
                )
        outside = np.flatnonzero((self.prompt_of < 0) | (self.prompt_of >= m))
        if len(outside):
            raise ValueError(
                f"prompt_of[{outside[0]}] is {self.prompt_of[outside[0]]}; it must be in 0..{m - 1}"
            )
        check_pairs(torch.as_tensor(self.chosen), torch.as_tensor(self.rejected), n)
        if not len(self.chosen):
            raise ValueError(
                f"there is no pair left ({self.report}); give completions that differ in text and in score"
            )
        apart = np.flatnonzero(self.prompt_of[self.chosen] != self.prompt_of[self.rejected])
        if len(apart):
            raise ValueError(
                f"pair {apart[0]} compares completions of two different prompts; both must answer the same one"
            )

    def batch(self, pairs: Sequence[int], *, compact: bool = False) -> PairBatch:
        """The completions of these pairs laid out for `completion_logps`, with their reference log-probs.

        Args:
            pairs: indices of P pairs, at least one; a sequence, array, tensor or range.
            compact: as in `completion_batch`: faster, and exact where `can_compact(model)` says so.

        Raises:
            ValueError, TypeError: no pair, or an index that is no integer in 0..P-1.
        """
        used, chosen, rejected = self.completions_of(pairs)
        completions = completion_batch(
            self.prompts,
            [self.completions[i] for i in used],
            self.prompt_of[used],
            compact=compact,
        )
        reference = None if self.reference_logps is None else self.reference_logps[used]
        return PairBatch(
            completions,
            None if reference is None else torch.as_tensor(reference),
            torch.from_numpy(chosen),
            torch.from_numpy(rejected),
        )

    def completions_of(self, pairs: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The completions of these pairs, (N,), each once, and chosen and rejected (P,) as indices into those N."""
        pairs = self._checked_pairs(pairs)
        both = np.concatenate([self.chosen[pairs], self.rejected[pairs]])
        used, local = np.unique(both, return_inverse=True)
        return used, local[: len(pairs)], local[len(pairs) :]

    def _checked_pairs(self, pairs: Sequence[int]) -> np.ndarray:
        """Indices of pairs as an array, refused by name where there is no such pair."""
        found = integers("pairs", pairs)
        if not len(found):
            raise ValueError("pairs is empty; give the index of at least one pair")
        outside = np.flatnonzero((found < 0) | (found >= len(self.chosen)))
        if len(outside):
            raise ValueError(
                f"pairs[{outside[0]}] is {found[outside[0]]}; "
                f"with {len(self.chosen)} pairs an index must be in 0..{len(self.chosen) - 1}"
            )
        return found

    def steps(self, batch_pairs: int, *, epochs: int = 1, seed: int = 0) -> list[np.ndarray]:
        """The indices of the pairs of each training step, in the order in which `train_dpo` takes them.

        Every epoch is shuffled by (`seed`, epoch). Pairs that share completions stay together, so a step has about
        `batch_pairs` pairs: more only where one ranking has more.

        Raises:
            ValueError: `batch_pairs` or `epochs` below 1.
        """
        check_epochs(epochs, batch_pairs)
        groups = self.linked_pairs()
        plan = plan_prompts(groups, epochs, batch_pairs, seed)
        return [np.array([pair for g in step for pair in groups[g]]) for step in plan]

    def select(self, pairs: Sequence[int]) -> "Preferences":
        """These preferences with only these pairs, in this order; the completions stay."""
        pairs = self._checked_pairs(pairs)
        report = replace(self.report, pairs=len(pairs))
        return replace(
            self, chosen=self.chosen[pairs], rejected=self.rejected[pairs], report=report
        )

    def pairs_by_prompt(self) -> list[list[int]]:
        """The indices of the pairs of each prompt that has any."""
        groups: dict[int, list[int]] = {}
        for pair, p in enumerate(self.prompt_of[self.chosen]):
            groups.setdefault(int(p), []).append(pair)
        return list(groups.values())

    def linked_pairs(self) -> list[list[int]]:
        """The indices of the pairs, those in one list that share completions: a ranking, or what was sampled at a time.

        A short prompt may come many times, each time with completions of its own.
        """
        links = coo_array(
            (np.ones(len(self.chosen)), (self.chosen, self.rejected)),
            shape=2 * (len(self.completions),),
        )
        groups: dict[int, list[int]] = {}
        for pair, group in enumerate(connected_components(links, directed=False)[1][self.chosen]):
            groups.setdefault(int(group), []).append(pair)
        return list(groups.values())

    @checked
    def with_reference(
        self,
        model: nn.Module,
        *,
        known: np.ndarray | None = None,
        precision: Precision = "float32",
        progress: str | None = None,
    ) -> "Preferences":
        """These preferences with the log-probs of `model` beside the completions; computed once for the same weights.

        When they are there already for these weights and tokens, or `known` (N,) from sampling, a few are computed again and
        compared.
        """
        model = unwrapped(model)
        one_of("precision", precision, Precision)
        key = f"{weights_hash(model)}-{self.tokens_hash()}"
        if known is not None:
            self = replace(
                self, reference_logps=known, reference_key=key, reference_precision=precision
            )
        if self.reference_logps is not None and (self.reference_key, self.reference_precision) == (
            key,
            precision,
        ):
            some = np.linspace(0, len(self.completions) - 1, 8).astype(int)
            again = score_completions(
                model,
                self.prompts,
                [self.completions[i] for i in some],
                self.prompt_of[some],
                precision=precision,
            )
            if not np.allclose(again, self.reference_logps[some], atol=SAME_LOGPS[precision]):
                raise ValueError(
                    f"stored reference_logps {self.reference_logps[some]} are not this model's {again.numpy()}, though made by "
                    "the same weights; the file was altered. Delete it and compute them again"
                )
            return self
        logps = score_completions(
            model,
            self.prompts,
            self.completions,
            self.prompt_of,
            precision=precision,
            progress=progress,
        )
        return replace(
            self, reference_logps=logps.numpy(), reference_key=key, reference_precision=precision
        )

    def as_text(self, tokenizer: PreTrainedTokenizerBase) -> "Preferences":
        """These preferences without the pairs whose text, tokenized in one piece, has other tokens; the report counts them.

        Samples are token ids, and not always those that the tokenizer gives their text: it never writes "film" as "fi" + "lm".
        """
        kept = np.flatnonzero([text is not None for text in self._pair_texts(tokenizer)])
        report = replace(
            self.report,
            pairs=len(kept),
            retokenized=self.report.retokenized + len(self.chosen) - len(kept),
        )
        return replace(self, chosen=self.chosen[kept], rejected=self.rejected[kept], report=report)

    def to_trl(self, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """A row a pair, in order, that TRL's `DPOTrainer` (1.16) tokenizes to exactly these ids.

        TRL takes text alone, and appends EOS to plain strings, which a cut completion must not have. So the values are messages
        with BOS and EOS written out, and each row brings a chat template that only joins them. TRL cuts at its `max_length`.

        Raises:
            ValueError: a pair whose text has other tokens.
        """
        texts = self._pair_texts(tokenizer)
        other = [pair for pair, text in enumerate(texts) if text is None]
        if other:
            c, r = self.chosen[other[0]], self.rejected[other[0]]
            found = [
                tokenizer.decode(self.prompts[self.prompt_of[i]] + self.completions[i])
                for i in (c, r)
            ]
            raise ValueError(
                f"the text of {len(other)} of {len(texts)} pairs has other tokens than the pair, pair {other[0]} for one: {found}. "
                "Pass the tokenizer that they were made with, and call preferences.as_text(tokenizer) to drop and count such pairs"
            )
        roles, join = (
            ("user", "assistant", "assistant"),
            {"chat_template_kwargs": {"chat_template": JOINED}},
        )
        rows = [
            [[{"role": role, "content": part}] for role, part in zip(roles, text)]
            for text in texts
            if text
        ]
        return Dataset.from_list([dict(zip(EXAMPLE, row)) | join for row in rows])

    def _pair_texts(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str, str] | None]:
        """Prompt, chosen and rejected of each pair as text; None where that text has other tokens than the pair."""
        prompts = _exact_texts(tokenizer, self.prompts)
        wholes = _exact_texts(
            tokenizer, [self.prompts[p] + ids for p, ids in zip(self.prompt_of, self.completions)]
        )
        texts: list[tuple[str, str, str] | None] = []
        for c, r in zip(self.chosen, self.rejected):
            prompt, chosen, rejected = prompts[self.prompt_of[c]], wholes[c], wholes[r]
            exact = (
                prompt
                and chosen
                and rejected
                and chosen.startswith(prompt)
                and rejected.startswith(prompt)
            )
            texts.append(
                (prompt, chosen[len(prompt) :], rejected[len(prompt) :]) if exact else None
            )
        return texts

    def tokens_hash(self) -> str:
        """16 hexadecimal digits that name the prompts and completions."""
        digest = hashlib.sha256(
            json.dumps([self.prompts, self.completions, self.prompt_of.tolist()]).encode()
        )
        return digest.hexdigest()[:16]

    @checked
    def save(self, directory: Path | str) -> None:
        """Write a `datasets` directory with `prompts`, `completions` and `pairs`, whole or not at all.

        Raises:
            ValueError: the directory holds something else than preferences, whose place these take.
        """
        directory = folder("directory", directory)
        others = (
            directory.is_dir()
            and any(directory.iterdir())
            and not (directory / "preferences.json").exists()
        )
        if others or directory.is_file():
            found = "holds other files" if others else "is a file"
            raise ValueError(
                f"{str(directory)!r} {found}; give a folder of its own, such as {str(directory / 'preferences')!r}"
            )
        columns: dict[str, Any] = {"prompt": self.prompt_of, "ids": self.completions}
        columns |= {
            k: getattr(self, k)
            for k in ("scores", "reference_logps")
            if getattr(self, k) is not None
        }
        parts = DatasetDict(
            prompts=Dataset.from_dict({"ids": self.prompts}),
            completions=Dataset.from_dict(columns),
            pairs=Dataset.from_dict({"chosen": self.chosen, "rejected": self.rejected}),
        )
        meta = {name: getattr(self, name) for name in ("reference_key", "reference_precision")} | {
            "report": asdict(self.report)
        }
        with atomic_write(directory, directory=True) as temporary:
            parts.save_to_disk(temporary)
            (temporary / "preferences.json").write_text(
                json.dumps(meta, indent=2) + "\n", encoding="utf-8"
            )

    @classmethod
    @checked
    def load(cls, directory: Path | str) -> "Preferences":
        """Read what `save` wrote. Raises ValueError when the directory does not hold preferences."""
        directory = folder("directory", directory)
        try:
            meta = json.loads((directory / "preferences.json").read_text(encoding="utf-8"))
            meta["report"]["unread"] = tuple(meta["report"].get("unread", ()))
            parts = load_from_disk(str(directory))
            completions, pairs = parts["completions"], parts["pairs"]
            optional = {
                name: np.array(completions[name][:], dtype=np.float64)
                for name in ("scores", "reference_logps")
                if name in completions.column_names
            }
            return cls(
                prompts=list(parts["prompts"]["ids"]),
                completions=list(completions["ids"]),
                prompt_of=np.array(completions["prompt"][:]),
                chosen=np.array(pairs["chosen"][:]),
                rejected=np.array(pairs["rejected"][:]),
                reference_key=meta["reference_key"],
                reference_precision=meta["reference_precision"],
                report=Report(**meta["report"]),
                **optional,
            )
        except (
            OSError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:  # of the file system, json, arrow and the checks above
            raise ValueError(
                f"{directory} does not hold preferences ({error}); make them with `dpo-lab label`"
            ) from error


def check_epochs(epochs: int, batch_pairs: int) -> None:
    """Raise ValueError unless there is something to train on."""
    for name, value in (("epochs", epochs), ("batch_pairs", batch_pairs)):
        if integer(name, value) < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def plan_prompts(
    groups: list[list[int]], epochs: int, batch_pairs: int, seed: int
) -> list[list[int]]:
    """Which groups of pairs each step takes: about `batch_pairs` pairs, groups kept whole.

    Every epoch is shuffled by (seed, epoch).
    """
    plan: list[list[int]] = []
    for epoch in range(epochs):
        step, pairs = [], 0
        for g in np.random.default_rng([seed, epoch]).permutation(len(groups)):
            if step and pairs + len(groups[g]) > batch_pairs:
                plan.append(step)
                step, pairs = [], 0
            step.append(int(g))
            pairs += len(groups[g])
        plan.append(step)
    return plan


def from_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_completion_tokens: int | None = None,
    bad: Bad = "error",
) -> Preferences:
    """Preferences from rows with TRL's columns `prompt`, `chosen`, `rejected`.

    A value is a string, or a list of messages (`role`, `content`), which the tokenizer's chat template renders. A row of
    messages may bring `tools` (a list, or JSON) and `chat_template_kwargs`, which the template is given, as TRL 1.16 does;
    so `to_trl`'s rows come back as the same tokens. Other columns are named in the report. Prompt and completion together
    are cut to `context` tokens, completions to `max_completion_tokens`; prompts are never cut.

    Args:
        rows: mappings, in any iterable: a list, a `datasets.Dataset`, a generator.
        context: tokens of the model's context, at least 2.
        max_completion_tokens: at least 1, or None for no limit beyond the context.
        bad: "error", or "drop" to drop and count rows with an empty completion, or the same one twice.

    Raises:
        ValueError: a column missing or misspelt, a completion empty or equal to its rival (unless bad="drop"), a completion
            whose messages are not the assistant's, a template that fails, a prompt that leaves no room for a completion.
    """
    one_of("bad", bad, Bad)
    builder = _Builder(tokenizer, context, max_completion_tokens)
    for i, values in enumerate(_checked_rows(rows)):
        where = f"row {i}"
        _check_columns(where, values, builder.unread)
        row = _row(where, values, tokenizer)
        problem = None
        if row.empty:
            problem = f"{where} has an empty {row.empty} completion: {dict(values)}"
        elif row.chosen == row.rejected:
            problem = f"{where} has the same text as chosen and as rejected: {row.chosen!r}"
        if problem and bad == "error":
            raise ValueError(
                f"{problem}. Mend the row, or pass bad='drop' to drop and count such rows"
            )
        if problem:
            builder.counts["dropped"] += 1
            continue
        p = builder.prompt(row.prompt, where=where, chat=row.chat)
        head = row.prompt if row.joined else ""
        sides = {"chosen": row.chosen, "rejected": row.rejected}
        builder.pair(
            *(
                builder.completion(p, t, where=f"{where}: {name}", chat=row.chat, head=head)
                for name, t in sides.items()
            )
        )
    return builder.build()


def from_rankings(
    prompts: Sequence[str],
    rankings: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_completion_tokens: int | None = None,
) -> Preferences:
    """Preferences from K completions a prompt, best first: K(K-1)/2 pairs. Errors as in `from_rows`."""
    _check_lists(prompts=prompts, rankings=rankings)
    if len(prompts) != len(rankings):
        raise ValueError(
            f"{len(prompts)} prompts and {len(rankings)} rankings; there must be one ranking a prompt"
        )
    builder = _Builder(tokenizer, context, max_completion_tokens)
    for i, (prompt, ranking) in enumerate(zip(prompts, rankings)):
        texts = not isinstance(ranking, str) and all(isinstance(text, str) for text in ranking)
        if (
            not texts
            or not len(ranking) == len(set(ranking)) >= 2
            or not all(map(str.strip, ranking))
        ):
            raise ValueError(
                f"ranking {i} must hold at least two different, non-empty completions, best first; found {ranking}"
            )
        p = builder.prompt(prompt, where=f"prompt {i}")
        members = [
            builder.completion(p, text, where=f"ranking {i}: text {k}")
            for k, text in enumerate(ranking)
        ]
        for better, worse in combinations(members, 2):
            builder.pair(better, worse)
    return builder.build()


def from_scores(
    prompts: Sequence[str] | Sequence[Sequence[int]],
    completions: Sequence[Sequence[str]] | Sequence[Sequence[Sequence[int]]],
    scores: Sequence[Sequence[float]] | np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_completion_tokens: int | None = None,
) -> Preferences:
    """Preferences from K scored completions a prompt, texts or token ids as sampled: a pair for every two scores that differ.

    Token ids, in sequences, arrays or tensors, are taken as they are (BOS and EOS included). Ties are dropped and counted.

    Raises:
        ValueError, TypeError: as many prompts, lists and scores are not given, a score is not finite, a completion is empty,
            or an id is no integer or negative.
    """
    _check_lists(prompts=prompts, completions=completions, scores=scores)
    if not len(prompts) == len(completions) == len(scores):
        raise ValueError(
            f"{len(prompts)} prompts, {len(completions)} lists of completions, {len(scores)} of scores; one each"
        )
    builder = _Builder(tokenizer, context, max_completion_tokens)
    for i, (prompt, texts, values) in enumerate(zip(prompts, completions, scores)):
        values = floats(f"scores[{i}]", values).tolist()
        if isinstance(texts, str):
            raise ValueError(
                f"completions[{i}] is one string, {texts!r}; give a list of completions for each prompt"
            )
        if len(texts) != len(values) or not all(map(math.isfinite, values)):
            raise ValueError(
                f"prompt {i} has {len(texts)} completions and scores {values}; one finite score each"
            )
        try:
            empty = 0 in map(len, texts)
        except TypeError:  # of what has no length, and is refused below
            empty = False
        if empty:
            raise ValueError(f"prompt {i} has an empty completion; drop it, or end it with EOS")
        p = builder.prompt(prompt, where=f"prompt {i}")
        places = [f"completions[{i}][{k}]" for k in range(len(texts))]
        members = [
            builder.completion(p, t, where=w, score=value)
            for t, w, value in zip(texts, places, values)
        ]
        for (a, score_a), (b, score_b) in combinations(zip(members, values), 2):
            if a != b and score_a == score_b:
                builder.counts["ties"] += 1
            else:
                builder.pair(*((a, b) if score_a > score_b else (b, a)))
    return builder.build()


class _Builder:
    """Collects distinct prompts and completions as token ids, and the pairs among them."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context: int, max_completion_tokens: int | None
    ):
        self.tokenizer, self.context = tokenizer, integer("context", context)
        limit = (
            self.context
            if max_completion_tokens is None
            else integer("max_completion_tokens", max_completion_tokens)
        )
        if limit < 1:
            raise ValueError(
                f"max_completion_tokens is {limit}; it must be at least 1, or None for no limit"
            )
        self.limit = limit
        self.bos, self.eos, self.bos_text = (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.bos_token or "",
        )
        self.starts_with_bos = tokenizer("")["input_ids"][:1] == [self.bos]
        doubled = tokenizer.decode(2 * self.encoded("a"))
        self.newline = (
            self.encoded("\n") if doubled == "a a" else []
        )  # SentencePiece puts a space before every text
        self.prompts: dict[tuple[int, ...], int] = {}
        self.room: list[int] = []  # tokens left for a completion of each prompt
        self.asked: list[
            str | tuple[int, ...]
        ] = []  # prompts of two tokens or more as they were given, without BOS
        self.completions: dict[tuple[int, tuple[int, ...]], int] = {}
        self.scores: list[float | None] = []
        self.pairs: list[tuple[int, int]] = []
        self.cut: set[tuple[int, tuple[int, ...]]] = (
            set()
        )  # distinct completions that did not fit, whole
        self.counts = dict.fromkeys(
            (
                "without_eos",
                "dropped",
                "identical",
                "duplicated",
                "ties",
                "inner_eos",
                "prompt_repeated",
            ),
            0,
        )
        self.unread: dict[str, None] = {}  # columns, in order

    def encoded(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def continued(self, text: str) -> list[int]:
        """Token ids of a text that follows another, without a space that it does not have."""
        n, ids = len(self.newline), self.encoded("\n" + text) if self.newline else []
        return ids[n:] if ids[:n] == self.newline and ids[n:] else self.encoded(text)

    def prompt(self, prompt: str | Sequence[int], *, where: str, chat: bool = False) -> int:
        if isinstance(prompt, str):
            _check_text(where, prompt)
            ids = self.encoded(prompt)
        else:
            ids = token_ids(where, prompt)
        if isinstance(prompt, str) and not chat and (self.starts_with_bos or not ids):
            ids = begun(ids, self.needed_eos(where) if self.bos is None else self.bos)
        if len(ids) >= self.context:
            raise ValueError(
                f"{where}: the prompt has {len(ids)} tokens and the model's context is {self.context}, which leaves no room for "
                "a completion; shorten the prompt or take a model with a longer context"
            )
        if tuple(ids) not in self.prompts:
            self.prompts[tuple(ids)] = len(self.prompts)
            self.room.append(min(self.limit, self.context - len(ids)))
            asked = (
                prompt.removeprefix(self.bos_text)
                if isinstance(prompt, str)
                else self.without_bos(tuple(ids))
            )
            self.asked.append(asked if len(ids) > 2 and not chat else "")
        return self.prompts[tuple(ids)]

    def completion(
        self,
        p: int,
        completion: str | Sequence[int],
        *,
        where: str,
        chat: bool = False,
        head: str = "",
        score: float | None = None,
    ) -> int:
        """The index of a completion of prompt `p`; `head` is a prompt that it is tokenized in one piece with."""
        if isinstance(completion, str):
            _check_text(where, completion)
            ids = (
                self.encoded(head + completion)[len(self.encoded(head)) :]
                if head
                else self.continued(completion)
            )
            ids = ids if chat else ended(ids, self.needed_eos(where))
        else:
            ids = token_ids(where, completion)
        key = (p, tuple(ids[: self.room[p]]))
        if len(ids) > self.room[p]:
            self.cut.add((p, tuple(ids)))
        if key not in self.completions:
            self.completions[key] = len(self.completions)
            self.scores.append(score)
            kept, asked = key[1], self.asked[p]
            self.counts["without_eos"] += self.eos not in kept[-2:]
            turn = chat and kept[-1] != self.eos  # templates write a line break after it
            inside = kept[: -2 if turn else -1]
            self.counts["inner_eos"] += self.eos in inside or self.bos in inside
            if isinstance(asked, str):
                self.counts["prompt_repeated"] += (
                    bool(asked) and isinstance(completion, str) and completion.startswith(asked)
                )
            else:
                self.counts["prompt_repeated"] += self.without_bos(kept)[: len(asked)] == asked
        return self.completions[key]

    def without_bos(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        return ids[1:] if ids[:1] == (self.bos,) else ids

    def needed_eos(self, where: str) -> int:
        if self.eos is None:
            raise ValueError(
                f"{where}: the tokenizer has no EOS token to end a completion with; set tokenizer.eos_token"
            )
        return self.eos

    def pair(self, chosen: int, rejected: int) -> None:
        if chosen == rejected:
            self.counts["identical"] += 1
        else:
            self.pairs.append((chosen, rejected))

    def build(self) -> Preferences:
        self.counts["duplicated"] = len(self.pairs) - len(set(self.pairs))
        pairs = np.array(self.pairs, dtype=np.int64).reshape(-1, 2)
        return Preferences(
            prompts=[list(ids) for ids in self.prompts],
            completions=[list(ids) for _, ids in self.completions],
            prompt_of=np.array([p for p, _ in self.completions], dtype=np.int64),
            chosen=pairs[:, 0],
            rejected=pairs[:, 1],
            scores=None if None in self.scores else np.array(self.scores),
            report=Report(
                pairs=len(pairs), cut=len(self.cut), unread=tuple(self.unread), **self.counts
            ),
        )


def _exact_texts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]
) -> list[str | None]:
    """The text of each row of ids, special tokens written out; None where that text has other ids."""
    texts = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [text if ids == list(row) else None for text, ids, row in zip(texts, again, rows)]


def _check_text(where: str, text: str) -> None:
    """Refuse what no tokenizer takes: half of a character that UTF-16 writes as two."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start} is {text[error.start]!r}, a lone surrogate, which is no text; read the file in the "
            "encoding that it was written in, or mend it by text.encode('utf-8', 'replace').decode()"
        ) from None


def _check_lists(**lists: Any) -> None:
    """Raise unless each is a sequence and no single text."""
    for name, values in lists.items():
        if isinstance(values, (str, Mapping)) or not hasattr(values, "__len__"):
            raise TypeError(
                f"{name} is {values!r} ({type(values).__name__}); it must be a list with one entry for each prompt"
            )


def _checked_rows(rows: Any) -> Iterable[Mapping[str, Any]]:
    """`rows`, each of which is a mapping."""
    kind, found = type(rows).__name__, None
    if isinstance(rows, Mapping):
        found = f" with the keys {list(rows)}; pass a list of rows, or the rows of one split, as in rows['train']"
        if all(name in rows for name in EXAMPLE):
            found = " that is one row; pass a list of rows, as in [row]"
        if all(isinstance(rows.get(name), list) and not _messages(rows[name]) for name in EXAMPLE):
            found = " of columns; pass datasets.Dataset.from_dict(rows)"
    elif isinstance(rows, (str, bytes, Path)):
        found = " and no rows; read the file first, as in datasets.load_dataset('json', data_files=path)['train']"
    elif hasattr(rows, "columns") and hasattr(rows, "shape"):
        found = "; pass a dataset made of it, as in datasets.Dataset.from_pandas(rows)"
    elif not isinstance(rows, Iterable) and not hasattr(rows, "__getitem__"):
        found = f", {rows!r}, which holds no rows"
    if found:
        raise ValueError(f"rows is a {kind}{found}. Each row must be a mapping such as {EXAMPLE}")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {i} is a {type(row).__name__}, {row!r:.200}; each row must be a mapping such as {EXAMPLE}"
            )
        yield row


def _messages(values: Any) -> bool:
    return (
        isinstance(values, Sequence)
        and bool(values)
        and all(isinstance(value, Mapping) for value in values)
    )


def _check_columns(where: str, row: Mapping[str, Any], unread: dict[str, None]) -> None:
    """Refuse a row whose columns are missing, misspelt or needed and not read; what else is not read goes into `unread`."""
    missing = [name for name in EXAMPLE if name not in row]
    if missing:
        near = {name: difflib.get_close_matches(name, row, n=1) for name in missing}
        hints = [f"{found[0]!r} looks like {name!r}" for name, found in near.items() if found]
        if missing == ["prompt"] and not hints:
            hints = [
                "chosen and rejected may hold whole conversations: take what both begin with for the prompt"
            ]
        raise ValueError(
            f"{where} has no column {', '.join(map(repr, missing))}{' (' + '; '.join(hints) + ')' if hints else ''}: {dict(row)}. "
            f"Rename the columns as in this example: {EXAMPLE}"
        )
    for name in row:
        if name in PICTURES and row[name] is not None:
            raise ValueError(
                f"{where} has a column {name!r}; pictures are not read, and its completions would be scored without"
            )
        if name in EXAMPLE or name in OPTIONAL or name in unread:
            continue
        close = difflib.get_close_matches(str(name), OPTIONAL, n=1, cutoff=0.8)
        if close and close[0] not in row:
            raise ValueError(
                f"{where} has a column {name!r}, which looks like {close[0]!r} and would not be read; rename it"
            )
        unread[str(name)] = None


class _Row(NamedTuple):
    """A row as text."""

    prompt: str
    chosen: str
    rejected: str
    empty: str  # the name of a completion that says nothing
    chat: bool  # rendered by a chat template, which writes BOS and EOS itself
    joined: bool  # made by `to_trl`: its tokens are those of prompt and completion in one piece


def _row(where: str, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> _Row:
    """A row as text, messages rendered by the chat template."""
    values = {
        name: list(row[name]) if isinstance(row[name], (tuple, np.ndarray)) else row[name]
        for name in EXAMPLE
    }
    options = _template_options(where, row)
    if all(isinstance(value, str) for value in values.values()):
        if options:
            raise ValueError(
                f"{where} is plain text with {' and '.join(options)}, which a chat template alone reads; give messages"
            )
        empty = next((name for name in ("chosen", "rejected") if not values[name].strip()), "")
        return _Row(**values, empty=empty, chat=False, joined=False)
    if not all(isinstance(value, list) for value in values.values()):
        found = ", ".join(f"{name}: {type(value).__name__}" for name, value in values.items())
        hint = ""
        if isinstance(values["prompt"], str) and _messages(values["chosen"]):
            hint = ". Give the prompt as messages too, and in chosen and rejected the assistant's answer alone"
        raise ValueError(
            f"{where} must hold three strings or three lists of messages; found {found}{hint}"
        )
    options = {"tools": options.get("tools"), **options.get("chat_template_kwargs", {})}
    if tokenizer.chat_template is None and not options.get("chat_template"):
        raise ValueError(
            f"{where} is conversational and the tokenizer has no chat template; set tokenizer.chat_template, or give strings"
        )
    _check_messages(where, values)

    def rendered(messages: list[Mapping[str, Any]], **more: Any) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **more, **options)
        except Exception as error:  # a template is a program, and raises what it likes
            raise ValueError(
                f"{where}: the chat template fails on its messages ({type(error).__name__}: {error}): {messages}. Change the row "
                "(many templates take no system message, or want user and assistant in turn), or the template"
            ) from error

    joined = options.get("chat_template") == JOINED
    prompt, answers, empty = rendered(values["prompt"], add_generation_prompt=True), {}, ""
    for name in ("chosen", "rejected"):
        whole = rendered(values["prompt"] + values[name])
        if not whole.startswith(prompt):
            raise ValueError(
                f"{where}: the chat template renders the prompt differently once it is answered, so it cannot be split off"
            )
        answers[name] = whole[len(prompt) :]
        says = any(
            m.get("tool_calls") or (m["content"] if joined else m["content"].strip())
            for m in values[name]
        )
        empty = empty or ("" if says else name)
    return _Row(prompt, **answers, empty=empty, chat=True, joined=joined)


def _template_options(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns `tools` and `chat_template_kwargs` of a row, those that say something."""
    options = {name: row[name] for name in OPTIONAL if row.get(name) is not None}
    if isinstance(options.get("tools"), str):
        try:
            options["tools"] = json.loads(options["tools"])
        except ValueError as error:
            raise ValueError(
                f"{where}: tools is no JSON ({error}): {options['tools']!r}; give a list of tools, or JSON"
            ) from error
    for name, kind in (("tools", list), ("chat_template_kwargs", Mapping)):
        if name in options and not isinstance(options[name], kind):
            found = options[name]
            raise ValueError(
                f"{where}: {name} is {found!r} ({type(found).__name__}); it must be a {kind.__name__.lower()}"
            )
    return {name: value for name, value in options.items() if value}


def _check_messages(where: str, values: Mapping[str, list[Any]]) -> None:
    """Raise unless the prompt is a conversation, and each completion what the assistant says next."""
    for name, messages in values.items():
        if not messages or not all(map(_is_message, messages)):
            raise ValueError(
                f"{where}: {name} must hold messages with a 'role' and a text as 'content'; found {messages}"
            )
    for name in ("chosen", "rejected"):
        messages, n = values[name], len(values["prompt"])
        if [(m["role"], m["content"]) for m in messages[:n]] == [
            (m["role"], m["content"]) for m in values["prompt"]
        ]:
            raise ValueError(
                f"{where}: {name} holds the whole conversation, and begins with the messages of the prompt, which would be there "
                f"twice; keep the answer alone, as in row[{name!r}][{n}:]"
            )
        for k, message in enumerate(messages):
            if (
                message["role"] in ("user", "system", "developer")
                or k == 0
                and message["role"] != "assistant"
            ):
                raise ValueError(
                    f"{where}: {name}[{k}] has the role {message['role']!r}; a completion holds what the assistant says, so its "
                    "first message has the role 'assistant', and what comes before belongs in the prompt"
                )


def _is_message(message: Any) -> bool:
    """A mapping with a role and a text; a message that calls tools may have no text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))
