"""What a proved equation is, how sympy proves it, and how it prints.

A `Step` is an equation, or an inequality, between expressions in probabilities, rewards and beta.
`holds()` proves it with rewritings that are valid wherever both sides are defined: a logarithm is
expanded only where sympy knows its arguments to be positive, a sum only by linearity, and that
probabilities sum to 1 is used only where the step says so in `given`, over all outcomes at once.
Then logarithms, exponentials and sums become independent symbols, and what remains is a rational
function that must be zero.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy as sp
from sympy import Eq, Expr, Symbol, exp, log
from sympy.core.relational import Relational
from sympy.printing.latex import LatexPrinter

# this many symbols and functions fit on one line of a notebook beside the file browser
LINE = 22

RELATIONS = {Eq: "=", sp.StrictGreaterThan: ">", sp.StrictLessThan: "<"}


@dataclass(frozen=True)
class Step:
    """One equation or strict inequality of a derivation."""

    equation: Relational
    name: str
    """the equation's number in the paper, or a name for what the paper does not number"""
    says: str
    """what it says, in Markdown"""
    where: Mapping[Expr, Expr] = field(default_factory=dict)
    """what its shorthands, such as Z, stand for"""
    given: Mapping[Expr, Expr] = field(default_factory=dict)
    """what it assumes, such as that the policy sums to 1 (`sums_to_one`)"""

    def holds(self) -> bool:
        """Whether it is proved for every positive probability, every reward and every beta > 0.

        Distributions are those that `given` says to sum to 1; False where no proof is found.
        """
        left, right = self.equation.args
        difference = (left - right).xreplace(dict(self.where))
        if isinstance(self.equation, Eq):
            return is_zero(difference, self.given)
        if isinstance(self.equation, sp.StrictLessThan):
            difference = -difference
        return bool(sp.factor(_reduced(difference, self.given)).is_positive)

    def _repr_markdown_(self) -> str:
        return f"**{self.name}.** {self.says}\n\n$${in_latex(self.equation)}$$"


@dataclass(frozen=True)
class Derivation:
    """Steps in the order in which they follow."""

    title: str
    steps: tuple[Step, ...]

    def holds(self) -> bool:
        """Whether every step holds."""
        return all(step.holds() for step in self.steps)

    def __getitem__(self, name: str) -> Step:
        """The step of this name; KeyError, with the names that there are, where there is none."""
        steps = {step.name: step for step in self.steps}
        if name not in steps:
            raise KeyError(f"{name!r} is no step of {self.title!r}; they are {list(steps)}")
        return steps[name]

    def _repr_markdown_(self) -> str:
        return f"### {self.title}\n\n" + "\n\n".join(step._repr_markdown_() for step in self.steps)


class sigma(sp.Function):  # noqa: N801
    """The sigmoid 1 / (1 + exp(-x)), which stays sigma(x) on the page and is expanded in proofs."""

    def _eval_is_positive(self) -> bool | None:
        return self.args[0].is_real

    def _eval_rewrite_as_exp(self, x: Expr, **options: object) -> Expr:
        return 1 / (1 + exp(-x))


def equation(left: Expr, right: Expr) -> Eq:
    """left = right, kept as it is written."""
    return Eq(left, right, evaluate=False)


def sums_to_one(probabilities: tuple[Expr, ...]) -> dict[Expr, Expr]:
    """What `given` says of a distribution over all its outcomes, however they are written.

    Several symbols: the last is 1 minus the others. One pi(y): its sum over y is 1.
    """
    *others, last = probabilities
    if last.is_Symbol:
        return {last: 1 - sp.Add(*others)}
    (index,), n = last.args, Symbol("n", integer=True, positive=True)
    return {sp.Sum(last, (index, 1, n)): sp.Integer(1)}


# The proof


def is_zero(expression: Expr, given: Mapping[Expr, Expr] | None = None) -> bool:
    """Prove that an expression in probabilities, rewards, logarithms and exponentials is zero.

    `given` says what else may be used (`sums_to_one`). False where it cannot be proved.
    """
    return _reduced(expression, given or {}) == 0


def _reduced(expression: Expr, given: Mapping[Expr, Expr]) -> Expr:
    """The expression as a rational function of independent symbols: 0 if its numerator is 0."""
    to_do = lambda e: isinstance(e, sp.Derivative | sp.Subs)  # noqa: E731
    flat = expression.replace(sigma, lambda x: 1 / (1 + exp(-x)))
    flat = flat.replace(to_do, lambda e: e.doit())

    # every sum over outcomes as one symbol, the innermost first
    symbols: dict[sp.Sum, Expr] = {}
    flat = flat.replace(
        lambda e: isinstance(e, sp.Sum), lambda total: _linear(total, given, symbols)
    )
    flat = _flat(flat)

    # exponentials and logarithms as independent symbols
    for kind in (exp, log):
        for atom in sorted(flat.atoms(kind), key=sp.default_sort_key, reverse=True):
            flat = flat.subs(atom, _positive_if(kind is exp and atom.is_positive))

    # the probabilities that sum to 1, now that no logarithm holds one
    flat = flat.xreplace(dict(given))
    numerator, denominator = sp.fraction(sp.together(flat))
    numerator = sp.expand(numerator)
    return sp.Integer(0) if numerator == 0 else numerator / denominator


def _flat(expression: Expr) -> Expr:
    """Products, quotients and powers of positive numbers out of logarithms and exponentials."""
    flat = sp.expand(expression.rewrite(exp), power_exp=True)
    flat = flat.replace(
        lambda e: e.func is log,
        lambda e: sp.expand_log(log(sp.factor(sp.together(e.args[0])))),
    )
    return sp.expand(sp.expand_log(flat), power_exp=True)


def _linear(total: sp.Sum, given: Mapping[Expr, Expr], symbols: dict[sp.Sum, Expr]) -> Expr:
    """A sum term by term, what does not depend on its index in front, each rest as one symbol."""
    inside = [s for s, symbol in symbols.items() if total.function.has(symbol)]
    if len(total.limits) > 1 or any(s.has_free(*total.variables) for s in inside):
        return total

    terms = []
    for term in sp.Add.make_args(_flat(total.function)):
        factor, rest = term.as_independent(*total.variables, as_Add=False)
        one = sp.Sum(rest, *total.limits)
        if one not in symbols:
            symbols[one] = given.get(one, _positive_if(rest.is_positive))
        terms.append(factor * symbols[one])
    return sp.Add(*terms)


def _positive_if(known: bool | None) -> Expr:
    """A new symbol, positive where the thing that it stands for is known to be."""
    return sp.Dummy(positive=True) if known else sp.Dummy()


# The page


class _Printer(LatexPrinter):
    """LaTeX with pi_ref for the reference, and positive terms before negative ones."""

    def _print_Symbol(self, symbol: Symbol, **options: object) -> str:
        of_reference = re.fullmatch(r"pi_ref_(\w+)", symbol.name)
        if of_reference:
            return rf"\pi_{{\mathrm{{ref}},{of_reference[1]}}}"
        return super()._print_Symbol(symbol, **options).replace("^{ref}", r"^{\mathrm{ref}}")

    def _print_Function(self, function: sp.Function, exp: str | None = None) -> str:
        """pi(y) rather than pi left-parenthesis y; sympy's own functions as sympy prints them."""
        if not isinstance(function, sp.core.function.AppliedUndef):
            return super()._print_Function(function, exp)
        name = self._print_Symbol(Symbol(function.func.__name__))
        name = name.replace(r"\pi_{ref}", r"\pi_{\mathrm{ref}}")
        inside = ", ".join(map(self._print, function.args))
        return f"{name}({inside})" + (f"^{{{exp}}}" if exp else "")

    def _print_Sum(self, total: sp.Sum) -> str:
        """A sum over all outcomes as a sum over y."""
        ((index, first, _),) = total.limits
        if index.name != "y" or first != 1:
            return super()._print_Sum(total)
        body = self.parenthesize(total.function, 40) if total.function.is_Add else None
        return rf"\sum_{{y}} {body or self._print(total.function)}"

    def _as_ordered_terms(self, expression: Expr, order: str | None = None) -> list[Expr]:
        return sorted(super()._as_ordered_terms(expression, order=order), key=_is_negative)


def in_latex(relation: Relational) -> str:
    """An equation in LaTeX, on several aligned lines where one would be wider than the page."""
    left, right = relation.args
    sign = next(sign for kind, sign in RELATIONS.items() if isinstance(relation, kind))
    if _symbols(left) + _symbols(right) <= LINE:
        return f"{_latex(left)} {sign} {_latex(right)}"
    first, *more = _lines(left)
    second, *rest = _lines(right)
    lines = [f"& {first}", *(rf"& \quad {line}" for line in more)]
    lines += [f"&{sign} {second}", *(rf"& \quad {line}" for line in rest)]
    return "\\begin{aligned}\n" + " \\\\\n".join(lines) + "\n\\end{aligned}"


def _lines(side: Expr) -> list[str]:
    """A side of an equation in LaTeX, a term per line where all would be wider than the page."""
    if _symbols(side) <= LINE or not side.is_Add:
        return [_latex(side)]
    first, *rest = _Printer()._as_ordered_terms(side)
    signed = [f"- {_latex(-term)}" if _is_negative(term) else f"+ {_latex(term)}" for term in rest]
    return [_latex(first), *signed]


def _latex(expression: Expr) -> str:
    text = _Printer().doprint(expression)
    text = text.replace(r"\log{\left(Z \right)}^{2}", r"\left(\log Z\right)^{2}")
    return text.replace(r"\log{\left(Z \right)}", r"\log Z")


def _symbols(expression: Expr) -> int:
    """How often a symbol or a function stands in an expression."""
    parts = sp.preorder_traversal(expression)
    return sum(isinstance(part, Symbol | sp.Function) for part in parts)


def _is_negative(term: Expr) -> bool:
    return bool(term.as_coeff_Mul()[0].is_negative)
