"""Every Literal of every public function and config is checked before anything is touched.

The test looks at all functions and configs to find them.
"""

import importlib
import inspect
import json
import pkgutil
import warnings
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

import dpo_lab
from dpo_lab import loop
from dpo_lab.batching import completion_batch
from dpo_lab.data import run as public_run
from dpo_lab.data.ratings import Rating
from dpo_lab.data.run import PublicRunConfig, train_public
from dpo_lab.engine.arguments import checked, settled
from dpo_lab.health.diagnosis import Finding
from dpo_lab.health.finding import Seen
from dpo_lab.health.record import RunRecord
from dpo_lab.loop import LoopConfig, make_optimizers
from dpo_lab.models import load_model
from dpo_lab.preferences import Preferences, from_rows
from dpo_lab.rlhf.reward_model import RewardModelConfig, train_reward_model
from dpo_lab.sentiment import pretrain, task
from dpo_lab.sentiment import run as experiment
from dpo_lab.sentiment import sweep as frontier
from dpo_lab.sentiment.cost import plan
from dpo_lab.sentiment.pretrain import PretrainConfig
from dpo_lab.sentiment.results import Run
from dpo_lab.sentiment.run import ExperimentConfig
from dpo_lab.sentiment.sweep import FrontierConfig
from dpo_lab.sentiment.task import Task, TaskConfig
from dpo_lab.train import DPOConfig, check_config, train_dpo, train_sft, train_unlikelihood
from dpo_lab.variants import CPO, BinaryFeedback

WRONG = "a name that nobody allowed"
# takes the numbers of a config once per step, after its loop has settled it
SETTLED_BEFORE = {"loop.evaluates"}
MODULES = [
    importlib.import_module(m.name) for m in pkgutil.walk_packages(dpo_lab.__path__, "dpo_lab.")
]


class Untouched:
    """An argument that no function may look at before it has checked the others."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the argument's {name} was used before the check")

    __len__ = __iter__ = __call__ = __eq__ = __lt__ = __float__ = __bool__ = __fspath__ = (
        lambda self, *rest: self.used
    )
    __hash__ = None


def literals(hint: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where an annotation has a Literal: () itself, or the fields of a config, possibly nested."""
    if get_origin(hint) is Literal:
        return [path]
    if is_config(hint):
        hints = get_type_hints(hint)
        return [
            found
            for field in fields(hint)
            for found in literals(hints[field.name], (*path, field.name))
        ]
    return [found for part in get_args(hint) for found in literals(part, path)]


def is_config(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint) and hint.__name__.endswith("Config")


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
                    if (
                        inspect.isfunction(function)
                        and (method == "__init__" or method[0] != "_")
                        and not made
                    ):
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
    if () in literals(get_type_hints(found)[field.name])
]


def test_the_doors_were_found():
    """The walk sees functions, methods, and Literals two configs deep."""
    names = {door.id for door in DOORS}
    assert (
        len(names) > 100
        and {
            "train.train_dpo.config.loop.optimizer",
            "sentiment.sweep.frontier.config.reward_model.loop.schedule",
            "preferences.Preferences.with_reference.precision",
            "rlhf.reward_model.LearnedReward.__init__.precision",
            "logprobs.completion_logps.reduction",
            "sentiment.results.repeats.methods",
            "sentiment.reviews.load_imdb.source",
        }
        <= names
    )


def harmless(hint: Any, folder: Path) -> Any:
    """What stands for an argument that is not the wrong one.

    A config that is right, a folder that is yet to be made, or what must not be used.
    """
    for part in (hint, *get_args(hint)):
        if is_config(part):
            return part()
        if part is Path:
            return folder / "untouched"
    return Untouched()


@pytest.mark.parametrize(("function", "parameter", "path"), DOORS)
def test_a_wrong_name_is_refused_before_any_other_argument_is_touched(
    function, parameter, path, tmp_path
):
    hints, arguments, named = get_type_hints(function), [], {}
    for p in inspect.signature(function).parameters.values():
        hint = hints.get(p.name)
        value = wrong(hint, path) if p.name == parameter else harmless(hint, tmp_path)
        if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL):
            arguments.append(value)
        elif p.name == parameter or p.default is p.empty:
            named[p.name] = value
    with pytest.raises(
        ValueError, match=rf"{(path or (parameter,))[-1]}.* is '{WRONG}'; it must be"
    ):
        function(*arguments, **named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "name"), DATACLASSES)
def test_a_wrong_name_makes_no_object(kind, name):
    given = {
        Rating: dict(item="a", rater="ada", pass_number=1, order=(0, 1), choice="tie"),
        Run: {"method": "dpo", "setting": 0.1, "seed": 0},
        RunRecord: {"source": "trl", "steps": []},
        Seen: {"severity": "note", "evidence": ""},
        CPO: {},
        BinaryFeedback: dict(
            prompts=[[1], [4]],
            completions=[[2], [3]],
            prompt_of=np.arange(2),
            rated=np.arange(2),
            desirable=np.array([True, False]),
        ),
        Finding: dict(fault="dropout_on", severity="note", evidence="", advice=""),
        Preferences: dict(
            prompts=[[1]],
            completions=[[2], [3]],
            prompt_of=np.zeros(2, int),
            chosen=np.array([0]),
            rejected=np.array([1]),
        ),
    }[kind]
    kind(**given)
    with pytest.raises(ValueError, match=f"{name} is '{WRONG}'; it must be"):
        kind(**given | {name: WRONG})


def test_a_literal_without_a_check_does_not_pass(tmp_path):
    """The test above, on a function that ignores its Literal, and on one that looks too late."""

    def late(model: Any, kind: Literal["a", "b"] = "a") -> None:
        len(model)
        checked(early)(model, kind)

    def early(model: Any, kind: Literal["a", "b"] = "a") -> None:
        """Does not look at all."""

    for function in (early, late):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test_a_wrong_name_is_refused_before_any_other_argument_is_touched(
                function, "kind", (), tmp_path
            )
    test_a_wrong_name_is_refused_before_any_other_argument_is_touched(
        checked(early), "kind", (), tmp_path
    )


@pytest.mark.parametrize("name", ["adamw_torch", "AdamW", "sgd", "Muon", None, 0])
def test_no_other_name_means_muon(model, name):
    loop = LoopConfig(optimizer=name)
    for door in (lambda: check_config(DPOConfig(loop=loop)), lambda: make_optimizers(model, loop)):
        with pytest.raises(
            ValueError, match="optimizer is .* must be one of 'adamw', 'rmsprop', 'muon'"
        ):
            door()


@pytest.mark.parametrize("scalar", [np.float32, np.float64, torch.tensor])
def test_rates_of_numpy_and_torch_train_as_pythons_do(tiny, tmp_path, tokenizer, scalar):
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


CONFIGS = {
    train_public: PublicRunConfig,
    experiment.train: ExperimentConfig,
    experiment.plan_run: ExperimentConfig,
    frontier.frontier: FrontierConfig,
    pretrain.pretrain: PretrainConfig,
    Task.open: TaskConfig,
    train_dpo: DPOConfig,
    train_sft: LoopConfig,
    train_unlikelihood: LoopConfig,
    train_reward_model: RewardModelConfig,
}


def numbers(config: type, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where a config has a number, in it or in a config inside it."""
    hints = get_type_hints(config)
    found = [
        (*path, name) for name, hint in hints.items() if {int, float} & {hint, *get_args(hint)}
    ]
    return found + [
        inner
        for name, hint in hints.items()
        if is_config(hint)
        for inner in numbers(hint, (*path, name))
    ]


def changed(config: Any, path: tuple[str, ...], value: Any) -> Any:
    inner = changed(getattr(config, path[0]), path[1:], value) if path[1:] else value
    return replace(config, **{path[0]: inner})


@pytest.mark.parametrize("value", [-1, float("nan")])
@pytest.mark.parametrize(
    ("door", "path"),
    [
        pytest.param(door, path, id=".".join((door.__module__[8:], door.__name__, *path)))
        for door, config in CONFIGS.items()
        for path in numbers(config)
    ],
)
def test_a_number_that_cannot_be_is_refused_before_anything_is_loaded_or_written(
    monkeypatch, tmp_path, door, path, value
):
    for module, name in (
        (task, "load_model"),
        (task, "load_imdb"),
        (pretrain, "load_imdb"),
        (public_run, "load_model"),
        (public_run, "load_preferences"),
    ):
        monkeypatch.setattr(module, name, Untouched())
    arguments, hints = {}, get_type_hints(door)
    for p in inspect.signature(door).parameters.values():
        if p.name == "config":
            arguments[p.name] = changed(CONFIGS[door](), path, value)
        elif p.default is p.empty:
            arguments[p.name] = 0.5 if p.name == "alpha" else harmless(hints[p.name], tmp_path)
    with pytest.raises((ValueError, TypeError), match=rf"\b{path[-1]} is {value}"):
        door(**arguments)
    assert not list(tmp_path.iterdir())


def test_runs_of_a_sweep_are_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(Task, "load", Untouched())
    for run, found in (
        (Run("dpo", -0.1, 0), "beta is -0.1"),
        (Run("ppo", 0.0, 0), "kl_target is 0"),
        (Run("unlikelihood", 2.0, 0), "alpha is 2"),
        (
            Run("best-of-n", 4, 0),
            "method is 'best-of-n'; it must be one of 'dpo', 'ppo', 'ppo-gt', 'unlikelihood'",
        ),
    ):
        with pytest.raises(ValueError, match=found):
            frontier.frontier(FrontierConfig(), tmp_path / "out", runs=[run])
    with pytest.raises(ValueError, match="samples is 15; it must be at least 16"):
        frontier.frontier(FrontierConfig(samples=15), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_run_of_numpy_numbers_is_that_of_pythons():
    run = Run("dpo", np.float32(0.5), np.int64(3))
    assert run == Run("dpo", 0.5, 3) and json.loads(json.dumps([run.setting, run.seed])) == [
        0.5,
        3,
    ]


def test_a_sweep_of_a_model_without_blocks_is_refused_before_anything_is_sampled(
    monkeypatch, tmp_path, made_up_reviews, tiny
):
    monkeypatch.setattr(task, "sample_with_logps", Untouched())
    monkeypatch.setattr(loop, "GradientCheckpointingLayer", type("Absent", (), {}))
    config = FrontierConfig(
        task=TaskConfig(model=str(tiny), prefixes=12, eval_prefixes=8, max_new_tokens=6),
        reward_model=RewardModelConfig(loop=LoopConfig(gradient_checkpointing=True)),
    )
    with pytest.raises(ValueError, match="has no blocks"):
        frontier.frontier(config, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_sft_without_batches_says_so(model):
    with pytest.raises(ValueError, match="batches is empty"):
        train_sft(model, [], 1, LoopConfig())


@pytest.mark.parametrize("door", [frontier.frontier, train_reward_model, train_sft])
def test_tensorboard_needs_a_run_directory(door, tmp_path):
    loop = LoopConfig(tensorboard=True)
    arguments = {
        frontier.frontier: (FrontierConfig(loop=loop), tmp_path / "out"),
        train_reward_model: (Untouched(), Untouched(), RewardModelConfig(loop=loop)),
        train_sft: (Untouched(), lambda step: [], 1, loop),
    }[door]
    with pytest.raises(ValueError, match="tensorboard is on"):
        door(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_warm_up_longer_than_the_run_is_said(tiny, tokenizer):
    """By the plan before anything is written, and by the run; not if the last step is the peak."""
    rows = [
        {"prompt": f"Kettle {i}", "chosen": f" boils {i}", "rejected": f" leaks {i}"}
        for i in range(3)
    ]
    reference = load_model(str(tiny))
    preferences = from_rows(rows, tokenizer, context=64).with_reference(reference)
    config = DPOConfig(batch_pairs=1, loop=LoopConfig(learning_rate=1e-4, warmup_steps=4))

    def run(config: DPOConfig) -> list[dict[str, Any]]:
        return train_dpo(load_model(str(tiny)), preferences, config, progress=None)

    said = (
        "warmup_steps is 4 and there are 3 steps, so the learning rate ends at 7.5e-05 "
        "and never reaches .*0.0001"
    )
    with pytest.warns(UserWarning, match=said):
        lines = run(config)
    assert lines[-1]["learning_rate"] == pytest.approx(7.5e-5)
    options = {"completions": 2, "max_new_tokens": 4, "eval_prefixes": 8}
    with pytest.warns(UserWarning, match=said):
        plan(reference, preferences.prompts[:1] * 3, config, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        reached = replace(config, loop=replace(config.loop, warmup_steps=3))
        assert run(reached)[-1]["learning_rate"] == 1e-4
        plan(reference, preferences.prompts[:1] * 3, reached, **options)


def test_settled_configs_are_the_same_object():
    """So that a check costs nothing the second time."""
    config = settled(DPOConfig(beta=np.float64(0.5)))
    assert settled(config) is config and checked(lambda x: x)(completion_batch) is completion_batch
