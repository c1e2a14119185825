"""The sentiment reward: good enough on real reviews, read back without pickle."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_classifier, make_reviews
from transformers import (
    BertForSequenceClassification,
    BertTokenizerFast,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from dpo_lab.models import load_model
from dpo_lab.sentiment import reward as rewards
from dpo_lab.sentiment.reviews import load_imdb
from dpo_lab.sentiment.reward import SentimentReward, cache_directory


def test_held_out_accuracy_on_imdb_is_at_least_0895():
    reviews = load_imdb()
    reward = SentimentReward.tfidf(list(reviews["train"]["text"]), list(reviews["train"]["label"]))
    probabilities = reward(list(reviews["test"]["text"]))
    assert (
        probabilities.dtype == np.float64 and 0 <= probabilities.min() and probabilities.max() <= 1
    )
    assert ((probabilities > 0.5) == np.array(reviews["test"]["label"])).mean() >= 0.895


def test_it_is_fitted_once_and_a_damaged_cache_is_fitted_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path))
    fits = []
    fit = rewards.fit_sentiment
    monkeypatch.setattr(rewards, "fit_sentiment", lambda *a: fits.append(1) or fit(*a))
    texts, labels = make_reviews(100)
    first = SentimentReward.tfidf(texts, labels)(texts)
    assert np.array_equal(first, SentimentReward.tfidf(texts, labels)(texts)) and len(fits) == 1
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert np.array_equal(first, SentimentReward.tfidf(texts, labels)(texts)) and len(fits) == 2
    SentimentReward.tfidf(texts[:90], labels[:90])
    assert len(fits) == 3


def test_no_pickle_is_read_even_from_a_planted_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path))
    texts, labels = make_reviews(100)
    SentimentReward.tfidf(texts, labels)
    (path,) = tmp_path.iterdir()
    marker = tmp_path / "executed"
    evil = (
        "import pickle,os,sys\n"
        "class E:\n"
        " def __reduce__(self): return (open, (sys.argv[2], 'w'))\n"
        "open(sys.argv[1],'wb').write(pickle.dumps(E()))"
    )
    subprocess.run([sys.executable, "-c", evil, str(path), str(marker)], check=True)
    assert SentimentReward.tfidf(texts, labels)(["lovely great joy"])[0] > 0.5
    assert not marker.exists()


def test_one_string_is_not_a_list_and_no_texts_give_no_rewards():
    reward = SentimentReward(lambda texts: np.ones(len(texts)), "ones")
    with pytest.raises(TypeError, match="list of texts"):
        reward("a fine film")
    assert reward([]).shape == (0,)


def test_a_hub_classifier_gives_the_softmax_of_its_positive_label(tmp_path):
    torch.manual_seed(0)
    make_classifier(tmp_path, ["POSITIVE", "NEGATIVE"])
    texts = ["good film", "bad", "good good good bad film", "film " * 40]
    found = SentimentReward.hub(str(tmp_path), batch_size=3)(texts)
    model = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path)
    for text, value in zip(texts, found):
        with torch.no_grad():
            logits = (
                model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0].tolist()
            )
        assert value == pytest.approx(np.exp(logits[0]) / np.exp(logits).sum(), abs=1e-6)


def test_a_classifier_without_one_positive_label_or_out_of_reach_is_refused(tmp_path):
    make_classifier(tmp_path, ["LABEL_0", "LABEL_1"])
    with pytest.raises(ValueError, match="LABEL_0.*begin with 'pos'"):
        SentimentReward.hub(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="reward='tfidf'"):
        SentimentReward.hub("nobody/no-such-classifier")


def make_decoder(folder, tokenizer, pad_token, eos_token):
    """A tiny GPT-2 with a classifier on top, which finds the last token of a text by padding."""
    torch.manual_seed(0)
    tokenizer.pad_token, tokenizer.eos_token = pad_token, eos_token
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        id2label={0: "NEG", 1: "POS"},
        label2id={"NEG": 0, "POS": 1},
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder)
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("pad_token", [None, "<|endoftext|>"])
def test_a_classifier_without_a_pad_token_pads_with_eos(tmp_path, tokenizer, pad_token):
    """Each text has the value that it has alone; a text longer than the context is truncated."""
    model = make_decoder(tmp_path, tokenizer, pad_token, "<|endoftext|>")
    texts = ["a joy", "this film was truly a bore and I hated it", "of great acting " * 200]
    found = SentimentReward.hub(str(tmp_path))(texts)
    for text, value in zip(texts, found):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :64]
        with torch.no_grad():
            assert value == pytest.approx(float(model(ids).logits[0].softmax(-1)[1]), abs=1e-5)


def test_a_classifier_that_cannot_pad_is_refused_when_it_is_loaded(tmp_path, tokenizer):
    make_decoder(tmp_path, tokenizer, None, None)
    with pytest.raises(ValueError, match="cannot score texts of unequal length.*pad_token"):
        SentimentReward.hub(str(tmp_path))


def test_a_classifier_whose_padding_counts_is_refused_when_it_is_loaded(
    tmp_path, tokenizer, monkeypatch
):
    """Its config and its tokenizer name different pad tokens: its verdict is read off padding."""
    model = make_decoder(tmp_path, tokenizer, "<|endoftext|>", "<|endoftext|>")
    model.config.pad_token_id = 7
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its padding counts as text"):
        SentimentReward.hub(str(tmp_path))


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "CPU", None, 0])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(device):
    for load in (SentimentReward.hub, load_model):
        with pytest.raises(ValueError, match="device is"):
            load("nobody/nothing", device=device)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path / "x"))
    assert cache_directory() == tmp_path / "x"
