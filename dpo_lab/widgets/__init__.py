"""Explorers of losses, policies and training runs, written predictions, and a rating form."""

from dpo_lab.widgets.explorers import (
    Explorer,
    LiveCurves,
    Picture,
    bandit_explorer,
    beta_explorer,
    beta_slider,
    betas_explorer,
    bradley_terry_explorer,
    frontier_explorer,
    gae_explorer,
    gradient_weight_explorer,
    live_curves,
    training_explorer,
)
from dpo_lab.widgets.failures import failures_explorer, failures_state
from dpo_lab.widgets.frames import frames_html
from dpo_lab.widgets.landscape import landscape_explorer
from dpo_lab.widgets.on_policy import rounds_explorer, rounds_state
from dpo_lab.widgets.predictions import Prediction, predict
from dpo_lab.widgets.rating import RatingForm, rating_widget
from dpo_lab.widgets.states import (
    CHOSEN_FILMS,
    FILMS,
    REJECTED_FILMS,
    bandit_state,
    beta_state,
    bradley_terry_state,
    gae_state,
    gradient_weight_state,
)
from dpo_lab.widgets.tax import tax_explorer, tax_state
from dpo_lab.widgets.win_rates import prompts_explorer, prompts_state

__all__ = [
    "CHOSEN_FILMS",
    "Explorer",
    "FILMS",
    "LiveCurves",
    "Picture",
    "Prediction",
    "REJECTED_FILMS",
    "RatingForm",
    "bandit_explorer",
    "bandit_state",
    "beta_explorer",
    "beta_slider",
    "beta_state",
    "betas_explorer",
    "bradley_terry_explorer",
    "bradley_terry_state",
    "failures_explorer",
    "failures_state",
    "frames_html",
    "frontier_explorer",
    "gae_explorer",
    "gae_state",
    "gradient_weight_explorer",
    "gradient_weight_state",
    "landscape_explorer",
    "live_curves",
    "predict",
    "prompts_explorer",
    "prompts_state",
    "rating_widget",
    "rounds_explorer",
    "rounds_state",
    "tax_explorer",
    "tax_state",
    "training_explorer",
]
