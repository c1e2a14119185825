"""What a caller gave, brought to plain Python, or refused by name: checked before anything is loaded or written.

numpy and torch scalars are taken where a number is due, and `~` where a folder is due. The errors name the argument, the
value found, and what is allowed.
"""

import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

T = TypeVar("T")

Call = TypeVar("Call", bound=Callable[..., Any])


def one_of(name: str, value: Any, literal: Any) -> Any:
    """`value`, which must be one of the values of `literal` (a `typing.Literal`)."""
    allowed = get_args(literal)
    if not any(
        value is choice or isinstance(value, type(choice)) and value == choice for choice in allowed
    ):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
    return next(choice for choice in allowed if choice == value)


def number(name: str, value: Any) -> float:
    """`value` as a float: a real number of Python, numpy or torch. NaN and infinity pass; ranges are the caller's to check."""
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a number")
    return float(value)


def integer(name: str, value: Any) -> int:
    """`value` as an int: an integer of Python, numpy or torch."""
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be an integer")
    return int(value)


def folder(name: str, value: Any) -> Path:
    """`value`, a string or a path, as a path with `~` expanded."""
    if not isinstance(value, (str, Path)):
        raise TypeError(
            f"{name} is {value!r} ({type(value).__name__}); it must be the path of a folder"
        )
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # of a ~ whose owner has no home
        raise ValueError(f"{name} is {str(value)!r} ({error}); write the path out") from error


def integers(name: str, values: Any) -> np.ndarray:
    """`values`, a sequence, array or tensor of N integers, as int64 (N,)."""
    found = _array(name, values, "iu", "integers")
    if found.ndim != 1:
        raise ValueError(f"{name} has shape {found.shape}; it must be (N,), a sequence of integers")
    return found.astype(np.int64, copy=False)


def floats(name: str, values: Any) -> np.ndarray:
    """`values`, a sequence, array or tensor of numbers, as float64 of the same shape. NaN and infinity pass."""
    return _array(name, values, "iufb", "numbers").astype(np.float64, copy=False)


def token_ids(name: str, ids: Any, *, signed: bool = False) -> list[int]:
    """`ids`, a sequence, array or tensor of token ids, as a list of ints; a list of ints is returned as it is.

    Negative ones are refused, unless `signed` leaves that to who knows the vocabulary.
    """
    if not (type(ids) is list and set(map(type, ids)) <= {int}):
        ids = integers(name, ids).tolist()
    if not signed and ids and min(ids) < 0:
        i = next(i for i, token in enumerate(ids) if token < 0)
        raise ValueError(
            f"{name}[{i}] is {ids[i]}; a token id is an index into the vocabulary, 0 or more"
        )
    return ids


def token_lists(name: str, rows: Iterable[Any]) -> list[list[int]]:
    """`rows`, a sequence of `token_ids`, as lists of ints."""
    if isinstance(rows, str) or not hasattr(rows, "__len__"):
        raise TypeError(
            f"{name} is {rows!r} ({type(rows).__name__}); it must be a list of lists of token ids"
        )
    if (
        set(map(type, rows)) <= {list}
        and set(map(type, chain.from_iterable(rows))) <= {int}
        and min(chain.from_iterable(rows), default=0) >= 0
    ):
        return list(rows)
    return [token_ids(f"{name}[{i}]", row) for i, row in enumerate(rows)]


def _array(name: str, values: Any, kinds: str, what: str) -> np.ndarray:
    """`values` as an array whose dtype is one of numpy's `kinds`; an empty one of any dtype."""
    if isinstance(values, torch.Tensor):
        wide = (
            values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        )  # numpy has no bfloat16
        found = wide.detach().cpu().numpy()
    elif isinstance(values, np.ndarray):
        found = values
    elif hasattr(values, "__len__") and not isinstance(values, (str, bytes, dict, set)):
        if "b" not in kinds and any(isinstance(value, (bool, np.bool_)) for value in values):
            raise TypeError(f"{name} holds True or False; it must hold {what}")
        if any(
            isinstance(value, torch.Tensor) for value in values
        ):  # numpy takes none with a gradient, or from a GPU
            values = [
                value.tolist() if isinstance(value, torch.Tensor) else value for value in values
            ]
        try:
            found = np.asarray(values)
        except ValueError:  # rows of unequal length
            raise TypeError(
                f"{name} holds sequences of unequal length; it must hold {what}"
            ) from None
    else:
        raise TypeError(
            f"{name} is {values!r} ({type(values).__name__}); it must be a sequence of {what}"
        )
    if found.size and found.dtype.kind not in kinds:
        kind = numbers.Real if "f" in kinds else numbers.Integral
        some = map(
            _scalar, found.flat if isinstance(values, (np.ndarray, torch.Tensor)) else values
        )
        wrong = next(
            (value for value in some if isinstance(value, bool) or not isinstance(value, kind)),
            found.flat[0],
        )
        raise TypeError(f"{name} holds {wrong!r} ({type(wrong).__name__}); it must hold {what}")
    return found


def settled(config: T) -> T:
    """A copy of a config dataclass whose fields are plain Python of the types that it declares.

    Raises:
        ValueError, TypeError: a field holds what its annotation does not allow; the message names it.
    """
    hints = _hints(type(config))
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    changed = {name: _settled(name, value, hints[name]) for name, value in found.items()}
    return (
        config
        if all(changed[name] is value for name, value in found.items())
        else replace(config, **changed)
    )


def checked(call: Call) -> Call:
    """`call`, with the arguments that are Literals, configs or folders by their annotations settled before it begins.

    A config is a dataclass whose name ends with "Config". Defaults are taken as they are.
    """

    @functools.cache
    def watched() -> list[tuple[int, str, Any, bool]]:
        hints, parameters = get_type_hints(call), inspect.signature(call).parameters.values()
        spread = inspect.Parameter.VAR_POSITIONAL
        found = [(i, p.name, hints.get(p.name), p.kind is spread) for i, p in enumerate(parameters)]
        return [spot for spot in found if _is_checked(spot[2])]

    @functools.wraps(call)
    def checking(*arguments: Any, **named: Any) -> Any:
        given = list(arguments)
        for i, name, hint, spread in watched():
            if name in named:
                named[name] = _settled(name, named[name], hint)
            for k in range(i, len(given) if spread else min(i + 1, len(given))):
                given[k] = _settled(name, given[k], hint)
        return call(*given, **named)

    return checking  # type: ignore[return-value]


def _is_checked(hint: Any) -> bool:
    """Whether `checked` settles arguments of this annotation."""
    if hint is Path or get_origin(hint) is Literal:
        return True
    return (
        any(map(_is_checked, get_args(hint)))
        or is_dataclass(hint)
        and hint.__name__.endswith("Config")
    )


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def _settled(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` declares it. Hints that are none of these are left to the code that reads the field."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return one_of(name, value, hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        real = [part for part in parts if part is not type(None)]
        if set(real) == {str, Path}:
            return folder(name, value)
        return _settled(name, value, real[0]) if len(real) == 1 else value
    if origin is tuple and len(parts) == 2 and parts[1] is Ellipsis:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise TypeError(f"{name} is {value!r}; it must be a tuple")
        found = tuple(_settled(f"{name}[{i}]", item, parts[0]) for i, item in enumerate(value))
        return (
            value
            if isinstance(value, tuple) and all(a is b for a, b in zip(found, value))
            else found
        )
    if is_dataclass(hint):
        if not isinstance(value, hint):
            raise TypeError(f"{name} is {value!r}; it must be a {hint.__name__}")
        return settled(value)
    if hint is bool:
        value = _scalar(value)
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; it must be True or False")
        return value
    if hint is str and not isinstance(value, str):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a string")
    known = {float: number, int: integer, Path: folder}
    return known[hint](name, value) if hint in known else value


def _scalar(value: Any) -> Any:
    """A numpy or torch scalar as Python's, everything else as it is: a tensor with a gradient, which a float would lose, too."""
    of_torch = isinstance(value, torch.Tensor) and value.ndim == 0 and not value.requires_grad
    of_numpy = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if of_torch or of_numpy else value


def finite_positive(name: str, value: Any) -> float:
    """`value` as a float that is positive and finite."""
    found = number(name, value)
    if not (math.isfinite(found) and found > 0):
        raise ValueError(f"{name} is {found}; it must be positive and finite")
    return found
