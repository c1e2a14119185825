"""Checks of homework: a right answer is accepted however it is written, a wrong one is named."""

import ast
import importlib.util
import itertools
import random
import subprocess
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
from dpo_lab.checks.exercise import near
from dpo_lab.checks.readings import readings
from tests.mutants import mutants, mutants_of_mutants

SOLUTIONS = Path(__file__).parent.parent / "notebooks" / "exercises" / "solutions.py"
FEW, MANY = range(3), range(20)

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
    assert all(slip.name and slip.says.endswith(".") and slip.hint[-1] in ".?" for slip in slips)
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


def kl_by_loop(p, q):
    rows = [sum(a * torch.log(a / b) for a, b in zip(x, y) if a > 0) for x, y in zip(p, q)]
    return torch.stack(rows)


def softmax_by_hand(reference, reward, beta):
    exponents = (reward - reward.max()) / beta
    weights = reference * exponents.exp()
    return weights / weights.sum()


def kl_by_entropies(p, q):
    cross = -torch.xlogy(p, q).sum(-1)
    return cross - torch.special.entr(p).sum(-1)


def dpo_by_softplus(policy_logps, reference_logps, chosen, rejected, beta):
    ratio = policy_logps - reference_logps
    return F.softplus(beta * (ratio[rejected] - ratio[chosen]))


def dpo_by_bce(policy_logps, reference_logps, chosen, rejected, beta):
    margins = beta * (policy_logps - reference_logps)[torch.stack([chosen, rejected])]
    logits = margins[0] - margins[1]
    ones = torch.ones_like(logits)
    return F.binary_cross_entropy_with_logits(logits, ones, reduction="none")


def dpo_by_loop(policy_logps, reference_logps, chosen, rejected, beta):
    losses = []
    for w, l in zip(chosen.tolist(), rejected.tolist()):  # noqa: E741
        margin = beta * (
            policy_logps[w] - reference_logps[w] - policy_logps[l] + reference_logps[l]
        )
        losses.append(torch.logaddexp(torch.zeros_like(margin), -margin))
    return torch.stack(losses)


def sequence_by_cross_entropy(logits, input_ids, completion_mask):
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
    return -(losses * completion_mask[:, 1:]).sum(1)


def sequence_by_loop(logits, input_ids, completion_mask):
    rows = []
    for row, ids, mask in zip(logits, input_ids, completion_mask):
        total = 0.0
        for t in range(1, len(ids)):
            if mask[t]:
                total = total + row[t - 1][ids[t]] - torch.logsumexp(row[t - 1], 0)
        rows.append(total)
    return torch.stack(rows)


def gae_by_sums(rewards, values, mask, gamma, lam):
    n, length = rewards.shape
    after = torch.cat([values * mask, torch.zeros(n, 1, dtype=values.dtype)], 1)[:, 1:]
    deltas = (rewards + gamma * after - values) * mask
    powers = (gamma * lam) ** torch.arange(length, dtype=values.dtype)
    columns = [(deltas[:, t:] * powers[: length - t]).sum(1) * mask[:, t] for t in range(length)]
    return torch.stack(columns, 1)


def clip_by_where(logps, old_logps, advantages, clip):
    ratios = (logps - old_logps).exp()
    bound = torch.where(advantages > 0, 1 + clip, 1 - clip)
    chosen = torch.where(advantages > 0, torch.minimum(ratios, bound), torch.maximum(ratios, bound))
    return -advantages * chosen


def pairs_by_loop(scores):
    b, k = scores.shape
    found = [
        (p * k + i, p * k + j)
        for p in range(b)
        for i in range(k)
        for j in range(k)
        if scores[p, i] > scores[p, j]
    ]
    return torch.tensor([i for i, _ in found]), torch.tensor([j for _, j in found])


def plackett_luce_by_loop(ranked_rewards):
    k = ranked_rewards.shape[1]
    places = [torch.log_softmax(ranked_rewards[:, i:], 1)[:, 0] for i in range(k)]
    return -torch.stack(places, 1).sum(1)


def bt_by_softmax(rewards, chosen, rejected):
    return -torch.stack([rewards[chosen], rewards[rejected]], 1).log_softmax(1)[:, 0]


def bt_gradient_by_autograd(rewards, chosen, rejected):
    r = rewards.clone().requires_grad_()
    loss = -F.logsigmoid(r[chosen] - r[rejected]).sum()
    return torch.autograd.grad(loss, r)[0]


OTHERWISE = [
    ("kl", kl_by_loop),
    ("kl", kl_by_entropies),
    ("kl", lambda p, q: F.kl_div(q.log(), p, reduction="none").sum(-1)),
    ("optimal_policy", softmax_by_hand),
    (
        "log_partition",
        lambda reference, reward, beta: (
            (reward / beta + reference.log()).exp().sum(-1).log()
            if reward.max() / beta < 80
            else torch.logsumexp(reward / beta + reference.log(), -1)
        ),
    ),  # noqa: E501
    ("implicit_reward", lambda policy, reference, beta: beta * torch.log(policy / reference)),
    ("bt_nll", bt_by_softmax),
    ("bt_gradient", bt_gradient_by_autograd),
    ("plackett_luce_nll", plackett_luce_by_loop),
    ("pairs", pairs_by_loop),
    ("dpo_loss", dpo_by_softplus),
    ("dpo_loss", dpo_by_bce),
    ("dpo_loss", dpo_by_loop),
    ("gae", gae_by_sums),
    ("ppo_clip", clip_by_where),
    ("sequence_logps", sequence_by_cross_entropy),
    ("sequence_logps", sequence_by_loop),
    (
        "sequence_kl",
        lambda policy_logps, reference_logps: policy_logps.mean() - reference_logps.mean(),
    ),  # noqa: E501
]


@over_seeds
@pytest.mark.parametrize("name, function", OTHERWISE)
def test_a_right_answer_is_accepted_however_it_is_written(name, function, seeds):
    for seed in seeds:
        wrong = diagnose(EXERCISES[name], function, seed=seed)
        assert wrong is None, str(wrong)


# what is named


@over_seeds
@every_exercise
def test_every_single_mistake_is_named_on_every_seed(name, seeds):
    exercise = EXERCISES[name]
    for switch, one in singles(exercise):
        function = mistaken(exercise, {switch: one})
        for seed in seeds:
            wrong = diagnose(exercise, function, seed=seed)
            assert wrong is not None and wrong.names == (exercise.slips[switch][one].name,)


@every_exercise
def test_two_mistakes_at_once_are_named_or_read_with_equal_numbers(name):
    exercise = EXERCISES[name]
    two = [settings for settings in exercise.combinations(2) if len(settings) == 2]
    random.Random(0).shuffle(two)
    main, second = exercise.cases(0)
    read = tried = 0
    for settings in two[:60]:
        values = exercise.compute(main, settings), exercise.compute(second, settings)
        if values[0] is None:
            continue
        tried += 1
        right = exercise.compute(main, {}), exercise.compute(second, {})
        cancel = all(near(a, b, 1e-6) for a, b in zip(values, right))
        wrong = diagnose(exercise, mistaken(exercise, settings))
        names = {exercise.slips[switch][one].name for switch, one in settings.items()}
        if wrong is None:
            read += cancel
        else:
            read += set(wrong.names) == names or bool(readings(exercise, 0, values, 1e-6))
    assert read >= 0.97 * tried - 1, (read, tried)


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
            "from another beta on",
            0,
        ),  # noqa: E501
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

    def state():
        torch_state = torch.random.get_rng_state().tolist()
        return torch_state, random.getstate(), np.random.get_state()[1].tolist()

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


def test_checks_import_torch_and_numpy_alone():
    code = (
        "import sys; from dpo_lab.checks import check_dpo_loss; "
        "print([m for m in ('transformers', 'datasets', 'sklearn', 'scipy', 'matplotlib') "
        "if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


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


def verdicts(name, of_two):
    """The verdicts on mutants of a solution: how many are wrong, and how many of them are named."""
    exercise = EXERCISES[name]
    tree = ast.parse(SOLUTIONS.read_text(encoding="utf-8"))
    (function,) = [n for n in tree.body if getattr(n, "name", "") == f"my_{name}"]
    tried = wrong = named = 0
    seen = {ast.unparse(function)}
    for mutant in itertools.chain(mutants(function), mutants_of_mutants(function, of_two)):
        code = ast.unparse(mutant)
        if code in seen:
            continue
        seen.add(code)
        space = dict(vars(solutions))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            try:
                exec(compile(code, "<mutant>", "exec"), space)
            except SyntaxError:
                continue
        tried += 1
        right = is_right(exercise, space[f"my_{name}"])
        verdict = diagnose(exercise, space[f"my_{name}"], seconds=2.0)
        if right:
            assert verdict is None or verdict.names[0] in BESIDE_NUMBERS, f"{verdict}\n{code}"
        else:
            assert verdict is not None, f"accepted, and wrong:\n{code}"
        if right is False:
            wrong += 1
            named += verdict.named
    return tried, wrong, named


@every_exercise
def test_no_wrong_mutant_is_accepted_and_no_right_one_rejected(name):
    tried, wrong, named = verdicts(name, of_two=10)
    assert tried >= 20 and wrong and named
