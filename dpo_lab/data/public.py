"""Public preference data sets by name, as rows that `from_rows` reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class DataSet:
    """What is known of a public data set before it is loaded."""

    name: str
    """the short name that `load_preferences` and `dpo-lab train --data` take"""
    hub: str
    """its id on the Hugging Face hub"""


@dataclass(frozen=True)
class LoadReport:
    """What became of the rows of a split."""

    rows: int = 0
    """rows read"""
    pairs: int = 0
    """pairs kept"""


@dataclass(frozen=True)
class Loaded:
    """The pairs of a split, and what became of the others."""

    rows: list[dict[str, Any]]
    """with the columns prompt, chosen, rejected, and further ones"""
    report: LoadReport


DATASETS: Mapping[str, DataSet] = {}
"""Every public data set that has a loader, by its short name."""


def load_preferences(
    name: str,
    split: str = "train",
    *,
    style: Literal["text", "messages"] = "text",
    limit: int | None = None,
    bad: Literal["error", "drop"] = "drop",
) -> Loaded:
    """The pairs of a split of a public data set; being written."""
    raise NotImplementedError
