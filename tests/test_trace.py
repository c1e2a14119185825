"""What each token of a completion is paid is what the three models say one by one."""

import pytest
import torch

from dpo_lab.batching import completion_batch
from dpo_lab.logprobs import completion_logps
from dpo_lab.models import ScalarModel, load_model
from dpo_lab.rlhf.trace import trace_completion

PROMPT, COMPLETION = [0, 5, 6], [7, 300, 8, 0]


@pytest.fixture
def models(tiny):
    """A policy that has moved from the reference, and a value model whose head is not zero."""
    policy, reference, value = load_model(str(tiny)), load_model(str(tiny)), load_model(str(tiny))
    value = ScalarModel(value)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (*policy.parameters(), value.head.weight):
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return policy, reference, value


def test_every_token_pays_for_its_log_ratio_and_the_last_one_gets_the_score(models):
    policy, reference, value = models
    trace = trace_completion(*models, PROMPT, COMPLETION, 1.5, kl_coefficient=0.2)
    batch = completion_batch([PROMPT], [COMPLETION], [0])
    with torch.no_grad():
        logps, reference_logps = (
            completion_logps(model, batch, reduction="none").double() for model in models[:2]
        )
        values = value(batch).double()
    ratios = [float(p - q) for p, q in zip(logps, reference_logps)]
    assert max(map(abs, ratios)) > 0.01
    paid = [-0.2 * ratio for ratio in ratios]
    assert trace.log_ratios.tolist() == pytest.approx(ratios, abs=1e-5)
    assert trace.penalties.tolist() == pytest.approx(paid, abs=1e-5)
    assert trace.rewards.tolist() == pytest.approx([*paid[:-1], paid[-1] + 1.5], abs=1e-5)
    assert trace.values.tolist() == pytest.approx(values.tolist(), abs=1e-5)


def test_the_reference_pays_nothing(models):
    _, reference, value = models
    trace = trace_completion(reference, reference, value, PROMPT, COMPLETION, 1.5)
    assert not trace.log_ratios.any() and trace.rewards.tolist() == [0, 0, 0, 1.5]


@pytest.mark.parametrize(
    "prompt, completion, score, words",
    [
        ([], COMPLETION, 1.0, "prompt has 0 tokens and completion 4"),
        (PROMPT, [], 1.0, "prompt has 3 tokens and completion 0"),
        (PROMPT, COMPLETION, float("nan"), "score is nan"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(models, prompt, completion, score, words):
    with pytest.raises(ValueError, match=words):
        trace_completion(*models, prompt, completion, score)
