"""On-policy DPO on a tiny GPT-2: what a round is, whose log-probs it uses, what it labels."""

import copy
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel, set_seed

from dpo_lab.engine.runs import read_metrics
from dpo_lab.judges import judge_label, reward_judge
from dpo_lab.loop import LoopConfig
from dpo_lab.preferences import Preferences, from_scores
from dpo_lab.sampling import sample_with_logps
from dpo_lab.sentiment.pretrain import PretrainConfig, gpt2_config
from dpo_lab.train import DPOConfig, train_dpo
from dpo_lab.variants.labels import (
    best_and_worst_label,
    bradley_terry_label,
    joined,
    labeled_preferences,
    spin_preferences,
)
from dpo_lab.variants.online import OnlineConfig, train_online_dpo, train_spin

LOOP = LoopConfig(learning_rate=1e-3, warmup_steps=1, eval_every=2, save_every=1)
DPO = DPOConfig(beta=0.2, batch_pairs=12, loop=LOOP)
CONFIG = OnlineConfig(rounds=2, k=3, max_new_tokens=5, dpo=DPO)
PROMPTS = [[0, i, i + 1] for i in range(1, 13)]
EOS = 0


def low_ids(prompts, completions):
    """The fraction of tokens in the lower half of the vocabulary."""
    return np.array([np.mean(np.array(ids) < 256) for ids in completions])


class Counting:
    """A labeler that remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, completions):
        self.asked.append([tuple(p + c) for p, c in zip(prompts, completions)])
        return low_ids(prompts, completions)


def trained(model, config=CONFIG, label=low_ids, prompts=PROMPTS, **options):
    policy, reference = copy.deepcopy(model), copy.deepcopy(model)
    options = {"progress": None, "eos_token_id": EOS, **options}
    return policy, train_online_dpo(policy, reference, prompts, label, config, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def timeless(lines):
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def plain_logps(model, preferences):
    """The log-prob of each completion, from logits and a loop."""
    found = []
    for p, ids in zip(preferences.prompt_of, preferences.completions):
        text = torch.tensor([preferences.prompts[p] + ids])
        logps = model.double()(text).logits[0].log_softmax(-1)
        at = range(len(preferences.prompts[p]) - 1, text.shape[1] - 1)
        found.append(sum(float(logps[i, text[0, i + 1]].detach()) for i in at))
    return np.array(found)


# what a round is


def test_one_round_is_train_dpo_on_pairs_of_the_initial_policy_to_the_byte(model, tokenizer):
    policy, lines = trained(model, replace(CONFIG, rounds=1), seed=3)

    options = {"eos_token_id": EOS, "max_new_tokens": 5, "seed": 3}
    drawn, logps = sample_with_logps(model, PROMPTS, 3, **options)
    scores = [low_ids(None, row) for row in drawn]
    pairs = from_scores(PROMPTS, drawn, scores, tokenizer, context=64)
    pairs = pairs.with_reference(model, known=np.concatenate(logps))
    textbook = copy.deepcopy(model)
    expected = train_dpo(textbook, pairs, DPO, seed=3, progress=None)

    assert same(policy, textbook)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]


@pytest.mark.parametrize("pairs", ["newest", "all"])
@pytest.mark.parametrize("reference", ["fixed", "moved"])
def test_the_reference_is_fixed_or_moved_as_it_says(model, tmp_path, reference, pairs):
    began_with = [copy.deepcopy(model)]

    def keep(policy, step):
        began_with.append(copy.deepcopy(policy))
        return {}

    config = replace(CONFIG, reference=reference, pairs=pairs)
    never = replace(DPO, loop=replace(LOOP, eval_every=1_000))
    _, lines = trained(model, replace(config, dpo=never), run=tmp_path, callback=keep)

    # before training, after the first round, after the second
    _, before, after_one, _ = began_with
    second = Preferences.load(tmp_path / "round-2" / "preferences")
    expected = plain_logps(before if reference == "fixed" else after_one, second)
    np.testing.assert_allclose(second.reference_logps, expected, atol=1e-4)

    # the policy that sampled is the one after the first round in any case
    assert not same(before.float(), after_one.float())
    counts = [line["pairs"] for line in lines if "pairs" in line]
    first = Preferences.load(tmp_path / "round-1" / "preferences")
    sizes = [len(first.chosen), len(second.chosen)]
    assert counts == ([*sizes] if pairs == "newest" else [sizes[0], sum(sizes)])


def test_with_all_pairs_a_moved_reference_scores_the_earlier_ones_again(model, tmp_path):
    seen = []

    def loss(policy_logps, reference_logps, chosen, rejected, beta):
        seen.append((policy_logps.detach().numpy().copy(), reference_logps.numpy().copy()))
        margins = policy_logps - reference_logps
        return -torch.nn.functional.logsigmoid(beta * (margins[chosen] - margins[rejected]))

    large = replace(DPO, batch_pairs=10_000)
    config = replace(CONFIG, reference="moved", pairs="all", dpo=large)
    trained(model, config, loss=loss)

    # each round has one step, at which the policy is still the reference; a trial comes before it
    assert len(seen) == 4
    for policy_logps, reference_logps in seen[1::2]:
        np.testing.assert_allclose(policy_logps, reference_logps, atol=1e-4)
    assert len(seen[3][0]) > len(seen[1][0])


def test_each_prompt_is_labeled_once_whatever_the_rounds(model):
    for rounds in (1, 3):
        label = Counting()
        _, lines = trained(model, replace(CONFIG, rounds=rounds), label)
        asked = [text for call in label.asked for text in call]
        assert len(label.asked) == rounds
        assert [text[:3] for text in asked] == [tuple(p) for p in PROMPTS for _ in range(3)]

        # a round's last line has the sums so far
        ends = [line for line in lines if "labels" in line]
        assert [line["round"] for line in ends] == list(range(1, rounds + 1))
        assert ends[-1]["labels"] == 36
        assert ends[-1]["tokens"] == sum(len(text) - 3 for text in asked)
        phases = ("sample", "label", "reference", "train")
        assert all(line[f"seconds/{phase}"] >= 0 for line in ends for phase in phases)


def test_steps_and_evaluations_count_over_all_rounds(model):
    called = []
    _, lines = trained(model, callback=lambda policy, step: called.append(step) or {"kl": 0.0})
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert called == sorted(set(called)) and called[0] == 0 and called[-1] == steps[-1]
    assert {line["round"] for line in lines} == {1, 2}


def test_the_learning_rate_decays_from_round_to_round(model):
    flat = replace(DPO, loop=replace(LOOP, schedule="constant", warmup_steps=0))
    _, lines = trained(model, replace(CONFIG, rounds=3, decay=0.5, dpo=flat))
    peaks = {line["round"]: line["learning_rate"] for line in lines if "loss" in line}
    assert list(peaks.values()) == [1e-3, 5e-4, 2.5e-4]


def test_the_seed_decides_everything(model):
    one, again, other = (trained(model, seed=seed)[0] for seed in (1, 1, 2))
    assert same(one, again) and not same(one, other)


# runs


@pytest.mark.parametrize("change", [{}, {"reference": "moved", "pairs": "all"}, {"lora": 2}])
def test_a_resumed_run_has_the_same_bytes_and_labels_nothing_again(model, tmp_path, change):
    dpo = replace(DPO, lora_rank=change.get("lora", 0))
    config = replace(CONFIG, dpo=dpo, **{k: v for k, v in change.items() if k != "lora"})
    expected, lines = trained(model, config)
    last = lines[-1]["step"]

    def stop(policy, step):
        if step == last:
            raise RuntimeError("power cut")
        return {}

    label = Counting()
    with pytest.raises(RuntimeError, match="power cut"):
        trained(model, config, label, run=tmp_path, callback=stop)
    assert len(label.asked) == 2

    policy, found = trained(model, config, label, run=tmp_path, resume=True)
    assert len(label.asked) == 2
    assert same(policy, expected)
    assert timeless(found) == timeless(lines)
    assert read_metrics(tmp_path / "round-2")

    # a finished run gives its policy again
    assert same(trained(model, config, label, run=tmp_path, resume=True)[0], expected)
    with pytest.raises(ValueError, match="resume=True"):
        trained(model, config, run=tmp_path)
    with pytest.raises(ValueError, match="beta"):
        other = replace(config, dpo=replace(dpo, beta=0.3))
        trained(model, other, run=tmp_path, resume=True)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"config": replace(CONFIG, rounds=0)}, "rounds is 0"),
        ({"config": replace(CONFIG, rounds=13)}, "12 prompts for 13 rounds"),
        ({"config": replace(CONFIG, k=1)}, "k is 1"),
        ({"config": replace(CONFIG, reference="last")}, "reference is 'last'"),
        ({"config": replace(CONFIG, pairs="old")}, "pairs is 'old'"),
        ({"config": replace(CONFIG, temperature=0.0)}, "temperature is 0.0"),
        ({"config": replace(CONFIG, decay=-1.0)}, "decay is -1.0"),
        ({"config": replace(CONFIG, dpo=replace(DPO, beta=0.0))}, "beta"),
        ({"prompts": [[0, -1]] * 4}, r"prompts\[0\]\[1\] is -1"),
        ({"prompts": [[], [0]]}, "prompt 0 has no tokens"),
        ({"label": None}, "label is None"),
        ({"label": lambda prompts, completions: np.ones(3)}, r"round 1: labels have the shape"),
        ({"label": lambda p, c: np.full(len(c), np.nan)}, r"labels\[0\] is nan"),
        ({"label": lambda p, c: np.ones(len(c))}, "round 1: there is no pair left"),
        ({"label": lambda p, c: [(0, 99)]}, r"labels\[0, 1\] is 99"),
        ({"label": lambda p, c: [(0, 3)]}, "two different prompts"),
    ],
)
def test_bad_input_is_named(model, change, named):
    with pytest.raises((ValueError, TypeError), match=named):
        trained(model, **change)


# pairs


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=4))
def test_rewards_make_the_pairs_that_a_plain_loop_makes(rewards):
    drawn = [[[10 * i + j + 1] for j in range(len(row))] for i, row in enumerate(rewards)]
    flat = [(i, r) for i, row in enumerate(rewards) for r in row]
    expected = [
        (a, b) if flat[a][1] > flat[b][1] else (b, a)
        for a, b in combinations(range(len(flat)), 2)
        if flat[a][0] == flat[b][0] and flat[a][1] != flat[b][1]
    ]
    if not expected:
        return
    found = labeled_preferences([[0]] * len(rewards), drawn, [r for _, r in flat])
    assert sorted(zip(found.chosen, found.rejected)) == sorted(expected)
    assert found.report.pairs + found.report.ties == sum(
        len(row) * (len(row) - 1) // 2 for row in rewards
    )


def test_the_same_text_twice_makes_no_pair():
    found = labeled_preferences([[0]], [[[1], [1], [2]]], [(0, 1), (0, 2), (0, 2)])
    assert list(zip(found.chosen, found.rejected)) == [(0, 2), (0, 2)]
    assert (found.report.identical, found.report.duplicated) == (1, 1)


def test_joined_pairs_are_those_of_the_parts():
    parts = [
        labeled_preferences([[0], [i]], [[[1], [2]], [[3], [4]]], [1.0, 2.0, 4.0, 3.0])
        for i in (5, 6)
    ]

    def texts(p):
        return [
            (p.prompts[p.prompt_of[c]], p.completions[c], p.completions[r])
            for c, r in zip(p.chosen, p.rejected)
        ]

    assert texts(joined(parts)) == texts(parts[0]) + texts(parts[1])


def test_a_judge_labels_every_pair_and_the_same_verdicts_give_the_same_pairs(model, tokenizer):
    texts = []

    def reward(some):
        texts.extend(some)
        return [len(text) for text in some]

    label = judge_label(reward_judge(reward), tokenizer, k=3)
    owners = [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    completions = [[20 + i, 30] * (1 + i % 3) for i in range(6)]
    found = label(owners, completions)

    whole = tokenizer.batch_decode([p + c for p, c in zip(owners, completions)])
    assert set(texts) == {text.removeprefix(tokenizer.bos_token or "") for text in whole}
    lengths = [len(text) for text in whole]
    expected = labeled_preferences(PROMPTS[:2], [completions[:3], completions[3:]], lengths)
    assert sorted(map(tuple, found)) == sorted(zip(expected.chosen, expected.rejected))


def test_votes_are_drawn_by_bradley_terry():
    label = bradley_terry_label(lambda p, c: np.array([1.0, 0.0]), k=2, scale=0.5, votes=20_000)
    pairs = label([[0], [0]], [[1], [2]])
    assert len(pairs) == 20_000
    expected = 1 / (1 + np.exp(-2.0))
    assert abs((pairs[:, 0] == 0).mean() - expected) < 4 * (expected / 20_000) ** 0.5
    np.testing.assert_array_equal(pairs, label([[0], [0]], [[1], [2]]))


def test_the_best_of_a_prompt_is_compared_with_its_worst():
    rewards = np.array([1.0, 3.0, 2.0, 5.0, 5.0, 5.0])
    label = best_and_worst_label(lambda prompts, completions: rewards, k=3)
    assert label([[0]] * 6, [[1]] * 6).tolist() == [[1, 0]]
    with pytest.raises(ValueError, match="k is 1"):
        best_and_worst_label(label, k=1)
    with pytest.raises(ValueError, match=r"the shape \(6,\) for 5 completions"):
        label([[0]] * 5, [[1]] * 5)


# self-play


def test_self_play_prefers_the_human_text_over_each_sample():
    found = spin_preferences([[0], [5]], [[1, 2], [3]], [[[4], [1, 2]], [[6], [7]]])
    texts = [
        (found.completions[c], found.completions[r]) for c, r in zip(found.chosen, found.rejected)
    ]
    assert texts == [([1, 2], [4]), ([3], [6]), ([3], [7])]
    assert found.report.identical == 1


def test_the_opponent_of_self_play_is_the_policy_of_the_last_round(model, tmp_path):
    human, policy, kept = [[300, 301, 0]] * len(PROMPTS), copy.deepcopy(model), {}
    config = replace(CONFIG, k=1, reference="moved", dpo=replace(DPO, beta=0.1, epochs=3))
    options = {"eos_token_id": EOS, "progress": None, "run": tmp_path}

    def keep(policy, step):
        kept[step] = copy.deepcopy(policy)
        return {}

    lines = train_spin(policy, PROMPTS, human, config, callback=keep, **options)
    end = next(line["step"] for line in lines if "pairs" in line)
    for number, opponent in ((1, model), (2, kept[end])):
        pairs = Preferences.load(tmp_path / f"round-{number}" / "preferences")
        np.testing.assert_allclose(pairs.reference_logps, plain_logps(opponent, pairs), atol=1e-4)
        assert all(pairs.completions[c] == [300, 301, 0] for c in pairs.chosen)

    # nobody labeled, and the human text became more likely
    assert lines[-1]["labels"] == 0
    pairs = labeled_preferences(PROMPTS[:1], [[human[0], [1]]], [1.0, 0.0])
    assert plain_logps(policy, pairs)[0] > plain_logps(model, pairs)[0] + 0.1


@pytest.mark.parametrize(
    "change, named",
    [
        ({"config": CONFIG}, "reference is 'fixed'"),
        ({"human": [[1]]}, "12 prompts and 1 human completions"),
    ],
)
def test_bad_input_of_self_play_is_named(model, change, named):
    found = {"human": [[1]] * 12, "config": replace(CONFIG, reference="moved"), **change}
    with pytest.raises(ValueError, match=named):
        train_spin(model, PROMPTS, found["human"], found["config"], eos_token_id=EOS)


# where the optimum is known


@pytest.fixture(scope="module")
def bandit():
    """A language model of eight tokens; completions of one token make it a bandit."""
    set_seed(0)
    sizes = PretrainConfig(vocabulary=8, context=64, width=16, layers=1, heads=1)
    return GPT2LMHeadModel(gpt2_config(sizes)).eval()


def test_rounds_find_the_optimum_of_the_kl_constrained_objective(bandit):
    """pi_ref exp(r / beta) / Z, from Bradley-Terry labels of the policy's own samples."""
    rewards = np.linspace(-1, 1, 8)
    label = bradley_terry_label(lambda p, c: rewards[np.array(c)[:, 0]], k=16, scale=1.0, votes=4)
    dpo = DPOConfig(
        beta=0.5, batch_pairs=2_000, epochs=4, loop=LoopConfig(learning_rate=1e-2, warmup_steps=0)
    )
    config = OnlineConfig(rounds=4, k=16, max_new_tokens=1, decay=0.6, dpo=dpo)
    policy, _ = trained(bandit, config, label, prompts=[[0]] * 48, eos_token_id=[])

    def logps(model):
        return model(torch.tensor([[0]])).logits[0, -1].double().log_softmax(-1).detach().numpy()

    best = logps(bandit) + rewards / 0.5
    best -= np.logaddexp.reduce(best)
    distance = np.exp(best) @ (best - logps(policy))
    assert distance < 0.02 < 10 * 0.02 < np.exp(best) @ (best - logps(bandit))
