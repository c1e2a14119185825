"""The precision is what is fast here, and what it costs is told."""

import itertools
import math

import pytest
import torch

from dpo_lab.batching import completion_batch
from dpo_lab.logprobs import completion_logps
from dpo_lab.models import load_model
from dpo_lab.sentiment import precision as machine
from dpo_lab.sentiment.precision import PrecisionTest, measure_precision


def test_bfloat16_is_chosen_where_it_is_fast_and_its_error_is_told():
    fast, slow = PrecisionTest(2.4, 0.1, 0.004), PrecisionTest(0.7, 0.1, 0.004)
    assert (fast.choice, slow.choice) == ("bfloat16", "float32")
    assert "2.4 times" in str(fast) and "0.100 nats" in str(fast) and "0.0040" in str(fast)


def test_the_measured_errors_are_those_of_the_log_probs_and_of_the_loss(tiny, monkeypatch):
    """The clock is made up, float32 three times as slow; log-probs, loss and gradients are real."""
    model = load_model(str(tiny))
    batch = completion_batch([[1, 2, 3]], [[i + 4] * 9 for i in range(6)], [0] * 6)
    # begin, end in float32, begin, end in bfloat16
    clock = itertools.accumulate(itertools.cycle([0.0, 3.0, 0.0, 1.0]))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    test = measure_precision(model, batch, beta=0.5, repeats=2)
    wide = completion_logps(model, batch).detach()
    with torch.autocast("cpu", torch.bfloat16):
        error = completion_logps(model, batch).detach() - wide
    loss_error = torch.log1p(torch.exp(-0.5 * (error[:3] - error[3:]))) - math.log(2)
    assert test.speedup == pytest.approx(3)
    assert (
        test.logps_error == pytest.approx(error.square().mean().sqrt().item(), rel=1e-6)
        and test.logps_error > 0
    )
    assert test.loss_error == pytest.approx(loss_error.square().mean().sqrt().item(), rel=1e-4)
    assert all(p.grad is None for p in model.parameters())
