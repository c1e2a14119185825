"""Sampling completions: `sample_completions` and transformers' `generate` take turns; labeling.

    python benchmarks/sampling.py

Both sample from the embedded GPT-2 after short prompts, then from two random models after long
ones: the embedded shape with a longer context, and a Llama of SmolLM2's shape (135M weights). There
a third contender is `sample_completions` as it was: it reads each prompt once per completion, by
weights as torch keeps them. What counts there is the CPU time of one thread, which depends little
on what else runs.
Writes benchmarks/results/sampling.json; --no-short or --no-long keeps that half.
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from dpo_lab import sampling, tune_cpu
from dpo_lab.engine.runs import provenance, write_json
from dpo_lab.models import load_model, load_tokenizer, prepare_model
from dpo_lab.sampling import sample_completions, texts_of
from dpo_lab.sentiment.reviews import load_imdb, sample_prefixes
from dpo_lab.sentiment.reward import SentimentReward

RESULTS = Path(__file__).parent / "results" / "sampling.json"


# what a model is asked for after a long prompt: (shape, longest prompt, prompts)
LONG = (("embedded", 128, 64), ("embedded", 512, 64), ("135M", 128, 8), ("135M", 512, 8))


@dataclass(frozen=True)
class SamplingConfig:
    """How much to sample."""

    short: bool = True
    """prompts of 2 to 8 tokens"""
    long: bool = True
    """prompts of up to 128 and 512 tokens, the shortest half as long"""
    prefixes: int = 256
    """short prompts"""
    completions: int = 4
    """completions per prompt"""
    max_new_tokens: int = 48
    """longest completion"""
    repeats: int = 3
    """measurements of each; one of each after long prompts"""


def by_generate(model, prompts: list[list[int]], config: SamplingConfig, *, rows: int) -> int:
    """Completions from `generate`, left-padded, in batches of like length; their tokens."""
    tokens = 0
    waiting = [prompt for prompt in sorted(prompts, key=len) for _ in range(config.completions)]
    for begun in range(0, len(waiting), rows):
        part = waiting[begun : begun + rows]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=config.max_new_tokens,
            **options,
        )
        ended = (out[:, width:] == model.config.eos_token_id).int()
        tokens += int(((ended.cumsum(1) - ended) == 0).sum())
    return tokens


def by_dpo_lab(model, prompts: list[list[int]], config: SamplingConfig, seed: int) -> int:
    """Completions from `sample_completions`; their tokens."""
    rows = sample_completions(
        model,
        prompts,
        config.completions,
        eos_token_id=model.config.eos_token_id,
        max_new_tokens=config.max_new_tokens,
        seed=seed,
    )
    return sum(len(ids) for row in rows for ids in row)


def rate(
    sample: Callable[..., int], *arguments: Any, clock=time.perf_counter, **named: Any
) -> float:
    """Completion tokens per second of a call."""
    began = clock()
    tokens = sample(*arguments, **named)
    return tokens / (clock() - began)


def after_short_prompts(config: SamplingConfig) -> dict[str, Any]:
    """Tokens per second from the embedded model, in turns, and labels per second."""
    model, tokenizer = load_model("embedded"), load_tokenizer("embedded")
    reviews = load_imdb()
    prompts = sample_prefixes(list(reviews["test"]["text"]), tokenizer, config.prefixes, seed=0)
    speeds: dict[str, list[float]] = {"dpo_lab": [], "generate": []}
    for seed in range(config.repeats + 1):
        torch.manual_seed(seed)
        ours = rate(by_dpo_lab, model, prompts, config, seed=seed)
        theirs = rate(by_generate, model, prompts, config, rows=512)
        if seed:  # the first round warms up
            speeds["dpo_lab"].append(ours)
            speeds["generate"].append(theirs)
    median = {name: statistics.median(values) for name, values in speeds.items()}

    # labels of completions
    reward = SentimentReward.tfidf(reviews["train"]["text"][:], reviews["train"]["label"][:])
    options = {"eos_token_id": tokenizer.eos_token_id, "max_new_tokens": config.max_new_tokens}
    rows = sample_completions(model, prompts, config.completions, **options)
    texts = [text for row in texts_of(tokenizer, prompts, rows) for text in row]
    began = time.perf_counter()
    reward(texts)
    return {
        "provenance": provenance(),
        "tokens_per_second": speeds,
        "ratio": median["dpo_lab"] / median["generate"],
        "labels_per_second": len(texts) / (time.perf_counter() - began),
    }


def random_model(shape: str, context: int = 1_024) -> PreTrainedModel:
    """A model of this shape with random weights, with room for long prompts."""
    torch.manual_seed(0)
    if shape == "embedded":
        sizes = {
            "n_embd": 256,
            "n_head": 2,
            "n_layer": 4,
            "vocab_size": 8_192,
            "n_positions": context,
        }
        return prepare_model(GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0)).eval())
    sizes = {"hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, eos_token_id=0)).eval()


def after_long_prompts(config: SamplingConfig) -> list[dict[str, Any]]:
    """Tokens per CPU second after long prompts, by each contender, after a pass that warms up."""
    found, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for shape, longest, n in LONG:
        model, rng = random_model(shape), random.Random(0)
        prompts = [
            [rng.randrange(1, 8_000) for _ in range(rng.randint(longest // 2, longest))]
            for _ in range(n)
        ]
        task, timed = (model, prompts, config), {"clock": time.process_time}
        by_dpo_lab(model, prompts, config, seed=1)

        speeds = {"dpo_lab": rate(by_dpo_lab, *task, seed=0, **timed)}
        with mock.patch.multiple(sampling, SHORT_PROMPT=longest, PREPACKING_PAYS=longest):
            speeds["as it was"] = rate(by_dpo_lab, *task, seed=0, **timed)
        speeds["generate"] = rate(by_generate, *task, rows=256, **timed)
        found.append({"shape": shape, "prompt_tokens": longest, "tokens_per_second": speeds})
        print(json.dumps(found[-1]))
    torch.set_num_threads(threads)
    return found


def main(config: SamplingConfig) -> None:
    tune_cpu()
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if config.short:
        result = after_short_prompts(config) | {"long": result.get("long", [])}
    if config.long:
        result["long"], result["long_provenance"] = after_long_prompts(config), provenance()
    write_json(RESULTS, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(SamplingConfig))
