"""Whether intervals hold what they are about: biases planted in a judge, over many seeds.

    python benchmarks/judge_biases.py

Each seed has prompts, two answers to each with random lengths and true rewards, and a
`biased_judge` who sees them in both orders. Writes benchmarks/results/judge_biases.json.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro

from dpo_lab.engine.runs import provenance, write_json
from dpo_lab.judges import ask, ask_both_orders, biased_judge, judge_biases, reward_judge

RESULTS = Path(__file__).parent / "results" / "judge_biases.json"
PLANTED = (
    {"accuracy": 0.75, "position_bias": 0.1, "length_bias": -0.12},
    {"accuracy": 0.9, "position_bias": 0.0, "length_bias": 0.05},
    {"accuracy": 0.6, "position_bias": 0.25, "length_bias": 0.1},
    {"accuracy": 0.5, "position_bias": 0.0, "length_bias": 0.0},
)


@dataclass(frozen=True)
class BiasConfig:
    """How much to simulate."""

    prompts: int = 300
    """pairs per seed, one per prompt"""
    seeds: int = 20
    """seeds of which all intervals shall hold"""
    more_seeds: int = 2_000
    """seeds over which 95% intervals are counted"""


def simulated(planted: dict[str, float], config: BiasConfig, seed: int, *levels: float) -> list:
    """Estimates of the planted biases, at each level, by name."""
    rng, n = np.random.default_rng(seed), config.prompts
    prompts = [f"{seed}/{i}: " for i in range(n)]
    a, b = (["x" * k + end for k in rng.integers(1, 40, n)] for end in "ab")
    rewards = {p + text: rng.normal() for some in (a, b) for p, text in zip(prompts, some)}

    def truth(texts: list[str]) -> list[float]:
        return [rewards[text] for text in texts]

    both = ask_both_orders(biased_judge(truth, **planted, seed=seed), prompts, a, b)
    better = ask(reward_judge(truth), prompts, a, b)
    found = [judge_biases(both, better, level=level) for level in levels]
    return [{name: getattr(one, name) for name in planted} for one in found]


def row(planted: dict[str, float], config: BiasConfig) -> dict:
    """What became of one judge's biases."""
    together = 1 - 0.05 / (config.seeds * len(planted))
    first = [simulated(planted, config, seed, together)[0] for seed in range(config.seeds)]
    held = [all(planted[name] in one[name] for name in planted) for one in first]
    more = [simulated(planted, config, 1_000 + seed, 0.95)[0] for seed in range(config.more_seeds)]
    return {
        "planted": planted,
        "level": together,
        "seeds": config.seeds,
        "held": sum(held),
        "more_seeds": config.more_seeds,
        "coverage": {
            name: float(np.mean([planted[name] in one[name] for one in more])) for name in planted
        },
        "mean": {name: float(np.mean([one[name].value for one in more])) for name in planted},
        "half_width": {
            name: float(np.mean([(one[name].high - one[name].low) / 2 for one in more]))
            for name in planted
        },
    }


def main(config: BiasConfig) -> None:
    """Simulate every judge, and write what was found."""
    rows = [row(planted, config) for planted in PLANTED]
    write_json(RESULTS, {"provenance": provenance(), "config": asdict(config), "rows": rows})
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main(tyro.cli(BiasConfig))
