"""Every Literal of every public function and config is checked before anything is touched, found by looking at them all."""

import importlib
import inspect
import pkgutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

import dpo_lab
from dpo_lab.arguments import checked, settled
from dpo_lab.contenders import Contender
from dpo_lab.layout import completion_batch
from dpo_lab.loop import LoopConfig, make_optimizers
from dpo_lab.preferences import Preferences
from dpo_lab.train import DPOConfig, check_config, train_dpo

WRONG = "a name that nobody allowed"
SETTLED_BEFORE = {"loop.evaluates"}  # takes the numbers of a config once a step, after its loop has settled it
MODULES = [importlib.import_module(f"dpo_lab.{m.name}") for m in pkgutil.iter_modules(dpo_lab.__path__)]


class Untouched:
    """An argument that no function may look at before it has checked the others."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the argument's {name} was used before the check")

    __len__ = __iter__ = __call__ = __eq__ = __lt__ = __float__ = __bool__ = __fspath__ = lambda self, *rest: self.used
    __hash__ = None


def literals(hint: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where an annotation has a Literal: () itself, or the fields of a config, one inside the other."""
    if get_origin(hint) is Literal:
        return [path]
    if is_config(hint):
        hints = get_type_hints(hint)
        return [found for field in fields(hint) for found in literals(hints[field.name], (*path, field.name))]
    return [found for part in get_args(hint) for found in literals(part, path)]


def is_config(hint: Any) -> bool:
    return is_dataclass(hint) and hint.__name__.endswith("Config")


def wrong(hint: Any, path: tuple[str, ...]) -> Any:
    """A value for an annotation that is right but for one Literal."""
    if not path:
        return (WRONG,) if get_origin(hint) is tuple else WRONG
    config = hint if is_config(hint) else next(part for part in get_args(hint) if is_config(part))
    return replace(config(), **{path[0]: wrong(get_type_hints(config)[path[0]], path[1:])})


def public_functions():
    for module in MODULES:
        for name, found in vars(module).items():
            if name.startswith("_") or getattr(found, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(found):
                yield f"{module.__name__[8:]}.{name}", found
            elif inspect.isclass(found):
                for method, function in vars(found).items():
                    function = getattr(function, "__func__", function)
                    made = method == "__init__" and is_dataclass(found)
                    if inspect.isfunction(function) and (method == "__init__" or method[0] != "_") and not made:
                        yield f"{module.__name__[8:]}.{name}.{method}", function


DOORS = [
    pytest.param(function, parameter, path, id=".".join((name, parameter, *path)))
    for name, function in public_functions()
    if name not in SETTLED_BEFORE
    for parameter, hint in get_type_hints(function).items()
    if parameter != "return"
    for path in literals(hint)
]
DATACLASSES = [
    pytest.param(found, field.name, id=f"{found.__name__}.{field.name}")
    for module in MODULES
    for found in vars(module).values()
    if is_dataclass(found) and found.__module__ == module.__name__ and not is_config(found)
    for field in fields(found)
    if literals(get_type_hints(found)[field.name])
]


def test_the_doors_were_found():
    """The walk sees functions, methods, and Literals two configs deep."""
    names = {door.id for door in DOORS}
    assert (
        len(names) > 100
        and {
            "train.train_dpo.config.loop.optimizer",
            "frontier.frontier.config.reward_model.loop.schedule",
            "preferences.Preferences.with_reference.precision",
            "reward_model.LearnedReward.__init__.precision",
            "logprobs.completion_logps.reduction",
            "contenders.repeats.methods",
            "imdb.load_imdb.source",
        }
        <= names
    )


def harmless(hint: Any, folder: Path) -> Any:
    """What stands for an argument that is not the wrong one: a config that is right, a folder to be, or what must not be used."""
    for part in (hint, *get_args(hint)):
        if is_config(part):
            return part()
        if part is Path:
            return folder / "untouched"
    return Untouched()


@pytest.mark.parametrize(("function", "parameter", "path"), DOORS)
def test_a_wrong_name_is_refused_before_any_other_argument_is_touched(function, parameter, path, tmp_path):
    hints, arguments, named = get_type_hints(function), [], {}
    for p in inspect.signature(function).parameters.values():
        hint = hints.get(p.name)
        value = wrong(hint, path) if p.name == parameter else harmless(hint, tmp_path)
        if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL):
            arguments.append(value)
        elif p.name == parameter or p.default is p.empty:
            named[p.name] = value
    with pytest.raises(ValueError, match=rf"{(path or (parameter,))[-1]}.* is '{WRONG}'; it must be"):
        function(*arguments, **named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "name"), DATACLASSES)
def test_a_wrong_name_makes_no_object(kind, name):
    given = {
        Contender: {"method": "dpo", "setting": 0.1, "seed": 0},
        Preferences: dict(
            prompts=[[1]], completions=[[2], [3]], prompt_of=np.zeros(2, int), chosen=np.array([0]), rejected=np.array([1])
        ),
    }[kind]
    kind(**given)
    with pytest.raises(ValueError, match=f"{name} is '{WRONG}'; it must be"):
        kind(**given | {name: WRONG})


def test_a_literal_without_a_check_does_not_pass(tmp_path):
    """The test above, on a function that does not look at its Literal, and on one that looks too late."""

    def late(model: Any, kind: Literal["a", "b"] = "a") -> None:
        len(model)
        checked(early)(model, kind)

    def early(model: Any, kind: Literal["a", "b"] = "a") -> None:
        """Does not look at all."""

    for function in (early, late):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test_a_wrong_name_is_refused_before_any_other_argument_is_touched(function, "kind", (), tmp_path)
    test_a_wrong_name_is_refused_before_any_other_argument_is_touched(checked(early), "kind", (), tmp_path)


@pytest.mark.parametrize("name", ["adamw_torch", "AdamW", "sgd", "Muon", None, 0])
def test_no_other_name_means_muon(model, name):
    loop = LoopConfig(optimizer=name)
    for door in (lambda: check_config(DPOConfig(loop=loop)), lambda: make_optimizers(model, loop)):
        with pytest.raises(ValueError, match="optimizer is .* must be one of 'adamw', 'rmsprop', 'muon'"):
            door()


@pytest.mark.parametrize("scalar", [np.float32, np.float64, torch.tensor])
def test_rates_of_numpy_and_torch_train_as_pythons_do(tiny, tmp_path, tokenizer, scalar):
    from dpo_lab.models import load_model
    from dpo_lab.preferences import from_rows

    rows = [{"prompt": "A kettle", "chosen": " boils", "rejected": " leaks"}]
    reference = load_model(str(tiny))
    preferences, lines = from_rows(rows, tokenizer, context=64).with_reference(reference), []
    for rate in (2**-12, scalar(2**-12)):
        loop = LoopConfig(learning_rate=rate, warmup_steps=0)
        run = tmp_path / type(rate).__name__
        run.mkdir()
        config = DPOConfig(beta=scalar(0.5), epochs=np.int64(1), loop=loop)
        lines.append(train_dpo(load_model(str(tiny)), preferences, config, run=run, progress=None))
    found = [{k: v for k, v in line.items() if "second" not in k} for (line,) in lines]
    assert found[0] == found[1] and type(lines[1][0]["learning_rate"]) is float


def test_settled_configs_are_the_same_object():
    """So that a check costs nothing the second time."""
    config = settled(DPOConfig(beta=np.float64(0.5)))
    assert settled(config) is config and checked(lambda x: x)(completion_batch) is completion_batch
