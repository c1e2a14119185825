"""The embedded language model, trained with mistakes: its reward, its KL and its log-probs."""

import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mistaken import LOGPS_MISTAKES, Settings, mistaken, mistaken_logps, singles
from torch import Tensor, nn

from dpo_lab import (
    DPOConfig,
    LoopConfig,
    dpo_loss,
    evaluate_policy,
    from_scores,
    load_model,
    load_tokenizer,
    sample_completions,
    texts_of,
    train_dpo,
)
from dpo_lab.batching import CompletionBatch
from dpo_lab.checks import EXERCISES
from dpo_lab.logprobs import score_completions
from dpo_lab.loop import Score, fit
from dpo_lab.preferences import PairBatch
from dpo_lab.sentiment import SentimentReward, load_imdb, sample_prefixes
from dpo_lab.train import PairObjective

# of the losses that `train_dpo` takes: all of DPO's mistakes, some of IPO's
IPO_MISTAKES = {
    "right": {},
    "target 1 / beta": {"target": "one over beta"},
    "target 0": {"target": "zero"},
    "not squared": {"link": "not squared"},
}


@dataclass(frozen=True)
class TrainingConfig:
    """Notebook 00's run with fewer prompts, and batches so much smaller that it has its steps."""

    prefixes: int = 64
    """prompts, each with 4 completions"""
    held_out: int = 64
    """prompts of the evaluation"""
    beta: float = 0.3
    learning_rate: float = 2e-4
    epochs: int = 2
    batch_pairs: int = 48
    seeds: int = 3
    """each has its own prompts, samples and order"""
    minutes: float = 25.0
    """no further run begins after this time"""


@functools.cache
def judged() -> tuple[Any, SentimentReward]:
    """The reviews, and the reward fitted to them."""
    reviews = load_imdb()
    train = reviews["train"]
    return reviews, SentimentReward.tfidf(list(train["text"]), list(train["label"]))


class Experiment:
    """The preferences of one seed, and a policy trained on them with mistakes."""

    def __init__(self, config: TrainingConfig, seed: int):
        self.config, self.seed = config, seed
        reviews, self.reward = judged()
        self.tokenizer, self.reference = load_tokenizer(), load_model()
        texts = list(reviews["train"]["text"])

        # four completions of each prompt, all pairs by their rewards
        prompts = sample_prefixes(texts, self.tokenizer, config.prefixes, seed=seed)
        options = {"eos_token_id": self.tokenizer.eos_token_id, "max_new_tokens": 24}
        samples = sample_completions(self.reference, prompts, 4, seed=seed, **options)
        found = texts_of(self.tokenizer, prompts, samples)
        scores = self.reward([text for row in found for text in row]).reshape(-1, 4)
        preferences = from_scores(prompts, samples, scores, self.tokenizer, context=256)
        self.preferences = preferences.with_reference(self.reference)

        others = list(reviews["test"]["text"])
        self.held_out = sample_prefixes(others, self.tokenizer, config.held_out, seed=100 + seed)

    @property
    def dpo_config(self) -> DPOConfig:
        """That of every run."""
        config = self.config
        loop = LoopConfig(learning_rate=config.learning_rate, warmup_steps=4)
        return DPOConfig(
            beta=config.beta, epochs=config.epochs, batch_pairs=config.batch_pairs, loop=loop
        )

    def with_loss(self, loss: Callable[..., Tensor]) -> dict[str, Any]:
        """What comes of training with a loss of log-probs; the reason where it cannot be."""
        policy, options = load_model(), {"seed": self.seed, "progress": None}
        try:
            train_dpo(policy, self.preferences, self.dpo_config, loss=loss, **options)
        except ValueError as error:
            return {"error": str(error).split(";")[0]}
        return self.found(policy)

    def with_logps(self, settings: Settings) -> dict[str, Any]:
        """What comes of training with log-probs of policy and reference that have a mistake."""
        policy, config = load_model(), self.dpo_config
        objective = MistakenLogps(policy, self, settings)
        fit(policy, objective, len(objective.plan), config.loop, progress=None)
        return self.found(policy)

    def found(self, policy: nn.Module) -> dict[str, Any]:
        """Reward, sequence KL, and by how much the log-probs of chosen and rejected have risen."""
        found = evaluate_policy(
            policy, self.reference, self.held_out, self.reward, self.tokenizer, max_new_tokens=24
        )
        after = self.preferences.with_reference(policy).reference_logps
        moved = after - self.preferences.reference_logps
        chosen, rejected = (
            float(moved[side].mean())
            for side in (self.preferences.chosen, self.preferences.rejected)
        )
        self.last = policy, found
        return {"reward": found.reward, "kl": found.kl, "chosen": chosen, "rejected": rejected}

    def reported_kl(self) -> Iterator[tuple[str, Settings, float | None]]:
        """What `my_sequence_kl` with each mistake says of the policy that was trained last."""
        policy, found = self.last
        completions, owners = [list(ids) for ids in found.completions], range(len(self.held_out))
        scored = [
            score_completions(model, self.held_out, completions, owners).numpy()
            for model in (policy, self.reference)
        ]
        exercise = EXERCISES["sequence_kl"]
        names = dict(zip(("policy_logps", "reference_logps"), scored))
        for name, settings in singles(exercise):
            value = exercise.compute(names, dict(settings))
            yield name, settings, float(value) if value.ndim == 0 else None


class MistakenLogps(PairObjective):
    """DPO's loss on log-probs that policy and reference compute with one mistake."""

    def __init__(self, policy: nn.Module, experiment: Experiment, settings: Settings):
        config = experiment.dpo_config
        plan = (config.epochs, config.batch_pairs, experiment.seed)
        super().__init__(policy, experiment.preferences, *plan)
        self.compact, self.beta, self.settings = False, config.beta, settings
        self.reference = self.scorer(copy.deepcopy(experiment.reference))

    def scorer(self, model: nn.Module, precision: str = "float32") -> nn.Module:
        """What computes log-probs of a batch, from logits of padded rows."""
        return PaddedLogps(model, self.settings)

    def loss(self, score: Score, micro: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of the pairs."""
        with torch.no_grad():
            reference = self.reference(micro.completions)
        logps = score(micro.completions)
        found = dpo_loss(logps, reference, micro.chosen, micro.rejected, self.beta)
        return found.losses.sum(), {}


class PaddedLogps(nn.Module):
    """`mistaken_logps` of a model's logits, on one padded row per completion."""

    def __init__(self, model: nn.Module, settings: Settings):
        super().__init__()
        self.model, self.settings = model.eval(), settings

    def forward(self, batch: CompletionBatch) -> Tensor:
        """(N,) nats."""
        length = batch.input_ids.shape[1]
        rows, columns = batch.sources // length, batch.sources % length
        assert torch.equal(rows, batch.owners)

        # a batch leaves out the last token of its rows, which predicts nothing
        ids = nn.functional.pad(batch.input_ids, (0, 1))
        mask = torch.zeros_like(ids, dtype=torch.bool)
        ids[rows, columns + 1], mask[rows, columns + 1] = batch.targets, True
        logits = self.model(ids, attention_mask=torch.ones_like(ids)).logits
        return mistaken_logps(logits, ids, mask, self.settings).double()


def train_all(
    config: TrainingConfig, record: Callable[[str, str, int, dict[str, Any]], None]
) -> None:
    """Train with every mistake: `record(exercise, name, seed, what came of it)`.

    After the first seed all of DPO's loss come first, so that they have the most seeds where time
    runs out.
    """
    end = time.monotonic() + 60 * config.minutes
    experiments = functools.cache(functools.partial(Experiment, config))
    parts = sorted(itertools.product(CASES, range(config.seeds)), key=lambda part: part[1] > 0)
    for exercise, seed in parts:
        for name, settings in CASES[exercise]:
            if time.monotonic() > end:
                return
            experiment = experiments(seed)
            if exercise == "sequence_logps":
                found = experiment.with_logps(settings)
            else:
                found = experiment.with_loss(mistaken(exercise, settings))
            record(exercise, name, seed, found | {"settings": settings})

            # the right policy, looked at with mistakes
            if (exercise, name) == ("dpo_loss", "right"):
                for other, reported, kl in experiment.reported_kl():
                    record("sequence_kl", other, seed, {"kl": kl, "settings": reported})


CASES = {
    "dpo_loss": singles(EXERCISES["dpo_loss"]),
    "sequence_logps": list(LOGPS_MISTAKES.items()),
    "ipo_loss": list(IPO_MISTAKES.items()),
}
"""Names and settings of the training runs."""
