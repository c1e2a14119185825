"""From a student's function to what is wrong with it.

The function is called on generic inputs, and its numbers are looked up among those of every
combination of known mistakes. Where none fits, the inputs are varied one by one, and then built up
from the simplest, until the function fails. The same code runs in the notebook and when a course is
graded; only the seed of the inputs differs.
"""

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_lab.checks.calling import Call, Inputs, call
from dpo_lab.checks.exercise import Exercise, array, near
from dpo_lab.checks.readings import CONSTANT, Reading, readings

# relative and absolute, by the dtype of what is returned
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
USUAL_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-4

# half of the points where the numbers are right and something else is not
NUMBERS_RIGHT = 0.5

PACKAGE = Path(__file__).parent.parent

# exercises whose last check in this process said that they are right
_solved: set[str] = set()


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
    """What is wrong with `function`, or None; the first of these that speaks."""
    attempt = Attempt(exercise, function, seed, seconds)
    with torch.enable_grad():
        return (
            attempt.contract()
            or attempt.numbers()
            or attempt.purity()
            or attempt.gradient()
            or attempt.range()
            or attempt.dtype()
        )


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

    # whether it can be called, and gives what can be compared

    def contract(self) -> Wrong | None:
        """What is wrong before any number is looked at."""
        if _is_ours(self.function):
            return self.wrong(
                "dpo_lab's own function",
                "This is the function of dpo_lab itself. Write one of your own.",
            )
        if (failed := self._failure(self.first, self.cases[0])) is not None:
            return failed
        if (odd := self._kind(self.first.value)) is not None:
            return odd

        # the same on inputs of another size
        failed = self._failure(self.second, self.cases[1])
        if failed is None and self._kind(self.second.value) is None:
            return None
        reason = "" if failed is None else f": {failed.message}"
        return self.wrong(
            "fails on other inputs",
            f"It runs on the first inputs, and not on inputs of another size{reason}",
        )

    def _failure(self, called: Call, inputs: Inputs) -> Wrong | None:
        """A call that did not end, or raised."""
        if called.slow:
            return self.wrong(
                "does not end",
                f"It did not end within {self.seconds:g} seconds. Is there a loop without an end?",
            )
        error = called.error
        if error is None:
            return None

        # torch raises the same error with a text, for what it cannot compute
        if isinstance(error, NotImplementedError) and not str(error):
            return self.wrong(
                "not written yet", "Replace `raise NotImplementedError` by your answer."
            )
        return self.wrong(
            f"raises {type(error).__name__}",
            f"{_line_of(error)}{error or type(error).__name__}\nIts inputs were\n{listing(inputs)}",
        )

    def _kind(self, value: Any) -> Wrong | None:
        """A value that is not what the exercise returns."""
        if value is None:
            return self.wrong(
                "returns nothing",
                "It returns None. Is there a `return`, and is it indented as it should be?",
            )
        if _is_ours(value):
            return self.wrong(
                "dpo_lab's own function",
                f"It returns a {type(value).__name__} of dpo_lab. Compute the numbers yourself.",
            )
        if self.exercise.read is not array:
            return self._read_by_exercise(value)

        number = isinstance(value, float) and not self.exercise.differentiable
        if not isinstance(value, Tensor) and not number:
            return self.wrong(
                "not a tensor",
                f"It returns {_type_name(value)}; return {self.exercise.returns}, computed by "
                "torch from end to end.",
            )
        if isinstance(value, Tensor) and not value.is_floating_point():
            return self.wrong(
                "not floating-point",
                f"It returns a tensor of {value.dtype}; return {self.exercise.returns}.",
            )
        return None

    def _read_by_exercise(self, value: Any) -> Wrong | None:
        """A value that the exercise's own reader refuses."""
        try:
            self.exercise.read(value)
        except (TypeError, ValueError, IndexError) as error:
            return self.wrong(
                "wrong type",
                f"It returns {_type_name(value)} ({error}); return {self.exercise.returns}.",
            )
        return None

    # whether the numbers are right, and what they are otherwise

    def numbers(self) -> Wrong | None:
        """Which mistakes the numbers show; failing that, where they begin to be wrong."""
        if all(near(f, r, self.tolerance) for f, r in zip(self.found, self.right)):
            return None
        head = (
            f"expected {shown(self.right[0])}\nfound    {shown(self.found[0])}\n"
            f"on\n{listing(self.cases[0])}\n"
        )
        for look in (self._constant, self._known, self._form, self._unused, self._rung):
            if (verdict := look(head)) is not None:
                return verdict
        return self.wrong("unknown", f"{head}No known mistake gives these numbers.")

    def _constant(self, head: str) -> Wrong | None:
        found = self.found[0]
        if found.size < 2 or not np.isfinite(found).all() or np.ptp(found) > CONSTANT:
            return None
        return self.wrong("constant", f"{head}All your numbers are the same.")

    def _known(self, head: str) -> Wrong | None:
        """The combination of known mistakes that gives these numbers."""
        known = readings(self.exercise, self.seed, self.found, self.tolerance)
        if not known:
            return None
        names, lines = self._in_words(known[0])
        count = "one mistake" if len(lines) == 1 else f"{len(lines)} mistakes together"
        others = sorted({"; ".join(self._in_words(other)[0]) for other in known[1:]})
        others = [other for other in others if other != "; ".join(names)]
        also = f"\nThe same numbers also come of: {' | '.join(others)}." if others else ""
        message = f"{head}Your numbers are those of {count}:\n" + "\n".join(lines) + also
        return Wrong(self.exercise.name, tuple(names), message, named=True)

    def _in_words(self, reading: Reading) -> tuple[list[str], list[str]]:
        """The names of the mistakes of a reading, and a line about each."""
        slips = [self.exercise.slips[s][setting] for s, setting in reading.settings.items()]
        names = [slip.name for slip in slips]
        lines = [f"- {slip.says} {slip.hint}" for slip in slips]
        general = [*reading.inputs, *([reading.result] if reading.result else [])]
        names += [change.name for change in general]
        lines += [f"- {change.says}" for change in general]
        return names, lines

    def _form(self, head: str) -> Wrong | None:
        """A wrong shape, NaN, or a multiple of the right numbers."""
        found, right = self.found, self.right
        if found[0].shape != right[0].shape and self.exercise.read is not array:
            unit = self.exercise.unit
            return self.wrong(
                f"number of {unit}s",
                f"{head}You have {len(found[0])} {unit}s; there are {len(right[0])}.",
            )
        if found[0].shape != right[0].shape:
            return self.wrong(
                "shape",
                f"{head}Its shape is {found[0].shape}; it must be {right[0].shape}, one number "
                f"per {self.exercise.unit}.",
            )
        if not all(np.isfinite(values).all() for values in found):
            return self.wrong(
                "not finite",
                f"{head}There is NaN or infinity on moderate inputs. Is a logarithm taken of a "
                "negative number, or something divided by 0?",
            )

        # a straight line through the right numbers and the found ones
        x, y = (np.concatenate([values.ravel() for values in both]) for both in (right, found))
        if len(x) < 3 or np.ptp(x) == 0 or len(x) != len(y):
            return None
        slope, shift = np.polyfit(x, y, 1)
        if not near(slope * x + shift, y, USUAL_TOLERANCE):
            return None
        plus = f" plus {shift:.4f}" if abs(shift) > USUAL_TOLERANCE else ""
        return self.wrong(
            "a multiple", f"{head}Your numbers are {slope:.4f} times the right ones{plus}."
        )

    def _unused(self, head: str) -> Wrong | None:
        """Inputs on which the right numbers depend, and the found ones do not."""
        main = self.cases[0]
        numeric = [
            name
            for name, value in main.items()
            if isinstance(value, float) or isinstance(value, np.ndarray) and value.dtype.kind == "f"
        ]
        names = [n for n in numeric if self._answer_reacts(n) and not self._reacts(n)]
        if not names:
            return None
        message = f"{head}Your numbers stay the same whatever {' and '.join(names)} is."
        return Wrong(self.exercise.name, tuple(f"{name} unused" for name in names), message)

    def _answer_reacts(self, name: str) -> bool:
        found = self.exercise.compute(_varied(self.cases[0], name), {})
        return found is not None and not near(found, self.right[0], 1e-9)

    def _reacts(self, name: str) -> bool:
        again = self.call(_varied(self.cases[0], name))
        if again.error is not None or again.slow or self._kind(again.value) is not None:
            return True
        return not near(self.exercise.read(again.value), self.found[0], 1e-9)

    def _rung(self, head: str) -> Wrong | None:
        """The simplest inputs on which the function fails."""
        passed = ""
        for rung in self.exercise.ladder:
            right = self.exercise.compute(rung.inputs, {})
            called = self.call(rung.inputs)
            if self._is_right(called, right):
                passed = rung.what
                continue
            before = f"It is right for {passed}, and wrong" if passed else "It is already wrong"
            found = called.error if called.error is not None else shown(called.value)

            return self.wrong(
                f"wrong for {rung.what}",
                f"No known mistake gives your numbers. {before} for {rung.what}: look at "
                f"{rung.look}. The simplest inputs on which it fails are\n{listing(rung.inputs)}\n"
                f"expected {shown(right)}\nfound    {found}",
            )
        return None

    def _is_right(self, called: Call, right: np.ndarray | None) -> bool:
        if called.error is not None or called.slow or self._kind(called.value) is not None:
            return False
        assert right is not None
        return near(self.exercise.read(called.value), right, self.tolerance)

    # what else can be wrong when the numbers are right

    def purity(self) -> Wrong | None:
        """Inputs that are written to, and numbers that change from call to call."""
        if changed := self.first.changed:
            return self.wrong(
                "changes its inputs",
                f"The numbers are right, but it writes to {' and '.join(changed)}. Whoever calls "
                "it goes on with other data.",
                NUMBERS_RIGHT,
            )
        again = self.call(self.cases[0])
        if not self._is_right(again, self.right[0]):
            return self.wrong(
                "changes from call to call",
                "The numbers are right the first time and not the second, on the same inputs. "
                "Does it keep something between calls, or draw random numbers?",
                NUMBERS_RIGHT,
            )
        return None

    def gradient(self) -> Wrong | None:
        """A gradient that is missing, or not that of the answer."""
        name, value = self.exercise.differentiable, self.first.value
        if self.exercise.also is not None:
            found = self.exercise.also(value, self.first.given)
            return found and self.wrong(
                found[0], f"The numbers are right, but {found[1]}", NUMBERS_RIGHT
            )
        if not name:
            return None
        if not value.requires_grad:
            return self.wrong(
                "no gradient",
                f"The numbers are right, but no gradient flows back to {name}: training would "
                "change nothing. Stay in torch from end to end, without .item(), .numpy(), "
                ".detach(), torch.tensor(...) or no_grad().",
                NUMBERS_RIGHT,
            )
        slope = gradient_of(value, self.first.given[name])
        main = self.cases[0]
        if slope is not None:
            # along one direction that favors no coordinate
            along = np.random.default_rng(0).normal(size=main[name].shape)
            expected_along = np.asarray(derivative(self.exercise, main, along))
            if near((array(slope) * along).sum(), expected_along, GRADIENT_TOLERANCE):
                return None

        expected = finite_differences(self.exercise, main)
        found = "none" if slope is None else shown(slope)
        return self.wrong(
            "gradient",
            f"The numbers are right, but the gradient with respect to {name} is not:\n"
            f"expected {shown(expected)}\nfound    {found}\nIs a part of it detached?",
            NUMBERS_RIGHT,
        )

    def range(self) -> Wrong | None:
        """Overflow, in float32, on inputs that occur in training."""
        extremes, name = self.exercise.extremes, self.exercise.differentiable
        if extremes is None:
            return None
        right = self.exercise.compute(extremes, {})
        far = self.call(extremes, dtype=torch.float32, differentiable=name)
        assert right is not None
        fine = far.error is None and not far.slow and self._kind(far.value) is None
        fine = fine and near(self.exercise.read(far.value), right, TOLERANCE[torch.float32])
        found = far.error if far.error is not None else shown(far.value)

        # the numbers may be right and their gradient NaN
        if fine and name:
            slope = gradient_of(far.value, far.given[name])
            fine = slope is not None and bool(torch.isfinite(slope).all())
            found = f"{found}, whose gradient is not finite"
        if fine:
            return None
        return self.wrong(
            self.exercise.extremes_name,
            f"The numbers are right on moderate inputs, but not in float32 on\n"
            f"{listing(extremes)}\nexpected {shown(right)}\nfound    {found}\n"
            f"{self.exercise.extremes_hint}",
            NUMBERS_RIGHT,
        )

    def dtype(self) -> Wrong | None:
        """Another dtype than that of the inputs."""
        floats = [
            x for x in self.first.given.values() if getattr(x, "dtype", None) == torch.float64
        ]
        single = self.call(self.cases[0], dtype=torch.float32).value
        if not floats or not isinstance(single, Tensor) or single.dtype == torch.float32:
            return None
        return self.wrong(
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


def shown(value: Any, n: int = 4) -> str:
    """The first numbers of what came back, for a message."""
    try:
        flat = array(value).ravel().tolist()
    except (TypeError, ValueError):
        return _type_name(value)
    return ", ".join(f"{v:.4f}" for v in flat[:n]) + (", ..." if len(flat) > n else "")


def listing(inputs: Inputs) -> str:
    """Inputs by name, one per line; long ones abbreviated."""

    def short(value: Any) -> str:
        if not isinstance(value, np.ndarray):
            return str(value)
        text = str((value.round(3) if value.dtype.kind == "f" else value).tolist())
        return text if len(text) <= 100 else f"{text[:90]}... of shape {value.shape}"

    return "\n".join(f"    {name} = {short(value)}" for name, value in inputs.items())


def _varied(inputs: Inputs, name: str) -> Inputs:
    """The same inputs with other values of one of them."""
    value = np.asarray(inputs[name])
    factors = np.linspace(1.2, 1.4, value.size).reshape(value.shape)
    changed = value * factors
    return {**inputs, name: changed if value.ndim else float(changed)}


def _is_ours(value: Any) -> bool:
    """Whether a function or a result is defined in dpo_lab, outside of a student's hands."""
    module = getattr(value, "__module__", None) or ""
    return module.partition(".")[0] == "dpo_lab"


def _type_name(value: Any) -> str:
    """How a message names the type of a value."""
    package = type(value).__module__.split(".")[0]
    return type(value).__name__ if package == "builtins" else f"{package}.{type(value).__name__}"


def _line_of(error: BaseException) -> str:
    """The student's own line at which an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename
        and not Path(frame.filename).is_relative_to(PACKAGE)
    ]
    return f"Line {own[-1].lineno} of yours, `{own[-1].line}`: " if own else ""
