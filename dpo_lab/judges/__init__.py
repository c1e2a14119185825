"""Judges: who says which of two answers is better, and what a win rate by their verdicts means.

Names are imported when they are first used, so that `import dpo_lab.judges` loads no library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# for editors and type checkers, which do not run `__getattr__`
if TYPE_CHECKING:
    from dpo_lab.judges.agreement import Agreement, judge_agreement
    from dpo_lab.judges.biases import JudgeBiases, judge_biases
    from dpo_lab.judges.endpoint import EndpointError, EndpointJudge, endpoint_judge
    from dpo_lab.judges.intervals import Estimate, half_width, power, prompts_needed, wilson
    from dpo_lab.judges.labeling import judge_label
    from dpo_lab.judges.leaderboard import ModelRatings, fit_ratings, ratings_of_models
    from dpo_lab.judges.length_control import length_controlled_rate
    from dpo_lab.judges.lm import lm_judge
    from dpo_lab.judges.prices import Bill
    from dpo_lab.judges.prompts import CONCISE, DIALOGUE, SIMPLE, JudgePrompt
    from dpo_lab.judges.rates import WinRate, win_rate_difference, win_rates
    from dpo_lab.judges.simple import biased_judge, learned_reward_judge, reward_judge
    from dpo_lab.judges.sweep import TemperatureSweep, policy_answers, temperature_sweep
    from dpo_lab.judges.verdicts import BothOrders, Judge, Verdicts, ask, ask_both_orders

__all__ = [
    "Agreement",
    "Bill",
    "BothOrders",
    "CONCISE",
    "DIALOGUE",
    "EndpointError",
    "EndpointJudge",
    "Estimate",
    "Judge",
    "JudgeBiases",
    "JudgePrompt",
    "ModelRatings",
    "SIMPLE",
    "TemperatureSweep",
    "Verdicts",
    "WinRate",
    "ask",
    "ask_both_orders",
    "biased_judge",
    "endpoint_judge",
    "fit_ratings",
    "half_width",
    "judge_agreement",
    "judge_biases",
    "judge_label",
    "learned_reward_judge",
    "length_controlled_rate",
    "lm_judge",
    "policy_answers",
    "power",
    "prompts_needed",
    "ratings_of_models",
    "reward_judge",
    "temperature_sweep",
    "wilson",
    "win_rate_difference",
    "win_rates",
]

# where each name lives
_HOME = {
    "Agreement": "judges.agreement",
    "Bill": "judges.prices",
    "BothOrders": "judges.verdicts",
    "CONCISE": "judges.prompts",
    "DIALOGUE": "judges.prompts",
    "EndpointError": "judges.endpoint",
    "EndpointJudge": "judges.endpoint",
    "Estimate": "judges.intervals",
    "Judge": "judges.verdicts",
    "JudgeBiases": "judges.biases",
    "JudgePrompt": "judges.prompts",
    "ModelRatings": "judges.leaderboard",
    "SIMPLE": "judges.prompts",
    "TemperatureSweep": "judges.sweep",
    "Verdicts": "judges.verdicts",
    "WinRate": "judges.rates",
    "ask": "judges.verdicts",
    "ask_both_orders": "judges.verdicts",
    "biased_judge": "judges.simple",
    "endpoint_judge": "judges.endpoint",
    "fit_ratings": "judges.leaderboard",
    "half_width": "judges.intervals",
    "judge_agreement": "judges.agreement",
    "judge_biases": "judges.biases",
    "judge_label": "judges.labeling",
    "learned_reward_judge": "judges.simple",
    "length_controlled_rate": "judges.length_control",
    "lm_judge": "judges.lm",
    "policy_answers": "judges.sweep",
    "power": "judges.intervals",
    "prompts_needed": "judges.intervals",
    "ratings_of_models": "judges.leaderboard",
    "reward_judge": "judges.simple",
    "temperature_sweep": "judges.sweep",
    "wilson": "judges.intervals",
    "win_rate_difference": "judges.rates",
    "win_rates": "judges.rates",
}


def __getattr__(name: str) -> Any:
    """Import the module in which a public name lives, and keep the name here."""
    if name not in _HOME:
        raise AttributeError(
            f"module 'dpo_lab.judges' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    globals()[name] = found = getattr(import_module(f"dpo_lab.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
