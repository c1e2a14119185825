"""Log-probs and training after long prompts: time and memory against the length of the prompt.

    python benchmarks/long_prompts.py

The K completions of a prompt in one row each; sharing their prompt under a mask, as before; and
sharing it part by part (`dpo_lab/engine/prompt_rows.py`). The three take turns in one process, on
random models: the embedded shape with a longer context, and a Llama of SmolLM2's shape (135M
weights), once. Time is the CPU time of one thread, which depends little on what else runs; wall
time is kept beside it. Memory is what is saved for the backward pass, and how much the process
grows. Writes benchmarks/results/long_prompts.json after each point, and keeps those that are there
(delete the file to measure again), and docs/long_prompts.png. About 7 minutes of one core.
"""

import gc
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from matplotlib.figure import Figure
from sampling import random_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from dpo_lab import batching, logprobs, tune_cpu
from dpo_lab.batching import completion_batch
from dpo_lab.engine.cpu import return_freed_memory
from dpo_lab.engine.runs import atomic_write, provenance, write_json
from dpo_lab.logprobs import completion_logps

RESULTS = Path(__file__).parent / "results" / "long_prompts.json"
PICTURE = Path(__file__).parent.parent / "docs" / "long_prompts.png"

# what each contender does without
CONTENDERS = {
    "one row each": {"SHARE_FROM": 2.0},
    "shared, masked": {"LONG_ROW": 10**9},
    "shared": {},
}


@dataclass(frozen=True)
class Point:
    """A model and a batch: the completions of some prompts of one length."""

    shape: str
    prompt_tokens: int
    completions: int
    """of each prompt, K"""
    prompts: int = 1
    repeats: int = 3
    """turns of each contender; where there are several, the first is not counted"""


@dataclass(frozen=True)
class LongPromptsConfig:
    """What to measure."""

    completion_tokens: int = 64
    """of a completion, on average"""
    embedded: tuple[int, ...] = (128, 256, 512, 1_024)
    """prompt tokens"""
    llama: tuple[int, ...] = (512, 1_024)
    """prompt tokens of the 135M shape"""


def points(config: LongPromptsConfig) -> list[Point]:
    """All points, the cheap ones first."""
    small = [Point("embedded", n, k, 2) for n in config.embedded for k in (2, 4)]
    return small + [Point("135M", n, k, 1, 1) for k in (4, 2) for n in config.llama]


def peak_growth_begins() -> int:
    """Bytes now resident, with the peak set back to it; freed memory is returned first."""
    gc.collect()
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


def resident(name: str) -> int:
    """Bytes by a line of /proc/self/status: VmRSS, or its peak VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1_024


def once(model: PreTrainedModel, tokens: tuple[Any, ...]) -> dict[str, float]:
    """Seconds and bytes of the log-probs of a batch, and of a pass forward and backward."""
    batch = completion_batch(*tokens, compact=True)
    with torch.no_grad():
        wall, cpu = time.perf_counter(), time.process_time()
        completion_logps(model, batch)
        found = {"logps_cpu": time.process_time() - cpu, "logps_wall": time.perf_counter() - wall}

    # what is saved for the backward pass, each storage once, the weights left out
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    start = peak_growth_begins()
    wall, cpu = time.perf_counter(), time.process_time()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = -completion_logps(model, batch).sum()
    loss.backward()
    found |= {"train_cpu": time.process_time() - cpu, "train_wall": time.perf_counter() - wall}
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    grown = resident("VmHWM") - start
    model.zero_grad(set_to_none=False)
    return found | {"saved_bytes": sum(saved.values()), "peak_bytes": grown, "loss": loss.item()}


def measure(model: PreTrainedModel, point: Point, completion_tokens: int) -> dict[str, Any]:
    """The least time of each contender over its turns, and its memory."""
    rng, k = random.Random(0), point.completions

    def text(n: int) -> list[int]:
        return [rng.randrange(1, 8_000) for _ in range(n)]

    prompts = [text(point.prompt_tokens) for _ in range(point.prompts)]
    sizes = [rng.randint(completion_tokens // 2, 3 * completion_tokens // 2) for _ in range(k)]
    completions = [text(n) for _ in prompts for n in sizes]
    tokens = prompts, completions, [i // k for i in range(len(completions))]

    turns: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(point.repeats):
        for name, without in CONTENDERS.items():
            share = without.get("SHARE_FROM", batching.SHARE_FROM)
            long = without.get("LONG_ROW", logprobs.LONG_ROW)
            with (
                mock.patch.object(batching, "SHARE_FROM", share),
                mock.patch.object(logprobs, "LONG_ROW", long),
            ):
                turns[name].append(once(model, tokens))

    found = {}
    for name, all_of in turns.items():
        counted = all_of[1:] or all_of
        found[name] = {field: min(turn[field] for turn in counted) for field in counted[0]}
    losses = [one["loss"] for one in found.values()]
    if max(losses) - min(losses) > 1e-5 * abs(losses[0]):
        raise SystemExit(f"the contenders do not compute the same loss: {losses}")
    return asdict(point) | {"contenders": found}


def plot(rows: list[dict[str, Any]]) -> Figure:
    """The embedded shape with most completions per prompt: a panel for time, one for memory."""
    k = max(row["completions"] for row in rows)
    rows = [row for row in rows if row["shape"] == "embedded" and row["completions"] == k]
    x = [row["prompt_tokens"] for row in rows]
    figure = Figure(figsize=(8.4, 3.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    for name, style in zip(CONTENDERS, ("o-", "^--", "s-")):
        runs = [row["contenders"][name] for row in rows]
        for axes, field, unit in zip(panels, ("train_cpu", "saved_bytes"), (1, 1e6)):
            axes.plot(x, [run[field] / unit for run in runs], style, label=name)
    for axes, label in zip(panels, ("CPU seconds, forward and backward", "saved for backward, MB")):
        axes.set(xlabel=f"prompt tokens, {k} completions per prompt", ylabel=label)
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    return figure


def main(config: LongPromptsConfig) -> None:
    tune_cpu()
    torch.set_num_threads(1)
    origin = provenance()

    # what is there already
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["points"] if RESULTS.exists() else []

    model, shape = None, ""
    for point in points(config):
        if any(row | asdict(point) == row for row in rows):
            continue
        if shape != point.shape:
            model, shape = random_model(point.shape, 2_048), point.shape
            for parameter in model.parameters():  # so that no pass is the first to make them
                parameter.grad = torch.zeros_like(parameter)
        rows.append(measure(model, point, config.completion_tokens) | {"commit": origin["commit"]})
        write_json(RESULTS, {"provenance": origin, **asdict(config), "points": rows})
        print(json.dumps(rows[-1]), flush=True)
    with atomic_write(PICTURE) as temporary:
        plot(rows).savefig(temporary, format="png")


if __name__ == "__main__":
    main(tyro.cli(LongPromptsConfig))
