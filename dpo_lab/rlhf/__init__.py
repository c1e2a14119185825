"""What DPO replaces: a reward model fitted to the pairs, and PPO against it.

Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# for editors and type checkers, which do not run `__getattr__`
if TYPE_CHECKING:
    from dpo_lab.models import ScalarModel
    from dpo_lab.rlhf.advantages import gae, token_rewards
    from dpo_lab.rlhf.ppo import PPOConfig, text_reward, train_ppo
    from dpo_lab.rlhf.reward_model import (
        LearnedReward,
        RewardModelConfig,
        train_reward_model,
        value_model_from,
    )
    from dpo_lab.rlhf.trace import TokenTrace, trace_completion

__all__ = [
    "LearnedReward",
    "PPOConfig",
    "RewardModelConfig",
    "ScalarModel",
    "TokenTrace",
    "gae",
    "text_reward",
    "token_rewards",
    "trace_completion",
    "train_ppo",
    "train_reward_model",
    "value_model_from",
]

# where each name lives
_HOME = {
    "LearnedReward": "rlhf.reward_model",
    "PPOConfig": "rlhf.ppo",
    "RewardModelConfig": "rlhf.reward_model",
    "ScalarModel": "models",
    "TokenTrace": "rlhf.trace",
    "gae": "rlhf.advantages",
    "text_reward": "rlhf.ppo",
    "token_rewards": "rlhf.advantages",
    "trace_completion": "rlhf.trace",
    "train_ppo": "rlhf.ppo",
    "train_reward_model": "rlhf.reward_model",
    "value_model_from": "rlhf.reward_model",
}


def __getattr__(name: str) -> Any:
    """Import the module in which a public name lives, and keep the name here."""
    if name not in _HOME:
        raise AttributeError(
            f"module 'dpo_lab.rlhf' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    globals()[name] = found = getattr(import_module(f"dpo_lab.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
