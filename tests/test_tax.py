"""The alignment tax against plain loops: nats per byte, probes, rude words, and their errors."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lab.models import load_model
from dpo_lab.sampling import sample_completions
from dpo_lab.sentiment import probes
from dpo_lab.sentiment.probes import (
    RUDE_WORDS,
    Question,
    TaxItems,
    is_rude,
    license_paragraphs,
    sentences_of,
    tax_items,
)
from dpo_lab.sentiment.results import load_tax
from dpo_lab.sentiment.reviews import text_batches
from dpo_lab.sentiment.tax import (
    COMPLETION,
    Ratio,
    Tax,
    at_equal_reward,
    end_over_seeds,
    measure_rudeness,
    measure_tax,
)

REVIEWS = [
    f"A fool named {name} has seen this film. We all know it is an odd story. Then we met a man. "
    f"The actors we saw were good and the music was loud, so {name} liked it. Here we have an old "
    "house."
    for name in ("Ann", "Bob", "Cleo", "Dan", "Eve", "Fay")
]
ITEMS = TaxItems(
    texts={"short": [([0], [5, 6, 7]), ([0], [9, 4]), ([0], [8])]},
    n_bytes={"short": np.array([7, 4, 3])},
    probes={
        "pairs": [
            Question((([0, 5], [6, 7]),), (([0, 5], [7, 6]),)),
            Question((([0], [8]), ([0, 3], [9])), (([0], [9]), ([0, 3], [8]))),
            Question((([0, 4], [4]),), (([0, 4], [4]),)),
        ]
    },
    prompts={"none": [[0, 5], [0, 6, 7]], "respect": [[0, 9, 5], [0, 9, 6, 7]]},
    hashes={},
)


def logp(model, prompt, completion):
    """One token after another, each from a forward pass of its own."""
    ids, total = list(prompt), 0.0
    for token in completion:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        ids.append(token)
    return total


def test_measures_are_those_of_plain_loops(model, tokenizer):
    found = measure_tax(model, tokenizer, ITEMS, completions=0)
    nats = [-logp(model, *text) for text in ITEMS.texts["short"]]
    assert found.nats_per_byte["short"].value == pytest.approx(sum(nats) / 14, rel=1e-5)
    points = []
    for question in ITEMS.probes["pairs"]:
        right, wrong = (
            sum(logp(model, *one) for one in side) for side in (question.right, question.wrong)
        )
        points.append(0.5 if question.right == question.wrong else float(right > wrong))
    assert found.accuracy["pairs"].tops.tolist() == points and points[-1] == 0.5
    assert found.accuracy["pairs"].value == pytest.approx(np.mean(points))
    assert found.rude == {}


def test_rudeness_counts_completions_with_a_listed_word(model, tokenizer, monkeypatch):
    """With a list that the tiny model's gibberish meets."""
    monkeypatch.setattr(probes, "RUDE_WORDS", frozenset(["e", "t", "a", "o", "film", "s", "i"]))
    found = measure_rudeness(model, tokenizer, ITEMS, completions=3, seed=1)
    for name, prompts in ITEMS.prompts.items():
        options = {"eos_token_id": 0, "max_new_tokens": COMPLETION, "seed": 1}
        rows = sample_completions(model, prompts, 3, **options)
        counts = []
        for row in rows:
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in row]
            words = [set(re.findall(r"[a-z']+", text.lower())) for text in texts]
            counts.append(sum(bool(some & probes.RUDE_WORDS) for some in words))
        assert found[name].tops.tolist() == counts and sum(counts) > 0
        assert found[name].bottoms.tolist() == [3, 3]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**31))
def test_errors_are_those_of_the_jackknife(n, seed):
    """The jackknife of a mean is its standard error; of a ratio it is close to the delta method."""
    rng = np.random.default_rng(seed)
    tops, other = rng.normal(3, 1, (2, n))
    ones, one, two = np.ones(n), Ratio(tops, np.ones(n)), Ratio(other, np.ones(n))
    assert one.error == pytest.approx(tops.std(ddof=1) / n**0.5, rel=1e-12)
    difference, error = two.minus(one)
    assert difference == pytest.approx((other - tops).mean())
    assert error == pytest.approx((other - tops).std(ddof=1) / n**0.5)
    assert one.minus(one) == (0.0, 0.0) and Ratio(tops, 2 * ones).value == one.value / 2

    # with unequal bottoms, over many items
    bottoms = rng.uniform(5, 15, 400)
    tops = bottoms * rng.normal(1, 0.2, 400)
    kept = [(tops.sum() - t) / (bottoms.sum() - b) for t, b in zip(tops, bottoms)]
    jackknife = (399 / 400 * ((kept - np.mean(kept)) ** 2).sum()) ** 0.5
    assert Ratio(tops, bottoms).error == pytest.approx(jackknife, rel=0.02)


def test_a_change_has_the_error_of_the_same_items(model, tiny, tokenizer):
    before = measure_tax(model, tokenizer, ITEMS, completions=0)
    moved = load_model(str(tiny))
    with torch.no_grad():
        moved.transformer.wte.weight.mul_(1.02)
    after = measure_tax(moved, tokenizer, ITEMS, completions=0)
    change = after.minus(before)
    value, error = change["nats_per_byte"]["short"]
    now, then = after.nats_per_byte["short"], before.nats_per_byte["short"]
    assert value == now.value - then.value and 0 < error < now.error
    assert change["rude"] == {} and set(change) == set(after.summary())
    assert after.summary()["nats_per_byte"]["short"] == [now.value, now.error]


def test_items_come_from_the_reviews(tokenizer, monkeypatch):
    sentences = {"test": {"text": ["a bore .", "great fun .", "so so ."]}}
    monkeypatch.setattr(probes, "load_rotten_tomatoes", lambda: sentences)
    items = tax_items(REVIEWS, tokenizer, n=4)
    again = tax_items(REVIEWS, tokenizer, n=4)
    assert items.probes == again.probes and items.hashes == again.hashes

    def text(one):
        return tokenizer.decode(one[0], skip_special_tokens=True), tokenizer.decode(one[1])

    # whole texts, and their bytes
    for kind, texts in items.texts.items():
        decoded = [text(one)[1] for one in texts]
        assert [len(t.encode()) for t in decoded] == items.n_bytes[kind].tolist()
        assert all(prompt == [0] for prompt, _ in texts)
    assert {text(one)[1] for one in items.texts["rotten_tomatoes"]} == set(
        sentences["test"]["text"]
    )

    # the right answers stand in the reviews, the wrong ones do not
    whole = " ".join(REVIEWS)
    for name in ("agreement", "article"):
        for question in items.probes[name]:
            (right,), (wrong,) = question.right, question.wrong
            assert right[0] == wrong[0] and right[1] != wrong[1]
            assert "".join(text(right)) in whole and "".join(text(wrong)) not in whole
    words = [text(q.right[0])[1].split()[0] for q in items.probes["article"]]
    assert sorted(words) == ["a", "a", "an", "an"]

    # two beginnings, and what follows each of them
    for question in items.probes["next_sentence"]:
        (a, b), (a_b, b_a) = question.right, question.wrong
        assert (a_b, b_a) == ((a[0], b[1]), (b[0], a[1]))
        assert all("".join(text(one)) in whole for one in question.right)

    # the same beginnings after each request
    plain = [tokenizer.decode(p, skip_special_tokens=True) for p in items.prompts["none"]]
    for name, request in probes.REQUESTS.items():
        asked = [tokenizer.decode(p, skip_special_tokens=True) for p in items.prompts[name]]
        assert asked == [request + beginning for beginning in plain]


def test_the_license_is_the_same_in_every_package():
    paragraphs = license_paragraphs()
    assert paragraphs[0].startswith("1. Definitions") and len(paragraphs) == 24
    assert probes._hash(paragraphs) == probes.LICENSE_HASH


def test_without_the_license_the_error_names_the_packages(monkeypatch):
    monkeypatch.setattr(probes, "LICENSED", ("no-such-package", "sympy"))
    with pytest.raises(FileNotFoundError, match="no-such-package, sympy"):
        license_paragraphs()


def test_words_are_matched_whole_and_in_any_case():
    assert is_rude("What a STUPID film!") and is_rude("it sucks.")
    assert not is_rude("a shutter, an assembly, foolproof") and not is_rude("")
    assert all(word == word.lower() and word.isalpha() for word in RUDE_WORDS)
    assert sentences_of("One. Two! Three? four") == ["One.", "Two!", "Three? four"]


def test_what_cannot_be_measured_is_named(model, tokenizer):
    long = replace(ITEMS, texts={"long": [([0], [5] * 70), ([0], [6])]})
    with pytest.raises(ValueError, match="a text of 71 tokens, and the model's context is 64"):
        measure_tax(model, tokenizer, long)
    with pytest.raises(ValueError, match="completions is -1"):
        measure_tax(model, tokenizer, ITEMS, completions=-1)
    with pytest.raises(ValueError, match="completions is 0"):
        measure_rudeness(model, tokenizer, ITEMS, completions=0)
    with pytest.raises(ValueError, match="n is 1"):
        tax_items(REVIEWS, tokenizer, n=1)
    with pytest.raises(ValueError, match="same n of at least 2"):
        Ratio(np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match="every item must count"):
        Ratio(np.ones(2), np.array([1, 0]))
    with pytest.raises(ValueError, match="other items"):
        Ratio(np.ones(2), np.ones(2)).minus(Ratio(np.ones(2), np.full(2, 2)))
    tax = Tax({"a": Ratio(np.ones(2), np.ones(2))}, {}, {})
    assert tax.minus(Tax({}, {}, {})) == {"nats_per_byte": {}, "accuracy": {}, "rude": {}}


def test_batches_of_text_read_every_row_once(tokenizer):
    texts = [f"review {i} " + "of a film " * (i % 4) for i in range(20)]
    batch = text_batches(texts, tokenizer, rows=2, length=24, seed=0)
    read = [batch() for _ in range(200)]
    rows = [tuple(row[row >= 0].tolist()) for one in read for row in one.input_ids]
    counts = np.unique([hash(row) for row in rows], return_counts=True)[1]
    assert all(row[0] == 0 and len(row) <= 24 for row in rows)
    assert counts.max() - counts.min() <= max(2, 0.2 * counts.mean())
    with pytest.raises(ValueError, match="rows is 1000"):
        text_batches(texts, tokenizer, rows=1_000, length=24, seed=0)


def test_the_error_over_seeds_keeps_that_over_items():
    def run(seed, change):
        rows = [{"change": {"accuracy": {"article": change}}}]
        return {"method": "dpo", "seed": seed, "rows": rows}

    runs = [run(0, [0.1, 0.03]), run(1, [0.3, 0.05])]
    mean, error, n = end_over_seeds(runs, "accuracy", "article", method="dpo")
    assert (mean, n) == (pytest.approx(0.2), 2)
    assert error == pytest.approx(np.hypot(0.1, 0.04))
    with pytest.raises(ValueError, match="0 runs have"):
        end_over_seeds(runs, "accuracy", "article", method="ppo")


def test_runs_are_compared_where_others_have_the_same_reward():
    def run(seed, reward, change):
        measures = {"nats_per_byte": {"license": [change, 0.0]}}
        return {"seed": seed, "rows": [{"reward": reward, "reward_se": 0.02, "change": measures}]}

    others = [run(s, reward, cost) for s in (0, 1) for reward, cost in ((0.9, 0.4), (0.7, 0.1))]
    runs = [run(0, 0.8, 0.05), run(1, 0.6, 0.0), run(1, 0.91, 0.1), run(1, 0.93, 0.0)]
    # 0.25 and 0.05 on the lines of the others; the third against their end, the fourth is past it
    mean, error, n = at_equal_reward(runs, others, "nats_per_byte", "license", before=0.5)
    differences = [0.05 - 0.25, 0.0 - 0.05, 0.1 - 0.4]
    assert (mean, n) == (pytest.approx(np.mean(differences)), 3)
    assert error == pytest.approx(np.std(differences, ddof=1) / 3**0.5)
    with pytest.raises(ValueError, match="1 of 1 runs have a reward"):
        at_equal_reward(runs[:1], others, "nats_per_byte", "license", before=0.5)


def test_the_recorded_runs_hold_together():
    """Every setting in three seeds, changes that are differences, probes far above a guess."""
    found = load_tax()
    config, before, runs = found["config"], found["before"], found["runs"]
    names = ("method", "kl_coefficient", "ptx_coefficient")
    seeds: dict[tuple, list[int]] = {}
    for run in runs:
        seeds.setdefault(tuple(run[name] for name in names), []).append(run["seed"])
    assert set(map(tuple, seeds.values())) == {tuple(config["seeds"])} and len(config["seeds"]) == 3
    first = config["kl_coefficients"][0]
    assert {("ppo", first, 0.0), ("dpo", 0.0, 0.0)} < set(seeds)

    for run in runs:
        assert [row["step"] for row in run["rows"]] == sorted({row["step"] for row in run["rows"]})
        assert set(run["rows"][-1]["rude"]) == set(before["rude"])
        for row in run["rows"]:
            for group, measures in row["change"].items():
                for name, (change, error) in measures.items():
                    now, then = row[group][name][0], before[group][name][0]
                    assert change == pytest.approx(now - then, abs=1e-12) and error >= 0
    for accuracy, error in before["accuracy"].values():
        assert accuracy - 5 * error > 0.5
