"""The embedded GPT-2 and its byte-level BPE, trained from scratch on the IMDb training reviews."""

import json
import math
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dpo_lab.batching import CompletionBatch, completion_batch, pack, whole_documents
from dpo_lab.engine.arguments import at_least, checked
from dpo_lab.engine.distributed import setup
from dpo_lab.engine.records import require_free
from dpo_lab.engine.runs import (
    atomic_write,
    open_run,
    provenance,
    quiet_bars,
    read_metrics,
    require_writable,
)
from dpo_lab.logprobs import score_completions
from dpo_lab.loop import LoopConfig, check_loop
from dpo_lab.sampling import sample_completions
from dpo_lab.sentiment.reviews import load_imdb
from dpo_lab.train import train_sft

END = "<|endoftext|>"


@dataclass(frozen=True)
class PretrainConfig:
    """The recipe of the embedded model."""

    vocabulary: int = 8_192
    """tokens of the byte-level BPE"""
    context: int = 256
    """positions, and tokens per row"""
    width: int = 256
    """of the residual stream"""
    layers: int = 4
    """transformer blocks"""
    heads: int = 2
    """attention heads per block; few and wide ones are fast on a CPU"""
    rows: int = 16
    """rows per step"""
    steps: int = 7_000
    """updates"""
    seed: int = 0
    """decides the initial weights and the order of the rows"""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            learning_rate=3e-3,
            optimizer="muon",
            schedule="linear",
            warmup_steps=100,
            weight_decay=0.05,
            eval_every=1_000,
            save_every=250,
        )
    )


@checked
def pretrain(
    out: Path | str, config: PretrainConfig = PretrainConfig(), *, resume: bool = False
) -> Path:
    """Train tokenizer and model into the run directory `out`; return the folder of the model.

    `AutoModelForCausalLM` loads it. The folder, `out/model`, also holds `card.json`: bits per byte
    on the held-out reviews, samples and provenance. Weights are saved in float16 and measured as
    saved.
    """
    # the run directory
    check_pretrain(config)
    require_writable(out)
    setup("cpu")
    run = open_run(Path(out).expanduser(), asdict(config), resume=resume)
    require_free(run)
    origin = provenance()

    # the reviews, end to end in rows of tokens
    reviews = load_imdb()
    texts, held_out = reviews["train"]["text"][:], reviews["test"]["text"][:]
    tokenizer = train_tokenizer(texts, config.vocabulary)
    rows = pack(whole_documents(tokenizer, texts), config.context, tokenizer.eos_token_id)
    if len(rows) < config.rows:
        raise ValueError(
            f"rows is {config.rows} per step, and the reviews fill {len(rows)}; "
            "ask for at most as many"
        )

    # the model, its random weights by the seed
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = GPT2LMHeadModel(gpt2_config(config))

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        return held_out_loss(model, tokenizer, held_out[:200])

    train_sft(
        model,
        partial(batches_of, rows, config),
        config.steps,
        config.loop,
        precision="bfloat16",
        run=run,
        resume=resume,
        callback=evaluate,
        progress="pretrain",
    )

    # saved in float16, and measured as saved
    with atomic_write(run / "model", directory=True) as folder:
        with quiet_bars():
            model.half().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            saved = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
        card = {
            "config": asdict(config),
            "parameters": sum(p.numel() for p in saved.parameters()),
            "training_tokens": sum(map(len, rows)),
            "held_out": held_out_loss(saved, tokenizer, held_out, progress="held-out reviews"),
            "curve": [line for line in read_metrics(run) if "eval/bits_per_byte" in line],
            "minutes": read_minutes(run),
            "samples": sample_reviews(saved, tokenizer, 10),
            "provenance": origin,
        }
        written = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
        (folder / "card.json").write_text(written, encoding="utf-8")
    return run / "model"


@checked
def batches_of(rows: list[list[int]], config: PretrainConfig, step: int) -> list[CompletionBatch]:
    """The rows of a step (0-based); every epoch is shuffled by the seed and its number."""
    epoch, k = divmod(step, len(rows) // config.rows)
    order = np.random.default_rng([config.seed, epoch]).permutation(len(rows))
    chosen = [rows[i] for i in order[k * config.rows : (k + 1) * config.rows]]
    prompts, completions = [row[:1] for row in chosen], [row[1:] for row in chosen]
    return [completion_batch(prompts, completions, range(len(chosen)))]


@checked
def check_pretrain(config: PretrainConfig) -> None:
    """Raise ValueError for a value that no model can have, named with what is allowed."""
    check_loop(config.loop)
    least = {
        "vocabulary": 257,
        "context": 2,
        "width": 1,
        "layers": 1,
        "heads": 1,
        "rows": 1,
        "steps": 1,
        "seed": 0,
    }
    at_least(config, least)
    if config.width % config.heads:
        raise ValueError(
            f"width is {config.width} and heads {config.heads}; width must be a multiple of heads, "
            "so that each head has as many dimensions"
        )


@checked
def read_minutes(run: Path) -> float:
    """Minutes that the steps of a run took so far, without the pauses before it was resumed."""
    steps = [line for line in read_metrics(run) if "seconds" in line]
    return round(sum(line["seconds"] for line in steps) / 60, 1)


@checked
def gpt2_config(config: PretrainConfig) -> GPT2Config:
    """GPT-2 without dropout, and with the exact GELU.

    On CPUs that is several times as fast as the tanh approximation.
    """
    return GPT2Config(
        vocab_size=config.vocabulary,
        n_positions=config.context,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2's, whose one special token, id 0, is BOS, EOS and padding.

    Every encoded text begins with it.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def held_out_loss(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    progress: str | None = None,
) -> dict[str, float]:
    """Loss on whole reviews: bits per byte of text and nats per token, the end of each review
    included.

    Every token is predicted once, from at least half a context before it, or from all there is.
    """
    # windows that overlap by half a context
    context = model.config.max_position_embeddings
    half = context // 2
    prompts, completions = [], []
    for ids in whole_documents(tokenizer, texts):
        prompts.append(ids[:1])
        completions.append(ids[1:context])
        for i in range(context, len(ids), half):
            prompts.append(ids[i - (context - half) : i])
            completions.append(ids[i : i + half])

    logps = score_completions(model, prompts, completions, range(len(prompts)), progress=progress)
    nats = -float(logps.sum())
    n_bytes = sum(len(text.encode()) for text in texts)
    tokens = sum(map(len, completions))
    return {
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "nats_per_token": nats / tokens,
        "bytes_per_token": n_bytes / tokens,
        "reviews": len(texts),
    }


def sample_reviews(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0
) -> list[str]:
    """`n` unselected samples from the model, from BOS until EOS or 200 tokens, at temperature 1."""
    samples = sample_completions(
        model,
        [[tokenizer.bos_token_id]],
        n,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=min(200, model.config.max_position_embeddings - 1),
        seed=seed,
    )
    return tokenizer.batch_decode(samples[0], skip_special_tokens=True)
