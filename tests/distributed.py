"""What tests/test_distributed.py compares.

One process does it, and the two that `accelerate launch --use_fsdp` starts.
"""

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

from dpo_lab.cli import main
from dpo_lab.engine import distributed as processes
from dpo_lab.engine.distributed import (
    all_gather,
    from_main,
    gather_shards,
    is_main,
    local_shard,
    rank,
    setup,
)
from dpo_lab.logprobs import can_compact
from dpo_lab.loop import Interrupted
from dpo_lab.models import ScalarModel, load_model
from dpo_lab.rlhf.reward_model import RewardModelConfig, train_reward_model
from dpo_lab.sampling import sample_completions
from dpo_lab.sentiment import task
from dpo_lab.train import sft_batches, train_dpo, train_sft, train_unlikelihood

LONG = replace(CONFIG, epochs=3)  # 6 steps
SMALL = (
    "--prefixes 180 --eval-prefixes 48 --max-new-tokens 8 --batch-pairs 90 --learning-rate 3e-3 "
    "--eval-every 4"
).split()


def made_up_reviews(source="package"):
    parts = {name: make_reviews(n, seed=n) for name, n in (("train", 200), ("test", 60))}
    return DatasetDict(
        {
            name: Dataset.from_dict({"text": t, "label": labels})
            for name, (t, labels) in parts.items()
        }
    )


def losses(tiny):
    """The metrics of every loss: equal, unequal and empty shares, with and without accumulation."""
    preferences = make_preferences(tiny)
    found = {}
    for name, config in {
        "dpo": CONFIG,
        "dpo, accumulated": replace(
            CONFIG, batch_pairs=9, loop=replace(LOOP, gradient_accumulation_steps=2)
        ),
        "dpo, a prompt a step": replace(CONFIG, batch_pairs=3, epochs=1),
        "dpo, muon": replace(CONFIG, loop=replace(LOOP, optimizer="muon")),
    }.items():
        found[name] = train_dpo(load_model(tiny), preferences, config, progress=None)
    found["unlikelihood"] = train_unlikelihood(
        load_model(tiny), preferences, 0.5, LOOP, batch_pairs=9, progress=None
    )
    for share in (True, False):
        policy = load_model(tiny)
        batches = sft_batches(
            preferences, 5, chosen_only=False, compact=share and can_compact(policy)
        )
        found[f"sft, share {share}"] = train_sft(policy, batches, len(batches), LOOP, progress=None)
    config = RewardModelConfig(batch_pairs=9, loop=LOOP)
    found["reward model"] = train_reward_model(
        ScalarModel(load_model(tiny)), preferences, config, progress=None
    )
    return {name: timeless(metrics) for name, metrics in found.items()}


def stopped(tiny, run):
    """What a run says that a SIGTERM to its last process stops after step 3."""

    def evaluate(model, step):
        if step == 3 and rank() == len(all_gather(None)) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    from_main(run.mkdir)
    try:
        train_dpo(
            load_model(tiny),
            make_preferences(tiny),
            LONG,
            run=run,
            callback=evaluate,
            progress=None,
        )
    except Interrupted as error:
        return str(error)


def finished(tiny, run=None):
    """Metrics and final weights of the run that was stopped in `run`, or of one that never was."""
    policy = load_model(tiny)
    options = {
        "run": run,
        "resume": run is not None,
        "callback": lambda model, step: {},
        "progress": None,
    }
    metrics = train_dpo(policy, make_preferences(tiny), LONG, **options)
    return {
        "metrics": timeless(metrics),
        "weights": [p.flatten()[::97].tolist() for p in policy.parameters()],
    }


def samples(tiny):
    rng = np.random.default_rng(0)
    prompts = [[0, *map(int, rng.integers(1, 512, n))] for n in rng.integers(1, 40, 30)]
    return sample_completions(
        load_model(tiny), prompts, 3, eos_token_id=17, max_new_tokens=9, seed=3, rows=16
    )


def train(tiny, out):
    return main(["train", "--model", tiny, "--out", str(out), "--precision", "float32", *SMALL])


def together(tiny, folder, earlier):
    """What each of the processes does; `earlier` holds a run that one process began."""
    setup("cpu")
    found = {
        "sharded": processes.sharding(),
        "shares": all_gather(local_shard([0, 1, 2, 3, 4])),
        "whole": gather_shards(local_shard("abcde")),
    }
    for kind, sharded in (("fsdp", "true"), ("ddp", "false")):
        os.environ[processes.SHARD] = sharded
        found[kind] = {
            "losses": losses(tiny),
            "stopped": stopped(tiny, folder / kind),
            "finished": finished(tiny, earlier / kind),
        }
    found["samples"] = samples(tiny)
    task.load_imdb = made_up_reviews
    found["status"] = train(tiny, folder / "run")
    if is_main():
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    together(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
