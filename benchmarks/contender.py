"""One contender on one workload, in a process of its own; prints one line of JSON.

    python benchmarks/contender.py --contender dpo_lab --precision float32 --workload short

`benchmarks/speed.py` and `cost.py` ask for it by `measure`, which forks a process that has imported
everything: that saves six seconds of the CPU for each of some 60 processes. Every contender trains
the same model on the same pairs by its own whole loop, with batching, logging and optimizer. The
clock is a hook behind `Optimizer.step`, the same for all. Before it starts come a short step, which
makes the optimizer's state, and the very steps that are timed, `untimed` times: memory has then
been used before and kernels have been chosen, as in the middle of a run.
"""

import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from dpo_lab import batching as layout
from dpo_lab import loop
from dpo_lab import preferences as data_format
from dpo_lab.batching import completion_batch
from dpo_lab.engine import cpu as tuning
from dpo_lab.engine import lm_head
from dpo_lab.engine.cpu import keep_freed_memory, use_onednn
from dpo_lab.engine.runs import peak_memory_mb
from dpo_lab.logprobs import autocast, can_compact, completion_logps
from dpo_lab.loop import LoopConfig
from dpo_lab.losses import dpo_loss
from dpo_lab.models import prepare_model
from dpo_lab.preferences import Preferences
from dpo_lab.train import DPOConfig, sft_batches, train_dpo, train_sft

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import textbook_dpo  # noqa: E402

BETA, LEARNING_RATE = 0.1, 1e-6

# elsewhere a fork of a process with threads of its own may hang
FORKS = sys.platform == "linux"


@dataclass(frozen=True)
class Workload:
    """What is trained on: `prompts` per step, each with `completions`, any two a pair.

    A step takes `passes` forward and backward passes, for all contenders; `steps` are timed.
    """

    prompts: int
    completions: int
    prompt_tokens: tuple[int, int]
    mean: int = 64  # completion tokens
    most: int = 192
    vocabulary: int = 50_257
    layers: int = 12
    width: int = 768
    passes: int = 1
    steps: int = 1


Part = Literal["sharing", "packing", "stored logits", "fused gelu", "oneDNN", "kept memory"]

WORKLOADS = {
    "paper": Workload(prompts=4, completions=4, prompt_tokens=(2, 8), passes=2),
    "short": Workload(prompts=8, completions=2, prompt_tokens=(4, 16)),
    "long": Workload(prompts=8, completions=2, prompt_tokens=(64, 192)),
    "embedded": Workload(
        11, 4, (2, 8), mean=32, most=96, vocabulary=8_192, layers=4, width=256, steps=2
    ),
}


@dataclass(frozen=True)
class ContenderConfig:
    """Who runs, on what."""

    contender: Literal["dpo_lab", "trl_default", "trl_best", "textbook"] = "dpo_lab"
    """trl_best: reference log-probs precomputed, no gradient checkpointing, batches of similar
    length"""
    job: Literal["dpo", "sft"] = "dpo"
    """sft: on every completion, as before DPO; all but textbook know it"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the computation"""
    workload: str = "short"
    """one of WORKLOADS"""
    seed: int = 0
    """of the weights and the pairs"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where"""
    untimed: int = 2
    """how often the steps are taken before they are timed; the memory of most contenders has
    settled after two"""
    change: str = "{}"
    """JSON: other values for fields of the workload"""
    without: tuple[Part, ...] = ()
    """what dpo_lab does without, to see what it is worth"""


def lengths(workload: Workload, n: int, rng: np.random.Generator) -> np.ndarray:
    """Skewed completion lengths: log-normal, 8 tokens to `most`, about `mean` on average."""
    return np.clip(
        rng.lognormal(np.log(workload.mean) - 0.25, 0.75, n).astype(int), 8, workload.most
    )


def make_preferences(workload: Workload, seed: int) -> Preferences:
    """Random token ids; id 0 is BOS and EOS. The completion with the lower index is the better one.

    Completions have the same lengths whatever the prompts and the vocabulary.
    """
    rng, k, vocabulary = np.random.default_rng(seed), workload.completions, workload.vocabulary
    n = workload.steps * workload.prompts
    sizes = lengths(workload, n * k, rng)
    prompts = [
        [0, *rng.integers(1, vocabulary, rng.integers(*workload.prompt_tokens, endpoint=True))]
        for _ in range(n)
    ]
    completions = [[*rng.integers(1, vocabulary, length - 1), 0] for length in sizes]
    better, worse = np.triu_indices(k, 1)
    return Preferences(
        prompts=[[int(i) for i in ids] for ids in prompts],
        completions=[[int(i) for i in ids] for ids in completions],
        prompt_of=np.repeat(np.arange(n), k),
        chosen=(np.arange(n)[:, None] * k + better).ravel(),
        rejected=(np.arange(n)[:, None] * k + worse).ravel(),
    )


def short_step(workload: Workload, seed: int) -> Preferences:
    """As many pairs as in a step of the workload, as short as they can be."""
    return make_preferences(replace(workload, steps=1, prompt_tokens=(2, 8), most=8), seed)


def gpt2_config(workload: Workload) -> GPT2Config:
    """GPT-2 of the workload's size, with heads of 64 as every GPT-2 has, without dropout."""
    size = {"vocab_size": workload.vocabulary, "n_layer": workload.layers, "n_embd": workload.width}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(
        **size,
        n_head=workload.width // 64,
        **no_dropout,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def make_models(
    workload: Workload, seed: int, device: str
) -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    """Policy and reference, near each other but not equal, so that losses differ from log 2."""
    set_seed(seed)
    with torch.device(device):
        policy = GPT2LMHeadModel(gpt2_config(workload)).eval()
    reference = copy.deepcopy(policy)
    state = policy.state_dict()
    reference.load_state_dict(
        {name: tensor * (1 + 0.5 * torch.randn_like(tensor)) for name, tensor in state.items()}
    )
    reference.tie_weights()
    return policy, reference


def tuned(model: GPT2LMHeadModel, device: str) -> GPT2LMHeadModel:
    """The model with our activation function, in a process with our memory settings and matmuls."""
    if device == "cpu":
        keep_freed_memory()
        use_onednn()
    return prepare_model(model)


def one_optimizer(model: GPT2LMHeadModel, config: LoopConfig) -> None:
    """Let all runs of our loop share an optimizer, whose state exists when the clock starts.

    As that of the other contenders does.
    """
    optimizers = loop.make_optimizers(model, config)
    loop.make_optimizers = lambda *_: optimizers


def run_dpo_lab(
    config: ContenderConfig, workload: Workload, preferences: Preferences, short: Preferences
) -> dict[str, float]:
    """`train_dpo`, with the reference log-probs computed once before."""
    policy, reference = make_models(workload, config.seed, config.device)
    if "fused gelu" not in config.without:
        policy, reference = prepare_model(policy), prepare_model(reference)
    switch_off(config)

    # weights are hashed once per run, and before the clock as TRL hashes its own
    known = data_format.weights_hash(reference)
    data_format.weights_hash = lambda _: known

    # the loss of the first prompts, to compare the contenders by
    loss = first_loss(config, policy, reference, preferences)

    # reference log-probs; on a GPU a second time, when its kernels have been chosen as TRL's have
    short = short.with_reference(reference, precision=config.precision)
    preferences = preferences.with_reference(reference, precision=config.precision)
    for _ in range(2 if config.device == "cuda" else 1):
        began = time.perf_counter()
        preferences = replace(preferences, reference_logps=None)
        preferences = preferences.with_reference(reference, precision=config.precision)
        seconds = time.perf_counter() - began
    del reference

    dpo = DPOConfig(
        beta=BETA,
        batch_pairs=len(preferences.chosen) // workload.steps,
        loop=our_loop(workload),
    )
    one_optimizer(policy, dpo.loop)
    train_dpo(policy, short, dpo, progress=None)
    if config.device == "cuda":
        # in one run, whose beginning takes about as long as a step there
        train_dpo(policy, preferences, replace(dpo, epochs=config.untimed + 1), progress=None)
    else:
        for _ in range(config.untimed + 1):
            train_dpo(policy, preferences, dpo, progress=None)
    return {"loss": loss, "reference_seconds": seconds}


def switch_off(config: ContenderConfig) -> None:
    """Switch off what dpo_lab is to do without, in this process."""
    if "kept memory" in config.without:
        tuning.KEEPING = tuning.USUAL = ()
    if "oneDNN" in config.without:
        tuning.onednn_is_exact = lambda: False
    if "sharing" in config.without:
        layout.SHARE_FROM = math.inf
    if "packing" in config.without:
        layout.PACK_FROM = math.inf
    if "stored logits" in config.without:
        lm_head.STORED_LOGITS_BYTES = 0


def our_loop(workload: Workload) -> LoopConfig:
    """As TRL's trainers are told to step."""
    return LoopConfig(
        learning_rate=LEARNING_RATE,
        schedule="linear",
        warmup_steps=0,
        gradient_accumulation_steps=workload.passes,
    )


def first_loss(
    config: ContenderConfig,
    policy: GPT2LMHeadModel,
    reference: GPT2LMHeadModel,
    preferences: Preferences,
) -> float:
    """The mean loss of the pairs among the first eight completions."""
    pairs = np.flatnonzero(preferences.rejected < 8)
    batch = preferences.batch(pairs, compact=can_compact(policy)).to(config.device)
    with torch.no_grad(), autocast(config.device, config.precision):
        logps, reference_logps = (
            completion_logps(model, batch.completions) for model in (policy, reference)
        )
    return dpo_loss(logps, reference_logps, batch.chosen, batch.rejected, BETA).losses.mean().item()


def run_textbook(
    config: ContenderConfig, workload: Workload, preferences: Preferences, short: Preferences
) -> dict[str, float]:
    """`examples/textbook_dpo.py`: chosen and rejected apart, full logits, a live reference."""
    policy, reference = make_models(workload, config.seed, config.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)

    def loss_of(p: Preferences, pairs: np.ndarray) -> torch.Tensor:
        ids = textbook_dpo.token_ids(p, pairs)
        return textbook_dpo.dpo_losses(policy, reference, *ids, BETA).mean()

    with torch.no_grad():
        loss = loss_of(preferences, np.flatnonzero(preferences.rejected < 8)).item()

    # a short step, then all steps `untimed` times and once more
    order = np.random.default_rng(config.seed).permutation(len(preferences.chosen))
    steps = [(preferences, step) for step in np.array_split(order, workload.steps)]
    for data, step in [(short, np.arange(len(short.chosen))), *steps * (config.untimed + 1)]:
        for part in np.array_split(step, workload.passes):
            with autocast(config.device, config.precision):
                part_loss = loss_of(data, part) * len(part) / len(step)
            part_loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": loss, "reference_seconds": 0.0}


def run_sft(
    config: ContenderConfig, workload: Workload, preferences: Preferences, short: Preferences
) -> dict[str, float]:
    """`train_sft` on every completion."""
    policy = tuned(make_models(workload, config.seed, config.device)[0], config.device)
    size = len(preferences.completions) // workload.steps
    p = preferences
    first = completion_batch(
        p.prompts, p.completions[:8], p.prompt_of[:8].tolist(), compact=can_compact(policy)
    )
    with torch.no_grad(), autocast(config.device, config.precision):
        loss = -completion_logps(policy, first.to(config.device)).sum().item() / first.tokens
    loop_config = our_loop(workload)
    one_optimizer(policy, loop_config)
    for data, steps in ((short, 1), *[(p, workload.steps)] * (config.untimed + 1)):
        batches = sft_batches(
            data, size, chosen_only=False, compact=can_compact(policy), seed=config.seed
        )
        train_sft(policy, batches, steps, loop_config, precision=config.precision, progress=None)
    return {"loss": loss, "reference_seconds": 0.0}


def word_tokenizer(workload: Workload) -> PreTrainedTokenizerFast:
    """TRL takes text: token i is the word t<i>."""
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(workload.vocabulary)}, unk_token="t1"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t0", eos_token="t0", pad_token="t0"
    )


def text(ids: list[int]) -> str:
    """The words of `word_tokenizer`."""
    return " ".join(f"t{i}" for i in ids)


def trl_order(config: ContenderConfig, lengths: list[int]) -> list[int]:
    """The order of the rows: by length for TRL's best settings, shuffled as its defaults would."""
    rng = np.random.default_rng(config.seed)
    return (
        np.argsort(lengths, kind="stable")
        if config.contender == "trl_best"
        else rng.permutation(len(lengths))
    ).tolist()


def trl_settings(config: ContenderConfig, rows: int, passes: int) -> dict[str, object]:
    """Settings of both TRL trainers: their defaults, or those that are fastest on a CPU.

    Rows are read in the order that they have; a step of `rows` takes `passes`.
    """
    best = config.contender == "trl_best"
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": config.device == "cpu",
        "bf16": config.precision == "bfloat16",
        "gradient_checkpointing": not best,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": rows // passes,
        "gradient_accumulation_steps": passes,
        "learning_rate": LEARNING_RATE,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
    }


def run_trl_sft(
    config: ContenderConfig, workload: Workload, preferences: Preferences, short: Preferences
) -> dict[str, float]:
    """TRL's SFTTrainer: its defaults, or the fastest settings on a CPU and our activation."""
    from trl import SFTConfig, SFTTrainer

    best, p = config.contender == "trl_best", preferences
    policy = make_models(workload, config.seed, config.device)[0]
    if best:
        policy = tuned(policy, config.device)
    order = trl_order(
        config, [len(p.prompts[m]) + len(ids) for ids, m in zip(p.completions, p.prompt_of)]
    )

    def row(p: Preferences, i: int) -> dict[str, str]:
        return {
            "prompt": text(p.prompts[p.prompt_of[i]]),
            "completion": " " + text(p.completions[i]),
        }

    # the short step's rows, then all rows `untimed` times and once more
    warm, rows = [row(short, i) for i in range(len(short.completions))], [row(p, i) for i in order]
    arguments = SFTConfig(**trl_settings(config, len(warm), workload.passes))
    data = Dataset.from_list([*warm, *rows * (config.untimed + 1)])
    trainer = SFTTrainer(
        policy, args=arguments, train_dataset=data, processing_class=word_tokenizer(workload)
    )

    # the loss of the first completions, to compare the contenders by
    places = [place for place, i in enumerate(order, start=len(warm)) if i < 8]
    examples = [trainer.train_dataset[place] for place in places]
    with torch.no_grad():
        inputs = trainer._prepare_inputs(trainer.data_collator(examples))
        loss = float(trainer.compute_loss(trainer.model, inputs))
    trainer.train()
    return {"loss": loss, "reference_seconds": 0.0}


def run_trl(
    config: ContenderConfig, workload: Workload, preferences: Preferences, short: Preferences
) -> dict[str, float]:
    """TRL's DPOTrainer: its defaults, or the fastest settings on a CPU and our activation."""
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    best = config.contender == "trl_best"
    policy, reference = make_models(workload, config.seed, config.device)
    if best:
        policy, reference = tuned(policy, config.device), tuned(reference, config.device)
    p = preferences
    lengths = [
        len(p.prompts[p.prompt_of[c]]) + max(len(p.completions[i]) for i in (c, r))
        for c, r in zip(p.chosen, p.rejected)
    ]
    order = trl_order(config, lengths)

    def row(p: Preferences, pair: int) -> dict[str, str]:
        c, r = p.chosen[pair], p.rejected[pair]
        prompt = text(p.prompts[p.prompt_of[c]])
        # TRL leaves an EOS that is there already
        chosen, rejected = (" " + text(p.completions[i]) for i in (c, r))
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    # the short step's rows, then all rows `untimed` times and once more
    warm = [row(short, pair) for pair in range(len(short.chosen))]
    rows = [row(p, pair) for pair in order]
    reference_seconds = []

    class Timed(DPOTrainer):
        def compute_ref_log_probs(self, *arguments: object) -> object:
            start = time.perf_counter()
            result = super().compute_ref_log_probs(*arguments)
            if config.device == "cuda":
                torch.cuda.synchronize()
            reference_seconds.append(time.perf_counter() - start)
            return result

    arguments = TRLConfig(
        **trl_settings(config, len(warm), workload.passes), precompute_ref_log_probs=best, beta=BETA
    )
    trainer = Timed(
        policy,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list([*warm, *rows * (config.untimed + 1)]),
        processing_class=word_tokenizer(workload),
    )

    # the loss of the first pairs, to compare the contenders by
    places = [place for place, pair in enumerate(order, start=len(warm)) if p.rejected[pair] < 8]
    examples = [trainer.train_dataset[place] for place in places]
    with torch.no_grad():
        inputs = trainer._prepare_inputs(trainer.data_collator(examples))
        loss = float(trainer.compute_loss(trainer.model, inputs))
    trainer.train()

    # the same rows come again and again; those that are timed come last
    timed = workload.steps * workload.passes if best else 0
    return {
        "loss": loss,
        "reference_seconds": sum(reference_seconds[len(reference_seconds) - timed :]),
    }


RUNS = {
    "dpo": {
        "dpo_lab": run_dpo_lab,
        "textbook": run_textbook,
        "trl_default": run_trl,
        "trl_best": run_trl,
    },
    "sft": {"dpo_lab": run_sft, "trl_default": run_trl_sft, "trl_best": run_trl_sft},
}


def main(config: ContenderConfig) -> None:
    """Time the steps of one contender, and print what was found."""
    workload = replace(WORKLOADS[config.workload], **json.loads(config.change))
    preferences, short = make_preferences(workload, config.seed), short_step(workload, config.seed)
    ends: list[float] = []

    def note_end(*_: object) -> None:
        if config.device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    # every step notes its end
    register_optimizer_step_post_hook(note_end)
    result = RUNS[config.job][config.contender](config, workload, preferences, short)
    expected = 1 + (config.untimed + 1) * workload.steps
    assert len(ends) == expected, f"{config.contender} made {len(ends)} steps, not {expected}"
    ends = ends[-workload.steps - 1 :]

    cuda = config.device == "cuda"
    found = {
        "contender": config.contender,
        "job": config.job,
        "precision": config.precision,
        "workload": config.workload,
        "change": json.loads(config.change),
        "without": config.without,
        "steps": workload.steps,
        "pairs": len(preferences.chosen),
        "completion_tokens": sum(map(len, preferences.completions)),
        "training_seconds": ends[-1] - ends[0],
        "step_seconds": np.diff(ends).tolist(),
        **result,
        "device": config.device,
        "peak_memory_mb": torch.cuda.max_memory_allocated() / 1e6 if cuda else peak_memory_mb(),
    }
    print(json.dumps(found))


def measure(*arguments: str) -> dict[str, Any]:
    """What a contender prints, measured in a process of its own.

    Raises:
        SystemExit: it failed; its traceback is above.
    """
    if not FORKS:
        command = [sys.executable, __file__, *arguments]
        return json.loads(subprocess.check_output(command, text=True).strip().splitlines()[-1])

    server = forking_process()
    server.stdin.write(json.dumps(arguments) + "\n")
    server.stdin.flush()
    for line in server.stdout:
        if line.startswith('{"contender"'):
            return json.loads(line)
    raise SystemExit(f"contender.py failed with {' '.join(arguments)}")


@cache
def forking_process() -> subprocess.Popen[str]:
    """A process in `serve`, one for all measurements."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, __file__, "--serve"], text=True, **pipes)


def serve() -> None:
    """Measure what each line of the input asks for, as a list of arguments, in a fork.

    This process itself never computes, so that a fork is as one that has just imported its modules.
    """
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            main(tyro.cli(ContenderConfig, args=json.loads(line)))
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        main(tyro.cli(ContenderConfig))
