"""The learned reward against plain loops, and what it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dpo_lab.loop import LoopConfig
from dpo_lab.losses import reward_model_loss
from dpo_lab.models import ScalarModel, load_model
from dpo_lab.preferences import Preferences
from dpo_lab.rlhf.reward_model import (
    LearnedReward,
    RewardModelConfig,
    train_reward_model,
    value_model_from,
)

LOOP = LoopConfig(learning_rate=3e-3, warmup_steps=2, eval_every=4)
CONFIG = RewardModelConfig(epochs=2, batch_pairs=24, held_out=0.2, loop=LOOP)


def ranked(n=40, k=3, seed=0):
    """Completions of 2 to 6 tokens; the more of them lie below 20, the better."""
    rng = np.random.default_rng(seed)
    prompts = [[0, *rng.integers(1, 512, 3).tolist()] for _ in range(n)]
    completions, chosen, rejected = [], [], []
    for _ in range(n):
        first = len(completions)
        for rank in range(k):
            high = np.arange(rng.integers(3, 7)) < rank * 2
            completions.append((rng.integers(1, 20, len(high)) + 20 * high).tolist())
        better, worse = np.triu_indices(k, 1)
        chosen += (first + better).tolist()
        rejected += (first + worse).tolist()
    prompt_of = np.repeat(np.arange(n), k)
    return Preferences(prompts, completions, prompt_of, np.array(chosen), np.array(rejected))


def test_the_reward_is_the_head_on_the_last_token(tiny):
    """One completion after another through a plain forward pass."""
    model = ScalarModel(load_model(str(tiny)))
    assert not LearnedReward(model)([[0, 5]], [[6, 7]]).any()  # zero at first
    nn.init.normal_(model.head.weight)
    p = ranked(4)
    prompts = [p.prompts[i] for i in p.prompt_of]
    for size in (1, 5, 100):
        found = LearnedReward(model, batch_size=size)(prompts, p.completions)
        for reward, prompt, completion in zip(found, prompts, p.completions):
            with torch.no_grad():
                hidden = model.model.transformer(
                    torch.tensor([[*prompt, *completion]])
                ).last_hidden_state[0, -1]
                assert reward == pytest.approx(float(model.head(hidden)), abs=1e-4)
    assert LearnedReward(model)([], []).shape == (0,)


def test_it_learns_rankings_and_keeps_the_best_checkpoint(tiny):
    model, p = ScalarModel(load_model(str(tiny))), ranked(120)
    metrics = train_reward_model(model, p, CONFIG, progress=None)
    accuracies = [line["eval/accuracy"] for line in metrics if "eval/accuracy" in line]
    assert accuracies[0] == 0.5 and max(accuracies) > 0.8
    fresh = ranked(60, seed=1)
    rewards = LearnedReward(model)([fresh.prompts[i] for i in fresh.prompt_of], fresh.completions)
    assert np.mean(rewards[fresh.chosen] > rewards[fresh.rejected]) > 0.8


def test_weights_are_those_of_the_best_evaluation(tiny, monkeypatch):
    """A rate that ruins the model after its best evaluation: the end is the best one again."""
    model, p = ScalarModel(load_model(str(tiny))), ranked(60)
    config = replace(
        CONFIG, epochs=6, loop=replace(LOOP, learning_rate=0.3, schedule="constant", eval_every=2)
    )
    metrics = train_reward_model(model, p, config, progress=None)
    best = max(line["eval/accuracy"] for line in metrics if "eval/accuracy" in line)
    again = train_reward_model(
        model, p, replace(config, epochs=1, loop=replace(LOOP, learning_rate=1e-12)), progress=None
    )
    assert again[0]["eval/accuracy"] == best


def test_a_step_s_loss_is_instructgpt_s_on_whole_rankings(tiny):
    model, p = ScalarModel(load_model(str(tiny))), ranked(10)
    nn.init.normal_(model.head.weight)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    config = RewardModelConfig(
        epochs=1, batch_pairs=10**6, held_out=0.1, loop=replace(LOOP, warmup_steps=0)
    )
    metrics = train_reward_model(model, p, config, progress=None)
    (line,) = [line for line in metrics if "grad_norm" in line]
    model.load_state_dict(start)
    held = np.random.default_rng(0).permutation(10)[:1]
    rewards = LearnedReward(model)([p.prompts[i] for i in p.prompt_of], p.completions).reshape(
        10, 3
    )
    expected = reward_model_loss(torch.from_numpy(np.delete(rewards, held, 0))).mean()
    assert line["loss"] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.5])
def test_a_bad_fraction_is_named(tiny, held_out):
    with pytest.raises(ValueError, match="held_out is .*; give a fraction in"):
        train_reward_model(
            ScalarModel(load_model(str(tiny))), ranked(4), replace(CONFIG, held_out=held_out)
        )


def test_a_value_model_starts_from_the_reward_model_in_units_of_the_score(tiny):
    """On the completions it is given its values have mean 0 and deviation 1, in the same order."""
    model, p = ScalarModel(load_model(str(tiny))), ranked(12)
    nn.init.normal_(model.head.weight)
    reward, prompts = LearnedReward(model), [p.prompts[i] for i in p.prompt_of]
    before, head = reward(prompts, p.completions), model.head.weight.clone()

    value = value_model_from(reward, prompts, p.completions)
    after = LearnedReward(value)(prompts, p.completions)
    np.testing.assert_allclose(after, (before - before.mean()) / before.std(), atol=1e-4)
    torch.testing.assert_close(model.head.weight, head)  # a copy


@pytest.mark.parametrize("n", [0, 3])
def test_a_reward_model_that_tells_nothing_apart_is_no_start(tiny, n):
    reward = LearnedReward(ScalarModel(load_model(str(tiny))))
    with pytest.raises(ValueError, match=f"the {n} completions have the same reward"):
        value_model_from(reward, [[0, 5]] * n, [[6]] * n)
