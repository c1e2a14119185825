"""One contender on one workload, in a process of its own; prints one line of JSON. Called by `benchmarks/speed.py`.

    python benchmarks/contender.py --contender dpo_lab --precision float32 --workload short

Every contender trains the same model on the same pairs by its own whole loop: batching, logging and optimizer included.
The clock is a hook behind `Optimizer.step`, the same for all, and runs from the end of the first step to the end of the last.
"""

import json
import math
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from dpo_lab import layout, logprobs
from dpo_lab.layout import completion_batch
from dpo_lab.logprobs import autocast, can_share, completion_logps
from dpo_lab.loop import LoopConfig
from dpo_lab.losses import dpo_loss
from dpo_lab.models import keep_freed_memory, prepare_model
from dpo_lab.preferences import Preferences
from dpo_lab.runs import peak_memory_mb
from dpo_lab.train import DPOConfig, sft_batches, train_dpo, train_sft

BETA, LEARNING_RATE = 0.1, 1e-6


@dataclass(frozen=True)
class Workload:
    """What is trained on: `prompts` a step, each with `completions`, every two of which make a pair."""

    prompts: int
    completions: int
    prompt_tokens: tuple[int, int]
    mean: int = 64  # completion tokens
    most: int = 192
    vocabulary: int = 50_257
    layers: int = 12
    width: int = 768


WORKLOADS = {
    "paper": Workload(prompts=2, completions=4, prompt_tokens=(2, 8)),
    "short": Workload(prompts=8, completions=2, prompt_tokens=(4, 16)),
    "long": Workload(prompts=8, completions=2, prompt_tokens=(64, 192)),
    "embedded": Workload(11, 4, prompt_tokens=(2, 8), mean=32, most=96, vocabulary=8_192, layers=4, width=256),
}


@dataclass(frozen=True)
class ContenderConfig:
    """Who runs, on what."""

    contender: Literal["dpo_lab", "trl_default", "trl_best", "textbook"] = "dpo_lab"
    """trl_best: reference log-probs precomputed, no gradient checkpointing, batches of similar length"""
    job: Literal["dpo", "sft"] = "dpo"
    """sft: on every completion, as before DPO; all but textbook know it"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the computation"""
    workload: str = "short"
    """one of WORKLOADS"""
    steps: int = 4
    """optimizer steps; the first one is not timed"""
    seed: int = 0
    """of the weights and the pairs"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where"""
    change: str = "{}"
    """JSON: other values for fields of the workload"""
    without: tuple[Literal["sharing", "packing", "stored logits", "fused gelu", "kept memory"], ...] = ()
    """what dpo_lab does without, to see what it is worth"""


def lengths(workload: Workload, n: int, rng: np.random.Generator) -> np.ndarray:
    """Skewed completion lengths: log-normal, 8 tokens to `most`, about `mean` on average."""
    return np.clip(rng.lognormal(np.log(workload.mean) - 0.25, 0.75, n).astype(int), 8, workload.most)


def make_preferences(workload: Workload, steps: int, seed: int) -> Preferences:
    """Random token ids; id 0 is BOS and EOS. The completion with the lower index is the better one."""
    rng, k, vocabulary = np.random.default_rng(seed), workload.completions, workload.vocabulary
    n = steps * workload.prompts
    prompts = [[0, *rng.integers(1, vocabulary, rng.integers(*workload.prompt_tokens, endpoint=True))] for _ in range(n)]
    completions = [[*rng.integers(1, vocabulary, length - 1), 0] for length in lengths(workload, n * k, rng)]
    better, worse = np.triu_indices(k, 1)
    return Preferences(
        prompts=[[int(i) for i in ids] for ids in prompts],
        completions=[[int(i) for i in ids] for ids in completions],
        prompt_of=np.repeat(np.arange(n), k),
        chosen=(np.arange(n)[:, None] * k + better).ravel(),
        rejected=(np.arange(n)[:, None] * k + worse).ravel(),
    )


def gpt2_config(workload: Workload) -> GPT2Config:
    """GPT-2 of the workload's size, with heads of 64 as every GPT-2 has, without dropout."""
    size = {"vocab_size": workload.vocabulary, "n_layer": workload.layers, "n_embd": workload.width}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**size, n_head=workload.width // 64, **no_dropout, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def make_models(workload: Workload, seed: int, device: str) -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    """Policy and reference, near each other but not equal, so that losses differ from log 2."""
    set_seed(seed)
    policy, reference = (GPT2LMHeadModel(gpt2_config(workload)).eval() for _ in range(2))
    state = policy.state_dict()
    reference.load_state_dict({name: tensor * (1 + 0.5 * torch.randn_like(tensor)) for name, tensor in state.items()})
    reference.tie_weights()
    return policy.to(device), reference.to(device)


def run_dpo_lab(config: ContenderConfig, workload: Workload, preferences: Preferences) -> dict[str, float]:
    """`train_dpo`, with the reference log-probs computed once before."""
    policy, reference = make_models(workload, config.seed, config.device)
    if "fused gelu" not in config.without:
        policy, reference = prepare_model(policy), prepare_model(reference)
    if "kept memory" not in config.without:
        keep_freed_memory()
    if "sharing" in config.without:
        layout.SHARE_FROM = math.inf
    if "packing" in config.without:
        layout.PACK_FROM = math.inf
    if "stored logits" in config.without:
        logprobs.KEPT_LOGITS_BYTES = 0
    batch = completion_batch(
        preferences.prompts, preferences.completions[:8], preferences.prompt_of[:8].tolist(), share=can_share(policy)
    )
    with torch.no_grad(), autocast(config.device, config.precision):
        logps, reference_logps = (completion_logps(model, batch.to(config.device)) for model in (policy, reference))
    began = time.perf_counter()
    preferences = preferences.with_reference(reference, precision=config.precision)
    seconds = time.perf_counter() - began
    del reference
    first = [i for i, c in enumerate(preferences.rejected) if c < 8]
    pairs = [torch.tensor(side[first], device=config.device) for side in (preferences.chosen, preferences.rejected)]
    loss = dpo_loss(logps, reference_logps, *pairs, BETA).losses.mean().item()
    per_step = len(preferences.chosen) // config.steps
    loop = LoopConfig(learning_rate=LEARNING_RATE, schedule="linear", warmup_steps=0)
    train_dpo(policy, preferences, DPOConfig(beta=BETA, batch_pairs=per_step, loop=loop), progress=None)
    return {"loss": loss, "reference_seconds": seconds}


def run_textbook(config: ContenderConfig, workload: Workload, preferences: Preferences) -> dict[str, float]:
    """As most tutorials write it: chosen and rejected apart, padded, full logits, the reference asked at every step."""
    policy, reference = make_models(workload, config.seed, config.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)
    p = preferences

    def logps(model: GPT2LMHeadModel, side: np.ndarray) -> torch.Tensor:
        rows = [(p.prompts[p.prompt_of[i]], p.completions[i]) for i in side]
        length = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long, device=config.device)
        mask = torch.zeros(len(rows), length, device=config.device)
        for r, (prompt, completion) in enumerate(rows):
            ids[r, : len(prompt) + len(completion)] = torch.tensor(prompt + completion, device=config.device)
            mask[r, len(prompt) : len(prompt) + len(completion)] = 1
        attention = torch.zeros_like(mask)
        for r, (prompt, completion) in enumerate(rows):
            attention[r, : len(prompt) + len(completion)] = 1
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
        tokens = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (tokens * mask[:, 1:]).sum(1)

    def loss_of(chosen: np.ndarray, rejected: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            reference_margin = logps(reference, chosen) - logps(reference, rejected)
        return -F.logsigmoid(BETA * (logps(policy, chosen) - logps(policy, rejected) - reference_margin)).mean()

    first = np.flatnonzero(p.rejected < 8)
    with torch.no_grad():
        loss = loss_of(p.chosen[first], p.rejected[first]).item()
    order = np.random.default_rng(config.seed).permutation(len(p.chosen))
    for part in np.array_split(order, config.steps):
        with autocast(config.device, config.precision):
            batch_loss = loss_of(p.chosen[part], p.rejected[part])
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": loss, "reference_seconds": 0.0}


def run_sft(config: ContenderConfig, workload: Workload, preferences: Preferences) -> dict[str, float]:
    """`train_sft` on every completion."""
    policy = prepare_model(make_models(workload, config.seed, config.device)[0])
    keep_freed_memory()
    size = len(preferences.completions) // config.steps
    p = preferences
    first = completion_batch(p.prompts, p.completions[:8], p.prompt_of[:8].tolist(), share=can_share(policy))
    with torch.no_grad(), autocast(config.device, config.precision):
        loss = -completion_logps(policy, first.to(config.device)).sum().item() / first.tokens
    batches = sft_batches(p, size, chosen_only=False, share=can_share(policy), seed=config.seed)
    loop = LoopConfig(learning_rate=LEARNING_RATE, schedule="linear", warmup_steps=0)
    train_sft(policy, batches, config.steps, loop, precision=config.precision, progress=None)
    return {"loss": loss, "reference_seconds": 0.0}


def word_tokenizer(workload: Workload) -> PreTrainedTokenizerFast:
    """TRL takes text: token i is the word t<i>."""
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(workload.vocabulary)}, unk_token="t1"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t0", eos_token="t0", pad_token="t0")


def text(ids: list[int]) -> str:
    """The words of `word_tokenizer`."""
    return " ".join(f"t{i}" for i in ids)


def trl_settings(config: ContenderConfig, rows: int) -> dict[str, object]:
    """What both of TRL's trainers are told: as they come, or the settings that are fastest on a CPU."""
    best = config.contender == "trl_best"
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": config.device == "cpu",
        "bf16": config.precision == "bfloat16",
        "gradient_checkpointing": not best,
        "train_sampling_strategy": "sequential" if best else "random",
        "per_device_train_batch_size": rows // config.steps,
        "learning_rate": LEARNING_RATE,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
    }


def run_trl_sft(config: ContenderConfig, workload: Workload, preferences: Preferences) -> dict[str, float]:
    """TRL's SFTTrainer: as it comes, or with the settings that are fastest on a CPU and our activation function."""
    from trl import SFTConfig, SFTTrainer

    best, p = config.contender == "trl_best", preferences
    policy = make_models(workload, config.seed, config.device)[0]
    if best:
        policy = prepare_model(policy)
        keep_freed_memory()
    lengths = [len(p.prompts[m]) + len(ids) for ids, m in zip(p.completions, p.prompt_of)]
    order = np.argsort(lengths, kind="stable") if best else np.arange(len(lengths))
    rows = [{"prompt": text(p.prompts[p.prompt_of[i]]), "completion": " " + text(p.completions[i])} for i in order]
    arguments = SFTConfig(**trl_settings(config, len(rows)))
    trainer = SFTTrainer(policy, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer(workload))
    examples = [trainer.train_dataset[place] for place, i in enumerate(order.tolist()) if i < 8]
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(examples))))
    trainer.train()
    return {"loss": loss, "reference_seconds": 0.0}


def run_trl(config: ContenderConfig, workload: Workload, preferences: Preferences) -> dict[str, float]:
    """TRL's DPOTrainer: as it comes, or with the settings that are fastest on a CPU and our activation function."""
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    best = config.contender == "trl_best"
    policy, reference = make_models(workload, config.seed, config.device)
    if best:
        policy, reference = prepare_model(policy), prepare_model(reference)
        keep_freed_memory()
    p = preferences
    pairs = list(zip(p.chosen, p.rejected))
    if best:
        pairs.sort(key=lambda pair: len(p.prompts[p.prompt_of[pair[0]]]) + max(len(p.completions[i]) for i in pair))
    rows = [
        {
            "prompt": text(p.prompts[p.prompt_of[c]]),
            "chosen": " " + text(p.completions[c]),  # TRL leaves an EOS that is there already
            "rejected": " " + text(p.completions[r]),
        }
        for c, r in pairs
    ]
    precompute_seconds = 0.0

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *arguments: object) -> Dataset:
            nonlocal precompute_seconds
            start = time.perf_counter()
            result = super()._precompute_ref_logps(*arguments)
            precompute_seconds += time.perf_counter() - start
            return result

    arguments = TRLConfig(**trl_settings(config, len(rows)), precompute_ref_log_probs=best, beta=BETA)
    trainer = Timed(
        policy,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(workload),
    )
    examples = [trainer.train_dataset[i] for i, (_, r) in enumerate(pairs) if r < 8]
    with torch.no_grad():
        inputs = trainer._prepare_inputs(trainer.data_collator(examples))
        loss = float(trainer.compute_loss(trainer.model, inputs))
    trainer.train()
    return {"loss": loss, "reference_seconds": precompute_seconds}


def main(config: ContenderConfig) -> None:
    workload = replace(WORKLOADS[config.workload], **json.loads(config.change))
    preferences = make_preferences(workload, config.steps, config.seed)
    ends: list[float] = []

    def note_end(*_: object) -> None:
        if config.device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    register_optimizer_step_post_hook(note_end)
    runs = {
        "dpo": {"dpo_lab": run_dpo_lab, "textbook": run_textbook, "trl_default": run_trl, "trl_best": run_trl},
        "sft": {"dpo_lab": run_sft, "trl_default": run_trl_sft, "trl_best": run_trl_sft},
    }
    result = runs[config.job][config.contender](config, workload, preferences)
    assert len(ends) == config.steps, f"{config.contender} made {len(ends)} steps, not {config.steps}"
    timed = config.steps - 1
    pairs, tokens = len(preferences.chosen), sum(map(len, preferences.completions))
    seconds = (ends[-1] - ends[0]) / timed * config.steps  # for all the pairs, once
    print(
        json.dumps(
            {
                "contender": config.contender,
                "job": config.job,
                "precision": config.precision,
                "workload": config.workload,
                "change": json.loads(config.change),
                "without": config.without,
                "steps": config.steps,
                "pairs": pairs,
                "completion_tokens": tokens,
                "training_seconds": seconds,
                **result,
                "device": config.device,
                "peak_memory_mb": torch.cuda.max_memory_allocated() / 1e6 if config.device == "cuda" else peak_memory_mb(),
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(ContenderConfig))
