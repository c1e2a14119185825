"""The `dpo-lab` command, made from the config dataclasses."""

import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from dpo_lab.data.catalog import DATASETS, find_dataset
from dpo_lab.data.run import PublicRunConfig, train_public
from dpo_lab.doctor import doctor
from dpo_lab.engine.arguments import checked
from dpo_lab.engine.cpu import tune_cpu
from dpo_lab.engine.distributed import cleanup, from_main, print0
from dpo_lab.health.diagnosis import diagnose
from dpo_lab.loop import Interrupted
from dpo_lab.sentiment import run as experiment
from dpo_lab.sentiment.pretrain import PretrainConfig, pretrain
from dpo_lab.sentiment.results import Repeated, repeats
from dpo_lab.sentiment.run import CONFIGS, ExperimentConfig
from dpo_lab.sentiment.sweep import FrontierConfig, frontier
from dpo_lab.sentiment.task import Task, TaskConfig

T = TypeVar("T")

# --prefixes, and --task.prefixes
Flat = tyro.conf.OmitArgPrefixes
Nested = Annotated[T, tyro.conf.arg(name="")]

RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]

Command = Callable[..., Any]


def doctor_command() -> int:
    """Say what is here, what is missing, and what to do; exit 0 when the laptop config can run."""
    return 0 if doctor() else 1


@checked
def evaluate_command(run: Path = Path("runs/imdb"), eval_prefixes: int | None = None) -> None:
    """Evaluate the policy of a finished run again, on more held-out prefixes if asked."""
    s = experiment.evaluate(run, eval_prefixes=eval_prefixes)
    print0(f"{_means(s, ', ')}, in {run / 'evaluation.json'}")


@checked
def diagnose_command(run: RunFolder, json: bool = False) -> int:
    """Say which faults a run of DPO shows, with evidence and what to do; exit 0 when it has none.

    The exit status is 1 where an error or a warning was found, and 2 where there is no run.

    Args:
        run: directory of `dpo-lab train` or train_dpo(run=...); or TRL's output_dir, or a
            checkpoint in it.
        json: print it as JSON.
    """
    found = diagnose(run)
    print0(dumps(found.as_dict(), indent=2) if json else found)
    return 0 if found.healthy else 1


def _health(run: Path) -> str:
    """What `diagnose` says of a finished run, in one to three lines."""
    try:
        found = diagnose(run)
    except (ValueError, FileNotFoundError) as error:
        return f"diagnosis: none ({error})"
    return f"diagnosis: {found.summary(2)}; dpo-lab diagnose {run} says more"


@checked
def pretrain_command(
    config: Flat[PretrainConfig], out: Path = Path("runs/pretrain"), resume: bool = False
) -> None:
    """Train the embedded GPT-2 and its tokenizer from scratch on the IMDb training reviews."""
    print0(f"model in {pretrain(out, config, resume=resume)}")


def _task_commands(default: TaskConfig) -> dict[str, Command]:
    """The commands `sample` and `label`, whose options change this config."""

    @checked
    def sample_command(config: Flat[TaskConfig] = default, data: Path = Path("runs/data")) -> None:
        """Sample completions of training prefixes from the reference."""
        samples = Task.open(config, data).samples
        n = sum(map(len, samples["completions"]))
        prefixes = len(samples["prompts"])
        print0(f"{n:,} completions of {prefixes:,} prefixes in {data / 'samples.json'}")

    @checked
    def label_command(config: Flat[TaskConfig] = default, data: Path = Path("runs/data")) -> None:
        """Label the samples by the reward: preference pairs and reference log-probs."""
        preferences = Task.open(config, data).preferences
        print0(f"{preferences.report}\npreferences in {data / 'preferences'}")

    return {"sample": sample_command, "label": label_command}


def _run_commands(default: ExperimentConfig) -> dict[str, Command]:
    """The commands `plan` and `train`, whose options change this config."""

    @checked
    def plan_command(
        config: Flat[ExperimentConfig] = default,
        out: Path = Path("runs/imdb"),
        data: Path | None = None,
        resume: bool = False,
        minutes: float | None = None,
    ) -> None:
        """What `dpo-lab train` with the same options will cost: tokens, FLOPs, seconds, memory.

        Nothing is written.

        Args:
            out: the run directory, which decides the precision where it holds a run.
            data: as for `dpo-lab train`.
            resume: changes nothing; the plan is that of the whole run.
            minutes: as for `dpo-lab train`.
        """
        print0(experiment.plan_run(config, out, data=data, minutes=minutes))

    @checked
    def train_command(
        config: Flat[ExperimentConfig] = default,
        out: Path = Path("runs/imdb"),
        data: Path | None = None,
        resume: bool = False,
        minutes: float | None = None,
    ) -> None:
        """The controlled-sentiment experiment: sample, label, train by DPO, evaluate.

        --config laptop, gpu, paper or chat sets the defaults of all options; chat is summaries of
        reviews by SmolLM2 (`make chat`).

        Args:
            out: run directory; it must be new, or hold this config.
            data: folder of `dpo-lab sample` and `label`; by default inside the run directory. Or a
                public preference data set, such as hh: `dpo-lab train --data hh --help`.
            resume: continue an interrupted run.
            minutes: take only as many prefixes as fit into this time, unless --prefixes is given.
        """
        summary = experiment.train(config, out, data=data, resume=resume, minutes=minutes)
        for name in ("before", "after"):
            print0(f"{name:<7} {_means(summary[name], '   ')}")
        print0(
            f"{summary['pairs']:,} pairs, {summary['steps']} steps, {summary['seconds']:.0f} s, "
            f"{summary['peak_memory_mb']:,} MB peak"
        )
        print0(
            f"policy in {out / 'policy'}, figures in {out / 'figures'}, "
            f"samples in {out / 'samples.md'}, all of it in {out}"
        )
        print0(from_main(_health, out))

    return {"plan": plan_command, "train": train_command}


def _public_commands(default: PublicRunConfig) -> dict[str, Command]:
    """The command `train` on a public data set, whose options change this config."""

    @checked
    def train_command(
        config: Flat[PublicRunConfig] = default, out: Path | None = None, resume: bool = False
    ) -> None:
        """DPO on a public preference data set: SFT on the chosen answers, DPO, evaluation.

        --config laptop, gpu or paper sets the defaults of all options.

        Args:
            out: run directory; it must be new, or hold this config. By default runs/ and the name.
            resume: continue an interrupted run.
        """
        out = out or Path("runs") / re.sub(r"\W+", "-", config.data)
        summary = train_public(config, out, resume=resume)
        for name in ("before", "after"):
            s = summary[name]
            print0(
                f"{name:<7} accuracy {s['accuracy']:.3f} ({s['accuracy_low']:.3f} to "
                f"{s['accuracy_high']:.3f})   margin {s['margin']:.3f} ± {s['margin_se']:.3f}"
            )
        kl, kl_se = summary["after"]["kl"], summary["after"]["kl_se"]
        print0(
            f"sequence KL {kl:.2f} ± {kl_se:.2f} nats, {summary['pairs']:,} pairs, "
            f"{summary['steps']} steps, {summary['seconds']:.0f} s, "
            f"{summary['peak_memory_mb']:,} MB peak"
        )
        print0(f"policy in {out / 'policy'}, samples in {out / 'samples.md'}, all of it in {out}")
        print0(from_main(_health, out))

    return {"train": train_command}


def _frontier_commands(default: FrontierConfig) -> dict[str, Command]:
    """The command `frontier`, whose options change this config."""

    @checked
    def frontier_command(
        config: Nested[FrontierConfig] = default,
        out: Path = Path("runs/frontier"),
        repeat: tuple[Repeated, ...] = (),
    ) -> None:
        """The paper's methods on one task, 22 runs: DPO, PPO, PPO-GT, unlikelihood, Preferred-FT.

        Call it again after an interruption.

        Args:
            out: where every run has a directory, and `frontier.csv` all their evaluations.
            repeat: instead of them one setting of each of these methods in three seeds.
        """
        rows = frontier(config, out, runs=repeats(*repeat) if repeat else None)
        print0(f"{len(rows)} evaluations in {out / 'frontier.csv'}")

    return {"frontier": frontier_command}


def frontier_config(name: str) -> FrontierConfig:
    """The sweep on the task of a config, at the sweep's own size but for the paper's."""
    default, task = FrontierConfig(), CONFIGS[name].task
    if name != "paper":
        task = replace(task, prefixes=default.task.prefixes)
    return replace(default, task=replace(task, eval_prefixes=default.task.eval_prefixes))


# pairs and held-out pairs of a public data set, and the longest answer, in tokens
PUBLIC = {"laptop": (2_000, 512, 96), "gpu": (20_000, 2_000, 256), "paper": (0, 2_000, 256)}


def public_config(name: str, data: str) -> PublicRunConfig:
    """The run on a public data set with a config's model and training, and the paper's beta."""
    task, dpo = CONFIGS[name].task, CONFIGS[name].dpo
    pairs, held_out, longest = PUBLIC[name]
    return PublicRunConfig(
        data=data,
        device=task.device,
        model=task.model,
        pairs=pairs,
        held_out=held_out,
        max_completion_tokens=longest,
        dpo=replace(dpo, beta=find_dataset(data)[0].beta),
    )


def commands(name: str = "laptop", data: str | None = None) -> dict[str, Command]:
    """Every command, with the defaults of the config of this name.

    With `data`, the name of a public data set, `train` is on that.
    """
    found = {
        "doctor": doctor_command,
        **_run_commands(CONFIGS[name]),
        **_task_commands(CONFIGS[name].task),
        "evaluate": evaluate_command,
        "diagnose": diagnose_command,
        **_frontier_commands(frontier_config(name)),
        "pretrain": pretrain_command,
    }
    return found | (_public_commands(public_config(name, data)) if data else {})


COMMANDS = commands()

# those whose defaults `--config` chooses
CONFIGURED = ("plan", "train", "sample", "label", "frontier")


def named_config(arguments: list[str]) -> tuple[str, list[str]]:
    """The name after --config, and the other arguments in today's names.

    Raises:
        ValueError: a name that does not exist, or the option that --config replaced.
    """
    if arguments[:1] and arguments[0] not in CONFIGURED:
        return "laptop", [_renamed(argument) for argument in arguments]

    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="laptop")
    found, rest = parser.parse_known_args(arguments)
    if found.config not in CONFIGS:
        raise ValueError(f"--config is {found.config!r}; it must be one of {', '.join(CONFIGS)}")
    if any(re.fullmatch(r"--(task\.)?lane(=.*)?", argument) for argument in rest):
        raise ValueError("--lane is now --config: give --config gpu, or --config laptop")
    return found.config, [_renamed(argument) for argument in rest]


def _renamed(argument: str) -> str:
    """An argument under today's name: --accumulate is short for --gradient-accumulation-steps."""
    return re.sub(
        r"^(--(?:[\w-]+\.)*)accumulate(?==|$)", r"\1gradient-accumulation-steps", argument
    )


def named_data(arguments: list[str]) -> str | None:
    """The public data set that --data of `train` names; None where it is a folder.

    Where there is a folder of this name, --folder says that the data set is meant.

    Raises:
        ValueError: a single word that is neither, or a data set for `plan`.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data")
    parser.add_argument("--folder")
    given = parser.parse_known_args(arguments)[0]
    data = given.data
    if not data or arguments[0] not in ("plan", "train"):
        return None
    if Path(data).expanduser().exists() and not given.folder:
        return None

    short = data.partition(":")[0]
    if short in {*DATASETS, *(dataset.hub for dataset in DATASETS.values())}:
        find_dataset(data)
        if arguments[0] == "plan":
            raise ValueError(
                f"--data is {data!r}, a public data set; dpo-lab plan knows the sentiment "
                "experiment alone. dpo-lab train prints its pairs and steps before it starts"
            )
        return data
    if not re.search(r"[/\\]", data):
        raise ValueError(
            f"--data is {data!r}, which is no folder here and no data set. Data sets are "
            f"{', '.join(DATASETS)}; a folder is one of `dpo-lab sample` and `label`, and a new "
            f"one in this directory is written ./{data}"
        )
    return None


def without_minutes(arguments: list[str]) -> list[str]:
    """The arguments, without --minutes where --prefixes says how large the run is."""
    given = [argument.split("=")[0] for argument in arguments]
    if not {"--minutes", "--prefixes"} <= set(given):
        return arguments
    i = given.index("--minutes")
    print0("--prefixes is given, so --minutes is ignored")
    return arguments[:i] + arguments[i + (1 if "=" in arguments[i] else 2) :]


def _means(s: dict[str, Any], between: str) -> str:
    """Reward and KL of an evaluation, with their standard errors."""
    return (
        f"reward {s['reward']:.3f} ± {s['reward_se']:.3f}{between}"
        f"sequence KL {s['kl']:.2f} ± {s['kl_se']:.2f} nats"
    )


WRITABLE = (
    ". Choose a directory that can be written with --out or --data; caches are where "
    "DPO_LAB_CACHE and HF_HOME say"
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1 (a gap), 2 (bad input), 130 (interrupted)."""
    # a terminal may not have ±, which is no reason to fail
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    tune_cpu()

    try:
        name, given = named_config(sys.argv[1:] if arguments is None else arguments)
        status = tyro.extras.subcommand_cli_from_dict(
            commands(name, named_data(given)),
            prog="dpo-lab",
            args=without_minutes(given),
            description=__doc__,
        )
        cleanup()
        return status or 0

    # every error a user can meet in one line
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"dpo-lab: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # what the system says of a file has its name, and no advice
        print(f"dpo-lab: error: {error}{WRITABLE if error.filename else ''}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"dpo-lab: {error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("dpo-lab: interrupted; continue a started run with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
