"""Arguments become plain Python or are refused by name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from dpo_lab.engine.arguments import (
    finite_positive,
    floats,
    folder,
    integer,
    integers,
    number,
    one_of,
    settled,
    token_ids,
    token_lists,
)


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    steps: int = 1
    on: bool = False
    name: str | None = None
    sizes: tuple[int, ...] = ()
    out: Path = Path("x")


@pytest.mark.parametrize("value", [2, np.int64(2), np.int32(2), torch.tensor(2), np.array(2)])
def test_integers_of_every_library_become_int(value):
    assert type(integer("n", value)) is int and integer("n", value) == 2
    assert type(number("n", value)) is float


@pytest.mark.parametrize("value", [0.25, np.float32(0.25), np.float64(0.25), torch.tensor(0.25)])
def test_numbers_of_every_library_become_float(value):
    assert type(number("x", value)) is float and number("x", value) == 0.25
    with pytest.raises(TypeError, match="n is 0.25"):
        integer("n", value)


@pytest.mark.parametrize(
    "value", ["2", None, True, np.bool_(True), torch.tensor(True), [2], torch.tensor([2, 3]), 2j]
)
def test_what_is_no_number_is_refused_by_name(value):
    for take in (integer, number, finite_positive):
        with pytest.raises(TypeError, match="steps is"):
            take("steps", value)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_what_is_not_positive_and_finite_is_refused(value):
    with pytest.raises(ValueError, match="rate is .* positive and finite"):
        finite_positive("rate", value)


def test_folders():
    assert folder("run", "~/r") == Path.home() / "r" and folder("run", Path("r")) == Path("r")
    with pytest.raises(TypeError, match="run is 3"):
        folder("run", 3)


@pytest.mark.parametrize("value", ["c", "A", None, 1, True])
def test_one_of_names_what_is_allowed(value):
    with pytest.raises(ValueError, match="kind is .*'a', 'b'"):
        one_of("kind", value, Literal["a", "b"])


def test_settled_brings_nested_configs_to_plain_python():
    config = Outer(
        Inner(rate=np.float32(0.5)),
        steps=np.int64(3),
        on=np.bool_(True),
        sizes=[np.int8(1)],
        out="~/y",
    )
    found = settled(config)
    assert found == Outer(Inner(0.5), 3, True, None, (1,), Path.home() / "y")
    assert (
        type(found.inner.rate) is float
        and type(found.steps) is int
        and found.on is True
        and type(found.sizes[0]) is int
    )


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (Outer(Inner(kind="c")), "kind is 'c'"),
        (Outer(Inner(rate="fast")), "rate is 'fast'"),
        (Outer(inner=3), "inner is 3"),
        (Outer(steps=1.5), "steps is 1.5"),
        (Outer(on=1), "on is 1"),
        (Outer(name=3), "name is 3"),
        (Outer(sizes="12"), "sizes is '12'"),
        (Outer(sizes=(1.5,)), r"sizes\[0\] is 1.5"),
        (Outer(out=3), "out is 3"),
    ],
)
def test_settled_names_the_field_that_does_not_fit(config, name):
    with pytest.raises((ValueError, TypeError), match=name):
        settled(config)


def test_sequences_become_arrays_and_lists_of_ints():
    for values in (
        [1, 2],
        (1, 2),
        range(1, 3),
        np.array([1, 2], dtype=np.uint8),
        torch.tensor([1, 2]),
        [np.int32(1), torch.tensor(2)],
    ):
        assert integers("x", values).tolist() == [1, 2] and integers("x", values).dtype == np.int64
        assert token_ids("x", values) == [1, 2] and set(map(type, token_ids("x", values))) == {int}
        assert floats("x", values).tolist() == [1.0, 2.0]
    assert integers("x", []).shape == floats("x", ()).shape == (0,) and token_ids("x", []) == []
    plain = [1, 2]
    assert token_ids("x", plain) is plain and token_lists("x", [plain])[0] is plain
    assert token_lists("x", np.array([[1, 2]])) == token_lists("x", [(1, 2)]) == [[1, 2]]


@pytest.mark.parametrize(
    "take, value, message",
    [
        (integers, [[1, 2]], r"x has shape \(1, 2\)"),
        (integers, [1, 2.5], "x holds 2.5 .float"),
        (integers, [1, True], "x holds True or False"),
        (integers, (i for i in (1, 2)), "x is <generator"),
        (integers, {1, 2}, "x is {1, 2} .set"),
        (floats, [1.0, "2"], "x holds '2' .str"),
        (floats, [[1.0], [1.0, 2.0]], "x holds sequences of unequal length"),
        (floats, 2.0, "x is 2.0 .float"),
        (token_ids, [3, -1], r"x\[1\] is -1"),
        (token_lists, [[3], [-1]], r"x\[1\]\[0\] is -1"),
        (token_lists, "ab", "x is 'ab'"),
        (number, torch.tensor(0.5, requires_grad=True), "x is tensor.*must be a number"),
    ],
)
def test_other_sequences_are_refused_by_name(take, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        take("x", value)
