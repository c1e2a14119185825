"""Win rates over the sampling temperature: SFT, DPO, PPO and best of N against people's own words.

    python benchmarks/win_rates.py

For each seed: DPO and PPO from the same pairs, then answers of every method at each temperature, to
beginnings of IMDb reviews and, out of distribution, of sentences from Rotten Tomatoes. The baseline
is how the review itself went on, truncated at the same length. Two judges decide: the classifier
that labeled the pairs, and a second one, which was fitted to other texts through other features.
Writes dpo_lab/assets/win_rates.json, which notebook 07 draws. Answers that are in `--config.out`
are kept. About 25 minutes of one core.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tyro
from transformers import PreTrainedModel

from dpo_lab.assets import ASSETS
from dpo_lab.engine.runs import open_run, provenance, write_json
from dpo_lab.loop import LoopConfig
from dpo_lab.models import ScalarModel, end_tokens
from dpo_lab.rlhf.ppo import PPOConfig, train_ppo
from dpo_lab.rlhf.reward_model import LearnedReward, RewardModelConfig, train_reward_model
from dpo_lab.sampling import sample_completions
from dpo_lab.sentiment.reviews import load_rotten_tomatoes, sample_continuations
from dpo_lab.sentiment.task import Task, TaskConfig
from dpo_lab.train import DPOConfig, train_dpo

RESULTS = ASSETS / "win_rates.json"

METHODS = ("sft", "dpo", "ppo", "best-of-n")

Answers = list[list[list[int]]]
"""token ids of the answers of each prompt"""


@dataclass(frozen=True)
class WinRatesConfig:
    """What is trained, and what is asked."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """each of pairs, policies and prompts of its own"""
    temperatures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """of sampling; the paper's, 0 is greedy"""
    prompts: int = 200
    """of each seed and each source of texts"""
    best_of: int = 8
    """answers of SFT, of which the reward model keeps the best"""
    task: TaskConfig = field(
        default_factory=lambda: TaskConfig(prefixes=800, eval_prefixes=200, precision="float32")
    )
    """the data; float32, so that the KL is that of the distribution that was sampled"""
    dpo: DPOConfig = field(
        default_factory=lambda: DPOConfig(
            beta=0.3, batch_pairs=64, loop=LoopConfig(schedule="constant", eval_every=10_000)
        )
    )
    """that of goodhart.py, which ends about 6 nats from the reference"""
    reward_model: RewardModelConfig = field(
        default_factory=lambda: RewardModelConfig(
            loop=LoopConfig(learning_rate=2e-4, warmup_steps=4, eval_every=20)
        )
    )
    """of PPO and of best of N"""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            steps=14, minibatch=32, kl_target=6.0, learning_rate=1e-4, eval_every=10_000
        )
    )
    """as far from the reference as DPO"""
    out: Path = Path("runs/win-rates")
    """where the pairs and all answers go"""


def main(config: WinRatesConfig, results: Path = RESULTS) -> None:
    origin = provenance()
    recorded = {name: value for name, value in asdict(config).items() if name != "out"}
    decides = {name: value for name, value in recorded.items() if name != "seeds"}
    open_run(config.out, decides, resume=True)
    write_json(config.out / "provenance.json", origin)

    # what is not there yet
    for seed in config.seeds:
        collect(config, seed)


def collect(config: WinRatesConfig, seed: int) -> None:
    """Train the policies of a seed, and write the answers of every method."""
    seeded = Seed(config, seed)
    if not (path := config.out / f"prompts-seed{seed}.json").exists():
        write_json(path, seeded.texts())
    for method in METHODS:
        if not (path := config.out / f"{method}-seed{seed}.json").exists():
            write_json(path, seeded.answers(method))


class Seed:
    """What the methods of one seed share: pairs, prompts and the reward model."""

    def __init__(self, config: WinRatesConfig, seed: int):
        self.config, self.seed = config, seed
        asked = replace(config.task, seed=seed)
        self.task = Task.open(asked, config.out / f"data-seed{seed}")

    @cached_property
    def prompts(self) -> dict[str, tuple[list[list[int]], list[list[int]]]]:
        """By source: beginnings of held-out texts, and how each goes on."""
        sources = {"imdb": self.task.reviews, "rotten_tomatoes": load_rotten_tomatoes()}
        return {
            name: sample_continuations(
                reviews["test"]["text"][:],
                self.task.tokenizer,
                self.config.prompts,
                seed=self.seed,
                max_new_tokens=self.task.asked.max_new_tokens,
            )
            for name, reviews in sources.items()
        }

    def texts(self) -> dict[str, dict[str, list[str]]]:
        """By source: the `prompts` and the `baseline` as text."""
        return {
            name: {"prompts": self.decoded(prompts), "baseline": self.decoded(continuations)}
            for name, (prompts, continuations) in self.prompts.items()
        }

    def decoded(self, ids: list[list[int]]) -> list[str]:
        """Token ids as text, without BOS and EOS."""
        return self.task.tokenizer.batch_decode(ids, skip_special_tokens=True)

    @cached_property
    def learned(self) -> LearnedReward:
        """The reward model that is fitted to the pairs."""
        model = ScalarModel(self.task.new_policy())
        train_reward_model(model, self.task.preferences, self.config.reward_model, seed=self.seed)
        return LearnedReward(model)

    def answers(self, method: str) -> dict[str, Any]:
        """The answers of a method as text, by source and temperature, and how far it is from SFT.

        One answer per prompt. Best of N answers the reviews alone, since it trains no policy.
        """
        policy = self.policy(method)
        k = self.config.best_of if method == "best-of-n" else 1
        sources = ("imdb",) if k > 1 else tuple(self.prompts)
        found = {
            source: {
                f"{temperature:g}": self.answer(policy, source, temperature, k)
                for temperature in self.config.temperatures
            }
            for source in sources
        }
        return {"evaluation": self.task.evaluate(policy).summary(), "answers": found}

    def answer(self, policy: PreTrainedModel, source: str, temperature: float, k: int) -> list[str]:
        """One answer to each prompt: of k that are drawn, the one that the reward model prefers."""
        prompts, _ = self.prompts[source]
        k = 1 if temperature == 0 else k
        drawn = sample_completions(
            policy,
            prompts,
            k,
            eos_token_id=end_tokens(policy, self.task.tokenizer),
            max_new_tokens=self.task.asked.max_new_tokens,
            temperature=temperature,
            seed=self.seed,
        )
        if k > 1:
            owners = [prompt for prompt in prompts for _ in range(k)]
            flat = [ids for row in drawn for ids in row]
            best = self.learned(owners, flat).reshape(-1, k).argmax(1)
            drawn = [[row[i]] for row, i in zip(drawn, best)]
        return self.decoded([row[0] for row in drawn])

    def policy(self, method: str) -> PreTrainedModel:
        """The model that a method samples from."""
        trained: dict[str, Callable[[PreTrainedModel], Any]] = {"dpo": self.dpo, "ppo": self.ppo}
        if method not in trained:
            return self.task.reference
        policy = self.task.new_policy()
        trained[method](policy)
        return policy

    def dpo(self, policy: PreTrainedModel) -> None:
        """Train a policy by DPO."""
        train_dpo(policy, self.task.preferences, self.config.dpo, seed=self.seed)

    def ppo(self, policy: PreTrainedModel) -> None:
        """Train a policy by PPO, on the prefixes that DPO's pairs begin with."""
        task = self.task
        train_ppo(
            policy,
            task.reference,
            ScalarModel(task.new_policy()),
            self.learned,
            task.prompts,
            replace(self.config.ppo, max_new_tokens=task.asked.max_new_tokens),
            eos_token_id=end_tokens(task.reference, task.tokenizer),
            precision=task.precision,
            seed=self.seed,
        )


if __name__ == "__main__":
    tyro.cli(main)
