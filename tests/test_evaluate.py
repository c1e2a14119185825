"""Reward, sequence KL and the optimal frontier against enumeration."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from dpo_lab.evaluate import distinct_n, evaluate_pairs, evaluate_policy, win_rate
from dpo_lab.models import load_model
from dpo_lab.preferences import from_rows
from dpo_lab.theory.frontier import OptimalFrontier, best_of_n, frontier_band, optimal_frontier
from dpo_lab.theory.objective import kl as exact_kl
from dpo_lab.theory.objective import optimal_policy


def test_a_policy_that_is_its_reference_has_no_kl(model, tokenizer):
    result = evaluate_policy(
        model,
        model,
        [[0, 5, 9]] * 16,
        lambda t: np.linspace(0, 1, len(t)),
        tokenizer,
        max_new_tokens=8,
    )
    assert (result.kl, result.kl_se) == (0, 0)
    assert result.reward == pytest.approx(0.5) and result.reward_se == pytest.approx(
        np.linspace(0, 1, 16).std(ddof=1) / 4
    )
    assert len(result.texts) == len(result.rewards) == len(result.completions) == 16


def test_the_sequence_kl_matches_enumeration(model, tiny, tokenizer):
    """Two tokens from a vocabulary of 512: the exact KL by the chain rule, to 4 standard errors."""
    reference = load_model(str(tiny))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    prompt, kl = [0, 7], 0.0
    with torch.no_grad():
        first = [
            m(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
            for m in (model, reference)
        ]
        kl += float((first[0].exp() * (first[0] - first[1])).sum())
        ids = torch.tensor([[*prompt, t] for t in range(512)])
        second = [m(ids).logits[:, -1].double().log_softmax(-1) for m in (model, reference)]
        per_token = (second[0].exp() * (second[0] - second[1])).sum(-1)
        kl += float((first[0].exp() * per_token)[1:].sum())  # token 0 ends the completion
    result = evaluate_policy(
        model, reference, [prompt] * 4_000, lambda t: np.zeros(len(t)), tokenizer, max_new_tokens=2
    )
    assert kl > 0.05 and abs(result.kl - kl) < 4 * result.kl_se < kl / 2


def test_the_frontier_is_exact_when_every_outcome_is_listed_once():
    """K equally likely outcomes under the reference: the tilted distribution has a closed form."""
    scores = np.array([[0.0, 0.2, 0.9, 1.0], [0.5, 0.5, 0.1, 0.3]])
    betas = [10.0, 1.0, 0.3, 0.05]
    reward, kl, effective = optimal_frontier(scores, betas)
    for b, beta in enumerate(betas):
        rewards, kls, sizes = [], [], []
        for row in scores:
            pi = [np.exp(r / beta) for r in row]
            pi = [p / sum(pi) for p in pi]
            rewards.append(sum(p * r for p, r in zip(pi, row)))
            kls.append(sum(p * np.log(p * len(row)) for p in pi))
            sizes.append(1 / sum(p * p for p in pi))
        assert (reward[b], kl[b], effective[b]) == pytest.approx(
            (np.mean(rewards), np.mean(kls), np.mean(sizes)), abs=1e-12
        )


def test_no_tilt_of_the_samples_beats_the_frontier():
    scores = np.random.default_rng(0).random((1, 6))
    reward, kl, _ = optimal_frontier(scores, np.geomspace(100, 1e-3, 400))
    for exponents in itertools.product([0.1, 1.0, 3.0], repeat=6):
        pi = np.array(exponents) / sum(exponents)
        cost = float((pi * np.log(pi * 6)).sum())
        assert float(pi @ scores[0]) <= np.interp(cost, kl, reward) + 1e-4


def test_bad_scores_and_betas_are_named():
    for scores, betas in (([0.1, 0.2], [1.0]), ([[0.1]], [1.0]), ([[0.1, 0.2]], [0.0])):
        with pytest.raises(ValueError, match=r"\(M, K\) scores with K >= 2 and positive betas"):
            optimal_frontier(scores, betas)


REFERENCE = torch.tensor([0.35, 0.4, 0.2, 0.05], dtype=torch.float64)
REWARD = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)


def bandit_scores(m, k, seed=0):
    """Rewards of k samples of each of m prompts, all of them the same bandit."""
    drawn = np.random.default_rng(seed).choice(4, size=(m, k), p=REFERENCE.numpy())
    return REWARD.numpy()[drawn]


def test_on_a_bandit_the_estimate_finds_the_exact_frontier():
    betas = np.geomspace(5, 0.1, 12)
    estimate = optimal_frontier(bandit_scores(200, 2_000), betas)
    best = [optimal_policy(REFERENCE, REWARD, float(beta)) for beta in betas]
    np.testing.assert_allclose(estimate.reward, [float(p @ REWARD) for p in best], atol=0.003)
    np.testing.assert_allclose(
        estimate.kl, [float(exact_kl(p, REFERENCE)) for p in best], atol=0.02
    )


def test_the_band_holds_the_exact_frontier_as_often_as_it_says():
    """90 % bands of 40 data sets at two KLs: between 75 % and all of them hold the exact value."""
    fine = [optimal_policy(REFERENCE, REWARD, float(beta)) for beta in np.geomspace(20, 0.05, 400)]
    at = [0.1, 0.4]
    exact = np.interp(
        at, [float(exact_kl(p, REFERENCE)) for p in fine], [float(p @ REWARD) for p in fine]
    )
    held = []
    for seed in range(40):
        low, high = frontier_band(
            bandit_scores(40, 100, seed), np.geomspace(10, 0.05, 30), at, resamples=100
        )
        held += ((low <= exact) & (exact <= high)).tolist()
    assert 0.75 <= np.mean(held)


def test_a_frontier_ends_where_too_few_samples_bear_it():
    frontier = OptimalFrontier(
        np.array([0.9, 0.5, 0.7]), np.array([3.0, 0.0, 1.0]), np.array([4.9, 64.0, 5.0])
    )
    assert frontier.valid.tolist() == [False, True, True]
    assert frontier.reward_at(0.5) == pytest.approx(0.6) and np.isnan(frontier.reward_at(1.01))
    assert frontier.share(0.6, 1.0, 0.5) == pytest.approx(0.5) and np.isnan(
        frontier.share(0.6, 2.0, 0.5)
    )
    low, high = frontier_band(bandit_scores(10, 8), [1.0, 0.5], [0.01, 50.0], resamples=20)
    assert np.isfinite([low[0], high[0]]).all() and np.isnan([low[1], high[1]]).all()


@pytest.mark.parametrize("last", [5, 20, 60])
def test_no_policy_of_a_bandit_exceeds_the_bound_past_the_estimate_s_end(last):
    fine = [optimal_policy(REFERENCE, REWARD, float(beta)) for beta in np.geomspace(20, 0.02, 100)]
    rewards = np.array([float(p @ REWARD) for p in fine])
    kls = np.array([float(exact_kl(p, REFERENCE)) for p in fine])
    frontier = OptimalFrontier(rewards, kls, np.where(np.arange(100) < last, 9.0, 1.0))
    bounds = np.array([frontier.most_at(kl) for kl in kls])
    assert (bounds[:last] == rewards[:last]).all() and (bounds[last:] >= rewards[last:]).all()
    assert bounds[last] - rewards[last] < 0.02


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_is_the_mean_over_all_subsets(n):
    scores = np.random.default_rng(0).random((3, 5))
    expected = [np.mean([max(some) for some in itertools.combinations(row, n)]) for row in scores]
    np.testing.assert_allclose(best_of_n(scores, n), expected, atol=1e-12)


def test_a_bad_n_is_named():
    for n in (0, 6):
        with pytest.raises(
            ValueError, match=f"n is {n} with scores of shape .*; it must be from 1 to K"
        ):
            best_of_n(np.zeros((3, 5)), n)
    with pytest.raises(ValueError, match=r"scores of shape \(5,\); .* for scores \(M, K\)"):
        best_of_n(np.zeros(5), 1)


def test_the_win_rate_s_interval_is_wilson_s_and_ties_are_half():
    rng = np.random.default_rng(0)
    rewards, baseline = rng.random(200), rng.random(200)
    rate, low, high = win_rate(rewards, baseline)
    expected = binomtest(int((rewards > baseline).sum()), 200).proportion_ci(method="wilson")
    assert rate == pytest.approx((rewards > baseline).mean())
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert win_rate([1, 1, 0, 0], [1, 0, 0, 1])[0] == 0.5
    with pytest.raises(ValueError, match="one reward per prompt"):
        win_rate([], [])


def test_distinct_n_grams_are_counted_within_completions():
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4 and distinct_n([[1, 1, 1]], 1) == 1 / 3
    with pytest.raises(ValueError, match="no completion has 4 tokens"):
        distinct_n([[1, 2, 3]], 4)


def test_pairs_are_evaluated_as_one_by_one(tiny, model, tokenizer):
    words = ["joy", "bore", "plot", "film"]
    rows = [
        {"prompt": f"The {a}", first: f" is a {b}.", second: f" was the {c} of it."}
        for a, (first, second) in zip(words, 2 * [("chosen", "rejected"), ("rejected", "chosen")])
        for b, c in zip(words, words[1:])
    ]
    preferences = from_rows(rows, tokenizer, context=64).with_reference(model)
    with torch.no_grad():
        policy = load_model(str(tiny))
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    found = evaluate_pairs(policy, preferences, 0.3)

    # each completion alone, in float64
    p, logps = preferences, []
    for net in (policy.double(), model.double()):
        values = []
        for owner, completion in zip(p.prompt_of, p.completions):
            ids = torch.tensor([p.prompts[owner] + completion])
            with torch.no_grad():
                steps = net(ids).logits.log_softmax(-1)[0, :-1]
            taken = steps.gather(1, ids[0, 1:, None])[:, 0]
            values.append(float(taken[-len(completion) :].sum()))
        logps.append(np.array(values))
    ratios = logps[0] - logps[1]
    margins = 0.3 * (ratios[p.chosen] - ratios[p.rejected])
    assert found.pairs == 12 and 0 < np.mean(margins > 0) < 1
    assert found.accuracy == np.mean(margins > 0)
    assert (found.accuracy_low, found.accuracy_high) == win_rate(margins, np.zeros(12))[1:]
    for value, expected in (
        (found.margin, margins.mean()),
        (found.margin_se, margins.std(ddof=1) / 12**0.5),
        (found.logps_chosen, logps[0][p.chosen].mean()),
        (found.logps_rejected, logps[0][p.rejected].mean()),
        (found.log_ratio_chosen, ratios[p.chosen].mean()),
        (found.log_ratio_rejected, ratios[p.rejected].mean()),
    ):
        assert value == pytest.approx(expected, abs=1e-4)

    # the reference itself: every pair is a tie
    same = evaluate_pairs(None, preferences, 0.3)
    assert (same.accuracy, same.margin, same.log_ratio_chosen) == (0.5, 0, 0)
    for pairs, beta, said in (
        (replace(preferences, reference_logps=None), 0.3, "has no reference_logps"),
        (preferences.select([0]), 0.3, "has 1 pair; an error bar needs at least 2"),
        (preferences, 0.0, "beta is 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate_pairs(policy, pairs, beta)
