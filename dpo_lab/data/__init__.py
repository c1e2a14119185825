"""Preference data: the public data sets by name, and what it takes to make your own.

Names are imported when they are first used, so that `import dpo_lab.data` loads no library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# for editors and type checkers, which do not run `__getattr__`
if TYPE_CHECKING:
    from dpo_lab.data.agreement import (
        Agreement,
        Measured,
        PositionBias,
        cohen_kappa,
        fleiss_kappa,
        krippendorff_alpha,
        position_bias,
        rater_agreement,
        raw_agreement,
        seconds_per_item,
    )
    from dpo_lab.data.answers import Answers, AnswersConfig, Origin, sample_answers
    from dpo_lab.data.card import data_card
    from dpo_lab.data.catalog import DATASETS, DataSet, find_dataset
    from dpo_lab.data.labeling import Labeling
    from dpo_lab.data.make import (
        MadePreferences,
        judged_by,
        judged_by_people,
        judged_by_reward,
        make_preferences,
    )
    from dpo_lab.data.prompts import read_prompts, template_prompts
    from dpo_lab.data.public import Loaded, LoadReport, load_preferences
    from dpo_lab.data.rated_pairs import RatedPairs, choices_of, scores_of, to_pairs, to_rows
    from dpo_lab.data.ratings import Item, Rating, RatingStore, as_items
    from dpo_lab.data.run import PublicRunConfig, train_public

__all__ = [
    "Agreement",
    "Answers",
    "AnswersConfig",
    "DATASETS",
    "DataSet",
    "Item",
    "Labeling",
    "LoadReport",
    "Loaded",
    "MadePreferences",
    "Measured",
    "Origin",
    "PositionBias",
    "PublicRunConfig",
    "RatedPairs",
    "Rating",
    "RatingStore",
    "as_items",
    "choices_of",
    "cohen_kappa",
    "data_card",
    "find_dataset",
    "fleiss_kappa",
    "judged_by",
    "judged_by_people",
    "judged_by_reward",
    "krippendorff_alpha",
    "load_preferences",
    "make_preferences",
    "position_bias",
    "rater_agreement",
    "raw_agreement",
    "read_prompts",
    "sample_answers",
    "scores_of",
    "seconds_per_item",
    "template_prompts",
    "to_pairs",
    "to_rows",
    "train_public",
]

# where each name lives
_NAMES = {
    "agreement": (
        "Agreement",
        "Measured",
        "PositionBias",
        "cohen_kappa",
        "fleiss_kappa",
        "krippendorff_alpha",
        "position_bias",
        "rater_agreement",
        "raw_agreement",
        "seconds_per_item",
    ),
    "answers": ("Answers", "AnswersConfig", "Origin", "sample_answers"),
    "card": ("data_card",),
    "catalog": (
        "DATASETS",
        "DataSet",
        "find_dataset",
    ),
    "labeling": ("Labeling",),
    "make": (
        "MadePreferences",
        "judged_by",
        "judged_by_people",
        "judged_by_reward",
        "make_preferences",
    ),
    "prompts": ("read_prompts", "template_prompts"),
    "public": (
        "LoadReport",
        "Loaded",
        "load_preferences",
    ),
    "rated_pairs": (
        "RatedPairs",
        "choices_of",
        "scores_of",
        "to_pairs",
        "to_rows",
    ),
    "ratings": (
        "Item",
        "Rating",
        "RatingStore",
        "as_items",
    ),
    "run": ("PublicRunConfig", "train_public"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module in which a name lives, and keep the name here."""
    if name not in _HOME:
        raise AttributeError(
            f"module 'dpo_lab.data' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    found = getattr(import_module(f"dpo_lab.data.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
