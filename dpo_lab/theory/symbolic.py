"""The equations of Rafailov et al. 2023 in sympy: every step of every derivation is proved.

A step is an equation between expressions in the policy pi_i, the reference rho_i (printed as
pi_ref,i) and the reward r_i of outcome i, and beta. `holds()` proves it for all probabilities that
sum to one: each distribution is written as positive weights over their sum, products and powers
inside logarithms are expanded, logarithms and exponentials become independent symbols, and what
remains is a rational function that must be zero. Equation numbers are those of the paper.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy as sp
from sympy import Eq, Expr, Symbol, exp, log
from sympy.printing.latex import LatexPrinter

beta = Symbol("beta", positive=True)
Z = Symbol("Z", positive=True)

# this many symbols fit on one line of a notebook beside the file browser
LINE = 18


def outcomes(name: str, n: int, **assumptions: bool) -> tuple[Symbol, ...]:
    """Symbols name_1 ... name_n."""
    return tuple(Symbol(f"{name}_{i}", **assumptions) for i in range(1, n + 1))


def policy(n: int) -> tuple[Symbol, ...]:
    """Probabilities of the policy."""
    return outcomes("pi", n, positive=True)


def reference(n: int) -> tuple[Symbol, ...]:
    """Probabilities of the reference."""
    return outcomes("rho", n, positive=True)


def best(n: int) -> tuple[Symbol, ...]:
    """Probabilities of the optimal policy."""
    return outcomes("pi^*", n, positive=True)


def reward(n: int) -> tuple[Symbol, ...]:
    """Rewards."""
    return outcomes("r", n, real=True)


@dataclass(frozen=True)
class Step:
    """One equation of a derivation."""

    equation: Eq
    number: str
    """the equation's number in the paper, "" where it has none"""
    says: str
    """what it says, in Markdown"""
    where: Mapping[Symbol, Expr] = field(default_factory=dict)
    """what its shorthands, such as Z, stand for"""

    def holds(self) -> bool:
        """Whether both sides are equal for every distribution, every reward and every beta > 0."""
        return is_zero((self.equation.lhs - self.equation.rhs).subs(self.where))

    def _repr_markdown_(self) -> str:
        number = f"**{self.number}.** " if self.number else ""
        return f"{number}{self.says}\n\n$${in_latex(self.equation)}$$"


@dataclass(frozen=True)
class Derivation:
    """Steps in the order in which they follow."""

    title: str
    steps: tuple[Step, ...]

    def holds(self) -> bool:
        """Whether every step holds."""
        return all(step.holds() for step in self.steps)

    def __getitem__(self, number: str) -> Step:
        """The step with this number in the paper."""
        return next(step for step in self.steps if step.number == number)

    def _repr_markdown_(self) -> str:
        return f"### {self.title}\n\n" + "\n\n".join(step._repr_markdown_() for step in self.steps)


def is_zero(expression: Expr) -> bool:
    """Prove that an expression in probabilities, rewards, logarithms and exponentials is zero.

    False where it cannot be proved.
    """
    # every distribution as positive weights over their sum
    weights = {
        s: Symbol(f"w_{s.name}", positive=True)
        for s in expression.free_symbols
        if s.name.startswith(("pi_", "rho_"))
    }
    for family in ("pi_", "rho_"):
        members = {s: w for s, w in weights.items() if s.name.startswith(family)}
        total = sp.Add(*members.values())
        weights |= {s: w / total for s, w in members.items()}

    # products and powers out of the logarithms
    flat = sp.expand_log(sp.powsimp(expression.doit().subs(weights)).rewrite(exp), force=True)
    flat = flat.replace(lambda e: e.func is log, lambda e: log(sp.factor(sp.together(e.args[0]))))
    flat = sp.expand_log(sp.expand_log(flat, force=True), force=True)
    flat = sp.expand(flat, power_exp=True, mul=True)

    # logarithms and exponentials as independent symbols: a rational function remains
    atoms = sorted(flat.atoms(log) | flat.atoms(exp), key=sp.default_sort_key, reverse=True)
    for atom in atoms:
        flat = flat.subs(atom, sp.Dummy(positive=True))
    return sp.cancel(sp.together(flat)) == 0


class _Printer(LatexPrinter):
    """LaTeX with pi_ref for the reference, and positive terms before negative ones."""

    def _print_Symbol(self, symbol: Symbol, **options: object) -> str:
        of_reference = re.fullmatch(r"rho_(\d+)", symbol.name)
        if of_reference:
            return rf"\pi_{{\mathrm{{ref}},{of_reference[1]}}}"
        return super()._print_Symbol(symbol, **options).replace("^{ref}", r"^{\mathrm{ref}}")

    def _as_ordered_terms(self, expression: Expr, order: str | None = None) -> list[Expr]:
        return sorted(super()._as_ordered_terms(expression, order=order), key=_is_negative)


def in_latex(equation: Eq) -> str:
    """An equation in LaTeX, on several aligned lines where one would be wider than the page."""
    left, right = equation.args
    if _symbols(left) + _symbols(right) <= LINE:
        return f"{_latex(left)} = {_latex(right)}"
    first, *more = _lines(left)
    equal, *rest = _lines(right)
    lines = [f"& {first}", *(rf"& \quad {line}" for line in more)]
    lines += [f"&= {equal}", *(rf"& \quad {line}" for line in rest)]
    return "\\begin{aligned}\n" + " \\\\\n".join(lines) + "\n\\end{aligned}"


def _lines(side: Expr) -> list[str]:
    """A side of an equation in LaTeX, a term per line where all would be wider than the page."""
    if _symbols(side) <= LINE or not side.is_Add:
        return [_latex(side)]
    first, *rest = _Printer()._as_ordered_terms(side)
    signed = [f"- {_latex(-term)}" if _is_negative(term) else f"+ {_latex(term)}" for term in rest]
    return [_latex(first), *signed]


def _latex(expression: Expr) -> str:
    return _Printer().doprint(expression).replace(r"\log{\left(Z \right)}", r"\log Z")


def _symbols(expression: Expr) -> int:
    """How often a symbol stands in an expression."""
    return sum(part.is_Symbol for part in sp.preorder_traversal(expression))


def _is_negative(term: Expr) -> bool:
    return bool(term.as_coeff_Mul()[0].is_negative)


def equation(left: Expr, right: Expr) -> Eq:
    """left = right, kept as it is written."""
    return Eq(left, right, evaluate=False)


def partition(rho: tuple[Expr, ...], r: tuple[Expr, ...]) -> Expr:
    """Z = sum rho exp(r / beta) (below Eq. 4)."""
    return sp.Add(*(q * exp(s / beta) for q, s in zip(rho, r)))


def objective(pi: tuple[Expr, ...], rho: tuple[Expr, ...], r: tuple[Expr, ...]) -> Expr:
    """E_pi[r] - beta KL(pi || rho) (Eq. 3)."""
    return sp.Add(*(p * s for p, s in zip(pi, r))) - beta * kl(pi, rho)


def kl(p: tuple[Expr, ...], q: tuple[Expr, ...]) -> Expr:
    """sum p log(p / q), nats."""
    return sp.Add(*(a * log(a / b) for a, b in zip(p, q)))


def optimal(rho: tuple[Expr, ...], r: tuple[Expr, ...], z: Expr = Z) -> tuple[Expr, ...]:
    """rho exp(r / beta) / Z (Eq. 4)."""
    return tuple(q * exp(s / beta) / z for q, s in zip(rho, r))


def shorthands(n: int) -> dict[Symbol, Expr]:
    """What Z and pi* stand for."""
    z = partition(reference(n), reward(n))
    return {Z: z, **dict(zip(best(n), optimal(reference(n), reward(n), z)))}


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + exp(-x))


def implicit(p: Expr, q: Expr) -> Expr:
    """beta log(p / q), the implicit reward (Section 4)."""
    return beta * log(p / q)


def optimum(n: int) -> Derivation:
    """Appendix A.1: from the objective to its optimum, among `n` outcomes."""
    pi, rho, r = policy(n), reference(n), reward(n)
    where = shorthands(n)
    value, star = objective(pi, rho, r), best(n)

    # the objective and its negative per beta, outcome by outcome
    penalized = sp.Add(*(p * (s - beta * log(p / q)) for p, q, s in zip(pi, rho, r)))
    tilted = sp.Add(*(p * (log(p / q) - s / beta) for p, q, s in zip(pi, rho, r)))

    steps = (
        # the objective as one mean
        Step(
            equation(value, penalized),
            "Eq. 11",
            r"The objective of Eq. 3 is the mean, under the policy, of the reward minus $\beta$ "
            "times the log-ratio.",
        ),
        Step(
            equation(-value / beta, tilted),
            "Eq. 12",
            r"Dividing by $-\beta$ turns the maximum into a minimum: the mean of the log-ratio "
            r"minus $r / \beta$.",
        ),
        # a KL to the optimum, which is a distribution
        Step(
            equation(tilted, kl(pi, star) - log(Z)),
            "Eq. 13",
            r"With $Z$ inside the logarithm, and $\log Z$ subtracted again, the denominator is a "
            r"distribution, $\pi^*$.",
            where,
        ),
        Step(
            equation(sp.Add(*star), sp.Integer(1)),
            "",
            r"$\pi^*$ is a distribution: its probabilities sum to 1, because $Z$ is the sum of "
            "their numerators.",
            where,
        ),
        # the objective through that KL
        Step(
            equation(value, beta * log(Z) - beta * kl(pi, star)),
            "Eq. 14",
            r"So $J(\pi) = \beta \log Z - \beta\,\mathrm{KL}(\pi \,\|\, \pi^*)$. The constant in "
            r"Eq. 14 is $-\log Z$; the paper prints $+ Z(x)$.",
            where,
        ),
        Step(
            equation(objective(star, rho, r), beta * log(Z)),
            "Eq. 15",
            r"The KL is never negative, and 0 only for equal distributions, so $\pi^*$ is the only "
            r"optimum (Eq. 4), where $J(\pi^*) = \beta \log Z$.",
            where,
        ),
    )
    return Derivation("The optimum of the KL-constrained objective (Appendix A.1)", steps)


def printed_slip(n: int) -> Step:
    """Eq. 14 with the constant as printed, + Z(x): it does not hold."""
    pi, rho, r = policy(n), reference(n), reward(n)
    left = -objective(pi, rho, r) / beta
    return Step(equation(left, kl(pi, best(n)) + Z), "Eq. 14", "As printed.", shorthands(n))


def optimum_for_any_n() -> Derivation:
    """Eq. 14 term by term: one outcome out of any number.

    Z is any positive number here, so nothing depends on n.
    """
    p, q, s = Symbol("p_y", positive=True), Symbol("q_y", positive=True), Symbol("r_y", real=True)
    (star,) = optimal((q,), (s,))
    left = p * s - beta * p * log(p / q)
    right = p * beta * log(Z) - beta * p * log(p / star)

    steps = (
        Step(
            equation(left, right),
            "Eq. 14",
            r"What outcome $y$ adds to $J(\pi)$ is what it adds to $\beta \log Z - "
            r"\beta\,\mathrm{KL}(\pi \,\|\, \pi^*)$. Sum over $y$; the policy sums to 1.",
        ),
    )
    return Derivation("The same for any number of outcomes", steps)


def optimum_by_lagrange(n: int) -> Derivation:
    """The second route: stationary points of J + mu (1 - sum pi)."""
    pi, rho, r = policy(n), reference(n), reward(n)
    mu = Symbol("mu", real=True)
    lagrangian = objective(pi, rho, r) + mu * (1 - sp.Add(*pi))

    # the slope in the first probability, before it is known that they sum to 1
    free = dict(zip(pi, outcomes("x", n, positive=True)))
    x, q, s = free[pi[0]], rho[0], r[0]
    slope = sp.diff(lagrangian.subs(free), x)
    at_optimum = slope.subs(x, q * exp(s / beta) / Z)

    steps = (
        Step(
            equation(slope, s - beta * log(x / q) - beta - mu),
            "",
            "The slope of the Lagrangian in one probability; the others have the same form.",
        ),
        Step(
            equation(at_optimum, beta * log(Z) - beta - mu),
            "Eq. 4",
            r"At $\pi^*$ no slope depends on the outcome: all vanish for $\mu = \beta \log Z - "
            r"\beta$.",
        ),
        Step(
            equation(sp.Derivative(slope, x), -beta / x),
            "",
            "The second derivative is negative and mixed ones are zero: $J$ is strictly concave, "
            "so there is no other optimum.",
        ),
    )
    return Derivation("The same by a Lagrange multiplier", steps)


def reparameterization(n: int) -> Derivation:
    """Eq. 5: the reward in terms of its optimal policy."""
    steps = tuple(
        Step(
            equation(s, implicit(p, q) + beta * log(Z)),
            "Eq. 5",
            f"The reward of outcome {i}, from Eq. 4.",
            shorthands(n),
        )
        for i, (s, p, q) in enumerate(zip(reward(n), best(n), reference(n)), start=1)
    )
    return Derivation("The reward that a policy is optimal for", steps)


def bradley_terry() -> Derivation:
    """Eq. 1 and Eq. 6 (Appendix A.2): the preference probability, and how Z cancels in it."""
    (r1, r2) = reward(2)
    (p1, p2), (q1, q2) = (outcomes(name, 2, positive=True) for name in "pq")
    by_policy = {r1: implicit(p1, q1) + beta * log(Z), r2: implicit(p2, q2) + beta * log(Z)}
    preferred = exp(r1) / (exp(r1) + exp(r2))
    without_z = 1 / (1 + exp(implicit(p2, q2) - implicit(p1, q1)))

    steps = (
        Step(
            equation(preferred, sigmoid(r1 - r2)),
            "Eq. 1",
            "Only the difference of the rewards counts.",
        ),
        Step(
            equation(preferred.subs(by_policy), without_z),
            "Eq. 6",
            r"With Eq. 5 for both rewards, $\beta \log Z$ is in both and cancels.",
        ),
    )
    return Derivation("Bradley-Terry, without the reward (Appendix A.2)", steps)


def plackett_luce(k: int) -> Derivation:
    """Appendix A.3: a ranking of `k` completions; Z cancels in every factor."""
    r, p, q = reward(k), outcomes("p", k, positive=True), outcomes("q", k, positive=True)
    by_policy = {s: implicit(a, b) + beta * log(Z) for s, a, b in zip(r, p, q)}
    without_z = {s: implicit(a, b) for s, a, b in zip(r, p, q)}
    factors = [exp(r[i]) / sp.Add(*(exp(s) for s in r[i:])) for i in range(k)]

    steps = (
        Step(
            equation(sp.Mul(*factors).subs(by_policy), sp.Mul(*factors).subs(without_z)),
            "Eq. 20",
            r"With rewards written by Eq. 5, the probability of the ranking is the same with and "
            r"without $\beta \log Z$.",
        ),
    )
    return Derivation(f"Plackett-Luce for rankings of {k} (Appendix A.3)", steps)


def loss_and_gradient() -> Derivation:
    """Eq. 7 and Appendix A.4: the loss, and its gradient with the weight that makes it DPO."""
    theta = Symbol("theta", real=True)

    # log pi of the chosen completion and of the rejected one
    log_w, log_l = (sp.Function(name)(theta) for name in ("ell_w", "ell_l"))
    ref_w, ref_l = sp.symbols("ell_w^ref ell_l^ref", real=True)
    m = Symbol("m", real=True)
    margin = beta * (log_w - ref_w) - beta * (log_l - ref_l)
    loss = -log(sigmoid(margin))
    gradient = -beta * sigmoid(-margin) * (sp.diff(log_w, theta) - sp.diff(log_l, theta))

    steps = (
        Step(
            equation(-log(sigmoid(m)), log(1 + exp(-m))),
            "Eq. 7",
            "The loss of a pair is the negative log-likelihood of its label, in the margin $m$ of "
            "the implicit rewards.",
        ),
        Step(equation(1 - sigmoid(m), sigmoid(-m)), "", "The probability of the other label."),
        Step(
            equation(sp.Derivative(sigmoid(m), m), sigmoid(m) * sigmoid(-m)),
            "",
            "The slope of the sigmoid.",
        ),
        Step(
            equation(sp.Derivative(loss, theta), gradient),
            "Eq. 21",
            r"The gradient raises $\log \pi$ of the chosen completion and lowers that of the "
            "rejected one: the more wrong the margin, the more.",
        ),
    )
    return Derivation("The loss and its gradient (Eq. 7, Appendix A.4)", steps)


def equivalence(n: int) -> Derivation:
    """Appendices A.5 and A.6: rewards that differ by a function of the prompt are equivalent.

    One of each class is the implicit reward of its optimal policy.
    """
    rho, r, c = reference(n), reward(n), Symbol("c", real=True)
    shifted = tuple(s + c for s in r)
    z, z_shifted = partition(rho, r), partition(rho, shifted)
    projected = tuple(s - beta * log(z) for s in r)
    factor = exp(r[0]) / sp.Add(*map(exp, r))

    steps = (
        Step(
            equation(factor.subs(dict(zip(r, shifted)), simultaneous=True), factor),
            "Lemma 1",
            "A shift by $c(x)$ changes no preference: it cancels in every factor of Plackett-Luce.",
        ),
        Step(
            equation(optimal(rho, shifted, z_shifted)[0], optimal(rho, r, z)[0]),
            "Lemma 2",
            "Nor does it change the optimal policy.",
        ),
        Step(
            equation(z_shifted, z * exp(c / beta)),
            "",
            r"It multiplies $Z$ by $\exp(c / \beta)$: each class has exactly one reward with "
            "$Z = 1$.",
        ),
        Step(
            equation(partition(rho, projected), sp.Integer(1)),
            "Theorem 1",
            r"That one is $r - \beta \log Z$, by Eq. 5 the implicit reward of the optimal policy.",
        ),
    )
    return Derivation("Equivalent rewards (Appendices A.5 and A.6)", steps)


def derivations(n: int = 3) -> list[Derivation]:
    """Everything above, for `n` outcomes."""
    return [
        optimum(n),
        optimum_for_any_n(),
        optimum_by_lagrange(n),
        reparameterization(n),
        bradley_terry(),
        plackett_luce(n),
        loss_and_gradient(),
        equivalence(n),
    ]


def equation_index() -> list[dict[str, str]]:
    """For each equation of the paper, what proves it here and which function computes it.

    "computed by" is empty for an identity, which has no number to compute.
    """
    rows = (
        ("Eq. 1", "bradley_terry", "losses.bradley_terry_nll"),
        ("Eq. 3", "optimum", "theory.objective_value"),
        ("Eq. 4", "optimum, optimum_by_lagrange", "theory.optimal_policy"),
        ("Eq. 5", "reparameterization", "theory.implicit_reward"),
        ("Eq. 6", "bradley_terry", "losses.dpo_loss"),
        ("Eq. 7", "loss_and_gradient", "losses.dpo_loss"),
        ("Eq. 11-15", "optimum, optimum_for_any_n", "theory.value_gap"),
        ("Eq. 18-20", "plackett_luce", ""),
        ("Eq. 21", "loss_and_gradient", "losses.dpo_loss (gradient_weights)"),
        ("Lemmas 1, 2, Theorem 1", "equivalence", ""),
    )
    return [dict(zip(("equation", "proved by", "computed by"), row)) for row in rows]
