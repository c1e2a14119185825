"""Wrong equations made from right ones, and the arithmetic that shows them wrong.

A mutant is an equation with one thing changed somewhere in its tree: a sign, a term, a factor,
beta, an index, the reference. `Point` evaluates both sides in plain complex arithmetic at random
distributions, rewards and beta, without sympy's rewritings.
"""

import cmath
import re
from collections import defaultdict
from itertools import zip_longest

import numpy as np
import sympy as sp
from sympy.core.function import AppliedUndef

from dpo_lab.theory import symbolic as s
from dpo_lab.theory.proof import sigma

REFERENCE, POLICY, BEST = "pi_ref", "pi", "pi^*"
DISTRIBUTIONS = {REFERENCE, POLICY, BEST, "p", "q"}
OUTCOMES = 3


def family(expression):
    """The name of the family that a symbol pi_2 or a value pi(y) belongs to, and which it is."""
    if isinstance(expression, AppliedUndef):
        return expression.func.__name__, expression.args[0]
    if isinstance(expression, sp.Symbol):
        match = re.fullmatch(r"(.+)_(\d+)", expression.name)
        return (match[1], sp.Integer(match[2])) if match else (expression.name, None)
    return None, None


def member(like, name, index):
    """Another family's symbol or value, written like this one."""
    known = {"real": True} if name == "r" else {"positive": True}
    if isinstance(like, AppliedUndef):
        return sp.Function(name, **known)(index)
    return sp.Symbol(f"{name}_{index}", **known)


# Mutants


def changes(node):
    """(group, what to put in the place of `node`) for every change that is made to it."""
    name, index = family(node)
    if isinstance(node, sp.Add):
        for term in node.args:
            yield "sign flipped", node - 2 * term
            yield "term dropped", node - term
    if isinstance(node, sp.Mul):
        for factor in node.args:
            if factor.is_Number:
                yield "sign flipped", -node
            else:
                yield "factor dropped", node / factor
    if isinstance(node, sp.log):
        yield "logarithm dropped", node.args[0]
    if isinstance(node, sp.exp):
        yield "exponent negated", sp.exp(-node.args[0])
        yield "exponential dropped", node.args[0]
    if isinstance(node, sigma):
        yield "sigmoid of minus its argument", sigma(-node.args[0])
    if isinstance(node, sp.Pow) and node.exp == -1:
        yield "turned upside down", node.base
    if node == s.beta:
        for other in (2 * node, 1 / node, node**2, sp.Integer(1)):
            yield "beta moved", other
    if node == s.Z:
        for other in (sp.exp(node), 1 / node, node**2):
            yield "Z changed", other
    if name == REFERENCE:
        for other in (sp.Integer(1), node**2, 1 / node):
            yield "reference dropped, squared or inverted", other
        yield "reference and policy swapped", member(node, POLICY, index)
    if name in (POLICY, BEST):
        yield "reference and policy swapped", member(node, REFERENCE, index)
        yield "policy and optimum swapped", member(node, BEST if name == POLICY else POLICY, index)
    if name == "r" and index is not None:
        yield "reward changed", -node
        yield "reward changed", 2 * node
    if name in DISTRIBUTIONS | {"r"} and index is not None:
        yield "index changed", member(node, name, sp.Integer(2) if index == 1 else sp.Integer(1))


def trees(node):
    """(group, the tree with one change somewhere in it)."""
    yield from changes(node)
    free = 1 if isinstance(node, sp.Sum | sp.Derivative | sp.Subs) else len(node.args)
    for k, child in enumerate(node.args[:free]):
        for group, other in trees(child):
            try:
                yield group, node.func(*node.args[:k], other, *node.args[k + 1 :])
            except (ValueError, TypeError):
                continue


def mutants_of(step, most, rng):
    """At most `most` (group, wrong step) of a step, of as many groups as there are."""
    groups = defaultdict(dict)
    for side in (0, 1):
        for group, other in trees(step.equation.args[side]):
            args = list(step.equation.args)
            args[side] = other
            wrong = step.equation.func(*args, evaluate=False)
            if wrong != step.equation and not wrong.has(sp.zoo, sp.nan, sp.oo):
                groups[group][wrong] = None
    # one of each group in turn
    shuffled = [
        [(group, list(wrong)[i]) for i in rng.permutation(len(wrong))]
        for group, wrong in groups.items()
    ]
    rng.shuffle(shuffled)
    turns = [one for turn in zip_longest(*shuffled) for one in turn if one]
    if not isinstance(step.equation, sp.Eq):
        opposite = {sp.StrictGreaterThan: sp.Lt, sp.StrictLessThan: sp.Gt}[step.equation.func]
        wrong = opposite(*step.equation.args, evaluate=False)
        turns.insert(0, ("inequality reversed", wrong))
    for group, wrong in turns[:most]:
        yield group, s.Step(wrong, step.name, step.says, step.where, step.given)


# Numbers


class Point:
    """Numbers for everything that an equation may hold: distributions, rewards, beta, theta."""

    def __init__(self, seed, given):
        self.rng = np.random.default_rng(seed)
        self.sizes = defaultdict(lambda: OUTCOMES)
        for key in given:
            name, index = family(key)
            if name in DISTRIBUTIONS and index is not None and key.is_Symbol:
                self.sizes[name] = int(index)
        self.given, self.drawn = given, {}

    def family(self, name):
        """Values 1 to n of a family, the same at every call."""
        if name not in self.drawn:
            size = self.sizes[name]
            self.drawn[name] = (
                self.rng.dirichlet(np.ones(size))
                if name in DISTRIBUTIONS
                else self.rng.normal(size=OUTCOMES)
            )
        return self.drawn[name]

    def symbol(self, symbol):
        if symbol in self.drawn:
            return self.drawn[symbol]
        name, index = family(symbol)
        if index is not None and name in DISTRIBUTIONS | {"r", "s"}:
            return self.family(name)[int(index) - 1]
        if symbol in self.given:
            value = self(self.given[symbol])
        elif symbol == s.Z:
            tilt = np.exp(self.family("r") / self(s.beta))
            value = (self.family(REFERENCE) * tilt[: self.sizes[REFERENCE]]).sum()
        elif symbol.is_integer:
            value = {"y": 2, "k": 2, "n": OUTCOMES, "K": OUTCOMES}[symbol.name]
        elif symbol.is_positive:
            value = self.rng.uniform(0.15, 0.85)
        else:
            value = self.rng.normal()
        return self.drawn.setdefault(symbol, value)

    def function(self, name, argument):
        """A value of a family, or a polynomial in theta."""
        if name.startswith("ell"):
            return sp.Poly(self.coefficients(name), argument).as_expr()
        return self.family(name)[int(argument) - 1]

    def coefficients(self, name):
        return self.drawn.setdefault(name, self.rng.normal(size=3).tolist())

    def smooth(self, expression):
        """The expression with functions of theta as polynomials, and derivatives taken."""
        of_theta = [f for f in expression.atoms(AppliedUndef) if f.func.__name__.startswith("ell")]
        lines = {f: self.function(f.func.__name__, f.args[0]) for f in of_theta}
        return expression.rewrite(sp.exp).subs(lines).doit() if of_theta else expression

    def __call__(self, e):
        if isinstance(e, sp.Derivative | sp.Subs):
            return self(e.rewrite(sp.exp).doit())
        if isinstance(e, sp.Sum):
            ((index, first, last),) = e.limits
            terms = range(int(self(first).real), int(self(last).real) + 1)
            return sum(self(e.function.subs(index, k)) for k in terms)
        if e.is_Number or e.is_NumberSymbol:
            return complex(e)
        if e.is_Symbol:
            return complex(self.symbol(e))
        if isinstance(e, AppliedUndef):
            return complex(self.function(e.func.__name__, self(e.args[0]).real))
        values = [self(arg) for arg in e.args]
        if e.is_Add:
            return sum(values)
        if e.is_Mul:
            return complex(np.prod(values))
        if e.is_Pow:
            return values[0] ** values[1]
        if isinstance(e, sigma):
            return 1 / (1 + cmath.exp(-values[0]))
        return {sp.exp: cmath.exp, sp.log: cmath.log, sp.Abs: abs}[e.func](values[0])

    def is_true(self, step):
        """Whether the step's equation or inequality holds here; None where it has no value."""
        try:
            left, right = (
                self(self.smooth(side.xreplace(dict(step.where)))) for side in step.equation.args
            )
        except (ValueError, ZeroDivisionError, OverflowError):
            return None
        if isinstance(step.equation, sp.Eq):
            return abs(left - right) <= 1e-9 * (1 + abs(left) + abs(right))
        return bool((left - right).real > 0) == isinstance(step.equation, sp.StrictGreaterThan)


def is_shown_false(step, seed, points=2):
    """Whether a random point shows it false, where it has a value on both sides."""
    return any(Point(seed + k, step.given).is_true(step) is False for k in range(points))
