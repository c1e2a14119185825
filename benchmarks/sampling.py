"""Sampling completions: `sample_completions` and transformers' `generate` take turns; labeling.

    python benchmarks/sampling.py

Both sample from the embedded GPT-2. Writes benchmarks/results/sampling.json.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from dpo_lab.engine.runs import provenance, write_json
from dpo_lab.models import load_model, load_tokenizer
from dpo_lab.sampling import sample_completions, texts_of
from dpo_lab.sentiment.reviews import load_imdb, sample_prefixes
from dpo_lab.sentiment.reward import SentimentReward

RESULTS = Path(__file__).parent / "results" / "sampling.json"


@dataclass(frozen=True)
class SamplingConfig:
    """How much to sample."""

    prefixes: int = 256
    """prompts of 2 to 8 tokens"""
    completions: int = 4
    """completions per prompt"""
    max_new_tokens: int = 48
    """longest completion"""
    repeats: int = 3
    """measurements of each"""


def by_generate(
    model, tokenizer, prompts: list[list[int]], config: SamplingConfig, seed: int
) -> int:
    """Completions from `generate`, left-padded, in batches of as many rows as ours, by length."""
    torch.manual_seed(seed)
    tokens, rows = (
        0,
        [prompt for prompt in sorted(prompts, key=len) for _ in range(config.completions)],
    )
    for start in range(0, len(rows), 512):
        part = rows[start : start + 512]
        batch = tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt")
        out = model.generate(
            **batch, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=config.max_new_tokens
        )
        new = out[:, batch["input_ids"].shape[1] :]
        ended = (new == tokenizer.eos_token_id).int()
        tokens += int(((ended.cumsum(1) - ended) == 0).sum())
    return tokens


def main(config: SamplingConfig) -> None:
    model, tokenizer = load_model("embedded"), load_tokenizer("embedded")
    prompts = sample_prefixes(list(load_imdb()["test"]["text"]), tokenizer, config.prefixes, seed=0)
    speeds: dict[str, list[float]] = {"dpo_lab": [], "generate": []}
    for seed in range(config.repeats + 1):
        began = time.perf_counter()
        rows = sample_completions(
            model,
            prompts,
            config.completions,
            eos_token_id=tokenizer.eos_token_id,
            max_new_tokens=config.max_new_tokens,
            seed=seed,
        )
        ours = sum(len(ids) for row in rows for ids in row) / (time.perf_counter() - began)
        began = time.perf_counter()
        theirs = by_generate(model, tokenizer, prompts, config, seed) / (
            time.perf_counter() - began
        )
        if seed:  # the first round warms up
            speeds["dpo_lab"].append(ours)
            speeds["generate"].append(theirs)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    train = load_imdb()["train"]
    reward = SentimentReward.tfidf(list(train["text"]), list(train["label"]))
    texts = [text for row in texts_of(tokenizer, prompts, rows) for text in row]
    began = time.perf_counter()
    reward(texts)
    result = {
        "provenance": provenance(),
        "tokens_per_second": speeds,
        "ratio": median["dpo_lab"] / median["generate"],
        "labels_per_second": len(texts) / (time.perf_counter() - began),
    }
    write_json(RESULTS, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(SamplingConfig))
