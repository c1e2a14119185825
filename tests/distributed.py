"""What tests/test_distributed.py compares: run by one process, and by the two that a launcher starts, with the same arguments."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import make_reviews
from datasets import Dataset, DatasetDict
from test_train import CONFIG, LOOP, make_preferences, timeless

from dpo_lab import experiment
from dpo_lab.cli import main
from dpo_lab.imdb import sample_completions
from dpo_lab.logprobs import can_share
from dpo_lab.loop import Interrupted
from dpo_lab.models import ScalarModel, load_model
from dpo_lab.processes import from_main, gathered, is_main, join, my_share, rank, whole
from dpo_lab.reward_model import RewardModelConfig, train_reward_model
from dpo_lab.train import sft_batches, train_dpo, train_sft, train_unlikelihood

SMALL = "--prefixes 180 --eval-prefixes 48 --max-new-tokens 8 --batch-pairs 90 --learning-rate 3e-3 --eval-every 4 --save-every 2".split()


def made_up_reviews(source="package"):
    parts = {name: make_reviews(n, seed=n) for name, n in (("train", 200), ("test", 60))}
    return DatasetDict({k: Dataset.from_dict({"text": texts, "label": labels}) for k, (texts, labels) in parts.items()})


def losses(tiny):
    """The metrics of every loss, from steps of one prompt to steps of all, and of a reward model's fit."""
    preferences = make_preferences(tiny)
    found = {}
    for name, config in {
        "dpo": CONFIG,
        "accumulated": replace(CONFIG, batch_pairs=9, loop=replace(LOOP, accumulate=2)),
        "one prompt a step": replace(CONFIG, batch_pairs=3, epochs=1),
    }.items():
        found[name] = train_dpo(load_model(tiny), preferences, config, progress=None)
    found["unlikelihood"] = train_unlikelihood(load_model(tiny), preferences, 0.5, LOOP, batch_pairs=9, progress=None)
    for share in (True, False):
        policy = load_model(tiny)
        batches = sft_batches(preferences, 5, chosen_only=False, share=share and can_share(policy))
        found[f"sft, share {share}"] = train_sft(policy, batches, len(batches), LOOP, progress=None)
    config = RewardModelConfig(batch_pairs=9, loop=LOOP)
    found["reward model"] = train_reward_model(ScalarModel(load_model(tiny)), preferences, config, progress=None)
    return {name: timeless(metrics) for name, metrics in found.items()}


def stopped(tiny, run):
    """A run that SIGTERM to its last process stops after step 3."""

    def evaluate(model, step):
        if step == 3 and rank() == len(gathered(0)) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    try:
        from_main(run.mkdir)
        train_dpo(load_model(tiny), make_preferences(tiny), CONFIG, run=run, evaluate=evaluate, progress=None)
    except Interrupted as error:
        return str(error)


def resumed(tiny, run):
    policy = load_model(tiny)
    metrics = train_dpo(policy, make_preferences(tiny), CONFIG, run=run, resume=True, evaluate=lambda *_: {}, progress=None)
    return timeless(metrics), float(sum(p.detach().double().square().sum() for p in policy.parameters()))


def everything(tiny, folder, earlier):
    """Write what was found to `folder/found.json`; `earlier` holds the stopped run of another number of processes."""
    join("cpu")
    found = {"rank and shares": gathered((rank(), list(my_share(range(5))))), "whole": whole(my_share("abcde"))}
    rng = np.random.default_rng(0)
    prompts = [[0, *map(int, rng.integers(1, 512, n))] for n in rng.integers(1, 40, 30)]
    found["samples"] = sample_completions(load_model(tiny), prompts, 3, eos_token_id=17, max_new_tokens=9, seed=3, rows=16)
    found["losses"] = losses(tiny)
    found["stopped"] = stopped(tiny, folder / "stopped")
    if earlier:
        found["resumed"] = resumed(tiny, earlier)
    experiment.load_imdb = made_up_reviews
    found["status"] = main(["train", "--model", tiny, "--out", str(folder / "run"), "--precision", "float32", *SMALL])
    if is_main():
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    everything(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
