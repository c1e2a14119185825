"""DPO's relatives: SimPO, ORPO, CPO, AOT and KTO, each a pure function under its paper's equation.

The objects `SimPO`, `ORPO`, `CPO` and `AOT` go into `train_dpo(..., loss=SimPO())`; `train_kto`
trains by KTO, whose data has no pairs. IPO, the hinge and EXO are functions of DPO's margin alone,
and so are names in `MARGIN_LOSSES`. docs/losses.md has all losses in one table.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_lab.engine.arguments import checked, one_of
from dpo_lab.losses import (
    DPOLoss,
    check_beta,
    check_both,
    check_finite,
    check_logps,
    check_number,
    check_pairs,
)

NLL = Literal["mean", "sum"]


class KTOLoss(NamedTuple):
    """What `kto_loss` returns. Only the losses carry a gradient."""

    losses: Tensor
    """(R,) one per rated completion"""
    rewards: Tensor
    """(R,) implicit rewards, beta * (policy_logps - reference_logps)"""
    gradient_weights: Tensor
    """(R,) how strongly each reward is pushed: the size of the derivative of the loss with respect
    to it"""


# pairs


def simpo_loss(
    policy_logps: Tensor,
    lengths: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    gamma: float,
    *,
    check_values: bool = True,
) -> DPOLoss:
    """SimPO: -log sigma(m - gamma) with the reward r = beta * log pi(y|x) / len(y), (P,) nats.

    m = r[chosen] - r[rejected] is the margin. The reward is the mean log-prob of a token, so there
    is no reference and no KL constraint; gamma is the margin that is asked for. Its gradient weight
    is sigma(gamma - m). Eq. 6 of Meng et al. 2024, https://arxiv.org/abs/2405.14734

    Args:
        policy_logps: (N,) log pi(y|x) in nats, summed over the tokens of each completion.
        lengths: (N,) the number of tokens that each of these sums is over.
        chosen: (P,) integer indices into the N completions.
        rejected: (P,) integer indices into the N completions.
        beta: scale of the reward, positive; larger than DPO's, since it multiplies nats per token.
        gamma: the target margin, in units of beta x nats per token, 0 or more.
        check_values: whether to look at the values of the tensors; on a GPU that waits for them.

    Raises:
        ValueError, TypeError: naming the argument, the value found and what is allowed.
    """
    beta, gamma = check_beta(beta), _not_negative("gamma", gamma, "the target margin")
    _check_policy(policy_logps, chosen, rejected, check_values)
    _check_lengths(lengths, policy_logps, check_values)

    rewards = beta * policy_logps / lengths  # (N,)
    margins = rewards[chosen] - rewards[rejected]  # (P,)
    return _result(-F.logsigmoid(margins - gamma), rewards, margins, torch.sigmoid(gamma - margins))


def orpo_loss(
    policy_logps: Tensor,
    lengths: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    weight: float = 0.1,
    *,
    check_values: bool = True,
) -> DPOLoss:
    """ORPO: SFT on the chosen completion plus `weight` times the loss of a log odds ratio, (P,).

    With the mean log-prob of a token l = log pi(y|x) / len(y) and p = exp(l), a completion's odds
    are p / (1 - p). Its reward here is the log of them, and the loss of a pair is
    -l[chosen] - weight * log sigma(m), where m is the difference of the two log-odds. No reference,
    and no beta. The gradient weight, weight * sigma(-m), is that of the second part alone.
    Eq. 3, 4, 6 and 7 of Hong et al. 2024, https://arxiv.org/abs/2403.07691

    Args:
        policy_logps: (N,) log pi(y|x) in nats, summed over tokens; below 0.
        lengths: (N,) the number of tokens that each of these sums is over.
        chosen: (P,) integer indices into the N completions.
        rejected: (P,) integer indices into the N completions.
        weight: the paper's lambda, which TRL's `ORPOConfig` calls beta; 0 or more.
        check_values: whether to look at the values of the tensors; on a GPU that waits for them.

    Raises:
        ValueError, TypeError: naming the argument, the value found and what is allowed.
    """
    weight = _not_negative("weight", weight, "of the odds ratio; 0 is SFT on the chosen")
    _check_policy(policy_logps, chosen, rejected, check_values)
    _check_lengths(lengths, policy_logps, check_values)
    if check_values:
        _check_below_zero(policy_logps)

    mean = policy_logps / lengths  # (N,)
    log_odds = mean - torch.log(-torch.expm1(mean))  # (N,)
    margins = log_odds[chosen] - log_odds[rejected]  # (P,)
    losses = -mean[chosen] - weight * F.logsigmoid(margins)
    return _result(losses, log_odds, margins, weight * torch.sigmoid(-margins))


@checked
def cpo_loss(
    policy_logps: Tensor,
    lengths: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    *,
    alpha: float = 1.0,
    nll: NLL = "mean",
    check_values: bool = True,
) -> DPOLoss:
    """CPO: DPO's loss with a uniform reference, plus `alpha` times the NLL of the chosen, (P,).

    The reward is r = beta * log pi(y|x), and the loss -log sigma(m) - alpha * log pi(chosen): a
    uniform reference gives all completions the same log-prob, which cancels in the margin m. The
    second part keeps the policy near the chosen completions, in place of a reference. The gradient
    weight, sigma(-m), is that of the first part alone.
    Eq. 3 and the objective after it in Xu et al. 2024, https://arxiv.org/abs/2401.08417

    Args:
        policy_logps: (N,) log pi(y|x) in nats, summed over the tokens of each completion.
        lengths: (N,) the number of tokens that each of these sums is over.
        chosen: (P,) integer indices into the N completions.
        rejected: (P,) integer indices into the N completions.
        beta: scale of the reward, positive.
        alpha: weight of the NLL, 0 or more; the paper's is 1.
        nll: "sum" over the tokens of the chosen completion, as the paper writes it, or their
            "mean", which is near to what TRL's trainer computes, by an author of the paper.
        check_values: whether to look at the values of the tensors; on a GPU that waits for them.

    Raises:
        ValueError, TypeError: naming the argument, the value found and what is allowed.
    """
    beta, alpha = check_beta(beta), _not_negative("alpha", alpha, "the weight of the NLL")
    _check_policy(policy_logps, chosen, rejected, check_values)
    _check_lengths(lengths, policy_logps, check_values)

    rewards = beta * policy_logps  # (N,)
    margins = rewards[chosen] - rewards[rejected]  # (P,)
    likelihoods = policy_logps / lengths if nll == "mean" else policy_logps  # (N,)
    losses = -F.logsigmoid(margins) - alpha * likelihoods[chosen]
    return _result(losses, rewards, margins, torch.sigmoid(-margins))


def aot_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    *,
    check_values: bool = True,
) -> DPOLoss:
    """AOT on pairs: -log sigma of the sorted policy's ratios minus the sorted reference's, (P,).

    A ratio is log pi(chosen) - log pi(rejected). DPO subtracts from the policy's ratio of a pair
    the reference's ratio of the same pair; AOT that of the pair which has the same rank in the
    batch. So it asks that the distribution of the policy's ratios lie above that of the
    reference's, not each ratio above its own. This is optimal transport between the two, which in
    one dimension sorting solves. A batch of one pair is DPO's loss.
    The paired variant, with the logistic loss, of Melnyk et al. 2024,
    https://arxiv.org/abs/2406.05882

    Losses and gradient weights stand in the order of the pairs, and `rewards` and `margins` are
    DPO's. The gradient weight is sigma of minus beta times the difference of the two ratios. The
    sorting is over the pairs of one call: in training, over those of one forward pass.

    Args:
        policy_logps: (N,) log pi(y|x) in nats, summed over the tokens of each completion.
        reference_logps: (N,) log pi_ref(y|x) in nats.
        chosen: (P,) integer indices into the N completions.
        rejected: (P,) integer indices into the N completions.
        beta: scale of the ratios, positive.
        check_values: whether to look at the values of the tensors; on a GPU that waits for them.

    Raises:
        ValueError, TypeError: naming the argument, the value found and what is allowed.
    """
    beta = check_beta(beta)
    check_both(policy_logps, reference_logps)
    if check_values:
        _check_policy(policy_logps, chosen, rejected, check_values)
        check_finite("reference_logps", reference_logps, {"chosen": chosen, "rejected": rejected})

    # the reference's ratio that has the rank of each policy's ratio
    ratios = policy_logps[chosen] - policy_logps[rejected]  # (P,)
    ordered = (reference_logps[chosen] - reference_logps[rejected]).sort().values
    matched = ordered[ratios.detach().argsort(stable=True).argsort()]
    distances = beta * (ratios - matched)

    rewards = beta * (policy_logps - reference_logps)  # (N,)
    margins = rewards[chosen] - rewards[rejected]
    return _result(-F.logsigmoid(distances), rewards, margins, torch.sigmoid(-distances))


# completions without pairs


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    reference_point: Tensor | float,
    beta: float,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLoss:
    """KTO: the loss of completions that are each called desirable or undesirable, (R,).

    With the log-ratio l = log pi - log pi_ref and the reference point z0, a desirable completion
    costs w * (1 - sigma(beta * (l - z0))) and an undesirable one w * (1 - sigma(beta * (z0 - l))).
    The loss saturates on both sides, so its gradient weight w * sigma' is largest near z0, and
    vanishes for what is very well or very badly fitted. `kto_reference_point` estimates z0.
    Section 4 of Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306

    Args:
        policy_logps: (R,) log pi(y|x) in nats, summed over the tokens of each completion.
        reference_logps: (R,) log pi_ref(y|x) in nats.
        desirable: (R,) booleans.
        reference_point: z0 in nats, one number, which gets no gradient.
        beta: scale of the log-ratios, positive.
        desirable_weight: the paper's lambda_D, 0 or more.
        undesirable_weight: the paper's lambda_U, 0 or more.

    Raises:
        ValueError, TypeError: naming the argument, the value found and what is allowed.
    """
    beta = check_beta(beta)
    desirable_weight, undesirable_weight = check_kto_weights(desirable_weight, undesirable_weight)
    check_both(policy_logps, reference_logps)
    _check_desirable(desirable, policy_logps)
    z0 = torch.as_tensor(reference_point, dtype=policy_logps.dtype, device=policy_logps.device)
    if z0.ndim:
        raise ValueError(
            f"reference_point has shape {tuple(z0.shape)}; it must be one number for all "
            "completions, as kto_reference_point gives it"
        )

    ratios = policy_logps - reference_logps  # (R,)
    signs = torch.where(desirable, 1.0, -1.0).to(ratios)
    sides = ratios.new_tensor([undesirable_weight, desirable_weight])
    weights = sides[desirable.long()]
    gains = signs * beta * (ratios - z0.detach())
    losses = weights * torch.sigmoid(-gains)
    slopes = losses * torch.sigmoid(gains)
    return KTOLoss(losses, (beta * ratios).detach(), slopes.detach())


def kto_reference_point(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """KTO's z0: the mean log-ratio of completions after prompts that are not theirs, at least 0.

    An estimate of KL(pi || pi_ref), in nats, from what is in the batch. It is biased, since these
    completions were not drawn from pi: it is a reference point, not a measurement of the KL. A
    tensor of no dimension, without a gradient. Section 4 of Ethayarajh et al. 2024.

    Args:
        policy_logps: (M,) log pi(y' | x) in nats of completions y' that belong to other prompts.
        reference_logps: (M,) log pi_ref(y' | x) in nats of the same.

    Raises:
        ValueError, TypeError: naming the argument, the value found and what is allowed.
    """
    check_both(policy_logps, reference_logps)
    if not len(policy_logps):
        raise ValueError("policy_logps is empty; z0 is a mean over at least one completion")
    return (policy_logps - reference_logps).mean().clamp(min=0).detach()


# what train_dpo takes as its `loss`


@dataclass(frozen=True)
class SimPO:
    """`simpo_loss` for `train_dpo(..., loss=SimPO())`; beta is that of `DPOConfig`.

    No reference log-probs are needed. The paper's beta is between 2 and 10.
    """

    gamma_ratio: float = 0.5
    """gamma / beta, in nats per token: by how much the chosen completion's mean log-prob shall be
    higher"""
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _not_negative("gamma_ratio", self.gamma_ratio, "gamma over beta")

    def __call__(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor | None,
        chosen: Tensor,
        rejected: Tensor,
        beta: float,
        *,
        lengths: Tensor,
    ) -> DPOLoss:
        """The loss of each pair; `reference_logps` is not read."""
        pairs, gamma = (chosen, rejected), self.gamma_ratio * beta
        return simpo_loss(policy_logps, lengths, *pairs, beta, gamma, check_values=False)


@dataclass(frozen=True)
class ORPO:
    """`orpo_loss` for `train_dpo(..., loss=ORPO())`; the beta of `DPOConfig` is not read.

    No reference log-probs are needed.
    """

    weight: float = 0.1
    """the paper's lambda, of the odds ratio"""
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _not_negative("weight", self.weight, "of the odds ratio; 0 is SFT on the chosen")

    def __call__(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor | None,
        chosen: Tensor,
        rejected: Tensor,
        beta: float,
        *,
        lengths: Tensor,
    ) -> DPOLoss:
        """The loss of each pair; `reference_logps` and `beta` are not read."""
        pairs = (chosen, rejected)
        return orpo_loss(policy_logps, lengths, *pairs, self.weight, check_values=False)


@dataclass(frozen=True)
class CPO:
    """`cpo_loss` for `train_dpo(..., loss=CPO())`; beta is that of `DPOConfig`.

    No reference log-probs are needed.
    """

    alpha: float = 1.0
    """weight of the NLL of the chosen completion"""
    nll: NLL = "mean"
    """over the tokens of the chosen completion, or their "sum" as the paper writes it"""
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _not_negative("alpha", self.alpha, "the weight of the NLL")
        one_of("nll", self.nll, NLL)

    def __call__(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor | None,
        chosen: Tensor,
        rejected: Tensor,
        beta: float,
        *,
        lengths: Tensor,
    ) -> DPOLoss:
        """The loss of each pair; `reference_logps` is not read."""
        options = {"alpha": self.alpha, "nll": self.nll, "check_values": False}
        return cpo_loss(policy_logps, lengths, chosen, rejected, beta, **options)


@dataclass(frozen=True)
class AOT:
    """`aot_loss` for `train_dpo(..., loss=AOT())`; beta is that of `DPOConfig`.

    With gradient_accumulation_steps, and in several processes, pairs are sorted among those of one
    forward pass, so the loss depends on how many there are.
    """

    def __call__(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        beta: float,
    ) -> DPOLoss:
        """The loss of each pair."""
        data = (policy_logps, reference_logps, chosen, rejected, beta)
        return aot_loss(*data, check_values=False)


# checks


def check_kto_weights(desirable_weight: float, undesirable_weight: float) -> tuple[float, float]:
    """Both as floats. Raises ValueError unless they are 0 or more, and one of them positive."""
    found = (
        _not_negative("desirable_weight", desirable_weight, "of desirable completions"),
        _not_negative("undesirable_weight", undesirable_weight, "of undesirable completions"),
    )
    if not any(found):
        raise ValueError(
            "desirable_weight and undesirable_weight are both 0; at least one must be positive"
        )
    return found


def _result(losses: Tensor, rewards: Tensor, margins: Tensor, weights: Tensor) -> DPOLoss:
    """A `DPOLoss` in which only the losses carry a gradient."""
    return DPOLoss(losses, rewards.detach(), margins.detach(), weights.detach())


def _not_negative(name: str, value: float, what: str) -> float:
    """`value` as a float that is finite and 0 or more."""
    return check_number(name, value, lambda v: v >= 0, f"a finite number, 0 or more: {what}")


def _check_policy(logps: Tensor, chosen: Tensor, rejected: Tensor, check_values: bool) -> None:
    """Raise unless there is one finite log-prob per completion, and two of them in each pair."""
    check_logps("policy_logps", logps)
    if check_values:
        check_pairs(chosen, rejected, len(logps))
        check_finite("policy_logps", logps, {"chosen": chosen, "rejected": rejected})


def _check_lengths(lengths: Tensor, logps: Tensor, check_values: bool) -> None:
    """Raise unless there is a positive number of tokens for each log-prob."""
    integer = isinstance(lengths, Tensor) and lengths.dtype in (torch.int64, torch.int32)
    if not integer:
        found = getattr(lengths, "dtype", type(lengths).__name__)
        raise TypeError(
            f"lengths is {found}; it must be a tensor of integers (N,), the number of tokens of "
            "each completion"
        )
    if lengths.shape != logps.shape:
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)} and policy_logps {tuple(logps.shape)}; both "
            "must be (N,), one value per completion in the same order"
        )
    if check_values and len(short := (lengths < 1).nonzero()):
        row = int(short[0])
        raise ValueError(
            f"lengths[{row}] is {int(lengths[row])}; a completion has at least 1 token, its EOS"
        )


def _check_below_zero(logps: Tensor) -> None:
    """Raise unless every log-prob is below 0, so that odds are finite."""
    if len(wrong := (logps >= 0).nonzero()):
        row = int(wrong[0])
        raise ValueError(
            f"policy_logps[{row}] is {logps[row].item()}; it must be below 0, since the odds of a "
            "completion with probability 1 are infinite"
        )


def _check_desirable(desirable: Tensor, logps: Tensor) -> None:
    """Raise unless there is a boolean for each log-prob."""
    if not isinstance(desirable, Tensor) or desirable.dtype != torch.bool:
        found = getattr(desirable, "dtype", type(desirable).__name__)
        raise TypeError(
            f"desirable is {found}; it must be a tensor of booleans (R,), True for a desirable "
            "completion"
        )
    if desirable.shape != logps.shape:
        raise ValueError(
            f"desirable has shape {tuple(desirable.shape)} and policy_logps {tuple(logps.shape)}; "
            "both must be (R,), one value per completion in the same order"
        )
