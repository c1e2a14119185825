"""Call a student's function: it has a time limit, is silent and leaves the process as it was."""

import contextlib
import copy
import io
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

Inputs = Mapping[str, Any]
"""The arguments of an exercise by name: numpy arrays and plain numbers."""

# seconds between two signals to a function that does not stop at the first
AGAIN = 0.2

DEBUGGERS = ("bdb", "pdb", "IPython.core.debugger")


class TooLong(BaseException):
    """A function did not end in time.

    It is no Exception, so that an `except Exception` in the function's own loop lets it through.
    """


@dataclass
class Call:
    """What came of a call."""

    value: Any = None
    error: BaseException | None = None
    slow: bool = False
    """whether it was stopped at the time limit"""
    changed: list[str] = field(default_factory=list)
    """names of the inputs that it wrote to"""
    given: dict[str, Any] = field(default_factory=dict)
    """the tensors that it was called with"""


def call(
    function: Callable[..., Any],
    inputs: Inputs,
    seconds: float,
    *,
    dtype: torch.dtype = torch.float64,
    differentiable: str = "",
) -> Call:
    """`function(**inputs)` on fresh tensors of `dtype`, for at most `seconds`.

    What it prints or warns is thrown away: a grader may take a word on stderr for a failure.
    Random generators, gradient mode and default dtype are put back.

    Args:
        differentiable: the name of the input that requires a gradient, or "".
    """
    given = tensors(inputs, dtype, differentiable)
    kept = {name: x.detach().clone() for name, x in given.items() if isinstance(x, Tensor)}
    result = Call(given=given)
    with _quiet(), _process_kept(), torch.enable_grad():
        try:
            with time_limit(seconds):
                result.value = function(**given)
        except TooLong:
            result.slow = True
        except (Exception, SystemExit) as error:
            result.error = error

    result.changed = [
        name
        for name, before in kept.items()
        if given[name].shape != before.shape or not torch.equal(given[name].detach(), before)
    ]
    return result


def tensors(
    inputs: Inputs, dtype: torch.dtype = torch.float64, differentiable: str = ""
) -> dict[str, Any]:
    """Copies of `inputs`: arrays as tensors, floating-point ones in `dtype`; models and lists."""

    def tensor(name: str, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return copy.deepcopy(value)
        made = torch.from_numpy(value.copy())
        if not made.is_floating_point():
            return made
        return made.to(dtype).requires_grad_(name == differentiable)

    return {name: tensor(name, value) for name, value in inputs.items()}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong in the block after `seconds`, and again every 0.2 s until it is left.

    Nothing happens while a debugger is open, in a thread other than the main one, and on Windows,
    which has no such timer.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not hasattr(signal, "setitimer") or not in_main:
        yield
        return

    def stop(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_globals.get("__name__") in DEBUGGERS:
                return
            frame = frame.f_back
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Throw away what is printed and warned in the block."""
    nowhere = io.StringIO()
    with (
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _process_kept() -> Iterator[None]:
    """Put back random generators and torch's default dtype after the block."""
    of_torch, of_numpy, of_python = (
        torch.random.get_rng_state(),
        np.random.get_state(),
        random.getstate(),
    )
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.random.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
        torch.set_default_dtype(dtype)
