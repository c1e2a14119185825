"""What the explorers compute: the state of a figure as a function of the sliders' values.

Every function here can be called and tested without a browser.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_lab.engine.arguments import checked, floats, integers
from dpo_lab.losses import LossType, bradley_terry_nll, dpo_loss
from dpo_lab.rlhf.advantages import gae
from dpo_lab.theory.objective import kl, log_partition, optimal_policy
from dpo_lab.widgets.figures import expanded_limits

# a distribution and rewards to begin with
REFERENCE = torch.tensor([0.35, 0.40, 0.20, 0.05], dtype=torch.float64)
REWARD = torch.tensor([-1.0, 0.0, 1.0, 1.5], dtype=torch.float64)
LABELS = ("a bore", "fine", "a joy", "a masterpiece")

# comparisons of three films to begin with: preferred, other, how often
FILMS = ("a bore", "fine", "a joy")
CHOICES = (
    ("a joy", "a bore", 18),
    ("a bore", "a joy", 2),
    ("a joy", "fine", 14),
    ("fine", "a joy", 6),
    ("fine", "a bore", 15),
    ("a bore", "fine", 5),
)
CHOSEN_FILMS, REJECTED_FILMS = (
    np.repeat([FILMS.index(row[side]) for row in CHOICES], [row[2] for row in CHOICES])
    for side in (0, 1)
)

# a curve of margins reaches this far on both sides of 0, or as far as the pairs do
LEAST_REACH = {"ipo": 1.0, "exo_pair": 10.0}
USUAL_REACH = 6.0

# of a loss that has none without it
SMOOTHING = {"exo_pair": 1e-3}


def beta_state(
    beta: float, reference: Tensor = REFERENCE, reward: Tensor = REWARD
) -> dict[str, Any]:
    """The optimal policy at beta (n,), its mean reward, its KL in nats, and log Z."""
    best = optimal_policy(reference, reward, beta)
    return {
        "policy": best,
        "reward": float(best @ reward),
        "kl": float(kl(best, reference)),
        "log_z": float(log_partition(reference, reward, beta)),
    }


def bandit_state(beta: float, reward: Sequence[float], weight: Sequence[float]) -> dict[str, Any]:
    """`beta_state` for the reference proportional to `weight`, and that reference."""
    weight = torch.from_numpy(floats("weight", weight))
    reference = weight / weight.sum()
    reward = torch.from_numpy(floats("reward", reward))
    return {"reference": reference, **beta_state(beta, reference, reward)}


@checked
def gradient_weight_state(
    beta: float, log_ratios: Sequence[float] | Tensor, loss_type: LossType = "sigmoid"
) -> dict[str, np.ndarray]:
    """Margins, losses and gradient weights (P,) of pairs.

    `log_ratios` are (P,) nats: the log-ratio of the chosen completion minus that of the rejected.
    EXO, which needs label smoothing, has its paper's.
    """
    # a pair whose chosen completion has the whole difference, and whose rejected one has 0
    log_ratios = torch.from_numpy(floats("log_ratios", log_ratios))
    logps = torch.stack([log_ratios, torch.zeros_like(log_ratios)], 1).flatten()  # (2 P,)
    chosen = torch.arange(0, 2 * len(log_ratios), 2)
    options = {"loss_type": loss_type, "label_smoothing": SMOOTHING.get(loss_type, 0.0)}
    result = dpo_loss(logps, torch.zeros_like(logps), chosen, chosen + 1, beta, **options)
    return {
        "margins": result.margins.numpy(),
        "losses": result.losses.numpy(),
        "weights": result.gradient_weights.numpy(),
    }


def on_curve(beta: float, log_ratios: Tensor, loss_type: LossType = "sigmoid") -> dict[str, Any]:
    """`gradient_weight_state` of pairs, and as `curve` that of all margins around them.

    The curve is symmetric about 0, reaches as far as the farthest pair, and contains every pair.
    """
    state = gradient_weight_state(beta, log_ratios, loss_type)
    reach = LEAST_REACH.get(loss_type, USUAL_REACH)
    _, reach = expanded_limits(np.abs(state["margins"]), 0, reach)
    line = torch.linspace(-reach, reach, 241, dtype=torch.float64) / beta
    points = torch.cat([line, log_ratios]).sort().values
    return {**state, "curve": gradient_weight_state(beta, points, loss_type)}


def usual_curve(loss_type: LossType = "sigmoid") -> Mapping[str, np.ndarray]:
    """The curve at beta = 1 around margin 0: its limits are kept as long as they hold the pairs."""
    return on_curve(1.0, torch.zeros(1, dtype=torch.float64), loss_type)["curve"]


def bradley_terry_state(
    rewards: Sequence[float], chosen: np.ndarray, rejected: np.ndarray
) -> dict[str, Any]:
    """The likelihood of P comparisons under rewards (n,): `nll` in nats per comparison.

    `predicted` and `observed` hold, for every two items that were compared, the fraction of
    comparisons that the item with the lower index wins.
    """
    values = torch.from_numpy(floats("rewards", rewards))
    chosen, rejected = integers("chosen", chosen), integers("rejected", rejected)
    nll = bradley_terry_nll(values, torch.as_tensor(chosen), torch.as_tensor(rejected))

    # how often the lower index wins, for every two items that were compared
    first, second = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    pairs, which = np.unique(np.stack([first, second], 1), axis=0, return_inverse=True)
    compared = np.bincount(which.ravel())
    won = np.bincount(which.ravel(), weights=chosen == first) / compared
    return {
        "rewards": values.tolist(),
        "nll": float(nll.mean()),
        "predicted": torch.sigmoid(values[pairs[:, 0]] - values[pairs[:, 1]]).tolist(),
        "observed": won.tolist(),
    }


def gae_state(
    lam: float, rewards: Sequence[float], values: Sequence[float], gamma: float = 1.0
) -> dict[str, np.ndarray]:
    """Advantages and returns (L,) of one completion's tokens, by `gae` at this lambda.

    `surprises` are those at lambda 0: r_t + gamma V_(t+1) - V_t.
    """
    rewards, values = (
        torch.from_numpy(floats(name, found))[None]
        for name, found in (("rewards", rewards), ("values", values))
    )
    mask = torch.ones_like(rewards, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    surprises, _ = gae(rewards, values, mask, gamma, 0.0)
    found = {"advantages": advantages, "returns": returns, "surprises": surprises}
    return {name: array[0].numpy() for name, array in found.items()}
