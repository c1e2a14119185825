"""What a DPO epoch takes at 7B and 70B on 8 to 512 GPUs, predicted from stated assumptions.

    python benchmarks/scale.py

`python benchmarks/readme.py` writes the table into docs/scale.md.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Scheme = Literal["DDP", "FSDP", "LoRA"]


@dataclass(frozen=True)
class Model:
    """A decoder."""

    name: str
    parameters: float
    layers: int
    width: int


def measured_share() -> float:
    """The fraction of its own matmul rate at which a machine ran `dpo_lab` on long prompts.

    `make bench` measures it: in bfloat16, or in float32 where the machine is slow in bfloat16.
    """
    table = json.loads((Path(__file__).parent / "results" / "cpu.json").read_text())["table"]
    wanted = {"job": "dpo", "workload": "long", "contender": "dpo_lab"}
    found = {
        row["precision"]: row["share_of_limit"] for row in table if wanted.items() <= row.items()
    }
    return found.get("bfloat16", found["float32"])


@dataclass(frozen=True)
class Assumptions:
    """What the prediction assumes; docs/scale.md says where each number comes from."""

    pairs: int = 60_000
    """pairs per epoch, about the size of UltraFeedback"""
    pairs_per_step: int = 512
    """global batch"""
    tokens_per_pair: int = 1_200
    """tokens of a prompt and both completions, the prompt counted once"""
    pairs_at_once: int = 4
    """pairs in one forward pass of a GPU; more are accumulated"""
    flops_per_second: float = 989e12
    """FLOP/s of one H100 SXM in dense bfloat16"""
    share: float = field(default_factory=measured_share)
    """fraction of that rate that the training loop reaches"""
    memory: float = 80e9
    """bytes of one GPU"""
    inside: float = 450e9
    """bytes/s that a GPU sends to those of its node (NVLink 4)"""
    between: float = 50e9
    """bytes/s that a GPU sends to those of other nodes (400 Gb/s)"""
    node: int = 8
    """GPUs that NVLink joins"""
    lora_share: float = 0.005
    """LoRA's trainable parameters, as a fraction of all"""


MODELS = (Model("7B", 7e9, 32, 4_096), Model("70B", 70e9, 80, 8_192))
GPUS = (8, 64, 512)
SCHEMES: tuple[Scheme, ...] = ("DDP", "FSDP", "LoRA")


def state_bytes(model: Model, gpus: int, scheme: Scheme, a: Assumptions) -> float:
    """Bytes per GPU of weights, gradients and Adam's two moments.

    In float32 they take 16 bytes per parameter; LoRA's base, in bfloat16, takes 2.
    """
    n = model.parameters
    if scheme == "DDP":
        return 16 * n
    if scheme == "FSDP":
        # two blocks are gathered in bfloat16: the one in use and the next
        return 16 * n / gpus + 2 * 2 * n / model.layers
    return 2 * n + 14 * n * a.lora_share


def activation_bytes(model: Model, gpus: int, a: Assumptions) -> float:
    """Bytes per GPU of activations: the checkpointed inputs of all blocks, and one block's own.

    A block's own are 34 bytes per token and unit of width, as in Korthikanti et al. 2022
    (https://arxiv.org/abs/2205.05198, Eq. 2), without attention scores.
    """
    return passes(gpus, a)[1] * a.tokens_per_pair * model.width * (2 * model.layers + 34)


def passes(gpus: int, a: Assumptions) -> tuple[int, int]:
    """Forward passes per step on each GPU, and pairs in each."""
    share = math.ceil(a.pairs_per_step / gpus)
    return math.ceil(share / a.pairs_at_once), min(share, a.pairs_at_once)


def traffic_bytes(model: Model, gpus: int, scheme: Scheme, a: Assumptions) -> float:
    """Bytes that a GPU sends per step.

    DDP and LoRA all-reduce in a ring; FSDP all-gathers twice per pass and reduce-scatters once.
    """
    n, ring = model.parameters, (gpus - 1) / gpus
    if scheme == "FSDP":
        # weights in bfloat16, gathered again in every pass; gradients once
        return ring * n * (2 * 2 * passes(gpus, a)[0] + 4)
    return 2 * ring * 4 * n * (a.lora_share if scheme == "LoRA" else 1)


def predict(model: Model, gpus: int, scheme: Scheme, a: Assumptions) -> dict[str, float]:
    """Bytes per GPU, seconds of compute and traffic per step, and hours per epoch.

    The best hours hide traffic behind compute; the worst add it.
    """
    # gradients of activations, and of weights where they train
    tokens = a.pairs_per_step * a.tokens_per_pair
    backward = 2 if scheme == "LoRA" else 4

    # forward, forward again for checkpointing, and backward
    flops = model.parameters * tokens * (2 + 2 + backward)
    compute = flops / (gpus * a.flops_per_second * a.share)

    # what the GPUs exchange
    speed = a.inside if gpus <= a.node else a.between
    traffic = traffic_bytes(model, gpus, scheme, a) / speed

    # the reference is scored once per epoch
    steps = a.pairs / a.pairs_per_step
    reference = (
        2 * model.parameters * a.pairs * a.tokens_per_pair / (gpus * a.flops_per_second * a.share)
    )
    return {
        "bytes": state_bytes(model, gpus, scheme, a) + activation_bytes(model, gpus, a),
        "compute": compute,
        "traffic": traffic,
        "hours_at_best": (steps * max(compute, traffic) + reference) / 3600,
        "hours_at_worst": (steps * (compute + traffic) + reference) / 3600,
    }


def rows(a: Assumptions) -> Iterator[tuple[Model, int, Scheme, dict[str, float]]]:
    """Every model on every number of GPUs under every scheme."""
    for model in MODELS:
        for gpus in GPUS:
            for scheme in SCHEMES:
                yield model, gpus, scheme, predict(model, gpus, scheme, a)


def table() -> str:
    """The predictions as Markdown."""
    a = Assumptions()
    lines = [
        "| model | GPUs | scheme | memory per GPU | fits in 80 GB | compute per step "
        "| traffic per step | hours per epoch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, gpus, scheme, p in rows(a):
        fits = p["bytes"] <= a.memory
        hours = f"{p['hours_at_best']:.2f} to {p['hours_at_worst']:.2f}" if fits else ""
        lines.append(
            f"| {model.name} | {gpus} | {scheme} | {p['bytes'] / 1e9:,.0f} GB "
            f"| {'yes' if fits else 'no'} | {p['compute']:.2f} s | {p['traffic']:.2f} s | {hours} |"
        )
    return (
        "\n".join(lines)
        + f"\n\nThe loop reaches {a.share:.0%} of the GPU's matmul rate, the fraction measured by "
        "`make bench` on CPUs."
    )


if __name__ == "__main__":
    print(table())
