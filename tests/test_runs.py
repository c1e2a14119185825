"""Run directories: whole or absent, and never mixed up."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from dpo_lab.engine import runs
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.records import training_run
from dpo_lab.engine.runs import (
    Stopwatch,
    append_metrics,
    atomic_write,
    check_run,
    differences,
    open_run,
    peak_memory_mb,
    provenance,
    quiet_bars,
    read_config,
    read_metrics,
    require_space,
    write_json,
)
from dpo_lab.models import load_model, load_tokenizer, save_policy
from dpo_lab.preferences import Preferences, from_rows
from dpo_lab.sentiment.reviews import load_imdb


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("tw")
        raise RuntimeError
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_directory_is_replaced_in_one_piece(tmp_path):
    path = tmp_path / "directory"
    for content in ("one", "two"):
        with atomic_write(path, directory=True) as temporary:
            (temporary / content).write_text(content)
    assert [p.name for p in path.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["directory"]


@pytest.mark.parametrize("target", [".", "..", "{}"])
def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch, target):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(
        ValueError, match="is the working directory or holds it; give a folder of its own"
    ):
        with atomic_write(target.format(here), directory=True):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["here"] and not list(here.iterdir())


def test_preferences_do_not_take_the_place_of_other_files(tmp_path, monkeypatch):
    ends = {"prompt_of": np.array([0, 0]), "chosen": np.array([0]), "rejected": np.array([1])}
    preferences = Preferences([[1]], [[2], [3]], **ends)
    (tmp_path / "thesis.tex").write_text("precious")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for target in (".", tmp_path):
        with pytest.raises(
            ValueError, match="holds other files; give a folder of its own, such as '.*preferences'"
        ):
            preferences.save(target)
    with pytest.raises(ValueError, match="is a file"):
        preferences.save("thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    for target in ("~/p", "made", "made"):
        preferences.save(target)
        assert Preferences.load(target).completions == [[2], [3]]


def test_settings_that_differ_are_named_one_by_one(tmp_path):
    found, asked = (
        {"a": {"b": 1, "c": [1, 2]}, "d": "x"},
        {"a": {"b": 2, "c": [1, 2]}, "d": "x", "e": None, "f": 3},
    )
    assert differences(found, asked) == ["a.b: 1 there, 2 asked", "f: None there, 3 asked"]


def test_a_setting_that_an_earlier_version_lacked_has_the_value_of_what_it_did():
    old = {"dpo": {"lora_rank": 8}}
    assert differences(old, {"dpo": {"lora_rank": 8, "lora_layers": 0}}) == []
    found = differences(old, {"dpo": {"lora_rank": 8, "lora_layers": 2}})
    assert found == ["dpo.lora_layers: 0 there, 2 asked"]


def test_a_folder_that_was_moved_is_the_same_place(tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path)
    new, old = str(tmp_path / "new"), str(tmp_path / "old")
    assert differences({"model": "new"}, {"model": new}) == []  # as an earlier version recorded it
    assert differences({"model": old}, {"model": new}) and differences(
        {"model": "openai/gpt2"}, {"model": new}
    )
    (tmp_path / "old").rmdir()
    assert (
        differences({"model": old}, {"model": new})
        == []
        != differences({"model": new}, {"model": old})
    )


def test_a_directory_survives_a_failed_replacement(tmp_path, monkeypatch):
    path = tmp_path / "directory"
    with atomic_write(path, directory=True) as temporary:
        (temporary / "one").write_text("one")

    def fails(source, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.replace", fails)
    with (
        pytest.raises(OSError, match="Input/output"),
        atomic_write(path, directory=True) as temporary,
    ):
        (temporary / "two").write_text("two")
    assert [p.name for p in path.iterdir()] == ["one"]


def test_no_space_says_so_and_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with (
        pytest.raises(OSError, match="no space left to write .*a.json"),
        atomic_write(tmp_path / "a.json") as temporary,
    ):
        temporary.write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_too_little_space_is_refused_beforehand(tmp_path):
    with pytest.raises(
        OSError, match="needs .* MB and its disk has .* MB free.*--out.*Nothing was written"
    ) as caught:
        require_space(tmp_path / "not" / "there", 10**18)
    assert caught.value.errno == errno.ENOSPC and not (tmp_path / "not").exists()
    require_space(tmp_path, 1)


def test_a_run_directory_keeps_to_one_config(tmp_path):
    run = open_run(tmp_path / "run", {"beta": 0.1, "nested": {"a": (1, 2)}}, resume=False)
    with pytest.raises(ValueError, match="already holds a run with this config.*--resume"):
        open_run(run, {"beta": 0.1, "nested": {"a": (1, 2)}}, resume=False)
    open_run(run, {"beta": 0.1, "nested": {"a": (1, 2)}}, resume=True)
    with pytest.raises(ValueError, match="another config .*beta: 0.1 there, 0.2 asked"):
        open_run(run, {"beta": 0.2, "nested": {"a": (1, 2)}}, resume=True)
    assert json.loads((run / "config.json").read_text())["beta"] == 0.1


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not empty and has no config.json"):
        open_run(tmp_path, {}, resume=False)
    (tmp_path / "config.json").write_text("{ broken")
    with pytest.raises(ValueError, match="is not JSON"):
        open_run(tmp_path, {}, resume=True)


OLD = {
    "task": {"prefixes": 200, "seed": 0},
    "dpo": {"beta": 0.33, "kind": "sigmoid", "loop": {"learning_rate": 3e-4, "accumulate": 2}},
}
TODAY = {
    "task": {"prefixes": 200, "seed": 0},
    "dpo": {
        "beta": 0.33,
        "loss_type": "sigmoid",
        "loop": {"learning_rate": 3e-4, "gradient_accumulation_steps": 2},
    },
}


def test_a_run_directory_of_an_earlier_version_is_read_in_today_s_names(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD))
    (tmp_path / "training.json").write_text(json.dumps({"method": "DPO", "config": OLD["dpo"]}))
    lines = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6, "accumulate": 4}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    assert read_config(tmp_path) == TODAY
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.7},
        {"step": 2, "loss": 0.6, "gradient_accumulation_steps": 4},
    ]

    # it is the same run, its config and its record; another loss is another run
    open_run(tmp_path, TODAY, resume=True)
    asked = {"method": "DPO", "config": TODAY["dpo"]}
    with training_run(tmp_path, lambda: asked, resume=True):
        pass
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="dpo.loss_type: 'sigmoid' there, 'ipo' asked"):
        open_run(tmp_path, {**TODAY, "dpo": {**TODAY["dpo"], "loss_type": "ipo"}}, resume=True)
    with pytest.raises(ValueError, match="method: 'DPO' there, 'SFT' asked"):
        with training_run(tmp_path, lambda: {**asked, "method": "SFT"}, resume=True):
            pass


def test_a_stopwatch_adds_up_the_stages_also_of_a_cell_that_fails(monkeypatch):
    clock = iter([0.0, 2.0, 2.0, 5.0, 5.0, 6.0])
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(clock))
    timed = Stopwatch()
    for stage in ("SFT", "DPO"):
        with timed(stage):
            pass
    with pytest.raises(ZeroDivisionError), timed("SFT"):
        raise ZeroDivisionError
    assert timed.seconds == {"SFT": 3.0, "DPO": 3.0}
    assert "| SFT | 3 |" in timed.table() and "| **all** | 6 |" in timed.table()


def test_bars_of_libraries_are_off_in_the_block_and_then_as_before(capfd):
    def bars():
        for _ in transformers.utils.logging.tqdm(range(2), desc="weights"):
            pass
        for _ in datasets.utils.tqdm(range(2), desc="rows"):
            pass
        return capfd.readouterr().err

    shown = bars()
    assert "weights" in shown and "rows" in shown
    with pytest.raises(ZeroDivisionError), quiet_bars():
        with quiet_bars():
            pass
        assert bars() == ""
        raise ZeroDivisionError
    assert "weights" in bars() and not datasets.are_progress_bars_disabled()


def test_metrics_survive_a_line_cut_short(tmp_path):
    for step in (1, 2, 3):
        append_metrics(tmp_path, {"step": step})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert [line["step"] for line in read_metrics(tmp_path, up_to=2)] == [1, 2]


@pytest.mark.parametrize(
    "script, program",
    [("bin/dpo-lab", "dpo-lab"), ("dpo_lab/cli.py", "dpo-lab"), ("x/sweep.py", "python sweep.py")],
)
def test_provenance_names_commit_command_machine_and_versions(monkeypatch, script, program):
    monkeypatch.setattr("sys.argv", [f"/somewhere/{script}", "train", "--seed", "1"])
    found = provenance()
    assert found["command"] == f"{program} train --seed 1"
    assert "torch 2" in found["versions"] and "threads" in found["machine"] and found["commit"]


def test_a_checkout_is_dirty_where_its_code_changed_and_not_its_results(monkeypatch, tmp_path):
    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    code, result = (
        tmp_path / "dpo_lab" / "engine" / "runs.py",
        tmp_path / "benchmarks" / "results" / "cpu.json",
    )
    monkeypatch.setattr(runs, "__file__", str(code))
    for file in (code, result):
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    assert provenance()["commit"] == "not a git checkout"
    git("init", "-q")
    assert provenance()["commit"] == "not a git checkout"  # nothing is committed yet
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "first")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert provenance()["commit"] == commit
    result.write_text("2\n")
    assert provenance()["commit"] == commit
    code.write_text("2\n")
    assert provenance()["commit"] == f"{commit}-dirty"


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_mb()
    held = bytearray(b"x" * 10**7) * 30
    assert peak_memory_mb() >= before and peak_memory_mb() > 100 and len(held) == 3 * 10**8
    assert runs.peak_memory_mb() < 10**6


def small_model():
    set_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    ).double()


def test_the_hash_of_the_weights_follows_every_weight_and_nothing_else():
    model = small_model()
    before = weights_hash(model)
    assert len(before) == 16 and int(before, 16) >= 0
    assert weights_hash(model.train()) == before == weights_hash(small_model())
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-9
        assert weights_hash(model) != before
        before = weights_hash(model)


def test_the_hash_tells_weights_of_other_names_apart():
    weight = torch.ones(3)
    assert weights_hash(nn.ParameterDict({"a": weight})) != weights_hash(
        nn.ParameterDict({"b": weight})
    )


def test_the_hash_takes_models_with_a_single_number_as_a_weight():
    model = nn.Linear(1, 1)
    model.register_buffer("scale", torch.tensor(1.0))
    before = weights_hash(model)
    model.scale += 1
    assert weights_hash(model) != before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory")
def test_peak_memory_leaves_out_that_of_the_process_that_started_this_one():
    held = b"1" * 1_500_000_000
    code = "from dpo_lab.engine.runs import peak_memory_mb; print(peak_memory_mb())"
    peak = float(subprocess.check_output([sys.executable, "-c", code]))
    assert 20 < peak < 1_200 < peak_memory_mb() and len(held)


def test_a_lock_that_a_killed_process_left_does_not_make_a_directory_another_run_s(tmp_path):
    (tmp_path / "run.lock").touch()
    check_run(tmp_path, {"a": 1}, resume=False)
    assert open_run(tmp_path, {"a": 1}, resume=False) == tmp_path
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        open_run(tmp_path / "other", {"a": 1}, resume=False)


def test_what_libraries_load_and_save_for_us_draws_no_bars(tiny, tmp_path, capfd):
    """Neither a model's weights nor a data set; our own bars are drawn where asked for."""
    rows = [{"prompt": "a", "chosen": " good", "rejected": " bad"}]
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    from_rows(rows, tokenizer, context=64).save(tmp_path / "preferences")
    save_policy(model, tokenizer, tmp_path / "policy")
    load_imdb()
    assert capfd.readouterr() == ("", "")
