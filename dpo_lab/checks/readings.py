"""Which mistakes give the numbers that a function returned.

Beside an exercise's own mistakes there are those of every exercise: an input in place of another,
an input left out or changed, and something done to the result. All numbers that these give, up to
three at once, are computed once per seed; a look-up compares them with what was found.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dpo_lab.checks.calling import Inputs
from dpo_lab.checks.changes import InputChange, ResultChange, input_changes, result_changes
from dpo_lab.checks.exercise import Exercise, near

Array = np.ndarray

# this many mistakes at once are looked for
DEPTH = 3

# a spread below this is that of a constant, which says nothing
CONSTANT = 1e-9


class Reading(NamedTuple):
    """A set of mistakes that gives certain numbers."""

    settings: dict[str, str]
    """of the exercise's own switches"""
    inputs: tuple[InputChange, ...] = ()
    result: ResultChange | None = None

    @property
    def size(self) -> int:
        """How many mistakes there are in it."""
        return len(self.settings) + len(self.inputs) + (self.result is not None)

    def values(self, exercise: Exercise, inputs: Inputs) -> Array | None:
        """The numbers that it gives on some inputs; None where it has no meaning."""
        found = _computed(exercise, inputs, self.settings, self.inputs)
        if found is None or self.result is None:
            return found
        with np.errstate(all="ignore"):
            return self.result.change(found[None])[0]


# the look-up


class Table(NamedTuple):
    """Every set of mistakes that is looked for, and the numbers that it gives, by their shape."""

    readings: dict[tuple[int, ...], list[Reading]]
    values: dict[tuple[int, ...], Array]


def readings(
    exercise: Exercise, seed: int, found: tuple[Array, ...], tolerance: float
) -> list[Reading]:
    """The smallest sets of mistakes with these numbers, `found`, on both of `cases(seed)`.

    Of sets of one size, those of the exercise's own mistakes come first, and all of them; of others
    one, so that the same numbers always have the same name.
    """
    _, second = exercise.cases(seed)
    matching = [
        reading
        for reading in _matching(exercise, table(exercise, seed), found[0], tolerance)
        if (value := reading.values(exercise, second)) is not None
        and _same(found[1], value, tolerance)
    ]
    least = min((reading.size for reading in matching), default=0)
    matching = [reading for reading in matching if reading.size == least]
    own = [reading for reading in matching if not reading.inputs and reading.result is None]
    return own or sorted(matching, key=lambda reading: len(reading.inputs))[:1]


def _matching(
    exercise: Exercise, known: Table, found: Array, tolerance: float
) -> Iterator[Reading]:
    """The sets of mistakes with these numbers on the first case."""
    for shape, stack in known.values.items():
        for change in (None, *result_changes(exercise.unit)):
            if change is not None and change.vector and len(shape) != 1:
                continue
            for i in _rows_like(found, stack, change, tolerance):
                reading = known.readings[shape][i]
                if 0 < reading.size + (change is not None) <= DEPTH:
                    yield reading._replace(result=change)


def _rows_like(
    found: Array, stack: Array, change: ResultChange | None, tolerance: float
) -> Iterator[int]:
    """Which of a stack of results are `found` after a change."""
    changed = change.change if change is not None else np.asarray
    if not found.any():
        # nothing, or zeros alone, which says nothing
        return
    flat = found.ravel()
    pivot = int(abs(flat).argmax())
    with np.errstate(all="ignore"):
        if changed(stack[:1]).shape[1:] != found.shape:
            return
        values = changed(stack).reshape(len(stack), found.size)

        # the largest number rules out nearly all
        alike = abs(values[:, pivot] - flat[pivot]) <= 2 * tolerance * abs(flat[pivot])
    for i in np.flatnonzero(alike):
        if _same(flat, values[i], tolerance):
            yield int(i)


def _same(found: Array, value: Array, tolerance: float) -> bool:
    """As `near`, but small numbers are held to a tolerance as small as their largest."""
    scale = min(1.0, float(abs(found).max(initial=0.0))) or 1.0
    return near(found / scale, value / scale, tolerance)


@functools.lru_cache(maxsize=32)
def table(exercise: Exercise, seed: int) -> Table:
    """The numbers of every set of mistakes on the first case; constants are left out."""
    main, _ = exercise.cases(seed)
    found: dict[tuple[int, ...], list[tuple[Reading, Array]]] = {}
    for reading in sets_of_mistakes(exercise, main):
        value = reading.values(exercise, main)
        if value is not None and np.isfinite(value).all():
            if value.size < 2 or np.ptp(value) > CONSTANT:
                found.setdefault(value.shape, []).append((reading, value))
    return Table(
        {shape: [reading for reading, _ in some] for shape, some in found.items()},
        {shape: np.stack([value for _, value in some]) for shape, some in found.items()},
    )


def sets_of_mistakes(exercise: Exercise, inputs: Inputs) -> Iterator[Reading]:
    """The exercise's own up to three at once; an input's alone, with one of those, or in pairs."""
    for settings in exercise.combinations(DEPTH):
        yield Reading(settings)
    changes = list(input_changes(inputs))
    for change in changes:
        for settings in exercise.combinations(1):
            yield Reading(settings, (change,))
    for two in itertools.combinations(changes, 2):
        yield Reading({}, two)


def _computed(
    exercise: Exercise, inputs: Inputs, settings: dict[str, str], changes: tuple[InputChange, ...]
) -> Array | None:
    """The answer with mistakes; None where one has no meaning there."""
    if not changes:
        return exercise.compute(inputs, settings)
    try:
        with np.errstate(all="ignore"):
            for change in changes:
                inputs = change.change(inputs)
        return exercise.compute(inputs, settings)
    except (ValueError, IndexError, TypeError, AttributeError):
        return None
