"""What notebook 06 asks its reader to label, and the labels that stand in where nobody does."""

import numpy as np
import pytest

from dpo_lab.data.rated_pairs import choices_of, to_pairs
from dpo_lab.data.ratings import as_items
from dpo_lab.models import load_tokenizer
from dpo_lab.sentiment import load_labels


@pytest.fixture(scope="module")
def labels():
    return load_labels()


def test_token_ids_are_those_of_the_texts(labels):
    tokenizer = load_tokenizer("embedded")
    for row in (*labels["items"]["pairs"], *labels["items"]["rated"]):
        prompt = tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
        assert prompt == row["prompt"]
        for ids, text in zip(row["completion_ids"], row["completions"], strict=True):
            whole = tokenizer.decode(row["prompt_ids"] + ids, skip_special_tokens=True)
            assert whole == row["prompt"] + text
            assert len(ids) == 32 or ids[-1] == tokenizer.eos_token_id


def test_four_passes_and_the_ratings_are_complete(labels):
    recorded, pairs = labels["recorded"], labels["items"]["pairs"]
    assert len(pairs) == 30 and recorded.damaged == ()
    for number in (1, 2, 3, 4):
        found = choices_of(recorded, pairs, rater=labels["rater"], pass_number=number)
        assert set(found) == {-1, 0, 1}

    rated = labels["items"]["rated"]
    singles = [(row["prompt"], text) for row in rated for text in row["completions"]]
    assert len(singles) == 10 and to_pairs(recorded, singles).unrated == 0
    assert len(recorded.ratings()) == 4 * 30 + 10


def test_no_pass_repeats_the_order_or_the_sides_of_another(labels):
    recorded = labels["recorded"]
    orders, sides = [], []
    keys = [item.key for item in as_items(labels["items"]["pairs"])]
    for number in (1, 2, 3, 4):
        ratings = [r for r in recorded.ratings(pass_number=number) if r.choice]
        orders.append([rating.item for rating in ratings])
        sides.append([recorded.get(key, labels["rater"], number).order[0] for key in keys])
    assert len({tuple(order) for order in orders}) == 4
    assert np.abs(np.corrcoef(sides)[np.triu_indices(4, 1)]).max() < 0.5


def test_the_recording_says_whose_it_is_and_claims_no_times(labels):
    recorded = labels["recorded"]
    assert "language model" in labels["rater"] and "not timed" in labels["note"]
    for rating in recorded.ratings():
        assert rating.rater == labels["rater"] and rating.seconds is None
        version = "1" if rating.pass_number < 3 and rating.choice else "2"
        assert recorded.guidelines[rating.guidelines] == labels["guidelines"][version]
