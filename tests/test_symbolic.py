"""Every step of every derivation is proved, no wrong one is; what is proved is what is computed."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
import torch
from wrong_equations import Point, is_shown_false, mutants_of

from dpo_lab.losses import bradley_terry_nll, dpo_loss
from dpo_lab.theory import symbolic as s
from dpo_lab.theory.objective import (
    implicit_reward,
    kl,
    log_partition,
    objective_value,
    optimal_policy,
    value_gap,
)
from dpo_lab.theory.proof import _lines, _symbols

ANY, FEW = None, 2
PAPER = {f"Eq. {k}" for k in range(1, 23)} | {
    "Lemma 1",
    "Lemma 2",
    "Theorem 1",
    "Proposition 1",
}
STEPS = [(n, d.title, step) for n in (ANY, FEW) for d in s.derivations(n) for step in d.steps]
each_step = pytest.mark.parametrize(
    "step", [step for *_, step in STEPS], ids=[f"{n or 'any'}: {t}: {x.name}" for n, t, x in STEPS]
)
p1, p2, p3 = s.policy(3)
q1, q2, q3 = s.reference(3)
r1, r2 = s.reward(2)


@pytest.mark.parametrize("n", [None, 2, 3])
def test_every_derivation_holds(n):
    derivations = s.derivations(n)
    assert [d.title for d in derivations if not d.holds()] == []


@pytest.mark.parametrize("n", [None, 2])
def test_every_equation_of_the_paper_is_a_step_and_every_other_step_has_a_name(n):
    for derivation in s.derivations(n):
        names = [step.name for step in derivation.steps]
        assert all(names) and len(set(names)) == len(names)
    steps = {step.name for d in s.derivations(n) for step in d.steps}

    # definitions, and lines that the paper prints twice: Eqs. 11, 1 and 22's left side
    assert PAPER - steps == {"Eq. 3", "Eq. 16", "Eq. 21"}
    assert all(step in PAPER for step in steps if step.startswith("Eq. ") and step[4:].isdigit())


@each_step
def test_a_step_is_true_at_random_points_and_says_something(step):
    left, right = step.equation.args
    assert left != right and step.equation not in (sp.true, sp.false)
    assert [Point(seed, step.given).is_true(step) for seed in range(3)] == [True] * 3


@pytest.mark.parametrize("n", [None, 2, 3])
def test_what_an_early_version_prints_does_not_hold(n):
    for slip in (s.printed_slip(n), s.printed_slip_in_eq_21()):
        assert is_shown_false(slip, 0) and not slip.holds()


def test_no_mutant_of_any_step_is_proved():
    """Every one is shown false by arithmetic first; the table counts them."""
    rng, table, proved = np.random.default_rng(0), Counter(), []
    different = {(title, step.equation): step for _, title, step in STEPS}
    for (title, _), step in different.items():
        for group, wrong in mutants_of(step, 3, rng):
            if is_shown_false(wrong, 7):
                table[title, group] += 1
                proved += [(group, step.name, wrong.equation)] * wrong.holds()
    groups, titles = Counter(), Counter()
    for (title, group), count in table.items():
        groups[group] += count
        titles[title] += count
    for name, count in [*titles.items(), *groups.items()]:
        print(f"{name:<80} {count:>4} mutants, 0 proved")
    assert proved == []
    assert table.total() >= 150 and min(titles.values()) >= 5 and len(groups) >= 15


def lagrange_mutants():
    """The slope, the stationary point and the second derivative, with the reference wrong."""
    steps = s.optimum_by_lagrange()
    (q,), (r,) = s.reference(None), s.reward(None)
    x, mu = sp.Symbol("x", positive=True), sp.Symbol("mu", real=True)
    slope = steps["Slope"].equation.lhs
    for other in (1, 1 / q, q**2):
        yield slope, r - s.beta * sp.log(x / other) - s.beta - mu
    right = steps["Slope"].equation.rhs
    yield slope, right + sp.log(q)
    yield slope, right + 1 - q
    for wrong in (sp.exp(r / s.beta), q**2 * sp.exp(r / s.beta), sp.exp(r / s.beta) / q):
        yield steps["Eq. 4"].equation.lhs, wrong / s.Z
    yield sp.Derivative(right, x), -s.beta * q / x


TYPED = {
    "one outcome is certain": (p1, sp.Integer(1)),
    "two outcomes of three are": (p1 + p2, sp.Integer(1)),
    "the reference is the policy": (q1, p1),
    "the implicit reward of an outcome is 0": (s.implicit(p1, q1), sp.Integer(0)),
    "a term of the KL is 0": (p1 * sp.log(p1 / q1), sp.Integer(0)),
    "log of a square": (sp.log(r1**2), 2 * sp.log(r1)),
    "log of a product": (sp.log(r1 * r2), sp.log(r1) + sp.log(r2)),
    "root of a square": (sp.sqrt(r1**2), r1),
    "root of a square, by logarithms": (sp.exp(sp.log(r1**2) / 2), r1),
    "KL backward": (s.kl((p1, p2, p3), (q1, q2, q3)), s.kl((q1, q2, q3), (p1, p2, p3))),
    "the reference's mean": (s.mean((p1, p2), (r1, r2)), s.mean((q1, q2), (r1, r2))),
    "log of a sum": (sp.log(p1 + p2), sp.log(p1) + sp.log(p2)),
} | {f"Lagrange {k}": pair for k, pair in enumerate(lagrange_mutants())}


@pytest.mark.parametrize("name", TYPED)
@pytest.mark.parametrize("given", [{}, s.sums_to_one((p1, p2, p3))], ids=["free", "sums to 1"])
def test_a_false_equation_that_a_student_might_type_is_not_proved(name, given):
    step = s.Step(s.equation(*TYPED[name]), name, "", given=given)
    assert is_shown_false(step, 0, points=10) and not step.holds()


def test_a_distribution_is_used_only_whole_and_only_where_it_is_given():
    whole = s.equation(p1 + p2 + p3, sp.Integer(1))
    assert not s.Step(whole, "", "").holds()
    assert s.Step(whole, "", "", given=s.sums_to_one((p1, p2, p3))).holds()
    part = s.equation(p1 + p2, sp.Integer(1))
    assert not s.Step(part, "", "", given=s.sums_to_one((p1, p2, p3))).holds()


def test_sums_are_linear_and_no_more():
    (p,), (r,) = s.policy(None), s.reward(None)
    c, total = sp.Symbol("c", real=True), s.total
    right = [
        (total(p * (r + c)), total(p * r) + c * total(p)),
        (total(c * p), c * total(p)),
        (total(p * s.total(p * r)), total(p) * total(p * r)),
    ]
    wrong = [
        (total(p * r), total(p) * total(r)),
        (total(p**2), total(p) ** 2),
        (total(p), p),
        (total(p * c), total(p) + c),
        (sp.log(total(p)), total(sp.log(p))),
    ]
    assert all(s.Step(s.equation(*pair), "", "").holds() for pair in right)
    assert not any(s.Step(s.equation(*pair), "", "").holds() for pair in wrong)


def test_a_sum_inside_a_sum_may_depend_on_its_index():
    """sum_k sum_{j >= k} p_j is not n times the inner sum: the inner one stays where it is."""
    j, k, n = (sp.Symbol(name, integer=True, positive=True) for name in "jkn")
    p = sp.Function("p", positive=True)
    inner = sp.Sum(p(j), (j, k, n))
    outer = sp.Sum(inner, (k, 1, n))
    assert not s.is_zero(outer - inner * sp.Sum(1, (k, 1, n)))
    assert s.is_zero(outer - outer)


def test_only_a_strict_inequality_that_is_always_true_is_proved():
    d = sp.Symbol("d", positive=True)
    for right in (sp.Gt(d / (1 + d), 0, evaluate=False), sp.Lt(-d, 0, evaluate=False)):
        assert s.Step(right, "", "").holds()
    for wrong in (sp.Gt(d - 1, 0), sp.Lt(d, 0, evaluate=False), sp.Gt(r1, 0)):
        assert not s.Step(wrong, "", "").holds()


def test_a_step_is_found_by_its_name():
    assert s.loss_and_gradient()["Eq. 7"].name == "Eq. 7"
    with pytest.raises(KeyError, match="'Eq. 99' is no step of .*; they are"):
        s.loss_and_gradient()["Eq. 99"]


@each_step
def test_a_step_renders_as_it_is_written(step):
    text = step._repr_markdown_()
    assert text.startswith(f"**{step.name}.** ") and "$$" in text and step.says in text
    assert step.equation is not sp.true and "rho" not in text


@each_step
def test_long_equations_are_aligned_over_lines_and_signs_are_kept(step):
    latex = s.in_latex(step.equation)
    sides = [_symbols(side) for side in step.equation.args]
    assert latex.startswith(r"\begin{aligned}") == (sum(sides) > s.LINE)
    assert latex.count(r"\begin{aligned}") == latex.count(r"\end{aligned}") <= 1
    for line in latex.split(r"\\"):
        assert line.count(r"\left(") == line.count(r"\right)")
    for side in step.equation.args:
        first, *rest = _lines(side)
        assert all(line[:2] in ("+ ", "- ") for line in rest) and first


def test_positive_terms_come_first_and_the_reference_is_pi_ref():
    x, y = sp.symbols("x y")
    assert s.in_latex(s.equation(-x + y, s.reference(1)[0])) == r"y - x = \pi_{\mathrm{ref},1}"
    assert s.in_latex(s.equation(s.total(*s.reference(None)), x)) == (
        r"\sum_{y} \pi_{\mathrm{ref}}(y) = x"
    )


def numbered(rows):
    """The equations that rows such as "Eqs. 8 and 9" or "Eqs. 11 to 15" are about."""
    found = set()
    for row in rows:
        first, *rest = map(int, re.findall(r"\d+", row))
        kind = row.split()[0].rstrip("s.")
        if kind == "Theorem":
            found |= {"Theorem 1", "Proposition 1"}
            continue
        span = range(first, rest[0] + 1) if rest else [first]
        found |= {f"Eq. {k}" if kind == "Eq" else f"{kind} {k}" for k in span}
    return found


def test_the_index_names_proofs_functions_and_tests_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    path = Path(__file__).parent.parent / "benchmarks" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme_of_equations", path)
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    assert list(readme.EQUATION_TESTS) == [row["equation"] for row in s.equation_index()]
    assert numbered(row["equation"] for row in s.equation_index()) == PAPER
    for row in s.equation_index():
        assert (
            all(hasattr(s, name) for name in row["proved by"].split(", "))
            and readme.EQUATION_TESTS[row["equation"]] in globals()
        )
        if row["computed by"]:
            module, name = row["computed by"].split(" ")[0].split(".")
            assert hasattr(importlib.import_module(f"dpo_lab.{module}"), name)


def numbers(n, seed):
    rng = np.random.default_rng(seed)
    pi, ref = (rng.dirichlet(np.ones(n)) for _ in range(2))
    return pi, ref, rng.normal(size=n) * 2, float(rng.uniform(0.05, 3))


def evaluated(expression, pi, ref, r, beta):
    symbols = [*s.policy(len(pi)), *s.reference(len(pi)), *s.reward(len(pi)), s.beta]
    return np.array(
        sp.lambdify(symbols, expression, "numpy")(*pi, *ref, *r, beta), dtype=np.float64
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n", [2, 5])
def test_the_proved_objective_is_the_one_computed(n, seed):
    pi, ref, r, beta = numbers(n, seed)
    policy, reference, reward = s.policy(n), s.reference(n), s.reward(n)
    z = s.partition(reference, reward)
    t_pi, t_ref, t_r = map(torch.from_numpy, (pi, ref, r))
    pairs = [
        (s.objective(policy, reference, reward), objective_value(t_pi, t_ref, t_r, beta)),
        (s.kl(policy, reference), kl(t_pi, t_ref)),
        (sp.log(z), log_partition(t_ref, t_r, beta)),
        (list(s.optimal(reference, reward, z)), optimal_policy(t_ref, t_r, beta)),
        ([s.implicit(a, b) for a, b in zip(policy, reference)], implicit_reward(t_pi, t_ref, beta)),
        (
            s.beta * sp.log(z) - s.objective(policy, reference, reward),
            value_gap(t_pi, t_ref, t_r, beta),
        ),
    ]
    for expression, computed in pairs:
        np.testing.assert_allclose(
            computed.numpy(), evaluated(expression, pi, ref, r, beta), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("seed", range(20))
def test_the_proved_loss_and_gradient_are_those_that_train(seed):
    rng = np.random.default_rng(seed)
    policy_logps = torch.tensor(rng.normal(-50, 5, 2), requires_grad=True)
    reference_logps, beta = torch.tensor(rng.normal(-50, 5, 2)), float(rng.uniform(0.01, 1))
    result = dpo_loss(policy_logps, reference_logps, torch.tensor([0]), torch.tensor([1]), beta)
    result.losses.sum().backward()
    m = sp.Symbol("m", real=True)
    derivation = s.loss_and_gradient()
    loss = sp.lambdify(m, derivation["As computed"].equation.rhs, "mpmath")
    margin = result.margins.item()
    assert result.losses.item() == pytest.approx(float(loss(margin)), rel=1e-12, abs=1e-12)
    weight = float(sp.lambdify(m, s.sigmoid(-m).rewrite(sp.exp), "mpmath")(margin))
    assert result.gradient_weights.item() == pytest.approx(weight, rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(
        policy_logps.grad, [-beta * weight, beta * weight], rtol=1e-12, atol=1e-12
    )
    # the gradient as it stands, with ell_w(theta) and ell_l(theta) two independent directions
    theta = sp.Symbol("theta", real=True)
    gradient = derivation["The gradient"].equation.rhs
    values = dict(zip(sp.symbols("ell_w^ref ell_l^ref", real=True), reference_logps.tolist())) | {
        s.beta: beta
    }
    for k, name in enumerate(("ell_w", "ell_l")):
        lines = {
            f"ell_{side}": policy_logps[j].item() + (theta if j == k else 0)
            for j, side in enumerate("wl")
        }
        along = (
            gradient.rewrite(sp.exp)
            .subs({sp.Function(f, real=True)(theta): line for f, line in lines.items()})
            .doit()
            .subs(values)
            .subs(theta, 0)
        )
        assert float(along) == pytest.approx(policy_logps.grad[k].item(), rel=1e-10, abs=1e-12), (
            name
        )


@pytest.mark.parametrize("seed", range(20))
def test_the_proved_preference_probability_is_the_one_computed(seed):
    r = np.random.default_rng(seed).normal(size=2)
    probability = sp.lambdify(s.reward(2), s.bradley_terry()["Eq. 1"].equation.lhs, "numpy")(*r)
    computed = (
        bradley_terry_nll(torch.tensor(r), torch.tensor([0]), torch.tensor([1])).neg().exp().item()
    )
    assert computed == pytest.approx(probability, rel=1e-12)
