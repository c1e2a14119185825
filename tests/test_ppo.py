"""PPO on a tiny GPT-2: the first ratio, what it improves, what it logs, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dpo_lab.batching import completion_batch
from dpo_lab.engine.runs import read_metrics
from dpo_lab.logprobs import completion_logps
from dpo_lab.losses import clipped_value_loss, ppo_clip_loss
from dpo_lab.models import ScalarModel, load_model
from dpo_lab.rlhf.ppo import (
    PPOConfig,
    Roles,
    annotate_rollout,
    batch_of,
    minibatch_losses,
    text_reward,
    train_ppo,
)

CONFIG = PPOConfig(
    steps=3, batch=8, minibatch=4, epochs=2, max_new_tokens=6, learning_rate=1e-3, eval_every=2
)
PROMPTS = [[0, 5], [0, 6, 7], [0, 8, 9, 10]]
EOS = 0


def lengths(prompts, completions):
    """Longer completions are better."""
    return np.array([len(ids) for ids in completions], dtype=float)


def low_ids(prompts, completions):
    """The share of tokens in the lower half of the vocabulary."""
    return np.array([np.mean(np.array(ids) < 256) for ids in completions])


def trained(tiny, reward=low_ids, config=CONFIG, **options):
    policy, reference, value = (
        load_model(str(tiny)),
        load_model(str(tiny)),
        ScalarModel(load_model(str(tiny))),
    )
    metrics = train_ppo(
        policy,
        reference,
        value,
        reward,
        PROMPTS,
        config,
        eos_token_id=EOS,
        progress=None,
        **options,
    )
    return policy, metrics


def lines_of(metrics):
    return [line for line in metrics if "objective/kl" in line]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_at_first_the_policy_is_the_reference_and_every_ratio_is_one(tiny, precision):
    _, metrics = trained(
        tiny, config=replace(CONFIG, steps=1, epochs=1, minibatch=8), precision=precision
    )
    (line,) = lines_of(metrics)
    assert (
        line["objective/kl"]
        == line["policy/approx_kl"]
        == line["policy/clip_fraction"]
        == line["policy/ratio_off"]
        == 0
    )
    # whitened advantages have mean zero
    assert line["policy/ratio"] == 1 and abs(line["policy/loss"]) < 1e-9


def test_the_first_minibatch_of_every_rollout_has_ratio_one(tiny, monkeypatch):
    import dpo_lab.rlhf.ppo as ppo

    seen, original = [], ppo.minibatch_losses
    monkeypatch.setattr(ppo, "minibatch_losses", lambda *a: seen.append(original(*a)) or seen[-1])
    trained(tiny)
    offs = [stats["policy/ratio_off"] for *_, stats in seen]
    assert len(offs) == 12 and offs[0] == offs[4] == offs[8] == 0 and min(offs[1:4]) > 0


@pytest.mark.parametrize("seed", range(5))
def test_the_reward_rises_in_every_seed(tiny, seed):
    config = replace(
        CONFIG, steps=20, batch=32, minibatch=16, learning_rate=5e-3, kl_coefficient=0.02
    )
    _, metrics = trained(tiny, config=config, seed=seed)
    rewards = [line["objective/reward"] for line in lines_of(metrics)]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2


def test_a_run_repeats_to_the_last_digit_and_another_seed_differs(tiny, tmp_path):
    first, again, other = (
        trained(tiny, seed=seed, run=run)[1] for seed, run in ((1, tmp_path), (1, None), (2, None))
    )
    timeless = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in m]
        for m in (first, again, other)
    ]
    assert timeless[0] == timeless[1] != timeless[2]
    assert read_metrics(tmp_path) == first


def test_ppo_does_not_add_to_another_run_s_metrics(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    trained(tiny, run="~/run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match="holds the metrics of an earlier run.*another run directory.*delete"
    ):
        trained(tiny, run=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_the_minibatch_loss_is_that_of_a_loop_over_completions(tiny):
    """One completion after another through plain forward passes, in float64."""
    roles = Roles(
        load_model(str(tiny)).double(),
        load_model(str(tiny)).double(),
        ScalarModel(load_model(str(tiny)).double()),
    )
    nn.init.normal_(roles.value.head.weight, std=0.3)
    prompts, completions = PROMPTS + [[0]], [[4, 9, 2], [7], [3, 3], [11, 12, 13, 0]]
    config = replace(CONFIG, temperature=0.8, whiten_rewards=False, kl_coefficient=0.3)
    minibatches = [
        (part, batch_of(roles, prompts, completions, part))
        for part in (np.array([2, 0]), np.array([3, 1]))
    ]
    scores = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)
    rollout = annotate_rollout(roles, completions, scores, minibatches, 0.3, config, "float32")
    with torch.no_grad():
        for parameter in roles.policy.parameters():
            parameter += 0.01 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            )
    part, batch = minibatches[0]
    policy_loss, value_loss, _ = minibatch_losses(roles, rollout, part, batch, config, "float32")
    policy_terms, value_terms = [], []
    for i in part:
        ids = torch.tensor([[*prompts[i], *completions[i]]])
        places = slice(len(prompts[i]) - 1, -1)
        table = torch.log_softmax(roles.policy(ids).logits[0, places] / 0.8, 1)
        logps = table.gather(1, torch.tensor(completions[i])[:, None])[:, 0]
        hidden = roles.value.model.transformer(ids).last_hidden_state[0, places]
        values, n = roles.value.head(hidden)[:, 0].double(), len(completions[i])
        policy_terms += ppo_clip_loss(
            logps, rollout.logps[i, :n], rollout.advantages[i, :n], config.clip
        )
        value_terms += clipped_value_loss(
            values, rollout.values[i, :n], rollout.returns[i, :n], config.value_clip
        )
    assert float(policy_loss.detach()) == pytest.approx(
        float(torch.stack(policy_terms).mean().detach()), abs=1e-9
    )
    assert float(value_loss.detach()) == pytest.approx(
        float(torch.stack(value_terms).mean().detach()), abs=1e-6
    )


def test_a_value_model_learns_at_a_rate_of_its_own(tiny):
    def by_prompt(prompts, completions):
        return np.array([float(len(prompt)) for prompt in prompts])

    def explained(value_learning_rate):
        config = replace(
            CONFIG, steps=12, learning_rate=1e-9, value_learning_rate=value_learning_rate
        )
        return lines_of(trained(tiny, by_prompt, config)[1])[-1]["value/explained"]

    assert explained(3e-3) > 0.5 and explained(1e-9) == pytest.approx(0, abs=1e-3)


def test_a_rollout_pays_for_kl_and_is_scored_at_its_end(tiny):
    roles = Roles(load_model(str(tiny)), load_model(str(tiny)), ScalarModel(load_model(str(tiny))))
    with torch.no_grad():
        roles.policy.transformer.wte.weight.mul_(1.2)
    completions = [[4, 9, 2], [7]]
    minibatches = [(np.array([0, 1]), batch_of(roles, PROMPTS[:2], completions, np.array([0, 1])))]
    config = replace(CONFIG, whiten_rewards=False, lam=1.0)
    rollout = annotate_rollout(
        roles, completions, torch.tensor([2.0, -1.0]).double(), minibatches, 0.5, config, "float32"
    )
    batch = completion_batch(PROMPTS[:2], completions, [0, 1])
    with torch.no_grad():
        kl = completion_logps(roles.policy, batch) - completion_logps(roles.reference, batch)
    torch.testing.assert_close(rollout.log_ratios.sum(1), kl, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        rollout.returns[:, 0], torch.tensor([2.0, -1.0]).double() - 0.5 * kl, rtol=0, atol=1e-5
    )


def test_the_coefficient_follows_its_target(tiny):
    config = replace(CONFIG, steps=4, kl_target=1e-6, kl_gain=0.5, epochs=4)
    lines = lines_of(trained(tiny, config=config)[1])
    for line, after in zip(lines, lines[1:]):  # the first rollout has KL 0, below any target
        factor = 1.1 if line["objective/kl"] > 1e-6 else 0.9
        assert after["kl_coefficient"] == pytest.approx(factor * line["kl_coefficient"])
    fixed = [line["kl_coefficient"] for line in lines_of(trained(tiny)[1])]
    assert fixed == [0.1] * 3


def test_ptx_adds_the_language_model_loss(tiny):
    text = completion_batch([[0]], [[5, 6, 7, 8, 9]], [0])
    asked = []
    config = replace(CONFIG, ptx_coefficient=5.0, steps=5, kl_coefficient=0.0)
    policy, metrics = trained(tiny, config=config, ptx=lambda: asked.append(1) or text)
    assert len(asked) == 5 * 4
    losses = [line["policy/ptx_loss"] for line in lines_of(metrics)]
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        assert completion_logps(policy, text) > completion_logps(load_model(str(tiny)), text) + 1


@pytest.mark.parametrize("gamma", [0.0, 0.5, 27.8])
def test_ptx_adds_gamma_times_the_gradient_per_token_of_the_text(tiny, gamma, monkeypatch):
    """Eq. 2 of Ouyang et al. 2022, minimized: PPO's gradient, and that of gamma nats per token."""
    text = completion_batch([[0]] * 2, [[5, 6, 7, 8, 9], [4, 3]], range(2))
    gradients = []

    def kept(roles, optimizer, loss, norm):
        loss.backward()
        found = [p.grad.double().flatten().clone() for p in roles.policy.parameters()]
        gradients.append(torch.cat(found))
        optimizer.zero_grad()
        return 1.0

    monkeypatch.setattr("dpo_lab.rlhf.ppo.update", kept)
    once = replace(CONFIG, steps=1, epochs=1, minibatch=8)
    policy, _ = trained(tiny, config=once)
    trained(tiny, config=replace(once, ptx_coefficient=gamma), ptx=lambda: text)

    # the text's by a plain sum over its seven tokens, one row at a time
    total = 0.0
    for row in ([0, 5, 6, 7, 8, 9], [0, 4, 3]):
        logits = policy(torch.tensor([row])).logits[0, :-1]
        total = total - logits.log_softmax(-1)[range(len(row) - 1), row[1:]].sum()
    policy.zero_grad()
    (total / 7).backward()
    ptx = torch.cat([p.grad.double().flatten() for p in policy.parameters()])
    alone, both = gradients
    torch.testing.assert_close(both, alone + gamma * ptx, rtol=1e-4, atol=1e-5 * (1 + gamma))
    assert gamma == 0 or (gamma * ptx).norm() > 1e-3


def test_a_missing_eos_costs_what_was_asked(tiny):
    configs = (replace(CONFIG, steps=1, no_eos_penalty=penalty) for penalty in (0.0, 2.5))
    free, paid = (
        lines_of(trained(tiny, config=config)[1])[0]["objective/score"] for config in configs
    )
    assert 1.5 < free - paid <= 2.5  # most of the completions of six tokens have none


def test_evaluation_comes_first_every_n_rollouts_and_last(tiny):
    seen = []
    _, metrics = trained(tiny, callback=lambda model, step: seen.append(step) or {"reward": 1.0})
    assert seen == [0, 2, 3] and [line["step"] for line in metrics if "eval/reward" in line] == seen


def test_texts_are_scored_with_their_prompts(tokenizer):
    reward = text_reward(lambda texts: np.array([len(text) for text in texts]), tokenizer)
    prompts, completions = (
        [tokenizer("a film")["input_ids"], [0]],
        [tokenizer(" of joy")["input_ids"], [0]],
    )
    assert reward(prompts, completions).tolist() == [len("a film of joy"), 0]


BAD = {
    "shape": (
        lambda p, c: np.zeros((len(c), 2)),
        {},
        r"reward gave the shape \(3, 2\) for 3 completions; it must be \(N,\)",
    ),
    "nan": (lambda p, c: np.full(len(c), np.nan), {}, "reward gave nan for completion 0"),
    "target": (low_ids, {"kl_target": 0.0}, "kl_target is 0.0; it must be positive"),
    "no target": (low_ids, {"kl_target": float("nan")}, "kl_target is nan"),
    "from zero": (
        low_ids,
        {"kl_target": 3.0, "kl_coefficient": 0.0},
        "kl_coefficient is 0 with a kl_target",
    ),
    "context": (
        low_ids,
        {"max_new_tokens": 61},
        "longest prompt has 4 tokens, and with max_new_tokens 61 does not fit .* 64",
    ),
    "minibatch": (low_ids, {"minibatch": 3}, "batch is 8 and minibatch 3"),
    "gamma": (low_ids, {"gamma": 1.1}, r"gamma is 1.1; it must be in \[0, 1\]"),
    "epochs": (low_ids, {"epochs": 0}, "epochs is 0; it must be at least 1"),
    "coefficient": (
        low_ids,
        {"kl_coefficient": -1.0},
        "kl_coefficient is -1.0; it must be finite and not negative",
    ),
    "ptx": (low_ids, {"ptx_coefficient": 1.0}, "ptx_coefficient is 1.0 without ptx"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_the_first_step(tiny, tmp_path, name):
    reward, changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        trained(tiny, reward, replace(CONFIG, **changes), run=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_value_head_of_another_size_is_named(tiny):
    policy, value = load_model(str(tiny)), ScalarModel(load_model(str(tiny)))
    value.head = nn.Linear(16, 1)
    with pytest.raises(ValueError, match=r"value head has shape \(1, 16\); it must be \(1, 32\)"):
        train_ppo(policy, policy, value, low_ids, PROMPTS, CONFIG, eos_token_id=EOS)


def test_no_prompts_and_divergence_are_named(tiny):
    policy, value = load_model(str(tiny)), ScalarModel(load_model(str(tiny)))
    with pytest.raises(ValueError, match="there are no prompts"):
        train_ppo(policy, policy, value, low_ids, [], CONFIG, eos_token_id=EOS)
    with pytest.raises(ValueError, match="lower learning_rate|off 1"):
        trained(tiny, config=replace(CONFIG, steps=20, learning_rate=1e30))
