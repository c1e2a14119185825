"""Every step of every derivation is proved, no wrong one is; what is proved is what is computed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
import torch

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

STEPS = [(d.title, step) for d in s.derivations(3) for step in d.steps]
each_step = pytest.mark.parametrize(
    "step", [step for _, step in STEPS], ids=[f"{t}: {x.number}" for t, x in STEPS]
)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_derivation_holds(n):
    derivations = s.derivations(n)
    assert [d.title for d in derivations if not d.holds()] == []
    numbers = {step.number for d in derivations for step in d.steps}
    assert numbers >= {f"Eq. {k}" for k in (1, 4, 5, 6, 7, 11, 12, 13, 14, 15, 20, 21)} | {
        "Lemma 1",
        "Lemma 2",
        "Theorem 1",
    }


@pytest.mark.parametrize("n", [2, 3])
def test_the_printed_constant_of_eq_14_does_not_hold(n):
    assert not s.printed_slip(n).holds()


@each_step
def test_a_wrong_equation_is_not_proved(step):
    left, right = step.equation.args
    one = next(iter(sorted(right.free_symbols | left.free_symbols, key=str)))
    wrong = [right + 1, right + one, 2 * right] + (
        [right.subs(s.beta, 2 * s.beta)] if right.has(s.beta) else []
    )
    assert step.holds()
    for other in wrong:
        assert not s.Step(s.equation(left, other), step.number, step.says, step.where).holds(), (
            other
        )


@each_step
def test_a_step_renders_as_it_is_written(step):
    text = step._repr_markdown_()
    assert "$$" in text and "=" in text and step.says in text and step.equation is not sp.true


@each_step
def test_long_equations_are_aligned_over_lines_and_signs_are_kept(step):
    latex = s.in_latex(step.equation)
    sides = [s._symbols(side) for side in step.equation.args]
    assert latex.startswith(r"\begin{aligned}") == (sum(sides) > s.LINE)
    assert latex.count(r"\begin{aligned}") == latex.count(r"\end{aligned}") <= 1
    for line in latex.split(r"\\"):
        assert line.count(r"\left(") == line.count(r"\right)")
    for side in step.equation.args:
        first, *rest = s._lines(side)
        assert all(line[:2] in ("+ ", "- ") for line in rest) and first


def test_positive_terms_come_first_and_the_reference_is_pi_ref():
    x, y = sp.symbols("x y")
    assert s.in_latex(s.equation(-x + y, s.reference(1)[0])) == r"y - x = \pi_{\mathrm{ref},1}"


def test_the_index_names_proofs_functions_and_tests_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    path = Path(__file__).parent.parent / "benchmarks" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme_of_equations", path)
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    assert list(readme.EQUATION_TESTS) == [row["equation"] for row in s.equation_index()]
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
    pi, rho = (rng.dirichlet(np.ones(n)) for _ in range(2))
    return pi, rho, rng.normal(size=n) * 2, float(rng.uniform(0.05, 3))


def evaluated(expression, pi, rho, r, beta):
    symbols = [*s.policy(len(pi)), *s.reference(len(pi)), *s.reward(len(pi)), s.beta]
    return np.array(
        sp.lambdify(symbols, expression, "numpy")(*pi, *rho, *r, beta), dtype=np.float64
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n", [2, 5])
def test_the_proved_objective_is_the_one_computed(n, seed):
    pi, rho, r, beta = numbers(n, seed)
    policy, reference, reward = s.policy(n), s.reference(n), s.reward(n)
    z = s.partition(reference, reward)
    t_pi, t_rho, t_r = map(torch.from_numpy, (pi, rho, r))
    pairs = [
        (s.objective(policy, reference, reward), objective_value(t_pi, t_rho, t_r, beta)),
        (s.kl(policy, reference), kl(t_pi, t_rho)),
        (sp.log(z), log_partition(t_rho, t_r, beta)),
        (list(s.optimal(reference, reward, z)), optimal_policy(t_rho, t_r, beta)),
        ([s.implicit(a, b) for a, b in zip(policy, reference)], implicit_reward(t_pi, t_rho, beta)),
        (
            s.beta * sp.log(z) - s.objective(policy, reference, reward),
            value_gap(t_pi, t_rho, t_r, beta),
        ),
    ]
    for expression, computed in pairs:
        np.testing.assert_allclose(
            computed.numpy(), evaluated(expression, pi, rho, r, beta), rtol=1e-12, atol=1e-12
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
    loss = sp.lambdify(m, derivation["Eq. 7"].equation.rhs, "mpmath")
    margin = result.margins.item()
    assert result.losses.item() == pytest.approx(float(loss(margin)), rel=1e-12, abs=1e-12)
    weight = float(sp.lambdify(m, s.sigmoid(-m), "mpmath")(margin))
    assert result.gradient_weights.item() == pytest.approx(weight, rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(
        policy_logps.grad, [-beta * weight, beta * weight], rtol=1e-12, atol=1e-12
    )
    # Eq. 21 as it stands, with ell_w(theta) and ell_l(theta) two independent directions
    theta = sp.Symbol("theta", real=True)
    gradient = derivation["Eq. 21"].equation.rhs
    values = dict(zip(sp.symbols("ell_w^ref ell_l^ref", real=True), reference_logps.tolist())) | {
        s.beta: beta
    }
    for k, name in enumerate(("ell_w", "ell_l")):
        lines = {
            f"ell_{side}": policy_logps[j].item() + (theta if j == k else 0)
            for j, side in enumerate("wl")
        }
        along = (
            gradient.subs({sp.Function(f)(theta): line for f, line in lines.items()})
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
