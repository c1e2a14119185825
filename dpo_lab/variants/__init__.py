"""DPO's relatives, DPO on completions of the current policy, and self-play.

Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# for editors and type checkers, which do not run `__getattr__`
if TYPE_CHECKING:
    from dpo_lab.variants.feedback import (
        BinaryFeedback,
        FeedbackBatch,
    )
    from dpo_lab.variants.kto import (
        KTOConfig,
        KTOObjective,
        train_kto,
    )
    from dpo_lab.variants.labels import (
        best_and_worst_label,
        bradley_terry_label,
        joined,
        labeled_preferences,
        spin_preferences,
    )
    from dpo_lab.variants.online import (
        OnlineConfig,
        train_online_dpo,
        train_spin,
    )
    from dpo_lab.variants.relatives import (
        AOT,
        CPO,
        ORPO,
        KTOLoss,
        SimPO,
        aot_loss,
        cpo_loss,
        kto_loss,
        kto_reference_point,
        orpo_loss,
        simpo_loss,
    )

__all__ = [
    "AOT",
    "BinaryFeedback",
    "CPO",
    "FeedbackBatch",
    "KTOConfig",
    "KTOLoss",
    "KTOObjective",
    "ORPO",
    "OnlineConfig",
    "SimPO",
    "aot_loss",
    "best_and_worst_label",
    "bradley_terry_label",
    "cpo_loss",
    "joined",
    "kto_loss",
    "kto_reference_point",
    "labeled_preferences",
    "orpo_loss",
    "simpo_loss",
    "spin_preferences",
    "train_kto",
    "train_online_dpo",
    "train_spin",
]

# where each name lives
_HOME = {
    "AOT": "relatives",
    "BinaryFeedback": "feedback",
    "CPO": "relatives",
    "FeedbackBatch": "feedback",
    "KTOConfig": "kto",
    "KTOLoss": "relatives",
    "KTOObjective": "kto",
    "ORPO": "relatives",
    "OnlineConfig": "online",
    "SimPO": "relatives",
    "aot_loss": "relatives",
    "best_and_worst_label": "labels",
    "bradley_terry_label": "labels",
    "cpo_loss": "relatives",
    "joined": "labels",
    "kto_loss": "relatives",
    "kto_reference_point": "relatives",
    "labeled_preferences": "labels",
    "orpo_loss": "relatives",
    "simpo_loss": "relatives",
    "spin_preferences": "labels",
    "train_kto": "kto",
    "train_online_dpo": "online",
    "train_spin": "online",
}


def __getattr__(name: str) -> Any:
    """Import the module in which a public name lives, and keep the name here."""
    if name not in _HOME:
        raise AttributeError(
            f"module 'dpo_lab.variants' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    globals()[name] = found = getattr(import_module(f"dpo_lab.variants.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
