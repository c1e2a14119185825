"""Where there is no place to write, or a path begins with ~.

It is said before anything is loaded, and no reason to stop for a cache.
"""

import io
import os
import sys
import warnings

import datasets
import numpy as np
import pytest
from conftest import make_reviews

from dpo_lab import cli
from dpo_lab.cli import main
from dpo_lab.doctor import examine
from dpo_lab.engine.runs import require_writable
from dpo_lab.models import load_model, load_tokenizer
from dpo_lab.preferences import from_rows
from dpo_lab.sentiment import pretrain, task
from dpo_lab.sentiment import reviews as imdb
from dpo_lab.sentiment import run as experiment
from dpo_lab.sentiment.reward import SentimentReward, cache_directory
from dpo_lab.train import DPOConfig, train_dpo


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def loaded(*arguments, **options):
        raise AssertionError("loaded before the place to write was looked at")

    for module, name in ((task, "load_model"), (task, "load_imdb"), (pretrain, "load_imdb")):
        monkeypatch.setattr(module, name, loaded)


COMMANDS = [
    ("train", "--out"),
    ("train", "--data"),
    ("sample", "--data"),
    ("label", "--data"),
    ("frontier", "--out"),
    ("pretrain", "--out"),
]


@pytest.mark.parametrize(("command", "option"), COMMANDS)
@pytest.mark.parametrize(
    "kind",
    [
        "a directory that may not be made",
        "the forbidden directory itself",
        "a file",
        "below a file",
    ],
)
def test_nowhere_to_write_is_said_before_anything_is_loaded(
    forbidden, nothing_is_loaded, tmp_path, monkeypatch, capsys, command, option, kind
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("mine")
    where = {
        "a file": file,
        "below a file": file / "run",
        "the forbidden directory itself": forbidden,
    }.get(kind, forbidden / "run")
    before = sorted(tmp_path.rglob("*"))
    assert main([command, option, str(where)]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("dpo-lab: error:")
        and str(where) in said
        and "--out" in said
        and len(said.splitlines()) == 1
    )
    assert sorted(tmp_path.rglob("*")) == before and file.read_text() == "mine"


def test_evaluate_looks_too(forbidden, nothing_is_loaded, tmp_path, capsys):
    (tmp_path / "run" / "policy").mkdir(parents=True)
    for name in ("summary.json", "policy/config.json"):
        (tmp_path / "run" / name).write_text("{}")
    (tmp_path / "run" / "config.json").write_text('{"task": {}}')
    (tmp_path / "run").rename(forbidden / "run")
    assert main(["evaluate", "--run", str(forbidden / "run")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "option"), COMMANDS)
@pytest.mark.parametrize("kind", ["another config", "no config"])
def test_a_directory_of_something_else_is_refused_before_anything_is_loaded(
    nothing_is_loaded, tmp_path, capsys, command, option, kind
):
    file = tmp_path / "run" / ("config.json" if kind == "another config" else "thesis.txt")
    file.parent.mkdir()
    file.write_text('{"mine": 1}')
    out = ["--out", str(tmp_path / "out")] if option == "--data" and command == "train" else []
    assert main([command, option, str(file.parent), *out]) == 2
    said = capsys.readouterr().err
    assert (
        "holds a run with another config"
        if kind == "another config"
        else "is not empty and has no config.json"
    ) in said
    assert (
        file.read_text() == '{"mine": 1}'
        and [*file.parent.iterdir()] == [file]
        and not (tmp_path / "out").exists()
    )


def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path):
    for where in (tmp_path, tmp_path / "a" / "b"):
        require_writable(where)
    assert not list(tmp_path.iterdir())


def test_what_the_system_refuses_later_is_one_line_with_what_to_set(monkeypatch, capsys):
    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied", "/somewhere/cache")

    monkeypatch.setattr(experiment, "evaluate", refused)
    assert main(["evaluate"]) == 2
    said = capsys.readouterr().err
    assert (
        "/somewhere/cache" in said
        and "--out" in said
        and "DPO_LAB_CACHE" in said
        and "Traceback" not in said
    )


def test_a_classifier_that_cannot_be_kept_is_used_all_the_same(forbidden, tmp_path, monkeypatch):
    texts, labels = make_reviews(60)
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path / "cache"))
    kept = SentimentReward.tfidf(texts, labels)
    monkeypatch.setenv("DPO_LAB_CACHE", str(forbidden / "cache"))
    with pytest.warns(UserWarning, match="not kept.*DPO_LAB_CACHE"):
        found = SentimentReward.tfidf(texts, labels)
    assert np.array_equal(found(texts), kept(texts)) and found.name == kept.name


def test_reviews_are_read_where_datasets_cannot_keep_them(forbidden, monkeypatch):
    kept = imdb._package_reviews()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", forbidden / "datasets")
    found = imdb._package_reviews()
    assert found["text"][:200] == kept["text"][:200] and found["label"][:] == kept["label"][:]


def test_doctor_looks_at_every_place(forbidden, monkeypatch):
    monkeypatch.setenv("DPO_LAB_CACHE", str(forbidden))
    rows, able = examine()
    todo = {what: todo for what, _, todo in rows}
    assert able and "DPO_LAB_CACHE" in todo["classifier's cache"] and not todo["writing here"]
    monkeypatch.setenv("DPO_LAB_CACHE", "")
    monkeypatch.chdir(forbidden)
    rows, able = examine()
    todo = {what: todo for what, _, todo in rows}
    assert not able and "--out" in todo["writing here"]


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "latin-1", "utf-8"])
def test_a_terminal_without_a_character_is_no_reason_to_fail(monkeypatch, encoding):
    monkeypatch.setattr(
        experiment,
        "evaluate",
        lambda *a, **k: {"reward": 0.5, "reward_se": 0.1, "kl": 1, "kl_se": 0.2},
    )
    shown = io.BytesIO()
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(shown, encoding=encoding, write_through=True)
    )
    assert cli.main(["evaluate"]) == 0
    assert "reward 0.500" in (text := shown.getvalue().decode(encoding)) and (
        "±" in text or "xb1" in text
    )


def test_a_tilde_is_the_home_directory(tiny, tmp_path, monkeypatch, made_up_reviews):
    home = tmp_path / "home"
    home.mkdir()
    (home / "tiny").symlink_to(tiny, target_is_directory=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(tmp_path)
    policy, tokenizer = load_model("~/tiny"), load_tokenizer("~/tiny")
    rows = [{"prompt": "A kettle", "chosen": " boils", "rejected": " leaks"}]
    preferences = from_rows(rows, tokenizer, context=64).with_reference(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the warm-up
        train_dpo(policy, preferences, DPOConfig(), run="~/run", progress=None)
    preferences.save("~/pairs")
    assert type(preferences).load("~/pairs").completions == preferences.completions
    small = "--prefixes 12 --eval-prefixes 8 --max-new-tokens 6".split()
    assert main(["sample", "--model=~/tiny", "--data=~/data", *small]) == 0
    assert (home / "run" / "metrics.jsonl").exists() and (home / "data" / "samples.json").exists()
    monkeypatch.setenv("DPO_LAB_CACHE", "~/cache")
    assert cache_directory() == home / "cache"
    assert "~" not in os.listdir(tmp_path)
