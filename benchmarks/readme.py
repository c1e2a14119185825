"""Write the measured figures into the marked blocks of README.md and docs/: python benchmarks/readme.py

The test suite holds both files to what this one makes of benchmarks/results/ and the model card.
"""

import json
import math
import re
import statistics
from collections import Counter
from functools import partial
from pathlib import Path

from scale import table

from dpo_lab.plots import plot_sweep
from dpo_lab.sentiment.results import REPEATS, load_sweep
from dpo_lab.theory.symbolic import equation_index

ROOT = Path(__file__).parent.parent


def main_job() -> str:
    """The table of `benchmarks/main_job.py`."""
    result = json.loads((ROOT / "benchmarks" / "results" / "main_job.json").read_text())
    lines = [
        "| seed | reward before | reward after | sequence KL (nats) | seconds, cold | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        before, after = row["before"], row["after"]
        lines.append(
            f"| {row['seed']} | {before['reward']:.3f} ± {before['reward_se']:.3f} | {after['reward']:.3f} ± {after['reward_se']:.3f} "
            f"| {after['kl']:.2f} ± {after['kl_se']:.2f} | {row['process_seconds']:.0f} | {row['peak_memory_mb']:,} MB |"
        )
    origin = result["provenance"]
    return (
        "\n".join(lines)
        + f"\n\n± is one standard error. Measured by `python benchmarks/main_job.py` at commit {origin['commit']} on "
        f"{origin['machine']}; {origin['versions']}."
    )


def embedded_model() -> str:
    """A sentence from the card of the embedded model."""
    folder = ROOT / "dpo_lab" / "assets" / "gpt2-imdb"
    card = json.loads((folder / "card.json").read_text())
    held_out, size = card["held_out"], (folder / "model.safetensors").stat().st_size
    return (
        f"{card['parameters'] / 1e6:.1f} M parameters ({size / 1e6:.1f} MB), GPT-2 architecture, byte-level BPE of "
        f"{card['config']['vocabulary']:,} tokens, trained from scratch on the 22,500 training reviews in {card['minutes']:.0f} "
        f"minutes on two CPU cores. On the {held_out['reviews']:,} held-out reviews it needs {held_out['bits_per_byte']:.3f} bits "
        f"a byte ({held_out['nats_per_token']:.3f} nats a token)."
    )


def sweep() -> str:
    """The grid of `benchmarks/sweep.py`, best reward within 4 nats first."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "sweep.json").read_text())["rows"]
    lines = ["| beta | learning rate | reward | sequence KL (nats) |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["after"]["kl"] > 4, -row["after"]["reward"])):
        after = row["after"]
        lines.append(
            f"| {row['beta']} | {row['learning_rate']} | {after['reward']:.3f} ± {after['reward_se']:.3f} "
            f"| {after['kl']:.2f} ± {after['kl_se']:.2f} |"
        )
    return "\n".join(lines)


NAMES = {
    "paper": "the paper's protocol: 4 completions and 6 pairs a prefix",
    "short": "pairs, short prompts",
    "long": "pairs, prompts of 64-192 tokens",
    "embedded": "the paper's protocol, a model of the embedded one's size",
}


def _result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def _origin(result: dict, more: str = "") -> str:
    origin = result["provenance"]
    return f"\n\nMeasured by `{origin['command']}` at commit {origin['commit']} on {origin['machine']}{more}; {origin['versions']}."


def _processes(result: dict) -> str:
    counts = Counter(
        tuple(run[k] for k in ("job", "workload", "contender", "precision"))
        for run in result["runs"]
    )
    return " or ".join(map(str, sorted(set(counts.values()))))


def ratios(name: str = "cpu") -> str:
    """Pairs a second and peak memory against TRL, one line a workload."""
    result = _result(name)
    rows = {
        (row["workload"], row["contender"], row["precision"]): row
        for row in result["table"]
        if row["job"] == "dpo"
    }
    lines = [
        "| workload | precision | pairs/s | against TRL's defaults | against TRL's best | peak memory against them |",
        "|---|---|---|---|---|---|",
    ]
    for workload in dict.fromkeys(name for name, _, _ in rows):
        of = {
            contender: [
                row for (name, who, _), row in rows.items() if (name, who) == (workload, contender)
            ]
            for contender in ("dpo_lab", "trl_default", "trl_best")
        }
        default, best = (
            max(of[name], key=lambda row: row["pairs_per_second"])
            for name in ("trl_default", "trl_best")
        )
        for ours in of["dpo_lab"]:
            times = [ours["pairs_per_second"] / row["pairs_per_second"] for row in (default, best)]
            memory = [ours["peak_memory_mb"] / row["peak_memory_mb"] for row in (default, best)]
            lines.append(
                f"| {NAMES[workload]} | {ours['precision']} | {ours['pairs_per_second']:.2f} | {times[0]:.1f}x | {times[1]:.1f}x "
                f"| {memory[0]:.2f}x, {memory[1]:.2f}x |"
            )
    return "\n".join(lines) + _origin(result, f", processes a contender: {_processes(result)}")


def speed(name: str = "cpu") -> str:
    """Every contender on every workload."""
    lines = [
        "| job, workload | contender | precision | pairs/s (least, most) | without the reference | completion tokens/s "
        "| reference tokens/s | peak memory | share of the limit | loss off by |",
        "|---" * 10 + "|",
    ]
    result = _result(name)
    ours = [
        row
        for row in result["table"]
        if (row["contender"], row["precision"]) == ("dpo_lab", "float32")
    ]
    exact = {(row["job"], row["workload"]): row["loss"] for row in ours}
    for row in result["table"]:
        least, most = row["spread"]
        apart = (
            f"{row['reference_tokens_per_second']:,.0f}"
            if row["reference_tokens_per_second"]
            else ""
        )
        error = (
            f"{abs(row['loss'] - exact[row['job'], row['workload']]):.0e}"
            if row not in ours
            else ""
        )
        lines.append(
            f"| {row['job']}, {row['workload']} | {row['contender']} | {row['precision']} "
            f"| {row['pairs_per_second']:.2f} ({least:.2f}, {most:.2f}) | {row['pairs_per_second_without_reference']:.2f} "
            f"| {row['completion_tokens_per_second']:,.0f} | {apart} "
            f"| {row['peak_memory_mb'] / 1e3:.1f} GB | {row['share_of_limit']:.0%} | {error} |"
        )
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {name}"
        for name, rate in result["matmul_flops_per_second"].items()
    )
    return "\n".join(lines) + _origin(
        result, f" ({rates}), processes a contender: {_processes(result)}"
    )


def _gpu() -> dict | None:
    """What `benchmarks/gpu.py` measured, where it has."""
    return _result("gpu") if (ROOT / "benchmarks" / "results" / "gpu.json").exists() else None


UNMEASURED = "Not measured yet: no GPU was at hand. `make bench-gpu` fills this in."


def _on_card(result: dict) -> str:
    card = result["card"]
    return _origin(result, f", {card['name']}, driver {card['driver']}, CUDA {card['cuda']}")


def gpu_exactness() -> str:
    """Differences from the float64 loop, and what else the first stage looks at, from the newest run that measured each."""
    if not _gpu():
        return UNMEASURED
    runs = [_gpu(), _result("gpu-exactness")]
    found: dict[str, tuple[dict, str]] = {}
    for result in runs:
        for name, value in result["stages"]["exactness"]["results"].items():
            if name != "tests" and (name not in found or "error" in found[name][0]):
                found[name] = value, result["provenance"]["commit"]
    lines = [
        "| model, precision, layout | log-prob, off by (nats) | gradient, off by | commit |",
        "|---|---|---|---|",
    ]
    rest = ["| what | found | commit |", "|---|---|---|"]
    for name, (value, commit) in found.items():
        kind, _, what = name.partition("/")
        if "error" in value:
            cells = f"failed: {value['error']}"
        elif kind == "errors":
            lines.append(
                f"| {what.replace('/', ', ')} | {value['logps_nats']:.1e} | {value['gradient']:.1e} | {commit} |"
            )
            continue
        else:
            cells = ", ".join(f"{key.replace('_', ' ')}: {_short(x)}" for key, x in value.items())
        (lines if kind == "errors" else rest).append(
            f"| {what.replace('/', ', ')} | {cells} | | {commit} |"
            if kind == "errors"
            else f"| {name.replace('/', ', ')} | {cells} | {commit} |"
        )
    return "\n".join([*lines, "", *rest]) + _on_card(runs[0])


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def gpu_dpo() -> str:
    """The paper's protocol, for each reference."""
    result = _gpu()
    if not result:
        return UNMEASURED
    found = result["stages"]["dpo"]["results"]
    lines = [
        "| reference | prefixes | pairs | steps | reward before | reward after | sequence KL (nats) | sampling (s) | training (s) "
        "| seconds per step | peak memory |",
        "|---" * 11 + "|",
    ]
    for name, label in (("protocol", "trained here"), ("protocol, embedded", "embedded")):
        run = found[name]
        before, after, seconds = run["before"], run["after"], run["seconds"]
        lines.append(
            f"| {label} | {run['config']['prefixes']:,} | {run['pairs']:,} | {run['steps']} "
            f"| {before['reward']:.3f} ± {before['reward_se']:.3f} | {after['reward']:.3f} ± {after['reward_se']:.3f} "
            f"| {after['kl']:.2f} ± {after['kl_se']:.2f} | {seconds['sample']:.0f} | {seconds['train']:.0f} "
            f"| {run['seconds_per_step']:.3f} | {run['peak_memory_mb']:,} MB |"
        )
    made = found["from scratch"]
    return (
        f"GPT-2 small's shape with the tokenizer of 8,192 tokens ({made['parameters'] / 1e6:.0f}M parameters), trained from scratch "
        f"for {made['seconds']['train']:.0f} seconds ({made['steps']:,} steps, {made['tokens'] / 1e6:.0f}M tokens), needs "
        f"{made['held_out']['bits_per_byte']:.3f} bits per byte on {made['held_out']['reviews']:,} held-out reviews. On it, and on the "
        "embedded model, DPO by the paper's settings, on as many prefixes as the time allowed:\n\n"
        + "\n".join(lines)
        + _on_card(result)
    )


def gpu_speed() -> str:
    """Steps of DPO beside TRL and a textbook loop."""
    result = _gpu()
    if not result:
        return UNMEASURED
    found = result["stages"]["speed"]["results"]
    runs = {
        tuple(name.split("/")): run
        for name, run in found.items()
        if name.count("/") == 2 and "error" not in run
    }
    lines = [
        "| workload | GPT-2 | contender | pairs/s | against TRL's best | seconds per step | of the reference | peak memory "
        "| against TRL's best | fraction of the matmul rate | forward passes | loss |",
        "|---" * 12 + "|",
    ]
    for (workload, size, who), run in sorted(
        runs.items(), key=lambda item: (item[0][:2], item[0][2] != "dpo_lab")
    ):
        best = runs.get((workload, size, "trl_best"))
        times = f"{run['pairs_per_second'] / best['pairs_per_second']:.2f}x" if best else ""
        memory = f"{run['peak_memory_mb'] / best['peak_memory_mb']:.2f}x" if best else ""
        lines.append(
            f"| {workload} | {size} | {who} | {run['pairs_per_second']:,.0f} | {times} | {statistics.median(run['step_seconds']):.3f} "
            f"| {run['reference_seconds_per_step']:.3f} | {run['peak_memory_mb'] / 1e3:.1f} GB | {memory} "
            f"| {run['fraction_of_matmul_rate']:.1%} | {run['passes']} | {run['loss']:.4f} |"
        )
    profile = found["profile"]
    waits = sum(n for key, n in profile["waits_per_step"].items() if key == "cudaStreamSynchronize")
    return (
        "\n".join(lines)
        + f"\n\nThe matmul rate, {found['matmul_flops_per_second'] / 1e12:,.0f} TFLOP/s, is that of a product of two 8,192 x 8,192 "
        f"matrices. Under the profiler a step of the paper's protocol on GPT-2 large launches {profile['launches_per_step']:,.0f} kernels "
        f"and waits for the GPU {waits:.0f} times, at its end." + _on_card(result)
    )


def gpu_summary() -> str:
    """A sentence for the README."""
    result = _gpu()
    if not result:
        return UNMEASURED
    found = result["stages"]["speed"]["results"]
    ours, best = (found[f"paper/large/{who}"] for who in ("dpo_lab", "trl_best"))
    run = result["stages"]["dpo"]["results"]["protocol"]
    pairs = {
        name.removesuffix("/dpo_lab"): row["pairs_per_second"]
        for name, row in found.items()
        if name.endswith("/dpo_lab")
    }
    ratios = [rate / found[f"{name}/trl_best"]["pairs_per_second"] for name, rate in pairs.items()]
    return (
        f"On one {result['card']['name']}, the paper's protocol on GPT-2 large's shape in bfloat16: {ours['pairs_per_second']:,.0f} pairs/s, "
        f"{ours['pairs_per_second'] / best['pairs_per_second']:.1f} times TRL's best, in {ours['peak_memory_mb'] / best['peak_memory_mb']:.2f}x "
        f"of its memory, reference log-probs included; over {len(ratios)} workloads and sizes between {min(ratios):.2f} and "
        f"{max(ratios):.2f} times TRL's best, less on small models. DPO on a model of GPT-2 small's shape, "
        f"{run['pairs']:,} pairs in {run['seconds']['train']:.0f} seconds, moves the reward of held-out completions from "
        f"{run['before']['reward']:.3f} to {run['after']['reward']:.3f} at a sequence KL of {run['after']['kl']:.2f} nats. "
        "[All of it](docs/gpu.md)." + _on_card(result)
    )


def savings() -> str:
    """Each saving left out alone, and all of them."""
    result = _result("cost")
    lines = ["| without | " + " | ".join(NAMES[name] for name in result["savings"]) + " |"]
    lines.append("|---" * (1 + len(result["savings"])) + "|")
    for name in result["savings"]["paper"]:
        cells = []
        for runs in result["savings"].values():
            seconds, memory = (
                runs[name][k] / runs["all"][k] for k in ("training_seconds", "peak_memory_mb")
            )
            cells.append(f"{seconds:.2f}x time, {memory:.2f}x memory")
        lines.append(
            f"| {dict(all='nothing', none='any of them').get(name, name)} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + _origin(result)


def sampling() -> str:
    """Sampling and labeling on the embedded GPT-2."""
    result = _result("sampling")
    ours, theirs = (
        statistics.median(result["tokens_per_second"][name]) for name in ("dpo_lab", "generate")
    )
    return (
        f"`sample_completions` draws {ours:,.0f} completion tokens a second from the embedded GPT-2, transformers' `generate` "
        f"{theirs:,.0f}: {result['ratio']:.1f} times as many. The TF-IDF reward labels {result['labels_per_second']:,.0f} of the "
        "completions a second." + _origin(result)
    )


def latency() -> str:
    """From a slider's event to the new picture."""
    result = _result("latency")
    apart, row = result["apart"], result["in a row"]
    return (
        f"From the move of beta's slider to the new picture in the page, over {len(apart['milliseconds'])} drags {result['pause']} s "
        f"apart, with ipykernel {result['ipykernel']}: median {apart['median']:.0f} ms, 95 % within {apart['p95']:.0f} ms. Where the next move follows as soon as the "
        f"picture is there: {row['median']:.0f} and {row['p95']:.0f} ms." + _origin(result)
    )


def equations() -> str:
    """The equation index, with the notebook cells that show each proof."""
    code = {
        f"{path.stem}, cell {number}": "".join(cell["source"])
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
        for number, cell in enumerate(
            json.loads(path.read_text(encoding="utf-8"))["cells"], start=1
        )
        if cell["cell_type"] == "code"
    }
    lines = [
        "| equation | proved by `symbolic.` | shown in | computed by | test |",
        "|---|---|---|---|---|",
    ]
    for row in equation_index():
        names = row["proved by"].split(", ")
        shown = [
            next(place for place, source in code.items() if re.search(rf"\b{name}\(", source))
            for name in names
        ]
        proofs, computed = ", ".join(f"`{name}`" for name in names), row["computed by"]
        function, _, field = computed.partition(" ")
        computed = f"`{function}` {field}".strip() if computed else "(no number: an identity)"
        lines.append(
            f"| {row['equation']} | {proofs} | {'; '.join(dict.fromkeys(shown))} | {computed} | `{row['test']}` |"
        )
    return "\n".join(lines)


def contender_lines() -> str:
    """What each contender reaches within 5 nats in the shipped sweep, the most reward first."""
    result = load_sweep()
    lines = [
        "| within 5 nats, best of its runs | reward | sequence KL (nats) | share of the optimal gain | seconds | tokens |",
        "|---" * 6 + "|",
    ]
    for row in sorted(result.summary(at_most=5), key=lambda row: -row["reward"]):
        share = f"{row['share']:.0%}" if math.isfinite(row["share"]) else ""
        lines.append(
            f"| {row['label']} | {row['reward']:.3f} ± {row['reward_se']:.3f} | {row['kl']:.2f} | {share} | {row['seconds']:.0f} "
            f"| {row['tokens']:,} |"
        )
    if result.seconds:
        lines += [
            "",
            f"All {len(result.peak_memory_mb)} runs took {result.seconds / 60:.0f} minutes of wall clock.",
        ]
    return "\n".join(lines) + _origin({"provenance": result.provenance})


def spread_lines() -> str:
    """What the shipped runs of several seeds end with."""
    results = [load_sweep(folder) for folder in REPEATS]
    lines = [
        "| at the end of training | seeds | reward | sequence KL (nats) | share of the optimal gain | least gain of a seed | peak memory |",
        "|---" * 7 + "|",
    ]
    for row in (row for result in results for row in result.spread()):
        share = " to ".join(dict.fromkeys(f"{end:.0%}" for end in row["share"]))
        lines.append(
            f"| {row['name']} | {row['seeds']} | {row['reward']:.3f} ± {row['reward_sd']:.3f} | {row['kl']:.2f} "
            f"| {share} | {row['least_gain']:.3f} | {row['peak_memory_mb']:,} MB |"
        )
    return "\n".join(lines) + "".join(
        _origin({"provenance": result.provenance}) for result in results
    )


BLOCKS = {
    "spread": spread_lines,
    "contenders": contender_lines,
    "main job": main_job,
    "sweep": sweep,
    "embedded model": embedded_model,
    "ratios": ratios,
    "ratios of the second machine": partial(ratios, "cpu-avx2"),
    "speed": speed,
    "speed of the second machine": partial(speed, "cpu-avx2"),
    "gpu": gpu_summary,
    "gpu exactness": gpu_exactness,
    "gpu dpo": gpu_dpo,
    "gpu speed": gpu_speed,
    "savings": savings,
    "sampling": sampling,
    "latency": latency,
    "scale": table,
    "equations": equations,
}


def render(text: str) -> str:
    """A page with its blocks filled."""
    for name in re.findall(r"<!-- (?!end)([a-z ]+) -->", text):
        start, end = (
            text.index(f"<!-- {name} -->"),
            text.index("<!-- end -->", text.index(f"<!-- {name} -->")),
        )
        text = f"{text[:start]}<!-- {name} -->\n{BLOCKS[name]()}\n{text[end:]}"
    return text


if __name__ == "__main__":
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
    shipped = load_sweep()
    plot_sweep(shipped.by_method(), shipped.optimal, shipped.band).savefig(
        ROOT / "docs" / "frontier.png"
    )
