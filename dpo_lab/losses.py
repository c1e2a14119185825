"""From log-probabilities to losses: pure functions of tensors, one loss per pair, nothing reduced.

Pairs are two index vectors into N completions (Appendix B of Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290), so a prompt with K ranked completions has K(K-1)/2 pairs over
K log-probabilities. `dpo_loss_from_pairs` takes the four vectors of other code instead.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_lab.engine.arguments import MORE_CHOICES, number

LossType = Literal["sigmoid", "ipo", "hinge", "robust", "exo_pair"]


class DPOLoss(NamedTuple):
    """What `dpo_loss` returns. Only the losses carry a gradient."""

    losses: Tensor
    """(P,) one per pair"""
    rewards: Tensor
    """(N,) implicit rewards, beta * (policy_logps - reference_logps)"""
    margins: Tensor
    """(P,) reward of the chosen minus reward of the rejected completion"""
    gradient_weights: Tensor
    """(P,) minus the derivative of each loss with respect to its margin"""


def dpo_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    *,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    check_values: bool = True,
) -> DPOLoss:
    """The DPO loss of each preference pair (Eq. 7 of Rafailov et al. 2023) and its relatives.

    With the implicit reward r = beta * (log pi - log pi_ref), the margin
    m = r[chosen] - r[rejected] and the label smoothing e:

    - `sigmoid`: -log sigma(m). With e > 0 it is cDPO, -(1-e) log sigma(m) - e log sigma(-m), which
      takes each label to be wrong with probability e
      (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf).
    - `robust`: [-(1-e) log sigma(m) + e log sigma(-m)] / (1-2e). Its mean over labels flipped with
      probability e is the loss of the true labels (Chowdhury et al. 2024,
      https://arxiv.org/abs/2403.00409). Unbounded below: for large m it is -m e / (1-2e), so a pair
      that is always labeled one way, as when each pair has one label, drives its margin to
      infinity at a weight that never vanishes.
    - `ipo`: (m / beta - 1 / (2 beta))^2 (Eq. 17 of Azar et al. 2023,
      https://arxiv.org/abs/2310.12036). The log-ratios are those you pass: sums over tokens, as in
      the DPO paper's code, or means.
    - `hinge`: max(0, 1 - m) (Liu et al. 2023, RSO, https://arxiv.org/abs/2309.06657, after SLiC-HF,
      whose hinge is on log-probs without a reference).
    - `exo_pair`: sigma(m) log(sigma(m) / (1-e)) + sigma(-m) log(sigma(-m) / e), the KL divergence
      of the labels' distribution (1-e, e) from the policy's on the pair; cDPO is the divergence
      the other way round plus a constant, and both are least at m = log((1-e) / e) (Eq. 16 of
      Ji et al. 2024, EXO, https://arxiv.org/abs/2402.00856). It needs e > 0; the paper's e is
      1e-3. Its gradient vanishes where a pair is ordered very wrongly.

    The gradient weight, -d loss / d margin, is the sigma(-m) of the paper's gradient (Section 4)
    when `loss_type` is "sigmoid". A loss of your own joins `MARGIN_LOSSES` under a new name.

    Args:
        policy_logps: (N,) log pi(y|x) in nats, summed over the tokens of each completion.
        reference_logps: (N,) log pi_ref(y|x) in nats.
        chosen: (P,) integer indices into the N completions.
        rejected: (P,) integer indices into the N completions.
        beta: strength of the KL constraint, positive.
        loss_type: a name in `MARGIN_LOSSES`.
        label_smoothing: e, in [0, 0.5); not defined for ipo and hinge, positive for exo_pair.
        check_values: whether to look for indices out of range and log-probs that are not finite;
            on a GPU that waits for the values.

    Raises:
        ValueError, TypeError: naming the argument, the value found and what is allowed.
    """
    beta, label_smoothing = _check_dpo(
        *(policy_logps, reference_logps, chosen, rejected),
        *(beta, loss_type, label_smoothing, check_values),
    )
    arguments = (policy_logps, reference_logps, chosen, rejected, beta)
    return dpo_terms(*arguments, loss_type, label_smoothing)


def dpo_terms(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    loss_type: str,
    label_smoothing: float,
) -> DPOLoss:
    """The mathematics of `dpo_loss`, for arguments that have been checked: Eq. 7 of the paper."""
    rewards = beta * (policy_logps - reference_logps)  # (N,)
    margins = rewards[chosen] - rewards[rejected]  # (P,)
    losses, weights = MARGIN_LOSSES[loss_type](margins, beta, label_smoothing)
    return DPOLoss(losses, rewards.detach(), margins.detach(), weights.detach())


def dpo_loss_from_pairs(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    *,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    check_values: bool = True,
) -> DPOLoss:
    """`dpo_loss` of P pairs given as four vectors, as most other code writes it.

    The same numbers to the bit as `dpo_loss` on the completions stacked chosen first, with
    chosen = arange(P) and rejected = arange(P, 2P).

    Args:
        policy_chosen: (P,) log pi(y|x) of the chosen completions in nats, summed over tokens.
        policy_rejected: (P,) log pi(y|x) of the rejected completions.
        reference_chosen: (P,) log pi_ref(y|x) of the chosen completions.
        reference_rejected: (P,) log pi_ref(y|x) of the rejected completions.

    The other arguments are those of `dpo_loss`. The `rewards` that come back are (2P,): those of
    the P chosen completions first, then those of the rejected.

    Raises:
        ValueError, TypeError: naming the argument, the value found and what is allowed.
    """
    logps = {
        "policy_chosen": policy_chosen,
        "policy_rejected": policy_rejected,
        "reference_chosen": reference_chosen,
        "reference_rejected": reference_rejected,
    }
    check_loss_type(loss_type, label_smoothing)
    _check_four(logps, check_values)

    # stack the completions, chosen first
    policy_logps = torch.cat([policy_chosen, policy_rejected])  # (2P,)
    reference_logps = torch.cat([reference_chosen, reference_rejected])  # (2P,)
    chosen, rejected = torch.arange(len(policy_logps), device=policy_logps.device).chunk(2)

    names = {"loss_type": loss_type, "label_smoothing": label_smoothing, "check_values": False}
    return dpo_loss(policy_logps, reference_logps, chosen, rejected, beta, **names)


def _sigmoid(margins: Tensor, beta: float, e: float) -> tuple[Tensor, Tensor]:
    """DPO, and cDPO where the label smoothing `e` is positive."""
    losses = -(1 - e) * F.logsigmoid(margins) - e * F.logsigmoid(-margins)
    weights = (1 - e) * torch.sigmoid(-margins) - e * torch.sigmoid(margins)
    return losses, weights


def _robust(margins: Tensor, beta: float, e: float) -> tuple[Tensor, Tensor]:
    """DPO without the bias of labels that are flipped with probability `e`; unbounded below."""
    losses = (-(1 - e) * F.logsigmoid(margins) + e * F.logsigmoid(-margins)) / (1 - 2 * e)
    weights = ((1 - e) * torch.sigmoid(-margins) + e * torch.sigmoid(margins)) / (1 - 2 * e)
    return losses, weights


def _ipo(margins: Tensor, beta: float, e: float) -> tuple[Tensor, Tensor]:
    """The squared distance of the log-ratios' difference from 1 / (2 beta)."""
    errors = margins / beta - 1 / (2 * beta)
    return errors**2, -2 / beta * errors


def _hinge(margins: Tensor, beta: float, e: float) -> tuple[Tensor, Tensor]:
    """How far each margin is below one."""
    return torch.relu(1 - margins), (margins < 1).to(margins)


def _exo_pair(margins: Tensor, beta: float, e: float) -> tuple[Tensor, Tensor]:
    """The reverse KL divergence between the pair's distribution under the policy and its labels."""
    win, lose = torch.sigmoid(margins), torch.sigmoid(-margins)
    losses = win * (F.logsigmoid(margins) - math.log1p(-e))
    losses = losses + lose * (F.logsigmoid(-margins) - math.log(e))
    optimum = math.log1p(-e) - math.log(e)
    return losses, win * lose * (optimum - margins)


MarginLoss = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]

MARGIN_LOSSES: dict[str, MarginLoss] = {
    "sigmoid": _sigmoid,
    "ipo": _ipo,
    "hinge": _hinge,
    "robust": _robust,
    "exo_pair": _exo_pair,
}
"""The losses by `loss_type`, each a function of margins (P,), beta and label smoothing. It returns
losses (P,) and gradient weights (P,), which are minus the derivative of the losses. All but
"robust" with label smoothing are bounded below (see `dpo_loss`). Add your own: after
`MARGIN_LOSSES["mine"] = my_loss`, `dpo_loss` and `DPOConfig` take loss_type="mine"."""

# configs take names that were added
MORE_CHOICES[LossType] = MARGIN_LOSSES

UNSMOOTHED = ("ipo", "hinge")


def bradley_terry_nll(rewards: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log p(chosen beats rejected) = -log sigma(r_chosen - r_rejected), (P,) nats.

    Eq. 1-2 of Rafailov et al. 2023. `rewards` is (N,); `chosen` and `rejected` are (P,) indices
    into it. `dpo_loss` is this on implicit rewards.
    """
    check_logps("rewards", rewards)
    check_pairs(chosen, rejected, len(rewards))
    check_finite("rewards", rewards, {"chosen": chosen, "rejected": rejected})
    return -F.logsigmoid(rewards[chosen] - rewards[rejected])


def plackett_luce_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    rankings: Tensor,
    beta: float,
    *,
    check_values: bool = True,
) -> Tensor:
    """The DPO loss of each ranking of K completions, (R,) nats (Eq. 20 of Rafailov et al. 2023).

    -log p(ranking) under the Plackett-Luce model: the best is chosen among all K, the second among
    the K-1 that remain, and so on. With the implicit reward r = beta * (log pi - log pi_ref), the
    choice at place k costs -log sigma(r_k - logsumexp(r_{k+1}, ..., r_K)): the loss of a pair, with
    all that remain on the other side. K = 2 is the sigmoid loss of `dpo_loss`.

    Args:
        policy_logps: (N,) log pi(y|x) in nats, summed over the tokens of each completion.
        reference_logps: (N,) log pi_ref(y|x) in nats.
        rankings: (R, K) integer indices into the N completions, best first, K >= 2.
        beta: strength of the KL constraint, positive.
        check_values: whether to look for indices out of range and log-probs that are not finite;
            on a GPU that waits for the values.

    Raises:
        ValueError, TypeError: naming the argument, the value found and what is allowed.
    """
    beta = check_beta(beta)
    check_both(policy_logps, reference_logps)
    if check_values:
        check_rankings(rankings, len(policy_logps))
        places = {f"place {k}": column for k, column in enumerate(rankings.T)}
        check_finite("policy_logps", policy_logps, places, "ranking")
        check_finite("reference_logps", reference_logps, places, "ranking")

    ranked = beta * (policy_logps - reference_logps)[rankings]  # (R, K) rewards, best first
    rest = torch.logcumsumexp(ranked.flip(1), 1).flip(1)[:, 1:]  # (R, K-1)
    return -F.logsigmoid(ranked[:, :-1] - rest).sum(1)


def reward_model_loss(ranked_rewards: Tensor) -> Tensor:
    """InstructGPT's loss of a reward model, (B,) nats (Eq. 1 of Ouyang et al. 2022).

    `ranked_rewards` is (B, K): the rewards of the K completions of each prompt, best first. A
    prompt's loss is the mean of -log sigma(r_better - r_worse) over its C(K, 2) pairs, so each
    prompt counts once whatever K. K = 2 is the pairwise loss of Eq. 2 of Rafailov et al. 2023.
    https://arxiv.org/abs/2203.02155
    """
    _check_ranked_rewards(ranked_rewards)
    k, device = ranked_rewards.shape[1], ranked_rewards.device
    better, worse = torch.triu_indices(k, k, offset=1, device=device)  # (C,) each
    return -F.logsigmoid(ranked_rewards[:, better] - ranked_rewards[:, worse]).mean(1)


def unlikelihood_loss(
    policy_logps: Tensor, chosen: Tensor, rejected: Tensor, alpha: float = 1.0
) -> Tensor:
    """The paper's unlikelihood baseline: -log pi(chosen) + alpha * log pi(rejected), (P,) nats.

    Section 6 of Rafailov et al. 2023, alpha in [0, 1]; alpha = 0 is Preferred-FT. Without a sigmoid
    to weight the pairs it has no lower bound, which is why it degenerates.
    """
    alpha = check_alpha(alpha)
    check_logps("policy_logps", policy_logps)
    check_pairs(chosen, rejected, len(policy_logps))
    check_finite("policy_logps", policy_logps, {"chosen": chosen, "rejected": rejected})
    return -policy_logps[chosen] + alpha * policy_logps[rejected]


def ppo_clip_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float = 0.2
) -> Tensor:
    """PPO's clipped policy loss per action, in units of the advantage.

    max(-A w, -A clip(w, 1 - c, 1 + c)) with w = pi(a) / pi_old(a): moving an action's probability
    further than the clip allows earns nothing, and having moved it the wrong way is not excused. At
    w = 1 the gradient is that of -A log pi(a). Eq. 7 of Schulman et al. 2017, arXiv:1707.06347.

    Args:
        logps: (...) log-probabilities of the actions taken, in nats; carries the gradient.
        old_logps: (...) the same under the policy that took them.
        advantages: (...) how much better than expected each action was.
        clip: c, positive.
    """
    clip = _check_clip(clip)
    _check_shapes(logps=logps, old_logps=old_logps, advantages=advantages)
    ratios = torch.exp(logps - old_logps)
    return torch.maximum(-advantages * ratios, -advantages * ratios.clamp(1 - clip, 1 + clip))


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2
) -> Tensor:
    """Half the squared error of each value, or of the value kept within `clip` of its old one.

    The larger of the two counts. All tensors are (...), in units of the reward. From OpenAI's
    implementation of PPO; the paper has it without the clip (Eq. 9).
    """
    clip = _check_clip(clip)
    _check_shapes(values=values, old_values=old_values, returns=returns)
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


def check_beta(beta: float) -> float:
    """`beta` as a float. Raises ValueError unless it is a positive, finite number."""
    allowed = "a positive, finite number (the paper's default is 0.1)"
    return check_number("beta", beta, lambda b: b > 0, allowed)


def check_alpha(alpha: float) -> float:
    """`alpha` of the unlikelihood loss as a float. Raises ValueError unless it is in [0, 1]."""
    allowed = "a number in [0, 1], the weight of the rejected completion"
    return check_number("alpha", alpha, lambda a: 0 <= a <= 1, allowed)


def check_loss_type(loss_type: str, label_smoothing: float) -> float:
    """`label_smoothing` as a float.

    Raises:
        ValueError: `loss_type` is not in `MARGIN_LOSSES`, or the smoothing is not in [0, 0.5) or
            not defined for this loss.
    """
    if not isinstance(loss_type, str) or loss_type not in MARGIN_LOSSES:
        known = ", ".join(MARGIN_LOSSES)
        raise ValueError(f"loss_type is {loss_type!r}; it must be one of {known}")
    allowed = "in [0, 0.5), the fraction of flipped labels"
    e = check_number("label_smoothing", label_smoothing, lambda e: 0 <= e < 0.5, allowed)
    if e and loss_type in UNSMOOTHED:
        raise ValueError(
            f"label_smoothing is {e!r} with loss_type={loss_type!r}; it is defined for sigmoid, "
            "robust and exo_pair"
        )
    if not e and loss_type == "exo_pair":
        raise ValueError(
            "label_smoothing is 0 with loss_type='exo_pair', whose loss is then infinite; give the "
            "fraction of flipped labels, in (0, 0.5), such as the paper's 1e-3"
        )
    return e


def check_pairs(chosen: Tensor, rejected: Tensor, n: int) -> None:
    """Raise unless `chosen` and `rejected` are (P,) indices into `n` completions that differ."""
    sides = {"chosen": chosen, "rejected": rejected}

    for name, index in sides.items():
        _check_index(name, index)
        if index.ndim != 1:
            raise ValueError(
                f"{name} has shape {tuple(index.shape)}; it must be (P,), one index per pair"
            )
    if len(chosen) != len(rejected):
        raise ValueError(
            f"chosen has {len(chosen)} indices and rejected {len(rejected)}; there must be one of "
            "each per pair"
        )

    for name, index in sides.items():
        _check_range(name, index, n)

    # two different completions
    same = (chosen == rejected).nonzero()
    if len(same):
        row = int(same[0])
        raise ValueError(
            f"pair {row} has completion {int(chosen[row])} as chosen and as rejected; drop the pair"
        )


def check_rankings(rankings: Tensor, n: int) -> None:
    """Raise unless `rankings` is (R, K) indices into `n` completions, each at most once a row."""
    _check_index("rankings", rankings)
    if rankings.ndim != 2 or rankings.shape[1] < 2:
        raise ValueError(
            f"rankings has shape {tuple(rankings.shape)}; it must be (R, K) with K >= 2 indices "
            "per ranking, best first"
        )
    _check_range("rankings", rankings, n)

    # no completion at two places
    ordered = rankings.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).nonzero()
    if len(twice):
        row, place = twice[0].tolist()
        raise ValueError(
            f"ranking {row} is {rankings[row].tolist()}, with completion "
            f"{int(ordered[row, place])} twice; each completion has one place"
        )


def _check_index(name: str, index: Tensor) -> None:
    """Raise unless `index` is a tensor of integers; torch would take uint8 for a mask."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        found = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(
            f"{name} is {found}; it must be a tensor of integer indices (int64 or int32) into "
            "the completions"
        )


def _check_range(name: str, index: Tensor, n: int) -> None:
    """Raise unless every value of `index` is one of `n` completions."""
    outside = ((index < 0) | (index >= n)).nonzero()
    if len(outside):
        place = outside[0].tolist()
        raise ValueError(
            f"{name}[{', '.join(map(str, place))}] is {int(index[tuple(place)])}; with {n} "
            f"completions an index must be in 0..{n - 1}"
        )


def _check_dpo(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    check_values: bool,
) -> tuple[float, float]:
    """`beta` and `label_smoothing` as floats, when all arguments of `dpo_loss` are right."""
    label_smoothing = check_loss_type(loss_type, label_smoothing)
    beta = check_beta(beta)

    check_both(policy_logps, reference_logps)

    # what has to look at values
    if check_values:
        check_pairs(chosen, rejected, len(policy_logps))
        sides = {"chosen": chosen, "rejected": rejected}
        check_finite("policy_logps", policy_logps, sides)
        check_finite("reference_logps", reference_logps, sides)
    return beta, label_smoothing


def check_both(policy_logps: Tensor, reference_logps: Tensor) -> None:
    """Raise unless policy and reference have one log-prob per completion each."""
    check_logps("policy_logps", policy_logps)
    check_logps("reference_logps", reference_logps)
    if policy_logps.shape != reference_logps.shape:
        raise ValueError(
            f"policy_logps has shape {tuple(policy_logps.shape)} and reference_logps "
            f"{tuple(reference_logps.shape)}; both must be (N,), one value per completion in the "
            "same order"
        )


def _check_four(logps: dict[str, Tensor], check_values: bool) -> None:
    """Raise unless the four vectors of `dpo_loss_from_pairs` are (P,) log-probs."""
    for name, values in logps.items():
        check_logps(name, values, "(P,)", "pair")
    shapes = {name: tuple(values.shape) for name, values in logps.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the shapes are {found}; they must be the same, one value per pair")
    for name, values in logps.items() if check_values else ():
        if not torch.isfinite(values).all():
            pair = int((~torch.isfinite(values)).nonzero()[0])
            raise ValueError(
                f"{name}[{pair}] is {values[pair].item()}; every value must be finite. Look at "
                "that completion's tokens, or lower the learning rate if training diverged"
            )


def _check_ranked_rewards(ranked_rewards: Tensor) -> None:
    """Raise unless `ranked_rewards` is (B, K) finite numbers with K of at least two."""
    if not isinstance(ranked_rewards, Tensor) or not ranked_rewards.is_floating_point():
        raise TypeError(_not_float("ranked_rewards", ranked_rewards, "(B, K)"))
    if ranked_rewards.ndim != 2 or ranked_rewards.shape[1] < 2:
        raise ValueError(
            f"ranked_rewards has shape {tuple(ranked_rewards.shape)}; it must be (B, K) with "
            "K >= 2 completions per prompt, ordered from best to worst"
        )
    if not torch.isfinite(ranked_rewards).all():
        row = int((~torch.isfinite(ranked_rewards)).nonzero()[0, 0])
        raise ValueError(
            f"ranked_rewards[{row}] is {ranked_rewards[row].tolist()}; every reward must be finite"
        )


def check_number(name: str, value: Any, allowed: Callable[[float], bool], says: str) -> float:
    """`value` as a float that is finite and `allowed`, which the error `says` in words."""
    try:
        found = value if type(value) is float else number(name, value)
    except TypeError:
        found = math.nan
    if not (math.isfinite(found) and allowed(found)):
        raise ValueError(f"{name} is {value!r}; it must be {says}")
    return found


def _check_clip(clip: float) -> float:
    """The clip of PPO as a float that is positive and finite."""
    return check_number("clip", clip, lambda c: c > 0, "a positive, finite number (0.2 is usual)")


def _check_shapes(**tensors: Tensor) -> None:
    """Raise ValueError unless the tensors have the same shape."""
    shapes = {name: tuple(values.shape) for name, values in tensors.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the shapes are {found}; they must be the same, one value per action")


def _not_float(name: str, values: Any, shape: str) -> str:
    """The error of what is not a tensor of floating-point numbers."""
    found = getattr(values, "dtype", type(values).__name__)
    return f"{name} must be a floating-point tensor {shape}, found {found}"


def check_logps(name: str, values: Tensor, shape: str = "(N,)", per: str = "completion") -> None:
    """Raise unless `values` is a vector of floating-point numbers."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(_not_float(name, values, shape))
    if values.ndim != 1:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; it must be {shape}, one value per {per} (sum "
            "over tokens)"
        )


def check_finite(name: str, values: Tensor, uses: dict[str, Tensor], of: str = "pair") -> None:
    """Raise ValueError where a value is not finite, with the pairs or rankings that use it."""
    if torch.isfinite(values).all():
        return
    row = int((~torch.isfinite(values)).nonzero()[0])
    found = [
        f"{side} of {of} {int(first)}"
        for side, index in uses.items()
        for first in (index == row).nonzero()[:1]
    ]
    raise ValueError(
        f"{name}[{row}] ({' and '.join(found) or f'in no {of}'}) is {values[row].item()}; every "
        "value must be finite. Look at that completion's tokens, or lower the learning rate if "
        "training diverged"
    )
