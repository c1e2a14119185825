"""Stage `exactness` of benchmarks/gpu.py: is a device as exact as a plain loop in float64?

Also: does it compute the same twice? tests/test_gpu.py holds the same figures to bounds, on the CPU
in every run and on a GPU where there is one.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import HERE, Report, Settings
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    set_seed,
)

from dpo_lab import batching as layout
from dpo_lab.batching import completion_batch
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.logprobs import Precision, autocast, completion_logps
from dpo_lab.loop import LoopConfig
from dpo_lab.preferences import Preferences
from dpo_lab.sampling import sample_completions
from dpo_lab.train import DPOConfig, train_dpo

VOCABULARY, CONTEXT, WIDTH = 512, 512, 128
SHAPES = ("gpt2", "llama")
# the fractions of tokens that sharing prompts, and packing rows, must save before that is done:
# always, or never
LAYOUTS = {
    "plain": (math.inf, math.inf),
    "shared": (-math.inf, math.inf),
    "packed": (math.inf, -math.inf),
    "shared and packed": (-math.inf, -math.inf),
}


def make_model(shape: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model with heads of 64 (Llama's two per key); its logits are not uniform."""
    set_seed(seed)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if shape == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": 4, "n_head": 2, "n_positions": CONTEXT}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(
            vocab_size=VOCABULARY, initializer_range=0.1, **sizes, **no_dropout, **ends
        )
        return GPT2LMHeadModel(config).eval()
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 4,
        "head_dim": 64,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.1, **sizes, **heads, **ends)
    ).eval()


def make_preferences(
    prompts: int = 6, completions: int = 4, longest: int = 60, seed: int = 0
) -> Preferences:
    """Random prompts of 1 to 40 tokens, completions of 1 to `longest`; lower indices are better."""
    rng, k = np.random.default_rng(seed), completions
    texts = [
        [0, *map(int, rng.integers(1, VOCABULARY, rng.integers(0, 40)))] for _ in range(prompts)
    ]
    sizes = rng.integers(0, longest, prompts * k)
    better, worse = np.triu_indices(k, 1)
    return Preferences(
        prompts=texts,
        completions=[[*map(int, rng.integers(1, VOCABULARY, size)), 0] for size in sizes],
        prompt_of=np.repeat(np.arange(prompts), k),
        chosen=(np.arange(prompts)[:, None] * k + better).ravel(),
        rejected=(np.arange(prompts)[:, None] * k + worse).ravel(),
    )


@contextmanager
def laid_out(how: str) -> Iterator[None]:
    """Batches of one of `LAYOUTS` meanwhile."""
    before = layout.SHARE_FROM, layout.PACK_FROM
    layout.SHARE_FROM, layout.PACK_FROM = LAYOUTS[how]
    try:
        yield
    finally:
        layout.SHARE_FROM, layout.PACK_FROM = before


def by_loop(model: PreTrainedModel, preferences: Preferences) -> tuple[Tensor, list[Tensor]]:
    """Log-probs of the completions (N,) and the gradient of their weighted sum, in float64.

    Each completion has an unpadded forward pass of its own.
    """
    wide, logps = model.double(), []
    wide.zero_grad()
    for completion, p in zip(preferences.completions, preferences.prompt_of):
        prompt = preferences.prompts[p]
        logits = wide(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())
    found = torch.stack(logps)
    weighted(found).backward()
    return found.detach(), [p.grad.clone() for p in wide.parameters()]


def weighted(logps: Tensor) -> Tensor:
    """A sum in which each completion has a weight of its own."""
    return (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype, device=logps.device)).sum()


def errors(shape: str, how: str, precision: Precision, device: str) -> dict[str, float]:
    """Largest log-prob error in nats and relative gradient error, against the float64 loop."""
    preferences = make_preferences()
    exact, exact_gradients = by_loop(make_model(shape), preferences)
    model = make_model(shape).to(device)
    with laid_out(how):
        batch = completion_batch(
            preferences.prompts,
            preferences.completions,
            preferences.prompt_of.tolist(),
            compact=how != "plain",
        )
    with autocast(device, precision):
        logps = completion_logps(model, batch.to(device))
    weighted(logps).backward()
    off = [
        (p.grad.cpu().double() - g).square().sum()
        for p, g in zip(model.parameters(), exact_gradients)
    ]
    size = [g.square().sum() for g in exact_gradients]
    return {
        "logps_nats": float((logps.detach().cpu().double() - exact).abs().max()),
        "gradient": float((sum(off) / sum(size)).sqrt()),
    }


def sampling(device: str, draws: int = 40_000) -> dict[str, float]:
    """p-values of chi-square tests of the first two sampled tokens against the exact softmax."""
    model = make_model("gpt2").double()
    prompt = [0, 7, 3]
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        pairs = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
        second = first @ model(pairs).logits[:, -1].softmax(-1)
    drawn = sample_completions(
        model.float().to(device), [prompt], draws, eos_token_id=VOCABULARY, max_new_tokens=2
    )[0]
    tokens = np.array(drawn).T
    return {
        name: p_value(np.bincount(found, minlength=VOCABULARY), expected.numpy() * draws)
        for name, found, expected in (
            ("first_token", tokens[0], first),
            ("second_token", tokens[1], second),
        )
    }


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of Pearson's test; tokens that are expected less than five times are one class."""
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return float(chisquare(counts, expected * counts.sum() / expected.sum()).pvalue)


def step_gradient(
    model: nn.Module, preferences: Preferences, loop: LoopConfig
) -> tuple[list[Tensor], dict[str, Any]]:
    """The gradient that the optimizer gets in one step of DPO on all pairs, and the logged line."""
    kept: list[Tensor] = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: kept.extend(
            p.grad.cpu() for group in optimizer.param_groups for p in group["params"]
        )
    )
    try:
        config = DPOConfig(beta=0.1, batch_pairs=len(preferences.chosen), loop=loop)
        lines = train_dpo(model, preferences, config, progress=None)
    finally:
        handle.remove()
    return kept, lines[0]


def out_of_memory(preferences: Preferences) -> dict[str, Any]:
    """A step of DPO with too little GPU memory for one forward pass.

    Returns the number of parts that it took, and the relative error of its gradient.
    """
    reference = make_model("gpt2", seed=1).to("cuda")
    preferences, loop = (
        preferences.with_reference(reference),
        LoopConfig(learning_rate=1e-6, warmup_steps=0),
    )
    del reference
    peaks, found = [], []
    for accumulate in (1, 8):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found.append(
            step_gradient(
                make_model("gpt2").to("cuda"),
                preferences,
                replace(loop, gradient_accumulation_steps=accumulate),
            )
        )
        peaks.append(torch.cuda.max_memory_reserved())

    # a cap between what one pass reserves and what eight passes reserve
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((peaks[0] + 2 * peaks[1]) / 3 / total)
    try:
        gradient, line = step_gradient(make_model("gpt2").to("cuda"), preferences, loop)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    exact = found[0][0]
    off = sum((a - b).square().sum() for a, b in zip(gradient, exact))
    return {
        "accumulate": line.get("gradient_accumulation_steps", 1),
        "gradient": float((off / sum(g.square().sum() for g in exact)).sqrt()),
        "peak_mb": [round(peak / 1e6) for peak in peaks],
    }


class Stopped(Exception):
    """Raised between two steps, as an interruption would come."""


def same_bytes(device: str, precision: Precision, longest: int, work: Path) -> dict[str, bool]:
    """Whether two runs of DPO, and one that was stopped and resumed, end with the same bytes."""
    data = make_preferences(prompts=8, longest=longest).with_reference(
        make_model("gpt2", 1).to(device), precision=precision
    )
    loop = LoopConfig(learning_rate=1e-3, warmup_steps=0, save_every=2, eval_every=1)
    config = DPOConfig(beta=0.1, batch_pairs=6, loop=loop)

    def trained(run: Path | None = None, stop: int | None = None, resume: bool = False) -> str:
        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            if step == stop:
                raise Stopped
            return {}

        model = make_model("gpt2").to(device)
        try:
            train_dpo(model, data, config, run=run, resume=resume, callback=evaluate, progress=None)
        except Stopped:
            return "stopped"
        return weights_hash(model)

    first, run = trained(), work / f"resume-{precision}-{longest}"
    run.mkdir(parents=True, exist_ok=True)
    assert trained(run, stop=5) == "stopped"
    return {"twice": first == trained(), "resumed": first == trained(run, resume=True)}


def gpu_tests(settings: Settings) -> dict[str, Any]:
    """How the tests ended that are marked `gpu`, which skip elsewhere."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "tests/test_gpu.py",
        "-p",
        "no:cacheprovider",
    ]
    command += [f"--basetemp={settings.work / 'tests'}"]
    ran = subprocess.run(
        command, cwd=HERE.parent, capture_output=True, text=True, timeout=max(1, settings.left - 2)
    )
    return {"status": ran.returncode, "last line": ran.stdout.strip().splitlines()[-1]}


def run(settings: Settings, report: Report) -> None:
    measure(settings, report)
    if settings.device == "cuda":
        report.attempt(
            "out of memory", lambda: out_of_memory(make_preferences(prompts=64, longest=400))
        )
        report.attempt("tests", lambda: gpu_tests(settings))


def measure(settings: Settings, report: Report) -> None:
    """All but what needs a GPU."""
    device, shapes = settings.device, SHAPES[:1] if settings.tiny else SHAPES
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for shape in shapes:
        for precision in precisions:
            for how in LAYOUTS:
                name = f"errors/{shape}/{precision}/{how}"
                report.attempt(name, lambda s=shape, h=how, p=precision: errors(s, h, p, device))
    report.attempt("sampling", lambda: sampling(device, 4_000 if settings.tiny else 40_000))
    for precision in precisions:
        for longest in (40,) if settings.tiny else (60, 400):
            name = f"same bytes/{precision}/up to {longest} tokens"
            report.attempt(
                name, lambda p=precision, n=longest: same_bytes(device, p, n, settings.work)
            )
