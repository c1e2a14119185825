"""The KL-constrained objective on finite distributions, exactly.

Section 3 and Appendix A.1 of Rafailov et al. 2023. Distributions are probabilities along the last
dimension, (..., n); rewards have the same last dimension. Values are in units of the reward, the KL
in nats. Every function is differentiable, keeps float32 or float64, and allows outcomes of
probability zero.
"""

import torch
from torch import Tensor

from dpo_lab.losses import check_beta


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum p log(p / q), (...) in nats.

    It is infinite where q gives no probability to an outcome to which p does.
    """
    _check_distribution("p", p)
    _check_distribution("q", q)
    _check_same("p", p, "q", q)
    return _mean_log_ratio(p, _log(q))


def objective_value(policy: Tensor, reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref), (...) in units of the reward (Eq. 3)."""
    beta = check_beta(beta)
    _check_reward(reward, policy)
    return (policy * reward).sum(-1) - beta * kl(policy, reference)


def log_partition(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log Z = log sum pi_ref exp(r / beta), (...) (below Eq. 4)."""
    beta = _checked_tilt(reference, reward, beta)

    # log Z = E_ref[r] / beta + log E_ref[exp((r - E_ref[r]) / beta)]
    mean = (reference * reward).sum(-1, keepdim=True)
    tilt = (reward - mean) / beta  # (..., n)

    # for a large beta every tilt is small: log(1 + E[exp(tilt) - 1]) loses no digits
    small = torch.log1p((reference * torch.expm1(tilt.clamp(max=1.0))).sum(-1))

    # for a small beta the exponentials overflow: logsumexp takes the largest out first
    wide = torch.logsumexp(_log(reference) + tilt, -1)
    return mean[..., 0] / beta + torch.where((tilt.abs() <= 1).all(-1), small, wide)


def optimal_policy(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """pi* = pi_ref exp(r / beta) / Z, (..., n): the policy that maximizes the objective (Eq. 4)."""
    beta = _checked_tilt(reference, reward, beta)
    return torch.softmax(_log(reference) + (reward - reward.amax(-1, keepdim=True)) / beta, -1)


def implicit_reward(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """beta log(pi / pi_ref), (..., n): the reward for which `policy` is optimal (Eq. 5).

    It is that reward up to the constant beta log Z. It is minus infinity where only the reference
    has probability, plus infinity where only the policy has, and 0 where neither has, since no data
    can tell.
    """
    beta = check_beta(beta)
    _check_distribution("policy", policy)
    _check_distribution("reference", reference)
    _check_same("policy", policy, "reference", reference)
    return beta * torch.where((policy > 0) | (reference > 0), _log(policy) - _log(reference), 0.0)


def value_gap(policy: Tensor, reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """J(pi*) - J(pi) = beta KL(pi || pi*), (...) in units of the reward.

    It says how far a policy is from the optimum, and holds because J(pi) = beta log Z - beta KL(pi
    || pi*) (Eq. 14; early copies print "+ Z(x)" for its "- log Z(x)").
    """
    _check_distribution("policy", policy)
    beta = _checked_tilt(reference, reward, beta)
    _check_same("policy", policy, "reference", reference)

    # log pi* of every outcome, (..., n)
    log_z = log_partition(reference, reward, beta)[..., None]
    log_optimal = _log(reference) + reward / beta - log_z
    return beta * _mean_log_ratio(policy, log_optimal)


def _log(p: Tensor) -> Tensor:
    """log p, whose gradient is 0 and not NaN where p is 0."""
    return torch.where(p > 0, p, 1.0).log().masked_fill(p == 0, -torch.inf)


def _mean_log_ratio(p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q) over the last dimension.

    Outcomes with p = 0 contribute nothing, neither to the value nor to the gradient.
    """
    some = p > 0
    return (p * (torch.where(some, p, 1.0).log() - torch.where(some, log_q, 0.0))).sum(-1)


def _check_distribution(name: str, p: Tensor) -> None:
    if not isinstance(p, Tensor) or not p.is_floating_point() or p.ndim < 1:
        raise TypeError(
            f"{name} must be a floating-point tensor of probabilities (..., n), found {p!r}"
        )
    if not (p >= 0).all():
        raise ValueError(f"{name} is {p.tolist()}; probabilities must not be negative or NaN")
    off = (p.sum(-1) - 1).abs().max()
    if off > 1e-5:
        raise ValueError(
            f"{name} sums to {p.sum(-1).tolist()}; probabilities must sum to 1: divide by their sum"
        )


def _check_same(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{name_a} has {a.shape[-1]} outcomes and {name_b} {b.shape[-1]}; "
            "they must be over the same outcomes"
        )


def _check_reward(reward: Tensor, p: Tensor) -> None:
    of_numbers = isinstance(reward, Tensor) and reward.is_floating_point()
    if not of_numbers or not torch.isfinite(reward).all():
        raise ValueError(
            f"reward is {reward!r}; "
            "it must be a tensor of finite floating-point numbers, one per outcome"
        )
    _check_same("reward", reward, "the distribution", p)


def _checked_tilt(reference: Tensor, reward: Tensor, beta: float) -> float:
    """Check reference and reward, and return `beta` as a float."""
    _check_distribution("reference", reference)
    _check_reward(reward, reference)
    return check_beta(beta)
