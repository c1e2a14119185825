"""Whether a function can be called, and returns what can be compared."""

from typing import Any

from torch import Tensor

from dpo_lab.checks.attempt import Attempt, Wrong
from dpo_lab.checks.calling import Call, Inputs
from dpo_lab.checks.exercise import array
from dpo_lab.checks.messages import line_of, listing, type_name


def contract(attempt: Attempt) -> Wrong | None:
    """What is wrong before any number is looked at."""
    if _is_ours(attempt.function):
        return attempt.wrong(
            "dpo_lab's own function",
            "This is the function of dpo_lab itself. Write one of your own.",
        )
    if (failed := failure(attempt, attempt.first, attempt.cases[0])) is not None:
        return failed
    if (odd := kind(attempt, attempt.first.value)) is not None:
        return odd

    # the same on inputs of another size
    failed = failure(attempt, attempt.second, attempt.cases[1])
    if failed is None and kind(attempt, attempt.second.value) is None:
        return None
    reason = "" if failed is None else f": {failed.message}"
    return attempt.wrong(
        "fails on other inputs",
        f"It runs on the first inputs, and not on inputs of another size{reason}",
    )


def failure(attempt: Attempt, called: Call, inputs: Inputs) -> Wrong | None:
    """A call that did not end, or raised."""
    if called.slow:
        return attempt.wrong(
            "does not end",
            f"It did not end within {attempt.seconds:g} seconds. Is there a loop without an end?",
        )
    error = called.error
    if error is None:
        return None

    # torch raises the same error with a text, for what it cannot compute
    if isinstance(error, NotImplementedError) and not str(error):
        return attempt.wrong(
            "not written yet", "Replace `raise NotImplementedError` by your answer."
        )
    return attempt.wrong(
        f"raises {type(error).__name__}",
        f"{line_of(error)}{error or type(error).__name__}\nIts inputs were\n{listing(inputs)}",
    )


def kind(attempt: Attempt, value: Any) -> Wrong | None:
    """A value that is not what the exercise returns."""
    if value is None:
        return attempt.wrong(
            "returns nothing",
            "It returns None. Is there a `return`, and is it indented as it should be?",
        )
    if _is_ours(value):
        return attempt.wrong(
            "dpo_lab's own function",
            f"It returns a {type(value).__name__} of dpo_lab. Compute the numbers yourself.",
        )
    if attempt.exercise.read is not array:
        return read_by_exercise(attempt, value)

    number = isinstance(value, float) and not attempt.exercise.differentiable
    if not isinstance(value, Tensor) and not number:
        return attempt.wrong(
            "not a tensor",
            f"It returns {type_name(value)}; return {attempt.exercise.returns}, computed by "
            "torch from end to end.",
        )
    if isinstance(value, Tensor) and not value.is_floating_point():
        return attempt.wrong(
            "not floating-point",
            f"It returns a tensor of {value.dtype}; return {attempt.exercise.returns}.",
        )
    return None


def read_by_exercise(attempt: Attempt, value: Any) -> Wrong | None:
    """A value that the exercise's own reader refuses."""
    try:
        attempt.exercise.read(value)
    except (TypeError, ValueError, IndexError) as error:
        return attempt.wrong(
            "wrong type",
            f"It returns {type_name(value)} ({error}); return {attempt.exercise.returns}.",
        )
    return None


def _is_ours(value: Any) -> bool:
    """Whether a function or a result is defined in dpo_lab, outside of a student's hands."""
    module = getattr(value, "__module__", None) or ""
    return module.partition(".")[0] == "dpo_lab"
