"""The GPU benchmark's stages in their smallest form, on the CPU and, where there is one, a GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_exactness as exactness  # noqa: E402

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
# nats of a completion, and of the gradient relative
BOUNDS = {"float32": (1e-4, 1e-5), "bfloat16": (0.3, 0.03)}


@every_device
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("how", exactness.LAYOUTS)
@pytest.mark.parametrize("shape", exactness.SHAPES)
def test_log_probs_and_gradients_are_those_of_a_loop_in_float64(shape, how, precision, device):
    found = exactness.errors(shape, how, precision, device)
    assert (
        0 < found["logps_nats"] < BOUNDS[precision][0]
        and 0 < found["gradient"] < BOUNDS[precision][1]
    )


@every_device
def test_sampled_tokens_are_distributed_as_the_softmax(device):
    assert min(exactness.sampling(device, 20_000).values()) > 1e-3


@every_device
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("longest", [40, 400])
def test_runs_end_with_the_same_bytes_also_when_resumed(longest, precision, device, tmp_path):
    if device == "cpu" and longest > 40:
        longest = 20  # the kernel that could differ with the length is a GPU's
    assert exactness.same_bytes(device, precision, longest, tmp_path) == {
        "twice": True,
        "resumed": True,
    }


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_a_step_without_enough_memory_has_the_same_gradient(device):
    found = exactness.out_of_memory(exactness.make_preferences(prompts=64, longest=400))
    assert found["accumulate"] > 1 and found["gradient"] < 1e-5


@pytest.fixture
def clock(monkeypatch):
    """That of run_stages: `jump` hours ahead once `seen` is true."""

    class Clock:
        sleep, seen, jump = time.sleep, staticmethod(lambda: False), 0

        def time(self):
            return time.time() + 3_600 * self.jump * self.seen()

    monkeypatch.setattr(gpu, "time", clock := Clock())
    return clock


def test_a_stage_that_fails_and_one_that_hangs_are_noted_and_the_others_run(tmp_path, clock):
    python, results = (
        [sys.executable, "-c"],
        "import json, sys; json.dump({'a': 1}, open(sys.argv[1], 'w'))",
    )
    commands = {
        "fails": [*python, f"{results}; raise SystemExit('planted')", "{results}"],
        "hangs": [*python, f"{results}; import time; time.sleep(10_000)", "{results}"],
        "works": [*python, results, "{results}"],
    }
    clock.seen, clock.jump = lambda: bool(gpu.read_json(tmp_path / "hangs.json")), 1
    found = gpu.run_stages(commands, tmp_path, time.time() + 3_600, every=0.05)
    stages = found["stages"]
    assert [stage["results"] for stage in stages.values()] == [{"a": 1}] * 3
    assert (
        stages["fails"]["status"] == "failed with status 1" and "planted" in stages["fails"]["log"]
    )
    assert stages["hangs"]["status"] == "out of time" and stages["works"]["status"] == "done"
    assert json.loads((tmp_path / "gpu.json").read_text()) == found


def test_what_a_hanging_stage_started_ends_with_it(tmp_path, clock):
    child = (
        "import time, sys; "
        "[(open(sys.argv[1], 'a').write('.'), time.sleep(0.02)) for i in range(10**6)]"
    )
    parent = (
        "import subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]]); time.sleep(10_000)"
    )
    beats = tmp_path / "beats"
    clock.seen, clock.jump = lambda: beats.exists() and beats.stat().st_size > 0, 2
    command = [sys.executable, "-c", parent, str(beats)]
    gpu.run_stages({"hangs": command}, tmp_path, time.time() + 3_600, every=0.05)
    last = beats.read_text()
    time.sleep(0.3)
    assert last and beats.read_text() == last


def test_a_run_that_is_killed_leaves_what_it_has_measured(tmp_path):
    stage = (
        "import json, sys, time; json.dump({'a': 1}, open(sys.argv[1], 'w')); time.sleep(60)"
    )
    commands = {
        "first": [sys.executable, "-c", stage, "{results}"],
        "second": [sys.executable, "-c", "0"],
    }
    script = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu, time, pathlib
gpu.run_stages({commands!r}, pathlib.Path({str(tmp_path)!r}), time.time() + 600, every=0.01)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    seen = set()
    while '"a": 1' not in seen:
        text = (tmp_path / "gpu.json").read_text() if (tmp_path / "gpu.json").exists() else "{}"
        json.loads(text)  # at any moment
        seen |= {line.strip() for line in text.splitlines()}
    process.terminate()
    process.wait()
    found = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert found["first"]["results"] == {"a": 1} and found["second"] == {"status": "not begun"}


def test_a_result_that_fails_is_noted_and_the_next_is_measured(tmp_path):
    report = gpu.Report(tmp_path / "stage.json")
    assert report.attempt("bad", lambda: 1 / 0) is None and report.attempt("good", lambda: 2) == 2
    found = json.loads((tmp_path / "stage.json").read_text())
    assert "ZeroDivisionError" in found["bad"]["error"] and found["good"] == 2


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "work").mkdir()
    return gpu.Settings(device="cpu", tiny=True, until=time.time() + 3_600, work=tmp_path / "work")


def finished(report):
    """The results, none of which may be an error."""
    found = json.loads(report.path.read_text())
    assert found and not [
        value for value in found.values() if isinstance(value, dict) and "error" in value
    ]
    return found


@pytest.mark.usefixtures("made_up_reviews")
def test_the_stage_of_the_protocol_in_its_smallest_form(settings, tmp_path, monkeypatch):
    import gpu_dpo

    from dpo_lab.sentiment import task

    parts = task.load_imdb("package")
    longer = DatasetDict(
        {name: part.select([i % len(part) for i in range(600)]) for name, part in parts.items()}
    )
    monkeypatch.setattr(gpu_dpo, "load_imdb", lambda: longer)
    report = gpu.Report(tmp_path / "dpo.json")
    gpu_dpo.run(settings, report)
    found = finished(report)
    assert (
        found["from scratch"]["steps"] == 6
        and found["from scratch"]["held_out"]["bits_per_byte"] > 0
    )
    for name in ("protocol", "protocol, embedded"):
        run = found[name]
        assert (
            run["before"]["kl"] == 0
            and run["steps"] == -(-run["pairs"] // 64)
            and run["curve"][-1]["step"] == run["steps"]
        )
        assert 0 < run["after"]["reward"] < 1 and run["peak_memory_mb"] > 0


def test_the_stage_of_speed_in_its_smallest_form(settings, tmp_path):
    import gpu_speed

    report = gpu.Report(tmp_path / "speed.json")
    gpu_speed.run(settings, report)
    found = finished(report)
    runs = [found[f"paper/small/{who}"] for who in gpu_speed.CONTENDERS]
    assert all(len(run["step_seconds"]) == 3 and run["passes"] == 1 for run in runs)
    # all compute in bfloat16
    assert max(run["loss"] for run in runs) - min(run["loss"] for run in runs) < 2e-3
    assert all(0 < run["fraction_of_matmul_rate"] < 1 for run in runs)


def test_the_command_runs_a_stage_in_its_smallest_form_and_writes_nowhere_else(tmp_path):
    out, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu.py"),
        "--device=cpu",
        "--tiny",
        "--minutes=30",
        f"--out={out}",
    ]
    subprocess.run(
        [*command, "--stages", "exactness"],
        check=True,
        cwd=home,
        env={**gpu.os.environ, "HOME": str(home)},
    )
    found = json.loads((out / "gpu.json").read_text())
    stage = found["stages"]["exactness"]
    assert (
        stage["status"] == "done"
        and found["provenance"]["commit"]
        and stage["results"]["errors/gpt2/float32/packed"]
    )
    assert {path.name for path in out.iterdir()} == {"gpu.json", "exactness.log"} and list(
        home.iterdir()
    ) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so_and_measures_nothing(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), f"--out={tmp_path / 'out'}"]
    output = subprocess.check_output(command, text=True)
    assert "no GPU" in output and not (tmp_path / "out" / "gpu.json").exists()
