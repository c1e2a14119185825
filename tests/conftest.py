"""Offline, with a cache of its own, and a tiny GPT-2 for what does not need a good one.

What takes seconds to import is imported where it is used, for the process that hands tests to the
workers needs none of it.
"""

import errno
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from xdist.scheduler import LoadScopeScheduling


@pytest.fixture
def matmul():
    """torch's setting of who computes float32 matmuls on a CPU; what it was comes back."""
    import torch

    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "none"
    yield setting
    setting.fp32_precision = before


WORDS = (
    "this film was truly a joy dull bore and the acting plot of great terrible lovely awful story "
    "I loved hated it"
).split()


def make_reviews(n, seed=0):
    """Short made-up reviews whose words tell the label."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    texts, labels = [], []
    for i in range(n):
        words = [WORDS[j] for j in torch.randint(len(WORDS), (30,), generator=generator)]
        words += ["lovely great joy" if i % 2 else "awful terrible bore"]
        texts.append(f"Review {i}: " + " ".join(words))
        labels.append(i % 2)
    return texts, labels


def make_classifier(folder, labels):
    """A tiny sequence classifier with random weights in `folder`."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"])
    )
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    config = BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
    )
    BertForSequenceClassification(config).save_pretrained(folder)


@pytest.fixture
def forbidden(tmp_path, monkeypatch):
    """A directory into which nothing can be written, by root neither."""
    directory = tmp_path / "forbidden"
    directory.mkdir()

    def refuse(call):
        def wrapped(path, *arguments, **options):
            if not isinstance(path, int) and Path(os.fsdecode(path)).absolute().is_relative_to(
                directory
            ):
                raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))
            return call(path, *arguments, **options)

        return wrapped

    for name in ("open", "mkdir"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    return directory


@pytest.fixture
def made_up_reviews(monkeypatch, tmp_path_factory):
    """An experiment reads 260 made-up reviews, and keeps its classifier apart from the user's."""
    from datasets import Dataset, DatasetDict

    from dpo_lab.sentiment import task

    parts = {}
    for name, n in (("train", 200), ("test", 60)):
        texts, labels = make_reviews(n, seed=n)
        parts[name] = Dataset.from_dict({"text": texts, "label": labels})
    monkeypatch.setattr(task, "load_imdb", lambda source: DatasetDict(parts))
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny GPT-2 with random weights and its tokenizer."""
    from transformers import GPT2LMHeadModel, set_seed

    from dpo_lab.sentiment.pretrain import PretrainConfig, gpt2_config, train_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    set_seed(0)
    config = gpt2_config(PretrainConfig(vocabulary=512, context=64, width=32, layers=2, heads=2))
    GPT2LMHeadModel(config).save_pretrained(folder)
    train_tokenizer(make_reviews(200)[0], 512).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tiny):
    from dpo_lab.models import load_tokenizer

    return load_tokenizer(str(tiny))


@pytest.fixture
def model(tiny):
    from dpo_lab.models import load_model

    return load_model(str(tiny))


# what takes longest, in this order: notebooks and files of tests
LONGEST = (
    "04b_ppo_on_a_language_model",
    "04c_alignment_tax",
    "05_dpo_gpt2_imdb",
    "06_preference_data",
    "07_win_rates",
    "05c_on_policy_dpo",
    "08_failures",
    "00_start_here",
    "tests/test_browser.py",
    "tests/test_experiment.py",
    "05b_trl_side_by_side",
    "tests/test_distributed.py",
    "tests/test_gpu.py",
    "tests/test_frontier.py",
    "tests/test_site.py",
    "03b_finite_data",
    "04_ppo_vs_dpo",
    "tests/test_benchmarks.py",
    "tests/test_hub.py",
    "tests/test_train.py",
)


def scope(nodeid):
    """What one worker gets whole, for its tests share fixtures: a file, or a notebook's tests."""
    file, _, name = nodeid.partition("::")
    _, of_a_notebook, notebook = name.partition("[")
    return notebook.removesuffix("]") if "test_notebooks" in file and of_a_notebook else file


def pytest_collection_modifyitems(items):
    """The longest come first, so that all workers end at about the same time."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}

    def order(item):
        return ranks.get(scope(item.nodeid), len(ranks)), item.path.stem != "test_notebooks"

    items.sort(key=order)


class FileByFile(LoadScopeScheduling):
    """xdist's own groups (3.8) are no longer seen by pytest 9.2, which then deals single tests."""

    def _split_scope(self, nodeid):
        return scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return FileByFile(config, log)
