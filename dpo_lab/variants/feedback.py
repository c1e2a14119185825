"""Completions rated one by one, desirable or undesirable: the data of KTO, which has no pairs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpo_lab.batching import CompletionBatch, lay_out
from dpo_lab.engine.arguments import checked, floats, integers, one_of, token_lists
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.rows import checked_rows
from dpo_lab.engine.structure import unwrapped, widest
from dpo_lab.engine.tokenizing import TokenCollector
from dpo_lab.logprobs import Precision, score_completions
from dpo_lab.preferences import Preferences

COLUMNS = ("prompt", "completion", "label")


@dataclass(frozen=True)
class FeedbackBatch:
    """R ratings of N completions, and N completions of other prompts: what a step reads."""

    completions: CompletionBatch
    reference_logps: Tensor
    """(N,) nats"""
    mismatched: CompletionBatch
    """after each of the N prompts a completion that belongs to another one"""
    mismatched_logps: Tensor
    """(N,) nats, of the reference"""
    rated: Tensor
    """(R,) index into the N completions"""
    desirable: Tensor
    """(R,) booleans"""
    fraction: float
    """of desirable ratings among all of the step"""

    @property
    def tokens(self) -> int:
        """Completion tokens that are trained on."""
        return self.completions.tokens

    def to(self, device: torch.device | str) -> "FeedbackBatch":
        """The same batch on `device`."""
        device = torch.device(device)
        return FeedbackBatch(
            self.completions.to(device),
            self.reference_logps.to(widest(device)).to(device),
            self.mismatched.to(device),
            self.mismatched_logps.to(widest(device)).to(device),
            self.rated.to(device),
            self.desirable.to(device),
            self.fraction,
        )


@dataclass(frozen=True)
class BinaryFeedback:
    """R ratings of N completions of M prompts, each rating desirable or undesirable.

    A completion may be rated several times. `from_rows` reads TRL's rows, and `from_pairs` takes
    pairs apart.

    Raises:
        ValueError, TypeError: the parts disagree, or hold values of another kind.
    """

    prompts: list[list[int]]
    """M lists of token ids, BOS included where the tokenizer has one"""
    completions: list[list[int]]
    """N lists of token ids"""
    prompt_of: np.ndarray
    """(N,) index into prompts"""
    rated: np.ndarray
    """(R,) index into completions"""
    desirable: np.ndarray
    """(R,) booleans"""
    reference_logps: np.ndarray | None = None
    """(N,) nats"""
    mismatched_logps: np.ndarray | None = None
    """(N,) nats: the reference's log-prob of the completion `others[i]` after the prompt of
    completion i"""
    reference_key: str = ""
    """which weights reference_logps belong to"""
    reference_precision: Precision = "float32"
    """the precision that they were computed in; the policy is trained in the same"""

    def __post_init__(self) -> None:
        # plain lists and arrays
        plain: dict[str, Any] = {}
        for name in ("prompts", "completions"):
            plain[name] = token_lists(name, getattr(self, name))
        for name in ("prompt_of", "rated"):
            plain[name] = integers(name, getattr(self, name))
        plain["desirable"] = _booleans(self.desirable)
        for name in ("reference_logps", "mismatched_logps"):
            if getattr(self, name) is not None:
                plain[name] = floats(name, getattr(self, name))
        for name, value in plain.items():
            object.__setattr__(self, name, value)

        one_of("reference_precision", self.reference_precision, Precision)
        self._check_parts()

    def _check_parts(self) -> None:
        """Raise ValueError where the parts disagree."""
        n = len(self.completions)
        for name in ("prompt_of", "reference_logps", "mismatched_logps"):
            values = getattr(self, name)
            if values is not None and len(values) != n:
                raise ValueError(
                    f"{name} has {len(values)} values for {n} completions; there must be one each"
                )
            if values is not None and not np.isfinite(values).all():
                i = int(np.flatnonzero(~np.isfinite(values))[0])
                raise ValueError(f"{name}[{i}] is {values[i]}; every value must be finite")
        if len(self.rated) != len(self.desirable) or not len(self.rated):
            raise ValueError(
                f"rated has {len(self.rated)} indices and desirable {len(self.desirable)} values; "
                "there must be one of each per rating, and at least one rating"
            )
        for name, most in (("prompt_of", len(self.prompts)), ("rated", n)):
            index = getattr(self, name)
            outside = np.flatnonzero((index < 0) | (index >= most))
            if len(outside):
                i = int(outside[0])
                raise ValueError(f"{name}[{i}] is {index[i]}; it must be in 0..{most - 1}")

    @classmethod
    def from_pairs(cls, preferences: Preferences) -> "BinaryFeedback":
        """Each pair taken apart: its chosen completion is desirable, its rejected undesirable.

        A completion that is chosen in one pair and rejected in another is rated both ways. Stored
        reference log-probs are kept.
        """
        p = preferences
        sides = (np.ones(len(p.chosen), dtype=bool), np.zeros(len(p.rejected), dtype=bool))
        return cls(
            p.prompts,
            p.completions,
            p.prompt_of,
            rated=np.concatenate([p.chosen, p.rejected]),
            desirable=np.concatenate(sides),
            reference_logps=p.reference_logps,
            reference_key=p.reference_key.split("-")[0],
            reference_precision=p.reference_precision,
        )

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int,
        max_completion_tokens: int | None = None,
    ) -> "BinaryFeedback":
        """Feedback from rows with TRL's columns `prompt`, `completion` (texts) and `label`.

        Args:
            rows: mappings, in any iterable: a list, a `datasets.Dataset`, a generator.
            tokenizer: of the model.
            context: tokens of the model's context; completions are truncated to fit.
            max_completion_tokens: at least 1, or None for no limit beyond the context.

        Raises:
            ValueError, TypeError: a column missing, a text empty or no text, or a label that is
                not True or False.
        """
        tokens = TokenCollector(tokenizer, context, max_completion_tokens)
        rated, desirable = [], []
        for i, row in enumerate(checked_rows(rows)):
            _check_row(f"row {i}", row)
            p = tokens.prompt(row["prompt"], where=f"row {i}")
            rated.append(tokens.completion(p, row["completion"], where=f"row {i}: completion"))
            desirable.append(bool(row["label"]))
        return cls(
            [list(ids) for ids in tokens.prompts],
            [list(ids) for _, ids in tokens.completions],
            np.array([p for p, _ in tokens.completions], dtype=np.int64),
            np.array(rated, dtype=np.int64),
            np.array(desirable, dtype=bool),
        )

    @cached_property
    def others(self) -> np.ndarray:
        """(N,) for each completion the index of one that belongs to another prompt.

        A permutation, where no prompt has more than half of the completions.

        Raises:
            ValueError: all completions belong to the same prompt.
        """
        # prompts of the same tokens are the same prompt
        known: dict[tuple[int, ...], int] = {}
        of_prompt = [known.setdefault(tuple(ids), len(known)) for ids in self.prompts]
        keys = np.array(of_prompt)[self.prompt_of]
        if len(set(keys.tolist())) < 2:
            raise ValueError(
                "prompt_of names one prompt alone; KTO's reference point is measured on completions"
                " of other prompts, so give feedback on at least two different prompts"
            )

        # shifted by the largest group, a completion lands in another one
        order = np.argsort(keys, kind="stable")
        found = np.empty(len(keys), dtype=np.int64)
        found[order] = np.roll(order, -np.bincount(keys).max())
        for i in np.flatnonzero(keys[found] == keys):
            found[i] = np.flatnonzero(keys != keys[i])[0]
        return found

    @checked
    def with_reference(
        self, model: nn.Module, *, precision: Precision = "float32", progress: str | None = None
    ) -> "BinaryFeedback":
        """This feedback with the log-probs of `model`, of completions and of mismatched ones.

        Those of the completions are kept where they are stored for these weights.

        Args:
            model: the reference, a causal LM.
            precision: to compute in.
            progress: the name of a progress bar, or None for no bar.
        """
        model, owners = unwrapped(model), self.prompt_of.tolist()
        key, options = weights_hash(model), {"precision": precision, "progress": progress}

        own = self.reference_logps
        if own is None or (self.reference_key, self.reference_precision) != (key, precision):
            own = score_completions(model, self.prompts, self.completions, owners, **options)
            own = own.numpy()
        mismatched = [self.completions[i] for i in self.others]
        logps = score_completions(model, self.prompts, mismatched, owners, **options).numpy()

        stored = {"reference_logps": own, "mismatched_logps": logps}
        return replace(self, **stored, reference_key=key, reference_precision=precision)

    def batch(
        self, ratings: np.ndarray, fraction: float, *, compact: bool = False
    ) -> FeedbackBatch:
        """The completions of these ratings, each once, and as many mismatched ones.

        `fraction` is that of `FeedbackBatch`.
        """
        used, rated = np.unique(self.rated[ratings], return_inverse=True)
        owners = self.prompt_of[used].tolist()
        own = [self.completions[i] for i in used]
        other = [self.completions[i] for i in self.others[used]]
        return FeedbackBatch(
            lay_out(self.prompts, own, owners, compact),
            torch.as_tensor(self.reference_logps[used]),
            lay_out(self.prompts, other, owners, compact),
            torch.as_tensor(self.mismatched_logps[used]),
            torch.from_numpy(rated),
            torch.from_numpy(self.desirable[ratings]),
            fraction,
        )


def _booleans(values: Any) -> np.ndarray:
    """Booleans of Python, numpy or torch as an array (R,)."""
    found = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if found.dtype != bool or found.ndim != 1:
        raise TypeError(
            f"desirable is an array of {found.dtype} of shape {found.shape}; it must be (R,) "
            "booleans, True for a desirable completion"
        )
    return found


def _check_row(where: str, row: Mapping[str, Any]) -> None:
    """Raise unless a row has two texts and a label."""
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        raise ValueError(
            f"{where} has no column {missing[0]!r}; it has {', '.join(map(repr, row))}, and needs "
            "'prompt', 'completion' and 'label'"
        )
    for name in ("prompt", "completion"):
        if not isinstance(row[name], str):
            raise TypeError(
                f"{where}: {name} is {row[name]!r} ({type(row[name]).__name__}); it must be a text"
            )
    if not row["completion"]:
        raise ValueError(f"{where}: completion is empty; drop the row")
    if not isinstance(row["label"], (bool, np.bool_)):
        raise TypeError(
            f"{where}: label is {row['label']!r}; it must be True for a desirable completion, or "
            "False"
        )
