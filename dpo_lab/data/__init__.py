"""Preference data: the public data sets by name, and what it takes to make your own.

Names are imported when they are first used, so that `import dpo_lab.data` loads no library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# for editors and type checkers, which do not run `__getattr__`
if TYPE_CHECKING:
    from dpo_lab.data.catalog import DATASETS, DataSet, find_dataset
    from dpo_lab.data.public import Loaded, LoadReport, load_preferences

__all__ = [
    "DATASETS",
    "DataSet",
    "LoadReport",
    "Loaded",
    "find_dataset",
    "load_preferences",
]

# where each name lives
_NAMES = {
    "catalog": ("DATASETS", "DataSet", "find_dataset"),
    "public": ("LoadReport", "Loaded", "load_preferences"),
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
