"""The equations of Rafailov et al. 2023 in sympy: every step of every derivation is proved.

Each derivation takes a number of outcomes, which it writes out as pi_1 ... pi_n (policy),
pi_ref,1 ... (reference) and r_1 ... (reward); with None it is proved for any number of them, with
sums over outcomes y. The prompt x is fixed throughout: the objective and the loss are means over
prompts of what stands here. `Step.holds` is the proof (`dpo_lab.theory.proof`). "Eq." numbers are
those of the paper; a step that the paper does not number has a name. The probabilities of a
derivation are positive, as Theorem 1 assumes of the reference.
"""

from collections.abc import Callable

import sympy as sp
from sympy import Expr, Symbol, exp, log

from dpo_lab.theory.proof import (
    LINE,
    Derivation,
    Step,
    equation,
    in_latex,
    is_zero,
    sigma,
    sums_to_one,
)

__all__ = [
    "LINE",
    "Derivation",
    "Step",
    "actor_critic",
    "best",
    "beta",
    "bradley_terry",
    "derivations",
    "equation",
    "equation_index",
    "equivalence",
    "gibbs",
    "implicit",
    "in_latex",
    "is_zero",
    "kl",
    "loss_and_gradient",
    "objective",
    "optimal",
    "optimum",
    "optimum_by_lagrange",
    "outcomes",
    "partition",
    "plackett_luce",
    "policy",
    "population_loss",
    "printed_slip",
    "printed_slip_in_eq_21",
    "reference",
    "reparameterization",
    "reward",
    "sigmoid",
    "sums_to_one",
]

Outcomes = tuple[Expr, ...]

beta = Symbol("beta", positive=True)
Z = Symbol("Z", positive=True)

# outcome y among n, where n is any number
y, _n = (Symbol(name, integer=True, positive=True) for name in "yn")


# What the equations are made of


def outcomes(name: str, n: int | None, **assumptions: bool) -> Outcomes:
    """Symbols name_1 ... name_n; for any number, the one expression name(y)."""
    if n is None:
        return (sp.Function(name, **assumptions)(y),)
    return tuple(Symbol(f"{name}_{i}", **assumptions) for i in range(1, n + 1))


def policy(n: int | None) -> Outcomes:
    """Probabilities of the policy."""
    return outcomes("pi", n, positive=True)


def reference(n: int | None) -> Outcomes:
    """Probabilities of the reference."""
    return outcomes("pi_ref", n, positive=True)


def best(n: int | None) -> Outcomes:
    """Probabilities of the optimal policy."""
    return outcomes("pi^*", n, positive=True)


def reward(n: int | None) -> Outcomes:
    """Rewards."""
    return outcomes("r", n, real=True)


def total(*terms: Expr) -> Expr:
    """The sum of the terms of all outcomes; of one term in y, its sum over y."""
    added = sp.Add(*terms)
    return sp.Sum(added, (y, 1, _n)) if added.has_free(y) else added


def mean(p: Outcomes, values: Outcomes) -> Expr:
    """E_p[value] = sum p value."""
    return total(*(a * v for a, v in zip(p, values)))


def kl(p: Outcomes, q: Outcomes) -> Expr:
    """KL(p || q) = sum p log(p / q), nats."""
    return mean(p, tuple(log(a / b) for a, b in zip(p, q)))


def objective(pi: Outcomes, ref: Outcomes, r: Outcomes) -> Expr:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref) (Eq. 3, for one prompt)."""
    return mean(pi, r) - beta * kl(pi, ref)


def partition(ref: Outcomes, r: Outcomes) -> Expr:
    """Z = sum pi_ref exp(r / beta) (below Eq. 4)."""
    return mean(ref, tuple(exp(s / beta) for s in r))


def optimal(ref: Outcomes, r: Outcomes, z: Expr = Z) -> Outcomes:
    """pi* = pi_ref exp(r / beta) / Z (Eq. 4)."""
    return tuple(q * exp(s / beta) / z for q, s in zip(ref, r))


def shorthands(n: int | None) -> dict[Expr, Expr]:
    """What Z and pi* stand for."""
    z = partition(reference(n), reward(n))
    return {Z: z, **dict(zip(best(n), optimal(reference(n), reward(n), z)))}


def sigmoid(x: Expr) -> Expr:
    """sigma(x) = 1 / (1 + exp(-x))."""
    return sigma(x)


def implicit(p: Expr, q: Expr) -> Expr:
    """beta log(p / q), the implicit reward (Section 4)."""
    return beta * log(p / q)


# The optimum of the objective


def optimum(n: int | None = None) -> Derivation:
    """Appendix A.1: from the objective to its optimum."""
    pi, ref, r, star = policy(n), reference(n), reward(n), best(n)
    where, given = shorthands(n), sums_to_one(pi)
    value, apart = objective(pi, ref, r), kl(pi, star)

    # the means over the policy, one line of the paper after the other
    penalized = mean(pi, tuple(s - beta * log(p / q) for p, q, s in zip(pi, ref, r)))
    tilted = mean(pi, tuple(log(p / q) - s / beta for p, q, s in zip(pi, ref, r)))
    completed = mean(pi, tuple(log(p / a) - log(Z) for p, a in zip(pi, optimal(ref, r))))

    steps = (
        Step(
            equation(value, penalized),
            "Eq. 11",
            r"The objective (Eq. 3, and Eq. 11 again) is one mean under the policy: of the reward "
            r"minus $\beta$ times the log-ratio.",
        ),
        Step(
            equation(-value / beta, tilted),
            "Divided by -beta",
            r"The maximum becomes a minimum: of the mean of the log-ratio minus $r / \beta$.",
        ),
        Step(
            equation(tilted, completed),
            "Eq. 12",
            r"Write $r / \beta$ as $\log e^{r / \beta}$ and take it into the logarithm, together "
            r"with a factor $1 / Z$. Subtracting $\log Z$ outside undoes that factor. (Sympy "
            r"writes $\pi$ over $\frac{1}{Z} \pi_\mathrm{ref} e^{r / \beta}$ as one fraction.)",
        ),
        Step(
            equation(total(*star), sp.Integer(1)),
            "The denominator is a distribution",
            r"Call the denominator $\pi^*$. It sums to 1, because $Z$ is the sum of the "
            "numerators.",
            where,
        ),
        Step(
            equation(completed, apart - log(Z)),
            "Eq. 13",
            r"$Z$ is the same for every outcome, and the policy sums to 1, so $\log Z$ leaves the "
            "mean.",
            where,
            given,
        ),
        Step(
            equation(-value / beta, apart - log(Z)),
            "Eq. 14",
            r"What is left of the mean is $\mathrm{KL}(\pi \,\|\, \pi^*)$. The constant is "
            r"$-\log Z$.",
            where,
            given,
        ),
        Step(
            equation(objective(star, ref, r), beta * log(Z)),
            "The largest J",
            r"At $\pi = \pi^*$ the KL is zero, and $J(\pi^*) = \beta \log Z$.",
            where,
        ),
        Step(
            equation(objective(star, ref, r) - value, beta * apart),
            "Eq. 15",
            r"Every other policy falls short of it by $\beta\,\mathrm{KL}(\pi \,\|\, \pi^*)$. By "
            r"Gibbs' inequality that is positive unless $\pi = \pi^*$, so $\pi^*$ is the only "
            "optimum (Eq. 4).",
            where,
            given,
        ),
    )
    return Derivation("The optimum of the KL-constrained objective (Appendix A.1)", steps)


def printed_slip(n: int | None = None) -> Step:
    """Eq. 14 with the constant as an early version prints it, + Z(x): it does not hold."""
    pi, ref, r = policy(n), reference(n), reward(n)
    left = -objective(pi, ref, r) / beta
    right = kl(pi, best(n)) + Z
    return Step(equation(left, right), "Eq. 14", "As printed.", shorthands(n), sums_to_one(pi))


def gibbs(n: int | None = None) -> Derivation:
    """Gibbs' inequality: a KL is never negative, and zero only between equal distributions."""
    t, d = Symbol("t", positive=True), Symbol("d", positive=True)
    p, q = outcomes("p", n, positive=True), outcomes("q", n, positive=True)
    above = lambda u: u - 1 - log(u)  # noqa: E731
    slope = sp.Derivative(above(t), t)

    # d is how far above 1 the point is, or how far above 1 its inverse is
    steps = (
        Step(
            equation(sp.Subs(above(t), t, 1), sp.Integer(0)),
            "The tangent touches",
            r"$g(t) = t - 1 - \log t$ is the height of the line $t - 1$ above $\log t$. It is 0 at "
            "$t = 1$.",
        ),
        Step(
            equation(slope, (t - 1) / t),
            "Slope of g",
            "Its slope has the sign of $t - 1$.",
        ),
        Step(
            sp.Gt(sp.Subs(slope, t, 1 + d), 0, evaluate=False),
            "Right of 1",
            "At $t = 1 + d$, for any $d > 0$, the slope is $d / (1 + d)$: the height increases.",
        ),
        Step(
            sp.Lt(sp.Subs(slope, t, 1 / (1 + d)), 0, evaluate=False),
            "Left of 1",
            r"At $t = 1 / (1 + d)$ it is $-d$: the height decreases. So $g(1) = 0$ is its only "
            r"minimum: $\log t \le t - 1$, with equality at $t = 1$ alone.",
        ),
        Step(
            equation(kl(p, q), mean(p, tuple(above(b / a) for a, b in zip(p, q)))),
            "Gibbs' inequality",
            r"If $p$ and $q$ both sum to 1, their KL is a mean of heights $g(q / p)$, none of them "
            "negative. It is zero only if every height is, that is, if $q / p = 1$ everywhere.",
            given=sums_to_one(p) | sums_to_one(q),
        ),
    )
    return Derivation("Gibbs' inequality", steps)


def optimum_by_lagrange() -> Derivation:
    """The second route: stationary points of J + mu (1 - sum pi), for any number of outcomes."""
    (ref,), (r,) = reference(None), reward(None)
    mu, distance = Symbol("mu", real=True), Symbol("s", real=True)
    x, other = Symbol("x", positive=True), Symbol("x_2", positive=True)

    # what an outcome of probability x adds to the Lagrangian, and its slope
    added = lambda x: x * r - beta * x * log(x / ref) - mu * x  # noqa: E731
    slope = sp.diff(added(x), x)
    stationary = ref * exp(r / beta) * exp(-1 - mu / beta)
    z = {Z: partition((ref,), (r,))}

    steps = (
        Step(
            equation(sp.Derivative(added(x), x), r - beta * log(x / ref) - beta - mu),
            "Slope",
            r"One outcome of probability $x$ adds $x\,r - \beta x \log(x / \pi_\mathrm{ref}) - "
            r"\mu x$ to $J + \mu(1 - \sum_y \pi(y))$. This is the slope in $x$.",
        ),
        Step(
            equation(sp.Subs(slope, x, stationary), sp.Integer(0)),
            "Slope zero",
            r"Set it to zero and solve for $x$: $\log(x / \pi_\mathrm{ref}) = r / \beta - 1 "
            r"- \mu / \beta$, so $x = \pi_\mathrm{ref}\,e^{r / \beta}\,e^{-1 - \mu / \beta}$.",
        ),
        Step(
            equation(total(stationary), exp(-1 - mu / beta) * Z),
            "Sum",
            "The probabilities must sum to 1. They sum to this, so the multiplier must make "
            r"$e^{-1 - \mu / \beta} = 1 / Z$.",
            z,
        ),
        Step(
            equation(stationary.subs(mu, beta * log(Z) - beta), ref * exp(r / beta) / Z),
            "Eq. 4",
            r"Hence $\mu = \beta \log Z - \beta$, and $x$ is $\pi^*(y)$.",
        ),
        Step(
            sp.Lt(sp.Derivative(added(x), (x, 2)), 0, evaluate=False),
            "Strictly concave",
            r"The second derivative, $-\beta / x$, is negative for every $x > 0$.",
        ),
        Step(
            equation(sp.Derivative(added(x) + added(other), x, other), sp.Integer(0)),
            "No mixed terms",
            "Mixed second derivatives are zero, since each outcome adds its own term. So $J$ is "
            "strictly concave, and a stationary point is its only maximum.",
        ),
        Step(
            equation(sp.Subs(slope, x, ref * exp(-distance)), r - beta - mu + beta * distance),
            "Never at the edge",
            r"At $x = \pi_\mathrm{ref}\,e^{-s}$ the slope grows with $s$ without bound: near $x = "
            "0$ more probability always pays, so the maximum gives every outcome some.",
        ),
    )
    return Derivation("The same by a Lagrange multiplier, for any number of outcomes", steps)


# From a reward to its policy and back


def reparameterization() -> Derivation:
    """Eq. 5: the reward of any outcome in terms of its optimal policy; Z is any positive number."""
    (ref,), (r,), (star,) = reference(None), reward(None), best(None)
    steps = (
        Step(
            equation(log(star), log(ref) + r / beta - log(Z)),
            "Logarithm of Eq. 4",
            "Take the logarithm of both sides.",
            {star: optimal((ref,), (r,))[0]},
        ),
        Step(
            equation(r, implicit(star, ref) + beta * log(Z)),
            "Eq. 5",
            r"Multiply by $\beta$ and solve for $r$.",
            {star: optimal((ref,), (r,))[0]},
        ),
    )
    return Derivation("The reward that a policy is optimal for", steps)


def bradley_terry() -> Derivation:
    """Eqs. 1, 2, 6, 16 and 17 (Appendix A.2): the preference probability, where Z cancels."""
    r1, r2 = reward(2)
    (p1, p2), (q1, q2) = best(2), reference(2)
    by_policy = {r1: implicit(p1, q1) + beta * log(Z), r2: implicit(p2, q2) + beta * log(Z)}
    preferred = exp(r1) / (exp(r1) + exp(r2))
    without_z = 1 / (1 + exp(implicit(p2, q2) - implicit(p1, q1)))
    (r_w, r_l) = (Symbol(f"r_{side}", real=True) for side in "wl")
    chosen = exp(r_w) / (exp(r_w) + exp(r_l))

    steps = (
        Step(
            equation(preferred, sigmoid(r1 - r2)),
            "Eq. 1",
            "Only the difference of the rewards counts. (Eq. 16 is the same line again.)",
        ),
        Step(
            equation(-log(chosen), -log(sigmoid(r_w - r_l))),
            "Eq. 2",
            "The loss of a reward model for one label: minus the log-probability of what the "
            "annotator chose.",
        ),
        Step(
            equation(r1, implicit(p1, q1) + beta * log(Z)),
            "Eq. 17",
            "Eq. 5 for the reward of the annotators.",
            dict(zip((p1, p2), optimal((q1, q2), (r1, r2)))),
        ),
        Step(
            equation(preferred.subs(by_policy), without_z),
            "Eq. 6",
            r"With Eq. 17 for both rewards, $\beta \log Z$ is in both and cancels.",
        ),
        Step(
            equation(without_z, sigmoid(implicit(p1, q1) - implicit(p2, q2))),
            "Eq. 6 as a sigmoid",
            "The last line of Appendix A.2: the sigmoid of the difference of the implicit rewards.",
        ),
    )
    return Derivation("Bradley-Terry, without the reward (Appendix A.2)", steps)


def plackett_luce() -> Derivation:
    """Eqs. 18 to 20 (Appendix A.3): a ranking of any number K of completions.

    The probability of a ranking is a product of factors: factor k is the probability that the
    completion in place k is preferred to all those below it.
    """
    j, k, last = (Symbol(name, integer=True, positive=True) for name in ("j", "k", "K"))
    r = sp.Function("r", real=True)
    star, ref = (sp.Function(name, positive=True) for name in ("pi^*", "pi_ref"))
    hidden = lambda i: implicit(star(i), ref(i))  # noqa: E731
    factor = lambda of: exp(of(k)) / sp.Sum(exp(of(j)), (j, k, last))  # noqa: E731
    r1, r2 = reward(2)

    steps = (
        Step(
            equation(exp(r1) / (exp(r1) + exp(r2)), sigmoid(r1 - r2)),
            "Eq. 18",
            "For $K = 2$ the first factor is Bradley-Terry (Eq. 1). The last factor is always 1, "
            "since nothing is left below the last place.",
        ),
        Step(
            equation(factor(lambda i: hidden(i) + beta * log(Z)), factor(hidden)),
            "Eq. 19",
            r"Factor $k$ of Eq. 18, with every reward written by Eq. 5: $\beta \log Z$ is in every "
            "exponent and cancels. This is so for every factor, hence for their product.",
        ),
        Step(
            equation(-log(factor(r)), log(sp.Sum(exp(r(j)), (j, k, last))) - r(k)),
            "Eq. 20",
            "The loss of a ranking is a sum over its places $k$ of this, with the implicit rewards "
            "for $r$.",
        ),
    )
    return Derivation("Plackett-Luce, for rankings of any length (Appendix A.3)", steps)


# The loss


def _pair() -> tuple[Expr, Expr, Expr, Symbol]:
    """log pi of the chosen and of the rejected completion, their margin, and theta."""
    theta = Symbol("theta", real=True)
    log_w, log_l = (sp.Function(name, real=True)(theta) for name in ("ell_w", "ell_l"))
    ref_w, ref_l = sp.symbols("ell_w^ref ell_l^ref", real=True)
    return log_w, log_l, beta * (log_w - ref_w) - beta * (log_l - ref_l), theta


def loss_and_gradient() -> Derivation:
    """Eq. 7 from Eq. 6, and Eqs. 21 and 22 (Appendix A.4): the loss and its gradient."""
    log_w, log_l, margin, theta = _pair()
    m = Symbol("m", real=True)
    (p_w, p_l), (q_w, q_l) = (
        tuple(Symbol(f"{name}_{side}", positive=True) for side in "wl") for name in ("pi", "pi_ref")
    )
    chosen = 1 / (1 + exp(implicit(p_l, q_l) - implicit(p_w, q_w)))

    # sigma's slope at the margin, and the gradient of the loss
    slope = sigmoid(margin) * sigmoid(-margin)
    gradient = -beta * sigmoid(-margin) * (sp.diff(log_w, theta) - sp.diff(log_l, theta))

    steps = (
        Step(
            equation(-log(chosen), -log(sigmoid(implicit(p_w, q_w) - implicit(p_l, q_l)))),
            "Eq. 7",
            "The label says that $w$ is preferred to $l$. Minus its log-probability, by Eq. 6 with "
            r"a trained policy $\pi$ in place of $\pi^*$, is the loss of the pair.",
        ),
        Step(
            equation(-log(sigmoid(m)), log(1 + exp(-m))),
            "As computed",
            "With $m$ for the margin, the difference of the two implicit rewards.",
        ),
        Step(
            equation(1 - sigmoid(m), sigmoid(-m)),
            "The other label",
            "The probability of the other label.",
        ),
        Step(
            equation(sp.Derivative(sigmoid(m), m), sigmoid(m) * sigmoid(-m)),
            "Slope of sigma",
            r"The slope of the sigmoid, $\sigma(m)(1 - \sigma(m))$.",
        ),
        Step(
            equation(
                sp.Derivative(-log(sigmoid(margin)), theta),
                -slope / sigmoid(margin) * sp.Derivative(margin, theta),
            ),
            "Eq. 22",
            "The chain rule, with $u$ for the margin: the gradient of the loss is "
            r"$-\frac{\sigma'(u)}{\sigma(u)} \nabla u$, where $\sigma'(u) / \sigma(u) = "
            r"\sigma(-u)$. (Eq. 21, as it should read, is the left side.)",
        ),
        Step(
            equation(sp.Derivative(-log(sigmoid(margin)), theta), gradient),
            "The gradient",
            r"The gradient descends on $-\log \pi$ of the chosen completion and on $+\log \pi$ of "
            r"the rejected one, with the weight $\beta\,\sigma(-m)$: the more wrong the margin, "
            "the larger. (Section 4, and the last line of Appendix A.4.)",
        ),
    )
    return Derivation("The loss and its gradient (Eq. 7, Appendix A.4)", steps)


def printed_slip_in_eq_21() -> Step:
    """Eq. 21 as an early version prints it, with w and l swapped: not the gradient of Eq. 7."""
    _, _, margin, theta = _pair()
    left, right = (sp.Derivative(-log(sigmoid(side)), theta) for side in (margin, -margin))
    return Step(equation(left, right), "Eq. 21", "As printed.")


def population_loss(n: int | None = None) -> Derivation:
    """The population loss is least at pi*, and only there.

    The population is all labels: P is the true probability that the first completion of a pair is
    preferred, Q the policy's. Every pair of outcomes occurs in it.
    """
    P, Q = Symbol("P", positive=True), Symbol("Q", positive=True)
    (s1, s2), (p1, p2), (q1, q2) = best(2), policy(2), reference(2)
    r1, r2 = reward(2)
    star, c = best(n), Symbol("c", real=True)
    not_P, not_Q = 1 - P, 1 - Q
    both = (P, Symbol("P_2", positive=True)), (Q, Symbol("Q_2", positive=True))
    given = {both[0][1]: not_P, both[1][1]: not_Q}
    entropy = -P * log(P) - both[0][1] * log(both[0][1])
    cross = -P * log(Q) - both[0][1] * log(both[1][1])

    steps = (
        Step(
            equation(cross, entropy + kl(*both)),
            "Cross-entropy",
            "The mean loss of a pair over its labels ($P_2 = 1 - P$, $Q_2 = 1 - Q$) is the entropy "
            "of the labels, which no policy changes, plus a KL. By Gibbs' inequality it is least "
            "where $Q = P$, and only there.",
            given=given,
        ),
        Step(
            equation(sigmoid(implicit(s1, q1) - implicit(s2, q2)), sigmoid(r1 - r2)),
            "pi* has the true labels",
            r"The optimal policy's $Q$ is the true $P$, for every pair at once. So it minimizes "
            "the mean over pairs.",
            dict(zip((s1, s2), optimal((q1, q2), (r1, r2)))),
        ),
        Step(
            equation(
                implicit(p1, q1) - implicit(p2, q2) - (implicit(s1, q1) - implicit(s2, q2)),
                beta * (log(p1 / s1) - log(p2 / s2)),
            ),
            "Equal margins",
            r"Since $\sigma$ increases, equal $Q$ are equal margins, and by this line "
            r"$\log(\pi / \pi^*)$ is then the same number, $c$, for every outcome.",
        ),
        Step(
            equation(total(*(s * exp(c) for s in star)), exp(c)),
            "Only there",
            r"So $\pi = \pi^* e^c$. Both sum to 1, hence $e^c = 1$ and $\pi = \pi^*$.",
            given=sums_to_one(star),
        ),
    )
    return Derivation("The population loss is least at the optimal policy, and only there", steps)


# Section 5


def equivalence(n: int | None = None) -> Derivation:
    """Section 5.1, Appendices A.5 and A.6: rewards that differ by a function of the prompt alone.

    Theorem 1 and Proposition 1 assume pi_ref(y|x) > 0 for all prompts and completions.
    """
    pi, ref, r, c = policy(n), reference(n), reward(n), Symbol("c", real=True)
    shifted = tuple(s + c for s in r)
    z, z_shifted = partition(ref, r), partition(ref, shifted)
    projected, projected_shifted = (
        tuple(s - beta * log(norm) for s in values)
        for values, norm in ((r, z), (shifted, z_shifted))
    )
    each, other, ranked = (r[0], total(*map(exp, r)), total(*map(exp, shifted)))

    steps = (
        Step(
            equation(exp(each + c) / ranked, exp(each) / other),
            "Lemma 1",
            "A shift of all rewards of a prompt by the same $c$ changes no preference: it cancels "
            "in every factor of Plackett-Luce, whose sum runs over the completions still in play.",
        ),
        Step(
            equation(optimal(ref, shifted, z_shifted)[0], optimal(ref, r, z)[0]),
            "Lemma 2",
            "Nor does it change the optimal policy.",
        ),
        Step(
            equation(z_shifted, z * exp(c / beta)),
            "Z moves with the shift",
            r"It multiplies $Z$ by $e^{c / \beta}$.",
        ),
        Step(
            equation(projected[0], implicit(optimal(ref, r, z)[0], ref[0])),
            "Eq. 8",
            r"The reward $f(r) = r - \beta \log Z$ differs from $r$ by a function of the prompt, "
            "and is the implicit reward of the optimal policy.",
        ),
        Step(
            equation(partition(ref, projected), sp.Integer(1)),
            "Eq. 9",
            "Its own $Z$ is 1.",
        ),
        Step(
            equation(projected_shifted[0], projected[0]),
            "Theorem 1",
            r"All rewards of a class have the same $f(r)$. So every class can be written as "
            r"$\beta \log(\pi / \pi_\mathrm{ref})$. Assumed: $\pi_\mathrm{ref}(y \mid x) > 0$ "
            "everywhere.",
        ),
        Step(
            equation(
                partition(ref, tuple(implicit(p, q) + c for p, q in zip(pi, ref))), exp(c / beta)
            ),
            "Proposition 1",
            "In only one way: if the implicit reward of a policy, shifted by $c$, is one of "
            "another policy, its $Z$ must be 1, as that of every implicit reward. So $c = 0$.",
            given=sums_to_one(pi),
        ),
    )
    return Derivation("Equivalent rewards (Section 5.1, Appendices A.5 and A.6)", steps)


def actor_critic(n: int | None = None) -> Derivation:
    """Section 5.2 with Eq. 10: PPO's instability as a missing normalizer, a soft value baseline."""
    pi, ref, r, star = policy(n), reference(n), reward(n), best(n)
    score, b = outcomes("s", n, real=True), Symbol("b", real=True)
    where, given = shorthands(n), sums_to_one(pi)

    # reward minus beta times the log-ratio: what PPO's advantage is made of
    returns: Callable[[Outcomes], Outcomes] = lambda p: tuple(  # noqa: E731
        s - beta * log(a / q) for a, q, s in zip(p, ref, r)
    )
    normalized = tuple(v - beta * log(Z) for v in returns(pi))
    squares = lambda values: tuple(v**2 for v in values)  # noqa: E731

    steps = (
        # the normalizer as a part of the reward
        Step(
            equation(mean(pi, normalized), -beta * kl(pi, star)),
            "Eq. 10",
            r"With $f(r) = r - \beta \log Z$ in place of the reward, the objective is minus "
            r"$\beta$ times the KL to the optimal policy: it is never positive, and 0 at the "
            "optimum.",
            where,
            given,
        ),
        Step(
            equation(objective(pi, ref, r) - mean(pi, normalized), beta * log(Z)),
            "The normalizer is a constant",
            r"It differs from $J$ by $\beta \log Z$, the soft value of the prompt, which no policy "
            "changes.",
            where,
            given,
        ),
        # what it is to a policy gradient
        Step(
            equation(
                mean(pi, tuple((v - b) * s for v, s in zip(returns(pi), score))),
                mean(pi, tuple(v * s for v, s in zip(returns(pi), score))) - b * mean(pi, score),
            ),
            "A baseline",
            r"The policy gradient is the mean of return times score $s = \nabla \log \pi$. A "
            "baseline $b$ changes it by $b$ times the mean score, which is the gradient of "
            r"$\sum_y \pi(y) = 1$, so 0. The gradient stays; its variance does not.",
        ),
        Step(
            equation(returns(star)[0], beta * log(Z)),
            "Returns at the optimum",
            r"At the optimum every completion has the same return, $\beta \log Z$.",
            where,
        ),
        # the variance that is left at the optimum
        Step(
            equation(
                mean(star, squares(tuple(v * s for v, s in zip(returns(star), score)))),
                beta**2 * log(Z) ** 2 * mean(star, squares(score)),
            ),
            "Variance without it",
            "So without a baseline a gradient that should be 0 has this variance: the square of "
            "the missing normalizer times that of the score.",
            where,
        ),
        Step(
            equation(
                mean(
                    star,
                    squares(tuple((v - beta * log(Z)) * s for v, s in zip(returns(star), score))),
                ),
                sp.Integer(0),
            ),
            "Variance with it",
            r"With $b = \beta \log Z$ there is none. PPO has to learn that baseline with a value "
            "model; in DPO's loss the normalizer has cancelled.",
            where,
        ),
    )
    return Derivation("Why PPO needs a baseline and DPO does not (Section 5.2)", steps)


def derivations(n: int | None = 3) -> list[Derivation]:
    """Everything above, for `n` outcomes or, with None, for any number."""
    return [
        optimum(n),
        gibbs(n),
        optimum_by_lagrange(),
        reparameterization(),
        bradley_terry(),
        plackett_luce(),
        loss_and_gradient(),
        population_loss(n),
        equivalence(n),
        actor_critic(n),
    ]


def equation_index() -> list[dict[str, str]]:
    """For each equation of the paper, what it is here, what proves it and what computes it.

    "computed by" is empty for an identity, which has no number to compute.
    """
    loss, nll = "losses.dpo_loss", "losses.bradley_terry_nll"
    ranking = "losses.plackett_luce_loss"
    assumed = "assumption about annotators"
    rows = (
        ("Eq. 1", assumed, "bradley_terry", nll),
        ("Eq. 2", "likelihood of Eq. 1", "bradley_terry", nll),
        ("Eq. 3", "definition", "optimum", "theory.objective_value"),
        ("Eq. 4", "proved", "optimum, gibbs, optimum_by_lagrange", "theory.optimal_policy"),
        ("Eq. 5", "proved", "reparameterization", "theory.implicit_reward"),
        ("Eq. 6", "proved from Eqs. 1 and 5", "bradley_terry", loss),
        ("Eq. 7", "proved from Eq. 6", "loss_and_gradient, population_loss", loss),
        ("Eqs. 8 and 9", "proved", "equivalence", "theory.implicit_reward"),
        ("Eq. 10", "proved", "actor_critic", "theory.value_gap"),
        ("Eqs. 11 to 15", "proved", "optimum, gibbs", "theory.value_gap"),
        ("Eqs. 16 and 17", "Eqs. 1 and 5 again", "bradley_terry", loss),
        ("Eq. 18", assumed, "plackett_luce", ""),
        ("Eqs. 19 and 20", "proved from Eqs. 5 and 18", "plackett_luce", ranking),
        ("Eqs. 21 and 22", "proved from Eq. 7", "loss_and_gradient", f"{loss} (gradient_weights)"),
        ("Lemmas 1 and 2", "proved", "equivalence", ""),
        ("Theorem 1, Proposition 1", "proved where pi_ref > 0", "equivalence", ""),
    )
    return [dict(zip(("equation", "here", "proved by", "computed by"), row)) for row in rows]
