"""Which mistakes the numbers show; failing that, where they begin to be wrong."""

import numpy as np

from dpo_lab.checks.attempt import USUAL_TOLERANCE, Attempt, Wrong
from dpo_lab.checks.calling import Call, Inputs
from dpo_lab.checks.contract import kind
from dpo_lab.checks.exercise import array, near
from dpo_lab.checks.messages import listing, shown
from dpo_lab.checks.readings import CONSTANT, Reading, readings


def numbers(attempt: Attempt) -> Wrong | None:
    """Which mistakes the numbers show; failing that, where they begin to be wrong."""
    if all(near(f, r, attempt.tolerance) for f, r in zip(attempt.found, attempt.right)):
        return None
    head = (
        f"expected {shown(attempt.right[0])}\nfound    {shown(attempt.found[0])}\n"
        f"on\n{listing(attempt.cases[0])}\n"
    )
    for look in (_constant, _known, _form, _unused, _rung):
        if (verdict := look(attempt, head)) is not None:
            return verdict
    return attempt.wrong("unknown", f"{head}No known mistake gives these numbers.")


def _constant(attempt: Attempt, head: str) -> Wrong | None:
    found = attempt.found[0]
    if found.size < 2 or not np.isfinite(found).all() or np.ptp(found) > CONSTANT:
        return None
    return attempt.wrong("constant", f"{head}All your numbers are the same.")


def _known(attempt: Attempt, head: str) -> Wrong | None:
    """The combination of known mistakes that gives these numbers."""
    known = readings(attempt.exercise, attempt.seed, attempt.found, attempt.tolerance)
    if not known:
        return None
    names, lines = _in_words(attempt, known[0])
    count = "one mistake" if len(lines) == 1 else f"{len(lines)} mistakes together"
    others = sorted({"; ".join(_in_words(attempt, other)[0]) for other in known[1:]})
    others = [other for other in others if other != "; ".join(names)]
    also = f"\nThe same numbers also come of: {' | '.join(others)}." if others else ""
    message = f"{head}Your numbers are those of {count}:\n" + "\n".join(lines) + also
    return Wrong(attempt.exercise.name, tuple(names), message, named=True)


def _in_words(attempt: Attempt, reading: Reading) -> tuple[list[str], list[str]]:
    """The names of the mistakes of a reading, and a line about each."""
    slips = [attempt.exercise.slips[s][setting] for s, setting in reading.settings.items()]
    names = [slip.name for slip in slips]
    lines = [f"- {slip.says} {slip.hint}" for slip in slips]
    general = [*reading.inputs, *([reading.result] if reading.result else [])]
    names += [change.name for change in general]
    lines += [f"- {change.says} {change.hint}" for change in general]
    return names, lines


def _form(attempt: Attempt, head: str) -> Wrong | None:
    """A wrong shape, NaN, or a multiple of the right numbers."""
    found, right = attempt.found, attempt.right
    if found[0].shape != right[0].shape and attempt.exercise.read is not array:
        unit = attempt.exercise.unit
        return attempt.wrong(
            f"number of {unit}s",
            f"{head}You have {len(found[0])} {unit}s; there are {len(right[0])}.",
        )
    if found[0].shape != right[0].shape:
        return attempt.wrong(
            "shape",
            f"{head}Its shape is {found[0].shape}; it must be {right[0].shape}, one number "
            f"per {attempt.exercise.unit}.",
        )
    if not all(np.isfinite(values).all() for values in found):
        return attempt.wrong(
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
    return attempt.wrong(
        "a multiple", f"{head}Your numbers are {slope:.4f} times the right ones{plus}."
    )


def _unused(attempt: Attempt, head: str) -> Wrong | None:
    """Inputs on which the right numbers depend, and the found ones do not."""
    main = attempt.cases[0]
    numeric = [
        name
        for name, value in main.items()
        if isinstance(value, float) or isinstance(value, np.ndarray) and value.dtype.kind == "f"
    ]
    names = [n for n in numeric if _answer_reacts(attempt, n) and not _reacts(attempt, n)]
    if not names:
        return None
    message = f"{head}Your numbers stay the same whatever {' and '.join(names)} is."
    return Wrong(attempt.exercise.name, tuple(f"{name} unused" for name in names), message)


def _answer_reacts(attempt: Attempt, name: str) -> bool:
    found = attempt.exercise.compute(_varied(attempt.cases[0], name), {})
    return found is not None and not near(found, attempt.right[0], 1e-9)


def _reacts(attempt: Attempt, name: str) -> bool:
    again = attempt.call(_varied(attempt.cases[0], name))
    if again.error is not None or again.slow or kind(attempt, again.value) is not None:
        return True
    return not near(attempt.exercise.read(again.value), attempt.found[0], 1e-9)


def _rung(attempt: Attempt, head: str) -> Wrong | None:
    """The simplest inputs on which the function fails."""
    passed = ""
    for rung in attempt.exercise.ladder:
        right = attempt.exercise.compute(rung.inputs, {})
        called = attempt.call(rung.inputs)
        if is_right(attempt, called, right):
            passed = rung.what
            continue
        before = f"It is right for {passed}, and wrong" if passed else "It is already wrong"
        found = called.error if called.error is not None else shown(called.value)

        return attempt.wrong(
            f"wrong for {rung.what}",
            f"No known mistake gives your numbers. {before} for {rung.what}: look at "
            f"{rung.look}. The simplest inputs on which it fails are\n{listing(rung.inputs)}\n"
            f"expected {shown(right)}\nfound    {found}",
        )
    return None


def is_right(attempt: Attempt, called: Call, right: np.ndarray | None) -> bool:
    if called.error is not None or called.slow or kind(attempt, called.value) is not None:
        return False
    assert right is not None
    return near(attempt.exercise.read(called.value), right, attempt.tolerance)


def _varied(inputs: Inputs, name: str) -> Inputs:
    """The same inputs with other values of one of them."""
    value = np.asarray(inputs[name])
    factors = np.linspace(1.2, 1.4, value.size).reshape(value.shape)
    changed = value * factors
    return {**inputs, name: changed if value.ndim else float(changed)}
