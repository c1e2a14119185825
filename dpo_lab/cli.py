"""The `dpo-lab` command, made from the config dataclasses."""

import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import datasets
import transformers
import tyro

from dpo_lab.doctor import doctor
from dpo_lab.engine.arguments import checked
from dpo_lab.engine.cpu import keep_freed_memory
from dpo_lab.engine.distributed import cleanup, print0
from dpo_lab.loop import Interrupted
from dpo_lab.sentiment import run as experiment
from dpo_lab.sentiment import task
from dpo_lab.sentiment.pretrain import PretrainConfig, pretrain
from dpo_lab.sentiment.results import Repeated, repeats
from dpo_lab.sentiment.run import CONFIGS, ExperimentConfig
from dpo_lab.sentiment.sweep import FrontierConfig, frontier
from dpo_lab.sentiment.task import TaskConfig

Flat = tyro.conf.OmitArgPrefixes

T = TypeVar("T")

Nested = Annotated[T, tyro.conf.arg(name="")]  # --task.prefixes


def doctor_command() -> int:
    """Say what is here and what is not, and what to do about it; exit 0 when the laptop lane can run."""
    return 0 if doctor() else 1


@checked
def sample_command(config: Flat[TaskConfig], data: Path = Path("runs/data")) -> None:
    """Sample completions of training prefixes from the reference."""
    samples = task.sample(config, data)
    print0(
        f"{sum(map(len, samples['completions'])):,} completions of {len(samples['prompts']):,} prefixes in {data / 'samples.json'}"
    )


@checked
def label_command(config: Flat[TaskConfig], data: Path = Path("runs/data")) -> None:
    """Label the samples by the reward: preference pairs and reference log-probs."""
    preferences = task.label(config, data)
    print0(f"{preferences.report}\npreferences in {data / 'preferences'}")


def train_from(name: str) -> Callable[..., None]:
    """The command `train`, whose options change the config of this name."""

    @checked
    def train_command(
        config: Flat[ExperimentConfig] = CONFIGS[name],
        out: Path = Path("runs/imdb"),
        data: Path | None = None,
        resume: bool = False,
    ) -> None:
        """The controlled-sentiment experiment: sample, label, train by DPO, evaluate. --config paper sets what the paper did.

        Args:
            out: run directory; it must be new, or hold this config.
            data: where `dpo-lab sample` and `dpo-lab label` put their results; by default inside the run directory.
            resume: continue an interrupted run.
        """
        summary = experiment.train(config, out, data=data, resume=resume)
        for name in ("before", "after"):
            s = summary[name]
            print0(
                f"{name:<7} reward {s['reward']:.3f} ± {s['reward_se']:.3f}   sequence KL {s['kl']:.2f} ± {s['kl_se']:.2f} nats"
            )
        print0(
            f"{summary['pairs']:,} pairs, {summary['steps']} steps, {summary['seconds']:.0f} s, {summary['peak_memory_mb']:,} MB peak"
        )
        print0(
            f"policy in {out / 'policy'}, figures in {out / 'figures'}, samples in {out / 'samples.md'}, all of it in {out}"
        )

    return train_command


def plan_from(name: str) -> Callable[..., None]:
    """The command `plan`, whose options change the config of this name."""

    @checked
    def plan_command(
        config: Flat[ExperimentConfig] = CONFIGS[name],
        out: Path = Path("runs/imdb"),
        data: Path | None = None,
        resume: bool = False,
    ) -> None:
        """What `dpo-lab train` with the same flags will cost: tokens, FLOPs, seconds, memory. Nothing is written.

        Args:
            out: the run directory, which decides the precision where it holds a run.
            data: as for `dpo-lab train`.
            resume: changes nothing; the plan is that of the whole run.
        """
        print0(experiment.plan_run(config, out, data=data))

    return plan_command


@checked
def evaluate_command(run: Path = Path("runs/imdb"), eval_prefixes: int | None = None) -> None:
    """Evaluate the policy of a finished run on held-out prefixes again, on more of them if asked."""
    s = experiment.evaluate(run, eval_prefixes=eval_prefixes)
    print0(
        f"reward {s['reward']:.3f} ± {s['reward_se']:.3f}, sequence KL {s['kl']:.2f} ± {s['kl_se']:.2f} nats, in {run / 'evaluation.json'}"
    )


@checked
def frontier_command(
    config: Nested[FrontierConfig],
    out: Path = Path("runs/frontier"),
    repeat: tuple[Repeated, ...] = (),
) -> None:
    """The paper's 22 runs on one task: DPO, PPO, PPO-GT, unlikelihood, Preferred-FT. Call it again after an interruption.

    Args:
        out: where every run has a directory, and `frontier.csv` all their evaluations.
        repeat: instead of them one setting of each of these methods in three seeds.
    """
    rows = frontier(config, out, runs=repeats(*repeat) if repeat else None)
    print0(f"{len(rows)} evaluations in {out / 'frontier.csv'}")


@checked
def pretrain_command(
    config: Flat[PretrainConfig], out: Path = Path("runs/pretrain"), resume: bool = False
) -> None:
    """Train the embedded GPT-2 and its tokenizer from scratch on the IMDb training reviews."""
    print0(f"model in {pretrain(out, config, resume=resume)}")


COMMANDS: dict[str, Callable[..., Any]] = {
    "doctor": doctor_command,
    "plan": plan_from("laptop"),
    "train": train_from("laptop"),
    "sample": sample_command,
    "label": label_command,
    "evaluate": evaluate_command,
    "frontier": frontier_command,
    "pretrain": pretrain_command,
}


def named_config(arguments: list[str]) -> tuple[str, list[str]]:
    """The name after --config of `train` and `plan`, and the other arguments. Raises ValueError for a name that does not exist."""
    if arguments[:1] not in (["train"], ["plan"]):
        return "laptop", arguments
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="laptop")
    found, rest = parser.parse_known_args(arguments)
    if found.config not in CONFIGS:
        raise ValueError(f"--config is {found.config!r}; it must be one of {', '.join(CONFIGS)}")
    return found.config, rest


WRITABLE = ". Choose a directory that can be written with --out or --data; caches are where DPO_LAB_CACHE and HF_HOME say"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1 (a gap), 2 (bad input), 130 (interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may not have ±: that is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        name, arguments = named_config(sys.argv[1:] if arguments is None else arguments)
        commands = {**COMMANDS, "plan": plan_from(name), "train": train_from(name)}
        status = (
            tyro.extras.subcommand_cli_from_dict(
                commands, prog="dpo-lab", args=arguments, description=__doc__
            )
            or 0
        )
        cleanup()
        return status
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"dpo-lab: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # what the system says of a file has its name, and no advice
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
