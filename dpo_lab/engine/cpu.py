"""CPU settings that make training fast: malloc, and the matmul backend.

Both are settings of the whole process. The functions of this package turn them on while they
compute and put back what they found; `tune_cpu` turns them on for good, as the command line does.
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

import torch
from torch import Tensor

# torch's name for the setting under which oneDNN computes float32 matmuls
ONEDNN = "bf16"

# malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8

# freed memory stays with the process, in one heap for all threads
KEEPING = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26), (M_ARENA_MAX, 1))

# glibc's defaults, with the thresholds at which its own adaptation ends: it does not tell which
# values were in force before
USUAL = (
    (M_MMAP_MAX, 2**16),
    (M_TRIM_THRESHOLD, 2**26),
    (M_TOP_PAD, 2**17),
    (M_MMAP_THRESHOLD, 2**25),
    (M_ARENA_MAX, 0),
)

# how many keep memory now; the lock can be taken again, for a keeper may be garbage-collected
# while another is being counted
_lock, _keepers = threading.RLock(), 0


def tune_cpu() -> None:
    """Set this process for training on a CPU: malloc and the matmul backend.

    glibc's malloc keeps freed memory, and oneDNN computes float32 matmuls where it is exact and
    faster. The functions of this package do both while they compute, and put back what they found.
    A notebook or script that trains for long calls this once, so that the code between those calls
    is fast too. It changes the whole process, for other code in it as well.
    """
    keep_freed_memory()
    use_onednn()


@contextmanager
def kept_memory() -> Iterator[None]:
    """In the block, glibc keeps freed memory instead of returning it to the system.

    A training step frees and allocates the same hundreds of megabytes as the one before, and would
    fetch them from the kernel page by page. Threads share one heap; with one each they would keep
    as much again. Does nothing with another C library.
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
    """Set glibc for the first that keeps memory, and set it back after the last."""
    global _keepers
    with _lock:
        before, _keepers = _keepers, _keepers + change
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt and 0 in (before, _keepers):
            for parameter, value in KEEPING if _keepers else USUAL:
                mallopt(parameter, value)


class _Keeper:
    """Keeps memory (`kept_memory`) for as long as something refers to it."""

    def __init__(self) -> None:
        _count_keepers(+1)
        weakref.finalize(self, _count_keepers, -1)


def return_freed_memory() -> None:
    """Return freed heap to the system (malloc_trim), after a peak."""
    # pyarrow has a pool of its own, if anything has loaded it
    if pyarrow := sys.modules.get("pyarrow"):
        pyarrow.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's float32 matmuls are exact on this CPU, and faster than MKL's.

    They are faster where the CPU has AVX-512: MKL, torch's default, leaves half of the width of
    processors other than Intel's unused. The setting also allows bfloat16, which oneDNN takes on
    some processors, so the result of one product is compared with float64.
    """
    if not torch.backends.mkldnn.is_available():
        return False

    # oneDNN keeps a kernel for each shape it has met, some 200 MB in all; told before its first
    # matmul, 128 of them are enough
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    found, matmul = os.environ.get(name), torch.backends.mkldnn.matmul
    os.environ.setdefault(name, "128")
    generator, before = torch.Generator().manual_seed(0), matmul.fp32_precision
    a, b = (torch.randn(512, 512, generator=generator, dtype=torch.float32) for _ in range(2))
    few = a[:64, :64].bfloat16()
    try:
        with torch.autocast("cpu", enabled=False):
            few @ few  # the first matmul, at which oneDNN reads the variable
            if torch.backends.cpu.get_cpu_capability() != "AVX512":
                return False

            # the relative error of float32 is 3e-7, that of bfloat16 2e-3
            exact, matmul.fp32_precision = a.double() @ b.double(), ONEDNN
            return bool((a @ b - exact).norm() < 2e-6 * exact.norm())
    finally:
        matmul.fp32_precision = before
        if found is None:
            os.environ.pop(name, None)


def use_onednn() -> None:
    """oneDNN computes the float32 matmuls of the rest of the process, where `onednn_is_exact`."""
    if onednn_is_exact():
        torch.backends.mkldnn.matmul.fp32_precision = ONEDNN


@contextmanager
def matmuls_by_onednn(device: str) -> Iterator[None]:
    """In the block, in all threads: float32 matmuls by oneDNN, on "cpu" where `onednn_is_exact`."""
    if device != "cpu" or not onednn_is_exact():
        yield
        return
    with _matmuls_by(ONEDNN):
        yield


@contextmanager
def matmuls_by_mkl() -> Iterator[None]:
    """In the block, in all threads: float32 matmuls by MKL."""
    # for its side effect: it limits oneDNN's kernels, which must happen before the first matmul
    onednn_is_exact()
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


def tune_backward(out: Tensor) -> None:
    """Make a backward pass through `out` fast on a CPU.

    Memory is kept as long as the graph of `out` exists. Float32 matmuls are oneDNN's from `out`
    until the end of the backward pass, where `onednn_is_exact`.
    """
    if not out.requires_grad or out.device.type != "cpu":
        return
    keeper, matmul = _Keeper(), torch.backends.mkldnn.matmul

    def begin(_: Tensor, keeper: _Keeper = keeper) -> None:
        if onednn_is_exact() and (before := matmul.fp32_precision) != ONEDNN:
            matmul.fp32_precision = ONEDNN
            end = partial(setattr, matmul, "fp32_precision", before)
            torch.autograd.Variable._execution_engine.queue_callback(end)

    out.register_hook(begin)
