"""Memory, matmuls and precision are what is fast here, and stay exact."""

import itertools
import math
import platform
import subprocess
import sys

import pytest
import torch

from dpo_lab import machine
from dpo_lab.layout import completion_batch
from dpo_lab.logprobs import ONEDNN, completion_logps
from dpo_lab.machine import PrecisionTest, measure_precision, use_onednn
from dpo_lab.models import load_model


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_used_again_without_the_kernel():
    script = """
import resource, torch
from dpo_lab.machine import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

counts = [page_faults() for _ in range(3)]
keep_freed_memory()
counts += [page_faults() for _ in range(8)]
print(counts[2], counts[-1])
"""
    before, after = map(int, subprocess.check_output([sys.executable, "-c", script], text=True).split())
    assert before > 10_000 and after < 100  # 64 MiB are 16,384 pages


def product_error():
    a, b = torch.randn(300, 700), torch.randn(700, 200)
    exact = a.double() @ b.double()
    return float((a.matmul(b) - exact).norm() / exact.norm())


def test_float32_matmuls_stay_exact_whoever_computes_them(matmul):
    use_onednn()
    assert product_error() < 1e-6


def test_onednn_is_not_taken_where_it_would_compute_in_bfloat16(monkeypatch, matmul):
    original = torch.Tensor.__matmul__

    def rounded(a, b):
        return original(a, b) if a.dtype == torch.float64 else original(a.bfloat16(), b.bfloat16()).float()

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    use_onednn()
    assert matmul.fp32_precision == "none"
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: original(a.double(), b.double()))
    use_onednn()
    assert matmul.fp32_precision == ONEDNN


def test_bfloat16_is_chosen_where_it_is_fast_and_its_error_is_told():
    fast, slow = PrecisionTest(2.4, 0.1, 0.004), PrecisionTest(0.7, 0.1, 0.004)
    assert (fast.choice, slow.choice) == ("bfloat16", "float32")
    assert "2.4 times" in str(fast) and "0.100 nats" in str(fast) and "0.0040" in str(fast)


def test_the_measured_errors_are_those_of_the_log_probs_and_of_the_loss(tiny, monkeypatch):
    """The clock is made up, float32 three times as slow; log-probs, loss and gradients are real."""
    model = load_model(str(tiny))
    batch = completion_batch([[1, 2, 3]], [[i + 4] * 9 for i in range(6)], [0] * 6)
    clock = itertools.accumulate(itertools.cycle([0.0, 3.0, 0.0, 1.0]))  # begin, end in float32, begin, end in bfloat16
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    test = measure_precision(model, batch, beta=0.5, repeats=2)
    wide = completion_logps(model, batch).detach()
    with torch.autocast("cpu", torch.bfloat16):
        error = completion_logps(model, batch).detach() - wide
    loss_error = torch.log1p(torch.exp(-0.5 * (error[:3] - error[3:]))) - math.log(2)
    assert test.speedup == pytest.approx(3)
    assert test.logps_error == pytest.approx(error.square().mean().sqrt().item(), rel=1e-6) and test.logps_error > 0
    assert test.loss_error == pytest.approx(loss_error.square().mean().sqrt().item(), rel=1e-4)
    assert all(p.grad is None for p in model.parameters())
