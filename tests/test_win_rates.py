"""Win rates and what verdicts are worth: against plain loops, enumeration, and simulation."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import binom, binomtest, norm

from dpo_lab.judges import (
    BothOrders,
    Verdicts,
    ask_both_orders,
    biased_judge,
    fit_ratings,
    half_width,
    judge_agreement,
    judge_biases,
    length_controlled_rate,
    policy_answers,
    power,
    prompts_needed,
    ratings_of_models,
    reward_judge,
    temperature_sweep,
    wilson,
    win_rate_difference,
    win_rates,
)
from dpo_lab.judges.intervals import constant, mean_by_prompt, resampled_weights
from dpo_lab.judges.simple import sigmoid
from dpo_lab.models import end_tokens, load_model, load_tokenizer
from dpo_lab.sampling import sample_completions
from dpo_lab.theory.bradley_terry import fit_bradley_terry

POINTS = {"A": 1.0, "tie": 0.5, "B": 0.0}


def table_judge(table):
    """A judge that looks its verdicts up by (prompt, A, B)."""
    return lambda prompts, a, b: [table[three] for three in zip(prompts, a, b)]


# win rates


@given(
    st.lists(st.lists(st.tuples(*[st.sampled_from(["A", "B", "tie", None])] * 2), min_size=1),
             min_size=1, max_size=5)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_win_rate_in_both_orders_is_that_of_a_plain_loop(verdicts):
    """Prompts with any number of answers, verdicts of every kind, missing ones included."""
    prompts = [f"p{i}" for i in range(len(verdicts))]
    answers = [[f"a{k}" for k in range(len(row))] for row in verdicts]
    table = {}
    for prompt, row in zip(prompts, verdicts):
        for k, (given_, swapped) in enumerate(row):
            table[prompt, f"a{k}", "base"], table[prompt, "base", f"a{k}"] = given_, swapped

    def rate():
        return win_rates(table_judge(table), prompts, answers, ["base"] * len(prompts), resamples=9)

    # points of each pair with both verdicts, by prompt
    flat = [[POINTS[g] + 1 - POINTS[s] for g, s in row if g and s] for row in verdicts]
    pairs = [p / 2 for row in flat for p in row]
    if not pairs:
        with pytest.raises(ValueError, match="no pair has all its verdicts.*'empty'"):
            rate()
        return
    found = rate()
    assert found.rate == pytest.approx(np.mean([np.mean(row) / 2 for row in flat if row]))
    assert found.wins == sum(p > 0.5 for p in pairs)
    assert found.ties == sum(p == 0.5 for p in pairs)
    assert found.losses == sum(p < 0.5 for p in pairs)
    both = [pair for row in verdicts for pair in row]
    assert found.inconsistent == both.count(("A", "A")) + both.count(("B", "B"))
    assert found.missing_pairs == len(both) - len(pairs)
    assert sum(found.missing.values()) == sum(pair.count(None) for pair in both)
    np.testing.assert_allclose(found.points, [np.mean(row) / 2 if row else np.nan for row in flat])

    first = [[POINTS[g] + POINTS[s] for g, s in row if g and s] for row in verdicts]
    bias = np.mean([np.mean(row) / 2 for row in first if row]) - 0.5
    assert found.position_bias.value == pytest.approx(bias)


def test_orders_differ_by_what_the_place_does():
    """A judge who always names the first: one half in both orders, 1 in the given one."""
    prompts = [f"p{i}" for i in range(400)]
    texts = (prompts, ["a"] * 400, ["b"] * 400)

    def first(prompts, a, b):
        return ["A"] * len(prompts)

    swapped = win_rates(first, *texts)
    assert (swapped.rate, swapped.inconsistent, swapped.ties) == (0.5, 400, 400)
    assert swapped.position_bias.value == 0.5
    given_ = win_rates(first, *texts, order="given")
    assert given_.rate == 1 and np.isnan(given_.position_bias.value)
    drawn = win_rates(first, *texts, order="random", seed=5)
    assert abs(drawn.rate - 0.5) < 4 * 0.5 / 20 and drawn.position_bias.value == 0.5
    assert drawn.inconsistent == 0
    np.testing.assert_array_equal(
        drawn.points, win_rates(first, *texts, order="random", seed=5).points
    )


def test_an_unbiased_judge_gives_the_true_win_rate_in_every_order():
    prompts, answers = [f"p{i}" for i in range(50)], [f"a{i % 7}" for i in range(50)]
    baseline = [f"a{i % 5}" for i in range(50)]
    true = np.mean([(i % 7 > i % 5) + (i % 7 == i % 5) / 2 for i in range(50)])
    judge = reward_judge(lambda texts: [int(text[-1]) for text in texts])
    for order in ("swapped", "random", "given"):
        found = win_rates(judge, prompts, answers, baseline, order=order)
        assert found.rate == pytest.approx(true)
        assert found.low < true < found.high
        assert found.inconsistent == 0
    assert "won" in str(found)


def test_an_interval_over_prompts_is_that_of_all_resamples():
    """Three prompts have 27 resamples; the quantiles are those of their means."""
    points = np.array([0.0, 0.5, 1.0])
    means = np.sort([np.mean(some) for some in product(points, repeat=3)])
    found = mean_by_prompt(points, 20_000, 0)
    low, high = np.quantile(np.repeat(means, 1_000), [0.025, 0.975])
    assert found.value == 0.5 and (found.low, found.high) == pytest.approx((low, high))
    drawn = np.concatenate(list(resampled_weights(7, 600, 0)))
    assert drawn.shape == (600, 7) and (drawn.sum(1) == 7).all()


def test_intervals_hold_the_truth_where_answers_of_a_prompt_go_together():
    """Four answers per prompt, won or lost together: 95% of 400 intervals over prompts; intervals
    that take all answers to be independent hold it far less often."""
    rng, held, naive = np.random.default_rng(0), [], []
    for seed in range(400):
        won = (rng.random((80, 1)) < 0.6) * np.ones((1, 4))
        held.append(0.6 in mean_by_prompt(won.mean(1), 500, seed))
        naive.append(0.6 in wilson(won.mean(), won.size))
    assert abs(np.mean(held) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 400), np.mean(held)
    assert np.mean(naive) < 0.8


def test_where_all_prompts_agree_the_interval_is_not_empty():
    for value in (0.0, 1.0):
        found, other = constant(value, 40, norm.ppf(0.975)), wilson(value, 40)
        assert (found.low, found.high) == pytest.approx((other.low, other.high))
    flat = mean_by_prompt(np.full(40, 0.5), 100, 0)
    assert flat.low < 0.5 < flat.high and flat.high - 0.5 == pytest.approx(0.5 - flat.low)
    judge = reward_judge(lambda texts: [len(text) for text in texts])
    all_won = win_rates(judge, ["p"] * 20, ["aaa"] * 20, ["b"] * 20)
    assert all_won.rate == all_won.high == 1 and 0.8 < all_won.low < 0.9
    assert all_won.length_controlled.value == 1


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([], [], []), {}, ValueError, "there are no prompts"),
        ((["p"], ["a", "b"], ["c"]), {}, ValueError, "2 answers for 1 prompts"),
        ((["p"], ["a"], []), {}, ValueError, "0 baseline for 1 prompts"),
        ((["p"], "a", ["c"]), {}, TypeError, "answers is 'a'"),
        ((["p"], [[]], ["c"]), {}, ValueError, r"answers\[0\] is empty"),
        ((["p"], [["a", "b"]], [["c"]]), {}, ValueError, r"2 answers\[0\], 1 baseline\[0\]"),
        ((["p"], [3], ["c"]), {}, TypeError, r"answers\[0\] is 3"),
        ((["p"], [[None]], ["c"]), {}, TypeError, r"answers\[0\]\[0\] is None"),
        ((["p"], ["a"], ["c"]), {"order": "both"}, ValueError, "order is 'both'; it must be one"),
        ((["p"], ["a"], ["c"]), {"resamples": 0}, ValueError, "resamples is 0"),
        ((["p"], ["a"], ["c"]), {"seed": "x"}, TypeError, "seed is 'x'"),
    ],
)
def test_bad_input_to_a_win_rate_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        win_rates(lambda prompts, a, b: ["A"] * len(prompts), *arguments, **options)


def test_a_judge_that_returns_too_few_or_nothing_is_named():
    texts = (["p", "q"], ["a", "b"], ["c", "d"])
    with pytest.raises(ValueError, match="returned 3 verdicts for 4 pairs"):
        win_rates(lambda *_: ["A", "B", "A"], *texts)
    refused = Verdicts([0] * 4, None, ("refusal",) * 4)
    with pytest.raises(ValueError, match="no pair has all its verdicts, of 2 pairs.*'refusal': 4"):
        win_rates(lambda *_: refused, *texts)


def test_a_paired_difference_leaves_out_what_prompts_have_in_common():
    rng = np.random.default_rng(0)
    prompts, hard = [f"p{i}" for i in range(200)], rng.random(200) < 0.5
    table = {}
    for prompt, lost in zip(prompts, hard):
        one, other = ("B", "B") if lost else ("A", "A" if rng.random() < 0.8 else "B")
        table[prompt, "one", "base"], table[prompt, "other", "base"] = one, other
    one, other = (
        win_rates(table_judge(table), prompts, [name] * 200, ["base"] * 200, order="given")
        for name in ("one", "other")
    )
    gap = win_rate_difference(one, other)
    assert gap.value == pytest.approx(one.rate - other.rate) and gap.low > 0
    assert gap.high - gap.low < 0.6 * np.hypot(one.high - one.low, other.high - other.low)

    same = win_rate_difference(one, one)
    assert same.value == 0 and same.low < 0 < same.high
    with pytest.raises(ValueError, match="one has 200 prompts and other 1"):
        win_rate_difference(one, win_rates(lambda *_: ["A"] * 2, ["p"], ["a"], ["b"]))


# at equal lengths


def graded(n, seed, theta=0.3, phi=1.2):
    """Wins whose log-odds depend on the length, and the differences in length."""
    rng = np.random.default_rng(seed)
    gaps = rng.normal(40, 60, n).round()
    p = sigmoid(theta + phi * np.tanh(gaps / gaps.std(ddof=1)))
    return (rng.random(n) < p).astype(float), gaps


def test_the_length_controlled_rate_is_the_minimum_of_its_loss():
    """Against a general minimizer, with points of every kind and prompts of unequal size."""
    points, gaps = graded(60, 0)
    points[:7] = 0.5
    prompt_of = np.sort(np.random.default_rng(0).integers(25, size=60))
    weights = 1 / np.bincount(prompt_of)[prompt_of]
    x = np.tanh(gaps / gaps.std(ddof=1))

    def loss(parameters):
        logits = parameters[0] + parameters[1] * x
        nll = weights @ (np.logaddexp(0, logits) - points * logits)
        return nll + parameters[1] ** 2 / 50

    best = minimize(loss, [0, 0], tol=1e-12).x
    found = length_controlled_rate(points, gaps, prompt_of, resamples=3)
    assert found.value == pytest.approx(sigmoid(best[0]), abs=1e-6)


def test_exchanging_answers_and_baseline_exchanges_the_rates():
    points, gaps = graded(80, 1)
    one = length_controlled_rate(points, gaps, resamples=100)
    other = length_controlled_rate(1 - points, -gaps, resamples=100)
    for a, b in ((one.value, other.value), (one.low, other.high), (one.high, other.low)):
        assert a == pytest.approx(1 - b, abs=1e-9)


def test_at_equal_lengths_the_controlled_rate_is_the_raw_one():
    points = graded(80, 2)[0]
    found, raw = length_controlled_rate(points, np.full(80, 7.0)), mean_by_prompt(points, 2_000, 0)
    assert (found.value, found.low, found.high) == (raw.value, raw.low, raw.high)


def test_the_intervals_at_equal_length_hold_the_truth():
    held = [sigmoid(0.3) in length_controlled_rate(*graded(100, s), resamples=200, seed=s)
            for s in range(200)]  # fmt: skip
    assert abs(np.mean(held) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 200), np.mean(held)


def test_a_judge_who_looks_at_length_alone_is_found_out():
    """Longer answers always win: the raw rate is high, the controlled one about one half."""
    rng = np.random.default_rng(0)
    answers = ["x" * n for n in rng.integers(40, 90, 300)]
    baseline = ["y" * n for n in rng.integers(20, 70, 300)]
    judge = reward_judge(lambda texts: [len(text) for text in texts])
    found = win_rates(judge, ["p"] * 300, answers, baseline, resamples=200)
    assert found.rate > 0.75 and abs(found.length_controlled.value - 0.5) < 0.12


@pytest.mark.parametrize(
    ("points", "gaps", "message"),
    [
        ([1, 0], [1], "2 points, 1 gaps"),
        ([1, 2], [1, 1], r"points must lie in \[0, 1\]"),
        ([1, np.nan], [1, 1], r"points must lie in \[0, 1\]"),
        ([1, 0], [1, np.inf], "gaps must be finite"),
    ],
)
def test_bad_points_and_lengths_are_named(points, gaps, message):
    with pytest.raises(ValueError, match=message):
        length_controlled_rate(points, gaps)


# what n prompts can say


@pytest.mark.parametrize(("wins", "n"), [(0, 5), (110, 200), (7, 7), (1, 1)])
def test_wilson_is_scipy_s(wins, n):
    found = wilson(wins / n, n)
    other = binomtest(wins, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=1e-12)


def test_power_is_the_chance_that_the_interval_excludes_one_half():
    for n, rate in ((20, 0.7), (200, 0.55), (37, 0.5)):
        outside = [binom.pmf(k, n, rate) for k in range(n + 1) if 0.5 not in wilson(k / n, n)]
        assert power(n, rate) == pytest.approx(sum(outside))


def test_a_win_rate_of_55_percent_takes_about_eight_hundred_prompts():
    assert half_width(200, 0.55) == pytest.approx(0.068, abs=5e-4)
    n = prompts_needed(0.55)
    assert 770 < n < 800 and power(n, 0.55) == pytest.approx(0.8, abs=0.02)
    assert prompts_needed(0.45) == n


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: half_width(0), "n is 0"),
        (lambda: half_width(10, 1.2), "rate is 1.2"),
        (lambda: half_width(10, level=95), "level is 95.0"),
        (lambda: power(10, -1), "rate is -1"),
        (lambda: prompts_needed(0.5), "rate is 0.5"),
        (lambda: prompts_needed(0.6, power=1), "power is 1"),
    ],
)
def test_numbers_that_say_nothing_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# biases


def both_orders(given_, swapped, first, second, prompts=None):
    prompts = prompts or [f"p{i}" for i in range(len(given_))]
    kinds = (tuple(prompts), tuple(first), tuple(second))
    return BothOrders(*kinds, Verdicts.of(given_), Verdicts.of(swapped))


def test_biases_are_least_squares_with_errors_clustered_by_prompt():
    """Against numpy's least squares and a plain loop over prompts."""
    rng = np.random.default_rng(0)
    prompts = [f"p{i // 3}" for i in range(60)]
    given_, swapped, truth = (rng.choice(["A", "B", "tie"], 60).tolist() for _ in range(3))
    first, second = (["x" * k for k in rng.integers(1, 6, 60)] for _ in range(2))
    found = judge_biases(both_orders(given_, swapped, first, second, prompts), truth)

    y = np.array([POINTS[v] - 0.5 for v in given_ + swapped])
    s = np.array([{"A": 1, "B": -1, "tie": 0}[v] for v in truth])
    d = np.sign([len(a) - len(b) for a, b in zip(first, second)])
    x = np.stack([np.r_[s, -s], np.ones(120), np.r_[d, -d]], 1)
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    values = (found.accuracy.value - 0.5, found.position_bias.value, found.length_bias.value)
    np.testing.assert_allclose(values, best, atol=1e-12)
    assert found.position_bias.value == pytest.approx(y.mean())

    inverse, middle = np.linalg.inv(x.T @ x), np.zeros((3, 3))
    for name in set(prompts):
        rows = [i for i, p in enumerate(prompts + prompts) if p == name]
        pull = x[rows].T @ (y[rows] - x[rows] @ best)
        middle += np.outer(pull, pull)
    error = np.sqrt((inverse @ middle @ inverse)[1, 1] * 20 / 19)
    width = found.position_bias.high - found.position_bias.low
    assert width == pytest.approx(2 * 2.093 * error, rel=0.05)


def test_a_judge_that_is_the_truth_is_accurate_and_without_bias():
    prompts = [f"p{i}" for i in range(40)]
    a, b = ["x" * (i % 5 + 1) for i in range(40)], ["y" * (i % 3 + 2) for i in range(40)]
    truth = ["A" if i % 2 else "B" for i in range(40)]
    rewards = {p + t: 0.0 for p, t in zip(prompts, b)}
    rewards |= {p + t: (1 if v == "A" else -1) for p, t, v in zip(prompts, a, truth)}
    judge = reward_judge(lambda texts: [rewards[text] for text in texts])
    found = judge_biases(ask_both_orders(judge, prompts, a, b), truth)
    assert found.accuracy.value == pytest.approx(1) and found.accuracy.high == pytest.approx(1)
    assert 0.85 < found.accuracy.low < 1 and found.consistent.value == 1
    for bias in (found.position_bias, found.length_bias):
        assert bias.value == pytest.approx(0) and -0.1 < bias.low < 0 < bias.high < 0.1


def test_missing_verdicts_are_left_out_and_counted():
    both = both_orders(["A", None, "A"], ["B", "A", "A"], ["x", "x", "xx"], ["yy", "yy", "y"])
    found = judge_biases(both, ["A", "A", "A"])
    assert found.pairs == 2 and found.missing == {"empty": 1}
    assert found.consistent.value == 0.5


def test_what_the_pairs_cannot_tell_is_said():
    equal = both_orders(["A", "B"], ["B", "A"], ["x", "x"], ["y", "y"])
    assert np.isnan(judge_biases(equal, ["A", "B"]).length_bias.value)
    assert np.isnan(judge_biases(equal, ["tie", "tie"]).accuracy.value)
    longer = both_orders(["A", "B"], ["B", "A"], ["xx", "x"], ["y", "yy"])
    with pytest.raises(ValueError, match="the better answer is the longer one in every pair"):
        judge_biases(longer, ["A", "B"])
    with pytest.raises(ValueError, match="truth has 1 verdicts for 2 pairs"):
        judge_biases(longer, ["A"])
    with pytest.raises(ValueError, match="truth: verdict 0 is 'a'"):
        judge_biases(longer, ["a", "B"])
    with pytest.raises(ValueError, match="1 prompts have verdicts"):
        judge_biases(both_orders(["A"], ["B"], ["x"], ["y"]), ["A"])
    with pytest.raises(ValueError, match="level is 1.0"):
        judge_biases(longer, ["A", "A"], level=1)


# agreement


def test_agreement_is_counted_over_pairs_that_both_decide():
    judges = {
        "model": ["A", "B", "A", "tie", None, "B"],
        "one person": ["A", "A", "A", "A", "B", "tie"],
        "another": Verdicts([1, -1, 1, 1, -1, 0]),
    }
    found = {(pair.one, pair.other): pair for pair in judge_agreement(judges)}
    pair = found["model", "one person"]
    assert (pair.agreement.value, pair.pairs, pair.ties, pair.missing) == (2 / 3, 3, 2, 1)
    assert found["one person", "another"].agreement.value == 4 / 5
    assert len(found) == 3

    third = judge_agreement(judges, ties="third")[0]
    assert (third.agreement.value, third.pairs, third.ties) == (2 / 5, 5, 0)
    none = judge_agreement({"a": ["tie"], "b": ["A"]})[0]
    assert none.pairs == 0 and np.isnan(none.agreement.value)


@pytest.mark.parametrize(
    ("judges", "options", "message"),
    [
        ({"a": ["A"]}, {}, "there are 1 judges"),
        ({"a": ["A"], "b": ["A", "B"]}, {}, "different numbers of verdicts .a 1, b 2."),
        ({"a": ["A"], "b": ["b"]}, {}, "b: verdict 0 is 'b'"),
        ({"a": ["A"], "b": ["B"]}, {"ties": "half"}, "ties is 'half'"),
    ],
)
def test_bad_input_to_agreement_is_named(judges, options, message):
    with pytest.raises(ValueError, match=message):
        judge_agreement(judges, **options)


# ratings of models


def test_a_tie_is_half_a_win_for_each():
    """The ratings of the same comparisons, each counted twice, ties once each way."""
    rng = np.random.default_rng(0)
    a = rng.integers(4, size=80)
    b = (a + rng.integers(1, 4, size=80)) % 4
    points = rng.choice([0, 0.5, 1], size=80)
    found = fit_ratings([f"m{i}" for i in a], [f"m{i}" for i in b], points)

    twice = [(i, j) for i, j, p in zip(a, b, points) for _ in range(round(2 * p))]
    twice += [(j, i) for i, j, p in zip(a, b, points) for _ in range(round(2 - 2 * p))]
    exact = fit_bradley_terry(*np.array(twice).T, 4)
    order = [found.names.index(f"m{i}") for i in range(4)]
    np.testing.assert_allclose(found.ratings[order], exact.rewards, atol=1e-9)
    best = found.ranked()[0]
    assert found.rating(best).value == pytest.approx(exact.rewards.max())
    gap = found.difference(best, found.ranked()[1])
    assert found.win_rate(best, found.ranked()[1]).value == pytest.approx(sigmoid(gap.value))


def test_intervals_of_ratings_hold_the_truth():
    true, rng, held = np.array([0.5, 0.0, -0.2, -0.3]), np.random.default_rng(0), []
    for _ in range(200):
        a = rng.integers(4, size=300)
        b = (a + rng.integers(1, 4, size=300)) % 4
        points = (rng.random(300) < sigmoid(true[a] - true[b])).astype(float)
        found = fit_ratings(["0123"[i] for i in a], ["0123"[i] for i in b], points)
        held.append([0.5 in found.difference("0", "1"), 0.5 in found.rating("0")])
    assert (np.abs(np.mean(held, 0) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 200)).all(), held


def test_repeating_each_verdict_makes_no_rating_more_certain():
    """The same verdict four times per prompt is one verdict, where prompts are named."""
    rng = np.random.default_rng(0)
    points = (rng.random(60) < 0.6).astype(float)
    once = fit_ratings(["a"] * 60, ["b"] * 60, points).difference("a", "b")
    owners = np.repeat(np.arange(60), 4)
    repeated = np.repeat(points, 4)
    four = fit_ratings(["a"] * 240, ["b"] * 240, repeated, prompt_of=owners).difference("a", "b")
    assert (four.low, four.high) == pytest.approx((once.low, once.high), abs=1e-6)


def test_a_model_without_a_defeat_needs_a_prior():
    with pytest.raises(ValueError, match=r"\['best'\].*never lost to another.*prior=1"):
        fit_ratings(["best", "b", "c"], ["b", "c", "b"], [1, 1, 1])
    weak, strong = (
        fit_ratings(["best", "b", "c"], ["b", "c", "b"], [1, 1, 1], prior=p) for p in (1, 10)
    )
    assert weak.ranked()[0] == "best"
    assert 0 < strong.rating("best").value < weak.rating("best").value < 3


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["a"], ["b", "c"], [1]), {}, "1 names in first, 2 in second"),
        ((["a"], ["a"], [1]), {}, "'a' against itself"),
        ((["a"], ["b"], [2]), {}, r"points must lie in \[0, 1\]"),
        ((["a"], ["b"], [np.nan]), {}, "no comparison has a verdict"),
        (([], [], []), {}, "no comparison has a verdict"),
        ((["a"], ["b"], [0.5]), {"prior": -1}, "prior is -1"),
        ((["a"], ["b"], [0.5]), {"prompt_of": [0, 1]}, "2 values in prompt_of"),
    ],
)
def test_bad_input_to_ratings_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        fit_ratings(*arguments, **options)


def test_every_two_models_are_compared_on_the_same_prompts():
    """A noisy judge of answers whose true rewards are known ranks the models by them."""
    rng = np.random.default_rng(0)
    prompts, quality = [f"p{i}" for i in range(150)], {"good": 1.0, "fair": 0.4, "poor": 0.0}
    answers = {name: [f"{name}-{q + rng.normal():.3f}" for _ in prompts]
               for name, q in quality.items()}  # fmt: skip
    judge = biased_judge(lambda t: [float(x.split("-", 1)[1]) for x in t], accuracy=0.9)
    found, rates = ratings_of_models(judge, prompts, answers)
    assert found.ranked() == ["good", "fair", "poor"]
    assert set(rates) == {("good", "fair"), ("good", "poor"), ("fair", "poor")}
    assert found.difference("good", "poor").low > 0
    assert abs(found.win_rate("good", "poor").value - rates["good", "poor"].rate) < 0.05
    with pytest.raises(ValueError, match="there is no model 'best'; there are good, fair, poor"):
        found.rating("best")
    with pytest.raises(ValueError, match="answers of 1 models"):
        ratings_of_models(judge, prompts, {"good": answers["good"]})


# over temperatures


@pytest.fixture(scope="module")
def lm(tiny):
    return load_model(str(tiny)), load_tokenizer(str(tiny))


def test_a_sweep_begins_with_greedy_search(lm):
    """At temperature 0 an answer is the likeliest continuation, as text, and best of N the same."""
    model, tokenizer = lm
    prompts = [tokenizer.encode(text) for text in ("this film", "the plot of", "a")]
    texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)

    def long(texts):
        return [len(text) for text in texts]

    plain = policy_answers(model, tokenizer, prompts, max_new_tokens=6)
    best = policy_answers(model, tokenizer, prompts, max_new_tokens=6, best_of=4, reward=long)
    greedy = sample_completions(
        model, prompts, 1, eos_token_id=end_tokens(model, tokenizer), max_new_tokens=6,
        temperature=0.0,
    )  # fmt: skip
    said = [tokenizer.decode(row[0], skip_special_tokens=True) for row in greedy]
    assert plain(0.0, 0) == best(0.0, 5) == said
    assert plain(1.0, 0) == plain(1.0, 0) != plain(1.0, 1)

    sweep = temperature_sweep(
        {"plain": plain, "best of 4": best}, texts, reward_judge(long), said, temperatures=(0, 1)
    )
    assert sweep.temperatures == (0.0, 1.0)
    assert [curve[0].rate for curve in sweep.curves.values()] == [0.5, 0.5]
    assert sweep.curves["best of 4"][1].rate >= sweep.curves["plain"][1].rate
    assert [row["policy"] for row in sweep.rows()] == ["plain"] * 2 + ["best of 4"] * 2
    assert set(sweep.rows()[0]) == {
        "policy", "temperature", "rate", "low", "high", "missing_pairs",
    }  # fmt: skip


def test_the_best_of_n_has_the_highest_reward(lm):
    model, tokenizer = lm
    prompts = [tokenizer.encode("this film")]

    def reward(texts):
        seen.extend(texts)
        return [text.count("a") for text in texts]

    seen = []
    chosen = policy_answers(model, tokenizer, prompts, max_new_tokens=8, best_of=5, reward=reward)
    answer = chosen(1.0, 0)[0]
    assert len(seen) == 5
    assert (f"this film{answer}").count("a") == max(text.count("a") for text in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": [-1]}, r"temperatures are \[-1\]"),
        ({"temperatures": []}, "give at least one"),
        ({"temperatures": [np.nan]}, "give at least one"),
        ({"policies": {}}, "there is no policy"),
        ({"prompts": []}, "there are no prompts"),
        ({"policies": {"short": lambda t, s: []}}, "0 answers for 1 prompts"),
    ],
)
def test_bad_input_to_a_sweep_is_named(options, message):
    given_ = {"policies": {"x": lambda t, s: ["a"]}, "prompts": ["p"], "baseline": ["b"]}
    given_ |= {"judge": lambda *_: ["A", "B"]} | options
    with pytest.raises(ValueError, match=message):
        temperature_sweep(**given_)


def test_best_of_n_needs_n_and_a_reward(lm):
    for options, message in (({"best_of": 0}, "best_of is 0"), ({"best_of": 2}, "no reward")):
        with pytest.raises(ValueError, match=message):
            policy_answers(*lm, [[0]], max_new_tokens=2, **options)
