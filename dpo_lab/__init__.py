"""DPO Lab: the losses, log-probs, training loops and sliders behind the notebooks.

Names are imported when they are first used: `from dpo_lab import dpo_loss` loads torch and no more.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# for editors and type checkers, which do not run `__getattr__`
if TYPE_CHECKING:
    from dpo_lab.batching import CompletionBatch, completion_batch
    from dpo_lab.engine.cpu import tune_cpu
    from dpo_lab.engine.runs import Stopwatch
    from dpo_lab.evaluate import evaluate_policy, win_rate
    from dpo_lab.logprobs import can_compact, completion_logps, score_completions
    from dpo_lab.loop import LoopConfig
    from dpo_lab.losses import (
        MARGIN_LOSSES,
        DPOLoss,
        bradley_terry_nll,
        dpo_loss,
        dpo_loss_from_pairs,
        plackett_luce_loss,
        ppo_clip_loss,
        reward_model_loss,
        unlikelihood_loss,
    )
    from dpo_lab.models import load_model, load_tokenizer
    from dpo_lab.preferences import PairBatch, Preferences, from_rankings, from_rows, from_scores
    from dpo_lab.sampling import sample_completions, texts_of
    from dpo_lab.theory.bradley_terry import fit_bradley_terry
    from dpo_lab.theory.frontier import best_of_n, optimal_frontier
    from dpo_lab.theory.objective import implicit_reward, objective_value, optimal_policy, value_gap
    from dpo_lab.train import DPOConfig, train_dpo, train_sft, train_unlikelihood
    from dpo_lab.variants.feedback import BinaryFeedback
    from dpo_lab.variants.kto import KTOConfig, train_kto
    from dpo_lab.variants.online import OnlineConfig, train_online_dpo, train_spin
    from dpo_lab.variants.relatives import AOT, CPO, ORPO, SimPO
    from dpo_lab.widgets.explorers import (
        bandit_explorer,
        beta_explorer,
        betas_explorer,
        bradley_terry_explorer,
        frontier_explorer,
        gradient_weight_explorer,
        live_curves,
        training_explorer,
    )
    from dpo_lab.widgets.landscape import landscape_explorer

__all__ = [
    "AOT",
    "BinaryFeedback",
    "CPO",
    "CompletionBatch",
    "DPOConfig",
    "DPOLoss",
    "KTOConfig",
    "LoopConfig",
    "MARGIN_LOSSES",
    "ORPO",
    "OnlineConfig",
    "PairBatch",
    "Preferences",
    "SimPO",
    "Stopwatch",
    "__version__",
    "bandit_explorer",
    "best_of_n",
    "beta_explorer",
    "betas_explorer",
    "bradley_terry_explorer",
    "bradley_terry_nll",
    "can_compact",
    "completion_batch",
    "completion_logps",
    "dpo_loss",
    "dpo_loss_from_pairs",
    "evaluate_policy",
    "fit_bradley_terry",
    "from_rankings",
    "from_rows",
    "from_scores",
    "frontier_explorer",
    "gradient_weight_explorer",
    "implicit_reward",
    "landscape_explorer",
    "live_curves",
    "load_model",
    "load_tokenizer",
    "objective_value",
    "optimal_frontier",
    "optimal_policy",
    "plackett_luce_loss",
    "ppo_clip_loss",
    "reward_model_loss",
    "sample_completions",
    "score_completions",
    "texts_of",
    "train_dpo",
    "train_kto",
    "train_online_dpo",
    "train_sft",
    "train_spin",
    "train_unlikelihood",
    "training_explorer",
    "tune_cpu",
    "unlikelihood_loss",
    "value_gap",
    "win_rate",
]

# where each name lives
_NAMES = {
    "losses": (
        "MARGIN_LOSSES",
        "DPOLoss",
        "bradley_terry_nll",
        "dpo_loss",
        "dpo_loss_from_pairs",
        "plackett_luce_loss",
        "ppo_clip_loss",
        "reward_model_loss",
        "unlikelihood_loss",
    ),
    "batching": ("CompletionBatch", "completion_batch"),
    "logprobs": ("can_compact", "completion_logps", "score_completions"),
    "sampling": ("sample_completions", "texts_of"),
    "preferences": ("PairBatch", "Preferences", "from_rankings", "from_rows", "from_scores"),
    "models": ("load_model", "load_tokenizer"),
    "engine.cpu": ("tune_cpu",),
    "engine.runs": ("Stopwatch",),
    "loop": ("LoopConfig",),
    "train": ("DPOConfig", "train_dpo", "train_sft", "train_unlikelihood"),
    "variants.relatives": ("AOT", "CPO", "ORPO", "SimPO"),
    "variants.feedback": ("BinaryFeedback",),
    "variants.kto": ("KTOConfig", "train_kto"),
    "variants.online": ("OnlineConfig", "train_online_dpo", "train_spin"),
    "evaluate": ("evaluate_policy", "win_rate"),
    "theory.objective": ("implicit_reward", "objective_value", "optimal_policy", "value_gap"),
    "theory.frontier": ("best_of_n", "optimal_frontier"),
    "theory.bradley_terry": ("fit_bradley_terry",),
    "widgets.explorers": (
        "bandit_explorer",
        "beta_explorer",
        "betas_explorer",
        "bradley_terry_explorer",
        "frontier_explorer",
        "gradient_weight_explorer",
        "live_curves",
        "training_explorer",
    ),
    "widgets.landscape": ("landscape_explorer",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module in which a public name lives, and keep the name here."""
    if name == "__version__":
        from importlib.metadata import version

        found = version("dpo-lab")
    elif name in _HOME:
        found = getattr(import_module(f"dpo_lab.{_HOME[name]}"), name)
    else:
        raise AttributeError(
            f"module 'dpo_lab' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
