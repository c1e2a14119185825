"""The mathematics of DPO on distributions small enough to enumerate: numpy and torch, and sympy.

`from dpo_lab.theory import symbolic` imports the derivations; sympy takes a second to load.
"""

from dpo_lab.theory.bandit import (
    all_pairs,
    exact_gradient,
    gradient_descent,
    minimize,
    pair_weights,
    penalized_rewards,
    policy_gradient,
    reinforce_gradients,
    sample_pairs,
)
from dpo_lab.theory.bradley_terry import (
    BradleyTerryFit,
    fit_bradley_terry,
    fit_plackett_luce,
)
from dpo_lab.theory.frontier import OptimalFrontier, best_of_n, frontier_band, optimal_frontier
from dpo_lab.theory.landscape import METHODS, Landscape, method_paths
from dpo_lab.theory.log_linear import (
    Prompts,
    draw_prompts,
    label_pairs,
    labeled_loss,
    log_linear_descent,
    log_linear_policy,
)
from dpo_lab.theory.many_seeds import at_best_rate, dpo_runs, policy_gradient_runs
from dpo_lab.theory.objective import (
    implicit_reward,
    kl,
    log_partition,
    objective_value,
    optimal_policy,
    value_gap,
)
from dpo_lab.theory.on_policy import (
    OnPolicyRuns,
    TunedRuns,
    exact_rounds,
    on_policy_runs,
    self_play_rounds,
    tuned_runs,
)

__all__ = [
    "BradleyTerryFit",
    "Landscape",
    "METHODS",
    "OnPolicyRuns",
    "OptimalFrontier",
    "Prompts",
    "TunedRuns",
    "all_pairs",
    "at_best_rate",
    "best_of_n",
    "dpo_runs",
    "draw_prompts",
    "exact_gradient",
    "exact_rounds",
    "fit_bradley_terry",
    "fit_plackett_luce",
    "frontier_band",
    "gradient_descent",
    "implicit_reward",
    "kl",
    "label_pairs",
    "labeled_loss",
    "log_linear_descent",
    "log_linear_policy",
    "log_partition",
    "method_paths",
    "minimize",
    "objective_value",
    "on_policy_runs",
    "optimal_frontier",
    "optimal_policy",
    "pair_weights",
    "penalized_rewards",
    "policy_gradient",
    "policy_gradient_runs",
    "reinforce_gradients",
    "sample_pairs",
    "self_play_rounds",
    "tuned_runs",
    "value_gap",
]
