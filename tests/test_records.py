"""No sequence of runs, interruptions, moves and resumes gives weights that no record explains."""

import copy
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from dpo_lab.batching import completion_batch
from dpo_lab.engine.records import locked
from dpo_lab.engine.runs import open_run
from dpo_lab.loop import Interrupted, LoopConfig
from dpo_lab.preferences import Preferences
from dpo_lab.sentiment import pretrain, task
from dpo_lab.sentiment import run as experiment
from dpo_lab.sentiment import sweep as frontier
from dpo_lab.sentiment.pretrain import PretrainConfig
from dpo_lab.sentiment.run import ExperimentConfig
from dpo_lab.sentiment.sweep import FrontierConfig
from dpo_lab.train import DPOConfig, train_dpo, train_sft

LOOP = LoopConfig(learning_rate=1e-2, warmup_steps=1, schedule="linear", eval_every=1, save_every=2)
DPO = DPOConfig(beta=0.1, epochs=3, batch_pairs=1, loop=LOOP)
STEPS = 6


@functools.cache
def base_model(seed=0):
    set_seed(seed)
    config = GPT2Config(
        vocab_size=32,
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).eval()


def base_preferences():
    prompts, completions = [[1, 2], [3]], [[4, 5, 0], [6, 0], [7, 8, 0], [9, 0]]
    ends = {
        "prompt_of": np.array([0, 0, 1, 1]),
        "chosen": np.array([0, 2]),
        "rejected": np.array([1, 3]),
    }
    return Preferences(prompts, completions, **ends).with_reference(base_model())


P = base_preferences()
DATA = {
    "pairs": P,
    "turned round": replace(P, chosen=P.rejected, rejected=P.chosen),
    "other tokens": replace(P, completions=[*P.completions[:-1], [10, 0]]),
    "other reference": replace(P, reference_logps=P.reference_logps - np.arange(4)),
}
CONFIGS = {
    "dpo": DPO,
    "another beta": replace(DPO, beta=1.0),
    "a lower rate": replace(DPO, loop=replace(LOOP, learning_rate=5e-3)),
    "rmsprop": replace(DPO, loop=replace(LOOP, optimizer="rmsprop")),
    "fewer epochs": replace(DPO, epochs=2),
    "adapters": replace(DPO, lora_rank=2),
    "more adapters": replace(DPO, lora_rank=3),
}


@dataclass(frozen=True)
class Job:
    """Everything that decides the weights of a run."""

    config: str = "dpo"
    data: str = "pairs"
    seed: int = 0
    weights: int = 0

    @property
    def adapters(self):
        return CONFIGS[self.config].lora_rank > 0

    @property
    def steps(self):
        return 2 * CONFIGS[self.config].epochs


def trained(job, model=None, **options):
    model = copy.deepcopy(base_model(job.weights)) if model is None else model
    train_dpo(model, DATA[job.data], CONFIGS[job.config], seed=job.seed, progress=None, **options)
    return model


@functools.cache
def expected(job):
    """The weights of the job when nothing stops it and nothing is written."""
    return bytes_of(trained(job))


def bytes_of(model):
    return b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


class Killed(BaseException):
    pass


def stopper(step, how):
    """An evaluation that ends the run after `step`: "kill" at once, "ctrl-c" with a checkpoint."""

    def evaluate(model, now):
        if now == step and how == "kill":
            raise Killed
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    return evaluate


# most of the time the job that is there already, so that long histories of one run come about
jobs = st.one_of(
    st.just(Job()),
    st.sampled_from([Job(config) for config in CONFIGS]),
    st.sampled_from([Job(data=name) for name in DATA]),
    st.builds(
        Job, st.sampled_from(["dpo", "adapters"]), seed=st.integers(0, 1), weights=st.integers(0, 1)
    ),
)
stops = st.one_of(st.none(), st.tuples(st.integers(1, STEPS), st.sampled_from(["kill", "ctrl-c"])))


class Runs(RuleBasedStateMachine):
    """A run directory, and beside it what it holds: the job, and the steps of its checkpoints."""

    def __init__(self):
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.folder, self.moves = Path(self.temporary.name) / "run", 0
        self.job, self.checkpoints, self.damaged, self.model = None, [], False, None

    def teardown(self):
        self.temporary.cleanup()

    def refuses(self, job, resume, moved):
        """Whether a call must be refused; `moved`: the model was trained since it was loaded."""
        metrics = self.folder / "metrics.jsonl"
        if self.job is None:  # there is no record
            return bool(self.checkpoints) or metrics.exists() and metrics.stat().st_size > 0
        if not resume:
            return bool(self.checkpoints)
        # the checkpoint's weights replace those that are given
        replaced = bool(self.checkpoints) and not job.adapters
        same = self.job == (replace(job, weights=self.job.weights) if replaced else job)
        return not same or (moved and not replaced) or (self.damaged and bool(self.checkpoints))

    def attempt(self, job, stop, *, resume, model=None):
        """Train; the weights are the job's, or it was stopped, or refused and all is unchanged."""
        model = copy.deepcopy(base_model(job.weights)) if model is None else model
        given = bytes_of(model)
        refused = self.refuses(job, resume, given != bytes_of(base_model(job.weights)))
        goes_on = resume and self.job is not None and bool(self.checkpoints)
        before = contents(self.folder) if self.folder.exists() else {}
        options = {
            "run": self.folder,
            "resume": resume,
            "callback": stopper(*stop) if stop else None,
        }
        try:
            trained(job, model, **options)
        except ValueError as error:
            assert refused, error
            assert contents(self.folder) == before and bytes_of(model) == given
            return
        except (Killed, Interrupted):
            assert not refused and stop
        else:
            assert not refused
            assert bytes_of(model) == expected(self.job if goes_on else job)
        assert not list(self.folder.glob("*.lock"))
        self.job, self.model = self.job if goes_on else job, model
        self.checkpoints = sorted(
            int(path.name[5:]) for path in (self.folder / "checkpoints").glob("step-*")
        )

    @rule(job=jobs, stop=stops)
    def start(self, job, stop):
        self.attempt(job, stop, resume=False)

    @rule(stop=stops)
    def go_on(self, stop):
        self.attempt(self.job or Job(), stop, resume=True)

    @rule(job=jobs, stop=stops)
    def go_on_with(self, job, stop):
        self.attempt(job, stop, resume=True)

    @precondition(lambda self: self.job and self.model)
    @rule(stop=stops)
    def go_on_with_the_model_in_memory(self, stop):
        self.attempt(self.job, stop, resume=True, model=self.model)

    @rule()
    def move(self):
        self.moves += 1
        target = self.folder.parent / f"moved {self.moves}" / "run"
        target.parent.mkdir(parents=True)
        if self.folder.exists():
            shutil.move(self.folder, target)
        self.folder = target

    @precondition(lambda self: self.checkpoints)
    @rule()
    def delete_the_newest(self):
        shutil.rmtree(self.folder / "checkpoints" / f"step-{self.checkpoints.pop():08d}")
        self.damaged = False

    @precondition(lambda self: self.checkpoints)
    @rule(
        name=st.sampled_from(["model.safetensors", "optimizer.safetensors", "state.json"]),
        at=st.floats(0, 1),
    )
    def damage_the_newest(self, name, at):
        path = self.folder / "checkpoints" / f"step-{self.checkpoints[-1]:08d}" / name
        path.write_bytes(path.read_bytes()[: int(at * (path.stat().st_size - 2))])
        self.damaged = True

    @precondition(lambda self: self.job)
    @rule()
    def lose_the_record(self):
        (self.folder / "training.json").unlink()
        self.job = None

    @rule()
    def begin_elsewhere(self):
        self.moves += 1
        self.folder = self.folder.parent / f"another {self.moves}"
        self.job, self.checkpoints, self.damaged = None, [], False


Runs.TestCase.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)
test_no_history_gives_weights_that_the_record_does_not_explain = Runs.TestCase


def test_a_directory_used_again_is_refused_and_its_checkpoints_kept(tmp_path):
    """The first run is longer, so its checkpoints have the higher steps."""
    trained(Job(), run=tmp_path / "run")
    before = contents(tmp_path)
    for job in (Job(), Job("fewer epochs")):
        with pytest.raises(
            ValueError,
            match=r"earlier run, the last one step-0*6\. .*resume=True .*another run directory"
            r".*delete",
        ):
            trained(job, run=tmp_path / "run")
    assert contents(tmp_path) == before
    assert bytes_of(trained(Job(), run=tmp_path / "run", resume=True)) == expected(Job())


@pytest.mark.parametrize(
    "other, named",
    [
        (Job("another beta"), r"config.beta: 0.1 there, 1.0 asked"),
        (Job("a lower rate"), r"config.loop.learning_rate: 0.01 there, 0.005 asked"),
        (Job("rmsprop"), r"config.loop.optimizer: 'adamw' there, 'rmsprop' asked"),
        (Job("fewer epochs"), r"config.epochs: 3 there, 2 asked"),
        (Job("adapters"), r"config.lora_rank: 0 there, 2 asked"),
        (Job(data="turned round"), r"\(data: "),
        (Job(data="other tokens"), r"\(data: "),
        (Job(data="other reference"), r"\(reference_logps: "),
        (Job(seed=1), r"seed: 0 there, 1 asked"),
    ],
)
def test_what_differs_from_the_record_is_named_in_a_line(tmp_path, other, named):
    trained(Job(), run=tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds another run .*{named}") as caught:
        trained(other, run=tmp_path, resume=True)
    assert contents(tmp_path) == before and len(str(caught.value)) < 500 + len(str(tmp_path))


def test_a_model_of_the_same_shapes_that_computes_otherwise_is_another_model(tmp_path):
    trained(Job(), run=tmp_path)
    for change in (
        lambda model: model.config.update({"n_head": 4}),
        lambda model: model.lm_head.requires_grad_(False),
    ):
        model = copy.deepcopy(base_model())
        model.config = copy.deepcopy(model.config)
        change(model)
        with pytest.raises(ValueError, match="holds another run .model: 'GPT2LMHeadModel "):
            trained(Job(), model, run=tmp_path, resume=True)


def test_adapters_go_on_only_on_the_weights_that_they_began_with(tmp_path):
    """A stopped run leaves them merged into the model in memory, which must not get them twice."""
    model = copy.deepcopy(base_model())
    with pytest.raises(Interrupted):
        trained(Job("adapters"), model, run=tmp_path, callback=stopper(2, "ctrl-c"))
    for some in (model, copy.deepcopy(base_model(1))):
        with pytest.raises(
            ValueError, match="frozen_weights: .* there, .* asked.*load the model again"
        ):
            trained(Job("adapters"), some, run=tmp_path, resume=True)
    assert bytes_of(trained(Job("adapters"), run=tmp_path, resume=True)) == expected(
        Job("adapters")
    )


def test_what_a_user_s_own_adapters_train_is_kept_whole(tmp_path):
    """Also weights that are trained beside the adapters and have names of their own."""

    def adapted():
        config = LoraConfig(
            r=2, target_modules=["c_attn"], modules_to_save=["c_proj"], fan_in_fan_out=True
        )
        set_seed(5)
        return get_peft_model(copy.deepcopy(base_model()), config).eval()

    with pytest.raises(Interrupted):
        trained(Job(), adapted(), run=tmp_path, callback=stopper(3, "ctrl-c"))
    whole, resumed = trained(Job(), adapted()), trained(Job(), adapted(), run=tmp_path, resume=True)
    assert bytes_of(resumed) == bytes_of(whole)


def test_weights_tied_by_their_memory_are_kept_once_and_come_back(tmp_path):
    """Neither by the name lm_head, nor as one and the same parameter."""

    def tied():
        model = copy.deepcopy(base_model())
        model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.data)
        model.register_buffer("part", model.transformer.wpe.weight.data[:2])
        return model

    with pytest.raises(Interrupted):
        trained(Job(), tied(), run=tmp_path, callback=stopper(3, "ctrl-c"))
    kept = load_file(tmp_path / "checkpoints" / "step-00000003" / "model.safetensors")
    assert "lm_head.weight" not in kept and "part" in kept
    assert bytes_of(trained(Job(), tied(), run=tmp_path, resume=True)) == bytes_of(
        trained(Job(), tied())
    )


def test_a_run_goes_on_with_the_reference_log_probs_that_it_began_with(tmp_path, monkeypatch):
    """Another machine, or another number of processes, computes their last bits otherwise."""
    with pytest.raises(Interrupted):
        trained(Job(), run=tmp_path, callback=stopper(3, "ctrl-c"))
    near = replace(P, reference_logps=P.reference_logps.astype(np.float64) + 1e-4)
    monkeypatch.setitem(DATA, "pairs", near)
    assert bytes_of(trained(Job(), run=tmp_path, resume=True)) == expected(Job())
    monkeypatch.setitem(DATA, "pairs", P)
    (tmp_path / "reference.safetensors").unlink()
    assert bytes_of(trained(Job(), run=tmp_path, resume=True)) == expected(Job())
    assert (
        load_file(tmp_path / "reference.safetensors")["logps"].numpy().tobytes()
        == P.reference_logps.tobytes()
    )
    monkeypatch.setitem(DATA, "pairs", near)
    (tmp_path / "reference.safetensors").unlink()
    with pytest.raises(ValueError, match="reference_logps"):
        trained(Job(), run=tmp_path, resume=True)


BATCHES = [completion_batch([[1, 2]], [[4, 5, k]], [0]) for k in range(4)]


def tuned(batches, steps=4, **options):
    model = copy.deepcopy(base_model())
    train_sft(model, batches, steps, LOOP, progress=None, **options)
    return bytes_of(model)


@pytest.mark.parametrize("given", ["list", "function"])
@pytest.mark.parametrize("changed", [0, 1, 3])
def test_sft_goes_on_with_the_same_batches_only(tmp_path, given, changed):
    """Batches that a function makes may differ from here on: the weights follow that function."""
    others = [*BATCHES]
    others[changed] = completion_batch([[1, 2]], [[4, 5, 9]], [0])
    ours, theirs = (
        some if given == "list" else lambda step, some=some: [some[step]]
        for some in (BATCHES, others)
    )
    with pytest.raises(Interrupted):
        tuned(ours, run=tmp_path, callback=stopper(3, "ctrl-c"))
    before = contents(tmp_path)
    if given == "list" or changed < 3:
        with pytest.raises(ValueError, match="data: |batches up to step 3 are not those"):
            tuned(theirs, run=tmp_path, resume=True)
        assert contents(tmp_path) == before
        theirs = ours
    assert tuned(theirs, run=tmp_path, resume=True) == tuned(theirs)


def test_a_function_is_asked_for_each_batch_once(tmp_path):
    """Or a stream that it reads would run ahead."""
    stream = iter(BATCHES)
    assert tuned(lambda step: [next(stream)], run=tmp_path) == tuned(BATCHES)


def test_a_run_of_sft_and_one_of_dpo_are_not_mixed(tmp_path):
    tuned(BATCHES, run=tmp_path / "sft")
    trained(Job(), run=tmp_path / "dpo")
    with pytest.raises(ValueError, match="method: 'SFT' there, 'DPO' asked"):
        trained(Job(), run=tmp_path / "sft", resume=True)
    with pytest.raises(ValueError, match="method: 'DPO' there, 'SFT' asked"):
        tuned(BATCHES, run=tmp_path / "dpo", resume=True)
    with pytest.raises(ValueError, match="steps: 4 there, 3 asked"):
        tuned(BATCHES, 3, run=tmp_path / "sft", resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoints_of_an_earlier_version_are_refused_in_plain_words(tmp_path, resume):
    base_model().save_pretrained(tmp_path / "checkpoints" / "step-00000003")
    before = contents(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"checkpoints of an earlier run, and no training\.json .*earlier versions"
        r".*cannot be continued",
    ):
        trained(Job(), run=tmp_path, resume=resume)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["{", "[1]", "3", b"\xff"])
def test_a_record_that_was_altered_is_named(tmp_path, text):
    trained(Job(), run=tmp_path)
    (tmp_path / "training.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"training.json was altered .*another run directory"):
        trained(Job(), run=tmp_path, resume=True)


def test_a_checkpoint_from_elsewhere_is_not_this_run_s(tmp_path):
    for name, job in (("one", Job()), ("two", Job("another beta"))):
        trained(job, run=tmp_path / name)
    shutil.rmtree(tmp_path / "one" / "checkpoints")
    shutil.copytree(tmp_path / "two" / "checkpoints", tmp_path / "one" / "checkpoints")
    with pytest.raises(ValueError, match=r"belongs to another run than .*training\.json records"):
        trained(Job(), run=tmp_path / "one", resume=True)


@pytest.mark.parametrize("run", ["runs/a", Path("runs/a"), "~/a", Path("~/a")])
@pytest.mark.parametrize(
    "train",
    [lambda run: trained(Job(), run=run), lambda run: tuned(BATCHES, run=run)],
    ids=["dpo", "sft"],
)
def test_a_run_is_a_string_or_a_path_and_may_begin_at_home(tmp_path, monkeypatch, train, run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train(run)
    assert (tmp_path / ("home/a" if "~" in str(run) else "runs/a") / "training.json").exists()


def test_a_run_directory_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("precious")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="is a file or lies in one; give the path of a folder"):
            trained(Job(), run=run)


HOLD = """
import sys, time
from pathlib import Path
from dpo_lab.sentiment.pretrain import PretrainConfig
from dpo_lab.engine.records import locked
from dpo_lab.engine.runs import open_run
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_holds_the_directory(tmp_path, holder):
    run = tmp_path / "run"
    for train in (trained, lambda job, **options: tuned(BATCHES, **options)):
        for resume in (False, True):
            with pytest.raises(
                ValueError, match=f"is in use by process {holder.pid} on .*another run directory"
            ):
                train(Job(), run=run, resume=resume)
    assert [path.name for path in run.iterdir()] == ["training.lock"]
    holder.kill()  # which leaves the file
    holder.wait()
    assert bytes_of(trained(Job(), run=run, resume=True)) == expected(Job())
    assert not (run / "training.lock").exists()


def test_a_command_says_so_before_it_loads_anything(tmp_path, monkeypatch):
    def loads(*arguments):
        raise AssertionError("loaded")

    for name in ("load_model", "load_tokenizer", "load_imdb"):
        monkeypatch.setattr(task, name, loads)
    monkeypatch.setattr(pretrain, "load_imdb", loads)
    open_run(tmp_path / "pretrain", asdict(PretrainConfig()), resume=False)
    for name, run, command in (
        ("run.lock", tmp_path, lambda: experiment.train(ExperimentConfig(), tmp_path)),
        ("frontier.lock", tmp_path, lambda: frontier.frontier(FrontierConfig(), tmp_path)),
        (
            "training.lock",
            tmp_path / "pretrain",
            lambda: pretrain.pretrain(tmp_path / "pretrain", resume=True),
        ),
    ):
        with (
            locked(run, name),
            pytest.raises(ValueError, match=f"in use by process {os.getpid()} "),
        ):
            command()


def test_a_second_run_in_the_same_process_is_refused_too(tmp_path):
    def evaluate(model, step):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} "):
            trained(Job(), run=tmp_path, resume=True)
        return {"refused": 1.0}

    metrics = train_dpo(
        copy.deepcopy(base_model()), P, DPO, run=tmp_path, callback=evaluate, progress=None
    )
    assert metrics[0] == {"step": 0, "eval/refused": 1.0}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_the_directory_is_free_again_however_a_run_ends(tmp_path, error):
    def evaluate(model, step):
        raise error

    with pytest.raises(error):
        trained(Job(), run=tmp_path, callback=evaluate)
    assert not (tmp_path / "training.lock").exists()
    trained(Job(), run=tmp_path)


def test_two_locks_are_never_held_at_a_time(tmp_path):
    """One holder removes the file while the next one waits to open it, or has opened it already."""
    inside, most = [], []

    def work():
        for _ in range(200):
            try:
                with locked(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except ValueError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most and max(most) == 1 and not list(tmp_path.iterdir())
