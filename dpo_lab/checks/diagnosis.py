"""From a student's function to what is wrong with it.

The function is called on generic inputs, and its numbers are looked up among those of every
combination of known mistakes. Where none fits, the inputs are varied one by one, and then built up
from the simplest, until the function fails. The same code runs in the notebook and when a course is
graded; only the seed of the inputs differs.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from dpo_lab.checks.attempt import Attempt, Wrong
from dpo_lab.checks.besides import dtype, gradient, overflow, purity
from dpo_lab.checks.contract import contract
from dpo_lab.checks.exercise import Exercise
from dpo_lab.checks.numbers import numbers

# what is looked at, in this order
QUESTIONS = contract, numbers, purity, gradient, overflow, dtype

# exercises whose last check in this process said that they are right
_solved: set[str] = set()


def check(
    exercise: Exercise,
    function: Callable[..., Any],
    *,
    seed: int | None = None,
    seconds: float | None = None,
) -> None:
    """Print that `function` is right, or raise `Wrong` with what is not.

    Args:
        seed: of the inputs; by default that of DPO_LAB_CHECK_SEED, or 0.
        seconds: for each call; by default those of DPO_LAB_CHECK_SECONDS, or 5.
    """
    seed = int(os.environ.get("DPO_LAB_CHECK_SEED", 0)) if seed is None else seed
    if seconds is None:
        seconds = float(os.environ.get("DPO_LAB_CHECK_SECONDS", 5))
    _solved.discard(exercise.name)
    if (wrong := diagnose(exercise, function, seed=seed, seconds=seconds)) is not None:
        raise wrong from None
    _solved.add(exercise.name)
    print(f"✓ {exercise.name} is right")


def solved(*names: str) -> bool:
    """Whether the last check of each exercise in this kernel said that it is right.

    Says which one a cell still waits for.
    """
    for name in names:
        if name not in _solved:
            print(f"This cell waits for `my_{name}`: solve the exercise above and run its check.")
            return False
    return True


def diagnose(
    exercise: Exercise, function: Callable[..., Any], *, seed: int = 0, seconds: float = 5.0
) -> Wrong | None:
    """What is wrong with `function`, or None: the first of `QUESTIONS` that has an answer."""
    attempt = Attempt(exercise, function, seed, seconds)
    with torch.enable_grad():
        for question in QUESTIONS:
            if (wrong := question(attempt)) is not None:
                return wrong
    return None
