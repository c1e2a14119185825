"""What says which completion is better: a sentiment classifier, or rewards fitted to comparisons."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sklearn
import skops.io
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit
from scipy.stats import norm
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dpo_lab.arguments import integer, integers
from dpo_lab.losses import check_pairs
from dpo_lab.models import check_device, context_of, from_pretrained
from dpo_lab.processes import my_share, whole
from dpo_lab.runs import write_whole
from dpo_lab.tuning import matmuls_by_onednn

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
                with write_whole(path) as temporary:
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
                score(texts[i : i + batch_size]) for i in my_share(range(0, len(texts), batch_size))
            ]
            return np.concatenate(whole(parts))

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


@dataclass(frozen=True)
class BradleyTerryFit:
    """Rewards fitted to comparisons by maximum likelihood."""

    rewards: np.ndarray  # (n,) nats, with mean 0: comparisons say nothing about a common shift
    covariance: (
        np.ndarray
    )  # (n, n) of the estimates, the inverse of the information on vectors of mean 0
    nll: float  # nats a comparison, at the fit

    def interval(self, a: int, b: int, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of rewards[a] - rewards[b], by the normal approximation."""
        direction = np.zeros(len(self.rewards))
        direction[a], direction[b] = 1, -1
        half = norm.ppf(0.5 + level / 2) * np.sqrt(direction @ self.covariance @ direction)
        centre = self.rewards[a] - self.rewards[b]
        return float(centre - half), float(centre + half)


def fit_bradley_terry(chosen: Sequence[int], rejected: Sequence[int], n: int) -> BradleyTerryFit:
    """Maximum-likelihood rewards of `n` items from P comparisons (Eq. 1-2 of Rafailov et al. 2023), by Newton's method.

    Raises:
        ValueError: there is no comparison, an index is wrong, or some items never lost to the others (or were never
            compared with them): then no finite rewards are most likely (Ford 1957).
    """
    chosen, rejected, n = (
        integers("chosen", chosen),
        integers("rejected", rejected),
        integer("n", n),
    )
    if not len(chosen):
        raise ValueError(
            "there are no comparisons; give at least one pair of indices for every two groups of items"
        )
    check_pairs(torch.from_numpy(chosen), torch.from_numpy(rejected), n)
    losses_to = coo_array((np.ones(len(chosen)), (rejected, chosen)), shape=(n, n))
    parts, part_of = connected_components(losses_to, directed=True, connection="strong")
    if parts > 1:
        groups = [np.flatnonzero(part_of == part).tolist() for part in range(parts)]
        raise ValueError(
            f"the items fall into {parts} groups, {groups}, of which one never lost to another or was never compared with it, so "
            "their distance has no finite estimate; add comparisons between them, or fit the groups apart"
        )
    difference = np.zeros((len(chosen), n))
    difference[np.arange(len(chosen)), chosen] = 1
    difference[np.arange(len(chosen)), rejected] -= 1
    rewards, nll = np.zeros(n), np.log(2)
    while True:
        lost = expit(-difference @ rewards)  # the chance that the model gives to the other outcome
        information = difference.T @ (difference * (lost * (1 - lost))[:, None])
        step = np.linalg.solve(
            information + 1 / n, difference.T @ lost
        )  # 1 / n keeps the mean at 0
        if (
            np.abs(step).max() < 1e-7
        ):  # Newton's error is squared: the step after this one would be of 1e-14
            rewards = rewards + step
            nll = -log_expit(difference @ rewards).mean()
            return BradleyTerryFit(rewards, np.linalg.pinv(information, hermitian=True), float(nll))
        while (lower := -log_expit(difference @ (rewards + step)).mean()) > nll:
            step /= 2
        rewards, nll = rewards + step, lower


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
