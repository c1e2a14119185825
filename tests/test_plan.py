"""The plan against what a run does.

Tokens counted one by one, FLOPs by torch's counter, bytes of the tensors themselves.
"""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_lab import evaluate, loop, preferences
from dpo_lab.batching import completion_batch
from dpo_lab.cli import main
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.logprobs import completion_logps, logit_path
from dpo_lab.loop import LoopConfig
from dpo_lab.models import load_model, lora
from dpo_lab.preferences import Preferences
from dpo_lab.sampling import rows_on, sample_completions, sample_with_logps
from dpo_lab.sentiment import cost as planning
from dpo_lab.sentiment import run as experiment
from dpo_lab.sentiment import task as task_steps
from dpo_lab.sentiment.cost import (
    Job,
    Plan,
    Speed,
    forward_flops,
    plan,
    sampling_flops,
    training_flops,
)
from dpo_lab.sentiment.run import ExperimentConfig
from dpo_lab.sentiment.task import Task, TaskConfig
from dpo_lab.train import DPOConfig

PROMPTS = [[0, 5], [0, 9, 4, 2, 7], [0, 3, 3], [0, 8, 1, 6]]


def counted(work):
    """FLOPs by torch's counter, which knows the attention that is written out as matmuls."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def padded_batch(lengths=(20, 20, 20, 20)):
    return completion_batch(PROMPTS, [[1] * n for n in lengths], range(4), compact=True)


def shared_batch():
    return completion_batch(
        [list(range(30))] * 2, [[1] * 20 for _ in range(8)], [0] * 4 + [1] * 4, compact=True
    )


@pytest.mark.parametrize(
    "batch",
    [padded_batch(), padded_batch((20, 3, 9, 20)), shared_batch()],
    ids=["padded", "packed", "shared"],
)
def test_flops_are_those_that_torch_counts(model, batch):
    with torch.no_grad():
        assert forward_flops(model, batch) == pytest.approx(
            counted(lambda: completion_logps(model, batch)), rel=0.1
        )
    work = counted(lambda: completion_logps(model, batch).sum().backward())
    assert training_flops(model, batch, DPOConfig(), "float32") == pytest.approx(work, rel=0.1)


def test_flops_with_blocks_that_are_computed_again(model):
    with loop.checkpointed(loop.blocks_of(model)):
        work = counted(lambda: completion_logps(model, padded_batch()).sum().backward())
    again = DPOConfig(loop=LoopConfig(gradient_checkpointing=True))
    assert training_flops(model, padded_batch(), again, "float32") == pytest.approx(work, rel=0.1)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("again", [False, True])
def test_flops_of_adapters_leave_out_the_gradients_of_the_frozen_weights(again, layers):
    asked = DPOConfig(loop=LoopConfig(gradient_checkpointing=again))
    few = replace(asked, lora_rank=4, lora_layers=layers)
    config = GPT2Config(
        vocab_size=64, n_embd=64, n_layer=6, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(config).eval()
    expected = training_flops(model, padded_batch(), few, "float32")
    most = 0.65 if layers else 0.85
    assert expected < most * training_flops(model, padded_batch(), asked, "float32")
    with (
        lora(model, 4, layers=layers) as adapted,
        loop.checkpointed(loop.blocks_of(adapted) if again else []),
    ):
        logit_path(adapted)  # which computes a few tokens, once
        assert expected == pytest.approx(
            counted(lambda: completion_logps(adapted, padded_batch()).sum().backward()), rel=0.1
        )


def test_flops_with_logits_that_are_computed_again(model, monkeypatch):
    monkeypatch.setattr("dpo_lab.engine.lm_head.STORED_LOGITS_BYTES", 0)
    work = counted(lambda: completion_logps(model, padded_batch()).sum().backward())
    assert training_flops(model, padded_batch(), DPOConfig(), "float32") == pytest.approx(
        work, rel=0.1
    )


def test_flops_of_sampling_are_those_that_torch_counts(model, monkeypatch):
    # torch counts what its own thread does, and not the products with prepacked weights
    monkeypatch.setattr("dpo_lab.sampling.parallel_map", map)
    monkeypatch.setattr("dpo_lab.sampling.PREPACKING_PAYS", 1_000)
    work = counted(
        lambda: sample_completions(model, PROMPTS, 3, eos_token_id=-1, max_new_tokens=20)
    )
    assert sum(3 * sampling_flops(model, len(ids), 20) for ids in PROMPTS) == pytest.approx(
        work, rel=0.1
    )


def n_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    "optimizer, rank, layers",
    [
        ("adamw", 0, 0),
        ("rmsprop", 0, 0),
        ("muon", 0, 0),
        ("adamw", 3, 0),
        ("rmsprop", 3, 0),
        ("adamw", 3, 1),
    ],
)
def test_bytes_of_weights_gradients_and_optimizer_are_those_after_a_step(
    tiny, optimizer, rank, layers
):
    model, kept = load_model(str(tiny)), []
    config = DPOConfig(lora_rank=rank, lora_layers=layers, loop=LoopConfig(optimizer=optimizer))
    made = plan(model, PROMPTS, config, completions=4, max_new_tokens=8, eval_prefixes=8).training
    assert made["weights"] == 2 * n_bytes(model.parameters()) and ("adapters" in made) is bool(rank)
    with lora(model, rank, layers=layers) if rank else nullcontext(model) as policy:
        completion_logps(policy, padded_batch()).sum().backward()
        trained = [p for p in policy.parameters() if p.requires_grad]
        for one in loop.make_optimizers(policy, config.loop):
            one.step()
            kept += [
                t
                for values in one.state.values()
                for t in values.values()
                if isinstance(t, torch.Tensor)
            ]
        assert (
            made["gradients"]
            == n_bytes(p.grad for p in trained)
            == made.get("adapters", made["gradients"])
        )
        assert made["optimizer"] == n_bytes(kept)


def test_activations_grow_with_the_batch_as_those_of_a_batch_of_its_size(model):
    batch = completion_batch(PROMPTS, [[1] * 40 for _ in range(16)], list(range(4)) * 4)
    direct = planning.saved_bytes(model, batch, "float32")
    assert planning.activation_bytes(model, batch, padded_batch(), "float32") == pytest.approx(
        direct, rel=0.05
    )
    with loop.checkpointed(loop.blocks_of(model)):
        inputs = planning.saved_bytes(model, batch, "float32")
    again = planning.activation_bytes(model, batch, padded_batch(), "float32", again=True, blocks=2)
    assert again == pytest.approx(inputs + direct / 2, rel=0.05) and inputs < direct / 5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_keep_inputs_of_their_own_and_leave_the_model_as_it_was(model, precision):
    batch, before = (
        completion_batch(PROMPTS, [[1] * 40 for _ in range(16)], list(range(4)) * 4),
        weights_hash(model),
    )
    with lora(model, 4) as adapted:
        kept = planning.saved_bytes(adapted, batch, precision)
    made = [
        planning.training_bytes(model, batch, padded_batch(), DPOConfig(lora_rank=rank), precision)[
            "activations"
        ]
        for rank in (4, 0)
    ]
    assert made[0] == pytest.approx(kept, rel=0.05) and made[0] != made[1]
    assert weights_hash(model) == before and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_that_waits_in_bfloat16_is_counted(tiny, dtype):
    model, batch = load_model(str(tiny)).to(dtype), padded_batch()
    head = model.get_output_embeddings().weight
    copies = []

    def note(tensor):
        if tensor.shape == head.shape and tensor.data_ptr() != head.data_ptr():
            copies.append(tensor.nbytes)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        completion_logps(model, batch)
    narrow, wide = (
        planning.training_bytes(model, batch, padded_batch(), DPOConfig(), precision)["logits"]
        - planning._logits_bytes(model, batch, precision)
        for precision in ("bfloat16", "float32")
    )
    assert narrow - wide == sum(copies)
    assert len(copies) == (dtype == torch.float32)


@pytest.mark.usefixtures("made_up_reviews")
def test_tokens_are_those_that_a_run_handles_when_no_completion_ends(
    tiny, tmp_path, monkeypatch, capsys
):
    counts = {"sampled": 0, "scored": 0, "trained": 0}

    def endless(sampling):
        def sample(*arguments, **options):
            found = sampling(*arguments, **{**options, "eos_token_id": -1})
            completions = found[0] if sampling is sample_with_logps else found
            counts["sampled"] += sum(len(ids) for row in completions for ids in row)
            return found

        return sample

    def score(model, prompts, completions, *rest, **options):
        counts["scored"] += sum(map(len, completions))
        return scoring(model, prompts, completions, *rest, **options)

    def gradient(scoring, micros, objective):
        counts["trained"] += sum(micro.tokens for micro in micros)
        return backward(scoring, micros, objective)

    def judge(texts):
        # no ties, which would leave completions out
        return np.random.default_rng(len(texts)).random(len(texts))

    scoring, backward = preferences.score_completions, loop._backward
    for module in (evaluate, task_steps):
        monkeypatch.setattr(module, "sample_completions", endless(sample_completions))
    monkeypatch.setattr(task_steps, "sample_with_logps", endless(sample_with_logps))
    for module in (evaluate, experiment, preferences):
        monkeypatch.setattr(module, "score_completions", score)
    monkeypatch.setattr(loop, "_backward", gradient)
    monkeypatch.setattr(task_steps.SentimentReward, "tfidf", lambda texts, labels: judge)
    task = TaskConfig(
        model=str(tiny), prefixes=12, eval_prefixes=40, max_new_tokens=8, precision="float32"
    )
    config = ExperimentConfig(
        task, DPOConfig(batch_pairs=20, epochs=2, loop=LoopConfig(eval_every=3))
    )
    summary = experiment.train(config, tmp_path / "run")
    made = experiment.plan_run(config, tmp_path / "elsewhere")
    assert f"{'train':<10}{counts['trained']:>14,}" in capsys.readouterr().out
    found = Preferences.load(tmp_path / "run" / "data" / "preferences")
    assert summary["pairs"] == 6 * 12 and counts["trained"] == made.tokens["train"]
    again = 2 * 8 * 8  # the spot checks of stored log-probs
    assert made.tokens["sample"] == sum(map(len, found.completions))
    assert (
        made.tokens["sample"] + made.tokens["evaluate"] + again
        == counts["sampled"] + counts["scored"]
    )


@pytest.mark.usefixtures("made_up_reviews")
def test_sft_is_planned_as_it_is_done(tiny, tmp_path, monkeypatch):
    """Rows as SFT reads them, their tokens if all are full, FLOPs in proportion, its own memory."""
    task = TaskConfig(
        model=str(tiny),
        prefixes=12,
        eval_prefixes=40,
        max_new_tokens=8,
        precision="float32",
        sft_epochs=2,
    )
    config, read = ExperimentConfig(task, DPOConfig(batch_pairs=20)), []
    made = experiment.plan_run(config, tmp_path / "run")
    plain = replace(config, task=replace(task, sft_epochs=0))
    without = experiment.plan_run(plain, tmp_path / "run")
    opened = Task.open(task, tmp_path / "data")
    batch, batches = opened.planned_sft()
    backward = loop._backward
    monkeypatch.setattr(
        loop,
        "_backward",
        lambda scoring, micros, objective: (
            read.extend(micros) or backward(scoring, micros, objective)
        ),
    )
    reference = opened.reference
    assert batches * batch.n == sum(micro.n for micro in read)
    assert made.tokens == {"SFT": batch.tokens * batches} | without.tokens
    per_token = made.flops["SFT"] / made.tokens["SFT"]
    assert per_token == pytest.approx(
        planning.training_flops(reference, read[0], DPOConfig(), "float32") / read[0].tokens,
        rel=0.1,
    )
    assert (
        not without.tuning
        and made.tuning["activations"] > 0
        and "SFT, MB" in str(made)
        and "SFT" not in str(without)
    )
    assert replace(made, tuning=made.tuning | {"logits": 10**13}).peak > 10**13


def made_up_speed(**changes):
    speed = Speed(
        1e9, 0.5e9, training=2e9, tuning=3e9, scoring=4e9, scoring_during=5e9, labeling=0.01
    )
    return replace(speed, **changes)


def test_as_many_prompts_are_taken_as_there_is_time_for(model):
    job = Job(model, PROMPTS * 50, DPOConfig(batch_pairs=20), 4, 8, 8)
    speed = made_up_speed()

    def seconds(n):
        return sum(planning.costs(replace(job, prompts=job.prompts[:n]), speed)[2].values())

    for time in (seconds(60), (seconds(60) + seconds(61)) / 2):
        assert planning.fitting_prompts(job, speed, time, least=10) == 60
    assert planning.fitting_prompts(job, speed, 0.0, least=10) == 10
    assert planning.fitting_prompts(job, speed, 1e9, least=10) == 200


def test_the_seconds_of_a_phase_are_its_flops_at_its_rate_and_the_labels(model):
    job = Job(model, PROMPTS * 5, DPOConfig(batch_pairs=20), 4, 8, 8)
    _, flops, seconds = planning.costs(job, made_up_speed())
    counts = planning.completions_of(job)
    assert counts.drawn == 80
    assert seconds["sample"] == pytest.approx(flops["sample"] / 1e9 + 0.01 * counts.drawn)
    assert seconds["train"] == pytest.approx(flops["train"] / 2e9)

    # two rates of sampling and of scoring, and the labels
    to_score = forward_flops(model, job.micro_batch) / job.micro_batch.n
    to_draw = flops["sample"] / counts.drawn
    expected = to_draw * (counts.sampled / 1e9 + counts.sampled_during / 0.5e9)
    expected += to_score * (counts.scored / 4e9 + counts.scored_during / 5e9)
    expected += 0.01 * (counts.sampled + counts.sampled_during)
    assert seconds["evaluate"] == pytest.approx(expected)


def test_memory_of_sampling_is_that_of_a_batch_on_each_thread(model, monkeypatch):
    """A batch is as large as the sampler makes it."""
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        job = Job(model, PROMPTS * 1_000, DPOConfig(), 4, 8, 8)
        sampling, _, _ = planning.memory(job)
        found.append(sampling["cache"])
    rows = rows_on(torch.device("cpu"))
    assert found[0] == planning.sampling_bytes(model, rows, 5 + 8, "float32")["cache"]
    assert found[1] == 3 * found[0]


def small_plan(**changes):
    numbers = dict.fromkeys(("sample", "train", "evaluate"), 1_000_000)
    parts = {"process": 10**9, "weights": 2 * 10**9}
    return replace(
        Plan(
            numbers,
            numbers,
            numbers,
            parts | {"cache": 10**9},
            parts | {"logits": 3 * 10**9},
            7 * 10**9,
        ),
        **changes,
    )


def test_the_peak_is_the_larger_phase_and_the_table_says_all_of_it():
    made = small_plan()
    assert made.peak == 6 * 10**9 and replace(made, sampling={"cache": 10**10}).peak == 10**10
    text = str(made)
    assert (
        "3,000,000" in text
        and "peak 6.0 GB, of 7.0 GB" in text
        and "logits 3,000" in text
        and len(text.splitlines()) == 8
    )
    assert "of unknown" in str(small_plan(available=None))
    made.check()
    small_plan(available=None).check()


def test_what_does_not_fit_is_refused_with_advice_and_nothing_is_written(
    tiny, tmp_path, monkeypatch, capsys, made_up_reviews
):
    with pytest.raises(
        ValueError,
        match=r"6\.0 GB .* 5\.9 GB.*smaller --model.*--batch-pairs.*--gradient-accumulation-steps"
        r".*checkpointing.*--lora-rank.*bfloat16",
    ):
        small_plan(available=59 * 10**8).check()
    monkeypatch.setattr(planning, "available_bytes", lambda device: 10**6)
    arguments = [
        "--model",
        str(tiny),
        "--out",
        str(tmp_path / "run"),
        "--prefixes=12",
        "--eval-prefixes=16",
        "--max-new-tokens=8",
    ]
    assert main(["train", *arguments]) == 2
    assert "this run needs about" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main(["plan", *arguments, "--resume"]) == 0
    assert "peak" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_memory_that_is_there_is_at_least_what_is_held():
    cpu = torch.device("cpu")
    held = planning.held_bytes(cpu)
    assert 10**8 < held < planning.available_bytes(cpu)


def test_no_prompts_are_named(model):
    with pytest.raises(ValueError, match="no prompts"):
        plan(model, [], DPOConfig(), completions=4, max_new_tokens=8, eval_prefixes=8)
