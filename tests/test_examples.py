"""The textbook loop runs as it stands, and its losses are those of train_dpo."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_lab.loop import LoopConfig
from dpo_lab.models import load_model
from dpo_lab.preferences import Preferences
from dpo_lab.train import DPOConfig, train_dpo

EXAMPLE = Path(__file__).parent.parent / "examples" / "textbook_dpo.py"


@pytest.fixture(scope="module")
def textbook():
    spec = importlib.util.spec_from_file_location("textbook_dpo", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def preferences():
    """Pairs of random tokens, some of which share a completion."""
    rng = np.random.default_rng(0)
    prompts = [[0, *rng.integers(1, 512, n).tolist()] for n in (2, 5, 9, 4)]
    completions = [[*rng.integers(1, 512, rng.integers(2, 12)).tolist(), 0] for _ in range(9)]
    prompt_of = [0, 0, 0, 1, 1, 2, 2, 3, 3]
    return Preferences(prompts, completions, prompt_of, [0, 0, 1, 3, 5, 8], [1, 2, 2, 4, 6, 7])


def test_its_losses_are_those_of_train_dpo(tiny, textbook, preferences):
    ours = load_model(str(tiny))
    data = preferences.with_reference(ours)
    loop = LoopConfig(learning_rate=textbook.LEARNING_RATE, schedule="constant", warmup_steps=0)
    config = DPOConfig(beta=textbook.BETA, batch_pairs=2, epochs=5, loop=loop)
    expected = [line["loss"] for line in train_dpo(ours, data, config, seed=1, progress=None)]

    theirs = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    found = list(textbook.train(theirs, preferences, preferences.steps(2, epochs=5, seed=1)))
    assert found == pytest.approx(expected, abs=1e-4) and len(found) >= 10
    assert found[-1] < found[0] - 1e-3


def test_its_log_probs_are_those_of_each_completion_alone(tiny, textbook):
    model = load_model(str(tiny))
    prompts, completions = [[0, 5], [0, 6, 7, 8]], [[9, 10, 11], [12]]
    with torch.no_grad():
        found = textbook.completion_logps(model, prompts, completions)
        for logp, prompt, completion in zip(found, prompts, completions):
            alone = textbook.completion_logps(model, [prompt], [completion])
            assert float(logp) == pytest.approx(float(alone), abs=1e-4)


def test_it_is_short_and_of_plain_pytorch(textbook):
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 80
    ours = [line for line in lines if line.startswith(("from dpo_lab", "import dpo_lab"))]
    assert ours == ["from dpo_lab import from_rows", "from dpo_lab.assets import EMBEDDED"]


def test_it_runs_as_it_stands():
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLE)]
    output = subprocess.check_output(command, text=True, env=environment)
    losses = [float(line.split()[-1]) for line in output.splitlines() if line.startswith("step")]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3) and losses[-1] < losses[0] / 2
