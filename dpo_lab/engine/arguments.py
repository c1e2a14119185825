"""Arguments of a caller in plain Python, or refused by name before anything is loaded or written.

numpy and torch scalars are as good as numbers, and `~` is expanded in folders. Errors name the
argument, the value found, and what is allowed.
"""

import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

T = TypeVar("T")
Call = TypeVar("Call", bound=Callable[..., Any])


# single values


MORE_CHOICES: dict[Any, Mapping[str, Any]] = {}
"""Tables whose names are allowed beside the values of a `typing.Literal`."""


def one_of(name: str, value: Any, literal: Any) -> Any:
    """`value`, which must be one of the values of `literal` (a `typing.Literal`)."""
    allowed = tuple(dict.fromkeys([*get_args(literal), *MORE_CHOICES.get(literal, ())]))
    for choice in allowed:
        if value is choice or isinstance(value, type(choice)) and value == choice:
            return choice
    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def number(name: str, value: Any) -> float:
    """`value`, a real number of Python, numpy or torch, as a float.

    NaN and infinity pass; ranges are the caller's to check.
    """
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a number")
    return float(value)


def at_least(config: Any, least: Mapping[str, int]) -> None:
    """Raise ValueError for a field of `config` that is below its least value."""
    for name, lowest in least.items():
        if (value := getattr(config, name)) < lowest:
            raise ValueError(f"{name} is {value}; it must be at least {lowest}")


def finite_positive(name: str, value: Any) -> float:
    """`value` as a float that is positive and finite."""
    found = number(name, value)
    if not (math.isfinite(found) and found > 0):
        raise ValueError(f"{name} is {found}; it must be positive and finite")
    return found


def integer(name: str, value: Any) -> int:
    """`value`, an integer of Python, numpy or torch, as an int."""
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
    except RuntimeError as error:  # a ~ whose owner has no home
        raise ValueError(f"{name} is {str(value)!r} ({error}); write the path out") from error


# sequences


def integers(name: str, values: Any, *, any_shape: bool = False) -> np.ndarray:
    """`values`, a sequence, array or tensor of N integers, as int64 (N,), or of `any_shape`."""
    if type(values) is np.ndarray and values.dtype == np.int64 and values.ndim == 1:
        return values
    found = _array(name, values, "iu", "integers")
    if found.ndim != 1 and not any_shape:
        raise ValueError(f"{name} has shape {found.shape}; it must be (N,), a sequence of integers")
    return found.astype(np.int64, copy=False)


def floats(name: str, values: Any) -> np.ndarray:
    """`values`, a sequence, array or tensor of numbers, as float64 of the same shape.

    NaN and infinity pass.
    """
    return _array(name, values, "iufb", "numbers").astype(np.float64, copy=False)


def token_ids(name: str, ids: Any, *, signed: bool = False) -> list[int]:
    """`ids`, a sequence, array or tensor of token ids, as a list of ints.

    A list of ints is returned as it is. Negative ids are refused, unless `signed` leaves that check
    to a caller who knows the vocabulary.
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

    # lists of ints need no conversion, and are many
    all_lists = set(map(type, rows)) <= {list}
    if all_lists and set(map(type, chain.from_iterable(rows))) <= {int}:
        if min(chain.from_iterable(rows), default=0) >= 0:
            return list(rows)
    return [token_ids(f"{name}[{i}]", row) for i, row in enumerate(rows)]


def _array(name: str, values: Any, kinds: str, what: str) -> np.ndarray:
    """`values` as an array whose dtype is one of numpy's `kinds`; an empty one of any dtype."""
    if isinstance(values, torch.Tensor):
        half = values.dtype in (torch.bfloat16, torch.float16)  # numpy has no bfloat16
        found = (values.float() if half else values).detach().cpu().numpy()
    elif isinstance(values, np.ndarray):
        found = values
    elif hasattr(values, "__len__") and not isinstance(values, (str, bytes, dict, set)):
        found = _listed(name, values, kinds, what)
    else:
        raise TypeError(
            f"{name} is {values!r} ({type(values).__name__}); it must be a sequence of {what}"
        )
    if not found.size or found.dtype.kind in kinds:
        return found

    # name the first value that is no number
    kind = numbers.Real if "f" in kinds else numbers.Integral
    given = found.flat if isinstance(values, (np.ndarray, torch.Tensor)) else values
    some = map(_scalar, given)
    wrong = next(
        (value for value in some if isinstance(value, bool) or not isinstance(value, kind)),
        found.flat[0],
    )
    raise TypeError(f"{name} holds {wrong!r} ({type(wrong).__name__}); it must hold {what}")


def _listed(name: str, values: Any, kinds: str, what: str) -> np.ndarray:
    """A sequence as an array, of whatever dtype numpy gives it."""
    if "b" not in kinds and any(isinstance(value, (bool, np.bool_)) for value in values):
        raise TypeError(f"{name} holds True or False; it must hold {what}")

    # numpy takes no tensor with a gradient, or from a GPU
    if any(isinstance(value, torch.Tensor) for value in values):
        values = [value.tolist() if isinstance(value, torch.Tensor) else value for value in values]
    try:
        return np.asarray(values)
    except ValueError:
        raise TypeError(f"{name} holds sequences of unequal length; it must hold {what}") from None


# configs, and the arguments of a call


def settled(config: T) -> T:
    """A config dataclass with fields in plain Python, of the types that it declares.

    Raises:
        ValueError, TypeError: a field, which is named, holds what its annotation does not allow.
    """
    hints = _hints(type(config))
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    plain = {name: _settled(name, value, hints[name]) for name, value in found.items()}
    if all(plain[name] is value for name, value in found.items()):
        return config
    return replace(config, **plain)


def checked(call: Call) -> Call:
    """A decorator that checks the Literals, configs and folders among a call's arguments.

    Annotations say which arguments these are; a config is a dataclass whose name ends with
    "Config". The call gets them as `settled` gives them. Defaults are taken as they are.
    """

    # annotations are read at the first call, when all names in them exist
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
    """Whether `checked` looks at arguments of this annotation."""
    if hint is Path or get_origin(hint) is Literal:
        return True
    if is_dataclass(hint) and hint.__name__.endswith("Config"):
        return True
    return any(map(_is_checked, get_args(hint)))


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def _settled(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` declares it; other hints are left to the code that reads the value."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return one_of(name, value, hint)

    # optional, or a path in either form
    if origin in (Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        real = [part for part in parts if part is not type(None)]
        if set(real) == {str, Path}:
            return folder(name, value)
        return _settled(name, value, real[0]) if len(real) == 1 else value

    # tuple[X, ...]
    if origin is tuple and len(parts) == 2 and parts[1] is Ellipsis:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise TypeError(f"{name} is {value!r}; it must be a tuple")
        found = tuple(_settled(f"{name}[{i}]", item, parts[0]) for i, item in enumerate(value))
        same = isinstance(value, tuple) and all(a is b for a, b in zip(found, value))
        return value if same else found

    # a config in a config
    if is_dataclass(hint):
        if not isinstance(value, hint):
            raise TypeError(f"{name} is {value!r}; it must be a {hint.__name__}")
        return settled(value)

    # single values
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
    """A numpy or torch scalar as Python's; everything else as it is.

    That includes a tensor with a gradient, which a float would lose.
    """
    of_torch = isinstance(value, torch.Tensor) and value.ndim == 0 and not value.requires_grad
    of_numpy = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if of_torch or of_numpy else value
