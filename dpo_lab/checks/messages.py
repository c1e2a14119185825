"""How a message shows numbers, inputs, types and a line of the student's."""

import traceback
from pathlib import Path
from typing import Any

import numpy as np

from dpo_lab.checks.calling import Inputs
from dpo_lab.checks.exercise import array

PACKAGE = Path(__file__).parent.parent


def shown(value: Any, n: int = 4) -> str:
    """The first numbers of what came back, for a message."""
    try:
        flat = array(value).ravel().tolist()
    except (TypeError, ValueError):
        return type_name(value)
    return ", ".join(f"{v:.4f}" for v in flat[:n]) + (", ..." if len(flat) > n else "")


def listing(inputs: Inputs) -> str:
    """Inputs by name, one per line; long ones abbreviated."""

    def short(value: Any) -> str:
        if not isinstance(value, np.ndarray):
            return str(value)
        text = str((value.round(3) if value.dtype.kind == "f" else value).tolist())
        return text if len(text) <= 100 else f"{text[:90]}... of shape {value.shape}"

    return "\n".join(f"    {name} = {short(value)}" for name, value in inputs.items())


def type_name(value: Any) -> str:
    """How a message names the type of a value."""
    package = type(value).__module__.split(".")[0]
    return type(value).__name__ if package == "builtins" else f"{package}.{type(value).__name__}"


def line_of(error: BaseException) -> str:
    """The student's own line at which an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename
        and not Path(frame.filename).is_relative_to(PACKAGE)
    ]
    return f"Line {own[-1].lineno} of yours, `{own[-1].line}`: " if own else ""
