"""What this machine does best: the precision that it is fast in, and memory that goes back to the system."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from dpo_lab.batching import CompletionBatch
from dpo_lab.engine.cpu import kept_memory, matmuls_by_onednn
from dpo_lab.logprobs import Precision, autocast, completion_logps
from dpo_lab.losses import dpo_loss


@dataclass(frozen=True)
class PrecisionTest:
    """bfloat16 against float32 on this machine: speed, and what it costs in exactness."""

    speedup: float
    """seconds in float32 over seconds in bfloat16, forward and backward passes of one batch"""
    logps_error: float
    """root mean square difference of completion log-probs, nats"""
    loss_error: float
    """root mean square difference of DPO's loss a pair that this difference makes"""

    @property
    def choice(self) -> Precision:
        """bfloat16 where it is fast: some processors compute it in hardware, others by detours."""
        return "bfloat16" if self.speedup > 1.2 else "float32"

    def __str__(self) -> str:
        return (
            f"precision {self.choice}: bfloat16 has {self.speedup:.1f} times the speed of float32 here, and changes log-probs by "
            f"{self.logps_error:.3f} nats a completion and DPO's loss by {self.loss_error:.4f} a pair (root mean square)"
        )


@kept_memory()
def measure_precision(
    model: nn.Module, batch: CompletionBatch, beta: float, *, repeats: int = 2
) -> PrecisionTest:
    """Score an even number of completions in both precisions by turns; the fastest pass of each counts."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    seconds: dict[Precision, list[float]] = {"float32": [], "bfloat16": []}
    logps, device = {}, batch.sources.device.type
    for _ in range(repeats + 1):
        for precision, times in seconds.items():
            began = time.perf_counter()
            with autocast(device, precision), matmuls_by_onednn(device):
                scored = completion_logps(model, batch)
                torch.autograd.grad(scored.sum(), parameters, allow_unused=True)
            logps[precision] = scored.detach().cpu().double()
            times.append(time.perf_counter() - began)
    error = logps["bfloat16"] - logps["float32"]
    chosen, rejected = torch.arange(batch.n).chunk(2)
    losses = [
        dpo_loss(logps[p], logps["float32"], chosen, rejected, beta).losses
        for p in ("bfloat16", "float32")
    ]
    return PrecisionTest(
        speedup=min(seconds["float32"][1:]) / min(seconds["bfloat16"][1:]),
        logps_error=float(error.square().mean().sqrt()),
        loss_error=float((losses[0] - losses[1]).square().mean().sqrt()),
    )
