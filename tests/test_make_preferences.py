"""Preferences of one's own: samples, judges, losses, and the card that says so."""

import json

import numpy as np
import pytest
from datasets import Dataset

from dpo_lab import load_model, load_tokenizer
from dpo_lab.data.answers import Answers, AnswersConfig, sample_answers
from dpo_lab.data.card import QUESTIONS, data_card
from dpo_lab.data.labeling import Labeling
from dpo_lab.data.make import judged_by, judged_by_people, judged_by_reward, make_preferences
from dpo_lab.data.prompts import read_prompts, template_prompts
from dpo_lab.data.ratings import RatingStore

PROMPTS = ["This movie", "The film was"]
CONFIG = AnswersConfig(k=2, temperatures=(0.0, 1.0), max_new_tokens=6, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def answers(model, tokenizer):
    return sample_answers(PROMPTS, {"one": model, "again": "embedded"}, tokenizer, CONFIG)


def letters_e(texts):
    """A reward with many ties."""
    return np.array([text.count("e") for text in texts], float)


def test_answers_are_distinct_and_know_where_they_were_drawn(answers, tokenizer):
    assert answers.prompt_texts == PROMPTS
    drawn = [origin for some in answers.origins for origin in some]
    assert len(drawn) == 2 * 2 * 2 * 2 and answers.duplicated == 16 - len(answers.texts)
    keys = list(zip(answers.prompt_of, answers.texts))
    assert len(set(keys)) == len(keys)

    # greedy search gives one answer to each prompt, whatever its model and number
    greedy = [some for some in answers.origins if some[0].temperature == 0]
    assert sorted(map(len, greedy)) == [4, 4]
    for ids, text in zip(answers.completions, answers.texts):
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for a, b in answers.pairs:
        assert answers.prompt_of[a] == answers.prompt_of[b] and a != b
    assert len({frozenset(pair) for pair in answers.pairs}) == len(answers.pairs)


def test_one_seed_decides_all(answers, model, tokenizer, tmp_path):
    again = sample_answers(PROMPTS, {"one": model, "again": "embedded"}, tokenizer, CONFIG)
    answers.save(tmp_path / "one.json")
    again.save(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    other = AnswersConfig(k=2, temperatures=(1.0,), max_new_tokens=6, seed=4)
    assert sample_answers(PROMPTS, model, tokenizer, other).texts != answers.texts
    loaded = Answers.load(tmp_path / "one.json")
    assert loaded.pairs == answers.pairs and loaded.origins == answers.origins
    assert loaded.config == answers.config
    (tmp_path / "one.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold answers"):
        Answers.load(tmp_path / "one.json")


def test_a_reward_chooses_and_ties_are_counted(answers, model, tokenizer):
    made = judged_by_reward(answers, letters_e)
    scores = letters_e([PROMPTS[p] + text for p, text in zip(answers.prompt_of, answers.texts)])
    ties = sum(scores[a] == scores[b] for a, b in answers.pairs)
    chosen, rejected = made.preferences.chosen, made.preferences.rejected
    assert made.ties == ties == made.preferences.report.ties
    assert len(chosen) == len(answers.pairs) - ties
    np.testing.assert_array_equal(made.margins, scores[chosen] - scores[rejected])
    assert (made.margins > 0).all() and made.judge == "letters_e"
    np.testing.assert_array_equal(made.preferences.scores, scores)

    # the same in one call
    models = {"one": model, "again": "embedded"}
    whole = make_preferences(PROMPTS, models, tokenizer, reward=letters_e, config=CONFIG)
    assert whole.preferences.tokens_hash() == made.preferences.tokens_hash()
    np.testing.assert_array_equal(whole.preferences.chosen, chosen)


class Said:
    """What `dpo_lab.judges` returns: letters, and why some are missing."""

    def __init__(self, letters):
        self.letters = letters
        self.missing = tuple("" if letter else "refusal" for letter in letters)


def test_a_judge_sees_texts_and_its_silence_is_counted(answers):
    seen = []

    def judge(prompts, a, b):
        seen.extend(zip(prompts, a, b))
        return ["A", "B", "tie", None] * 10

    def longer(prompts, a, b):
        close = [abs(len(x) - len(y)) < 5 for x, y in zip(a, b)]
        return Said(["" if c else "AB"[len(x) < len(y)] for c, x, y in zip(close, a, b)])

    with pytest.raises(ValueError, match=f"gave 40 verdicts for {len(answers.pairs)} pairs"):
        judged_by(answers, judge)
    assert [(x, y) for _, x, y in seen] == [
        (answers.texts[a], answers.texts[b]) for a, b in answers.pairs
    ]
    made = judged_by(answers, longer)
    length = [len(text) for text in answers.texts]
    pairs = zip(made.preferences.chosen, made.preferences.rejected)
    assert all(length[c] > length[r] for c, r in pairs)
    silent = sum(abs(length[a] - length[b]) < 5 for a, b in answers.pairs)
    assert silent > 0 and made.missing == {"refusal": silent}

    half = judged_by(answers, lambda p, a, b: (["A", "tie"] * len(p))[: len(p)])
    assert half.ties == len(answers.pairs) // 2 and half.margins is None
    with pytest.raises(ValueError, match="verdict 0 is 'C'"):
        judged_by(answers, lambda p, a, b: ["C"] * len(p))


def test_people_choose_in_the_form_and_the_card_says_so(answers, tmp_path):
    items = answers.items()
    store = RatingStore(tmp_path / "ratings.jsonl")
    for rater, lacks in (("A", 2), ("B", 0)):
        labeling = Labeling(items, store, rater=rater, guidelines="Prefer *the* shorter.")
        while labeling.item is not None and labeling.view()["done"] < len(items) - lacks:
            left, right = (len(text) for text in labeling.view()["item"]["answers"])
            labeling.press("left" if left < right else "right" if right < left else "tie")
    made = judged_by_people(answers, store.path)
    length = [len(text) for text in answers.texts]
    preferences = made.preferences
    assert all(length[c] < length[r] for c, r in zip(preferences.chosen, preferences.rejected))
    assert made.ties + len(preferences.chosen) == len(items) and made.missing == {}
    only = judged_by_people(answers, store, rater="A")
    assert only.missing == {"unrated": 2} and only.judge == "people (A)"

    # what is recorded stands there, and nothing else is made up
    says = {"purpose": "To <b>learn</b>."}
    card = data_card("A & B", made, license="CC0", store=store, items=items, says=says)
    assert "# Data card: A &amp; B" in card and "To &lt;b&gt;learn&lt;/b&gt;." in card
    assert "**License:** CC0" in card and f"**Pairs:** {len(preferences.chosen)}" in card
    assert "people (A, B)" in card and "| again | 0 |" in card
    assert f"{2 * len(items) - 2} ratings:** Prefer &#42;the&#42; shorter." in card
    assert card.count("not recorded") == len(QUESTIONS) - 1 + 2
    assert "**A in two passes:** not recorded" in card and "Raw agreement:** 1.00" in card


def test_a_card_of_bare_preferences_knows_little(answers):
    bare = judged_by_reward(answers, letters_e).preferences
    card = data_card("bare", bare, license="none: not for use")
    assert "**Judge:** not recorded" in card and "## Agreement" not in card
    assert f"**Ties:** {bare.report.ties}" in card


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"license": " "}, "license is ' '"),
        ({"license": None}, "license is None"),
        ({"license": "CC0", "says": {"price": "0"}}, "says has 'price'"),
        ({"license": "CC0", "says": {"uses": 3}}, "it must be a text"),
        ({"license": "CC0", "store": True}, "items is None"),
    ],
)
def test_a_card_takes_no_blank_license_and_no_unknown_answer(answers, tmp_path, options, problem):
    if "store" in options:
        options = {**options, "store": RatingStore(tmp_path / "ratings")}
    with pytest.raises((ValueError, TypeError), match=problem):
        data_card("card", judged_by_reward(answers, letters_e), **options)


# prompts


def test_prompts_come_from_lists_files_rows_and_templates(tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\ntwo\none\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (tmp_path / "list.json").write_text(json.dumps(["one", "two"]))
    rows = Dataset.from_dict({"question": ["one", "two"]})
    sources = [["one", "two"], *sorted(tmp_path.iterdir()), str(tmp_path / "lines.txt")]
    assert [read_prompts(source) for source in sources] == 5 * [["one", "two"]]
    assert read_prompts(rows, "question") == ["one", "two"]
    assert read_prompts([[1, 2], [3]]) == [(1, 2), (3,)]
    found = template_prompts("The {what} was {how}", what=["film", "plot"], how=["so", "so"])
    assert found == ["The film was so", "The plot was so"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ([], "prompts is empty"),
        (["a", " "], r"prompts\[1\] is ' '"),
        ([3], r"prompts\[0\] is 3"),
        ("no such file", "the path of a file that is there"),
        ([{"text": "a"}], r"prompts\[0\] has no column 'prompt'; it has \['text'\]"),
    ],
)
def test_bad_prompts_are_named(source, problem):
    with pytest.raises((ValueError, TypeError), match=problem):
        read_prompts(source)


def test_bad_templates_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no values for 'how'"):
        template_prompts("{what} {how}", what=["a"])
    with pytest.raises(ValueError, match="what is 'a'"):
        template_prompts("{what}", what="a")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json' is no JSON"):
        read_prompts(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("models", "config", "problem"),
    [
        ({}, {}, "models is empty"),
        ({"a": 3}, {}, r"models\['a'\] is a int"),
        ("embedded", {"k": 0}, "k is 0"),
        ("embedded", {"temperatures": ()}, r"temperatures is \(\)"),
        ("embedded", {"temperatures": (1.0, 1.0)}, "each once"),
        ("embedded", {"pairs_per_prompt": 0}, "pairs_per_prompt is 0"),
        ("embedded", {"temperatures": (0.0,), "max_new_tokens": 1}, "no prompt has two different"),
    ],
)
def test_bad_models_and_configs_are_named(tokenizer, models, config, problem):
    with pytest.raises((ValueError, TypeError), match=problem):
        sample_answers(PROMPTS, models, tokenizer, AnswersConfig(**config))


def test_models_in_a_list_need_names_and_one_judge_is_given(model, tokenizer):
    with pytest.raises(TypeError, match="give them names"):
        sample_answers(PROMPTS, [model, model], tokenizer)
    for judges in ({}, {"reward": letters_e, "judge": letters_e}):
        with pytest.raises(ValueError, match="either reward or judge"):
            make_preferences(PROMPTS, model, tokenizer, **judges)


def test_fewer_pairs_are_drawn_where_that_is_asked(model, tokenizer):
    config = AnswersConfig(k=4, max_new_tokens=6, pairs_per_prompt=2)
    found = sample_answers(PROMPTS, model, tokenizer, config)
    assert [found.prompt_of[a] for a, _ in found.pairs] == [0, 0, 1, 1]


def test_a_reward_that_gives_something_else_is_named(answers):
    with pytest.raises(ValueError, match="one finite number each"):
        judged_by_reward(answers, lambda texts: [1.0])
    with pytest.raises(ValueError, match="one finite number each"):
        judged_by_reward(answers, lambda texts: np.full(len(texts), np.nan))
