"""Settings of the process that make training on a CPU fast: in force while a function of ours computes, and then as before.

`keep_freed_memory` and `use_onednn` put them in force for the rest of the process, as the command line does.
"""

import ctypes
import functools
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pyarrow
import torch
from torch import Tensor

ONEDNN = "bf16"  # torch's name for the setting under which oneDNN computes float32 matmuls

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = (
    -1,
    -2,
    -3,
    -4,
    -8,
)  # malloc.h

KEEPING = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26), (M_ARENA_MAX, 1))

USUAL = (  # glibc's, with the thresholds at which its own adaptation ends; what they were cannot be asked
    (M_MMAP_MAX, 2**16),
    (M_TRIM_THRESHOLD, 2**26),
    (M_TOP_PAD, 2**17),
    (M_MMAP_THRESHOLD, 2**25),
    (M_ARENA_MAX, 0),
)

_lock, _keepers = threading.RLock(), 0  # for a keeper may be collected while another is counted


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let glibc keep what tensors free meanwhile, instead of returning it to the system at once.

    A training step frees and allocates the same hundreds of megabytes as the one before, and otherwise fetches them from
    the kernel anew, page by page. Threads share one heap: each with its own would keep as much again. Does nothing where
    the C library is another.
    """
    _count_keepers(+1)
    try:
        yield
    finally:
        _count_keepers(-1)


def keep_freed_memory() -> None:
    """`kept_memory` for the rest of the process."""
    _count_keepers(+1)


def _count_keepers(change: int) -> None:
    """Set glibc for the first that keeps memory, and back after the last."""
    global _keepers
    with _lock:
        before, _keepers = _keepers, _keepers + change
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt and 0 in (before, _keepers):
            for parameter, value in KEEPING if _keepers else USUAL:
                mallopt(parameter, value)


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN computes float32 matmuls on this CPU with float32's exactness, and faster than MKL: where it has AVX-512.

    torch's default is MKL, which leaves half of the width of processors other than Intel's unused. What torch allows with the
    setting is also bfloat16, which oneDNN takes on some processors. oneDNN keeps a kernel for each shape that it has met, in
    all some 200 MB unless it is told before the first: here, that 128 are enough.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    found, matmul = os.environ.get(name), torch.backends.mkldnn.matmul
    os.environ.setdefault(name, "128")
    generator, before = torch.Generator().manual_seed(0), matmul.fp32_precision
    a, b = (torch.randn(512, 512, generator=generator, dtype=torch.float32) for _ in range(2))
    few = a[:64, :64].bfloat16()
    try:
        with torch.autocast("cpu", enabled=False):
            few @ few  # oneDNN's first, at which it reads the variable
            if torch.backends.cpu.get_cpu_capability() != "AVX512":
                return False
            exact, matmul.fp32_precision = a.double() @ b.double(), ONEDNN
            return bool(
                (a @ b - exact).norm() < 2e-6 * exact.norm()
            )  # float32 is off by 3e-7, bfloat16 by 2e-3
    finally:
        matmul.fp32_precision = before
        if found is None:
            os.environ.pop(name, None)


def use_onednn() -> None:
    """Let oneDNN compute the float32 matmuls of the rest of the process where `onednn_is_exact`."""
    if onednn_is_exact():
        torch.backends.mkldnn.matmul.fp32_precision = ONEDNN


@contextmanager
def matmuls_by_onednn(device: str) -> Iterator[None]:
    """Float32 matmuls by oneDNN meanwhile, in all threads, where `device` is "cpu" and `onednn_is_exact`."""
    if device != "cpu" or not onednn_is_exact():
        yield
        return
    with _matmuls_by(ONEDNN):
        yield


class _Keeper:
    """Keeps memory (`kept_memory`) for as long as something refers to it."""

    def __init__(self) -> None:
        _count_keepers(+1)
        weakref.finalize(self, _count_keepers, -1)


def tune_backward(out: Tensor) -> None:
    """What is fast on a CPU in a backward pass through `out`: memory is kept as long as its graph is there, and float32
    matmuls are oneDNN's, where `onednn_is_exact`, until the end of the pass."""
    if not out.requires_grad or out.device.type != "cpu":
        return
    keeper, matmul = _Keeper(), torch.backends.mkldnn.matmul

    def begin(_: Tensor, keeper: _Keeper = keeper) -> None:
        if onednn_is_exact() and (before := matmul.fp32_precision) != ONEDNN:
            matmul.fp32_precision = ONEDNN
            end = partial(setattr, matmul, "fp32_precision", before)
            torch.autograd.Variable._execution_engine.queue_callback(end)

    out.register_hook(begin)


@contextmanager
def matmuls_by_mkl() -> Iterator[None]:
    """Float32 matmuls by MKL meanwhile, in all threads."""
    onednn_is_exact()  # which tells oneDNN how many kernels to keep, before bfloat16 matmuls do
    with _matmuls_by("ieee"):
        yield


@contextmanager
def _matmuls_by(setting: str) -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, setting
    try:
        yield
    finally:
        matmul.fp32_precision = before


def return_freed_memory() -> None:
    """Give what was freed back to the system once, after work that needed much more than what comes."""
    pyarrow.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def tune_cpu() -> None:
    """Set this process for training on a CPU: glibc's malloc keeps freed memory, and oneDNN computes
    float32 matmuls where it is exact and faster.

    The functions of this package do both while they compute, and put back what they found. A
    notebook or script that trains for long calls this once, so that what lies between is fast too.
    It changes the whole process, for other code in it as well.
    """
    keep_freed_memory()
    use_onednn()
