"""Memory and matmuls are fast here while a function computes, stay exact, are then as before."""

import gc
import platform
import subprocess
import sys

import pytest
import torch

from dpo_lab.batching import completion_batch
from dpo_lab.engine import cpu as tuning
from dpo_lab.engine.cpu import (
    ONEDNN,
    kept_memory,
    matmuls_by_mkl,
    matmuls_by_onednn,
    onednn_is_exact,
    use_onednn,
)
from dpo_lab.logprobs import completion_logps

GLIBC = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the setting is glibc's"
)


@pytest.fixture(autouse=True)
def measured_anew():
    """What a test makes of the processor is not what the next one finds."""
    onednn_is_exact.cache_clear()
    yield
    onednn_is_exact.cache_clear()


@GLIBC
def test_freed_memory_is_used_again_without_the_kernel_until_the_last_who_asked_is_done():
    script = """
import resource, torch
from dpo_lab.engine.cpu import keep_freed_memory, kept_memory

def page_faults(numbers):
    for _ in range(30):  # until free chunks have found their places
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(numbers)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

counts = [page_faults(2**24)]
with kept_memory():
    try:
        with kept_memory():
            counts.append(page_faults(2**24))
            1 / 0
    except ZeroDivisionError:
        counts.append(page_faults(2**24))
counts.append(page_faults(2**25))  # more than there was room for
keep_freed_memory()
with kept_memory():
    pass
counts.append(page_faults(2**25))
print(*counts)
"""
    counts = [*map(int, subprocess.check_output([sys.executable, "-c", script], text=True).split())]
    # 64 MiB are 16,384 pages
    assert [count > 10_000 for count in counts] == [True, False, False, True, False]
    assert [count < 100 for count in counts] == [False, True, True, False, True]


def test_float32_matmuls_stay_exact_whoever_computes_them(matmul):
    a, b = torch.randn(300, 700), torch.randn(700, 200)
    exact = a.double() @ b.double()
    for by in (matmuls_by_onednn("cpu"), matmuls_by_mkl()):
        with by:
            assert float((a.matmul(b) - exact).norm() / exact.norm()) < 1e-6


def test_onednn_is_not_taken_where_it_would_compute_in_bfloat16(monkeypatch, matmul):
    original = torch.Tensor.__matmul__

    def rounded(a, b):
        return (
            original(a, b)
            if a.dtype == torch.float64
            else original(a.bfloat16(), b.bfloat16()).float()
        )

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    use_onednn()
    assert not onednn_is_exact() and matmul.fp32_precision == "none"
    onednn_is_exact.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: original(a.double(), b.double()))
    use_onednn()
    assert onednn_is_exact() and matmul.fp32_precision == ONEDNN


def test_the_measurement_is_of_float32_whatever_is_in_force_around_it():
    alone = onednn_is_exact()
    onednn_is_exact.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn_is_exact() == alone


@pytest.mark.parametrize("before", ["none", "ieee", ONEDNN])
def test_matmuls_are_handed_back_after_an_error_too(monkeypatch, matmul, before):
    monkeypatch.setattr(tuning, "onednn_is_exact", lambda: True)
    matmul.fp32_precision = before
    for by, during in (
        (matmuls_by_onednn("cpu"), ONEDNN),
        (matmuls_by_onednn("cuda"), before),
        (matmuls_by_mkl(), "ieee"),
    ):
        with pytest.raises(ZeroDivisionError), by:
            assert matmul.fp32_precision == during
            raise ZeroDivisionError
        assert matmul.fp32_precision == before


@pytest.mark.parametrize("before", ["none", ONEDNN])
def test_log_probs_are_computed_by_onednn_and_the_setting_is_then_as_before(
    monkeypatch, matmul, model, before
):
    """Forward and, after it, in the backward pass that somebody else starts."""
    monkeypatch.setattr(tuning, "onednn_is_exact", lambda: True)
    matmul.fp32_precision, seen = before, []
    model.get_decoder().register_forward_hook(lambda *_: seen.append(matmul.fp32_precision))
    logps = completion_logps(model, completion_batch([[1, 2]], [[3, 4]], [0]))
    assert seen == [ONEDNN] and matmul.fp32_precision == before
    logps.sum().backward()
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("before", ["none", "ieee"])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_backward_pass_of_ones_own_is_by_onednn_and_the_setting_is_then_as_before(
    monkeypatch, matmul, model, before, calls
):
    monkeypatch.setattr(tuning, "onednn_is_exact", lambda: True)
    matmul.fp32_precision, seen = before, []
    weight = model.get_input_embeddings().weight
    handle = weight.register_hook(lambda _: seen.append(matmul.fp32_precision))
    batch = completion_batch([[0, 3]], [[5, 2]], [0])
    try:
        sum(completion_logps(model, batch).sum() for _ in range(calls)).backward()
    finally:
        handle.remove()
    assert seen and set(seen) == {ONEDNN} and matmul.fp32_precision == before


def test_memory_is_kept_in_nested_calls_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        tuning.ctypes,
        "CDLL",
        lambda _: type("C", (), {"mallopt": staticmethod(lambda *a: calls.append(a))}),
    )
    monkeypatch.setattr(tuning.sys, "platform", "linux")
    monkeypatch.setattr(tuning, "_keepers", 0)
    with kept_memory(), kept_memory():
        assert calls == list(tuning.KEEPING)
    assert calls == [*tuning.KEEPING, *tuning.USUAL]


def test_memory_is_kept_as_long_as_the_graph_of_log_probs_is_there(monkeypatch, model):
    calls, batch = [], completion_batch([[0, 3]], [[5, 2]], [0])
    completion_logps(model, batch)  # at the first call the model is compared with itself
    gc.collect()  # a failed test before this one may have left a graph in its traceback
    monkeypatch.setattr(
        tuning.ctypes,
        "CDLL",
        lambda _: type("C", (), {"mallopt": staticmethod(lambda *a: calls.append(a))}),
    )
    monkeypatch.setattr(tuning.sys, "platform", "linux")
    monkeypatch.setattr(tuning, "_keepers", 0)
    with torch.no_grad():
        completion_logps(model, batch)
    assert calls == []
    first = completion_logps(model, batch).sum()
    second = completion_logps(model, batch).sum()
    first.backward()
    del first
    gc.collect()
    assert calls == list(tuning.KEEPING)
    del second
    gc.collect()
    assert calls == [*tuning.KEEPING, *tuning.USUAL] and tuning._keepers == 0
