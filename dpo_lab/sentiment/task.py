"""The controlled-sentiment task (Section 6 of the paper): reference, prompts, completions, labels, each step cached."""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import DatasetDict
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo_lab.batching import CompletionBatch, begun, completion_batch, pack
from dpo_lab.engine.arguments import checked, finite_positive
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.cpu import return_freed_memory
from dpo_lab.engine.distributed import from_main, print0, setup
from dpo_lab.engine.runs import (
    atomic_write,
    check_run,
    open_run,
    read_config,
    require_space,
    require_writable,
)
from dpo_lab.engine.structure import context_of
from dpo_lab.evaluate import Evaluation, evaluate_policy
from dpo_lab.loop import LoopConfig
from dpo_lab.models import check_sampling, end_tokens, load_model, load_tokenizer
from dpo_lab.preferences import Preferences, from_scores
from dpo_lab.sampling import sample_completions, sample_with_logps, texts_of
from dpo_lab.sentiment.precision import measure_precision
from dpo_lab.sentiment.reviews import load_imdb, sample_prefixes
from dpo_lab.sentiment.reward import SentimentReward
from dpo_lab.theory.frontier import OptimalFrontier, optimal_frontier
from dpo_lab.train import DPOConfig, plan_prompts, train_sft

LONGEST_PREFIX = 8  # tokens; the paper's prefixes have 2 to 8

SFT_ROWS, SFT_ACCUMULATE = 64, 8  # a step of SFT, and the forward passes that it is done in

LANES = {
    "laptop": {"model": "embedded", "reward": "tfidf"},
    "gpu": {
        "model": "openai-community/gpt2-large",
        "reward": "siebert/sentiment-roberta-large-english",
    },
}


@dataclass(frozen=True)
class TaskConfig:
    """The data: prefixes, completions, and the reward that labels them."""

    lane: Literal["laptop", "gpu"] = "laptop"
    """laptop: the embedded GPT-2 and TF-IDF on the CPU; gpu: GPT-2 large and a RoBERTa classifier on CUDA"""
    model: str | None = None
    """reference and initial policy: "embedded", a folder or a hub id; by default the lane's"""
    reward: str | None = None
    """"tfidf", or a sequence classifier: a folder or a hub id; by default the lane's"""
    imdb: Literal["package", "hub"] = "package"
    """where the reviews come from"""
    prefixes: int = 7_500
    """training reviews whose first 2 to 8 tokens are prompts"""
    completions: int = 4
    """completions sampled a prefix; 4 give 6 pairs"""
    max_new_tokens: int = 48
    """longest completion"""
    eval_prefixes: int = 1_024
    """held-out prefixes of the evaluation before and after; a quarter of them during training"""
    sft_epochs: int = 0
    """epochs of SFT on the training reviews, before anything else, that make the reference; the embedded model has had them"""
    sft_learning_rate: float = 1e-5
    """of SFT; falls to zero"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of sampling and training (the evaluation's log-probs are float32); auto: bfloat16 where this machine is fast in it"""
    seed: int = 0
    """decides everything random"""

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return "cuda" if self.lane == "gpu" else "cpu"


@dataclass(frozen=True)
class Parts:
    """What every step needs, loaded and checked before anything is written."""

    reviews: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel
    reward: SentimentReward


@checked
def check_task(config: TaskConfig) -> None:
    """Raise ValueError for a value that no task can have, named with what is allowed."""
    least = {
        "completions": 2,
        "max_new_tokens": 1,
        "prefixes": 1,
        "eval_prefixes": 8,
        "sft_epochs": 0,
        "seed": 0,
    }
    for name, lowest in least.items():
        if (value := getattr(config, name)) < lowest:
            raise ValueError(f"{name} is {value}; it must be at least {lowest}")
    finite_positive("sft_learning_rate", config.sft_learning_rate)


@checked
def load_parts(config: TaskConfig) -> Parts:
    """Reviews, tokenizer, reference and reward of a task. Errors are those of `check_task` and of the loaders."""
    check_task(config)
    names = LANES[config.lane]
    name = config.model or names["model"]
    reference = load_model(name, device=config.device)
    tokenizer, context = load_tokenizer(name), context_of(reference)
    check_sampling(reference, tokenizer)
    if config.max_new_tokens + LONGEST_PREFIX + 1 > context:
        raise ValueError(
            f"max_new_tokens is {config.max_new_tokens}; with a prefix of {LONGEST_PREFIX} tokens and BOS the model's context of "
            f"{context} allows at most {context - LONGEST_PREFIX - 1}"
        )
    reviews = load_imdb(config.imdb)
    if config.eval_prefixes > (held_out := len(reviews["test"])):
        raise ValueError(
            f"eval_prefixes is {config.eval_prefixes}, and there are {held_out} held-out reviews; ask for at most as many"
        )
    if (reward := config.reward or names["reward"]) == "tfidf":
        judge = SentimentReward.tfidf(
            list(reviews["train"]["text"]), list(reviews["train"]["label"])
        )
    else:
        judge = SentimentReward.hub(reward, device=config.device)
    return_freed_memory()
    return Parts(reviews, tokenizer, reference, judge)


@checked
def located(config: TaskConfig) -> TaskConfig:
    """`config` with model and reward as absolute paths where they lie on this machine, for its record is read from anywhere."""

    def place(name: str | None, own: str) -> str | None:
        path = None if name in (None, own) else Path(name).expanduser()
        return str(path.absolute()) if path and path.exists() else name

    return replace(
        config, model=place(config.model, "embedded"), reward=place(config.reward, "tfidf")
    )


@checked
def recorded_precision(config: TaskConfig, *directories: Path) -> TaskConfig:
    """`config` with the precision that one of `directories` was begun in, where it asks for "auto"."""
    for directory in directories:
        if config.precision == "auto" and (directory / "config.json").exists():
            found = read_config(directory)
            config = replace(config, precision=found.get("task", found).get("precision", "auto"))
    return config


@checked
def measured_precision(
    config: TaskConfig, parts: Parts, beta: float = DPOConfig.beta
) -> TaskConfig:
    """`config` with the precision that is faster here, where it asks for "auto"; prints the measurement."""
    if config.precision != "auto":
        return config
    rows = parts.tokenizer(list(parts.reviews["train"]["text"][:64]))["input_ids"]
    prompts, completions = (
        [row[:1] for row in rows],
        [row[1 : 1 + config.max_new_tokens] for row in rows],
    )
    for n, repeats in (
        (2, 1),
        (len(rows), 2),
    ):  # a few first: all of them take minutes where the processor has no bfloat16
        batch = completion_batch(prompts[:n], completions[:n], range(n))
        test = from_main(
            partial(measure_precision, repeats=repeats),
            parts.reference,
            batch.to(config.device),
            beta,
        )
        if test.speedup < 0.5:
            break
    print0(test)
    return replace(config, precision=test.choice)


@checked
def data_config(config: TaskConfig) -> dict[str, Any]:
    """What decides samples and labels: the task without the size of its evaluation."""
    return {name: value for name, value in asdict(config).items() if name != "eval_prefixes"}


@checked
def initial_policy(config: TaskConfig, data: Path) -> str:
    """Where the weights come from that policy and reference begin with: the lane's model, or what `sft` made of it."""
    return (
        str((data / "sft" / "model").absolute())
        if config.sft_epochs
        else config.model or LANES[config.lane]["model"]
    )


def sft_length(model: PreTrainedModel) -> int:
    """Tokens of a row that SFT reads."""
    return min(256, context_of(model))


@checked
def planned_sft(config: TaskConfig, parts: Parts) -> tuple[CompletionBatch | None, int]:
    """A batch as `sft` reads them, and how many it will read, by the rows that some 500 reviews fill. None and 0 without SFT."""
    if not config.sft_epochs:
        return None, 0
    texts, length, n = (
        list(parts.reviews["train"]["text"]),
        sft_length(parts.reference),
        SFT_ROWS // SFT_ACCUMULATE,
    )
    some = texts[:: max(1, len(texts) // 500)]
    rows = len(_sft_rows(some, parts)) * len(texts) / len(some) * config.sft_epochs
    return completion_batch([[0]] * n, [[0] * (length - 1)] * n, range(n)), round(rows / n)


def _sft_rows(texts: list[str], parts: Parts) -> list[list[int]]:
    start = (
        parts.tokenizer.eos_token_id
        if parts.tokenizer.bos_token_id is None
        else parts.tokenizer.bos_token_id
    )
    encoded = parts.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return pack(
        [begun(ids, start) for ids in encoded],
        sft_length(parts.reference),
        parts.tokenizer.eos_token_id,
    )


@checked
def sft(config: TaskConfig, data: Path, parts: Parts | None = None) -> Parts:
    """Fine-tune on the training reviews for `sft_epochs`, into `data/sft`, once; return the parts with that as the reference.

    Rows of `sft_length` tokens, 64 a step. An interrupted call continues at its last checkpoint.
    """
    setup(config.device)
    config = recorded_precision(located(config), data)
    parts = parts or load_parts(config)
    if not config.sft_epochs:
        return parts
    run, model = data / "sft", Path(initial_policy(config, data))
    if not model.exists():
        config = measured_precision(config, parts)
        rows = _sft_rows(list(parts.reviews["train"]["text"]), parts)
        plan = plan_prompts([[0]] * len(rows), config.sft_epochs, SFT_ROWS, config.seed)
        loop = LoopConfig(
            learning_rate=config.sft_learning_rate, gradient_accumulation_steps=SFT_ACCUMULATE
        )
        open_run(data, data_config(config), resume=True)
        open_run(run, asdict(loop) | {"steps": len(plan)}, resume=True)

        def batches(step: int) -> list[CompletionBatch]:
            some = [rows[i] for i in plan[step]]
            return [
                completion_batch(
                    [row[:1] for row in some], [row[1:] for row in some], range(len(some))
                )
            ]

        train_sft(
            parts.reference,
            batches,
            len(plan),
            loop,
            precision=config.precision,
            run=run,
            resume=True,
            progress="SFT",
        )
        save_policy(parts.reference, parts.tokenizer, model)
    return replace(parts, reference=load_model(str(model), device=config.device))


@checked
def sample(config: TaskConfig, data: Path, parts: Parts | None = None) -> dict[str, Any]:
    """Sample completions of training prefixes from the reference into `data/samples.json`; return what is in it.

    Their log-probs, which sampling knows, are kept beside them.
    """
    setup(config.device)
    path = data / "samples.json"
    config = recorded_precision(located(config), data)
    if (data / "config.json").exists() and path.exists():
        open_run(data, data_config(config), resume=True)
        return json.loads(path.read_text(encoding="utf-8"))
    require_writable(data)
    check_run(data, data_config(config), resume=True)
    parts = parts or load_parts(config)
    config = measured_precision(config, parts)
    require_space(data, 4_000 * config.prefixes * config.completions)
    prompts = sample_prefixes(
        list(parts.reviews["train"]["text"]), parts.tokenizer, config.prefixes, seed=config.seed
    )
    open_run(data, data_config(config), resume=True)
    parts = sft(config, data, parts)
    completions, logps = sample_with_logps(
        parts.reference,
        prompts,
        config.completions,
        eos_token_id=end_tokens(parts.reference, parts.tokenizer),
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        precision=config.precision,
        progress="sample",
    )
    texts = texts_of(parts.tokenizer, prompts, completions)
    samples = {"prompts": prompts, "completions": completions, "logps": logps, "texts": texts}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return samples


@checked
def label(config: TaskConfig, data: Path, parts: Parts | None = None) -> Preferences:
    """Turn samples into preferences by the reward, with reference log-probs, in `data/preferences`."""
    setup(config.device)
    config = recorded_precision(located(config), data)
    if (data / "config.json").exists() and (data / "preferences").exists():
        open_run(data, data_config(config), resume=True)
        return Preferences.load(data / "preferences")
    require_writable(data)
    check_run(data, data_config(config), resume=True)
    parts = parts or load_parts(config)
    config = measured_precision(config, parts)
    samples = sample(config, data, parts)
    parts = sft(config, data, parts)
    flat = [text for row in samples["texts"] for text in row]
    scores = parts.reward(flat).reshape(len(samples["prompts"]), config.completions)
    preferences = from_scores(
        samples["prompts"],
        samples["completions"],
        scores,
        parts.tokenizer,
        context=context_of(parts.reference),
    )
    known = {
        (tuple(prompt), tuple(ids)): logp
        for prompt, rows, logps in zip(samples["prompts"], samples["completions"], samples["logps"])
        for ids, logp in zip(rows, logps)
    }
    drawn = zip(
        (tuple(preferences.prompts[p]) for p in preferences.prompt_of),
        map(tuple, preferences.completions),
    )
    preferences = preferences.with_reference(
        parts.reference, known=np.array([known[row] for row in drawn]), precision=config.precision
    )
    preferences.save(data / "preferences")
    return preferences


def check_reference(preferences: Preferences, parts: Parts, data: Path) -> None:
    """Raise ValueError unless the reference of a task has the weights that its data were made with."""
    if preferences.reference_key.split("-")[0] != weights_hash(parts.reference):
        raise ValueError(
            f"{data} was made with other weights than those of {parts.reference.name_or_path!r} now. Put those back, choose another "
            "directory (--data, --out), or delete this one to sample again"
        )


@checked
def held_out_prefixes(config: TaskConfig, parts: Parts) -> list[list[int]]:
    """Prefixes of held-out reviews, the same for every seed but for `seed` itself."""
    return sample_prefixes(
        list(parts.reviews["test"]["text"]), parts.tokenizer, config.eval_prefixes, seed=config.seed
    )


@checked
def task_evaluation(
    config: TaskConfig,
    parts: Parts,
    policy: nn.Module,
    prompts: list[list[int]],
    progress: str | None = None,
) -> Evaluation:
    """`evaluate_policy` on the task: its reference, reward, longest completion, seed and precision."""
    return evaluate_policy(
        policy,
        parts.reference,
        prompts,
        parts.reward,
        parts.tokenizer,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        precision=config.precision,
        progress=progress,
    )


@checked
def reference_frontier(
    config: TaskConfig, parts: Parts, prompts: list[list[int]]
) -> OptimalFrontier:
    """The optimal reward-KL frontier, from 64 reference completions of 32 held-out prefixes."""
    few = prompts[:32]
    completions = sample_completions(
        parts.reference,
        few,
        64,
        eos_token_id=end_tokens(parts.reference, parts.tokenizer),
        max_new_tokens=config.max_new_tokens,
        seed=config.seed + 1,
        precision=config.precision,
        progress="optimal frontier",
    )
    texts = texts_of(parts.tokenizer, few, completions)
    scores = parts.reward([text for row in texts for text in row]).reshape(len(few), 64)
    return optimal_frontier(scores, np.geomspace(10, 0.02, 40))


@checked
def save_policy(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Model and tokenizer as `AutoModelForCausalLM` and `AutoTokenizer` load them, whole or not at all.

    A generation config is written as it is: transformers reads what it refuses to write, such as a temperature without sampling.
    """
    own = getattr(policy, "generation_config", None)
    with atomic_write(path, directory=True) as temporary:
        if own is not None:
            policy.generation_config = GenerationConfig()
        try:
            policy.save_pretrained(temporary)
        finally:
            if own is not None:
                policy.generation_config = own
        if own is not None:
            own.to_json_file(temporary / "generation_config.json", keys_to_pop=["compile_config"])
        tokenizer.save_pretrained(temporary)
