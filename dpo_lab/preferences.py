"""Preferences as data: prompts, completions and pairs of completion indices, tokenised in one place.

Prompt and completion are tokenised apart and joined as ids, so no token straddles the boundary; a completion ends with
EOS unless it was cut. What was cut, dropped or found twice is counted in a report, never silent.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpo_lab.arguments import checked, one_of
from dpo_lab.logprobs import Precision, score_completions
from dpo_lab.losses import check_pairs
from dpo_lab.runs import weights_hash, write_whole

SAME_LOGPS = {"float32": 1e-2, "bfloat16": 0.75}  # nats a completion by which batches of other shapes may differ
EXAMPLE = {"prompt": "This movie", "chosen": " was a joy.", "rejected": " was a bore."}
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
    retokenised: int = 0
    """pairs dropped by `as_text` because their text has other tokens"""

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Preferences:
    """P pairs among N completions of M prompts. Raises ValueError when the parts disagree."""

    prompts: list[list[int]]  # M lists of token ids, BOS included where the tokenizer has one
    completions: list[list[int]]  # N lists of token ids
    prompt_of: np.ndarray  # (N,) index into prompts
    chosen: np.ndarray  # (P,) index into completions
    rejected: np.ndarray  # (P,) index into completions
    scores: np.ndarray | None = None  # (N,) what the pairs were labelled by
    reference_logps: np.ndarray | None = None  # (N,) nats
    reference_key: str = ""  # which weights and tokens reference_logps belong to
    reference_precision: Precision = "float32"  # they were computed in; the policy is trained in the same
    report: Report = Report()

    def __post_init__(self) -> None:
        one_of("reference_precision", self.reference_precision, Precision)
        n, m = len(self.completions), len(self.prompts)
        for name, values in (("prompt_of", self.prompt_of), ("scores", self.scores), ("reference_logps", self.reference_logps)):
            if values is not None and len(values) != n:
                raise ValueError(f"{name} has {len(values)} values for {n} completions; there must be one each")
        outside = np.flatnonzero((self.prompt_of < 0) | (self.prompt_of >= m))
        if len(outside):
            raise ValueError(f"prompt_of[{outside[0]}] is {self.prompt_of[outside[0]]}; it must be in 0..{m - 1}")
        check_pairs(torch.as_tensor(self.chosen), torch.as_tensor(self.rejected), n)
        if not len(self.chosen):
            raise ValueError(f"there is no pair left ({self.report}); give completions that differ in text and in score")
        apart = np.flatnonzero(self.prompt_of[self.chosen] != self.prompt_of[self.rejected])
        if len(apart):
            raise ValueError(f"pair {apart[0]} compares completions of two different prompts; both must answer the same one")

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
        links = coo_array((np.ones(len(self.chosen)), (self.chosen, self.rejected)), shape=2 * (len(self.completions),))
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
        key = f"{weights_hash(model)}-{self.tokens_hash()}"
        if known is not None:
            self = replace(self, reference_logps=known, reference_key=key, reference_precision=precision)
        if self.reference_logps is not None and (self.reference_key, self.reference_precision) == (key, precision):
            some = np.linspace(0, len(self.completions) - 1, 8).astype(int)
            again = score_completions(
                model, self.prompts, [self.completions[i] for i in some], self.prompt_of[some], precision=precision
            )
            if not np.allclose(again, self.reference_logps[some], atol=SAME_LOGPS[precision]):
                raise ValueError(
                    f"stored reference_logps {self.reference_logps[some]} are not this model's {again.numpy()}, though made by "
                    "the same weights; the file was altered. Delete it and compute them again"
                )
            return self
        logps = score_completions(model, self.prompts, self.completions, self.prompt_of, precision=precision, progress=progress)
        return replace(self, reference_logps=logps.numpy(), reference_key=key, reference_precision=precision)

    def as_text(self, tokenizer: PreTrainedTokenizerBase) -> "Preferences":
        """These preferences without the pairs whose text, tokenised in one piece, has other tokens; the report counts them.

        Samples are token ids, and not always those that the tokenizer gives their text: it never writes "film" as "fi" + "lm".
        """
        kept = np.flatnonzero([text is not None for text in self._pair_texts(tokenizer)])
        report = replace(self.report, pairs=len(kept), retokenised=self.report.retokenised + len(self.chosen) - len(kept))
        return replace(self, chosen=self.chosen[kept], rejected=self.rejected[kept], report=report)

    def to_trl(self, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """A row a pair, in order, that TRL's `DPOTrainer` (1.16) tokenises to exactly these ids.

        TRL takes text alone, and appends EOS to plain strings, which a cut completion must not have. So the values are messages
        with BOS and EOS written out, and each row brings a chat template that only joins them. TRL cuts at its `max_length`.

        Raises:
            ValueError: a pair whose text has other tokens.
        """
        texts = self._pair_texts(tokenizer)
        other = [pair for pair, text in enumerate(texts) if text is None]
        if other:
            c, r = self.chosen[other[0]], self.rejected[other[0]]
            found = [tokenizer.decode(self.prompts[self.prompt_of[i]] + self.completions[i]) for i in (c, r)]
            raise ValueError(
                f"the text of {len(other)} of {len(texts)} pairs has other tokens than the pair, pair {other[0]} for one: {found}. "
                "Pass the tokenizer that they were made with, and call preferences.as_text(tokenizer) to drop and count such pairs"
            )
        roles, join = ("user", "assistant", "assistant"), {"chat_template_kwargs": {"chat_template": JOINED}}
        rows = [[[{"role": role, "content": part}] for role, part in zip(roles, text)] for text in texts if text]
        return Dataset.from_list([dict(zip(EXAMPLE, row)) | join for row in rows])

    def _pair_texts(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str, str] | None]:
        """Prompt, chosen and rejected of each pair as text; None where that text has other tokens than the pair."""
        prompts = _exact_texts(tokenizer, self.prompts)
        wholes = _exact_texts(tokenizer, [self.prompts[p] + ids for p, ids in zip(self.prompt_of, self.completions)])
        texts: list[tuple[str, str, str] | None] = []
        for c, r in zip(self.chosen, self.rejected):
            prompt, chosen, rejected = prompts[self.prompt_of[c]], wholes[c], wholes[r]
            exact = prompt and chosen and rejected and chosen.startswith(prompt) and rejected.startswith(prompt)
            texts.append((prompt, chosen[len(prompt) :], rejected[len(prompt) :]) if exact else None)
        return texts

    def tokens_hash(self) -> str:
        """16 hexadecimal digits that name the prompts and completions."""
        digest = hashlib.sha256(json.dumps([self.prompts, self.completions, self.prompt_of.tolist()]).encode())
        return digest.hexdigest()[:16]

    @checked
    def save(self, directory: Path | str) -> None:
        """Write a `datasets` directory with `prompts`, `completions` and `pairs`, whole or not at all."""
        columns: dict[str, Any] = {"prompt": self.prompt_of, "ids": self.completions}
        columns |= {k: getattr(self, k) for k in ("scores", "reference_logps") if getattr(self, k) is not None}
        parts = DatasetDict(
            prompts=Dataset.from_dict({"ids": self.prompts}),
            completions=Dataset.from_dict(columns),
            pairs=Dataset.from_dict({"chosen": self.chosen, "rejected": self.rejected}),
        )
        meta = {name: getattr(self, name) for name in ("reference_key", "reference_precision")} | {"report": asdict(self.report)}
        with write_whole(directory, directory=True) as temporary:
            parts.save_to_disk(temporary)
            (temporary / "preferences.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    @classmethod
    @checked
    def load(cls, directory: Path | str) -> "Preferences":
        """Read what `save` wrote. Raises ValueError when the directory does not hold preferences."""
        try:
            meta = json.loads((Path(directory) / "preferences.json").read_text(encoding="utf-8"))
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
        except (OSError, KeyError, TypeError, ValueError) as error:  # of the file system, json, arrow and the checks above
            raise ValueError(f"{directory} does not hold preferences ({error}); make them with `dpo-lab label`") from error


def from_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_completion_tokens: int | None = None,
    bad: Bad = "error",
) -> Preferences:
    """Preferences from rows with TRL's columns `prompt`, `chosen`, `rejected`.

    A value is a string, or a list of messages (`role`, `content`), which the tokenizer's chat template renders. Prompt and
    completion together are cut to `context` tokens, completions to `max_completion_tokens`; prompts are never cut.

    Raises:
        ValueError: a column missing or misspelt, a completion empty or equal to its rival (unless bad="drop"), a prompt
            that leaves no room for a completion.
    """
    if bad not in get_args(Bad):
        raise ValueError(f"bad is {bad!r}; it must be 'error' or 'drop' (drop and count bad rows)")
    builder = _Builder(tokenizer, context, max_completion_tokens)
    for i, row in enumerate(rows):
        _check_columns(i, row)
        prompt, chosen, rejected, chat = *_texts(i, row, tokenizer), not isinstance(row["prompt"], str)
        problem = None
        if not chosen.strip() or not rejected.strip():
            problem = f"row {i} has an empty {'rejected' if chosen.strip() else 'chosen'} completion: {dict(row)}"
        elif chosen == rejected:
            problem = f"row {i} has the same text as chosen and as rejected: {chosen!r}"
        if problem and bad == "error":
            raise ValueError(f"{problem}. Mend the row, or pass bad='drop' to drop and count such rows")
        if problem:
            builder.counts["dropped"] += 1
            continue
        p = builder.prompt(prompt, where=f"row {i}", chat=chat)
        builder.pair(builder.completion(p, chosen, chat=chat), builder.completion(p, rejected, chat=chat))
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
    if len(prompts) != len(rankings):
        raise ValueError(f"{len(prompts)} prompts and {len(rankings)} rankings; there must be one ranking a prompt")
    builder = _Builder(tokenizer, context, max_completion_tokens)
    for i, (prompt, ranking) in enumerate(zip(prompts, rankings)):
        if isinstance(ranking, str) or not len(ranking) == len(set(ranking)) >= 2 or not all(map(str.strip, ranking)):
            raise ValueError(f"ranking {i} must hold at least two different, non-empty completions, best first; found {ranking}")
        p = builder.prompt(prompt, where=f"prompt {i}")
        members = [builder.completion(p, text) for text in ranking]
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

    Token ids are taken as they are (BOS and EOS included). Ties are dropped and counted.
    """
    if not len(prompts) == len(completions) == len(scores):
        raise ValueError(f"{len(prompts)} prompts, {len(completions)} lists of completions, {len(scores)} of scores; one each")
    builder = _Builder(tokenizer, context, max_completion_tokens)
    for i, (prompt, texts, values) in enumerate(zip(prompts, completions, scores)):
        if len(texts) != len(values) or not np.isfinite(values).all():
            raise ValueError(f"prompt {i} has {len(texts)} completions and scores {list(values)}; one finite score each")
        if not all(map(len, texts)):
            raise ValueError(f"prompt {i} has an empty completion; drop it, or end it with EOS")
        p = builder.prompt(prompt, where=f"prompt {i}")
        members = [builder.completion(p, text, score=float(value)) for text, value in zip(texts, values)]
        for (a, score_a), (b, score_b) in combinations(zip(members, values), 2):
            if a != b and score_a == score_b:
                builder.counts["ties"] += 1
            else:
                builder.pair(*((a, b) if score_a > score_b else (b, a)))
    return builder.build()


class _Builder:
    """Collects distinct prompts and completions as token ids, and the pairs among them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, max_completion_tokens: int | None):
        if max_completion_tokens is not None and max_completion_tokens < 1:
            raise ValueError(f"max_completion_tokens is {max_completion_tokens}; it must be at least 1, or None for no limit")
        self.tokenizer, self.context, self.limit = tokenizer, context, max_completion_tokens or context
        self.starts_with_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        doubled = tokenizer.decode(2 * self.encoded("a"))
        self.newline = self.encoded("\n") if doubled == "a a" else []  # SentencePiece puts a space before every text
        self.prompts: dict[tuple[int, ...], int] = {}
        self.room: list[int] = []  # tokens left for a completion of each prompt
        self.completions: dict[tuple[int, tuple[int, ...]], int] = {}
        self.scores: list[float | None] = []
        self.pairs: list[tuple[int, int]] = []
        self.cut: set[tuple[int, tuple[int, ...]]] = set()  # distinct completions that did not fit, whole
        self.counts = dict.fromkeys(("without_eos", "dropped", "identical", "duplicated", "ties"), 0)

    def encoded(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def continued(self, text: str) -> list[int]:
        """Token ids of a text that follows another, without a space that it does not have."""
        n, ids = len(self.newline), self.encoded("\n" + text) if self.newline else []
        return ids[n:] if ids[:n] == self.newline and ids[n:] else self.encoded(text)

    def prompt(self, prompt: str | Sequence[int], *, where: str, chat: bool = False) -> int:
        ids = self.encoded(prompt) if isinstance(prompt, str) else list(prompt)
        if isinstance(prompt, str) and not chat and (self.starts_with_bos or not ids):
            start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
            ids = [start, *ids]
        if len(ids) >= self.context:
            raise ValueError(
                f"{where}: the prompt has {len(ids)} tokens and the model's context is {self.context}, which leaves no room for "
                "a completion; shorten the prompt or take a model with a longer context"
            )
        if tuple(ids) not in self.prompts:
            self.prompts[tuple(ids)] = len(self.prompts)
            self.room.append(min(self.limit, self.context - len(ids)))
        return self.prompts[tuple(ids)]

    def completion(self, p: int, completion: str | Sequence[int], *, chat: bool = False, score: float | None = None) -> int:
        if isinstance(completion, str):
            ids = self.continued(completion)
            ids = ids if chat else [*ids, self.tokenizer.eos_token_id]
        else:
            ids = list(completion)
        key = (p, tuple(ids[: self.room[p]]))
        if len(ids) > self.room[p]:
            self.cut.add((p, tuple(ids)))
        if key not in self.completions:
            self.completions[key] = len(self.completions)
            self.scores.append(score)
            self.counts["without_eos"] += self.tokenizer.eos_token_id not in key[1][-2:]
        return self.completions[key]

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
            report=Report(pairs=len(pairs), cut=len(self.cut), **self.counts),
        )


def _exact_texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str | None]:
    """The text of each row of ids, special tokens written out; None where that text has other ids."""
    texts = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [text if ids == list(row) else None for text, ids, row in zip(texts, again, rows)]


def _check_columns(i: int, row: Mapping[str, Any]) -> None:
    missing = [name for name in EXAMPLE if name not in row]
    if missing:
        near = {name: difflib.get_close_matches(name, row, n=1) for name in missing}
        hints = [f"{found[0]!r} looks like {name!r}" for name, found in near.items() if found]
        raise ValueError(
            f"row {i} has no column {', '.join(map(repr, missing))}{' (' + '; '.join(hints) + ')' if hints else ''}: {dict(row)}. "
            f"Rename the columns as in this example: {EXAMPLE}"
        )


def _texts(i: int, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of a row as text, messages rendered by the tokenizer's chat template."""
    values = [row[name] for name in EXAMPLE]
    if all(isinstance(value, str) for value in values):
        return tuple(values)
    if not all(isinstance(value, list) for value in values):
        found = ", ".join(f"{name}: {type(value).__name__}" for name, value in zip(EXAMPLE, values))
        raise ValueError(f"row {i} must hold three strings or three lists of messages; found {found}")
    if tokenizer.chat_template is None:
        raise ValueError(
            f"row {i} is conversational and the tokenizer has no chat template; set tokenizer.chat_template, or give strings"
        )
    for name, messages in zip(EXAMPLE, values):
        if not messages or not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in messages):
            raise ValueError(f"row {i}: {name} must hold messages with a 'role' and a text as 'content'; found {messages}")
    prompt = tokenizer.apply_chat_template(values[0], tokenize=False, add_generation_prompt=True)
    answers = []
    for messages in values[1:]:
        whole = tokenizer.apply_chat_template(values[0] + messages, tokenize=False)
        if not whole.startswith(prompt):
            raise ValueError(
                f"row {i}: the chat template renders the prompt differently once it is answered, so it cannot be split off"
            )
        answers.append(whole[len(prompt) :] if any(m["content"].strip() for m in messages) else "")
    return prompt, *answers
