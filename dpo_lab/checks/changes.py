"""What may go wrong in any exercise: with an input, and with the result.

Each of these mistakes has a name, what it shows, and a question that leads to the place.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from dpo_lab.checks.calling import Inputs

Array = np.ndarray


class InputChange(NamedTuple):
    """A mistake in what an input is taken for."""

    name: str
    says: str
    hint: str
    change: Callable[[Inputs], Inputs]


class ResultChange(NamedTuple):
    """Something done to the right numbers, or to those of other mistakes."""

    name: str
    says: str
    hint: str
    change: Callable[[Array], Array]
    """of a stack of results: its first dimension counts them"""
    vector: bool = False
    """whether it is one only of results with one dimension"""


# with one input; its name is filled in
ALONE = {
    "0 in place of {a}": (
        "{a} is taken as 0, or left out of a sum.",
        "Where in the formula is {a} added?",
        np.zeros_like,
    ),
    "1 in place of {a}": (
        "{a} is taken as 1, or left out of a product.",
        "What does {a} multiply?",
        np.ones_like,
    ),
    "sign of {a}": (
        "{a} has the other sign.",
        "Is {a} added in the formula, or subtracted?",
        np.negative,
    ),
    "1 / {a} in place of {a}": (
        "It multiplies by {a} where it should divide, or divides where it should multiply.",
        "What should become of the result as {a} grows?",
        np.reciprocal,
    ),
    "log {a} in place of {a}": (
        "A logarithm is taken of {a} that is not asked for.",
        "Is {a} a probability, or its logarithm already?",
        np.log,
    ),
    "exp {a} in place of {a}": (
        "An exponential is taken of {a}.",
        "Is {a} a logarithm, and does the formula undo it?",
        np.exp,
    ),
    "{a} squared": (
        "{a} counts twice in a product.",
        "How many times does {a} stand in the formula?",
        np.square,
    ),
    "{a} doubled": ("{a} counts twice in a sum.", "How many times is {a} added?", lambda x: 2 * x),
    "{a} halved": (
        "Half of {a} is taken.",
        "Is there a factor of one half in the formula?",
        lambda x: x / 2,
    ),
    "{a} + 1 in place of {a}": (
        "1 is added to {a}.",
        "Where does the 1 come from?",
        lambda x: x + 1,
    ),
    "{a} - 1 in place of {a}": (
        "1 is subtracted from {a}.",
        "Where does the 1 come from?",
        lambda x: x - 1,
    ),
}


def input_changes(inputs: Inputs) -> Iterator[InputChange]:
    """What may go wrong with inputs of these names and kinds."""
    arrays = {name: x for name, x in inputs.items() if isinstance(x, np.ndarray)}
    floats = [
        name
        for name, x in inputs.items()
        if isinstance(x, float) or name in arrays and x.dtype.kind == "f"
    ]
    whole = [name for name, x in arrays.items() if x.dtype.kind == "i"]

    # one input for another
    for a, b in itertools.permutations(floats, 2):
        yield InputChange(
            f"{b} in place of {a}",
            f"{b} stands where {a} should.",
            f"Where in your code should {a} stand?",
            _put(a, b, np.asarray),
        )
    for same_kind in (floats, whole):
        for a, b in itertools.combinations(same_kind, 2):
            yield InputChange(
                f"{a} and {b} exchanged",
                f"{a} and {b} stand in each other's place.",
                f"In which order does the function take {a} and {b}?",
                functools.partial(_exchanged, a=a, b=b),
            )

    # one input changed
    for a in floats:
        for name, (says, hint, change) in ALONE.items():
            words = (text.format(a=a) for text in (name, says, hint))
            yield InputChange(*words, _put(a, a, change))


def _put(a: str, b: str, change: Callable[[Array], Array]) -> Callable[[Inputs], Inputs]:
    """Inputs with `change` of `b` in the place of `a`."""
    return lambda inputs: {**inputs, a: change(np.asarray(inputs[b], dtype=float))}


def _exchanged(inputs: Inputs, *, a: str, b: str) -> Inputs:
    return {**inputs, a: inputs[b], b: inputs[a]}


# with a vector of one number per unit
OF_A_VECTOR = {
    "mean over {unit}s": (
        "They are averaged over the {unit}s; return one number per {unit}.",
        "Who takes the mean: your function, or whoever calls it?",
        lambda x: x.mean(1),
    ),
    "sum over {unit}s": (
        "They are summed over the {unit}s; return one number per {unit}.",
        "Who takes the sum: your function, or whoever calls it?",
        lambda x: x.sum(1),
    ),
    "column": (
        "The shape is (n, 1); it must be (n,).",
        "Which line adds the last dimension?",
        lambda x: x[:, :, None],
    ),
    "row": (
        "The shape is (1, n); it must be (n,).",
        "Which line adds the first dimension?",
        lambda x: x[:, None],
    ),
    "accumulated": (
        "Each is added to those before it.",
        "Should the second {unit} depend on the first?",
        lambda x: x.cumsum(1),
    ),
}

# with each number of a result
OF_EACH_NUMBER = {
    "sign of the result": (
        "All have the other sign.",
        "Which sign should the first of them have?",
        np.negative,
    ),
    # exponentials and logarithms
    "result exponentiated": (
        "An exponential is taken at the end.",
        "Is a logarithm asked for, or what it is the logarithm of?",
        np.exp,
    ),
    "result logged": (
        "A logarithm is taken at the end.",
        "Is there a logarithm around the whole formula?",
        np.log,
    ),
    "log(1 + result)": (
        "1 is added at the end, and a logarithm taken.",
        "Is there a logarithm around the whole formula?",
        np.log1p,
    ),
    # powers and factors
    "result squared": (
        "They are squared at the end.",
        "Is there a square in the formula?",
        np.square,
    ),
    "result doubled": (
        "They are multiplied by 2.",
        "Which term do you count twice?",
        lambda x: 2 * x,
    ),
    "result halved": (
        "They are divided by 2.",
        "Is there a factor of one half in the formula?",
        lambda x: x / 2,
    ),
    # something added, or the sign lost
    "1 added": ("1 is added to the result.", "Where does the 1 come from?", lambda x: x + 1),
    "1 subtracted": (
        "1 is subtracted from the result.",
        "Where does the 1 come from?",
        lambda x: x - 1,
    ),
    "1 - result": (
        "They are subtracted from 1.",
        "Which of the two outcomes is asked for?",
        lambda x: 1 - x,
    ),
    "absolute value of the result": (
        "Their sign is lost.",
        "May a number be negative here?",
        np.abs,
    ),
}


@functools.cache
def result_changes(unit: str) -> tuple[ResultChange, ...]:
    """What may go wrong with a result that has one number per `unit`."""
    return tuple(
        ResultChange(*(text.format(unit=unit) for text in words), change, table is OF_A_VECTOR)
        for table in (OF_A_VECTOR, OF_EACH_NUMBER)
        for name, (says, hint, change) in table.items()
        for words in [(name, says, hint)]
    )
