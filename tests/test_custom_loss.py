"""A loss of the user's own in train_dpo: what it drives, what is refused, what a run records."""

import functools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import CONFIG, make_preferences, same, state, timeless

from dpo_lab.engine.runs import read_metrics
from dpo_lab.losses import MARGIN_LOSSES, dpo_loss
from dpo_lab.models import load_model
from dpo_lab.own_loss import loss_record
from dpo_lab.train import DPOConfig, train_dpo


@pytest.fixture(scope="module")
def preferences(tiny):
    return make_preferences(tiny)


def textbook(policy_logps, reference_logps, chosen, rejected, beta):
    """DPO as a student writes it."""
    ratios = policy_logps - reference_logps
    return -F.logsigmoid(beta * ratios[chosen] - beta * ratios[rejected])


def squared(policy_logps, reference_logps, chosen, rejected, beta):
    ratios = policy_logps - reference_logps
    return (1 - beta * (ratios[chosen] - ratios[rejected])) ** 2


def trained(tiny, preferences, **options):
    policy = load_model(str(tiny))
    return policy, train_dpo(policy, preferences, CONFIG, seed=2, progress=None, **options)


def test_a_textbook_loss_of_ones_own_trains_as_the_package_s(tiny, preferences):
    ours, expected = trained(tiny, preferences)
    theirs, found = trained(tiny, preferences, loss=textbook)
    assert len(found) == len(expected) > 2
    for a, b in zip(found, expected):
        assert set(b) - set(a) == {"gradient_weight/mean"} and not set(a) - set(b)
        for name in set(a) - {"seconds", "tokens_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-9), name
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_dpo_loss_comes_with_its_gradient_weights(tiny, preferences):
    _, expected = trained(tiny, preferences)
    policy, found = trained(tiny, preferences, loss=lambda *data: dpo_loss(*data))
    assert timeless(found) == timeless(expected)


def test_a_loss_of_another_kind_is_what_is_minimized(tiny, preferences):
    _, metrics = trained(tiny, preferences, loss=squared)
    assert metrics[0]["loss"] == pytest.approx(1, abs=1e-6)
    for line in metrics:
        assert line["rewards/margins"] == pytest.approx(
            line["rewards/chosen"] - line["rewards/rejected"], abs=1e-9
        )
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_a_loss_of_the_table_is_taken_by_its_name(tiny, preferences, monkeypatch):
    def exponential(margins, beta, label_smoothing):
        losses = torch.exp(-margins)
        return losses, losses

    with pytest.raises(ValueError, match="loss_type is 'exponential'; it must be one of 'sigmoid'"):
        train_dpo(load_model(str(tiny)), preferences, DPOConfig(loss_type="exponential"))
    monkeypatch.setitem(MARGIN_LOSSES, "exponential", exponential)
    config = replace(CONFIG, loss_type="exponential")
    metrics = train_dpo(load_model(str(tiny)), preferences, config, progress=None)
    assert metrics[0]["loss"] == pytest.approx(1, abs=1e-6)
    assert metrics[0]["gradient_weight/mean"] == pytest.approx(1, abs=1e-6)


def of_python(*data):
    return [0.5]


def averaged(*data):
    return textbook(*data).mean()


def of_completions(policy_logps, *data):
    return -policy_logps.repeat(2)


def counted(*data):
    return torch.zeros(len(data[2]), dtype=torch.int64)


def undefined(*data):
    return textbook(*data) * math.nan


def infinite(*data):
    return textbook(*data) + math.inf


def detached(policy_logps, *data):
    return textbook(policy_logps.detach(), *data)


def of_the_reference(policy_logps, reference_logps, chosen, rejected, beta):
    other = reference_logps.clone().requires_grad_()
    return textbook(other, reference_logps, chosen, rejected, beta)


def rooted(*data):
    return (textbook(*data) - math.log(2)).abs().sqrt()


def half_a_dpo_loss(*data):
    return dpo_loss(*data)._replace(rewards=torch.zeros(1))


BAD = [
    (of_python, TypeError, r"loss \(test_custom_loss.of_python\) returned losses as list"),
    (averaged, ValueError, r"losses of shape \(\) .* must be \(12,\), .* nor averaged"),
    (of_completions, ValueError, r"losses of shape \(\d+,\) for \d+ completions and 12 pairs"),
    (counted, TypeError, "returned losses as torch.int64; it must return a floating-point"),
    (undefined, ValueError, r"losses\[0\] of loss .*undefined.* is nan .* must be finite"),
    (infinite, ValueError, r"losses\[0\] of loss .*infinite.* is inf"),
    (detached, ValueError, "without a gradient with respect to policy_logps"),
    (of_the_reference, ValueError, "without a gradient with respect to policy_logps"),
    (rooted, ValueError, "the gradient of loss .* is not finite"),
    (half_a_dpo_loss, ValueError, r"returned rewards of shape \(1,\)"),
    ("ipo", TypeError, "loss is 'ipo'; it must be a function .* config.loss_type"),
]


NAMES = [getattr(loss, "__name__", loss) for loss, *_ in BAD]


@pytest.mark.parametrize("loss, error, message", BAD, ids=NAMES)
def test_a_wrong_return_is_named_before_anything_is_trained_or_written(
    tiny, preferences, tmp_path, loss, error, message
):
    policy = load_model(str(tiny))
    before, randomness = state(policy), torch.get_rng_state()
    seen, run = [], tmp_path / "run"
    with pytest.raises(error, match=message):
        train_dpo(
            *(policy, preferences, CONFIG),
            loss=loss,
            run=run,
            callback=lambda *a: seen.append(a) or {},
            progress=None,
        )
    assert same(before, state(policy)) and torch.equal(randomness, torch.get_rng_state())
    assert not seen and not run.exists()


def test_a_loss_and_a_loss_type_at_once_are_refused(tiny, preferences):
    for change in ({"loss_type": "ipo"}, {"label_smoothing": 0.1}):
        with pytest.raises(ValueError, match="which it does not see; leave them at their defaults"):
            train_dpo(load_model(str(tiny)), preferences, replace(CONFIG, **change), loss=textbook)


def test_trying_a_loss_draws_no_random_number(tiny, preferences):
    """A loss that draws gets the numbers of a run that did not try it first."""
    drawn = []

    def noisy(*data):
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
        return textbook(*data)

    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    trained(tiny, preferences, loss=noisy)
    assert drawn[0] == drawn[1] and len(set(drawn)) == len(drawn) - 1


def test_a_run_goes_on_with_its_own_loss_alone(tiny, preferences, tmp_path):
    class Stop(Exception):
        pass

    def stop(model, step):
        if step == 3:
            raise Stop
        return {}

    whole, expected = trained(tiny, preferences, loss=squared)
    with pytest.raises(Stop):
        trained(tiny, preferences, loss=squared, run=tmp_path, callback=stop)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["loss"]["name"] == "test_custom_loss.squared"

    lines = read_metrics(tmp_path)
    for other in (textbook, None):
        with pytest.raises(ValueError, match="holds another run .*loss.name: .*squared' there"):
            trained(tiny, preferences, loss=other, run=tmp_path, resume=True)
    assert read_metrics(tmp_path) == lines
    again, metrics = trained(tiny, preferences, loss=squared, run=tmp_path, resume=True)
    assert same(state(again), state(whole))
    assert [line for line in timeless(metrics) if "loss" in line] == timeless(expected)


def test_a_loss_s_record_follows_its_source_and_what_it_was_made_with():
    def scaled(factor, pair=None):
        def loss(*data):
            return factor * textbook(*data)

        return loss

    def other(*data):
        return 2 * textbook(*data)

    assert loss_record(scaled(2)) == loss_record(scaled(2)) != loss_record(scaled(3))
    assert loss_record(functools.partial(squared, beta=1)) != loss_record(squared)
    assert loss_record(functools.partial(squared, beta=1))["name"] == "test_custom_loss.squared"
    assert loss_record(other)["source"] != loss_record(scaled(2))["source"]


def test_a_loss_without_readable_source_is_recorded_by_its_code():
    spaces = [{}, {}, {}]
    for space, factor in zip(spaces, (1, 1, 2)):
        exec(f"def loss(*data):\n    return {factor} * len(data)", space)
    first, again, other = (loss_record(space["loss"]) for space in spaces)
    assert first == again != other


class Weighted:
    """A loss as an object."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, *data):
        return self.weight * textbook(*data)


def test_an_object_that_is_called_is_a_loss_too(tiny, preferences):
    _, once = trained(tiny, preferences, loss=Weighted(1.0))
    _, twice = trained(tiny, preferences, loss=Weighted(2.0))
    assert twice[0]["loss"] == pytest.approx(2 * once[0]["loss"], rel=1e-6)
    assert loss_record(Weighted(1.0)) == loss_record(Weighted(1.0)) != loss_record(Weighted(2.0))
    assert loss_record(Weighted(1.0))["name"] == "test_custom_loss.Weighted"
