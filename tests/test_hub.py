"""The names of the paper's config, offline, in a Hugging Face cache as `hf download` leaves it.

The models have GPT-2's true shape; only the weights are made up. The command runs in processes of
its own, which see no other cache.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_reviews
from datasets import Dataset
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaForSequenceClassification,
    set_seed,
)

from dpo_lab import models
from dpo_lab.engine.runs import read_metrics

GPT2, CLASSIFIER, IMDB = (
    "openai-community/gpt2",
    "siebert/sentiment-roberta-large-english",
    "stanfordnlp/imdb",
)
CARD = """---
configs:
- config_name: plain_text
  data_files:
  - split: train
    path: plain_text/train-*
  - split: test
    path: plain_text/test-*
  default: true
---
"""
ARGUMENTS = ["--model", GPT2, "--imdb", "hub", "--reward", CLASSIFIER, "--precision", "float32"]
ARGUMENTS += (
    "--prefixes 10 --completions 2 --max-new-tokens 4 --eval-prefixes 8 --batch-pairs 2".split()
)


def into_cache(hub, kind, name, folder):
    """Move `folder`'s files into the cache as the hub's client stores them: blobs and links."""
    repository, commit = (
        hub / f"{kind}--{name.replace('/', '--')}",
        hashlib.sha1(name.encode()).hexdigest(),
    )
    for part in ("blobs", "refs"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        link = repository / "snapshots" / commit / file.relative_to(folder)
        blob = repository / "blobs" / hashlib.sha1(str(link).encode()).hexdigest()
        file.rename(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def write_bpe(folder, first, size, last):
    """vocab.json and merges.txt of the embedded tokenizer's BPE.

    The vocabulary is padded to `size` ids with words that no merge makes.
    """
    bpe = json.loads((models.EMBEDDED / "tokenizer.json").read_text())
    special = {token["content"] for token in bpe["added_tokens"]}
    words = [word for word in bpe["model"]["vocab"] if word not in special]
    words = [
        *first,
        *words,
        *(f"Ġw{i}" for i in range(size - len(first) - len(words) - len(last))),
        *last,
    ]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["model"]["merges"]
    ]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


# of the GPT-2 in the cache, and its parameters: two narrow layers, and its true shape
SHAPES = [
    pytest.param(({"n_layer": 2, "n_head": 2, "n_embd": 48}, 2_518_128), id="narrow"),
    pytest.param(({}, 124_439_808), id="true", marks=pytest.mark.long),
]


@pytest.fixture(scope="module", params=SHAPES)
def home(tmp_path_factory, request):
    """HF_HOME with the true names: GPT-2 and its files, a RoBERTa, made-up reviews."""
    home, made = tmp_path_factory.mktemp("hf"), tmp_path_factory.mktemp("made")
    set_seed(0)
    (gpt2 := made / "gpt2").mkdir()
    config = GPT2Config(
        **request.param[0],
        architectures=["GPT2LMHeadModel"],
        task_specific_params={"text-generation": {"max_length": 50}},
    )
    config.save_pretrained(gpt2)
    tensors = {name: value.contiguous() for name, value in GPT2Model(config).state_dict().items()}
    # the hub's file has them too
    tensors |= {
        f"h.{i}.attn.bias": torch.ones(1, 1, 1024, 1024).tril() for i in range(config.n_layer)
    }
    save_file(tensors, gpt2 / "model.safetensors", metadata={"format": "pt"})
    write_bpe(gpt2, [], 50_257, ["<|endoftext|>"])
    (gpt2 / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (gpt2 / "generation_config.json").write_text('{"bos_token_id": 50256, "eos_token_id": 50256}')
    into_cache(home / "hub", "models", GPT2, gpt2)

    (roberta := made / "roberta").mkdir()
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    classifier = RobertaForSequenceClassification(
        RobertaConfig(
            **small,
            vocab_size=50_265,
            max_position_embeddings=514,
            type_vocab_size=1,
            id2label={0: "NEGATIVE", 1: "POSITIVE"},
            label2id={"NEGATIVE": 0, "POSITIVE": 1},
            initializer_range=0.5,
        )
    )
    classifier.save_pretrained(roberta)
    write_bpe(roberta, ["<s>", "<pad>", "</s>", "<unk>"], 50_265, ["<mask>"])
    (roberta / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    into_cache(home / "hub", "models", CLASSIFIER, roberta)

    (imdb := made / "imdb" / "plain_text").mkdir(parents=True)
    (imdb.parent / "README.md").write_text(CARD)
    for split, n in (("train", 2_600), ("test", 20)):
        texts, labels = make_reviews(n, seed=n)
        Dataset.from_dict({"text": texts, "label": labels}).to_parquet(
            str(imdb / f"{split}-00000-of-00001.parquet")
        )
    into_cache(home / "hub", "datasets", IMDB, imdb.parent)
    return home


def environment(home):
    hidden = {
        "HF_HUB_CACHE",
        "HF_DATASETS_CACHE",
        "HF_TOKEN",
        "HUGGINGFACE_HUB_CACHE",
        "TRANSFORMERS_CACHE",
    }
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    threads = str(torch.get_num_threads())
    return kept | {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


BOTH = """
import sys
from dpo_lab.cli import main
first, second = (part.split() for part in sys.argv[1:])
sys.exit(main(first) or main(second))
"""


def start(home, *arguments, then=None):
    """The command in a process of its own, or it and then another."""
    words = list(map(str, arguments))
    command = [sys.executable, "-m", "dpo_lab.cli", *words]
    if then:
        command = [sys.executable, "-c", BOTH, " ".join(words), then]
    where = Path(models.__file__).parent.parent
    return subprocess.Popen(
        command,
        env=environment(home),
        cwd=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_hub_s_names_run_interrupted_resumed_and_evaluated_offline(home, tmp_path, request):
    run = tmp_path / "run"
    process = start(home, "train", *ARGUMENTS, "--out", run)
    while process.poll() is None and not (run.exists() and len(read_metrics(run)) >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "--resume" in error, error
    stopped = read_metrics(run)[-1]["step"]

    resume = ["train", *ARGUMENTS, "--out", run, "--resume"]
    process = start(home, *resume, then=f"evaluate --run {run}")
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    metrics = read_metrics(run)
    assert stopped < 5 and [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 5]
    assert metrics[0]["eval/kl/sequence"] == 0 and metrics[-1]["eval/kl/sequence"] != 0
    recorded = json.loads((run / "config.json").read_text())["task"]
    assert (recorded["model"], recorded["imdb"], recorded["reward"]) == (GPT2, "hub", CLASSIFIER)
    prompts = json.loads((run / "data" / "samples.json").read_text())["prompts"]
    assert all(prompt[0] == 50_256 for prompt in prompts)

    policy, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run / "policy"),
        AutoTokenizer.from_pretrained(run / "policy"),
    )
    _, parameters = request.node.callspec.params["home"]
    assert sum(p.numel() for p in policy.parameters()) == parameters
    assert len(tokenizer) == 50_257
    (snapshot,) = (home / "hub" / "models--openai-community--gpt2" / "snapshots").iterdir()
    reference = AutoModelForCausalLM.from_pretrained(snapshot)
    assert (
        tokenizer("a lovely film")["input_ids"]
        == AutoTokenizer.from_pretrained(snapshot)("a lovely film")["input_ids"]
    )
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(policy.parameters(), reference.parameters())
    ]
    assert 0 < max(moved) < 1e-2

    after = json.loads((run / "summary.json").read_text())["after"]
    again = json.loads((run / "evaluation.json").read_text())
    assert {name: again[name] for name in after} == pytest.approx(after, abs=1e-5)
