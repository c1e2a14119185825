"""What else can be wrong where the numbers are right: the gradient, the range, the dtype."""

import numpy as np
import torch
from torch import Tensor

from dpo_lab.checks.attempt import NUMBERS_RIGHT, TOLERANCE, Attempt, Wrong
from dpo_lab.checks.calling import Inputs
from dpo_lab.checks.contract import kind
from dpo_lab.checks.exercise import Exercise, array, near
from dpo_lab.checks.messages import listing, shown
from dpo_lab.checks.numbers import is_right

GRADIENT_TOLERANCE = 1e-4


def purity(attempt: Attempt) -> Wrong | None:
    """Inputs that are written to, and numbers that change from call to call."""
    if changed := attempt.first.changed:
        return attempt.wrong(
            "changes its inputs",
            f"The numbers are right, but it writes to {' and '.join(changed)}. Whoever calls "
            "it goes on with other data.",
            NUMBERS_RIGHT,
        )
    again = attempt.call(attempt.cases[0])
    if not is_right(attempt, again, attempt.right[0]):
        return attempt.wrong(
            "changes from call to call",
            "The numbers are right the first time and not the second, on the same inputs. "
            "Does it keep something between calls, or draw random numbers?",
            NUMBERS_RIGHT,
        )
    return None


def gradient(attempt: Attempt) -> Wrong | None:
    """A gradient that is missing, or not that of the answer."""
    name, value = attempt.exercise.differentiable, attempt.first.value
    if attempt.exercise.also is not None:
        found = attempt.exercise.also(value, attempt.first.given)
        return found and attempt.wrong(
            found[0], f"The numbers are right, but {found[1]}", NUMBERS_RIGHT
        )
    if not name:
        return None
    if not value.requires_grad:
        return attempt.wrong(
            "no gradient",
            f"The numbers are right, but no gradient flows back to {name}: training would "
            "change nothing. Stay in torch from end to end, without .item(), .numpy(), "
            ".detach(), torch.tensor(...) or no_grad().",
            NUMBERS_RIGHT,
        )
    slope = gradient_of(value, attempt.first.given[name])
    main = attempt.cases[0]
    if slope is not None:
        # along one direction that favors no coordinate
        along = np.random.default_rng(0).normal(size=main[name].shape)
        expected_along = np.asarray(derivative(attempt.exercise, main, along))
        if near((array(slope) * along).sum(), expected_along, GRADIENT_TOLERANCE):
            return None

    expected = finite_differences(attempt.exercise, main)
    found = "none" if slope is None else shown(slope)
    return attempt.wrong(
        "gradient",
        f"The numbers are right, but the gradient with respect to {name} is not:\n"
        f"expected {shown(expected)}\nfound    {found}\nIs a part of it detached?",
        NUMBERS_RIGHT,
    )


def overflow(attempt: Attempt) -> Wrong | None:
    """Overflow, in float32, on inputs that occur in training."""
    extremes, name = attempt.exercise.extremes, attempt.exercise.differentiable
    if extremes is None:
        return None
    right = attempt.exercise.compute(extremes, {})
    far = attempt.call(extremes, dtype=torch.float32, differentiable=name)
    assert right is not None
    fine = far.error is None and not far.slow and kind(attempt, far.value) is None
    fine = fine and near(attempt.exercise.read(far.value), right, TOLERANCE[torch.float32])
    found = far.error if far.error is not None else shown(far.value)

    # the numbers may be right and their gradient NaN
    if fine and name:
        slope = gradient_of(far.value, far.given[name])
        fine = slope is not None and bool(torch.isfinite(slope).all())
        found = f"{found}, whose gradient is not finite"
    if fine:
        return None
    return attempt.wrong(
        attempt.exercise.extremes_name,
        f"The numbers are right on moderate inputs, but not in float32 on\n"
        f"{listing(extremes)}\nexpected {shown(right)}\nfound    {found}\n"
        f"{attempt.exercise.extremes_hint}",
        NUMBERS_RIGHT,
    )


def dtype(attempt: Attempt) -> Wrong | None:
    """Another dtype than that of the inputs."""
    floats = [x for x in attempt.first.given.values() if getattr(x, "dtype", None) == torch.float64]
    single = attempt.call(attempt.cases[0], dtype=torch.float32).value
    if not floats or not isinstance(single, Tensor) or single.dtype == torch.float32:
        return None
    return attempt.wrong(
        "dtype",
        f"float32 goes in and {single.dtype} comes out. Keep the dtype of the inputs.",
        NUMBERS_RIGHT,
    )


def gradient_of(value: Tensor, x: Tensor) -> Tensor | None:
    """The gradient of the summed value with respect to `x`; None where torch finds none."""
    try:
        return torch.autograd.grad(value.sum(), x, allow_unused=True)[0]
    except RuntimeError:
        # what the gradient needs was overwritten, or no graph leads back
        return None


def finite_differences(exercise: Exercise, inputs: Inputs) -> np.ndarray:
    """The gradient of the summed answer with respect to the differentiable input."""
    shape = inputs[exercise.differentiable].shape
    units = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.array([derivative(exercise, inputs, unit) for unit in units]).reshape(shape)


def derivative(
    exercise: Exercise, inputs: Inputs, direction: np.ndarray, step: float = 1e-5
) -> float:
    """That of the summed answer as its differentiable input moves along a direction."""
    name = exercise.differentiable
    sides = []
    for change in (step, -step):
        moved = {**inputs, name: inputs[name] + change * direction}
        value = exercise.compute(moved, {})
        assert value is not None
        sides.append(value.sum())
    return float(sides[0] - sides[1]) / (2 * step)
