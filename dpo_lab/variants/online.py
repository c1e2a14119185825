"""On-policy DPO: rounds of sampling from the current policy, labeling, and DPO on those pairs.

Offline DPO learns from completions of the reference, and so learns little about those that only the
trained policy draws. Here each round labels what the policy of the last round says (online AI
feedback: Guo et al. 2024, https://arxiv.org/abs/2402.04792; iterated DPO: Xiong et al. 2024,
https://arxiv.org/abs/2312.11456). In self-play (SPIN: Chen et al. 2024,
https://arxiv.org/abs/2401.01335) nobody labels: human text is chosen over the policy's own samples.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from dpo_lab.engine.arguments import (
    at_least,
    checked,
    finite_positive,
    folder,
    integer,
    settled,
    token_lists,
)
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.distributed import world_size
from dpo_lab.engine.records import data_hash, training_run, weights_record
from dpo_lab.engine.runs import write_json
from dpo_lab.logprobs import Precision
from dpo_lab.loop import Callback, check_policy
from dpo_lab.models import check_same_vocabulary
from dpo_lab.own_loss import OwnLoss
from dpo_lab.preferences import Preferences
from dpo_lab.sampling import sample_with_logps
from dpo_lab.train import DPOConfig, check_config, train_dpo
from dpo_lab.variants.labels import Label, joined, labeled_preferences, spin_preferences


@dataclass(frozen=True)
class OnlineConfig:
    """What `train_online_dpo` and `train_spin` sample and train on in each round."""

    rounds: int = 4
    """rounds of sampling, labeling and training; one round is offline DPO"""
    k: int = 4
    """completions sampled per prompt; 4 give 6 pairs"""
    reference: Literal["fixed", "moved"] = "fixed"
    """the reference of every round is the one at the start; or, from the second round on, the
    policy at the end of the round before"""
    pairs: Literal["newest", "all"] = "newest"
    """a round trains on its own pairs; or on those of all rounds so far"""
    temperature: float = 1.0
    """of sampling"""
    max_new_tokens: int = 48
    """longest completion, in tokens"""
    decay: float = 1.0
    """factor on the learning rate from one round to the next"""
    dpo: DPOConfig = field(default_factory=DPOConfig)
    """how a round trains; optimizer, warm-up and schedule begin anew in each"""


@checked
def check_online(config: OnlineConfig) -> None:
    """Raise ValueError for a value that cannot be trained with, named with what is allowed."""
    at_least(config, {"rounds": 1, "k": 1, "max_new_tokens": 1})
    finite_positive("temperature", config.temperature)
    finite_positive("decay", config.decay)
    check_config(config.dpo)


@checked
def train_online_dpo(
    policy: nn.Module,
    reference: nn.Module,
    prompts: Sequence[Sequence[int]],
    label: Label,
    config: OnlineConfig,
    *,
    eos_token_id: int | Sequence[int],
    loss: OwnLoss | None = None,
    precision: Precision = "float32",
    seed: int = 0,
    run: Path | str | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    progress: str | None = "online DPO",
) -> list[dict[str, Any]]:
    """Train `policy` in place by DPO on completions of its own, in rounds; the metrics.

    The prompts are divided among the rounds in their order, each taken once, so that the number of
    labeled completions does not depend on the number of rounds. One round is `train_dpo` on pairs
    of the initial policy.

    Args:
        policy: a causal LM; dropout is switched off.
        reference: of the first round, and of all rounds where it is "fixed"; with the vocabulary of
            the policy. Its weights are not changed.
        prompts: token ids of each prompt, at least as many as rounds.
        label: says which completions are better, as `Label` does.
        eos_token_id: the token that ends a completion, or several (`models.end_tokens`).
        loss: your own loss, as in `train_dpo`.
        precision: of sampling and training.
        seed: of the first round; the others have seeds drawn from it.
        run: directory for the record and a folder for each round, which holds its `preferences` and
            what `train_dpo` writes; without it nothing is written.
        resume: continue the run recorded in `run`, or begin it. The policy must have the weights
            that it began with; the result is bit-identical to that of an uninterrupted run, and
            what is labeled already is not labeled again.
        callback: called with (policy, step) as by `train_dpo`; steps count over all rounds.

    Metrics are those of `train_dpo` with their `round`. The last line of a round also has its
    `pairs`, the `labels` and sampled `tokens` of all rounds so far, and its seconds by phase
    (`seconds/sample`, `seconds/label`, `seconds/reference`, `seconds/train`). A label is a reward,
    or a pair where `label` gives pairs.

    Raises:
        ValueError, TypeError: a bad argument; labels of another shape; a round without any pair; a
            `run` that holds an earlier run (without `resume`) or another one (with it).
        Interrupted: Ctrl-C or SIGTERM while a round trains with a `run`.
    """
    prompts = token_lists("prompts", prompts)
    rounds = _Rounds(policy, config, eos_token_id, precision, seed)
    if config.k < 2:
        raise ValueError(f"k is {config.k}; a pair needs at least 2 completions of a prompt")
    if len(prompts) < config.rounds:
        raise ValueError(
            f"there are {len(prompts)} prompts for {config.rounds} rounds; give at least one for "
            "each round, or lower rounds"
        )
    if not callable(label):
        raise TypeError(f"label is {label!r}; it must be a function of prompts and completions")
    check_same_vocabulary(policy, reference)
    reference.eval()
    parts = [list(part) for part in np.array_split(np.arange(len(prompts)), config.rounds)]

    def collect(number: int) -> tuple[Preferences, dict[str, float]]:
        some = [prompts[i] for i in parts[number - 1]]
        completions, logps, found = rounds.sample(some, number)

        # a label for each completion, or for each pair
        began = time.perf_counter()
        owners = [prompt for prompt in some for _ in range(config.k)]
        labels = label(owners, [ids for row in completions for ids in row])
        preferences = labeled_preferences(some, completions, labels)
        found |= {"labels": len(labels), "seconds/label": time.perf_counter() - began}

        # the log-probs of the reference, which are known where it drew the completions
        began = time.perf_counter()
        against = policy if config.reference == "moved" and number > 1 else reference
        drew = config.temperature == 1 and weights_hash(against) == weights_hash(policy)
        known = np.concatenate(logps) if drew else None
        preferences = preferences.with_reference(against, known=known, precision=precision)
        return preferences, found | {"seconds/reference": time.perf_counter() - began}

    def describe() -> dict[str, Any]:
        data = {"data": data_hash(prompts), "reference": weights_hash(reference)}
        return {"method": "online DPO", **rounds.record(loss), **data}

    options = {"loss": loss, "callback": callback, "progress": progress}
    return rounds.train(collect, describe, run, resume, options)


@checked
def train_spin(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    human: Sequence[Sequence[int]],
    config: OnlineConfig,
    *,
    eos_token_id: int | Sequence[int],
    precision: Precision = "float32",
    seed: int = 0,
    run: Path | str | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    progress: str | None = "SPIN",
) -> list[dict[str, Any]]:
    """Train `policy` in place by self-play (SPIN, Chen et al. 2024); the metrics.

    In each round the policy of the last round, the opponent, answers every prompt `k` times. DPO
    with the opponent as the reference then prefers the human text: SPIN's lambda is `beta`. Nothing
    is labeled. A policy that writes as the human text does can gain nothing more.

    Args:
        human: token ids of the completion that a person wrote to each of the prompts.
        config: with `reference="moved"`, since the opponent is the reference.

    All else is as in `train_online_dpo`.
    """
    prompts, human = token_lists("prompts", prompts), token_lists("human", human)
    if config.reference != "moved":
        raise ValueError(
            f"reference is {config.reference!r}; in self-play the reference is the policy of the "
            "last round, so it must be 'moved'"
        )
    if len(prompts) != len(human):
        raise ValueError(f"{len(prompts)} prompts and {len(human)} human completions; one each")
    rounds = _Rounds(policy, config, eos_token_id, precision, seed)

    def collect(number: int) -> tuple[Preferences, dict[str, float]]:
        completions, _, found = rounds.sample(prompts, number)
        began = time.perf_counter()
        preferences = spin_preferences(prompts, human, completions)
        preferences = preferences.with_reference(policy, precision=precision)
        seconds = {"seconds/label": 0.0, "seconds/reference": time.perf_counter() - began}
        return preferences, {**found, "labels": 0, **seconds}

    def describe() -> dict[str, Any]:
        return {"method": "SPIN", **rounds.record(None), "data": data_hash(prompts, human)}

    options = {"callback": callback, "progress": progress}
    return rounds.train(collect, describe, run, resume, options)


# rounds


class _Rounds:
    """What the rounds of a run share: the policy, how it samples, and where rounds are kept."""

    def __init__(
        self,
        policy: nn.Module,
        config: OnlineConfig,
        eos_token_id: int | Sequence[int],
        precision: Precision,
        seed: int,
    ):
        check_online(config)
        if world_size() > 1:
            raise ValueError(
                f"there are {world_size()} processes; rounds are sampled and labeled by one, so "
                "launch it once"
            )
        check_policy(policy, config.dpo.loop, adapters=bool(config.dpo.lora_rank))
        self.policy, self.precision = policy.eval(), precision
        self.config, self.seed = settled(config), integer("seed", seed)
        self.sampling = {
            "eos_token_id": eos_token_id,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "precision": precision,
        }

    def record(self, loss: OwnLoss | None) -> dict[str, Any]:
        """The part of the record of a run that all methods share."""
        found = {"config": asdict(self.config), "seed": self.seed, "precision": self.precision}
        # the loss itself is in the record of each round
        found |= {} if loss is None else {"own_loss": True}
        return found | weights_record(self.policy, adapters=bool(self.config.dpo.lora_rank))

    def sample(
        self, prompts: list[list[int]], number: int
    ) -> tuple[list[list[list[int]]], list[list[float]], dict[str, float]]:
        """`k` completions of each prompt by the policy as it is now, their log-probs, and costs."""
        began, seed = time.perf_counter(), self._seed(number)
        drawn = sample_with_logps(self.policy, prompts, self.config.k, seed=seed, **self.sampling)
        tokens = sum(len(ids) for row in drawn[0] for ids in row)
        return *drawn, {"tokens": tokens, "seconds/sample": time.perf_counter() - began}

    def train(
        self,
        collect: Callable[[int], tuple[Preferences, dict[str, float]]],
        describe: Callable[[], dict[str, Any]],
        run: Path | str | None,
        resume: bool,
        options: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """Collect and train in every round; the metrics."""
        run = None if run is None else folder("run", run)
        if run and not resume and (run / "round-1").exists():
            raise ValueError(
                f"{run} holds an earlier run. Continue it with resume=True, choose another run "
                "directory, or delete this one to begin again"
            )
        history: list[dict[str, Any]] = []
        earlier: list[Preferences] = []
        totals = {"labels": 0, "tokens": 0}
        with training_run(run, describe, resume=resume):
            for number in range(1, self.config.rounds + 1):
                place = None if run is None else run / f"round-{number}"
                newest, found = self._collected(collect, number, place)
                earlier = [*earlier, newest] if self.config.pairs == "all" else [newest]
                before = history[-1]["step"] if history else 0
                where = {"run": place, "resume": resume}
                lines = self._train_round(earlier, number, before, {**options, **where})

                # what the round cost
                totals = {name: count + int(found[name]) for name, count in totals.items()}
                trained = sum(line.get("seconds", 0.0) for line in lines)
                pairs = sum(len(part.chosen) for part in earlier)
                phases = {key: value for key, value in found.items() if "/" in key}
                lines[-1] |= {"pairs": pairs, **totals, **phases, "seconds/train": trained}
                history += lines
        return history

    def _collected(
        self,
        collect: Callable[[int], tuple[Preferences, dict[str, float]]],
        number: int,
        place: Path | None,
    ) -> tuple[Preferences, dict[str, float]]:
        """The pairs of a round and their costs: those that lie at `place`, or new ones."""
        costs = None if place is None else place / "round.json"
        if costs is not None and costs.exists():
            found = json.loads(costs.read_text(encoding="utf-8"))
            return Preferences.load(place / "preferences"), found
        try:
            preferences, found = collect(number)
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"round {number}: {error}") from error
        if costs is not None:
            place.mkdir(parents=True, exist_ok=True)
            preferences.save(place / "preferences")
            write_json(costs, found)
        return preferences, found

    def _train_round(
        self,
        parts: list[Preferences],
        number: int,
        before: int,
        options: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """`train_dpo` on the pairs of a round; its metrics, with the steps of those `before`."""
        preferences = parts[-1] if len(parts) == 1 else joined(parts)
        if len(parts) > 1 and self.config.reference == "moved":
            preferences = preferences.with_reference(self.policy, precision=self.precision)

        # the policy before a later round was evaluated at the end of the round before
        callback, bar = options["callback"], options["progress"]

        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            return {} if step == 0 and before else callback(model, before + step)

        options["callback"] = evaluate if callback else None
        options["progress"] = bar and f"{bar}, round {number} of {self.config.rounds}"
        loop, decay = self.config.dpo.loop, self.config.decay ** (number - 1)
        dpo = replace(self.config.dpo, loop=replace(loop, learning_rate=loop.learning_rate * decay))
        lines = train_dpo(self.policy, preferences, dpo, seed=self._seed(number), **options)
        counted = [{**line, "step": before + line["step"], "round": number} for line in lines]
        return [line for line in counted if len(line) > 2]

    def _seed(self, number: int) -> int:
        """The seed of a round: that of the run, then others drawn from it."""
        if number == 1:
            return self.seed
        return int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
