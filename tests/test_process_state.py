"""A public function leaves the process as it found it.

No environment variable of a library changes what it computes.
"""

import logging
import os
import pkgutil
import random
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import accelerate
import datasets
import matplotlib
import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import make_classifier, make_reviews
from test_train import CONFIG, LOOP, make_preferences

from dpo_lab.batching import completion_batch
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.evaluate import evaluate_policy
from dpo_lab.logprobs import completion_logps, score_completions
from dpo_lab.loop import Interrupted
from dpo_lab.models import ScalarModel, load_model, load_tokenizer
from dpo_lab.plots import plot_lines
from dpo_lab.rlhf.ppo import PPOConfig, train_ppo
from dpo_lab.rlhf.reward_model import RewardModelConfig, train_reward_model
from dpo_lab.sampling import sample_completions
from dpo_lab.sentiment import run as experiment
from dpo_lab.sentiment import sweep as frontier
from dpo_lab.sentiment.cost import plan
from dpo_lab.sentiment.precision import measure_precision
from dpo_lab.sentiment.pretrain import PretrainConfig, pretrain
from dpo_lab.sentiment.results import Run
from dpo_lab.sentiment.reviews import load_imdb
from dpo_lab.sentiment.reward import SentimentReward
from dpo_lab.sentiment.run import ExperimentConfig
from dpo_lab.sentiment.sweep import FrontierConfig
from dpo_lab.sentiment.task import TaskConfig
from dpo_lab.theory import symbolic
from dpo_lab.train import sft_batches, train_dpo, train_sft, train_unlikelihood
from dpo_lab.widgets.explorers import beta_explorer


def state():
    """What a process has once, and a library may have changed."""
    matmul = torch.backends.mkldnn.matmul
    return {
        "environment": dict(os.environ),
        "random numbers": (
            torch.get_rng_state().tolist(),
            str(np.random.get_state()),
            random.getstate(),
        ),
        "torch": (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled(),
        ),
        "matmuls": (
            matmul.fp32_precision,
            torch.backends.mkldnn.enabled,
            torch.backends.cuda.matmul.fp32_precision,
        ),
        "numpy": (np.geterr(), np.get_printoptions()),
        "accelerate": [
            dict(kind._shared_state) for kind in (PartialState, AcceleratorState, GradientState)
        ],
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "transformers": (
            transformers.logging.get_verbosity(),
            transformers.logging.is_progress_bar_enabled(),
        ),
        "datasets": (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()),
        "matplotlib": (dict(matplotlib.rcParams), matplotlib.get_backend()),
        "streams": (sys.stdout, sys.stderr, Path.cwd()),
    }


def rows(n):
    rng = np.random.default_rng(0)
    return [[0, *map(int, rng.integers(1, 512, 5))] for _ in range(n)]


def reward(texts):
    return np.array([len(text) for text in texts], dtype=float)


def small_task(tiny):
    return TaskConfig(model=str(tiny), prefixes=12, eval_prefixes=8, max_new_tokens=6)


def stopped(tiny, folder):
    """A run that SIGTERM stops, and one whose evaluation fails."""

    def stop(model, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    def fail(model, step):
        return {"one": 1 / (step - 2)}

    many = replace(CONFIG, epochs=5, loop=replace(LOOP, eval_every=1))
    for expected, evaluate, run in ((Interrupted, stop, folder), (ZeroDivisionError, fail, None)):
        with pytest.raises(expected):
            train_dpo(
                load_model(str(tiny)),
                make_preferences(str(tiny)),
                many,
                run=run,
                callback=evaluate,
                progress=None,
            )


def adapters(tiny, folder):
    train_dpo(
        load_model(str(tiny)),
        make_preferences(str(tiny)),
        replace(CONFIG, lora_rank=2),
        progress=None,
    )


def resumed(tiny, folder):
    for resume in (False, True):
        train_dpo(
            load_model(str(tiny)),
            make_preferences(str(tiny)),
            CONFIG,
            run=folder,
            resume=resume,
            progress=None,
        )


def learned(tiny, folder):
    config = RewardModelConfig(batch_pairs=9, loop=LOOP)
    train_reward_model(
        ScalarModel(load_model(str(tiny))), make_preferences(str(tiny)), config, progress=None
    )


def sampled_and_scored(tiny, folder):
    model = load_model(str(tiny))
    for precision in ("float32", "bfloat16"):
        completions = sample_completions(
            model, rows(3), 2, eos_token_id=0, max_new_tokens=4, precision=precision
        )
        score_completions(
            model, rows(3), [row[0] for row in completions], range(3), precision=precision
        )


def by_ppo(tiny, folder):
    policy, reference, value = (
        load_model(str(tiny)),
        load_model(str(tiny)),
        ScalarModel(load_model(str(tiny))),
    )
    config = PPOConfig(steps=1, batch=4, minibatch=2, max_new_tokens=4)

    def score(prompts, completions):
        return np.array([len(ids) for ids in completions], dtype=float)

    train_ppo(policy, reference, value, score, rows(4), config, eos_token_id=0, progress=None)


def all_of_it(tiny, folder):
    run = folder / "run"
    experiment.train(ExperimentConfig(small_task(tiny), CONFIG), run)
    experiment.evaluate(run, eval_prefixes=8)


def sweep(tiny, folder):
    config = FrontierConfig(task=small_task(tiny), loop=LOOP, samples=16, jobs=1)
    frontier.frontier(config, folder / "sweep", runs=[Run("dpo", 0.1, 0)])


def from_scratch(tiny, folder):
    small = {
        "vocabulary": 300,
        "context": 32,
        "width": 16,
        "layers": 1,
        "heads": 1,
        "rows": 4,
        "steps": 2,
    }
    pretrain(folder / "pretrained", PretrainConfig(**small, loop=LOOP))


def classified(tiny, folder):
    SentimentReward.tfidf(*make_reviews(60, seed=99))
    SentimentReward.hub(str(folder / "classifier"))(["good film", "bad"])


def pictures(tiny, folder):
    plot_lines("lines", [0, 1], {"a": [0, 1]}, "x", "y").savefig(folder / "lines.png")
    beta_explorer().show(beta=0.5)
    symbolic.bradley_terry()


CALLS = {
    "load": lambda tiny, folder: (load_model(str(tiny)), load_tokenizer(str(tiny))),
    "reviews": lambda tiny, folder: load_imdb(),
    "log-probs": lambda tiny, folder: (
        completion_logps(load_model(str(tiny)), completion_batch([[1, 2]], [[3, 4]], [0]))
        .sum()
        .backward()
    ),
    "sample and score": sampled_and_scored,
    "evaluate_policy": lambda tiny, folder: evaluate_policy(
        load_model(str(tiny)),
        load_model(str(tiny)),
        rows(8),
        reward,
        load_tokenizer(str(tiny)),
        max_new_tokens=4,
    ),
    "measure_precision": lambda tiny, folder: measure_precision(
        load_model(str(tiny)), completion_batch(rows(2), rows(4), [0, 0, 1, 1]), 0.1
    ),
    "plan": lambda tiny, folder: plan(
        load_model(str(tiny)), rows(9), CONFIG, completions=2, max_new_tokens=4, eval_prefixes=8
    ),
    "train_dpo": lambda tiny, folder: train_dpo(
        load_model(str(tiny)), make_preferences(str(tiny)), CONFIG, progress=None
    ),
    "train_dpo, adapters": adapters,
    "train_dpo, stopped": stopped,
    "train_dpo, resumed": resumed,
    "train_sft": lambda tiny, folder: train_sft(
        load_model(str(tiny)),
        sft_batches(make_preferences(str(tiny)), 4),
        2,
        LOOP,
        precision="bfloat16",
        progress=None,
    ),
    "train_unlikelihood": lambda tiny, folder: train_unlikelihood(
        load_model(str(tiny)), make_preferences(str(tiny)), 0.5, LOOP, progress=None
    ),
    "train_reward_model": learned,
    "train_ppo": by_ppo,
    "experiment": all_of_it,
    "frontier": sweep,
    "pretrain": from_scratch,
    "rewards": classified,
    "pictures": pictures,
}


@pytest.mark.parametrize(
    ("name", "mine"), [*((name, True) for name in CALLS), ("train_dpo", False)]
)
def test_the_process_is_left_as_it_was(tiny, tmp_path, monkeypatch, request, name, mine):
    if name in ("experiment", "frontier", "pretrain"):
        request.getfixturevalue("made_up_reviews")
    monkeypatch.setattr(
        "dpo_lab.sentiment.pretrain.load_imdb",
        lambda: {k: dict(zip(("text", "label"), make_reviews(60))) for k in ("train", "test")},
    )
    for kind in (PartialState, AcceleratorState, GradientState):
        monkeypatch.setattr(kind, "_shared_state", type(kind._shared_state)())
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16") if mine else None
    make_classifier(tmp_path / "classifier", ["POS", "NEG"])
    before = state()
    CALLS[name](tiny, tmp_path)
    after = state()
    for what in before:
        assert after[what] == before[what], what
    if mine:
        assert (
            accelerator.mixed_precision
            == accelerate.Accelerator(cpu=True, mixed_precision="bf16").mixed_precision
            == "bf16"
        )


def test_scoring_leaves_every_module_in_its_mode(model):
    model.train()
    frozen = [module for i, module in enumerate(model.modules()) if i % 3 == 1]
    for module in frozen:
        module.training = False
    score_completions(model, [[1, 2]], [[3, 4]], [0])
    assert [module for module in model.modules() if not module.training] == frozen


def variables():
    """Every environment variable in accelerate's source, except a launcher's process counts."""
    names = set()
    for module in pkgutil.walk_packages(accelerate.__path__, "accelerate."):
        path = Path(accelerate.__path__[0], *module.name.split(".")[1:])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                names |= set(
                    re.findall(
                        r"""["']((?:ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_[A-Z0-9_]+)["']""",
                        file.read_text(),
                    )
                )
    return sorted(names)


def test_the_variables_were_found():
    assert {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_USE_FSDP",
    } < set(variables())


TRAIN = """
import hashlib, os, sys
from dataclasses import replace
sys.path[:0] = sys.argv[1:3]
from test_train import CONFIG, LOOP, make_preferences
from dpo_lab.models import load_model
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.train import train_dpo

preferences = make_preferences(sys.argv[3])
for line in sys.stdin:
    names, value = line.split("=")
    added = {name: value.strip() for name in names.split(",") if name}
    os.environ.update(added)
    policy = load_model(sys.argv[3])
    train_dpo(policy, preferences, replace(CONFIG, epochs=1), progress=None)
    print(weights_hash(policy), flush=True)
    for name in added:
        del os.environ[name]
"""


def test_no_variable_of_a_library_changes_the_gradient(tiny):
    """All at once, with values that mean something to accelerate.

    Some are set before a process starts, and all while it runs; here nothing is set.
    """
    names, tests = ",".join(variables()), Path(__file__).parent
    lines = [
        "=",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4",
        *(f"{names}={value}" for value in ("true", "2", "bf16", "inductor")),
    ]
    command = [sys.executable, "-c", TRAIN, str(tests.parent), str(tests), str(tiny)]
    run = {"capture_output": True, "text": True, "check": True}
    before = {
        "LOCAL_RANK": "0",
        "ACCELERATE_TORCH_DEVICE": "meta",
        "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }
    environment = os.environ | before
    found = subprocess.run(command, input="\n".join(lines), env=environment, **run).stdout.split()
    policy = load_model(str(tiny))
    train_dpo(policy, make_preferences(tiny), replace(CONFIG, epochs=1), progress=None)
    assert found == [weights_hash(policy)] * len(lines)
