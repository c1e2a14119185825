"""Judges: what they may return, and four that ship, against plain loops and planted truths."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lab.engine.tokenizing import TokenCollector
from dpo_lab.judges import (
    Verdicts,
    ask,
    ask_both_orders,
    biased_judge,
    judge_biases,
    learned_reward_judge,
    lm_judge,
    reward_judge,
)
from dpo_lab.judges.lm import TEMPLATE, filled, letter_tokens
from dpo_lab.judges.simple import content_uniform, token_pairs
from dpo_lab.models import ScalarModel, load_model, load_tokenizer
from dpo_lab.rlhf import LearnedReward
from dpo_lab.sentiment.reward import SentimentReward

THREE = (["p", "q", "r"], ["one", "two", "three"], ["1", "22", "333"])


def says(found):
    return lambda prompts, a, b: found


# verdicts


@pytest.mark.parametrize(
    "found",
    [
        ["A", "B", "tie"],
        ("A", "B", "tie"),
        np.array(["A", "B", "tie"]),
        Verdicts([1, -1, 0]),
        (["A", "B", "tie"], [0.9, 0.2, np.nan]),
    ],
)
def test_whatever_a_judge_returns_becomes_the_same_verdicts(found):
    verdicts = ask(says(found), *THREE)
    assert verdicts.letters == ["A", "B", "tie"] and len(verdicts) == 3
    assert verdicts.points.tolist() == [1, 0, 0.5]
    assert verdicts.swapped().letters == ["B", "A", "tie"]
    assert verdicts.counts() == {"A": 1, "B": 1, "tie": 1}


def test_two_letters_in_a_tuple_are_two_verdicts_and_no_letters_with_confidences():
    assert ask(says(("A", "tie")), *[part[:2] for part in THREE]).letters == ["A", "tie"]


def test_a_missing_verdict_keeps_its_place_and_gets_no_points():
    verdicts = Verdicts([1, 0, 0], [0.7, np.nan, 0.5], ("", "refusal", ""))
    assert verdicts.letters == ["A", "", "tie"]
    np.testing.assert_array_equal(verdicts.points, [1, np.nan, 0.5])
    np.testing.assert_array_equal(verdicts.swapped().confidence, [1 - 0.7, np.nan, 0.5])
    assert verdicts.counts() == {"A": 1, "tie": 1, "refusal": 1}
    assert ask(says([None, "A", "B"]), *THREE).missing == ("empty", "", "")


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (["A", "B"], ValueError, "returned 2 verdicts for 3 pairs"),
        (["A", "B", "a"], ValueError, "verdict 2 is 'a'; it must be 'A', 'B' or 'tie'"),
        (["A", "B", 1], ValueError, "verdict 2 is 1;"),
        (["A", "B", ["A"]], ValueError, r"verdict 2 is \['A'\];"),
        ("ABA", TypeError, "return a list of 'A', 'B' or 'tie'"),
        (None, TypeError, "return a list"),
        ((["A", "B", "A"], [0.5, 1.5, 0.5]), ValueError, r"confidence\[1\] is 1.5;.* in \[0, 1\]"),
        ((["A", "B", "A"], [0.5, -0.1, 0.5]), ValueError, r"confidence\[1\] is -0.1"),
        ((["A", "B", "A"], [0.5]), ValueError, r"confidence has the shape \(1,\) for 3 verdicts"),
        ((["A", "B", "A"], ["high"] * 3), TypeError, "confidence holds"),
    ],
)
def test_a_judge_that_returns_something_else_is_named(found, error, message):
    def odd(prompts, a, b):
        return found

    with pytest.raises(error, match=f"the judge odd returned.*{message}|{message}"):
        ask(odd, *THREE)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (([2, 0, 0],), "1 where A wins"),
        (([[1]],), "1 where A wins"),
        (([np.nan],), "1 where A wins"),
        (([1, 0], None, ("",)), "missing has the shape"),
        (([1], None, ("refused",)), r"missing\[0\] is 'refused'"),
        (([1], None, ("refusal",)), "verdict 0 is missing .refusal. and has the winner A"),
    ],
)
def test_verdicts_that_contradict_themselves_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Verdicts(*parts)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ((["p"], ["a", "b"], ["c"]), ValueError, "1 prompts, 2 answers_a, 1 answers_b"),
        (([], [], []), ValueError, "there are no prompts"),
        (("p", ["a"], ["b"]), TypeError, "prompts is 'p'"),
        ((["p"], [3], ["b"]), TypeError, r"answers_a\[0\] is 3 \(int\)"),
        ((["p"], ["a"], [None]), TypeError, r"answers_b\[0\] is None"),
        ((["p"], None, ["a"]), TypeError, "answers_a is None"),
    ],
)
def test_lists_that_do_not_go_together_are_refused_before_the_judge_is_asked(texts, error, message):
    def never(*_):
        raise AssertionError

    with pytest.raises(error, match=message):
        ask(never, *texts)


def test_both_orders_are_asked_in_one_call_and_an_inconsistent_pair_is_half_and_half():
    calls = []

    def judge(prompts, a, b):
        calls.append(list(zip(prompts, a, b)))
        # p: always the first place; q: always "two"; r: no verdict in one order; s: ties
        return ["A", "A", "A", "tie", "A", "B", None, "tie"]

    both = ask_both_orders(judge, ["p", "q", "r", "s"], ["1", "2", "3", "4"], ["5", "6", "7", "8"])
    assert calls == [
        [("p", "1", "5"), ("q", "2", "6"), ("r", "3", "7"), ("s", "4", "8")]
        + [("p", "5", "1"), ("q", "6", "2"), ("r", "7", "3"), ("s", "8", "4")]
    ]
    np.testing.assert_array_equal(both.points, [0.5, 1, np.nan, 0.5])
    assert both.inconsistent.tolist() == [True, False, False, False]


# rewards


def test_the_higher_reward_wins_and_a_near_tie_is_one():
    reward = {"pone": 1.0, "p1": 0.0, "qtwo": 0.5, "q22": 0.6, "rthree": 2.0, "r333": 2.0}
    judge = reward_judge(lambda texts: [reward[text] for text in texts])
    assert ask(judge, *THREE).letters == ["A", "B", "tie"]
    assert np.isnan(ask(judge, *THREE).confidence).all()
    close = reward_judge(lambda texts: [reward[text] for text in texts], tie_within=0.11)
    assert ask(close, *THREE).letters == ["A", "tie", "tie"]


@pytest.mark.parametrize(
    ("found", "message"),
    [([1.0], "1 values of shape"), ([np.nan] * 6, "6 of them not finite, for 6 texts")],
)
def test_a_reward_that_is_none_is_refused(found, message):
    with pytest.raises(ValueError, match=message):
        ask(reward_judge(lambda texts: found), *THREE)
    with pytest.raises(ValueError, match="tie_within is -1"):
        reward_judge(len, tie_within=-1)


def test_a_sentiment_classifier_is_a_judge():
    reward = SentimentReward(lambda texts: np.array([t.count("good") / 9 for t in texts]), "counts")
    prompts, a, b = ["The film is "] * 2, ["good good", "bad"], ["good", "bad"]
    assert ask(reward_judge(reward), prompts, a, b).letters == ["A", "tie"]


def test_a_learned_reward_is_a_judge_with_the_confidence_of_bradley_terry(tiny):
    """Against the reward of each text alone, tokenized as preferences tokenize."""
    tokenizer, model = load_tokenizer(str(tiny)), ScalarModel(load_model(str(tiny)))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight)
    reward = LearnedReward(model)
    prompts, a, b = ["this film", "the plot"], [" was a joy", " bore"], [" was dull", " was great"]
    verdicts = ask(learned_reward_judge(reward, tokenizer), prompts, a, b)

    def alone(prompt, answer):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        ids = ids if tokenizer("")["input_ids"] else ids[1:]
        said = tokenizer.encode(answer, add_special_tokens=False)
        return reward([ids], [[*said, tokenizer.eos_token_id]])[0]

    gaps = np.array([alone(p, x) - alone(p, y) for p, x, y in zip(prompts, a, b)])
    np.testing.assert_allclose(verdicts.confidence, 1 / (1 + np.exp(-gaps)), atol=1e-5)
    np.testing.assert_array_equal(verdicts.winner, np.sign(gaps))
    assert abs(gaps).min() > 1e-3


def test_token_pairs_keep_their_places_where_texts_repeat(tiny):
    tokenizer = load_tokenizer(str(tiny))
    prompts, answers = token_pairs(tokenizer, ["a film", "the plot", "a film"], [" x", " y", " x"])
    assert prompts[0] == prompts[2] != prompts[1] and answers[0] == answers[2] != answers[1]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in answers)


# the biased judge


def made_up(n, seed):
    """Prompts, two answers to each of unequal lengths, and their true rewards."""
    rng = np.random.default_rng(seed)
    prompts = [f"{seed}/{i}: " for i in range(n)]
    a, b = (["x" * k for k in rng.integers(1, 40, n)] for _ in range(2))
    a, b = [text + "a" for text in a], [text + "b" for text in b]
    rewards = {p + text: rng.normal() for some in (a, b) for p, text in zip(prompts, some)}
    return prompts, a, b, lambda texts: [rewards[text] for text in texts]


PLANTED = {"accuracy": 0.75, "position_bias": 0.1, "length_bias": -0.12}


def recovered(seed, n, level):
    """Whether each planted bias lies in its interval."""
    prompts, a, b, truth = made_up(n, seed)
    judge = biased_judge(truth, **PLANTED, seed=seed)
    both, better = ask_both_orders(judge, prompts, a, b), ask(reward_judge(truth), prompts, a, b)
    found = judge_biases(both, better, level=level)
    return [value in getattr(found, name) for name, value in PLANTED.items()]


def test_planted_biases_lie_in_their_intervals_in_20_of_20_seeds():
    """60 intervals that hold together with probability 95% (Bonferroni): 99.917% each."""
    assert np.all([recovered(seed, 300, 1 - 0.05 / 60) for seed in range(20)])


def test_intervals_at_95_percent_hold_the_planted_biases_in_95_percent_of_400_seeds():
    """Within four standard errors of a fraction of 400, for each of the three biases."""
    held = np.mean([recovered(1_000 + seed, 100, 0.95) for seed in range(400)], axis=0)
    assert (np.abs(held - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 400)).all(), held


def test_verdicts_depend_on_the_seed_and_the_texts_and_on_nothing_else():
    prompts, a, b, truth = made_up(60, 0)
    judge = biased_judge(truth, **PLANTED, seed=3)
    found = ask(judge, prompts, a, b)
    alone = [ask(judge, [p], [x], [y]).letters[0] for p, x, y in zip(prompts, a, b)]
    assert found.letters == alone
    again = ask(judge, prompts[::-1], a[::-1], b[::-1]).letters[::-1]
    assert again == alone
    assert ask(biased_judge(truth, **PLANTED, seed=4), prompts, a, b).letters != alone


@pytest.mark.parametrize(
    ("options", "letters"),
    [
        ({"accuracy": 1.0}, {"A"}),
        ({"accuracy": 0.0}, {"B"}),
        ({"accuracy": 0.5, "position_bias": 0.5}, {"A"}),
        ({"accuracy": 0.5, "position_bias": -0.5}, {"B"}),
        ({"accuracy": 0.5, "length_bias": 0.5}, {"B"}),
        ({"accuracy": 0.5}, {"A", "B"}),
    ],
)
def test_extreme_judges_leave_nothing_to_chance(options, letters):
    """A is better, and B longer."""
    texts = ([f"{i}" for i in range(40)], ["a"] * 40, ["bb"] * 40)
    judge = biased_judge(lambda texts: ["a" in text for text in texts], **options)
    assert set(ask(judge, *texts).letters) == letters


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"accuracy": 0.9, "position_bias": 0.2}, ValueError, "is 0.6 .* at most 1/2"),
        ({"accuracy": 1.2}, ValueError, "accuracy 1.2"),
        ({"accuracy": np.nan}, ValueError, "accuracy nan"),
        ({"length_bias": "long"}, TypeError, "length_bias is 'long'"),
        ({"seed": 0.5}, TypeError, "seed is 0.5"),
    ],
)
def test_biases_that_cannot_be_together_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        biased_judge(lambda texts: texts, **options)


def test_the_noise_is_uniform_and_tells_apart_what_lies_between_texts():
    drawn = np.sort([content_uniform(0, "p", str(i)) for i in range(2_000)])
    assert np.abs(drawn - (np.arange(2_000) + 0.5) / 2_000).max() < 1.63 / np.sqrt(2_000)
    assert content_uniform(0, "ab", "c") != content_uniform(0, "a", "bc")
    assert content_uniform(0, "\ud800") != content_uniform(1, "\ud800")


# a language model


SHORT = "{prompt}|{a}|{b}?"


@pytest.fixture(scope="module")
def lm(tiny):
    return load_model(str(tiny)), load_tokenizer(str(tiny))


def next_logp(model, ids, said):
    """log-prob of the tokens `said` after `ids`, by plain softmaxes in float64."""
    total = 0.0
    for i, token in enumerate(said):
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *said[:i]]])).logits[0, -1].double()
        total += float(logits.log_softmax(0)[token])
    return total


@pytest.mark.parametrize("chat", [False, True])
def test_the_confidence_is_that_of_plain_softmaxes(lm, chat):
    model, tokenizer = lm
    turns = "{% for m in messages %}U: {{ m.content }}\n{% endfor %}M: "
    tokenizer.chat_template = turns if chat else None
    texts = (["good", "odd", "good"], ["a {b}", "joy", "a {b}"], ["film", "dull", "film"])
    found = ask(lm_judge(model, tokenizer, SHORT), *texts)

    expected = []
    for prompt, a, b in zip(*texts):
        text = f"U: {prompt}|{a}|{b}?\nM: Preferred:" if chat else f"{prompt}|{a}|{b}?\nPreferred:"
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not chat and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
            ids = [tokenizer.bos_token_id, *ids]
        chances = [
            sum(
                np.exp(next_logp(model, ids, tokenizer.encode(way, add_special_tokens=False)))
                for way in (letter, " " + letter)
            )
            for letter in "AB"
        ]
        expected.append(chances[0] / sum(chances))
    tokenizer.chat_template = None
    np.testing.assert_allclose(found.confidence, expected, atol=1e-5)
    assert found.letters == ["A" if p > 0.5 else "B" for p in expected]
    assert found.confidence[0] == found.confidence[2]


def test_a_prompt_with_a_label_leads_to_the_letter_by_it(lm):
    """The prompts of the paper have a template and a label, as this one does."""
    asked = SimpleNamespace(template=SHORT, label="More helpful")
    texts = (["good"], ["joy"], ["dull"])
    found = ask(lm_judge(*lm, asked), *texts).confidence
    assert found == ask(lm_judge(*lm, SHORT, lead="More helpful:"), *texts).confidence
    assert found != ask(lm_judge(*lm, SHORT), *texts).confidence


def test_a_tie_near_one_half_and_no_verdict_where_neither_letter_is_likely(lm):
    texts = (["good"], ["joy"], ["dull"])
    assert ask(lm_judge(*lm, SHORT, tie_within=0.5), *texts).letters == ["tie"]
    unlikely = ask(lm_judge(*lm, SHORT, least_mass=0.9), *texts)
    assert unlikely.missing == ("prose",) and unlikely.letters == [""]


def test_ways_to_write_a_letter_are_different_events(lm):
    collector = TokenCollector(lm[1], 1_000, None)
    ways = letter_tokens(collector, "A")
    assert 1 <= len(ways) <= 2
    assert not any(one is not two and one[: len(two)] == two for one in ways for two in ways)


@given(st.text(), st.text(), st.text())
@settings(max_examples=30, deadline=None)
def test_fields_in_the_texts_are_text(prompt, a, b):
    assert filled("{prompt}\0{a}\0{b}", prompt, a, b) == f"{prompt}\0{a}\0{b}"
    assert "{a}" in filled(TEMPLATE, "{a}", "x", "{prompt}")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"template": "{prompt} {a}"}, ValueError, "once each"),
        ({"template": "{prompt} {a} {b} {a}"}, ValueError, "once each"),
        ({"template": 3}, TypeError, "template is 3"),
        ({"tie_within": 0.6}, ValueError, "tie_within is 0.6"),
        ({"least_mass": 2}, ValueError, "least_mass 2.0"),
        ({"precision": "int8"}, ValueError, "precision is 'int8'"),
    ],
)
def test_bad_settings_of_a_language_model_judge_are_named(lm, options, error, message):
    with pytest.raises(error, match=message):
        lm_judge(*lm, **options)


def test_a_question_that_is_too_long_for_the_model_is_refused(lm):
    with pytest.raises(ValueError, match="context"):
        ask(lm_judge(*lm), ["film " * 60], ["joy"], ["dull"])
