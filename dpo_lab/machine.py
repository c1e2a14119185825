"""What this machine does best: the precision that it is fast in, whose matmuls, how it keeps memory."""

import ctypes
import os
import sys
import time
from dataclasses import dataclass

import pyarrow
import torch
from torch import nn

from dpo_lab.layout import CompletionBatch
from dpo_lab.logprobs import ONEDNN, Precision, autocast, completion_logps
from dpo_lab.losses import dpo_loss

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


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


def measure_precision(model: nn.Module, batch: CompletionBatch, beta: float, *, repeats: int = 2) -> PrecisionTest:
    """Score an even number of completions in both precisions by turns; the fastest pass of each counts."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    seconds: dict[Precision, list[float]] = {"float32": [], "bfloat16": []}
    logps = {}
    for _ in range(repeats + 1):
        for precision, times in seconds.items():
            began = time.perf_counter()
            with autocast(batch.sources.device.type, precision):
                scored = completion_logps(model, batch)
                torch.autograd.grad(scored.sum(), parameters, allow_unused=True)
            logps[precision] = scored.detach().cpu().double()
            times.append(time.perf_counter() - began)
    error = logps["bfloat16"] - logps["float32"]
    chosen, rejected = torch.arange(batch.n).chunk(2)
    losses = [dpo_loss(logps[p], logps["float32"], chosen, rejected, beta).losses for p in ("bfloat16", "float32")]
    return PrecisionTest(
        speedup=min(seconds["float32"][1:]) / min(seconds["bfloat16"][1:]),
        logps_error=float(error.square().mean().sqrt()),
        loss_error=float((losses[0] - losses[1]).square().mean().sqrt()),
    )


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free, for the rest of the process, instead of returning it to the system at once.

    A training step frees and allocates the same hundreds of megabytes as the one before, and otherwise fetches them from
    the kernel anew, page by page. Threads share one heap: each with its own would keep as much again. Does nothing where
    the C library is another.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def use_onednn() -> None:
    """Let oneDNN compute the float32 matmuls of this process on a CPU with AVX-512, where it keeps float32's exactness.

    torch's default is MKL, which leaves half of the width of processors other than Intel's unused. What torch allows here is
    also bfloat16, which oneDNN takes on some processors; there everything stays as it was. oneDNN keeps a kernel for each shape
    that it has met, in all some 200 MB unless it is told before the first: here, that 128 are enough.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact, before = a.double() @ b.double(), torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = ONEDNN
    if (a @ b - exact).norm() > 2e-6 * exact.norm():  # float32 is off by 3e-7, bfloat16 by 2e-3
        torch.backends.mkldnn.matmul.fp32_precision = before


def return_freed_memory() -> None:
    """Give what was freed back to the system once, after work that needed much more than what comes."""
    pyarrow.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
