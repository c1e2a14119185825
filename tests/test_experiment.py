"""The `dpo-lab` command as its user meets it.

The whole experiment, each step alone, and every way to ask wrongly.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lab.cli import frontier_config, main, named_config, without_minutes
from dpo_lab.engine.runs import current_config, file_hash, read_metrics, read_snapshots
from dpo_lab.models import load_model
from dpo_lab.preferences import Preferences
from dpo_lab.sentiment import run as experiment
from dpo_lab.sentiment import task
from dpo_lab.sentiment.precision import PrecisionTest
from dpo_lab.sentiment.reward import HUB_CLASSIFIER
from dpo_lab.sentiment.sweep import FrontierConfig
from dpo_lab.sentiment.task import Task, TaskConfig, data_config, task_config

pytestmark = pytest.mark.usefixtures("made_up_reviews")
# the precision is given, for what is faster here depends on what else the machine does
SMALL = (
    "--precision float32 --prefixes 12 --eval-prefixes 16 --max-new-tokens 8 --batch-pairs 20 "
    "--eval-every 2 --save-every 2"
).split()


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


def test_train_writes_everything_the_readme_promises(tiny, finished, capsys):
    assert main(["train", "--model", str(tiny), "--out", str(finished), *SMALL]) == 0
    out = capsys.readouterr().out
    assert (
        "before  reward 0." in out and "after   reward" in out and str(finished / "policy") in out
    )
    assert "\ndiagnosis: " in out and f"dpo-lab diagnose {finished} says more" in out
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["before"]["kl"] == summary["before"]["kl_se"] == 0
    for when in ("before", "after"):
        assert (
            set(summary[when]) == {"reward", "reward_se", "kl", "kl_se"}
            and 0 < summary[when]["reward"] < 1
        )
    assert (
        summary["seconds"] > 0
        and summary["peak_memory_mb"] > 100
        and summary["seed"] == 0
        and summary["commit"]
    )
    assert json.loads((finished / "config.json").read_text())["dpo"]["batch_pairs"] == 20
    metrics = read_metrics(finished)
    assert metrics[0]["step"] == 0 and metrics[0]["eval/kl/sequence"] == 0
    evaluated = [line["eval/completions"] for line in metrics if "eval/length" in line]
    assert len(set(evaluated)) == 1 and json.loads((finished / "facts.json").read_text())["data"]
    assert sum("loss" in line for line in metrics) == summary["steps"]
    for name in ("loss", "rewards", "margins", "reward_kl"):
        assert (finished / "figures" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (finished / "samples.md").read_text().count("\n") >= 18
    snapshots = read_snapshots(finished)
    assert [s["step"] for s in snapshots] == [
        line["step"] for line in metrics if "eval/reward" in line
    ]
    assert (
        np.abs(snapshots[0]["chosen"]).max()
        < 1e-4
        < np.subtract(snapshots[-1]["chosen"], snapshots[-1]["rejected"]).mean()
    )
    assert len(snapshots[0]["texts"]) == len(snapshots[0]["rewards"]) == 8
    assert not [p for p in finished.rglob(".*")]


def test_the_checkpoint_loads_with_transformers_alone(tiny, finished):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(finished / "policy"),
        AutoTokenizer.from_pretrained(finished / "policy"),
    )
    reference = AutoModelForCausalLM.from_pretrained(tiny)
    moved = sum(
        float((a - b).detach().abs().sum())
        for a, b in zip(model.parameters(), reference.parameters())
    )
    assert moved > 0 and tokenizer("this")["input_ids"][0] == tokenizer.bos_token_id


def test_a_finished_run_is_not_repeated_and_not_mixed(tiny, finished, capsys):
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    assert main(["train", "--model", str(tiny), "--out", str(finished), *SMALL]) == 0
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before
    assert (
        main(["train", "--model", str(tiny), "--out", str(finished), "--beta", "0.7", *SMALL]) == 2
    )
    assert "another config" in capsys.readouterr().err


def test_evaluate_repeats_the_summary_s_evaluation(finished, capsys):
    assert main(["evaluate", "--run", str(finished)]) == 0
    again = json.loads((finished / "evaluation.json").read_text())
    summary = json.loads((finished / "summary.json").read_text())["after"]
    assert {k: again[k] for k in summary} == pytest.approx(summary, abs=1e-5)
    assert "evaluation.json" in capsys.readouterr().out
    assert main(["evaluate", "--run", str(finished), "--eval-prefixes", "8"]) == 0
    assert json.loads((finished / "evaluation.json").read_text())["prefixes"] == 8
    assert main(["evaluate", "--run", str(finished.parent)]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_steps_run_alone_are_cached_and_give_the_same_run(
    tiny, finished, tmp_path, monkeypatch, capsys
):
    data, small = tmp_path / "data", SMALL[:8]
    assert main(["sample", "--model", str(tiny), "--data", str(data), *small]) == 0
    assert main(["label", "--model", str(tiny), "--data", str(data), *small]) == 0
    out = capsys.readouterr().out
    assert (
        "48 completions of 12 prefixes" in out
        and f"preferences in {data / 'preferences'}" in out
        and "ties" in out
    )
    sampled = []
    monkeypatch.setattr(task, "sample_with_logps", lambda *a, **k: sampled.append(a))
    run = tmp_path / "run"
    assert (
        main(["train", "--model", str(tiny), "--out", str(run), "--data", str(data), *SMALL]) == 0
    )
    assert not sampled
    for name in ("policy/model.safetensors", "samples.md", "snapshots.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    assert main(["label", "--model", str(tiny), "--data", str(data), *small, "--seed", "5"]) == 2
    assert "another config" in capsys.readouterr().err


def test_adapters_end_in_a_policy_that_loads_without_peft(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    arguments = [
        "train",
        "--model",
        str(tiny),
        "--out",
        str(run),
        "--lora-rank",
        "2",
        "--gradient-checkpointing",
        *SMALL,
    ]
    assert main([*arguments, "--learning-rate", "1e-2"]) == 0
    assert {p.name for p in (run / "policy").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert not list((run / "policy").glob("adapter*"))
    monkeypatch.setitem(sys.modules, "peft", None)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (run / "policy", tiny)
    )
    moved = {
        name
        for name, p in policy.named_parameters()
        if not torch.equal(p, reference.get_parameter(name))
    }
    assert moved == {name for name, p in policy.named_parameters() if p.ndim == 2 and ".h." in name}
    summary = json.loads((run / "summary.json").read_text())
    last = [line for line in read_metrics(run) if "eval/kl/sequence" in line][-1]
    assert summary["before"]["kl"] == 0 != summary["after"]["kl"] and last["eval/kl/sequence"] != 0


def test_labels_are_the_reward_s_order(tiny, finished):
    preferences = Preferences.load(finished / "data" / "preferences")
    assert (preferences.scores[preferences.chosen] > preferences.scores[preferences.rejected]).all()
    samples = json.loads((finished / "data" / "samples.json").read_text())
    assert len(samples["prompts"]) == 12 and all(len(row) == 4 for row in samples["completions"])
    possible = 6 * 12
    report = preferences.report
    assert report.pairs + report.ties + report.identical == possible == 72


def test_sft_makes_the_reference_that_everything_else_starts_from(tiny, tmp_path):
    out, options = tmp_path / "run", [*SMALL, "--sft-epochs", "1", "--sft-learning-rate", "1e-3"]
    assert main(["train", "--model", str(tiny), "--out", str(out), *options]) == 0
    tuned = out / "data" / "sft" / "model"
    losses = [line["loss"] for line in read_metrics(out / "data" / "sft")]
    assert losses[-1] < losses[0]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["reference"] == "data/sft/model" and summary["before"]["kl"] == 0
    preferences, reference = Preferences.load(out / "data" / "preferences"), load_model(str(tuned))
    assert (
        preferences.with_reference(reference, precision=preferences.reference_precision)
        is preferences
    )
    assert main(["evaluate", "--run", str(out)]) == 0
    again = json.loads((out / "evaluation.json").read_text())
    assert again["kl"] == pytest.approx(summary["after"]["kl"], abs=1e-6)
    # as it is recorded, and as earlier versions did
    for recorded in (summary["reference"], str(tuned)):
        moved = tmp_path / "elsewhere é" / recorded.replace("/", "-")
        moved.parent.mkdir(exist_ok=True)
        out.rename(moved)
        (moved / "summary.json").write_text(json.dumps(summary | {"reference": recorded}))
        (moved / "evaluation.json").unlink()
        assert main(["evaluate", "--run", str(moved)]) == 0
        found = json.loads((moved / "evaluation.json").read_text())
        assert {k: found[k] for k in summary["after"]} == {k: again[k] for k in summary["after"]}
        moved.rename(out)


def test_a_run_names_the_folder_of_its_model_wherever_it_is_called_from(
    tiny, finished, tmp_path, monkeypatch, capsys
):
    """And goes on after the folder was moved, but not with other weights in its place."""
    home, precision = (
        tmp_path / "one",
        json.loads((finished / "config.json").read_text())["task"]["precision"],
    )
    options = [*SMALL[2:], "--precision", precision]
    shutil.copytree(tiny, home / "m")
    monkeypatch.chdir(home)
    assert main(["train", "--model", "m", "--out", "run", *options]) == 0
    assert json.loads((home / "run" / "config.json").read_text())["task"]["model"] == str(
        home / "m"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--run", "one/run"]) == 0
    assert main(["train", "--model", "one/m", "--out", "one/run", *options]) == 0

    home.rename(tmp_path / "two")
    (tmp_path / "two" / "run" / "summary.json").unlink()
    resume = ["train", "--model", "two/m", "--out", "two/run", *options, "--resume"]
    assert main(resume) == 0
    weights = [run / "policy" / "model.safetensors" for run in (finished, tmp_path / "two" / "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert main(["evaluate", "--run", "two/run"]) == 0

    model = load_model("two/m")
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] += 1
    model.save_pretrained("two/m")
    assert main(["evaluate", "--run", "two/run"]) == 2
    assert "has other weights now" in capsys.readouterr().err
    (tmp_path / "two" / "run" / "summary.json").unlink()
    assert main(resume) == 2
    assert "was made with other weights than those of" in capsys.readouterr().err
    shutil.copytree(tmp_path / "two" / "m", tmp_path / "three")
    assert main([*resume[:2], "three", *resume[3:]]) == 2
    assert (
        f"task.model: '{home / 'm'}' there" not in (error := capsys.readouterr().err)
        and "was made with other weights" in error
    )


def test_an_earlier_record_of_a_model_by_its_relative_path_is_still_read(
    tiny, finished, tmp_path, monkeypatch
):
    shutil.copytree(tiny, tmp_path / "m")
    shutil.copytree(finished, tmp_path / "run")
    for name in ("run/config.json", "run/data/config.json"):
        text = (tmp_path / name).read_text()
        assert str(tiny) in text
        (tmp_path / name).write_text(text.replace(str(tiny), "m"))
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model", "m", "--out", "run", *SMALL, "--resume"]) == 0
    assert (tmp_path / "run/policy/model.safetensors").read_bytes() == (
        finished / "policy/model.safetensors"
    ).read_bytes()


def test_a_second_process_in_a_run_directory_says_who_is_there_and_writes_nothing(
    tiny, tmp_path, monkeypatch, capsys
):
    """Here the second comes from the evaluation of the first, whose directory it finds taken."""
    run, evaluation, statuses = tmp_path / "run", Task.evaluate, []
    command = ["train", "--model", str(tiny), "--out", str(run), *SMALL]

    def evaluates(*arguments, **options):
        if not statuses:
            statuses.append(None)
            before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
            statuses[0] = main([*command, "--resume"])
            assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        return evaluation(*arguments, **options)

    monkeypatch.setattr(Task, "evaluate", evaluates)
    assert main(command) == 0 and statuses == [2]
    assert f"in use by process {os.getpid()} " in capsys.readouterr().err
    assert not list(run.glob("*.lock"))


def test_the_paper_s_config_is_the_paper_s():
    config = experiment.CONFIGS["paper"]
    task, dpo, loop = config.task, config.dpo, config.dpo.loop
    assert (task.sft_epochs, task.prefixes, task.completions, task.imdb, task.device) == (
        1,
        25_000,
        4,
        "hub",
        "cuda",
    )
    assert (dpo.beta, dpo.batch_pairs, dpo.loss_type) == (0.1, 64, "sigmoid")
    assert (loop.optimizer, loop.learning_rate, loop.warmup_steps, loop.eval_every) == (
        "rmsprop",
        1e-6,
        150,
        100,
    )
    assert named_config(["train", "--config", "paper", "--seed", "3"]) == (
        "paper",
        ["train", "--seed", "3"],
    )


def test_another_seed_gives_another_run(tiny, finished, tmp_path):
    assert (
        main(["train", "--model", str(tiny), "--out", str(tmp_path / "run"), "--seed", "1", *SMALL])
        == 0
    )
    summaries = [
        json.loads((run / "summary.json").read_text()) for run in (finished, tmp_path / "run")
    ]
    assert summaries[0]["after"] != summaries[1]["after"] and summaries[1]["seed"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nobody/no-such-model"], "not in the Hugging Face cache.*'embedded'"),
        (["--beta", "0"], "beta is 0"),
        (["--beta", "nan"], "beta is nan"),
        (["--label-smoothing", "0.5"], "label_smoothing is 0.5"),
        (["--loss-type", "ipo", "--label-smoothing", "0.1"], "label_smoothing.*ipo"),
        (["--learning-rate", "-1"], "learning_rate is -1"),
        (["--batch-pairs", "0"], "batch_pairs is 0"),
        (["--epochs", "0"], "epochs is 0"),
        (["--lora-rank", "-2"], "lora_rank is -2"),
        (["--completions", "1"], "completions"),
        (["--eval-prefixes", "2501"], "eval_prefixes is 2501, and there are 60"),
        (["--max-new-tokens", "64"], "context"),
        (["--imdb", "hub"], "stanfordnlp/imdb|hub"),
        (["--sft-epochs", "-1"], "sft_epochs is -1"),
        (["--lane", "gpu"], "--lane is now --config: give --config gpu"),
        (["--lane=laptop"], "--config laptop"),
        (["--config", "papers"], "--config is 'papers'; it must be one of laptop, gpu, paper"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    tiny, tmp_path, capsys, monkeypatch, arguments, message
):
    if "hub" in arguments:
        monkeypatch.undo()
        monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    base = ["train", "--out", str(out), *SMALL]
    base += [] if "--model" in arguments else ["--model", str(tiny)]
    for name in arguments[::2]:
        if name in base:
            del base[base.index(name) : base.index(name) + 2]
    assert main([*base, *arguments]) == 2
    error = capsys.readouterr().err
    import re

    assert re.search(message, error), error
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_config_without_a_gpu_says_so(tmp_path, capsys):
    assert main(["train", "--config", "gpu", "--out", str(tmp_path / "run")]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_no_disk_space_is_said_before_anything_is_written(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10, 10)
    )
    assert main(["train", "--model", str(tiny), "--out", str(tmp_path / "run"), *SMALL]) == 2
    assert "MB free" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_an_unfinished_run_wants_resume(tiny, tmp_path, capsys, finished):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("summary.json", "policy", "figures", "samples.md"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    command = ["train", "--model", str(tiny), "--out", str(run), *SMALL]
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    newest = sorted((run / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    assert main([*command, "--resume"]) == 0
    for name in ("policy/model.safetensors", "samples.md"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()


def test_other_data_in_the_data_directory_is_refused(tiny, tmp_path, capsys, finished):
    data = tmp_path / "data"
    shutil.copytree(finished / "data", data)
    recorded = json.loads((data / "config.json").read_text())
    (data / "config.json").write_text(json.dumps({**recorded, "max_new_tokens": 9}))
    assert (
        main(
            [
                "train",
                "--model",
                str(tiny),
                "--out",
                str(tmp_path / "run"),
                "--data",
                str(data),
                *SMALL,
            ]
        )
        == 2
    )
    assert "max_new_tokens: 9 there, 8 asked" in capsys.readouterr().err


def test_samples_serve_evaluations_of_any_size():
    assert data_config(TaskConfig(eval_prefixes=64)) == data_config(TaskConfig())
    assert data_config(TaskConfig(seed=1)) != data_config(TaskConfig())


def test_help_lists_every_command_and_explains_beta(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(
        name in out for name in ("doctor", "train", "sample", "label", "evaluate", "pretrain")
    )
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "strength of the KL" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny", pytest.param("embedded", marks=pytest.mark.long)])
def test_control_c_on_the_command_resumes_to_the_same_bytes(name, tiny, tmp_path, monkeypatch):
    """A model on real reviews: a process stopped by SIGINT, resumed here, beside a whole run."""
    monkeypatch.undo()  # what the process reads is not made up

    # in one precision: which of two is faster depends on what else the machine does
    arguments = (
        "--prefixes 40 --eval-prefixes 16 --max-new-tokens 12 --eval-every 4 --save-every 3 "
        "--epochs 2 --precision float32"
    ).split()
    arguments += ["--model", str(tiny) if name == "tiny" else name]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert main(["train", "--out", str(tmp_path / "whole"), *arguments]) == 0
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_lab.cli", "train", "--out", str(stopped), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(read_metrics(stopped)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "--resume" in error, error
    assert main(["train", "--out", str(stopped), *arguments, "--resume"]) == 0
    for name in (
        "policy/model.safetensors",
        "policy/config.json",
        "samples.md",
        "snapshots.jsonl",
        "config.json",
    ):
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    results = [
        json.loads((run / "summary.json").read_text()) for run in (tmp_path / "whole", stopped)
    ]
    assert results[0]["after"] == results[1]["after"] and np.isfinite(results[0]["after"]["kl"])


def test_the_precision_is_measured_once_and_kept(tiny, tmp_path, monkeypatch, capsys):
    """What a directory was begun in decides, so that a resumed run goes on in it."""
    speeds, measured = iter([1.0, 2.0, 0.4]), []

    def measure(model, batch, beta, repeats):
        measured.append(batch.n)
        return PrecisionTest(next(speeds), 0.1, 0.01)

    monkeypatch.setattr(task, "measure_precision", measure)
    data, out = tmp_path / "data", tmp_path / "run"
    assert main(["sample", "--model", str(tiny), "--data", str(data), *SMALL[2:8]]) == 0
    assert "precision bfloat16" in capsys.readouterr().out
    assert (
        main(["train", "--model", str(tiny), "--data", str(data), "--out", str(out), *SMALL[2:]])
        == 0
    )
    assert json.loads((out / "config.json").read_text())["task"]["precision"] == "bfloat16"
    assert Preferences.load(data / "preferences").reference_precision == "bfloat16"
    assert (
        main(["train", "--model", str(tiny), "--data", str(data), "--out", str(out), *SMALL[2:]])
        == 0
    )
    assert main(["train", "--model", str(tiny), "--out", str(tmp_path / "slow"), *SMALL[2:]]) == 0
    assert (
        Preferences.load(tmp_path / "slow" / "data" / "preferences").reference_precision
        == "float32"
    )
    assert measured == [2, 64, 2], (
        "the whole batch is measured only where a few rows are not slow already"
    )
    wrong = [
        "train",
        "--model",
        str(tiny),
        "--precision=float32",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "b"),
        *SMALL[2:],
    ]
    assert (
        main(wrong) == 2
        and "precision: 'bfloat16' there, 'float32' asked" in capsys.readouterr().err
    )
    assert not (tmp_path / "b").exists()


def test_state_is_settled_once(tiny, tmp_path, monkeypatch):
    """Everything is set up once in a run that needs it all.

    Processes joined, records read, precision measured, everything loaded, SFT done.
    """
    counts = Counter()

    def spy(owner, name):
        original = getattr(owner, name)

        def counted(*arguments, **options):
            counts[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    for name in ("setup", "recorded_settings", "load_imdb", "load_tokenizer", "train_sft"):
        spy(task, name)
    spy(Task, "_measured_precision")
    spy(task.SentimentReward, "tfidf")
    arguments = [*SMALL[2:], "--sft-epochs", "1", "--model", str(tiny)]
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 0
    assert len(counts) == 7 and set(counts.values()) == {1}, counts


OLD = {
    "loss_type": "kind",
    "gradient_accumulation_steps": "accumulate",
    "retokenized": "retokenised",
}


def in_old_names(config):
    """A config as earlier versions recorded it."""
    if not isinstance(config, dict):
        return config
    found = {OLD.get(name, name): in_old_names(value) for name, value in config.items()}
    if "device" in found:
        found["lane"] = {"cpu": "laptop", "cuda": "gpu"}[found.pop("device")]
        found["reward"] = None
    return found


def test_a_run_of_an_earlier_version_is_evaluated_and_resumed(tiny, finished, tmp_path):
    """Its configs have `lane`, no reward of their own, `kind` and `accumulate`."""
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    kept = ("training.json", "data/preferences/preferences.json")
    for name in ("config.json", "data/config.json", *kept):
        record = in_old_names(json.loads((old / name).read_text()))
        assert name in kept or '"lane": "laptop"' in json.dumps(record)
        (old / name).write_text(json.dumps(record))
    records = [(old / name).read_bytes() for name in ("config.json", "data/config.json")]

    # checkpoints name their record
    for state in old.glob("checkpoints/*/state.json"):
        named = json.loads(state.read_text()) | {"training": file_hash(old / "training.json")}
        state.write_text(json.dumps(named))

    # finished: not repeated, and evaluated to the same numbers
    command = ["train", "--model", str(tiny), "--out", str(old), *SMALL]
    assert main(command) == 0
    assert main(["evaluate", "--run", str(old)]) == 0
    summary = json.loads((finished / "summary.json").read_text())["after"]
    again = json.loads((old / "evaluation.json").read_text())
    assert {name: again[name] for name in summary} == pytest.approx(summary, abs=1e-5)

    # unfinished: continued from its last checkpoint, to the byte
    (old / "summary.json").unlink()
    shutil.rmtree(old / "policy")
    shutil.rmtree(sorted((old / "checkpoints").iterdir())[-1])
    assert main([*command, "--resume"]) == 0
    for name in ("policy/model.safetensors", "samples.md", "snapshots.jsonl"):
        assert (old / name).read_bytes() == (finished / name).read_bytes()
    assert records == [(old / name).read_bytes() for name in ("config.json", "data/config.json")]


@pytest.mark.parametrize("lane", ["laptop", "gpu"])
def test_what_a_lane_set_is_read_from_its_record(lane):
    recorded = {"task": {"lane": lane, "model": None, "reward": "mine", "prefixes": 3}}
    config = task_config(lane, reward="mine")
    assert current_config(recorded)["task"] == {
        "device": config.device,
        "model": config.model,
        "reward": "mine",
        "prefixes": 3,
    }


def test_one_selector_sets_the_task_of_every_command():
    laptop, gpu, paper = (experiment.CONFIGS[name] for name in ("laptop", "gpu", "paper"))
    assert (laptop.task.device, laptop.task.model, laptop.task.reward) == (
        "cpu",
        "embedded",
        "tfidf",
    )
    small = {"device": "cpu", "model": "embedded", "reward": "tfidf"}
    assert replace(gpu.task, **small, prefixes=laptop.task.prefixes) == laptop.task

    # adapters in every block of the large model
    assert (laptop.dpo.lora_layers, gpu.dpo.lora_layers) == (2, 0)
    assert gpu.dpo.lora_rank == laptop.dpo.lora_rank > 0
    assert (gpu.task.device, gpu.task.model) == ("cuda", "openai-community/gpt2-large")
    assert (gpu.task.reward, paper.task.model) == (HUB_CLASSIFIER, gpu.task.model)
    assert frontier_config("laptop") == FrontierConfig()
    assert frontier_config("gpu").task == replace(gpu.task, prefixes=2_400, eval_prefixes=256)
    assert task_config("paper", seed=3) == replace(paper.task, seed=3)
    with pytest.raises(ValueError, match="name is 'papers'; it must be one of 'laptop', 'gpu'"):
        task_config("papers")


def test_an_option_s_earlier_name_is_still_taken():
    assert named_config(["train", "--accumulate", "4"])[1] == [
        "train",
        "--gradient-accumulation-steps",
        "4",
    ]
    nested = ["frontier", "--reward-model.loop.accumulate=2", "--config=gpu"]
    assert named_config(nested) == (
        "gpu",
        ["frontier", "--reward-model.loop.gradient-accumulation-steps=2"],
    )
    with pytest.raises(ValueError, match="--lane is now --config"):
        named_config(["frontier", "--task.lane=gpu"])


def test_a_run_fits_into_the_minutes_that_it_is_given(tiny, tmp_path, monkeypatch, capsys):
    """A new one; one that was begun keeps its size, and one named in full is never shrunk."""
    asked = []

    def fitting(job, speed, seconds, *, least):
        asked.append((len(job.prompts), seconds, least))
        return 9

    monkeypatch.setattr(experiment, "fitting_prompts", fitting)
    small = [*SMALL[:2], *SMALL[4:], "--model", str(tiny), "--minutes", "2"]
    out = tmp_path / "run"
    assert main(["train", *small, "--out", str(out)]) == 0
    (n, seconds, least) = asked.pop()
    full = task_config("laptop").prefixes
    assert n == full and 0 < seconds < 120 and least == 100 and not asked
    said = capsys.readouterr().out
    assert "9 prefixes" in said and "2 minutes" in said and f"--prefixes {full}" in said
    assert len(json.loads((out / "data" / "samples.json").read_text())["prompts"]) == 9
    for folder in (out, out / "data"):
        recorded = json.loads((folder / "config.json").read_text())
        assert recorded.get("task", recorded)["prefixes"] == 9

    # begun: resumed as it is, with minutes and with its number
    (out / "summary.json").unlink()
    assert main(["train", *small, "--out", str(out), "--resume"]) == 0
    assert main(["train", *small[:-2], "--prefixes", "9", "--out", str(out)]) == 0
    assert main(["plan", *small, "--out", str(out)]) == 0
    assert not asked

    # no time at all
    for minutes in ("0", "nan"):
        where = tmp_path / "never"
        assert main(["train", *small[:-1], minutes, "--out", str(where)]) == 2
        assert f"minutes is {float(minutes)}" in capsys.readouterr().err and not where.exists()

    # named in full
    capsys.readouterr()
    assert main(["train", *small, "--prefixes=12", "--out", str(tmp_path / "full")]) == 0
    assert not asked and "--minutes is ignored" in capsys.readouterr().out
    assert json.loads((tmp_path / "full" / "config.json").read_text())["task"]["prefixes"] == 12
    assert without_minutes(["train", "--minutes=5", "--prefixes", "3"]) == [
        "train",
        "--prefixes",
        "3",
    ]
