"""Two processes against one: the same losses, samples, log-probs and evaluation.

Runs may change their number of processes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import distributed
import numpy as np
import pytest
import torch

from dpo_lab.batching import completion_batch, split
from dpo_lab.cli import main
from dpo_lab.engine import runs
from dpo_lab.engine.runs import append_metrics, atomic_write, read_metrics, read_snapshots
from dpo_lab.logprobs import completion_logps
from dpo_lab.models import load_model
from dpo_lab.preferences import Preferences
from dpo_lab.sentiment import task

TOLERANCE = 1e-5
# it orthogonalizes in bfloat16, which turns a last bit of the gradient into the last bit of a
# bfloat16
MUON = 3e-3
KINDS = ("fsdp", "ddp")


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    """What one process found, with the stopped runs that two will resume."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "load_imdb", distributed.made_up_reviews)
        patch.setenv("DPO_LAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert distributed.train(str(tiny), folder / "run") == 0
    said = distributed.stopped(str(tiny), folder / "fsdp")
    assert "after step 3 of 6" in said
    shutil.copytree(folder / "fsdp", folder / "ddp")
    found = {
        name: getattr(distributed, name)(str(tiny)) for name in ("losses", "finished", "samples")
    }
    return {"folder": folder, **found}


@pytest.fixture(scope="module")
def two(one, tiny, tmp_path_factory):
    """What two processes found, begun by the launcher."""
    folder, tests = tmp_path_factory.mktemp("two"), Path(__file__).parent
    launch = (
        "-m accelerate.commands.launch --use_fsdp --num_processes 2 --num_machines 1 "
        "--mixed_precision no"
    )
    command = [
        sys.executable,
        *launch.split(),
        *"--dynamo_backend no --main_process_port 0".split(),
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {
        "DPO_LAB_CACHE": str(tmp_path_factory.getbasetemp() / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    arguments = [str(tests / "distributed.py"), str(tiny), str(folder), str(one["folder"])]
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return {
        "folder": folder,
        "said": done.stdout,
        **json.loads((folder / "found.json").read_text()),
    }


def assert_same(a, b, tolerance=TOLERANCE):
    """Metrics, line by line and name by name."""
    # how many weights a step changed depends on the last bit, and sharded ones are not looked at
    a, b = (
        [{name: value for name, value in line.items() if "weights/" not in name} for line in lines]
        for lines in (a, b)
    )
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for line, other in zip(a, b):
        assert line == pytest.approx(other, abs=tolerance)


def test_shares_are_dealt_in_turn_and_gathered_in_order(two):
    assert two["shares"] == [[0, 2, 4], [1, 3]] and two["whole"] == list("abcde") and two["sharded"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_is_that_of_one_process(one, two, kind):
    assert two[kind]["losses"].keys() == one["losses"].keys()
    for name, metrics in one["losses"].items():
        assert_same(two[kind]["losses"][name], metrics, MUON if "muon" in name else TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_resume_what_one_began(one, two, kind):
    assert_same(two[kind]["finished"]["metrics"], one["finished"]["metrics"])
    for a, b in zip(two[kind]["finished"]["weights"], one["finished"]["weights"]):
        assert a == pytest.approx(b, abs=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_resumes_what_two_began(tiny, one, two, kind):
    """And a signal to one of the two stopped both, after the same step."""
    assert "after step 3 of 6" in two[kind]["stopped"]
    run = two["folder"] / kind
    found = distributed.finished(str(tiny), run)
    assert_same(found["metrics"], one["finished"]["metrics"])
    for a, b in zip(found["weights"], one["finished"]["weights"]):
        assert a == pytest.approx(b, abs=TOLERANCE)


def test_samples_are_the_same_token_by_token(one, two):
    assert two["samples"] == one["samples"]
    data = [
        json.loads((found["folder"] / "run/data/samples.json").read_text()) for found in (one, two)
    ]
    assert data[0] == data[1] and sum(map(len, data[0]["completions"])) == 720  # more than a batch


def test_reference_log_probs_and_pairs_are_the_same(one, two):
    a, b = (Preferences.load(found["folder"] / "run/data/preferences") for found in (one, two))
    assert b.reference_logps == pytest.approx(a.reference_logps, abs=TOLERANCE)
    assert (
        (a.chosen == b.chosen).all()
        and (a.rejected == b.rejected).all()
        and a.reference_key == b.reference_key
    )


def test_the_experiment_ends_the_same_and_says_so_once(one, two):
    assert (
        two["status"] == 0
        and two["said"].count("before  reward") == two["said"].count("policy in") == 1
    )
    a, b = (found["folder"] / "run" for found in (one, two))
    assert_same(*(distributed.timeless(read_metrics(run)) for run in (b, a)))
    summaries = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    for when in ("before", "after"):
        assert summaries[1][when] == pytest.approx(summaries[0][when], abs=TOLERANCE)
    assert summaries[0]["after"]["kl"] != 0
    for mine, theirs in zip(read_snapshots(a), read_snapshots(b)):
        assert mine["texts"] == theirs["texts"] and mine["chosen"] == pytest.approx(
            theirs["chosen"], abs=10 * TOLERANCE
        )
    names = [{str(p.relative_to(run)) for p in run.rglob("*")} for run in (a, b)]
    assert names[0] == names[1]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("longer", [0, 20])
def test_a_split_batch_scores_each_completion_as_the_whole_does(tiny, share, longer):
    """Rows that share a prompt, rows that do not, and packed ones; more parts than rows."""
    rng = np.random.default_rng(0)
    prompts = [[0, *map(int, rng.integers(1, 512, 12))] for _ in range(4)]
    owners = [0, 1, 0, 2, 2, 1, 0]
    completions = [list(map(int, rng.integers(1, 512, 2 + longer * (i % 2)))) for i in range(7)]
    batch, model = (
        completion_batch(prompts, completions, owners, compact=share),
        load_model(str(tiny)).double(),
    )
    assert (batch.segments is not None) == (share and not longer) or longer
    with torch.no_grad():
        expected = completion_logps(model, batch).sort().values
        for n in (1, 2, 3, 9):
            parts = split(batch, n)
            found = torch.cat([completion_logps(model, part) for part in parts]).sort().values
            assert len(parts) <= n and torch.allclose(found, expected, atol=1e-9)
            assert sum(part.tokens for part in parts) == batch.tokens
    assert split(batch, 1) == [batch] and len(split(batch, 2)) == 2


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "is_main", lambda: False)
    append_metrics(tmp_path, {"step": 1})
    for directory in (True, False):
        with atomic_write(tmp_path / "result", directory=directory) as temporary:
            (temporary / "file" if directory else temporary).write_text("mine")
    assert not list(tmp_path.iterdir())


def test_the_frontier_is_launched_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["frontier", "--out", str(tmp_path / "out")]) == 2
    assert "launched 2 times" in capsys.readouterr().err and not (tmp_path / "out").exists()
