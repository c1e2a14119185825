"""KTO: training on completions that are each called desirable or undesirable, without pairs.

Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306. The loss is `relatives.kto_loss`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpo_lab.batching import CompletionBatch, lay_out
from dpo_lab.engine.arguments import (
    at_least,
    checked,
    floats,
    folder,
    integer,
    integers,
    one_of,
    settled,
    token_lists,
)
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.distributed import local_shard, world_size
from dpo_lab.engine.records import data_hash, training_run, weights_record
from dpo_lab.engine.rows import checked_rows
from dpo_lab.engine.structure import unwrapped, widest
from dpo_lab.engine.tokenizing import TokenCollector
from dpo_lab.logprobs import Precision, can_compact, score_completions
from dpo_lab.loop import Callback, LoopConfig, Score, check_loop, check_policy, fit
from dpo_lab.losses import check_beta
from dpo_lab.preferences import SAME_LOGPS, Preferences, plan_prompts
from dpo_lab.relatives import check_kto_weights, kto_loss, kto_reference_point

COLUMNS = ("prompt", "completion", "label")


@dataclass(frozen=True)
class KTOConfig:
    """What `train_kto` minimizes, and how."""

    beta: float = 0.1
    """scale of the log-ratios: the larger, the sooner a completion counts as settled"""
    desirable_weight: float = 1.0
    """the paper's lambda_D; where one kind is rarer, its weight times its number should be about
    that of the other"""
    undesirable_weight: float = 1.0
    """the paper's lambda_U"""
    epochs: int = 1
    """passes over the feedback"""
    batch_completions: int = 128
    """rated completions per step"""
    loop: LoopConfig = field(default_factory=LoopConfig)


@checked
def check_kto(config: KTOConfig) -> None:
    """Raise ValueError for a value that cannot be trained with, named with what is allowed."""
    check_beta(config.beta)
    check_kto_weights(config.desirable_weight, config.undesirable_weight)
    at_least(config, {"epochs": 1, "batch_completions": 2})
    check_loop(config.loop)


@dataclass(frozen=True)
class KTOBatch:
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

    def to(self, device: torch.device | str) -> "KTOBatch":
        """The same batch on `device`."""
        device = torch.device(device)
        return KTOBatch(
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

    def batch(self, ratings: np.ndarray, fraction: float, *, compact: bool = False) -> KTOBatch:
        """The completions of these ratings, each once, and as many mismatched ones.

        `fraction` is that of `KTOBatch`.
        """
        used, rated = np.unique(self.rated[ratings], return_inverse=True)
        owners = self.prompt_of[used].tolist()
        own = [self.completions[i] for i in used]
        other = [self.completions[i] for i in self.others[used]]
        return KTOBatch(
            lay_out(self.prompts, own, owners, compact),
            torch.as_tensor(self.reference_logps[used]),
            lay_out(self.prompts, other, owners, compact),
            torch.as_tensor(self.mismatched_logps[used]),
            torch.from_numpy(rated),
            torch.from_numpy(self.desirable[ratings]),
            fraction,
        )


@checked
def train_kto(
    policy: nn.Module,
    feedback: BinaryFeedback,
    config: KTOConfig,
    *,
    seed: int = 0,
    run: Path | str | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    progress: str | None = "KTO",
) -> list[dict[str, Any]]:
    """Train `policy` in place by KTO (Ethayarajh et al. 2024); one dict of metrics per step.

    The reference point z0 of a step is measured on the completions of its batch's prompts with
    completions of other prompts, without a gradient, and is at least 0; with
    gradient_accumulation_steps, of each forward pass. Which completion is put after which prompt is
    decided once, for the whole feedback, so that the reference is scored only once.

    Args:
        policy: a causal LM; dropout is switched off.
        feedback: ratings with reference log-probs, as
            `BinaryFeedback.from_pairs(preferences).with_reference(model)` gives them.
        seed: decides the order of the completions.
        run, resume, callback, progress: as in `train_dpo`.

    Metrics have TRL's names. `rewards/chosen` is the mean implicit reward of desirable ratings, in
    units of beta x nats, and `rewards/rejected` that of undesirable ones; `kl` is z0 in nats.

    Raises:
        ValueError, TypeError: a bad argument; missing reference log-probs; a `run` as `train_dpo`
            refuses it.
        Interrupted: Ctrl-C or SIGTERM with a `run`, after its checkpoint was written.
    """
    _check_kto_training(policy, feedback, config)
    run = None if run is None else folder("run", run)

    def describe() -> dict[str, Any]:
        found = {"method": "KTO", "config": asdict(settled(config)), "seed": integer("seed", seed)}
        data = (feedback.prompts, feedback.completions, feedback.prompt_of)
        data = data_hash(*data, feedback.rated, feedback.desirable.astype(np.int64))
        precision = {"precision": feedback.reference_precision, "data": data}
        return found | precision | weights_record(policy)

    # a resumed run takes the reference log-probs that it began with
    logps = np.concatenate([feedback.reference_logps, feedback.mismatched_logps])
    precision = feedback.reference_precision
    options = {"resume": resume, "logps": logps, "atol": SAME_LOGPS[precision]}
    with training_run(run, describe, **options) as began_with:
        own, mismatched = np.split(began_with, 2)
        feedback = replace(feedback, reference_logps=own, mismatched_logps=mismatched)
        objective = KTOObjective(policy, feedback, config, seed)
        options = {"run": run, "resume": resume, "callback": callback, "progress": progress}
        steps = len(objective.plan)
        return fit(policy, objective, steps, config.loop, precision=precision, **options)


class KTOObjective:
    """The ratings of each step, in shuffled order; the mean is over ratings."""

    @checked
    def __init__(self, policy: nn.Module, feedback: BinaryFeedback, config: KTOConfig, seed: int):
        self.feedback, self.config, self.compact = feedback, config, can_compact(policy)

        # the ratings of one completion stay together
        groups: dict[int, list[int]] = {}
        for rating, completion in enumerate(feedback.rated.tolist()):
            groups.setdefault(completion, []).append(rating)
        self.groups = list(groups.values())
        size = config.batch_completions
        self.plan = plan_prompts(self.groups, config.epochs, size, integer("seed", seed))

    def micro_batches(self, step: int, n: int) -> list[KTOBatch]:
        """The ratings of a step in `n` parts per process."""
        groups = self.plan[step]
        parts = np.array_split(np.array(groups), min(n * world_size(), len(groups)))
        rows = [rating for g in groups for rating in self.groups[g]]
        fraction = float(self.feedback.desirable[rows].mean())
        ratings = [np.concatenate([self.groups[g] for g in part]) for part in local_shard(parts)]
        return [self.feedback.batch(some, fraction, compact=self.compact) for some in ratings]

    def loss(self, score: Score, micro: KTOBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of the ratings, and sums of what is logged."""
        with torch.no_grad():
            z0 = kto_reference_point(score(micro.mismatched), micro.mismatched_logps)
        logps, config = score(micro.completions), self.config
        found = kto_loss(
            logps[micro.rated],
            micro.reference_logps[micro.rated],
            micro.desirable,
            z0,
            config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )

        # a mean over one kind is a sum over it, divided by all ratings and by its fraction of them
        sides = {
            "chosen": (micro.desirable, micro.fraction),
            "rejected": (~micro.desirable, 1 - micro.fraction),
        }
        sums = {
            f"rewards/{name}": found.rewards[which].sum() / fraction
            for name, (which, fraction) in sides.items()
            if fraction
        }
        n = len(micro.rated)
        sums |= {"kl": z0 * n, "gradient_weight/mean": found.gradient_weights.sum()}
        return found.losses.sum(), sums

    def weight(self, micro: KTOBatch) -> int:
        """Ratings."""
        return len(micro.rated)


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


def _check_kto_training(policy: nn.Module, feedback: BinaryFeedback, config: KTOConfig) -> None:
    """Raise for what `train_kto` cannot train, or not with."""
    check_kto(config)
    if not isinstance(feedback, BinaryFeedback):
        raise TypeError(
            f"feedback is a {type(feedback).__name__}; it must be a BinaryFeedback, which "
            "BinaryFeedback.from_pairs(preferences) makes of pairs"
        )
    if feedback.reference_logps is None or feedback.mismatched_logps is None:
        raise ValueError(
            "feedback has no log-probs of the reference, or none of mismatched completions; call "
            "feedback.with_reference(model) with the reference model"
        )
    check_policy(policy, config.loop)
