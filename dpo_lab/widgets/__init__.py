"""Sliders: explorers of the loss, the policy and training runs, for JupyterLab."""

from dpo_lab.widgets.explorers import (
    Explorer,
    LiveCurves,
    Picture,
    bandit_explorer,
    bandit_state,
    beta_explorer,
    beta_slider,
    beta_state,
    betas_explorer,
    bradley_terry_explorer,
    bradley_terry_state,
    frontier_explorer,
    gradient_weight_explorer,
    gradient_weight_state,
    live_curves,
    training_explorer,
)

__all__ = [
    "Explorer",
    "LiveCurves",
    "Picture",
    "bandit_explorer",
    "bandit_state",
    "beta_explorer",
    "beta_slider",
    "beta_state",
    "betas_explorer",
    "bradley_terry_explorer",
    "bradley_terry_state",
    "frontier_explorer",
    "gradient_weight_explorer",
    "gradient_weight_state",
    "live_curves",
    "training_explorer",
]
