"""What an exercise is: its answer with a switch for each mistake, and inputs that tell them apart.

The mistakes themselves, their names and hints, stand in `assets/mistakes.csv`.
"""

import csv
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dpo_lab.assets import ASSETS
from dpo_lab.checks.calling import Inputs


class Slip(NamedTuple):
    """One mistake."""

    name: str
    """a few words, the same in every message, table and report"""
    says: str
    """what the numbers show"""
    hint: str
    """a question that leads to the place without giving the answer"""
    source: str
    """where the mistake was seen in public; empty where it was not"""


class Rung(NamedTuple):
    """One step of the ladder of inputs, from the simplest up."""

    what: str
    look: str
    """where to look when it is the first to fail"""
    inputs: Inputs


def array(value: Any) -> np.ndarray:
    """A tensor or number as a float64 array."""
    if isinstance(value, Tensor):
        return value.detach().double().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Exercise:
    """A function to write, and what is known of the ways in which it goes wrong."""

    name: str
    """without the `my_` of the student's function"""
    answer: Callable[..., np.ndarray | None]
    """`answer(**inputs, **settings)` in numpy float64: right without settings; each switch that is
    set makes one mistake; None where two of them exclude each other"""
    inputs: Callable[[np.random.Generator, int], Inputs]
    """inputs of a size without any symmetry: no two dimensions of one length, no value that makes
    two mistakes agree"""
    ladder: tuple[Rung, ...]
    unit: str
    """what there is one number of"""
    differentiable: str = ""
    """the input by which the gradient is compared"""
    extremes: Inputs | None = None
    """inputs on which a naive formula overflows in float32"""
    extremes_name: str = "overflow"
    extremes_hint: str = ""
    read: Callable[[Any], np.ndarray] = array
    """what is compared, from what the function returns"""
    returns: str = "a floating-point tensor"
    also: Callable[[Tensor, dict[str, Any]], tuple[str, str] | None] | None = None
    """what else must hold of a returned tensor and the tensors and models that it came of: the name
    of the mistake and what to say, or None"""
    known: Mapping[str, Mapping[str, Slip]] | None = None
    """the mistakes by switch and setting; by default those of mistakes.csv"""

    @functools.cached_property
    def slips(self) -> Mapping[str, Mapping[str, Slip]]:
        """The mistakes by switch and setting."""
        return mistakes()[self.name] if self.known is None else self.known

    @functools.lru_cache(maxsize=32)  # noqa: B019 (exercises are constants)
    def cases(self, seed: int) -> tuple[Inputs, Inputs]:
        """Inputs of two sizes, the same ones for the same seed."""
        rng = np.random.default_rng([seed, 1])
        return self.inputs(rng, 4), self.inputs(rng, 3)

    def combinations(self, depth: int) -> Iterator[dict[str, str]]:
        """Settings of at most `depth` switches, none first, then single ones."""
        for n in range(depth + 1):
            for switches in itertools.combinations(self.slips, n):
                for settings in itertools.product(*(self.slips[s] for s in switches)):
                    yield dict(zip(switches, settings))

    def compute(self, inputs: Inputs, settings: dict[str, str]) -> np.ndarray | None:
        """`answer` without numpy's warnings: a mistake may well divide by zero."""
        with np.errstate(all="ignore"):
            found = self.answer(**inputs, **settings)
        return None if found is None else np.asarray(found, dtype=np.float64)


def near(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """Whether two arrays have one shape, and values within `tolerance`, relative and absolute."""
    return a.shape == b.shape and bool(np.isclose(a, b, rtol=tolerance, atol=tolerance).all())


@functools.cache
def mistakes() -> dict[str, dict[str, dict[str, Slip]]]:
    """The table of mistakes: by exercise, switch and setting."""
    table: dict[str, dict[str, dict[str, Slip]]] = {}
    with open(ASSETS / "mistakes.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            slip = Slip(row["name"], row["says"], row["hint"], row["source"])
            switches = table.setdefault(row["exercise"], {})
            switches.setdefault(row["switch"], {})[row["setting"]] = slip
    return table
