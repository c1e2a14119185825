"""Preference data: the public data sets by name, and what it takes to make your own.

Names are imported when they are first used, so that `import dpo_lab.data` loads no library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# for editors and type checkers, which do not run `__getattr__`
if TYPE_CHECKING:
    from dpo_lab.data.catalog import DATASETS, DataSet, find_dataset
    from dpo_lab.data.labeling import Labeling
    from dpo_lab.data.public import Loaded, LoadReport, load_preferences
    from dpo_lab.data.rated_pairs import RatedPairs, choices_of, scores_of, to_pairs, to_rows
    from dpo_lab.data.ratings import Item, Rating, RatingStore, as_items

__all__ = [
    "DATASETS",
    "DataSet",
    "Item",
    "Labeling",
    "LoadReport",
    "Loaded",
    "RatedPairs",
    "Rating",
    "RatingStore",
    "as_items",
    "choices_of",
    "find_dataset",
    "load_preferences",
    "scores_of",
    "to_pairs",
    "to_rows",
]

# where each name lives
_NAMES = {
    "catalog": ("DATASETS", "DataSet", "find_dataset"),
    "labeling": ("Labeling",),
    "public": ("LoadReport", "Loaded", "load_preferences"),
    "rated_pairs": ("RatedPairs", "choices_of", "scores_of", "to_pairs", "to_rows"),
    "ratings": ("Item", "Rating", "RatingStore", "as_items"),
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
