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

# this many mistakes at once are looked for
DEPTH = 3

# a spread below this is that of a constant, which says nothing
CONSTANT = 1e-9


class Slip(NamedTuple):
    """One mistake."""

    name: str
    """a few words, the same in every message, table and report"""
    says: str
    """what the numbers show"""
    hint: str
    """a question or a fact that leads to the place without giving the answer"""
    source: str
    """where the mistake was seen in public, or """ ""


class Rung(NamedTuple):
    """One step of the ladder of inputs, from the simplest up."""

    what: str
    look: str
    """where to look when it is the first to fail"""
    inputs: Inputs


class Reading(NamedTuple):
    """A set of mistakes that gives certain numbers: settings by switch, and a reduction or ""."""

    settings: dict[str, str]
    reduction: str


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

    def combinations(self, depth: int = DEPTH) -> Iterator[dict[str, str]]:
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

    def readings(
        self, seed: int, values: tuple[np.ndarray, ...], tolerance: float
    ) -> list[Reading]:
        """The smallest sets of mistakes with these numbers, `values`, on both of `cases(seed)`."""
        main, second = self.cases(seed)
        found: list[tuple[int, Reading]] = []
        for settings, wrong in self._wrong(seed):
            for reduction in ("", *REDUCTIONS):
                size = len(settings) + bool(reduction)
                known = found and size > found[0][0]
                if not size or known or (reduction and wrong.ndim != 1):
                    continue
                change = REDUCTIONS[reduction].change if reduction else np.asarray
                if not near(values[0], change(wrong), tolerance):
                    continue
                if near(values[1], change(self.compute(second, settings)), tolerance):
                    found.append((size, Reading(settings, reduction)))
        least = min((size for size, _ in found), default=0)
        return [reading for size, reading in found if size == least]

    @functools.lru_cache(maxsize=4)  # noqa: B019 (exercises are constants)
    def _wrong(self, seed: int) -> list[tuple[dict[str, str], np.ndarray]]:
        """Every combination of mistakes with its numbers on the first case; constants left out."""
        main, _ = self.cases(seed)
        computed = ((settings, self.compute(main, settings)) for settings in self.combinations())
        return [
            (settings, value)
            for settings, value in computed
            if value is not None and (value.size < 2 or np.ptp(value) > CONSTANT)
        ]


class Reduction(NamedTuple):
    """What may be done to a vector of one number per unit, beside the mistakes in the numbers."""

    name: str
    says: str
    change: Callable[[np.ndarray], np.ndarray]


REDUCTIONS = {
    "mean": Reduction(
        "mean over {unit}s",
        "They are averaged over the {unit}s; return one number per {unit}.",
        lambda x: np.asarray(x.mean()),
    ),
    "sum": Reduction(
        "sum over {unit}s",
        "They are summed over the {unit}s; return one number per {unit}.",
        lambda x: np.asarray(x.sum()),
    ),
    "column": Reduction(
        "column", "The shape is (n, 1); it must be (n,).", lambda x: np.asarray(x)[:, None]
    ),
    "row": Reduction("row", "The shape is (1, n); it must be (n,).", lambda x: np.asarray(x)[None]),
}


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
