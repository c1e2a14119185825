"""A student's function on the inputs of one seed, beside the right numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dpo_lab.checks.calling import Call, Inputs, call
from dpo_lab.checks.exercise import Exercise

# relative and absolute, by the dtype of what is returned
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
USUAL_TOLERANCE = 1e-6

# half of the points where the numbers are right and something else is not
NUMBERS_RIGHT = 0.5


class Wrong(AssertionError):
    """An answer that is not right yet.

    Its text begins with one line, "exercise: names of the mistakes". Jupyter, nbgrader and
    otter-grader show the text alone, without a traceback.
    """

    def __init__(
        self,
        exercise: str,
        names: tuple[str, ...],
        message: str,
        credit: float = 0.0,
        *,
        named: bool = False,
    ):
        super().__init__(f"{exercise}: {'; '.join(names)}\n{message}")
        self.exercise, self.names, self.message, self.credit = exercise, names, message, credit
        self.named = named
        """whether known mistakes give exactly the numbers that were found"""

    def _render_traceback_(self) -> list[str]:
        head, *rest = str(self).splitlines()
        return [f"\x1b[1;31m✗ {head}\x1b[0m", *rest]


@dataclass
class Attempt:
    """A student's function beside the answer, on the inputs of one seed."""

    exercise: Exercise
    function: Callable[..., Any]
    seed: int
    seconds: float

    @cached_property
    def cases(self) -> tuple[Inputs, Inputs]:
        """Inputs of two sizes."""
        return self.exercise.cases(self.seed)

    @cached_property
    def first(self) -> Call:
        """The call on the first inputs, with a gradient where the exercise has one."""
        return self.call(self.cases[0], differentiable=self.exercise.differentiable)

    @cached_property
    def second(self) -> Call:
        """The call on the second inputs, which have another size."""
        return self.call(self.cases[1])

    @cached_property
    def right(self) -> tuple[np.ndarray, np.ndarray]:
        """The right numbers on both inputs."""
        main, second = (self.exercise.compute(inputs, {}) for inputs in self.cases)
        assert main is not None and second is not None
        return main, second

    @cached_property
    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """The function's numbers on both inputs, once `contract` has nothing to say."""
        return self.exercise.read(self.first.value), self.exercise.read(self.second.value)

    @property
    def tolerance(self) -> float:
        """How near numbers must be, for the dtype that came back."""
        return TOLERANCE.get(getattr(self.first.value, "dtype", None), USUAL_TOLERANCE)

    def call(self, inputs: Inputs, **options: Any) -> Call:
        """The student's function on `inputs`."""
        return call(self.function, inputs, self.seconds, **options)

    def wrong(self, name: str, message: str, credit: float = 0.0) -> Wrong:
        """A verdict with one name."""
        return Wrong(self.exercise.name, (name,), message, credit)
