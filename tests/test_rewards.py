"""The sentiment reward: good enough on real reviews, read back without pickle."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_classifier, make_reviews
from transformers import BertForSequenceClassification, BertTokenizerFast

from dpo_lab import rewards
from dpo_lab.imdb import load_imdb
from dpo_lab.rewards import SentimentReward, cache_directory


def test_held_out_accuracy_on_imdb_is_at_least_0895():
    reviews = load_imdb()
    reward = SentimentReward.tfidf(list(reviews["train"]["text"]), list(reviews["train"]["label"]))
    probabilities = reward(list(reviews["test"]["text"]))
    assert probabilities.dtype == np.float64 and 0 <= probabilities.min() and probabilities.max() <= 1
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
    evil = "import pickle,os,sys\nclass E:\n def __reduce__(self): return (open, (sys.argv[2], 'w'))\nopen(sys.argv[1],'wb').write(pickle.dumps(E()))"
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
            logits = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0].tolist()
        assert value == pytest.approx(np.exp(logits[0]) / np.exp(logits).sum(), abs=1e-6)


def test_a_classifier_without_one_positive_label_or_out_of_reach_is_refused(tmp_path):
    make_classifier(tmp_path, ["LABEL_0", "LABEL_1"])
    with pytest.raises(ValueError, match="LABEL_0.*begin with 'pos'"):
        SentimentReward.hub(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="reward='tfidf'"):
        SentimentReward.hub("nobody/no-such-classifier")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path / "x"))
    assert cache_directory() == tmp_path / "x"
