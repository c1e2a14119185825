"""Measure this project on a GPU in a few minutes.

`make bench-gpu`, or python benchmarks/gpu.py --out DIR --minutes 8

Three stages, the most important first: `exactness` (log-probs, gradients, sampling, out of memory,
resume), `dpo` (a GPT-2 trained from scratch on IMDb, then the paper's protocol on it), `speed`
(beside TRL and a textbook loop). Each runs in a process of its own within its own part of the time.
One that fails or hangs is noted, and the next begins. DIR/gpu.json is valid JSON at any moment and
holds every figure that was measured by then.

Needed: torch, transformers, accelerate, safetensors, scikit-learn, numpy, and
benchmarks/gpu-requirements.txt. Nothing is fetched, shown, or written outside DIR.
"""

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHARES = {"exactness": 1.3, "dpo": 3.7, "speed": 3.0}  # minutes of eight
TAIL = 2_000  # characters of the end of a log that are kept


@dataclass(frozen=True)
class Settings:
    """What a stage is told."""

    device: str
    """cuda or cpu"""
    tiny: bool
    """the smallest form, which a CPU finishes in seconds"""
    until: float
    """Unix time at which the stage is stopped"""
    work: Path
    """a folder for what is not kept"""
    model: str | None = None
    """GPT-2's own weights for the stage `dpo`: a folder or cached hub id; None trains new ones"""

    @property
    def left(self) -> float:
        """Seconds until the stage is stopped."""
        return self.until - time.time()


class Report:
    """Results of a stage, written whole after each one."""

    def __init__(self, path: Path):
        self.path, self.results, self.began = path, {}, time.time()

    def add(self, name: str, value: Any) -> None:
        """Keep a result, by the name that it has in gpu.json."""
        self.results[name] = value
        write_json(self.path, self.results)
        print(f"{time.time() - self.began:6.1f} s  {name} {json.dumps(value)[:2_000]}", flush=True)

    def attempt(self, name: str, measure: Callable[[], Any]) -> Any:
        """Keep what `measure` returns, or how it failed; None after a failure."""
        try:
            value = measure()
        except Exception as error:  # whatever it is, the rest is measured all the same
            print(traceback.format_exc(), flush=True)
            self.add(name, {"error": f"{type(error).__name__}: {error}"[:TAIL]})
            return None
        self.add(name, value)
        return value


def write_json(path: Path, value: Any) -> None:
    """JSON at `path`, whole at any moment."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """What is at `path`; an empty dictionary before anything is."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run_stages(
    commands: dict[str, list[str]], out: Path, until: float, *, every: float = 0.2
) -> dict[str, Any]:
    """Run each stage's command until its time is over, in turn; results go to `out`/gpu.json.

    A stage has its share (`SHARES`, 1 for others) of the time that is left to it and to those after
    it. The words {until} and {results} in a command stand for the Unix time at which it is stopped
    and the file where it puts its results.
    """
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"stages": {name: {"status": "not begun"} for name in commands}}
    write_json(out / "gpu.json", found)
    waiting = list(commands)
    while waiting:
        name, began = waiting[0], time.time()
        share = SHARES.get(name, 1.0) / sum(SHARES.get(other, 1.0) for other in waiting)
        stop, results, log = (
            began + share * (until - began),
            out / f"{name}.json",
            out / f"{name}.log",
        )
        stage = found["stages"][name] = {"status": "running"}
        words = {"until": str(stop), "results": str(results)}
        command = [
            word.format(**words) if word in ("{until}", "{results}") else word
            for word in commands[name]
        ]

        # the stage in a process group of its own, so that nothing that it started outlives it
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while process.poll() is None and time.time() < stop:
                    time.sleep(every)
                    stage |= {
                        "seconds": round(time.time() - began, 1),
                        "results": read_json(results),
                    }
                    write_json(out / "gpu.json", found)
            finally:
                ended = process.poll()
                end_group(process)

        status = (
            "out of time"
            if ended is None
            else "done"
            if ended == 0
            else f"failed with status {ended}"
        )
        stage |= {
            "status": status,
            "seconds": round(time.time() - began, 1),
            "results": read_json(results),
        }
        if ended:
            stage["log"] = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
        write_json(out / "gpu.json", found)
        results.unlink(missing_ok=True)
        waiting.pop(0)
        print(f"{name}: {status}, {stage['seconds']:.0f} s", flush=True)
    return found


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def environment(work: Path) -> None:
    """Keep every cache of this process and of those that it starts in `work`; fetch nothing."""
    folders = {
        "HF_HOME": "hf",
        "DPO_LAB_CACHE": "cache",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
    }
    folders |= {"MPLCONFIGDIR": "matplotlib", "CUDA_CACHE_PATH": "cuda", "TMPDIR": "tmp"}
    hub = os.environ.get("HF_HUB_CACHE") or str(
        Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    )
    for name, folder in folders.items():
        (work / folder).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(work / folder)
    os.environ |= {
        "HF_HUB_CACHE": hub,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "MPLBACKEND": "agg",
    }
    os.environ |= {
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
    )


def stage_main(options: argparse.Namespace) -> None:
    """One stage, in this process."""
    settings = Settings(
        options.device, options.tiny, options.until, options.out / "work", options.model
    )
    module = importlib.import_module(f"gpu_{options.stage}")
    module.run(settings, Report(options.results))


def identity(device: str, commit: str | None) -> dict[str, Any]:
    """Card, driver, versions, commit and command of a run."""
    import torch

    from dpo_lab.engine.runs import provenance

    found: dict[str, Any] = {"provenance": provenance() | ({"commit": commit} if commit else {})}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found["card"] = {
            "name": card.name,
            "memory_gb": round(card.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
        try:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["card"]["driver"] = subprocess.check_output(query, text=True).strip()
        except (OSError, subprocess.CalledProcessError):
            found["card"]["driver"] = "unknown"
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="where gpu.json and the logs go"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it ends after so many")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest form of every stage")
    parser.add_argument(
        "--stages", nargs="+", choices=tuple(SHARES), default=list(SHARES), help="some of them"
    )
    parser.add_argument(
        "--model",
        help="GPT-2's weights, a folder or a hub id that is in the cache; else one is trained",
    )
    parser.add_argument("--commit", help="of this code, where it is not a git checkout")
    # what a stage's own process is told
    for hidden, kind in (("--stage", str), ("--until", float), ("--results", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    until = time.time()
    options = parse(arguments)
    options.out = options.out.absolute()
    environment(options.out / "work")
    sys.path.insert(0, str(HERE.parent))
    if options.stage:
        stage_main(options)
        return 0

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here, so nothing was measured; `make bench` measures on the CPU")
        return 0
    until += 60 * options.minutes
    shared = [f"--out={options.out}", f"--device={options.device}", *["--tiny"] * options.tiny]
    shared += [f"--model={options.model}"] if options.model else []
    script = [sys.executable, str(Path(__file__).absolute())]
    told = ["--until", "{until}", "--results", "{results}"]
    commands = {name: [*script, f"--stage={name}", *shared, *told] for name in options.stages}
    found = run_stages(commands, options.out, until)
    write_json(options.out / "gpu.json", identity(options.device, options.commit) | found)
    shutil.rmtree(options.out / "work", ignore_errors=True)
    print(f"results in {options.out / 'gpu.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
