"""The precision this machine is fast in: bfloat16 where the processor computes it in hardware."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from dpo_lab.batching import CompletionBatch
from dpo_lab.engine.cpu import kept_memory, matmuls_by_onednn
from dpo_lab.logprobs import Precision, autocast, completion_logps
from dpo_lab.losses import dpo_loss

# times the speed of float32 from which on bfloat16 is worth its error
WORTHWHILE = 1.2


@dataclass(frozen=True)
class PrecisionTest:
    """bfloat16 against float32 on this machine: its speed, and its error."""

    speedup: float
    """seconds in float32 over seconds in bfloat16, for forward and backward passes of one batch"""
    logps_error: float
    """root mean square difference of completion log-probs, in nats"""
    loss_error: float
    """root mean square difference of DPO's loss per pair that it makes"""

    @property
    def choice(self) -> Precision:
        """bfloat16 where it is fast: some processors compute it in hardware, others emulate it."""
        return "bfloat16" if self.speedup > WORTHWHILE else "float32"

    def __str__(self) -> str:
        return (
            f"precision {self.choice}: bfloat16 has {self.speedup:.1f} times the speed of float32 "
            f"here, and changes log-probs by {self.logps_error:.3f} nats per completion and DPO's "
            f"loss by {self.loss_error:.4f} per pair (root mean square)"
        )


@kept_memory()
def measure_precision(
    model: nn.Module, batch: CompletionBatch, beta: float, *, repeats: int = 2
) -> PrecisionTest:
    """Score an even number of completions in both precisions by turns; the fastest pass of each
    counts.

    Args:
        model: what scores them.
        batch: the completions; the first half counts as chosen, the second as rejected.
        beta: of the DPO loss whose error is told.
        repeats: timed passes in each precision, after one that is not timed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    seconds: dict[Precision, list[float]] = {"float32": [], "bfloat16": []}
    logps, device = {}, batch.sources.device.type

    # forward and backward passes, by turns
    for _ in range(repeats + 1):
        for precision, times in seconds.items():
            began = time.perf_counter()
            with autocast(device, precision), matmuls_by_onednn(device):
                scored = completion_logps(model, batch)
                torch.autograd.grad(scored.sum(), parameters, allow_unused=True)
            logps[precision] = scored.detach().cpu().double()
            times.append(time.perf_counter() - began)

    # what bfloat16 changes, against a reference in float32
    error = logps["bfloat16"] - logps["float32"]
    chosen, rejected = torch.arange(batch.n).chunk(2)
    narrow, wide = (
        dpo_loss(logps[p], logps["float32"], chosen, rejected, beta).losses
        for p in ("bfloat16", "float32")
    )
    return PrecisionTest(
        speedup=min(seconds["float32"][1:]) / min(seconds["bfloat16"][1:]),
        logps_error=float(error.square().mean().sqrt()),
        loss_error=float((narrow - wide).square().mean().sqrt()),
    )
