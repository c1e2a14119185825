"""How often two judges, or two people, name the same winner."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from dpo_lab.engine.arguments import checked
from dpo_lab.judges.intervals import LEVEL, NOTHING, Estimate, wilson
from dpo_lab.judges.verdicts import Verdicts, as_verdicts

Ties = Literal["exclude", "third"]


@dataclass(frozen=True)
class Agreement:
    """Agreement of two judges on the same pairs."""

    one: str
    """name of the first judge"""
    other: str
    """name of the second judge"""
    agreement: Estimate
    """fraction of the compared pairs on which both say the same, with Wilson's interval"""
    pairs: int
    """pairs that were compared"""
    ties: int
    """pairs left out because either says tie; 0 where a tie is a third answer"""
    missing: int
    """pairs left out because either has no verdict"""


@checked
def judge_agreement(
    judges: Mapping[str, Verdicts | Sequence[str]],
    *,
    ties: Ties = "exclude",
    level: float = LEVEL,
) -> list[Agreement]:
    """Agreement of every two judges, such as of a model with people beside people with each other.

    The bar for a judge is not 1 but the agreement of two people. Raw agreement does not subtract
    what chance gives: two judges who flip coins agree in one half of the pairs.

    Args:
        judges: by name, P verdicts each on the same pairs in the same order: `Verdicts`, or "A",
            "B", "tie" and None.
        ties: "exclude" compares the pairs that both decide; with "third" a tie is an answer like A
            and B.
        level: of the intervals, which take pairs to be independent.

    Raises:
        ValueError, TypeError: fewer than two judges, or verdicts of different lengths.
    """
    found = {name: as_verdicts(name, verdicts) for name, verdicts in judges.items()}
    if len(found) < 2:
        raise ValueError(f"there are {len(found)} judges; agreement takes at least two")
    if len({len(verdicts) for verdicts in found.values()}) > 1:
        said = ", ".join(f"{name} {len(verdicts)}" for name, verdicts in found.items())
        raise ValueError(f"judges have different numbers of verdicts ({said}); need the same pairs")
    return [_agreement(*names, found, ties, level) for names in combinations(found, 2)]


def _agreement(
    one: str, other: str, found: Mapping[str, Verdicts], ties: Ties, level: float
) -> Agreement:
    """Agreement of two of the judges."""
    a, b = found[one], found[other]
    there = a.present & b.present
    tied = there & ((a.winner == 0) | (b.winner == 0)) & (ties == "exclude")
    compared = there & ~tied
    n, same = int(compared.sum()), a.winner == b.winner
    rate = wilson(float(np.mean(same[compared])), n, level) if n else NOTHING
    return Agreement(one, other, rate, n, int(tied.sum()), int((~there).sum()))
