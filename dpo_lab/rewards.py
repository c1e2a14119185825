"""What says which completion is better: the probability that a text is a positive review."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sklearn
import skops.io
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dpo_lab.runs import write_whole

HUB_CLASSIFIER = "siebert/sentiment-roberta-large-english"


def cache_directory() -> Path:
    """Where fitted classifiers are kept: $DPO_LAB_CACHE, or ~/.cache/dpo-lab."""
    return Path(os.environ.get("DPO_LAB_CACHE") or Path.home() / ".cache" / "dpo-lab")


class SentimentReward:
    """P(positive) of texts, in [0, 1]: call it with a list of texts, get a float64 array of as many values."""

    def __init__(self, probabilities: Callable[[Sequence[str]], np.ndarray], name: str):
        self._probabilities, self.name = probabilities, name

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        if isinstance(texts, str):
            raise TypeError("texts is one string; give a list of texts, as in reward(['a fine film'])")
        return np.asarray(self._probabilities(list(texts)), dtype=np.float64) if len(texts) else np.empty(0)

    @classmethod
    def tfidf(cls, texts: Sequence[str], labels: Sequence[int]) -> "SentimentReward":
        """TF-IDF of words and bigrams with logistic regression, fitted on `texts` once and then read from the cache."""
        key = hashlib.sha256("\0".join([sklearn.__version__, *map(str, labels), *texts]).encode()).hexdigest()[:16]
        path = cache_directory() / f"sentiment-{key}.skops"
        model = _read(path)
        if model is None:
            model = fit_sentiment(texts, labels)
            with write_whole(path) as temporary:
                skops.io.dump(model, temporary)
        return cls(lambda texts: model.predict_proba(texts)[:, 1], f"tfidf-{key}")

    @classmethod
    def hub(cls, name: str = HUB_CLASSIFIER, *, device: str = "cpu", batch_size: int = 32) -> "SentimentReward":
        """A sequence classifier from the Hugging Face hub, or from a folder; its positive label is found by name.

        Raises:
            FileNotFoundError: it is not on this machine and the hub cannot be reached.
            ValueError: no label, or several, begin with "pos".
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True).to(device).eval()
        except (OSError, ConnectionError) as error:
            raise FileNotFoundError(
                f"the classifier {name!r} is not here and the hub did not give it ({str(error).splitlines()[0]}); "
                "use reward='tfidf', which needs no hub"
            ) from error
        positive = [i for i, label in model.config.id2label.items() if label.lower().startswith("pos")]
        if len(positive) != 1:
            raise ValueError(f"{name!r} has the labels {list(model.config.id2label.values())}; exactly one must begin with 'pos'")

        @torch.no_grad()
        def probabilities(texts: Sequence[str]) -> np.ndarray:
            parts = []
            for i in range(0, len(texts), batch_size):
                batch = tokenizer(texts[i : i + batch_size], padding=True, truncation=True, return_tensors="pt").to(device)
                parts.append(model(**batch).logits.float().softmax(-1)[:, positive[0]].cpu().numpy())
            return np.concatenate(parts)

        return cls(probabilities, name)


def fit_sentiment(texts: Sequence[str], labels: Sequence[int]) -> Pipeline:
    """The laptop lane's classifier: sublinear TF-IDF of words and bigrams, L2-regularised logistic regression."""
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, dtype=np.float32)
    model = make_pipeline(features, LogisticRegression(C=10.0, solver="liblinear"))
    return model.fit(texts, labels)


def _read(path: Path) -> Pipeline | None:
    """The cached classifier; None when there is none, or when the file is damaged or holds a type that is not trusted."""
    if not path.exists():
        return None
    try:
        return skops.io.load(path)
    except Exception:  # skops raises zipfile, JSON, key and type errors alike; whatever it is, fitting again mends it
        path.unlink()
        return None
