"""Explorers over their whole grids: every state is computed right, every picture drawn, and nothing is swallowed."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_lab.losses import dpo_loss
from dpo_lab.objective import kl, log_partition, optimal_policy
from dpo_lab.widgets import (
    BETAS,
    LABELS,
    REFERENCE,
    REWARD,
    bandit_explorer,
    bandit_state,
    beta_explorer,
    beta_state,
    gradient_weight_explorer,
    gradient_weight_state,
)

EXPLORERS = {"beta": beta_explorer, "bandit": bandit_explorer, "gradient weight": gradient_weight_explorer}


def pixels(explorer):
    return np.asarray(Image.open(io.BytesIO(explorer.picture.png())))


def values(explorer):
    return {name: slider.value for name, slider in explorer.sliders.items()}


def grid(slider):
    lowest, highest = slider.min, slider.max
    steps = np.arange(lowest, highest + slider.step / 2, slider.step)
    return [slider.base**s for s in steps] if hasattr(slider, "base") else steps


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_slider_shows_every_value_of_its_grid(name):
    explorer = EXPLORERS[name]()
    start = values(explorer)
    for slider in explorer.sliders:
        for value in grid(explorer.sliders[slider]):
            readout = explorer.show(**{**start, slider: float(value)})
            assert "nan" not in readout and "inf" not in readout and readout
            assert explorer.picture.png().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", EXPLORERS)
def test_a_moved_slider_changes_the_picture_and_reset_puts_it_back(name):
    explorer = EXPLORERS[name]()
    box = explorer.box.children
    image = next(w for w in box if hasattr(w, "format"))
    reset, readout = next(w for w in box if hasattr(w, "children")).children
    before = image.value, readout.value
    explorer.sliders["beta"].value = 0.03
    assert image.value != before[0] and readout.value != before[1]
    assert image.value == explorer.picture.png()
    reset.click()
    assert (image.value, readout.value) == before


@pytest.mark.parametrize("name", EXPLORERS)
def test_a_picture_drawn_over_its_background_is_the_picture_drawn_anew(name):
    explorer = EXPLORERS[name]()
    explorer.show(**{**values(explorer), "beta": 0.4})
    quick = pixels(explorer)
    for artist in explorer.picture.artists:
        artist.set_animated(False)
    explorer.picture.canvas.draw()
    whole = np.asarray(explorer.picture.canvas.buffer_rgba())[..., :3]
    assert quick.shape == whole.shape and (np.abs(quick.astype(int) - whole).max(-1) > 60).mean() < 0.002  # grid and frame order


def test_every_control_has_a_name_for_a_screen_reader():
    for make in EXPLORERS.values():
        explorer = make()
        assert all(slider.description for slider in explorer.sliders.values())
        reset = next(w for w in explorer.box.children if hasattr(w, "children")).children[0]
        assert reset.description and reset.tooltip


@pytest.mark.parametrize("beta", BETAS[::8])
def test_the_state_of_beta_is_that_of_the_objective(beta):
    state = beta_state(float(beta))
    best = optimal_policy(REFERENCE, REWARD, float(beta))
    assert torch.equal(state["policy"], best) and state["kl"] == float(kl(best, REFERENCE))
    assert state["reward"] == pytest.approx(float(best @ REWARD)) and state["log_z"] == float(
        log_partition(REFERENCE, REWARD, beta)
    )


def test_the_bars_stand_as_high_as_the_probabilities():
    explorer = beta_explorer()
    explorer.show(beta=0.5)
    heights = [artist.get_height() for artist in explorer.picture.artists[:4]]
    assert heights == optimal_policy(REFERENCE, REWARD, 0.5).tolist()


def test_the_reference_is_what_the_weights_sum_to():
    state = bandit_state(1.0, [0.0, 0.0], [3.0, 1.0])
    assert state["reference"].tolist() == [0.75, 0.25] and state["policy"].tolist() == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge", "robust"])
def test_pairs_are_weighed_as_the_loss_weighs_them(kind):
    log_ratios = torch.tensor([-3.0, 0.0, 5.0], dtype=torch.float64)
    state = gradient_weight_state(0.3, log_ratios, kind)
    for i, ratio in enumerate(log_ratios):
        logps = torch.stack([ratio, torch.zeros_like(ratio)])
        alone = dpo_loss(logps, torch.zeros(2, dtype=torch.float64), torch.tensor([0]), torch.tensor([1]), 0.3, kind=kind)
        assert state["weights"][i] == alone.gradient_weights.item() and state["losses"][i] == alone.losses.item()


def test_your_own_distribution_and_pairs_can_be_explored():
    three = beta_explorer(torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.0, 1.0, 0.0]), ["a", "b", "c"])
    assert "KL" in three.show(beta=1.0) and len(LABELS) == 4
    assert "ranked rightly 50%" in gradient_weight_explorer([-1.0, 1.0]).show(beta=1.0)


@pytest.mark.parametrize("wrong", [[], [float("nan")], [[1.0]]])
def test_pairs_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="log_ratios has shape"):
        gradient_weight_explorer(wrong)
