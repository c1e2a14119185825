"""What says which completion is better: a sentiment classifier, or rewards fitted to comparisons."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import sklearn
import skops.io
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dpo_lab.engine.cpu import matmuls_by_onednn
from dpo_lab.engine.distributed import gather_shards, local_shard
from dpo_lab.engine.runs import atomic_write
from dpo_lab.engine.structure import context_of
from dpo_lab.models import check_device, from_pretrained

HUB_CLASSIFIER = "siebert/sentiment-roberta-large-english"


def cache_directory() -> Path:
    """Where fitted classifiers are kept: $DPO_LAB_CACHE, or ~/.cache/dpo-lab."""
    return Path(os.path.expanduser(os.environ.get("DPO_LAB_CACHE") or "~/.cache/dpo-lab"))


class SentimentReward:
    """P(positive) of texts, in [0, 1]: call it with a list of texts, get a float64 array of as many values."""

    def __init__(self, probabilities: Callable[[Sequence[str]], np.ndarray], name: str):
        self._probabilities, self.name = probabilities, name

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        if isinstance(texts, str):
            raise TypeError(
                "texts is one string; give a list of texts, as in reward(['a fine film'])"
            )
        return (
            np.asarray(self._probabilities(list(texts)), dtype=np.float64)
            if len(texts)
            else np.empty(0)
        )

    @classmethod
    def tfidf(cls, texts: Sequence[str], labels: Sequence[int]) -> "SentimentReward":
        """TF-IDF of words and bigrams with logistic regression, fitted on `texts` once and then read from the cache."""
        key = hashlib.sha256(
            "\0".join(["min_df 10", sklearn.__version__, *map(str, labels), *texts]).encode()
        ).hexdigest()[:16]
        path = cache_directory() / f"sentiment-{key}.skops"
        model = _read(path)
        if model is None:
            model = fit_sentiment(texts, labels)
            try:
                with atomic_write(path) as temporary:
                    skops.io.dump(model, temporary)
            except (
                OSError
            ) as error:  # of a cache that cannot be written, which is no reason to stop
                warnings.warn(
                    f"the classifier is not kept, and will be fitted again next time: {error}. "
                    "Set DPO_LAB_CACHE to a directory that can be written",
                    stacklevel=2,
                )
        return cls(lambda texts: model.predict_proba(texts)[:, 1], f"tfidf-{key}")

    @classmethod
    def hub(
        cls, name: str = HUB_CLASSIFIER, *, device: str = "cpu", batch_size: int = 32
    ) -> "SentimentReward":
        """A sequence classifier from the Hugging Face hub, or from a folder; its positive label is found by name.

        Raises:
            FileNotFoundError: it is not on this machine and the hub cannot be reached.
            ValueError: no label, or several, begin with "pos"; a device that is not there; or it cannot score texts of unequal
                length together, or gives a text another value than alone.
        """
        check_device(device)
        try:
            tokenizer = from_pretrained(AutoTokenizer, name)
            model = (
                from_pretrained(AutoModelForSequenceClassification, name, use_safetensors=True)
                .to(device)
                .eval()
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the classifier is not there: {error}. reward='tfidf' needs no hub"
            ) from error
        positive = [
            i for i, label in model.config.id2label.items() if label.lower().startswith("pos")
        ]
        if len(positive) != 1:
            raise ValueError(
                f"{name!r} has the labels {list(model.config.id2label.values())}; exactly one must begin with 'pos'"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if (
            model.config.pad_token_id is None
        ):  # which decoders with a classifier on top look for the last token by
            model.config.pad_token_id = tokenizer.pad_token_id
        longest = min(tokenizer.model_max_length, context_of(model))

        @torch.no_grad()
        def score(texts: Sequence[str]) -> np.ndarray:
            options = {"padding": True, "truncation": True, "max_length": longest}
            options["split_special_tokens"] = True  # "</s>" in a text is text
            batch = tokenizer(list(texts), **options, return_tensors="pt").to(device)
            with matmuls_by_onednn(model.device.type):
                logits = model(**batch).logits
            return logits.float().softmax(-1)[:, positive[0]].cpu().numpy()

        def probabilities(texts: Sequence[str]) -> np.ndarray:
            parts = [
                score(texts[i : i + batch_size])
                for i in local_shard(range(0, len(texts), batch_size))
            ]
            return np.concatenate(gather_shards(parts))

        _check_classifier(name, score)
        return cls(probabilities, name)


def _check_classifier(name: str, score: Callable[[Sequence[str]], np.ndarray]) -> None:
    """Raise ValueError unless a classifier gives texts of unequal length, scored together, the values that they have alone."""
    texts = [
        "a fine film",
        "a film that is far too long, and a bore from the first scene to the last",
        "a film " * 2_000,
    ]
    try:
        together, alone = score(texts), np.concatenate([score([text]) for text in texts])
    except (
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # each architecture fails in its own way
        raise ValueError(
            f"{name!r} cannot score texts of unequal length ({str(error).splitlines()[0]}). Its tokenizer needs a pad_token that "
            "the model knows, and the model's longest input as model_max_length; set them and save it with save_pretrained"
        ) from error
    if not np.abs(together - alone).max() < 0.02:
        raise ValueError(
            f"{name!r} gives texts other values beside longer ones ({together}) than alone ({alone}): its padding counts as text. "
            "Set the tokenizer's pad_token and the config's pad_token_id, and save them with save_pretrained"
        )


def fit_sentiment(texts: Sequence[str], labels: Sequence[int]) -> Pipeline:
    """The laptop lane's classifier: sublinear TF-IDF of words and bigrams, L2-regularised logistic regression.

    Rarer features would not raise the held-out accuracy, and skops writes a vocabulary at 640 bytes a word.
    """
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=10, sublinear_tf=True, dtype=np.float32)
    model = make_pipeline(
        features, LogisticRegression(C=10.0, solver="liblinear", random_state=0)
    )  # 0: numpy's own is left alone
    return model.fit(texts, labels)


def _read(path: Path) -> Pipeline | None:
    """The cached classifier; None when there is none, or when the file is damaged or holds a type that is not trusted."""
    try:
        return skops.io.load(path) if path.exists() else None
    except Exception:  # skops raises zipfile, JSON, key and type errors alike; whatever it is, fitting again mends it
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None
