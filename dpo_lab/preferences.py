"""Preferences as data: prompts, completions, and pairs of completion indices.

Text becomes tokens in one place (`tokenizing`): a prompt begins with BOS where the tokenizer has
one, a completion ends with EOS unless it was truncated, and neither is written twice. What was
truncated, dropped or duplicated is counted in a report, never silent.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpo_lab.batching import CompletionBatch, lay_out
from dpo_lab.engine.arguments import (
    checked,
    floats,
    folder,
    integer,
    integers,
    one_of,
    token_lists,
)
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.rows import (
    check_columns,
    checked_rows,
    exact_texts,
    read_row,
    trl_rows,
)
from dpo_lab.engine.runs import atomic_write, current_config, quiet_bars
from dpo_lab.engine.structure import unwrapped, widest
from dpo_lab.engine.tokenizing import TokenCollector
from dpo_lab.logprobs import Precision, score_completions
from dpo_lab.losses import check_pairs

# nats per completion by which log-probs may differ between batches of other shapes
SAME_LOGPS = {"float32": 1e-2, "bfloat16": 0.75}

Bad = Literal["error", "drop"]


@dataclass(frozen=True)
class Report:
    """What became of the rows, rankings or scores that preferences were made from."""

    pairs: int = 0
    """pairs kept"""
    cut: int = 0
    """completions truncated to fit, which lost their EOS"""
    without_eos: int = 0
    """completions that do not end with EOS, truncated ones included"""
    dropped: int = 0
    """rows dropped because a completion was empty or both were the same text (`bad="drop"`)"""
    identical: int = 0
    """pairs dropped because both completions are the same tokens, after truncation"""
    duplicated: int = 0
    """repeated pairs; they are kept, and count twice in the loss"""
    ties: int = 0
    """pairs dropped because both completions have the same score"""
    retokenized: int = 0
    """pairs dropped by `as_text` because their text has other tokens"""
    inner_eos: int = 0
    """completions with EOS or BOS before their end: spelled out in the text, or padding"""
    prompt_repeated: int = 0
    """completions that begin with their whole prompt (of three tokens or more), as the output of
    `model.generate` does"""
    unread: tuple[str, ...] = ()
    """columns of the rows that `from_rows` does not read"""

    def __str__(self) -> str:
        counts = {name: value for name, value in asdict(self).items() if name != "unread"}
        said = [f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items()]
        if self.unread:
            said.append(f"columns not read: {', '.join(self.unread)}")
        return ", ".join(said)


@dataclass(frozen=True)
class PairBatch:
    """P pairs with the N completions that they compare, each once: what a training step reads."""

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
    """P pairs among N completions of M prompts.

    Sequences, arrays and tensors are taken, and become lists of ints and arrays.

    Raises:
        ValueError, TypeError: the parts disagree, or hold values of another kind.
    """

    prompts: list[list[int]]
    """M lists of token ids, BOS included where the tokenizer has one"""
    completions: list[list[int]]
    """N lists of token ids"""
    prompt_of: np.ndarray
    """(N,) index into prompts"""
    chosen: np.ndarray
    """(P,) index into completions"""
    rejected: np.ndarray
    """(P,) index into completions"""
    scores: np.ndarray | None = None
    """(N,) what the pairs were labeled by"""
    reference_logps: np.ndarray | None = None
    """(N,) nats"""
    reference_key: str = ""
    """which weights and tokens reference_logps belong to"""
    reference_precision: Precision = "float32"
    """the precision that they were computed in; the policy is trained in the same"""
    report: Report = Report()

    def __post_init__(self) -> None:
        # plain lists and arrays
        plain: dict[str, Any] = {}
        for name in ("prompts", "completions"):
            plain[name] = token_lists(name, getattr(self, name))
        for name in ("prompt_of", "chosen", "rejected"):
            plain[name] = integers(name, getattr(self, name))
        for name in ("scores", "reference_logps"):
            if getattr(self, name) is not None:
                plain[name] = floats(name, getattr(self, name))
        for name, value in plain.items():
            object.__setattr__(self, name, value)

        one_of("reference_precision", self.reference_precision, Precision)
        self._check_parts()

    def _check_parts(self) -> None:
        """Raise ValueError where the parts disagree."""
        n, m = len(self.completions), len(self.prompts)
        for name in ("prompt_of", "scores", "reference_logps"):
            values = getattr(self, name)
            if values is not None and len(values) != n:
                raise ValueError(
                    f"{name} has {len(values)} values for {n} completions; there must be one each"
                )
        outside = np.flatnonzero((self.prompt_of < 0) | (self.prompt_of >= m))
        if len(outside):
            raise ValueError(
                f"prompt_of[{outside[0]}] is {self.prompt_of[outside[0]]}; it must be in 0..{m - 1}"
            )

        # the pairs
        check_pairs(torch.as_tensor(self.chosen), torch.as_tensor(self.rejected), n)
        if not len(self.chosen):
            raise ValueError(
                f"there is no pair left ({self.report}); "
                "give completions that differ in text and in score"
            )
        apart = np.flatnonzero(self.prompt_of[self.chosen] != self.prompt_of[self.rejected])
        if len(apart):
            raise ValueError(
                f"pair {apart[0]} compares completions of two different prompts; "
                "both must answer the same one"
            )

    def batch(self, pairs: Sequence[int], *, compact: bool = False) -> PairBatch:
        """The completions of these pairs, laid out for `completion_logps`, with reference logps.

        Args:
            pairs: indices of P pairs, at least one; a sequence, array, tensor or range.
            compact: as in `completion_batch`: faster, and exact where `can_compact(model)` says so.

        Raises:
            ValueError, TypeError: no pair, or an index that is no integer in 0..P-1.
        """
        used, chosen, rejected = self.completions_of(pairs)
        # the tokens were checked when the preferences were made
        completions = lay_out(
            self.prompts,
            [self.completions[i] for i in used],
            self.prompt_of[used].tolist(),
            compact,
        )
        reference = None if self.reference_logps is None else self.reference_logps[used]
        return PairBatch(
            completions,
            None if reference is None else torch.as_tensor(reference),
            torch.from_numpy(chosen),
            torch.from_numpy(rejected),
        )

    def completions_of(self, pairs: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The completions of these pairs, each once, and the pairs as indices into those.

        Returns indices of completions (N,), and chosen and rejected (P,) as indices into the N.
        """
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
        """The indices of the pairs of each training step, in the order of `train_dpo`.

        Every epoch is shuffled by (`seed`, epoch). Pairs that share completions stay together, so a
        step has at most `batch_pairs` pairs, or more where one ranking has more.

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
        return _grouped(self.prompt_of[self.chosen])

    def linked_pairs(self) -> list[list[int]]:
        """The indices of the pairs in groups that share completions.

        A group is a ranking, or what was sampled together: a short prompt may occur many times,
        each time with completions of its own.
        """
        links = (np.ones(len(self.chosen)), (self.chosen, self.rejected))
        graph = coo_array(links, shape=2 * (len(self.completions),))
        _, component = connected_components(graph, directed=False)
        return _grouped(component[self.chosen])

    @checked
    def with_reference(
        self,
        model: nn.Module,
        *,
        known: np.ndarray | None = None,
        precision: Precision = "float32",
        progress: str | None = None,
    ) -> "Preferences":
        """These preferences with the log-probs of `model` beside the completions.

        If they are stored already for these weights and tokens, a few are recomputed as a check.

        Args:
            model: the reference, a causal LM.
            known: (N,) nats, log-probs that are known from sampling, checked in the same way.
            precision: to compute in.
            progress: the name of a progress bar, or None for no bar.

        Raises:
            ValueError: stored log-probs are not this model's.
        """
        model = unwrapped(model)
        one_of("precision", precision, Precision)
        key = f"{weights_hash(model)}-{self.tokens_hash()}"
        named = {"reference_key": key, "reference_precision": precision}
        found = self if known is None else replace(self, reference_logps=known, **named)

        stored = found.reference_logps is not None
        if stored and (found.reference_key, found.reference_precision) == (key, precision):
            found._check_reference(model)
            return found
        logps = score_completions(
            model,
            found.prompts,
            found.completions,
            found.prompt_of,
            precision=precision,
            progress=progress,
        )
        return replace(found, reference_logps=logps.numpy(), **named)

    def _check_reference(self, model: nn.Module) -> None:
        """Recompute a few stored log-probs, and raise ValueError where they differ."""
        some = np.linspace(0, len(self.completions) - 1, 8).astype(int)
        completions = [self.completions[i] for i in some]
        precision, stored = self.reference_precision, self.reference_logps[some]
        again = score_completions(
            model, self.prompts, completions, self.prompt_of[some], precision=precision
        )
        if not np.allclose(again, stored, atol=SAME_LOGPS[precision]):
            raise ValueError(
                f"stored reference_logps {stored} are not this model's {again.numpy()}, though "
                "made by the same weights; the file was altered. Delete it and compute them again"
            )

    def as_text(self, tokenizer: PreTrainedTokenizerBase) -> "Preferences":
        """These preferences without the pairs whose text, tokenized in one piece, has other tokens.

        Samples are token ids, and not always those that the tokenizer gives their text: it never
        writes "film" as "fi" + "lm". The report counts the pairs that are dropped.
        """
        kept = np.flatnonzero([text is not None for text in self._pair_texts(tokenizer)])
        dropped = self.report.retokenized + len(self.chosen) - len(kept)
        report = replace(self.report, pairs=len(kept), retokenized=dropped)
        return replace(self, chosen=self.chosen[kept], rejected=self.rejected[kept], report=report)

    def to_trl(self, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """One row per pair, in order, that TRL's `DPOTrainer` (1.16) reads as exactly these ids.

        TRL takes only text, and appends EOS to plain strings, which a truncated completion must not
        have. So the values are messages with BOS and EOS written out, and each row brings a chat
        template that only joins them. TRL truncates at its `max_length`.

        Raises:
            ValueError: a pair whose text has other tokens.
        """
        texts = self._pair_texts(tokenizer)
        other = [pair for pair, text in enumerate(texts) if text is None]
        if other:
            both = self.chosen[other[0]], self.rejected[other[0]]
            whole = [self.prompts[self.prompt_of[i]] + self.completions[i] for i in both]
            raise ValueError(
                f"the text of {len(other)} of {len(texts)} pairs has other tokens than the pair, "
                f"pair {other[0]} for one: {[tokenizer.decode(ids) for ids in whole]}. Pass the "
                "tokenizer that they were made with, and call preferences.as_text(tokenizer) to "
                "drop and count such pairs"
            )
        return Dataset.from_list(trl_rows(text for text in texts if text))

    def _pair_texts(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str, str] | None]:
        """Prompt, chosen and rejected of each pair as text; None where it has other tokens."""
        prompts = exact_texts(tokenizer, self.prompts)
        joined = [self.prompts[p] + ids for p, ids in zip(self.prompt_of, self.completions)]
        wholes = exact_texts(tokenizer, joined)

        texts: list[tuple[str, str, str] | None] = []
        for c, r in zip(self.chosen, self.rejected):
            prompt, chosen, rejected = prompts[self.prompt_of[c]], wholes[c], wholes[r]
            if not (prompt and chosen and rejected):
                texts.append(None)
            elif not (chosen.startswith(prompt) and rejected.startswith(prompt)):
                texts.append(None)
            else:
                texts.append((prompt, chosen[len(prompt) :], rejected[len(prompt) :]))
        return texts

    def tokens_hash(self) -> str:
        """16 hexadecimal digits that name the prompts and completions."""
        named = json.dumps([self.prompts, self.completions, self.prompt_of.tolist()])
        return hashlib.sha256(named.encode()).hexdigest()[:16]

    @checked
    @quiet_bars()
    def save(self, directory: Path | str) -> None:
        """Write a `datasets` directory of prompts, completions and pairs, whole or not at all.

        Raises:
            ValueError: the directory holds anything but preferences, which these would replace.
        """
        directory = folder("directory", directory)
        _check_replaceable(directory)

        # three tables
        columns: dict[str, Any] = {"prompt": self.prompt_of, "ids": self.completions}
        for name in ("scores", "reference_logps"):
            if getattr(self, name) is not None:
                columns[name] = getattr(self, name)
        parts = DatasetDict(
            prompts=Dataset.from_dict({"ids": self.prompts}),
            completions=Dataset.from_dict(columns),
            pairs=Dataset.from_dict({"chosen": self.chosen, "rejected": self.rejected}),
        )

        # and the rest as JSON
        meta = {
            "reference_key": self.reference_key,
            "reference_precision": self.reference_precision,
            "report": asdict(self.report),
        }
        with atomic_write(directory, directory=True) as temporary:
            parts.save_to_disk(temporary)
            text = json.dumps(meta, indent=2) + "\n"
            (temporary / "preferences.json").write_text(text, encoding="utf-8")

    @classmethod
    @checked
    def load(cls, directory: Path | str) -> "Preferences":
        """Read what `save` wrote. Raises ValueError unless the directory holds preferences."""
        directory = folder("directory", directory)
        try:
            return cls._read(directory)
        # from the file system, json, arrow, or the checks
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{directory} does not hold preferences ({error}); make them with `dpo-lab label`"
            ) from error

    @classmethod
    def _read(cls, directory: Path) -> "Preferences":
        meta = json.loads((directory / "preferences.json").read_text(encoding="utf-8"))
        # in today's names, which an earlier version did not write
        meta["report"] = current_config(meta["report"])
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


def from_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_completion_tokens: int | None = None,
    bad: Bad = "error",
) -> Preferences:
    """Preferences from rows with TRL's columns `prompt`, `chosen`, `rejected`.

    A value is a string, or a list of messages (`role`, `content`), which the tokenizer's chat
    template renders. A row of messages may bring `tools` (a list, or JSON) and
    `chat_template_kwargs`, which the template is given, as TRL 1.16 does; so the rows of `to_trl`
    come back as the same tokens. Other columns are named in the report.

    Args:
        rows: mappings, in any iterable: a list, a `datasets.Dataset`, a generator.
        tokenizer: of the model.
        context: tokens of the model's context, at least 2; prompt and completion together are
            truncated to it, prompts are never truncated.
        max_completion_tokens: at least 1, or None for no limit beyond the context.
        bad: "error", or "drop" to drop and count rows with an empty completion, or the same one
            twice.

    Raises:
        ValueError: a column missing or misspelled, a completion empty or equal to its rival (unless
            bad="drop"), a completion whose messages are not the assistant's, a template that fails,
            or a prompt that leaves no room for a completion.
    """
    one_of("bad", bad, Bad)
    tokens = TokenCollector(tokenizer, context, max_completion_tokens)
    for i, values in enumerate(checked_rows(rows)):
        where = f"row {i}"
        check_columns(where, values, tokens.unread)
        row = read_row(where, values, tokenizer)

        # refuse or drop a pair that teaches nothing
        problem = None
        if row.empty:
            problem = f"{where} has an empty {row.empty} completion: {dict(values)}"
        elif row.chosen == row.rejected:
            problem = f"{where} has the same text as chosen and as rejected: {row.chosen!r}"
        if problem and bad == "error":
            raise ValueError(
                f"{problem}. Correct the row, or pass bad='drop' to drop and count such rows"
            )
        if problem:
            tokens.counts["dropped"] += 1
            continue

        p = tokens.prompt(row.prompt, where=where, chat=row.chat)
        options = {"chat": row.chat, "head": row.prompt if row.joined else ""}
        chosen = tokens.completion(p, row.chosen, where=f"{where}: chosen", **options)
        rejected = tokens.completion(p, row.rejected, where=f"{where}: rejected", **options)
        tokens.pair(chosen, rejected)
    return _collected(tokens)


def from_rankings(
    prompts: Sequence[str],
    rankings: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_completion_tokens: int | None = None,
) -> Preferences:
    """Preferences from K completions per prompt, best first: K (K - 1) / 2 pairs.

    Errors are those of `from_rows`.
    """
    _check_lists(prompts=prompts, rankings=rankings)
    if len(prompts) != len(rankings):
        raise ValueError(
            f"{len(prompts)} prompts and {len(rankings)} rankings; "
            "there must be one ranking per prompt"
        )
    tokens = TokenCollector(tokenizer, context, max_completion_tokens)
    for i, (prompt, ranking) in enumerate(zip(prompts, rankings)):
        _check_ranking(i, ranking)
        p = tokens.prompt(prompt, where=f"prompt {i}")
        members = [
            tokens.completion(p, text, where=f"ranking {i}: text {k}")
            for k, text in enumerate(ranking)
        ]
        for better, worse in combinations(members, 2):
            tokens.pair(better, worse)
    return _collected(tokens)


def from_scores(
    prompts: Sequence[str] | Sequence[Sequence[int]],
    completions: Sequence[Sequence[str]] | Sequence[Sequence[Sequence[int]]],
    scores: Sequence[Sequence[float]] | np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_completion_tokens: int | None = None,
) -> Preferences:
    """Preferences from K scored completions per prompt: a pair for every two scores that differ.

    Completions are texts, or token ids as sampled, in sequences, arrays or tensors; these are taken
    as they are (BOS and EOS included). Ties are dropped and counted.

    Raises:
        ValueError, TypeError: there are not equally many prompts, lists and scores, a score is not
            finite, a completion is empty, or an id is negative or not an integer.
    """
    _check_lists(prompts=prompts, completions=completions, scores=scores)
    if not len(prompts) == len(completions) == len(scores):
        raise ValueError(
            f"{len(prompts)} prompts, {len(completions)} lists of completions, "
            f"{len(scores)} of scores; one each"
        )
    tokens = TokenCollector(tokenizer, context, max_completion_tokens)
    for i, (prompt, some, values) in enumerate(zip(prompts, completions, scores)):
        values = floats(f"scores[{i}]", values).tolist()
        _check_scored(i, some, values)
        p = tokens.prompt(prompt, where=f"prompt {i}")
        members = [
            tokens.completion(p, completion, where=f"completions[{i}][{k}]", score=value)
            for k, (completion, value) in enumerate(zip(some, values))
        ]

        # the higher score is chosen
        for (a, score_a), (b, score_b) in combinations(zip(members, values), 2):
            if a != b and score_a == score_b:
                tokens.counts["ties"] += 1
            else:
                tokens.pair(*((a, b) if score_a > score_b else (b, a)))
    return _collected(tokens)


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


def _collected(tokens: TokenCollector) -> Preferences:
    """Preferences of what was collected, with a report of what became of it."""
    pairs = np.array(tokens.pairs, dtype=np.int64).reshape(-1, 2)
    counts = {**tokens.counts, "duplicated": len(tokens.pairs) - len(set(tokens.pairs))}
    report = Report(
        pairs=len(pairs), cut=len(tokens.truncated), unread=tuple(tokens.unread), **counts
    )
    return Preferences(
        prompts=[list(ids) for ids in tokens.prompts],
        completions=[list(ids) for _, ids in tokens.completions],
        prompt_of=np.array([p for p, _ in tokens.completions], dtype=np.int64),
        chosen=pairs[:, 0],
        rejected=pairs[:, 1],
        scores=None if None in tokens.scores else np.array(tokens.scores),
        report=report,
    )


def _grouped(keys: np.ndarray) -> list[list[int]]:
    """The places of each key, in the order in which the keys first occur."""
    groups: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(int(key), []).append(place)
    return list(groups.values())


def _check_replaceable(directory: Path) -> None:
    """Raise ValueError unless there is nothing at `directory`, or preferences."""
    others = directory.is_dir() and any(directory.iterdir())
    others = others and not (directory / "preferences.json").exists()
    if others or directory.is_file():
        found = "holds other files" if others else "is a file"
        raise ValueError(
            f"{str(directory)!r} {found}; "
            f"give a folder of its own, such as {str(directory / 'preferences')!r}"
        )


def _check_lists(**lists: Any) -> None:
    """Raise TypeError unless each is a sequence, and not a single text."""
    for name, values in lists.items():
        if isinstance(values, (str, Mapping)) or not hasattr(values, "__len__"):
            raise TypeError(
                f"{name} is {values!r} ({type(values).__name__}); "
                "it must be a list with one entry for each prompt"
            )


def _check_ranking(i: int, ranking: Any) -> None:
    """Raise ValueError unless the ranking has at least two different texts, none of them empty."""
    texts = not isinstance(ranking, str) and all(isinstance(text, str) for text in ranking)
    if texts and len(ranking) == len(set(ranking)) >= 2 and all(map(str.strip, ranking)):
        return
    raise ValueError(
        f"ranking {i} must hold at least two different, non-empty completions, best first; "
        f"found {ranking}"
    )


def _check_scored(i: int, completions: Any, scores: list[float]) -> None:
    """Raise ValueError unless prompt `i` has one finite score per completion, none empty."""
    if isinstance(completions, str):
        raise ValueError(
            f"completions[{i}] is one string, {completions!r}; "
            "give a list of completions for each prompt"
        )
    if len(completions) != len(scores) or not all(map(math.isfinite, scores)):
        raise ValueError(
            f"prompt {i} has {len(completions)} completions and scores {scores}; "
            "one finite score each"
        )

    # what has no length is refused when it is tokenized
    try:
        empty = 0 in map(len, completions)
    except TypeError:
        empty = False
    if empty:
        raise ValueError(f"prompt {i} has an empty completion; drop it, or end it with EOS")
