"""Checks of homework: a right answer is accepted however it is written, a wrong one is named."""

import ast
import collections
import importlib.util
import itertools
import random
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpo_lab import checks
from dpo_lab.checks import EXERCISES, Wrong, check, diagnose, mistakes
from dpo_lab.checks.calling import call
from dpo_lab.checks.changes import input_changes, result_changes
from dpo_lab.checks.exercise import near
from dpo_lab.checks.readings import Reading, readings
from tests.right_answers import RIGHT_ANSWERS
from tests.syntax_mutants import mutants, mutants_of_mutants
from tests.wrong_answers import WRONG_ANSWERS

SOLUTIONS = Path(__file__).parent.parent / "notebooks" / "exercises" / "solutions.py"
FEW, MANY = range(1), range(20)

every_exercise = pytest.mark.parametrize("name", EXERCISES)
over_seeds = pytest.mark.parametrize(
    "seeds", [FEW, pytest.param(MANY, marks=pytest.mark.long)], ids=["few", "many"]
)


def load(path: Path):
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


solutions = load(SOLUTIONS)


def mistaken(exercise, settings):
    """A student's function that makes these mistakes."""

    def answer(**given):
        inputs = {
            name: x.detach().numpy() if isinstance(x, torch.Tensor) else x
            for name, x in given.items()
        }
        value = torch.as_tensor(exercise.compute(inputs, settings))
        return tuple(value.long().T) if exercise.name == "pairs" else value

    return answer


def singles(exercise):
    return [(switch, one) for switch, some in exercise.slips.items() for one in some]


# the table of mistakes


def test_the_table_names_enough_mistakes_and_each_in_full():
    assert set(mistakes()) == set(EXERCISES)
    slips = [slip for some in mistakes().values() for one in some.values() for slip in one.values()]
    assert len(slips) >= 130
    assert all(slip.name and slip.says.endswith(".") and slip.hint.endswith("?") for slip in slips)
    for name, switches in mistakes().items():
        assert sum(map(len, switches.values())) >= 5, name


@over_seeds
@every_exercise
def test_two_mistakes_never_have_the_same_numbers_under_two_names(name, seeds):
    exercise = EXERCISES[name]
    for seed in seeds:
        main, second = exercise.cases(seed)
        right = exercise.compute(main, {}), exercise.compute(second, {})
        found = [("right", right)]
        for switch, one in singles(exercise):
            settings = {switch: one}
            values = exercise.compute(main, settings), exercise.compute(second, settings)
            assert all(np.isfinite(v).all() for v in values), (switch, one, seed)
            assert values[0].size == 1 or np.ptp(values[0]) > 1e-6, (switch, one, seed)
            found.append((exercise.slips[switch][one].name, values))
        for (one, a), (other, b) in itertools.combinations(found, 2):
            apart = any(x.shape != y.shape or abs(x - y).max() > 1e-3 for x, y in zip(a, b))
            assert apart or one == other, (one, other, seed)


# what is accepted


@over_seeds
@every_exercise
def test_a_solution_is_accepted_on_every_seed(name, seeds):
    for seed in seeds:
        wrong = diagnose(EXERCISES[name], getattr(solutions, f"my_{name}"), seed=seed)
        assert wrong is None, str(wrong)


def test_every_exercise_has_four_more_right_answers():
    counts = collections.Counter(name for name, _ in RIGHT_ANSWERS)
    assert set(counts) == set(EXERCISES) and min(counts.values()) >= 4


@over_seeds
@pytest.mark.parametrize("name, function", RIGHT_ANSWERS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_right_answer_is_accepted_however_it_is_written(name, function, seeds):
    for seed in seeds:
        wrong = diagnose(EXERCISES[name], function, seed=seed)
        assert wrong is None, str(wrong)


# what is named


@over_seeds
@every_exercise
def test_every_single_mistake_is_named_on_every_seed(name, seeds):
    exercise = EXERCISES[name]
    for seed, (switch, one) in itertools.product(seeds, singles(exercise)):
        wrong = diagnose(exercise, mistaken(exercise, {switch: one}), seed=seed)
        expected = exercise.slips[switch][one].name
        assert wrong is not None and wrong.names == (expected,), (wrong, expected, seed)


def verdicts_on_two(name, n=None):
    """What becomes of answers with two mistakes, of all of them or of `n` drawn at random."""
    exercise = EXERCISES[name]
    two = [settings for settings in exercise.combinations(2) if len(settings) == 2]
    random.Random(0).shuffle(two)
    cases = exercise.cases(0)
    right = [exercise.compute(inputs, {}) for inputs in cases]
    counts = collections.Counter()
    for settings in two[:n]:
        values = [exercise.compute(inputs, settings) for inputs in cases]
        if values[0] is None:
            continue

        # two mistakes may undo each other, or leave nothing that tells anything
        wrong = diagnose(exercise, mistaken(exercise, settings))
        names = {exercise.slips[switch][one].name for switch, one in settings.items()}
        if all(near(a, b, 1e-6) for a, b in zip(values, right)):
            assert wrong is None or not wrong.named, (settings, wrong)
            counts["right"] += 1
        elif not np.isfinite(values[0]).all() or values[0].size > 1 and np.ptp(values[0]) < 1e-9:
            assert wrong is not None and not wrong.named, (settings, wrong)
            counts["constant or not finite"] += 1
        else:
            assert wrong is not None, settings
            kind = "read with equal numbers" if wrong.named else "not read"
            counts["named" if set(wrong.names) == names else kind] += 1
    return counts


def fraction_read(counts):
    read = counts["named"] + counts["read with equal numbers"]
    return read / (read + counts["not read"])


def test_two_mistakes_at_once_are_named_or_read_with_equal_numbers():
    total = sum((verdicts_on_two(name, 8) for name in EXERCISES), collections.Counter())
    assert fraction_read(total) >= 0.97, total


@pytest.mark.long
def test_all_pairs_of_mistakes_are_named_or_read_with_equal_numbers():
    columns = "named", "read with equal numbers", "not read", "right", "constant or not finite"
    total = collections.Counter()
    for name in EXERCISES:
        counts = verdicts_on_two(name)
        total += counts
        print(name, *(f"{column}: {counts[column]}" for column in columns), sep=", ", flush=True)
    print("all", *(f"{column}: {total[column]}" for column in columns), sep=", ")
    assert fraction_read(total) >= 0.97, total


def changes_of(name):
    """Every reading with one mistake of any exercise, in an input or the result."""
    main, _ = EXERCISES[name].cases(0)
    for change in input_changes(main):
        yield Reading({}, (change,))
    for change in result_changes(EXERCISES[name].unit):
        yield Reading({}, (), change)


@every_exercise
def test_every_reading_has_a_hint_and_a_general_one_asks_a_question(name):
    exercise = EXERCISES[name]
    for reading in changes_of(name):
        change = (*reading.inputs, reading.result)[0]
        texts = change.name, change.says, change.hint
        assert not any("{" in text for text in texts)
        assert change.says.endswith(".") and change.hint.endswith("?"), change

    # what a student reads of a mistake in an input
    wrong = diagnose(exercise, lambda **given: halved(exercise, given))
    assert not wrong.named or all(line.endswith((".", "?")) for line in bullets(wrong))


def halved(exercise, given):
    """The right numbers, divided by two."""
    value = mistaken(exercise, {})(**given)
    return value / 2 if isinstance(value, torch.Tensor) else (value[0] // 2, value[1])


def bullets(wrong):
    found = [line for line in wrong.message.splitlines() if line.startswith("- ")]
    assert len(found) == len(wrong.names)
    return found


def test_a_mistake_in_an_input_or_the_result_has_one_name():
    """Numbers that a mistake of the exercise gives have its name and no other."""
    for name in ("kl", "dpo_loss", "smoothed_loss", "gae", "ppo_clip"):
        exercise, found = EXERCISES[name], collections.Counter()
        main, second = exercise.cases(0)
        for reading in changes_of(name):
            if reading.result is not None and reading.result.vector and main_ndim(exercise) != 1:
                continue
            values = [reading.values(exercise, inputs) for inputs in (main, second)]
            if values[0] is None or not np.isfinite(values[0]).all() or np.ptp(values[0]) < 1e-9:
                continue
            known = readings(exercise, 0, tuple(values), 1e-6)
            right = near(values[0], exercise.compute(main, {}), 1e-6)
            assert right or known and known[0].size == 1
            if known and not right:
                general = known[0].inputs or known[0].result
                assert len(known) == 1 or not general
                found["general" if general else "own"] += 1
        assert found["general"] >= 10, (name, found)


def main_ndim(exercise):
    return exercise.compute(exercise.cases(0)[0], {}).ndim


def ratio_halved(policy_logps, reference_logps, chosen, rejected, beta):
    return my_dpo_loss(policy_logps, reference_logps / 2, chosen, rejected, beta)


def accumulated(policy_logps, reference_logps, chosen, rejected, beta):
    return my_dpo_loss(policy_logps, reference_logps, chosen, rejected, 1.0).cumsum(0)


@pytest.mark.parametrize(
    "function, names",
    [
        (ratio_halved, ("reference_logps halved",)),
        (accumulated, ("beta forgotten", "accumulated")),
        (lambda **given: my_dpo_loss(**given) - 1, ("1 subtracted",)),
        (
            lambda **given: my_dpo_loss(**given | {"beta": given["beta"] + 1}),
            ("beta + 1 in place of beta",),
        ),
    ],
)
def test_a_mistake_of_any_exercise_is_named(function, names):
    wrong = diagnose(EXERCISES["dpo_loss"], function)
    assert wrong.named and wrong.names == names


@pytest.mark.parametrize("reduction", ["mean", "sum", "column", "row"])
def test_a_reduction_on_top_is_named(reduction):
    def mean_of(policy_logps, reference_logps, chosen, rejected, beta):
        losses = solutions.my_dpo_loss(policy_logps, reference_logps, chosen, rejected, 1.0)
        return {
            "mean": losses.mean(),
            "sum": losses.sum(),
            "column": losses[:, None],
            "row": losses[None],
        }[reduction]

    wrong = diagnose(EXERCISES["dpo_loss"], mean_of)
    name = f"{reduction} over pairs" if reduction in ("mean", "sum") else reduction
    assert wrong.names == ("beta forgotten", name)
    assert str(wrong).startswith(f"dpo_loss: beta forgotten; {name}\nexpected ")


# what is wrong beside the numbers


def my_dpo_loss(policy_logps, reference_logps, chosen, rejected, beta):
    return solutions.my_dpo_loss(policy_logps, reference_logps, chosen, rejected, beta)


def in_place(policy_logps, reference_logps, chosen, rejected, beta):
    reference_logps += 0.1
    return my_dpo_loss(policy_logps, reference_logps - 0.1, chosen, rejected, beta)


def detached(policy_logps, *rest):
    return my_dpo_loss(policy_logps.detach(), *rest)


def half_detached(policy_logps, reference_logps, chosen, rejected, beta):
    rewards = beta * (policy_logps - reference_logps)
    return -F.logsigmoid(rewards[chosen] - rewards.detach()[rejected])


def overwriting(*arguments):
    rewards = arguments[4] * (arguments[0] - arguments[1])
    odds = torch.exp(rewards[arguments[3]] - rewards[arguments[2]])
    losses = torch.log1p(odds)
    odds += 1
    return losses


def overflowing(policy_logps, reference_logps, chosen, rejected, beta):
    rewards = beta * (policy_logps - reference_logps)
    return -torch.log(torch.sigmoid(rewards[chosen] - rewards[rejected]))


def widened(*arguments):
    return my_dpo_loss(*arguments).double()


def drifting(*arguments, calls=itertools.count()):
    return my_dpo_loss(*arguments) + 0.1 * (next(calls) > 1)


def unwritten(*arguments):
    raise NotImplementedError


def crashing(*arguments):
    return [0][3]


def of_one_size(*arguments):
    return my_dpo_loss(*arguments)[torch.arange(4)]


@pytest.mark.parametrize(
    "function, name, credit",
    [
        (in_place, "changes its inputs", 0.5),
        (detached, "no gradient", 0.5),
        (half_detached, "gradient", 0.5),
        (overwriting, "gradient", 0.5),
        (overflowing, "overflow", 0.5),
        (widened, "dtype", 0.5),
        (drifting, "changes from call to call", 0.5),
        (unwritten, "not written yet", 0),
        (crashing, "raises IndexError", 0),
        (of_one_size, "fails on other inputs", 0),
        (lambda *_: None, "returns nothing", 0),
        (lambda *a: my_dpo_loss(*a).detach().numpy(), "not a tensor", 0),
        (lambda *a: my_dpo_loss(*a).tolist(), "not a tensor", 0),
        (lambda *a: my_dpo_loss(*a).long(), "not floating-point", 0),
        (lambda *a: torch.ones(4) * 0.3, "constant", 0),
        (lambda *a: torch.cat([my_dpo_loss(*a)] * 2), "shape", 0),
        (lambda *a: my_dpo_loss(*a) * 3 + 1, "a multiple", 0),
        (lambda *a: my_dpo_loss(*a) + a[0][a[2]].sqrt(), "not finite", 0),
        (lambda *a: my_dpo_loss(*a[:4], 0.123), "beta unused", 0),
        (
            lambda *a: my_dpo_loss(*a) + a[4] ** 2 * a[1][a[2]] - a[4] * a[1][a[2]],
            "wrong for a reference",
            0,
        ),
    ],
)
def test_what_else_is_wrong_is_named(function, name, credit):
    def keyword(policy_logps, reference_logps, chosen, rejected, beta):
        return function(policy_logps, reference_logps, chosen, rejected, beta)

    wrong = diagnose(EXERCISES["dpo_loss"], keyword)
    assert wrong.names == (name,) and wrong.credit == credit


def test_a_gradient_into_the_reference_is_named():
    def without_no_grad(policy, reference, prompts, chosen, rejected, beta):
        kept, torch.no_grad = torch.no_grad, torch.enable_grad
        try:
            return solutions.my_dpo_step(policy, reference, prompts, chosen, rejected, beta)
        finally:
            torch.no_grad = kept

    wrong = diagnose(EXERCISES["dpo_step"], without_no_grad)
    assert wrong.names == ("reference has a gradient",)


def test_the_librarys_own_function_is_no_answer():
    from dpo_lab import dpo_loss

    def returned(**inputs):
        return dpo_loss(**inputs)

    for function in (dpo_loss, returned):
        assert diagnose(EXERCISES["dpo_loss"], function).names == ("dpo_lab's own function",)


def test_the_students_own_line_is_shown():
    def my_kl(p, q):
        return p @ q[5]

    wrong = diagnose(EXERCISES["kl"], my_kl)
    assert "`return p @ q[5]`" in wrong.message


# calls


def endless(**_):
    while True:
        pass


def sleeping(**_):
    time.sleep(60)


def swallowing(**_):
    while True:
        try:
            time.sleep(60)
        except BaseException:  # noqa: B036
            break


def swallowing_again(**_):
    for _ in range(3):
        try:
            time.sleep(60)
        except Exception:
            continue


@pytest.mark.parametrize("function", [endless, sleeping, swallowing_again])
def test_a_function_without_an_end_is_stopped(function):
    assert diagnose(EXERCISES["kl"], function, seconds=0.3).names == ("does not end",)


def test_a_function_that_swallows_the_limit_still_ends():
    assert diagnose(EXERCISES["kl"], swallowing, seconds=0.3).names == ("returns nothing",)


def state():
    """Of the random generators."""
    of_torch = torch.random.get_rng_state().tolist()
    return of_torch, random.getstate(), np.random.get_state()[1].tolist()


@every_exercise
def test_a_verdict_is_the_same_under_no_grad_and_leaves_nothing_behind(name, capfd):
    exercise, solution = EXERCISES[name], getattr(solutions, f"my_{name}")
    switch, one = singles(exercise)[0]
    before = state()
    with torch.no_grad():
        assert diagnose(exercise, solution) is None
        wrong = diagnose(exercise, mistaken(exercise, {switch: one}))
        assert not torch.is_grad_enabled()
    assert wrong.names == (exercise.slips[switch][one].name,)
    assert state() == before and capfd.readouterr() == ("", "")


def test_nothing_is_printed_and_the_process_is_as_before(capfd):
    def noisy(p, q):
        print("out")
        print("err", file=sys.stderr)
        warnings.warn("warned", stacklevel=1)
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float16)
        return solutions.my_kl(p, q)

    before = state()
    with torch.no_grad():
        assert diagnose(EXERCISES["kl"], noisy) is None
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert state() == before
    assert capfd.readouterr() == ("", "")


def test_a_system_exit_is_an_error_of_the_answer():
    assert diagnose(EXERCISES["kl"], lambda **_: sys.exit(3)).names == ("raises SystemExit",)


def test_a_check_prints_a_line_or_raises(capsys, monkeypatch):
    checks.check_kl(solutions.my_kl)
    assert capsys.readouterr().out == "✓ kl is right\n"
    with pytest.raises(Wrong, match="^kl: KL in the other direction\nexpected"):
        checks.check_kl(lambda p, q: solutions.my_kl(q, p))

    # numbers that were copied from the first seed's message
    main, _ = EXERCISES["kl"].cases(0)
    copied = torch.tensor(EXERCISES["kl"].compute(main, {}))
    monkeypatch.setenv("DPO_LAB_CHECK_SEED", "7")
    with pytest.raises(Wrong):
        check(EXERCISES["kl"], lambda p, q: copied)


# mutants of the solutions


def is_right(exercise, function) -> bool | None:
    """Whether the numbers are right on inputs that no check uses; None where it fails there."""
    for seed, size in ((101, 5), (102, 6), (103, 5)):
        inputs = exercise.inputs(np.random.default_rng(seed), size)
        called = call(function, inputs, 2.0)
        if called.error is not None or called.slow:
            return None
        try:
            found = exercise.read(called.value)
        except (TypeError, ValueError, IndexError):
            return None
        if not near(found, exercise.compute(inputs, {}), 1e-6):
            return False
    return True


BESIDE_NUMBERS = {"no gradient", "gradient", "overflow", "0 log 0", "dtype", "changes its inputs"}
BESIDE_NUMBERS |= {"reference has a gradient", "changes from call to call"}


def functions_of_mutants(name, of_two):
    """Mutants of a solution as functions, each with its code: single changes, then double ones."""
    tree = ast.parse(SOLUTIONS.read_text(encoding="utf-8"))
    (function,) = [n for n in tree.body if getattr(n, "name", "") == f"my_{name}"]
    seen = {ast.unparse(function)}
    for mutant in itertools.chain(mutants(function), mutants_of_mutants(function, of_two)):
        code = ast.unparse(mutant)
        if code in seen:
            continue
        seen.add(code)

        # some are no Python any more
        space = dict(vars(solutions))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            try:
                exec(compile(code, "<mutant>", "exec"), space)
            except SyntaxError:
                continue
        yield space[f"my_{name}"], code


def kind_of(exercise, function, code):
    """What the check says of a mutant, in a word; it must be caught if and only if it is wrong."""
    right = is_right(exercise, function)
    verdict = diagnose(exercise, function, seconds=2.0)
    if right:
        assert verdict is None or verdict.names[0] in BESIDE_NUMBERS, f"{verdict}\n{code}"
        return "right"
    assert verdict is not None, f"accepted, and wrong:\n{code}"
    if right is None:
        return "does not run"
    if verdict.named:
        return "named"
    if verdict.names[0].endswith("unused"):
        return "an input unused"
    return "first failing input" if verdict.names[0].startswith("wrong for") else "form"


WRONG = ("named", "an input unused", "first failing input", "form")


def test_no_wrong_mutant_is_accepted_and_no_right_one_rejected():
    """A sample; all of them in the long tests."""
    counts = collections.Counter()
    for name, exercise in EXERCISES.items():
        some = list(functions_of_mutants(name, of_two=15))
        for function, code in random.Random(0).sample(some, 14):
            counts[kind_of(exercise, function, code)] += 1
    assert counts["named"] >= 0.4 * sum(counts[kind] for kind in WRONG), counts


@pytest.mark.long
def test_of_two_thousand_mutants_none_is_misjudged_and_nearly_half_of_the_wrong_are_named():
    total = collections.Counter()
    for name, exercise in EXERCISES.items():
        found = functions_of_mutants(name, of_two=100)
        counts = collections.Counter(kind_of(exercise, *one) for one in found)
        total += counts
        print(f"{name}: {sum(counts.values())} mutants, {dict(counts)}", flush=True)
    wrong = sum(total[kind] for kind in WRONG)
    print(f"all: {total.total()} mutants, {dict(total)}; {total['named'] / wrong:.1%} named")
    assert total.total() >= 2000
    assert total["named"] >= 0.45 * wrong


# answers that were written without a look at the table of mistakes


@pytest.mark.parametrize("answer", WRONG_ANSWERS, ids=lambda answer: answer.exercise)
def test_a_wrong_answer_gets_the_name_that_a_teacher_would_give(answer):
    wrong = diagnose(EXERCISES[answer.exercise], answer.function)
    assert wrong is not None and wrong.names == answer.names


def test_there_are_wrong_answers_to_every_exercise():
    counts = collections.Counter(answer.exercise for answer in WRONG_ANSWERS)
    assert len(WRONG_ANSWERS) >= 40 and set(counts) == set(EXERCISES) and min(counts.values()) >= 2
