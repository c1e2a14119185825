"""Mistakes as functions, and what they drive: the right function reaches the truth."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from driven import DRIVES, measured  # noqa: E402
from mistaken import LOGPS_MISTAKES, mistaken, mistaken_logps, singles  # noqa: E402

from dpo_lab import dpo_loss  # noqa: E402
from dpo_lab.checks import EXERCISES  # noqa: E402

# the first number of the right function: 0, but for rounding, steps of ascent and the grid of
# margins; PPO's long steps keep it moving about the optimum
NEAR = {"gae": 1e-4, "smoothed_loss": 1e-4, "sequence_kl": 1e-4, "ppo_clip": 0.01}


@pytest.mark.parametrize("exercise", DRIVES)
def test_the_right_function_leads_to_the_truth(exercise):
    found = DRIVES[exercise].measure({})
    assert next(iter(found.values())) <= NEAR.get(exercise, 1e-8)
    assert all(np.isfinite(value) for value in found.values())


def test_every_exercise_drives_something():
    assert set(DRIVES) == set(EXERCISES)


def test_a_mistake_has_its_numbers_or_the_reason_why_it_has_none():
    rows = {row["name"]: row for row in measured("optimal_policy")}
    assert rows["not normalized"]["numbers"]["sum"] > 4
    assert rows["sign"]["numbers"]["KL to pi*"] > 1
    rows = {row["name"]: row for row in measured("log_partition")}
    assert rows["not summed"]["unusable"] == "shape (1, 4) where (1,) is needed"
    assert rows["mean of r / beta"]["numbers"]["KL of pi_ref to pi*"] == pytest.approx(0)


def test_a_mistaken_loss_has_the_gradient_of_its_numbers():
    logps = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    pairs = torch.tensor([0, 2]), torch.tensor([1, 0])
    data = (torch.zeros(3, dtype=torch.float64), *pairs, 0.3)
    ours, exact = (
        torch.autograd.grad(loss(logps, *data).sum(), logps)[0]
        for loss in (mistaken("dpo_loss", {}), lambda *given: dpo_loss(*given).losses)
    )
    assert torch.allclose(ours, exact, atol=1e-8)


def test_log_probs_that_train_have_the_numbers_of_the_table():
    exercise = EXERCISES["sequence_logps"]
    assert dict(singles(exercise)).items() >= LOGPS_MISTAKES.items()
    for seed, (name, settings) in enumerate(LOGPS_MISTAKES.items()):
        for inputs in exercise.cases(seed):
            given = (torch.as_tensor(inputs[key]) for key in inputs)
            found = mistaken_logps(*given, settings).numpy()
            assert np.allclose(found, exercise.compute(inputs, settings)), name
