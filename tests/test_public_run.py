"""`dpo-lab train --data NAME`: the whole run on made-up copies, offline, stopped and resumed."""

import json
import re

import numpy as np
import pytest
from hub_copies import write_copy
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, set_seed

from dpo_lab.cli import main, named_data, public_config
from dpo_lab.data import run as public_run
from dpo_lab.data.run import PublicRunConfig, train_public
from dpo_lab.engine.runs import read_metrics
from dpo_lab.loop import LoopConfig
from dpo_lab.models import load_tokenizer
from dpo_lab.preferences import Preferences
from dpo_lab.sentiment.pretrain import PretrainConfig, gpt2_config
from dpo_lab.train import DPOConfig


@pytest.fixture(scope="module")
def longer(tiny, tmp_path_factory):
    """The tiny GPT-2 with a context that dialogues fit into."""
    folder = tmp_path_factory.mktemp("longer")
    set_seed(0)
    config = gpt2_config(PretrainConfig(vocabulary=512, context=160, width=32, layers=2, heads=2))
    GPT2LMHeadModel(config).save_pretrained(folder)
    load_tokenizer(str(tiny)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hh(tmp_path_factory):
    return write_copy(tmp_path_factory.mktemp("copies") / "hh", "hh")


def config(model, folder, **changes):
    loop = LoopConfig(learning_rate=3e-3, warmup_steps=1, eval_every=2, save_every=1)
    sizes = {"pairs": 32, "held_out": 16, "sampled": 4, "max_completion_tokens": 16}
    given = {"data": "hh", "folder": str(folder), "model": str(model)} | sizes
    dpo = DPOConfig(batch_pairs=8, loop=loop)
    return PublicRunConfig(**given | {"dpo": dpo} | changes)


@pytest.fixture(scope="module")
def whole(longer, hh, tmp_path_factory):
    """A run from beginning to end, and its summary."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train_public(config(longer, hh, sft_learning_rate=1e-3), out)


def test_a_run_learns_the_pairs_and_keeps_what_it_did(whole, longer):
    out, summary = whole
    before, after = summary["before"], summary["after"]
    assert (before["accuracy"], before["margin"], before["log_ratio_chosen"]) == (0.5, 0, 0)
    assert after["accuracy_low"] < after["accuracy"] <= 1 and after["pairs"] == 16
    assert after["accuracy"] > 0.9 and after["margin"] > 5 * after["margin_se"]
    assert after["logps_chosen"] - before["logps_chosen"] == pytest.approx(
        after["log_ratio_chosen"], abs=1e-4
    )
    assert after["kl"] != 0 and summary["steps"] == 4

    # DPO began at what SFT had made
    metrics = read_metrics(out)
    assert [line["eval/accuracy"] for line in metrics if line["step"] == 0] == [0.5]
    assert metrics[1]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    tuned, policy, initial = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (out / "sft" / "model", out / "policy", longer)
    )
    name = "transformer.h.0.attn.c_attn.weight"
    assert not np.allclose(tuned[name], initial[name]) and not np.allclose(
        tuned[name], policy[name]
    )
    assert read_metrics(out / "sft")[0]["step"] == 1

    # what was drawn, and from what
    train = Preferences.load(out / "data" / "train")
    assert train.report.pairs == 32 and len(set(map(tuple, train.prompts))) == 32
    assert summary["reports"]["train"].startswith("rows 96, pairs 96; drawn: pairs 32")
    recorded = json.loads((out / "config.json").read_text())
    assert (recorded["data"], recorded["dpo"]["beta"], recorded["pairs"]) == ("hh", 0.1, 32)
    assert len((out / "samples.md").read_text().splitlines()) == 2 + 4
    assert (out / "figures" / "margins.png").stat().st_size > 1_000


@pytest.mark.parametrize("stopped", ["SFT", "DPO"])
def test_a_run_that_is_stopped_and_resumed_ends_at_the_same_bytes(
    whole, longer, hh, tmp_path, monkeypatch, stopped
):
    asked = config(longer, hh, sft_learning_rate=1e-3)
    calls = {"SFT": "save_policy", "DPO": "evaluate_pairs"}

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    def during(model, *arguments):
        return killed() if model is not None else evaluate(model, *arguments)

    evaluate = public_run.evaluate_pairs
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(public_run, calls[stopped], during if stopped == "DPO" else killed)
        train_public(asked, tmp_path / "run")
    assert not (tmp_path / "run" / "policy").exists()
    with pytest.raises(ValueError, match="--resume"):
        train_public(asked, tmp_path / "run")
    train_public(asked, tmp_path / "run", resume=True)

    for file in ("policy/model.safetensors", "sft/model/model.safetensors", "samples.md"):
        assert (tmp_path / "run" / file).read_bytes() == (whole[0] / file).read_bytes(), file
    timed = ("second", "memory")
    lines = [
        [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in found]
        for found in (read_metrics(tmp_path / "run"), read_metrics(whole[0]))
    ]
    assert lines[0] == lines[1]


def test_a_finished_run_is_looked_up_and_another_config_refused(whole, longer, hh, monkeypatch):
    monkeypatch.setattr(public_run, "load_model", None)
    out, summary = whole
    assert train_public(config(longer, hh, sft_learning_rate=1e-3), out) == summary
    with pytest.raises(ValueError, match=r"another config \(seed: 0 there, 1 asked\)"):
        train_public(config(longer, hh, sft_learning_rate=1e-3, seed=1), out)


def test_prompts_that_leave_no_room_are_passed_over_or_named(longer, hh, tmp_path):
    with pytest.raises(
        ValueError, match="of the 96 pairs of hh .train. 0 have a prompt that leaves"
    ):
        train_public(config(longer, hh, max_completion_tokens=159), tmp_path / "run")
    assert not (tmp_path / "run").exists()

    # every pair that fits, and no other
    task = public_run.PublicTask(config(longer, hh, pairs=0, max_completion_tokens=110), tmp_path)
    assert 2 <= len(task.train.chosen) < 96
    assert max(map(len, task.train.prompts)) <= 50 and max(map(len, task.train.completions)) <= 110


def test_messages_are_rendered_by_the_model_s_template(longer, hh, tmp_path):
    tokenizer = load_tokenizer(str(longer))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = tmp_path / "chat"
    GPT2LMHeadModel.from_pretrained(longer).save_pretrained(chat)
    tokenizer.save_pretrained(chat)
    task = public_run.PublicTask(config(chat, hh, style="messages", pairs=4), tmp_path)
    prompts = tokenizer.batch_decode(task.train.prompts)
    assert all(re.fullmatch(r"(<user>.*)+<assistant>", prompt) for prompt in prompts), prompts


# the command


def test_the_command_trains_on_a_named_data_set(longer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy = write_copy(tmp_path / "copy", "tldr")
    words = f"train --data tldr --folder {copy} --model {longer} --sft-epochs 0 --lora-rank 2"
    words += " --pairs 12 --held-out 6 --sampled 2 --max-completion-tokens 8 --batch-pairs 8"
    assert main(words.split()) == 0
    said = capsys.readouterr().out
    assert re.search(r"before  accuracy 0.500 .*\nafter   accuracy [01]\.\d+ \(", said)
    recorded = json.loads((tmp_path / "runs" / "tldr" / "config.json").read_text())
    assert recorded["dpo"]["beta"] == 0.5 and recorded["folder"] == str(copy)
    assert not (tmp_path / "runs" / "tldr" / "sft").exists()
    assert main(["evaluate", "--run", "runs/tldr"]) == 2
    assert "is a run on the data set 'tldr'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --data hhh", "no folder here and no data set. Data sets are tldr, tldr-trl, hh,"),
        ("train --data=hhh", "a folder is one of `dpo-lab sample` and `label`, and a new one"),
        ("train --data hc3", "say which side is chosen: hc3:prefer-human, hc3:prefer-chatgpt"),
        ("plan --data Anthropic/hh-rlhf", "dpo-lab plan knows the sentiment experiment alone"),
        ("train --data hh --sampled 1", "sampled is 1; it must be at least 2"),
        ("train --data hh --folder nowhere", "holds no helpful-base/train.jsonl.gz"),
    ],
)
def test_a_command_that_cannot_be_says_why_and_writes_nothing(
    words, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_of_that_name_is_a_folder_unless_the_data_set_s_own_is_named(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert named_data(["train", "--data", "hh"]) == "hh"
    (tmp_path / "hh").mkdir()
    assert named_data(["train", "--data", "hh"]) is None
    assert named_data(["train", "--data", "hh", "--folder", "hh"]) == "hh"
    assert named_data(["train", "--data=hh:helpful-base"]) == "hh:helpful-base"
    for words in ("train --data new/folder", "train --seed 1", "sample --data hhh", "doctor"):
        assert named_data(words.split()) is None
    assert named_data([]) is None


def test_the_settings_are_the_paper_s():
    """Appendix B: beta 0.5 for summaries and 0.1 else, batches of 64, RMSprop at 1e-6."""
    for name, beta in (("tldr", 0.5), ("tldr-trl", 0.5), ("hh", 0.1), ("shp", 0.1)):
        made = public_config("paper", name)
        loop = made.dpo.loop
        assert (made.data, made.dpo.beta, made.dpo.batch_pairs) == (name, beta, 64)
        assert (loop.optimizer, loop.learning_rate, loop.warmup_steps) == ("rmsprop", 1e-6, 150)
        assert (made.pairs, made.sft_epochs, made.dpo.lora_rank) == (0, 1, 0)
