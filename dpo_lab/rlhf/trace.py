"""One completion, token by token: what PPO pays each token, and what the value model expects."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_lab.engine.arguments import checked, number
from dpo_lab.engine.structure import unwrapped
from dpo_lab.logprobs import Precision
from dpo_lab.models import ScalarModel
from dpo_lab.rlhf.advantages import token_rewards
from dpo_lab.rlhf.ppo import PPOConfig, Roles, annotate_rollout, batch_of


@dataclass(frozen=True)
class TokenTrace:
    """What PPO knows about each of the L tokens of a completion."""

    log_ratios: Tensor
    """(L,) nats: log pi - log pi_ref; the sum is the completion's part in the sequence KL"""
    penalties: Tensor
    """(L,) what each token pays for its log-ratio: minus `kl_coefficient` times it"""
    rewards: Tensor
    """(L,) the penalties, and the score at the last token"""
    values: Tensor
    """(L,) what the value model expected before each token"""


@checked
def trace_completion(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    value_model: ScalarModel,
    prompt: list[int],
    completion: list[int],
    score: float,
    *,
    kl_coefficient: float = 0.1,
    precision: Precision = "float32",
) -> TokenTrace:
    """What `train_ppo` computes for one completion before its advantages, in float64 on the CPU.

    Args:
        policy: the model that drew the completion, or another of the same vocabulary.
        reference: prices the KL.
        value_model: as in `train_ppo`.
        prompt: token ids, with BOS.
        completion: token ids, at least one.
        score: of the completion, in standard deviations of the reward on reference samples.
        kl_coefficient: what a nat costs, in the same units.
        precision: as in `train_ppo`.

    Raises:
        ValueError: there is no token, or a number is not finite.
    """
    score, kl_coefficient = number("score", score), number("kl_coefficient", kl_coefficient)
    if not (math.isfinite(score) and math.isfinite(kl_coefficient)):
        raise ValueError(
            f"score is {score} and kl_coefficient {kl_coefficient}; both must be finite"
        )
    if not prompt or not completion:
        raise ValueError(
            f"prompt has {len(prompt)} tokens and completion {len(completion)}; "
            "give at least one of each"
        )
    roles = Roles(unwrapped(policy), unwrapped(reference), value_model)
    for model in roles:
        model.eval()

    # a rollout of one completion
    config, part = PPOConfig(batch=1, minibatch=1), np.arange(1)
    batch = batch_of(roles, [prompt], [completion], part)
    scores = torch.tensor([score], dtype=torch.float64)
    rollout = annotate_rollout(
        roles, [completion], scores, [(part, batch)], kl_coefficient, config, precision
    )
    rewards = token_rewards(scores, rollout.penalties, rollout.mask)
    return TokenTrace(rollout.log_ratios[0], rollout.penalties[0], rewards[0], rollout.values[0])
