"""The reward of the experiment: a sentiment classifier, from TF-IDF or from the hub."""

import hashlib
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
from dpo_lab.engine.unpacked import cache_directory
from dpo_lab.models import check_device, from_pretrained

HUB_CLASSIFIER = "siebert/sentiment-roberta-large-english"


class SentimentReward:
    """P(positive) of texts: call it with a list of N texts, get a float64 array (N,) in [0, 1]."""

    def __init__(self, probabilities: Callable[[Sequence[str]], np.ndarray], name: str):
        self._probabilities, self.name = probabilities, name

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        if isinstance(texts, str):
            raise TypeError(
                "texts is one string; give a list of texts, as in reward(['a fine film'])"
            )
        if not len(texts):
            return np.empty(0)
        return np.asarray(self._probabilities(list(texts)), dtype=np.float64)

    @classmethod
    def tfidf(cls, texts: Sequence[str], labels: Sequence[int]) -> "SentimentReward":
        """TF-IDF of words and bigrams with logistic regression; fitted once, then read from the
        cache.

        Args:
            texts: what it is fitted on.
            labels: 1 for a positive text, 0 for a negative one.
        """
        # the cache, by what decides the fit
        decides = ["min_df 10", sklearn.__version__, *map(str, labels), *texts]
        key = hashlib.sha256("\0".join(decides).encode()).hexdigest()[:16]
        path = cache_directory() / f"sentiment-{key}.skops"
        model = _read(path)

        # or a new fit; a cache that cannot be written is no reason to stop
        if model is None:
            model = fit_sentiment(texts, labels)
            try:
                with atomic_write(path) as temporary:
                    skops.io.dump(model, temporary)
            except OSError as error:
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
        """A sequence classifier from the Hugging Face hub, or from a folder; its positive label is
        found by name.

        Raises:
            FileNotFoundError: it is not on this machine and the hub cannot be reached.
            ValueError: no label, or several, begin with "pos"; a device that is not there; or it
                cannot score texts of unequal length together, or not to the values they have alone.
        """
        # tokenizer and model
        check_device(device)
        try:
            tokenizer = from_pretrained(AutoTokenizer, name)
            kind = AutoModelForSequenceClassification
            model = from_pretrained(kind, name, use_safetensors=True).to(device).eval()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the classifier is not there: {error}. reward='tfidf' needs no hub"
            ) from error

        # which of its labels is positive
        labels = model.config.id2label
        positive = [i for i, label in labels.items() if label.lower().startswith("pos")]
        if len(positive) != 1:
            raise ValueError(
                f"{name!r} has the labels {list(labels.values())}; "
                "exactly one must begin with 'pos'"
            )

        # decoders with a classifier on top find the last token by the padding
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        longest = min(tokenizer.model_max_length, context_of(model))

        @torch.no_grad()
        def score(texts: Sequence[str]) -> np.ndarray:
            # "</s>" in a text is text
            options = {"padding": True, "truncation": True, "split_special_tokens": True}
            batch = tokenizer(list(texts), max_length=longest, return_tensors="pt", **options)
            batch = batch.to(device)
            with matmuls_by_onednn(model.device.type):
                logits = model(**batch).logits
            return logits.float().softmax(-1)[:, positive[0]].cpu().numpy()

        def probabilities(texts: Sequence[str]) -> np.ndarray:
            starts = local_shard(range(0, len(texts), batch_size))
            parts = [score(texts[i : i + batch_size]) for i in starts]
            return np.concatenate(gather_shards(parts))

        _check_classifier(name, score)
        return cls(probabilities, name)


def _check_classifier(name: str, score: Callable[[Sequence[str]], np.ndarray]) -> None:
    """Raise ValueError unless texts of unequal length have the same values together as alone."""
    texts = [
        "a fine film",
        "a film that is far too long, and a bore from the first scene to the last",
        "a film " * 2_000,
    ]
    try:
        together, alone = score(texts), np.concatenate([score([text]) for text in texts])
    # each architecture fails in its own way
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name!r} cannot score texts of unequal length ({str(error).splitlines()[0]}). Its "
            "tokenizer needs a pad_token that the model knows, and the model's longest input as "
            "model_max_length; set them and save it with save_pretrained"
        ) from error
    if not np.abs(together - alone).max() < 0.02:
        raise ValueError(
            f"{name!r} gives texts other values beside longer ones ({together}) than alone "
            f"({alone}): its padding counts as text. Set the tokenizer's pad_token and the "
            "config's pad_token_id, and save them with save_pretrained"
        )


def fit_sentiment(texts: Sequence[str], labels: Sequence[int]) -> Pipeline:
    """Sublinear TF-IDF of words and bigrams, and L2-regularized logistic regression on it.

    Rarer features would not raise the held-out accuracy, and skops writes 640 bytes per word of a
    vocabulary.
    """
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=10, sublinear_tf=True, dtype=np.float32)
    # a random state of its own leaves numpy's alone
    regression = LogisticRegression(C=10.0, solver="liblinear", random_state=0)
    return make_pipeline(features, regression).fit(texts, labels)


def _read(path: Path) -> Pipeline | None:
    """The cached classifier; None where there is none, or one that is damaged or not trusted."""
    try:
        return skops.io.load(path) if path.exists() else None
    # skops raises zipfile, JSON, key and type errors; fitting again repairs all of them
    except Exception:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None
