"""The loop against a textbook loop written out here; every way to stop it against not stopping."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_reviews
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from dpo_lab import loop, train
from dpo_lab.batching import completion_batch
from dpo_lab.engine import checkpoints
from dpo_lab.engine.runs import read_metrics
from dpo_lab.logprobs import completion_logps
from dpo_lab.loop import Interrupted, LoopConfig
from dpo_lab.models import load_model, load_tokenizer
from dpo_lab.preferences import from_scores
from dpo_lab.sampling import sample_completions
from dpo_lab.train import DPOConfig, sft_batches, train_dpo, train_sft, train_unlikelihood

LOOP = LoopConfig(learning_rate=1e-3, warmup_steps=2, eval_every=3, save_every=2)
CONFIG = DPOConfig(beta=0.5, epochs=2, batch_pairs=12, loop=LOOP)

LLAMA = LlamaConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=64,
)

score = loop.Scorer.forward


def make_preferences(tiny, prompts=8, k=3):
    tokenizer, model = load_tokenizer(str(tiny)), load_model(str(tiny))
    texts = make_reviews(prompts * k, seed=1)[0]
    ids = [tokenizer(text)["input_ids"][:30] for text in texts]
    heads = [row[:3] for row in ids[::k]]
    bodies = [[ids[i * k + j][3 : 10 + 5 * j] + [0] for j in range(k)] for i in range(prompts)]
    scores = np.random.default_rng(0).random((prompts, k))
    return from_scores(heads, bodies, scores, tokenizer, context=64).with_reference(model)


@pytest.fixture(scope="module")
def preferences(tiny):
    return make_preferences(tiny)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def timeless(lines):
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


def textbook_dpo(policy, preferences, config, seed):
    """AdamW on full logits, a live reference, a forward pass per side of a pair; all in float64."""
    reference = load_model(policy.name_or_path).double()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.loop.learning_rate, weight_decay=0.0
    )
    groups = preferences.linked_pairs()
    losses = []
    plan = train.plan_prompts(groups, config.epochs, config.batch_pairs, seed)
    for step, members in enumerate(plan, start=1):
        if step <= config.loop.warmup_steps:
            scale = step / config.loop.warmup_steps
        else:
            part = (step - config.loop.warmup_steps) / (len(plan) - config.loop.warmup_steps + 1)
            scale = 0.5 * (1 + math.cos(math.pi * part))
        for group in optimizer.param_groups:
            group["lr"] = config.loop.learning_rate * scale
        pair_losses = []
        for pair in (pair for g in members for pair in groups[g]):
            ratios = []
            for i in (preferences.chosen[pair], preferences.rejected[pair]):
                prompt, completion = (
                    preferences.prompts[preferences.prompt_of[i]],
                    preferences.completions[i],
                )
                ids = torch.tensor([prompt + completion])
                ratio = 0.0
                for model, sign in ((policy, 1), (reference, -1)):
                    logps = F.log_softmax(model(ids).logits[0, :-1], -1)
                    for t in range(len(prompt) - 1, ids.shape[1] - 1):
                        ratio = ratio + sign * logps[t, ids[0, t + 1]]
                ratios.append(ratio)
            pair_losses.append(-F.logsigmoid(config.beta * (ratios[0] - ratios[1])))
        loss = torch.stack(pair_losses).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.loop.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_train_dpo_equals_a_textbook_loop_in_float64(tiny, preferences):
    ours, theirs = load_model(str(tiny)).double(), load_model(str(tiny)).double()
    exact = replace(preferences, reference_logps=None).with_reference(
        load_model(str(tiny)).double()
    )
    metrics = train_dpo(ours, exact, CONFIG, seed=3, progress=None)
    losses = textbook_dpo(theirs, exact, CONFIG, seed=3)
    assert [line["loss"] for line in metrics] == pytest.approx(losses, abs=1e-9)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(a, b, atol=1e-8)


def test_at_step_zero_the_policy_is_the_reference(model, preferences):
    first = train_dpo(model, preferences, CONFIG, progress=None)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["rewards/chosen"]) < 1e-5 and abs(first["rewards/margins"]) < 1e-5
    assert first["gradient_weight/mean"] == pytest.approx(0.5, abs=1e-5)


def test_ties_count_one_half_in_the_accuracy(model, preferences, monkeypatch):
    def tied_logps(scorer, batch):
        return 0 * next(scorer.parameters()).double().sum() + torch.zeros(
            batch.n, dtype=torch.float64
        )

    monkeypatch.setattr(loop.Scorer, "forward", tied_logps)
    tied = replace(preferences, reference_logps=np.zeros(len(preferences.completions)))
    first = train_dpo(model, tied, CONFIG, progress=None)[0]
    assert first["rewards/margins"] == 0 and first["rewards/accuracies"] == 0.5


def test_training_raises_margins_and_reports_trl_names(model, preferences):
    metrics = train_dpo(model, preferences, replace(CONFIG, epochs=10), progress=None)
    assert metrics[-1]["rewards/margins"] > metrics[0]["rewards/margins"] + 0.1
    names = "loss rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen"
    names += " logps/rejected gradient_weight/mean grad_norm learning_rate tokens_per_second"
    assert set(names.split()) <= set(metrics[0])


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge", "robust"])
def test_accumulated_gradients_equal_the_large_batch(tiny, preferences, kind):
    results = []
    for accumulate in (1, 3):
        model = load_model(str(tiny)).double()
        exact = replace(preferences, reference_logps=None).with_reference(
            load_model(str(tiny)).double()
        )
        config = replace(
            CONFIG,
            loss_type=kind,
            batch_pairs=24,
            loop=replace(LOOP, gradient_accumulation_steps=accumulate, learning_rate=1e-4),
        )
        metrics = train_dpo(model, exact, config, progress=None)
        results.append(
            (
                state(model),
                [line["loss"] for line in metrics],
                [line["grad_norm"] for line in metrics],
            )
        )
    for name, tensor in results[0][0].items():
        assert torch.allclose(tensor, results[1][0][name], atol=1e-9), name
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-9)
    assert results[0][2] == pytest.approx(results[1][2], rel=1e-7)


def test_every_epoch_takes_every_pair_once_in_another_order(preferences):
    groups = preferences.linked_pairs()
    plan = train.plan_prompts(groups, CONFIG.epochs, CONFIG.batch_pairs, 0)
    per_epoch = len(plan) // 2
    for epoch in (plan[:per_epoch], plan[per_epoch:]):
        assert sorted(g for step in epoch for g in step) == list(range(len(groups)))
    assert plan[:per_epoch] != plan[per_epoch:] and plan != train.plan_prompts(
        groups, CONFIG.epochs, CONFIG.batch_pairs, 1
    )
    assert all(sum(len(groups[g]) for g in step) <= CONFIG.batch_pairs for step in plan)


@pytest.mark.parametrize("schedule, middle", [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_schedules_warm_up_and_decay(schedule, middle):
    config = LoopConfig(schedule=schedule, warmup_steps=10)
    assert [loop._schedule(s, 29, config) for s in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert loop._schedule(20, 29, config) == pytest.approx(middle)
    assert (loop._schedule(29, 29, config) > 0) and (
        schedule == "constant" or loop._schedule(29, 29, config) < 0.1
    )


def test_optimizers_are_the_asked_ones(model):
    kinds = {
        name: [type(o).__name__ for o in loop.make_optimizers(model, LoopConfig(optimizer=name))]
        for name in ("adamw", "rmsprop", "muon")
    }
    assert kinds == {"adamw": ["AdamW"], "rmsprop": ["RMSprop"], "muon": ["AdamW", "Muon"]}
    adamw, muon = loop.make_optimizers(model, LoopConfig(optimizer="muon"))
    count = sum(p.numel() for o in (adamw, muon) for g in o.param_groups for p in g["params"])
    assert count == sum(p.numel() for p in model.parameters())


def test_evaluation_comes_first_every_n_steps_and_last(model, preferences):
    seen = []
    train_dpo(
        model,
        preferences,
        CONFIG,
        progress=None,
        callback=lambda m, step: seen.append(step) or {"reward": 1.0},
    )
    steps = len(
        train.plan_prompts(preferences.linked_pairs(), CONFIG.epochs, CONFIG.batch_pairs, 0)
    )
    assert seen == sorted({0, *range(3, steps, 3), steps})
    seen.clear()
    config = replace(CONFIG, loop=replace(LOOP, eval_every=4))  # halved to 2 and 1
    train_dpo(
        model,
        preferences,
        config,
        progress=None,
        callback=lambda m, step: seen.append(step) or {"reward": 1.0},
    )
    assert seen == sorted({0, 1, 2, *range(4, steps, 4), steps})


def test_unlikelihood_minimizes_its_loss(model, preferences):
    p = preferences
    with torch.no_grad():
        before = completion_logps(model, completion_batch(p.prompts, p.completions, p.prompt_of))
    metrics = train_unlikelihood(
        model, p, 0.5, replace(LOOP, eval_every=100), epochs=8, batch_pairs=24, progress=None
    )
    expected = (before[p.rejected] / 2 - before[p.chosen]).mean()
    assert metrics[0]["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert metrics[0]["logps/chosen"] == pytest.approx(float(before[p.chosen].mean()), rel=1e-6)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1


def test_adapters_begin_at_the_reference_and_end_in_the_weights(tiny, preferences):
    policy, reference, inside = load_model(str(tiny)), load_model(str(tiny)), []

    def evaluate(model, step):
        batch = sft_batches(preferences, 6, compact=True)[0]
        inside[:] = [
            completion_logps(model, batch).detach(),
            {n for n, p in model.named_parameters() if p.requires_grad},
            batch,
        ]
        return {}

    config = replace(CONFIG, lora_rank=2, loop=replace(LOOP, learning_rate=1e-2))
    metrics = [
        m
        for m in train_dpo(policy, preferences, config, callback=evaluate, progress=None)
        if "loss" in m
    ]
    assert (
        metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        and abs(metrics[0]["rewards/margins"]) < 1e-5
    )
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.01
    logps, names, batch = inside
    assert len(names) == 2 * 2 * 4 and all(".lora_" in name for name in names)
    torch.testing.assert_close(completion_logps(policy, batch).detach(), logps, rtol=0, atol=1e-4)
    moved = {
        name
        for name, p in policy.named_parameters()
        if not torch.equal(p, reference.get_parameter(name))
    }
    assert moved == {name for name, p in policy.named_parameters() if p.ndim == 2 and ".h." in name}
    assert state(policy).keys() == state(reference).keys() and all(
        p.requires_grad for p in policy.parameters()
    )


def test_adapters_depend_on_the_seed_alone(tiny, preferences):
    ends = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)
        policy = load_model(str(tiny))
        train_dpo(
            policy, preferences, replace(CONFIG, epochs=1, lora_rank=2), seed=seed, progress=None
        )
        ends.append(state(policy))
        assert torch.initial_seed() == noise
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_of_the_last_blocks_leave_those_below_as_they_were(family, tiny, preferences):
    policy = load_model(str(tiny)) if family == "gpt2" else LlamaForCausalLM(LLAMA)
    reference = copy.deepcopy(policy)
    preferences = replace(preferences, reference_logps=None).with_reference(reference)
    config = replace(CONFIG, lora_rank=2, lora_layers=1, loop=replace(LOOP, learning_rate=1e-2))
    blocks, trained_names = reference.config.num_hidden_layers, set()

    def look(model, step):
        trained_names.update(n for n, p in model.named_parameters() if p.requires_grad)
        return {}

    train_dpo(policy, preferences, config, callback=look, progress=None)
    assert blocks > 1 and trained_names
    assert all(f".{blocks - 1}." in name and ".lora_" in name for name in trained_names)
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, state(reference)[n])}
    last = {n for n in state(reference) if f".{blocks - 1}." in n}
    assert moved == {n for n in last if state(reference)[n].ndim == 2}


def test_adapters_of_as_many_blocks_as_there_are_or_more_are_adapters_of_all(tiny, preferences):
    ends = []
    for layers in (0, 2, 9):
        policy = load_model(str(tiny))
        config = replace(CONFIG, lora_rank=2, lora_layers=layers)
        train_dpo(policy, preferences, config, progress=None)
        ends.append(state(policy))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


@pytest.mark.parametrize(
    "rank, layers, optimizer, message",
    [
        (-1, 0, "adamw", "lora_rank is -1"),
        (2, 0, "muon", "'adamw' or 'rmsprop'"),
        (2, -1, "adamw", "lora_layers is -1; it must be 0"),
    ],
)
def test_adapters_that_cannot_be_are_named(model, preferences, rank, layers, optimizer, message):
    loop = replace(LOOP, optimizer=optimizer)
    config = replace(CONFIG, lora_rank=rank, lora_layers=layers, loop=loop)
    with pytest.raises(ValueError, match=message):
        train_dpo(model, preferences, config, progress=None)


def test_a_checkpoint_of_adapters_fits_adapters_only(tiny, preferences, tmp_path):
    train_dpo(
        load_model(str(tiny)),
        preferences,
        replace(CONFIG, lora_rank=2),
        run=tmp_path,
        progress=None,
    )
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert {p.name for p in newest.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    assert len(load_file(newest / "model.safetensors")) == 16
    with pytest.raises(ValueError, match="config.lora_rank: 2 there, 0 asked"):
        train_dpo(
            load_model(str(tiny)), preferences, CONFIG, run=tmp_path, resume=True, progress=None
        )
    policy, adapted = load_model(str(tiny)), state(load_model(str(tiny)))
    with pytest.raises(ValueError, match="holds another model .*Delete"):
        checkpoints.load_checkpoint(tmp_path, policy, [])
    assert same(state(policy), adapted)


def test_sft_minimizes_nats_per_completion_token(model, preferences):
    batches = sft_batches(preferences, 4)
    assert sum(b.n for b in batches) == len(preferences.chosen)
    assert sum(b.tokens for b in batches) == sum(
        len(preferences.completions[i]) for i in preferences.chosen
    )
    with torch.no_grad():
        logps = completion_logps(model, batches[0])
    metrics = train_sft(model, batches, 30, replace(LOOP, learning_rate=1e-2), progress=None)
    assert metrics[0]["loss"] == pytest.approx(float(-logps.sum() / batches[0].tokens), rel=1e-6)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5


@pytest.mark.parametrize(
    "optimizer, rank", [("adamw", 0), ("rmsprop", 0), ("muon", 0), ("adamw", 2)]
)
def test_a_run_stopped_at_any_step_resumes_to_the_same_bytes(
    tiny, preferences, tmp_path, optimizer, rank
):
    config = replace(CONFIG, lora_rank=rank, loop=replace(LOOP, optimizer=optimizer))

    def evaluate(model, step):
        return {"norm": float(sum(p.detach().abs().sum() for p in model.parameters()))}

    whole = load_model(str(tiny))
    (tmp_path / "whole").mkdir()
    expected = timeless(
        train_dpo(
            whole, preferences, config, run=tmp_path / "whole", callback=evaluate, progress=None
        )
    )
    steps = expected[-1]["step"]
    for stop_after in range(1, steps):
        run = tmp_path / f"stopped-{stop_after}"
        run.mkdir()

        class Killed(BaseException):
            pass

        original = loop.append_metrics

        def dies(directory, line, stop_after=stop_after, original=original, Killed=Killed):
            original(directory, line)
            if line["step"] == stop_after:
                raise Killed

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(loop, "append_metrics", dies)
            train_dpo(
                load_model(str(tiny)),
                preferences,
                config,
                run=run,
                callback=evaluate,
                progress=None,
            )
        resumed = load_model(str(tiny))
        metrics = train_dpo(
            resumed, preferences, config, run=run, resume=True, callback=evaluate, progress=None
        )
        assert same(state(resumed), state(whole)), stop_after
        assert timeless(metrics) == timeless(read_metrics(run)) == expected
        last = f"checkpoints/step-{steps:08d}"
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            assert (run / last / name).read_bytes() == (
                tmp_path / "whole" / last / name
            ).read_bytes()


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_train import CONFIG, make_preferences
from dpo_lab import loop, train
from dpo_lab.models import load_model
append = loop.append_metrics
def slow(run, line):
    append(run, line)
    time.sleep(0.2)
loop.append_metrics = slow
preferences = make_preferences(sys.argv[2])
for run in map(Path, sys.argv[3:]):
    try:
        train.train_dpo(load_model(sys.argv[2]), preferences, CONFIG, run=run, progress=None)
    except loop.Interrupted as error:
        print(error, flush=True)
"""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)  # the last one ends the process


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory):
    """A process's run for each signal, which it got after three steps, and what it said."""
    runs = {number: tmp_path_factory.mktemp(number.name) for number in SIGNALS}
    command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), tiny, *runs.values()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for number, run in runs.items():
        while len(read_metrics(run)) < 3 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
    said = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == -signal.SIGKILL, said
    return runs, said


def test_a_signal_that_can_be_caught_says_how_to_go_on(killed):
    _, said = killed
    assert len(said) == 2 and all("--resume" in line for line in said)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_killed_process_resumes_to_the_same_bytes(tiny, preferences, killed, number):
    run = killed[0][number]
    resumed, whole = load_model(str(tiny)), load_model(str(tiny))
    metrics = train_dpo(resumed, preferences, CONFIG, run=run, resume=True, progress=None)
    expected = train_dpo(whole, preferences, CONFIG, progress=None)
    assert same(state(resumed), state(whole))
    assert timeless(metrics) == timeless(expected)


def test_control_c_stops_between_steps_and_leaves_a_checkpoint(model, preferences, tmp_path):
    handler = signal.getsignal(signal.SIGINT)  # none, if the tests run in a shell's background

    def evaluate(model, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    with pytest.raises(Interrupted, match="after step 3 .* --resume"):
        train_dpo(model, preferences, CONFIG, run=tmp_path, callback=evaluate, progress=None)
    assert (tmp_path / "checkpoints/step-00000003/state.json").exists()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_full_disk_keeps_the_last_checkpoint_and_nothing_half(
    tiny, preferences, tmp_path, monkeypatch
):
    save, calls = checkpoints.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            save(tensors, path)
            with open(
                "/dev/full" if os.path.exists("/dev/full") else path, "wb", buffering=0
            ) as device:
                device.write(b"x")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="no space left to write .*step-00000004.*--resume"):
        train_dpo(load_model(str(tiny)), preferences, CONFIG, run=tmp_path, progress=None)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    resumed, whole = load_model(str(tiny)), load_model(str(tiny))
    train_dpo(resumed, preferences, CONFIG, run=tmp_path, resume=True, progress=None)
    train_dpo(whole, preferences, CONFIG, progress=None)
    assert same(state(resumed), state(whole))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_model_untouched(
    model, preferences, tmp_path, name, damage
):
    train_dpo(model, preferences, CONFIG, run=tmp_path, progress=None)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1] / name
    content = bytearray(newest.read_bytes())
    if damage == "missing":
        newest.unlink()
    elif damage == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        newest.write_bytes(content)
    fresh = load_model(model.name_or_path)
    before = state(fresh)
    with pytest.raises(ValueError, match="step-.*Delete .* to continue"):
        train_dpo(fresh, preferences, CONFIG, run=tmp_path, resume=True, progress=None)
    assert same(before, state(fresh))


def test_missing_reference_log_probs_are_named(model, preferences):
    with pytest.raises(ValueError, match="reference_logps.*with_reference"):
        train_dpo(model, replace(preferences, reference_logps=None), CONFIG, progress=None)


def test_a_bad_beta_stops_before_anything_is_written(model, preferences, tmp_path):
    with pytest.raises(ValueError, match="beta is -1"):
        train_dpo(model, preferences, replace(CONFIG, beta=-1), run=tmp_path / "run", progress=None)
    assert not (tmp_path / "run").exists()


def test_divergence_is_an_error_that_names_the_cause(model, preferences):
    with pytest.raises(ValueError, match="learning.rate"):
        train_dpo(
            model,
            preferences,
            replace(CONFIG, epochs=4, loop=replace(LOOP, learning_rate=1e30)),
            progress=None,
        )


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_a_log_prob_that_is_not_finite_is_named_by_its_completion(
    model, preferences, monkeypatch, loss_type
):
    """Where the loss and its gradient would be finite too: the rejected one is impossible."""
    score = loop.Scorer.forward

    def impossible(self, batch):
        logps = score(self, batch).clone()
        logps[-1] = -torch.inf
        return logps

    monkeypatch.setattr(loop.Scorer, "forward", impossible)
    config = replace(CONFIG, loss_type=loss_type)
    with pytest.raises(ValueError, match=r"policy_logps\[\d+\] \(.*of pair \d+\) is -inf"):
        train_dpo(model, preferences, config, progress=None)


def test_bfloat16_training_follows_float32(tiny, preferences):
    """The policy is computed in the reference's precision, so the loss starts at log 2 in both."""
    curves = []
    for precision in ("float32", "bfloat16"):
        policy = load_model(str(tiny))
        scored = preferences.with_reference(policy, precision=precision)
        assert scored.reference_precision == precision
        curves.append([line["loss"] for line in train_dpo(policy, scored, CONFIG, progress=None)])
        assert curves[-1][0] == pytest.approx(
            math.log(2), abs={"float32": 1e-6, "bfloat16": 1e-3}[precision]
        )
    assert curves[0] == pytest.approx(curves[1], abs=0.05) and curves[0] != curves[1]


def test_tensorboard_gets_the_metrics_on_request(model, preferences, tmp_path):
    train_dpo(
        model,
        preferences,
        replace(CONFIG, loop=replace(LOOP, tensorboard=True)),
        run=tmp_path,
        progress=None,
    )
    events = list((tmp_path / "tensorboard").rglob("events*"))
    assert events and sum(e.stat().st_size for e in events) > 1000


def make_opt(folder):
    """OPT's blocks switch dropout on by their own flag, not by that of a Dropout inside them."""
    config = OPTConfig(
        vocab_size=512,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        dropout=0.5,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    return load_model(str(folder))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("share", [False, True])
def test_checkpointing_computes_every_block_twice_and_the_same_gradient(
    tiny, preferences, tmp_path, family, share
):
    model = load_model(str(tiny)) if family == "gpt2" else make_opt(tmp_path)
    batch = sft_batches(preferences, 6, chosen_only=False, compact=share and family == "gpt2")[0]
    entered, gradients = [], []
    blocks = loop.blocks_of(model)
    for block in blocks:
        first = next(m for m in block.modules() if isinstance(m, torch.nn.LayerNorm))
        first.register_forward_pre_hook(lambda *a: entered.append(1))
    for some in ([], blocks):
        with loop.checkpointed(some):
            loss = completion_logps(model, batch).sum()
            assert len(entered) == len(blocks) == 2
            gradients.append(torch.autograd.grad(loss, model.parameters(), allow_unused=True))
        assert len(entered) == (4 if some else 2)
        entered.clear()
    for a, b in zip(*gradients):
        assert (a is None) is (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(a.abs().max()))
    assert not any("forward" in vars(block) for block in blocks)


def test_a_checkpointed_run_is_the_same_run(tiny, preferences):
    """Evaluations sample with a cache meanwhile."""
    runs, texts = [], []

    def evaluate(model, step):
        texts.append(sample_completions(model, [[0, 5, 9]], 4, eos_token_id=0, max_new_tokens=8))
        return {}

    for again in (False, True):
        config = replace(CONFIG, loop=replace(LOOP, gradient_checkpointing=again))
        runs.append(
            [
                m["loss"]
                for m in train_dpo(load_model(str(tiny)), preferences, config, callback=evaluate)
                if "loss" in m
            ]
        )
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]


def test_a_model_without_blocks_cannot_be_checkpointed():
    with pytest.raises(ValueError, match="gradient_checkpointing is on, and Linear has no blocks"):
        loop.blocks_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_does_not_fit_is_redone_in_smaller_parts(
    tiny, preferences, tmp_path, monkeypatch, where
):
    """Memory for 5 completions at once: the batch goes in four parts, the gradient is the same."""
    config, asked = replace(CONFIG, loop=replace(LOOP, gradient_accumulation_steps=4)), []
    theirs = load_model(str(tiny))
    expected = train_dpo(theirs, preferences, config, progress=None)

    def scarce(scorer, batch):
        asked.append(batch.n)
        if batch.n > 5 and where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory")
        logps = score(scorer, batch)
        if batch.n > 5:
            logps.register_hook(full)
        return logps

    def full(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop.Scorer, "forward", scarce)
    ours = load_model(str(tiny))
    metrics = train_dpo(ours, preferences, CONFIG, run=tmp_path, progress=None)
    assert max(asked) > 5 and sum(n > 5 for n in asked) <= 4
    assert metrics[0]["gradient_accumulation_steps"] == 4 and not any(
        "gradient_accumulation_steps" in line for line in metrics[1:]
    )
    assert [line["loss"] for line in metrics] == pytest.approx(
        [line["loss"] for line in expected], rel=1e-6
    )
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    asked.clear()
    for name in sorted((tmp_path / "checkpoints").iterdir())[1:]:
        shutil.rmtree(name)
    resumed = load_model(str(tiny))
    again = train_dpo(resumed, preferences, CONFIG, run=tmp_path, resume=True, progress=None)
    assert (
        max(asked) <= 5
        and same(state(resumed), state(ours))
        and timeless(again) == timeless(metrics)
    )


def test_a_batch_that_cannot_be_split_further_is_an_error_that_loses_nothing(
    tiny, preferences, tmp_path, monkeypatch
):
    def scarce(scorer, batch):
        if steps and steps[-1] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(scorer, batch)

    steps, append = [], loop.append_metrics
    monkeypatch.setattr(
        loop, "append_metrics", lambda run, line: (steps.append(line["step"]), append(run, line))
    )
    monkeypatch.setattr(loop.Scorer, "forward", scarce)
    with pytest.raises(
        ValueError,
        match="step 4 does not fit in memory in 4 forward passes .*CUDA out of memory.*--resume",
    ):
        train_dpo(load_model(str(tiny)), preferences, CONFIG, run=tmp_path, progress=None)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir())[-1] == "step-00000003"
    monkeypatch.undo()
    resumed, whole = load_model(str(tiny)), load_model(str(tiny))
    metrics = train_dpo(resumed, preferences, CONFIG, run=tmp_path, resume=True, progress=None)
    assert timeless(metrics) == timeless(train_dpo(whole, preferences, CONFIG, progress=None))
    assert same(state(resumed), state(whole))


def test_the_larger_accumulate_is_said_once(model, preferences, monkeypatch, capsys):
    def scarce(scorer, batch):
        if batch.n > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(scorer, batch)

    monkeypatch.setattr(loop.Scorer, "forward", scarce)
    train_dpo(
        model,
        preferences,
        replace(CONFIG, loop=replace(LOOP, gradient_accumulation_steps=2)),
        progress="DPO",
    )
    assert (
        capsys.readouterr().out.count(
            "out of memory at step 1; from here on gradient_accumulation_steps is 4"
        )
        == 1
    )


class Asked(TorchDispatchMode):
    """Counts how often the value of a tensor is asked for, which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("method", ["DPO", "SFT"])
def test_a_step_asks_for_no_value_before_its_end(model, preferences, monkeypatch, method):
    """As on a GPU, where the loss does not look at its arguments: metrics are read at once, after
    the last backward pass."""
    asked, backward = [], loop._backward

    def watched(*arguments):
        with Asked() as mode:
            result = backward(*arguments)
        asked.append(mode.count)
        return result

    # at the first call the model is compared with itself
    completion_logps(model, completion_batch([[0]], [[0]], [0]))
    monkeypatch.setattr(loop, "_backward", watched)
    look = train.check_finite
    monkeypatch.setattr(
        train, "check_finite", lambda name, *rest: name == "policy_logps" or look(name, *rest)
    )
    if method == "DPO":
        lines = train_dpo(model, preferences, CONFIG, progress=None)
    else:
        lines = train_sft(model, sft_batches(preferences, 4), 3, LOOP, progress=None)
    assert (
        asked == [0] * len(lines)
        and len(lines) > 1
        and all(math.isfinite(line["loss"]) for line in lines)
    )


def test_metrics_are_json_lines(model, preferences, tmp_path):
    train_dpo(model, preferences, CONFIG, run=tmp_path, progress=None)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))


@pytest.mark.parametrize("used", [True, False])
def test_a_reference_log_prob_that_is_not_finite_is_named_if_a_pair_uses_it(
    model, preferences, used
):
    """Before the first step, since the reference does not change."""
    spoiled = preferences.reference_logps.copy()
    spoiled[preferences.rejected[1]] = -np.inf
    found = replace(preferences, reference_logps=spoiled)
    if not used:
        kept = [
            pair
            for pair, both in enumerate(zip(found.chosen, found.rejected))
            if preferences.rejected[1] not in both
        ]
        found = found.select(kept)
        assert train_dpo(model, found, CONFIG, progress=None)
        return
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"reference_logps\[\d+\] .*rejected of pair .* is -inf"):
        train_dpo(model, found, CONFIG, progress=None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
