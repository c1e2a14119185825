"""What each mistake in DPO's loss does: to the optimum on a bandit, and to a language model.

    python benchmarks/mistakes.py

Each mistake of `my_dpo_loss` that the checks name is trained with. On the bandit (4 completions,
labels without end) the loss is minimized; how far it ends from the optimal policy says what it does
even with perfect data. The language model is trained as in notebook 00. Writes
benchmarks/results/mistakes.json; --no-model leaves the language model out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_lab import (
    DPOConfig,
    LoopConfig,
    evaluate_policy,
    from_scores,
    load_model,
    load_tokenizer,
    sample_completions,
    texts_of,
    train_dpo,
    tune_cpu,
)
from dpo_lab.checks import EXERCISES
from dpo_lab.engine.runs import provenance, write_json
from dpo_lab.sentiment import SentimentReward, load_imdb, sample_prefixes
from dpo_lab.theory import all_pairs, kl, minimize, optimal_policy, pair_weights

RESULTS = Path(__file__).parent / "results" / "mistakes.json"
DPO_LOSS = EXERCISES["dpo_loss"]

# the bandit, in float64
REFERENCE = torch.tensor([0.5, 0.1, 0.3, 0.1], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, 0.5, 1.5], dtype=torch.float64)
BETA = 0.5


@dataclass(frozen=True)
class MistakesConfig:
    """How the language model is trained, as in notebook 00."""

    model: bool = True
    """whether to train the language model"""
    prefixes: int = 160
    """prompts, each with 4 completions"""
    held_out: int = 128
    """prompts of the evaluation"""
    beta: float = 0.3
    learning_rate: float = 2e-4
    epochs: int = 2
    seed: int = 0


class _Numeric(torch.autograd.Function):
    """The answer of an exercise with mistakes, in numpy; its gradient by central differences."""

    STEP = 1e-6

    @staticmethod
    def forward(ctx, policy_logps, reference_logps, chosen, rejected, beta, settings):
        x = policy_logps.detach().double().numpy()
        rest = (reference_logps.double().numpy(), chosen.numpy(), rejected.numpy(), beta)

        def losses(logps: np.ndarray) -> np.ndarray:
            with np.errstate(all="ignore"):
                return np.asarray(DPO_LOSS.answer(logps, *rest, **settings))

        ctx.x, ctx.losses, ctx.dtype = x, losses, policy_logps.dtype
        return torch.as_tensor(losses(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        slope = np.zeros_like(ctx.x)
        for i in range(len(slope)):
            sides = []
            for change in (_Numeric.STEP, -_Numeric.STEP):
                moved = ctx.x.copy()
                moved[i] += change
                sides.append(ctx.losses(moved))
            with np.errstate(all="ignore"):
                slope[i] = grad.numpy() @ (sides[0] - sides[1]) / (2 * _Numeric.STEP)
        return torch.as_tensor(slope).to(ctx.dtype), None, None, None, None, None


def mistaken_loss(settings: dict[str, str]) -> Callable[..., Tensor]:
    """`my_dpo_loss` with these mistakes."""

    def my_dpo_loss(policy_logps, reference_logps, chosen, rejected, beta):
        given = (policy_logps, reference_logps, chosen, rejected, beta)
        return _Numeric.apply(*given, settings)

    return my_dpo_loss


def on_bandit(loss: Callable[..., Tensor]) -> float | None:
    """KL in nats from what the loss ends at to the optimal policy; None where the loss is NaN."""
    pairs, weights = all_pairs(4), pair_weights(REFERENCE, REWARD)

    def total(logps: Tensor) -> Tensor:
        return (weights * loss(logps, REFERENCE.log(), *pairs, BETA)).sum()

    found = minimize(total, REFERENCE, iterations=200)
    if found.isnan().any():
        return None
    found = found.clamp_min(1e-300) / found.clamp_min(1e-300).sum()
    return max(0.0, float(kl(found, optimal_policy(REFERENCE, REWARD, BETA))))


class Experiment:
    """Notebook 00's preferences, and a policy trained on them with any loss."""

    def __init__(self, config: MistakesConfig):
        self.config = config
        reviews, self.tokenizer, self.reference = load_imdb(), load_tokenizer(), load_model()
        train = reviews["train"]
        self.reward = SentimentReward.tfidf(list(train["text"]), list(train["label"]))
        texts = list(train["text"])
        prompts = sample_prefixes(texts, self.tokenizer, config.prefixes, seed=config.seed)
        options = {"eos_token_id": self.tokenizer.eos_token_id, "max_new_tokens": 24}
        samples = sample_completions(self.reference, prompts, 4, seed=config.seed, **options)
        found = texts_of(self.tokenizer, prompts, samples)
        scores = self.reward([text for row in found for text in row]).reshape(-1, 4)
        preferences = from_scores(prompts, samples, scores, self.tokenizer, context=256)
        self.preferences = preferences.with_reference(self.reference)
        held_out = list(reviews["test"]["text"])
        self.held_out = sample_prefixes(held_out, self.tokenizer, config.held_out, seed=1)

    def __call__(self, loss: Callable[..., Tensor] | None) -> dict[str, Any]:
        """Reward, KL and log-probs of the policy after training."""
        config, policy = self.config, load_model()
        loop = LoopConfig(learning_rate=config.learning_rate, warmup_steps=4)
        settings = DPOConfig(beta=config.beta, epochs=config.epochs, loop=loop)
        try:
            train_dpo(policy, self.preferences, settings, loss=loss, progress=None)
        except ValueError as error:
            return {"error": str(error).split(";")[0]}
        found = evaluate_policy(
            policy, self.reference, self.held_out, self.reward, self.tokenizer, max_new_tokens=24
        )
        after = self.preferences.with_reference(policy).reference_logps
        moved = after - self.preferences.reference_logps
        sides = {
            side: float(moved[getattr(self.preferences, side)].mean())
            for side in ("chosen", "rejected")
        }
        return {"reward": found.reward, "kl": found.kl, **sides}


def main(config: MistakesConfig) -> None:
    """Train with every mistake, and print a line for each."""
    tune_cpu()
    experiment = Experiment(config) if config.model else None
    cases = [("right", {})]
    for switch, some in DPO_LOSS.slips.items():
        cases += [(slip.name, {switch: one}) for one, slip in some.items()]

    rows = []
    for name, settings in cases:
        loss = mistaken_loss(settings)
        row = {"name": name, "settings": settings, "bandit_kl": on_bandit(loss)}
        if experiment is not None:
            row |= experiment(loss)
        rows.append(row)
        print(_line(row), flush=True)
    write_json(RESULTS, {"provenance": provenance(), "config": vars(config), "rows": rows})


def _line(row: dict[str, Any]) -> str:
    kl_of_bandit = row["bandit_kl"]
    shown = "NaN" if kl_of_bandit is None else f"{kl_of_bandit:.1e}"
    numbers = [f"{row['name']:<32} bandit {shown}"]
    for name in ("reward", "kl", "chosen", "rejected"):
        if math.isfinite(row.get(name, math.nan)):
            numbers.append(f"{name} {row[name]:.3f}")
    return ", ".join([*numbers, *([row["error"]] if "error" in row else [])])


if __name__ == "__main__":
    main(tyro.cli(MistakesConfig, description=__doc__))
