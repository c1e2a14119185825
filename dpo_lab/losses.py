"""From log-probabilities to losses: pure functions of tensors, one loss per pair, nothing reduced.

Pairs are two index vectors into N completions (Appendix B of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290),
so a prompt with K ranked completions has K(K-1)/2 pairs over K log-probabilities.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_lab.engine.arguments import number

LossType = Literal["sigmoid", "ipo", "hinge", "robust"]


class DPOLoss(NamedTuple):
    """What `dpo_loss` returns. The last three carry no gradient."""

    losses: Tensor  # (P,) one a pair; has the gradient
    rewards: Tensor  # (N,) implicit rewards, beta * (policy_logps - reference_logps)
    margins: Tensor  # (P,) reward of chosen minus reward of rejected
    gradient_weights: Tensor  # (P,) minus the derivative of the loss by the margin


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

    With the implicit reward r = beta * (log pi - log pi_ref) and the margin m = r[chosen] - r[rejected]:

    - `sigmoid`: -log sigma(m). `label_smoothing` e > 0 gives cDPO, -(1-e) log sigma(m) - e log sigma(-m): each label is
      taken to be wrong with probability e (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf).
    - `robust`: [-(1-e) log sigma(m) + e log sigma(-m)] / (1-2e), unbiased under labels flipped with probability e
      (Eq. 12 of Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409).
    - `ipo`: (m / beta - 1 / (2 beta))^2 (Eq. 17 of Azar et al. 2023, https://arxiv.org/abs/2310.12036). The log-ratios
      are those you pass: sums, as in the DPO paper's code, or means per token.
    - `hinge`: max(0, 1 - m) (Zhao et al. 2023, https://arxiv.org/abs/2305.10425).

    The gradient weight -d loss / d margin is the sigma(-m) of the paper's gradient (Section 4) when loss_type is "sigmoid".
    Completions stacked chosen first, with chosen = arange(P) and rejected = arange(P, 2P), give the textbook loss.

    Args:
        policy_logps: (N,) log pi(y|x) in nats, summed over the tokens of each completion.
        reference_logps: (N,) log pi_ref(y|x) in nats.
        chosen: (P,) integer indices into the N completions.
        rejected: (P,) integer indices into the N completions.
        beta: strength of the KL constraint, positive.
        label_smoothing: in [0, 0.5), for sigmoid and robust only.
        check_values: whether to look for indices out of range and for log-probs that are not finite, which waits for a GPU.

    Raises:
        ValueError, TypeError: naming the argument, what was found and what is allowed.
    """
    e, beta = check_loss_type(loss_type, label_smoothing), check_beta(beta)
    _check_logps("policy_logps", policy_logps)
    _check_logps("reference_logps", reference_logps)
    if policy_logps.shape != reference_logps.shape:
        raise ValueError(
            f"policy_logps has shape {tuple(policy_logps.shape)} and reference_logps {tuple(reference_logps.shape)}; "
            "both must be (N,), one value for each completion in the same order"
        )
    if check_values:
        check_pairs(chosen, rejected, len(policy_logps))
        for name, logps in (("policy_logps", policy_logps), ("reference_logps", reference_logps)):
            _check_finite(name, logps, chosen, rejected)

    rewards = beta * (policy_logps - reference_logps)  # (N,)
    margins = rewards[chosen] - rewards[rejected]  # (P,)
    if loss_type == "sigmoid":
        losses = -(1 - e) * F.logsigmoid(margins) - e * F.logsigmoid(-margins)
        weights = (1 - e) * torch.sigmoid(-margins) - e * torch.sigmoid(margins)
    elif loss_type == "robust":
        losses = (-(1 - e) * F.logsigmoid(margins) + e * F.logsigmoid(-margins)) / (1 - 2 * e)
        weights = ((1 - e) * torch.sigmoid(-margins) + e * torch.sigmoid(margins)) / (1 - 2 * e)
    elif loss_type == "ipo":
        losses = (margins / beta - 1 / (2 * beta)) ** 2
        weights = -2 / beta * (margins / beta - 1 / (2 * beta))
    else:
        losses = torch.relu(1 - margins)
        weights = (margins < 1).to(margins)
    return DPOLoss(losses, rewards.detach(), margins.detach(), weights.detach())


def bradley_terry_nll(rewards: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log p(chosen beats rejected) = -log sigma(r_chosen - r_rejected), (P,) nats (Eq. 1-2 of Rafailov et al. 2023).

    `rewards` is (N,); `chosen` and `rejected` are (P,) indices into it. `dpo_loss` is this on implicit rewards.
    """
    _check_logps("rewards", rewards)
    check_pairs(chosen, rejected, len(rewards))
    _check_finite("rewards", rewards, chosen, rejected)
    return -F.logsigmoid(rewards[chosen] - rewards[rejected])


def reward_model_loss(ranked_rewards: Tensor) -> Tensor:
    """InstructGPT's reward-model loss (Eq. 1 of Ouyang et al. 2022, https://arxiv.org/abs/2203.02155), (B,) nats.

    `ranked_rewards` is (B, K): the rewards of the K completions of each prompt, best first. A prompt's loss is the mean
    of -log sigma(r_better - r_worse) over its C(K, 2) pairs, so each prompt counts once whatever K. K = 2 is the
    pairwise loss of Eq. 2 of Rafailov et al. 2023.
    """
    _check_float("ranked_rewards", ranked_rewards, "(B, K)")
    if ranked_rewards.ndim != 2 or ranked_rewards.shape[1] < 2:
        raise ValueError(
            f"ranked_rewards has shape {tuple(ranked_rewards.shape)}; it must be (B, K) with K >= 2 completions a prompt, "
            "ordered from best to worst"
        )
    if not torch.isfinite(ranked_rewards).all():
        row = int((~torch.isfinite(ranked_rewards)).nonzero()[0, 0])
        raise ValueError(
            f"ranked_rewards[{row}] is {ranked_rewards[row].tolist()}; every reward must be finite"
        )
    better, worse = torch.triu_indices(
        *(ranked_rewards.shape[1],) * 2, offset=1, device=ranked_rewards.device
    )  # (C,)
    return -F.logsigmoid(ranked_rewards[:, better] - ranked_rewards[:, worse]).mean(1)


def unlikelihood_loss(
    policy_logps: Tensor, chosen: Tensor, rejected: Tensor, alpha: float = 1.0
) -> Tensor:
    """The paper's unlikelihood baseline: -log pi(chosen) + alpha * log pi(rejected), (P,) nats.

    Section 6 of Rafailov et al. 2023, alpha in [0, 1]; alpha = 0 is Preferred-FT. With no sigmoid to weigh the pairs it
    has no lower bound, which is why it degenerates.
    """
    alpha = _number(
        "alpha",
        alpha,
        lambda a: 0 <= a <= 1,
        "a number in [0, 1], the weight of the rejected completion",
    )
    _check_logps("policy_logps", policy_logps)
    check_pairs(chosen, rejected, len(policy_logps))
    _check_finite("policy_logps", policy_logps, chosen, rejected)
    return -policy_logps[chosen] + alpha * policy_logps[rejected]


def ppo_clip_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float = 0.2
) -> Tensor:
    """PPO's clipped policy loss of each action, in units of the advantage (Eq. 7 of Schulman et al. 2017, arXiv:1707.06347).

    max(-A w, -A clip(w, 1 - c, 1 + c)) with w = pi(a) / pi_old(a): no reward for moving an action's probability further than
    the clip allows, and no relief for having moved it the wrong way. At w = 1 its gradient is that of -A log pi(a).

    Args:
        logps: log-probabilities (...) of the actions taken, nats; has the gradient.
        old_logps: (...) those of the policy that took them.
        advantages: (...) how much better than expected each action was.
        clip: c, positive.
    """
    clip = _checked_clip(clip)
    _check_shapes(logps=logps, old_logps=old_logps, advantages=advantages)
    ratios = torch.exp(logps - old_logps)
    return torch.maximum(-advantages * ratios, -advantages * ratios.clamp(1 - clip, 1 + clip))


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2
) -> Tensor:
    """Half the squared error of each value, the larger of with and without a move of at most `clip` from the old value.

    All are (...), in units of the reward. From OpenAI's implementation of PPO; the paper has it without the clip (Eq. 9).
    """
    clip = _checked_clip(clip)
    _check_shapes(values=values, old_values=old_values, returns=returns)
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


def check_beta(beta: float) -> float:
    """`beta` as a float. Raises ValueError unless it is a positive, finite number."""
    return _number(
        "beta", beta, lambda b: b > 0, "a positive, finite number (the paper uses 0.1 to 0.5)"
    )


def check_loss_type(loss_type: str, label_smoothing: float) -> float:
    """`label_smoothing` as a float. Raises ValueError unless `loss_type` is known and the smoothing in [0, 0.5) and defined for it."""
    if loss_type not in get_args(LossType):
        raise ValueError(
            f"loss_type is {loss_type!r}; it must be one of {', '.join(get_args(LossType))}"
        )
    e = _number(
        "label_smoothing",
        label_smoothing,
        lambda e: 0 <= e < 0.5,
        "in [0, 0.5), the share of flipped labels",
    )
    if e and loss_type in ("ipo", "hinge"):
        raise ValueError(
            f"label_smoothing is {e!r} with loss_type={loss_type!r}; it is defined for sigmoid and robust"
        )
    return e


def check_pairs(chosen: Tensor, rejected: Tensor, n: int) -> None:
    """Raise unless `chosen` and `rejected` are (P,) integer indices into `n` completions that differ within each pair."""
    for name, index in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(index, Tensor) or index.dtype not in (
            torch.int64,
            torch.int32,
        ):  # torch takes uint8 for a mask
            found = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(
                f"{name} is {found}; it must be a tensor of integer indices (int64 or int32) into the completions"
            )
        if index.ndim != 1:
            raise ValueError(
                f"{name} has shape {tuple(index.shape)}; it must be (P,), one index a pair"
            )
    if len(chosen) != len(rejected):
        raise ValueError(
            f"chosen has {len(chosen)} indices and rejected {len(rejected)}; there must be one of each a pair"
        )
    for name, index in (("chosen", chosen), ("rejected", rejected)):
        outside = ((index < 0) | (index >= n)).nonzero()
        if len(outside):
            row = int(outside[0])
            raise ValueError(
                f"{name}[{row}] is {int(index[row])}; with {n} completions an index must be in 0..{n - 1}"
            )
    same = (chosen == rejected).nonzero()
    if len(same):
        row = int(same[0])
        raise ValueError(
            f"pair {row} has completion {int(chosen[row])} as chosen and as rejected; drop the pair"
        )


def _number(name: str, value: Any, allowed: Callable[[float], bool], says: str) -> float:
    """`value` as a float that is finite and `allowed`, which the error `says` in words."""
    try:
        found = number(name, value)
    except TypeError:
        found = math.nan
    if not (math.isfinite(found) and allowed(found)):
        raise ValueError(f"{name} is {value!r}; it must be {says}")
    return found


def _checked_clip(clip: float) -> float:
    return _number("clip", clip, lambda c: c > 0, "a positive, finite number (0.2 is usual)")


def _check_shapes(**tensors: Tensor) -> None:
    shapes = {name: tuple(values.shape) for name, values in tensors.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the shapes are {found}; they must be the same, one value an action")


def _check_float(name: str, values: Tensor, shape: str) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        found = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"{name} must be a floating-point tensor {shape}, found {found}")


def _check_logps(name: str, values: Tensor) -> None:
    _check_float(name, values, "(N,)")
    if values.ndim != 1:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; it must be (N,), one value a completion (sum over tokens)"
        )


def _check_finite(name: str, values: Tensor, chosen: Tensor, rejected: Tensor) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        row = int(bad[0])
        uses = [
            f"{side} of pair {int(pair)}"
            for side, index in (("chosen", chosen), ("rejected", rejected))
            for pair in (index == row).nonzero()[:1]
        ]
        raise ValueError(
            f"{name}[{row}] ({' and '.join(uses) or 'in no pair'}) is {values[row].item()}; every value must be finite. "
            "Look at that completion's tokens, or lower the learning rate if training diverged"
        )
