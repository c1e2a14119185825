"""Write the measured figures into the pages.

    python benchmarks/readme.py

A block of README.md or docs/*.md stands between `<!-- its name -->` and `<!-- end -->`. `BLOCKS`
says which function fills it, from benchmarks/results/, the shipped sweeps and the model card. A
test fails while a page differs from what this file writes.
"""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import mistake_tables
import numpy as np
import tax_tables
from scale import table

import dpo_lab
from dpo_lab.checks import mistakes as table_of_mistakes
from dpo_lab.engine.escaping import for_markdown
from dpo_lab.health import FAULTS, load_diagnosis_table
from dpo_lab.judges import half_width, power
from dpo_lab.plots import plot_sweep
from dpo_lab.sentiment.results import (
    REPEATS,
    load_goodhart,
    load_on_policy,
    load_relatives,
    load_sweep,
    load_tax,
)
from dpo_lab.theory.frontier import OptimalFrontier
from dpo_lab.theory.symbolic import equation_index

ROOT = Path(__file__).parent.parent
UNMEASURED = "Not measured yet: no GPU was at hand. `make bench-gpu` fills this in."
WORKLOADS = {
    "paper": "the paper's protocol: 4 completions and 6 pairs per prefix",
    "short": "pairs, short prompts",
    "long": "pairs, prompts of 64-192 tokens",
    "embedded": "the paper's protocol, a model of the embedded one's size",
}

# the exercises whose mistakes reach a training run
MISTAKES_TRAINED_WITH = ("dpo_loss", "sequence_logps", "ipo_loss", "sequence_kl")

# Which test holds a proof in sympy equal to the function that computes it.
OBJECTIVE_TEST = "test_the_proved_objective_is_the_one_computed"
LOSS_TEST = "test_the_proved_loss_and_gradient_are_those_that_train"
PREFERENCE_TEST = "test_the_proved_preference_probability_is_the_one_computed"
IDENTITY_TEST = "test_every_derivation_holds"
EQUATION_TESTS = {
    "Eq. 1": PREFERENCE_TEST,
    "Eq. 2": PREFERENCE_TEST,
    "Eq. 3": OBJECTIVE_TEST,
    "Eq. 4": OBJECTIVE_TEST,
    "Eq. 5": OBJECTIVE_TEST,
    "Eq. 6": LOSS_TEST,
    "Eq. 7": LOSS_TEST,
    "Eqs. 8 and 9": OBJECTIVE_TEST,
    "Eq. 10": OBJECTIVE_TEST,
    "Eqs. 11 to 15": OBJECTIVE_TEST,
    "Eqs. 16 and 17": LOSS_TEST,
    "Eq. 18": IDENTITY_TEST,
    "Eqs. 19 and 20": IDENTITY_TEST,
    "Eqs. 21 and 22": LOSS_TEST,
    "Lemmas 1 and 2": IDENTITY_TEST,
    "Theorem 1, Proposition 1": IDENTITY_TEST,
}


# What every block is made of


def _result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def _gpu() -> dict | None:
    """The results of `benchmarks/gpu.py`, or None where there are none yet."""
    return _result("gpu") if (ROOT / "benchmarks" / "results" / "gpu.json").exists() else None


def _table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table under the columns of `header`, which " | " separates."""
    rule = "|" + "---|" * len(header.split(" | "))
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([f"| {header} |", rule, *lines])


def _origin(provenance: dict, more: str = "") -> str:
    """Which command measured this, at which commit, on which machine."""
    return (
        f"\n\nMeasured by `{provenance['command']}` at commit {provenance['commit']} on "
        f"{provenance['machine']}{more}; {provenance['versions']}."
    )


def _on_card(result: dict) -> str:
    card = result["card"]
    more = f", {card['name']}, driver {card['driver']}, CUDA {card['cuda']}"
    return _origin(result["provenance"], more)


def _reward(evaluation: dict) -> str:
    return f"{evaluation['reward']:.3f} ± {evaluation['reward_se']:.3f}"


def _kl(evaluation: dict) -> str:
    return f"{evaluation['kl']:.2f} ± {evaluation['kl_se']:.2f}"


def _percent(fractions: Iterable[float]) -> str:
    """One percentage, or the two ends of a range where they differ."""
    return " to ".join(dict.fromkeys(f"{fraction:.0%}" for fraction in fractions))


# The controlled-sentiment experiment


def main_job(name: str = "main_job") -> str:
    """The table of `benchmarks/main_job.py`."""
    header = "seed | reward before | reward after | sequence KL (nats) | seconds | peak memory"
    rows = (
        (
            row["seed"],
            _reward(row["before"]),
            _reward(row["after"]),
            _kl(row["after"]),
            f"{row['process_seconds']:.0f}",
            f"{row['peak_memory_mb']:,} MB",
        )
        for row in _result(name)["rows"]
    )
    return _table(header, rows)


def main_job_origin(name: str = "main_job") -> str:
    """Where the table of `main_job` was measured."""
    return "± is one standard error." + _origin(_result(name)["provenance"]).replace("\n\n", " ")


def sweep() -> str:
    """The grid of `benchmarks/sweep.py`, means over seeds, best reward within 4 nats first."""
    settings: dict[tuple, list[dict]] = {}
    for row in _result("sweep")["rows"]:
        key = row["beta"], row["learning_rate"], row["lora_layers"] or "all"
        settings.setdefault(key, []).append(row["after"])

    # the mean of each, with the error of the held-out prefixes
    means = {}
    for key, found in settings.items():
        mean = {name: float(np.mean([one[name] for one in found])) for name in ("reward", "kl")}
        for name in ("reward_se", "kl_se"):
            mean[name] = math.hypot(*(one[name] for one in found)) / len(found)
        means[key] = mean
    order = sorted(means, key=lambda key: (means[key]["kl"] > 4, -means[key]["reward"]))
    return _table(
        "beta | learning rate | blocks with adapters | seeds | reward | sequence KL (nats)",
        ((*key, len(settings[key]), _reward(means[key]), _kl(means[key])) for key in order),
    ) + _origin(_result("sweep")["provenance"])


def methods() -> str:
    """What each method reaches within 5 nats in the shipped sweep, the most reward first."""
    result = load_sweep()
    header = (
        "within 5 nats, best run of each method | reward | sequence KL (nats) "
        "| fraction of the optimal gain | seconds | tokens"
    )

    # of best-of-N only an upper bound of the KL is known, so its fraction is a lower bound
    bounded = {True: ("at most ", "at least "), False: ("", "")}
    rows = [
        (
            row["label"],
            _reward(row),
            bounded[row["method"] == "best-of-n"][0] + f"{row['kl']:.2f}",
            bounded[row["method"] == "best-of-n"][1] + f"{row['fraction']:.0%}"
            if math.isfinite(row["fraction"])
            else "",
            f"{row['seconds']:.0f}",
            f"{row['tokens']:,}",
        )
        for row in sorted(result.summary(at_most=5), key=lambda row: -row["reward"])
    ]
    text = _table(header, rows)
    if result.seconds:
        minutes = result.seconds / 60
        text += f"\n\nAll {len(result.peak_memory_mb)} runs took {minutes:.0f} minutes in all."
    return text + _origin(result.provenance)


def spread() -> str:
    """Where the shipped runs with several seeds end."""
    results = [load_sweep(folder) for folder in REPEATS]
    header = (
        "at the end of training | seeds | reward | sequence KL (nats) "
        "| fraction of the optimal gain | least gain of a seed | peak memory"
    )
    rows = (
        (
            row["name"],
            row["seeds"],
            f"{row['reward']:.3f} ± {row['reward_sd']:.3f}",
            f"{row['kl']:.2f}",
            _percent(row["fraction"]),
            f"{row['least_gain']:.3f}",
            f"{row['peak_memory_mb']:,} MB",
        )
        for result in results
        for row in result.spread()
    )
    return _table(header, rows) + "".join(_origin(result.provenance) for result in results)


def goodhart() -> str:
    """What the labels' judge and others say to policies that DPO trained on its labels."""
    found = load_goodhart()
    names = ("kl", "reward", "second", "reference_logp", "known")
    digits = (1, 3, 3, 2, 3)

    def line(beta: object, rows: list[dict]) -> list[object]:
        values = [[row[name] for row in rows] for name in names]
        return [beta] + [
            f"{statistics.mean(v):.{d}f} ± {statistics.stdev(v):.{d}f}"
            for v, d in zip(values, digits)
        ]

    betas = found["config"]["betas"]
    before = [row for row in found["rows"] if not row["step"] and row["beta"] == betas[0]]
    ends = {b: [row for row in found["rows"] if row["step"] and row["beta"] == b] for b in betas}
    header = (
        "beta | sequence KL (nats) | reward, the labels' judge | P(positive), second judge "
        "| log pi_ref per token (nats) | fraction of known words"
    )
    rows = [line("reference", before), *(line(beta, ends[beta]) for beta in betas)]
    seeds, judge = len(found["config"]["seeds"]), found["second_judge"]
    text = (
        f"\n\n± is the standard deviation between {seeds} seeds. The second judge is right on "
        f"{judge['accuracy']:.0%} of {judge['held_out']:,} sentences that it was not fitted to."
    )
    return _table(header, rows) + text + _origin(found)


def relatives() -> str:
    """DPO and its relatives where each run has the same KL, and what each was tuned to."""
    if not (ROOT / "dpo_lab" / "assets" / "relatives.json").exists():
        return "Not measured yet: `python benchmarks/relatives.py` measures it."
    found = load_relatives()
    config, kl = found["config"], found["config"]["kl"]
    before = statistics.mean(row["reward"] for row in found["reference"])
    arrays = (np.array(found["optimal"][name]) for name in OptimalFrontier._fields)
    best = float(OptimalFrontier(*arrays).reward_at(kl))
    at = {
        method: [row["reward_at_kl"] for row in found["rows"] if row["method"] == method]
        for method in config["methods"]
    }

    rows = []
    for row in (row for row in found["tuning"] if row["best"]):
        rewards = at[row["method"]]
        against = [one - dpo for one, dpo in zip(rewards, at["DPO"])]
        rows.append(
            (
                row["method"],
                f"{row['knob_name']} {row['knob']:g}, {row['learning_rate']:g}",
                _mean_and_error(rewards),
                f"{(statistics.mean(rewards) - before) / (best - before):.0%}",
                "" if row["method"] == "DPO" else _mean_and_error(against, "+.3f"),
            )
        )
    header = (
        f"method | tuned: own knob, learning rate | reward at {kl:g} nats "
        "| fraction of the optimal gain | reward minus DPO's"
    )
    task, seeds = config["task"], config["seeds"]
    text = (
        f"\n\n± is one standard error over {len(seeds)} seeds, each with pairs of its own; the "
        f"difference is between runs of the same seed. Pairs from {task['prefixes']} prefixes, "
        f"{task['completions']} completions each of at most {task['max_new_tokens']} tokens; "
        f"{config['batch_pairs']} pairs per step, evaluated on {task['eval_prefixes']} held-out "
        f"prefixes. The reference has {before:.3f}, the optimum {best:.3f}. Each method was tuned "
        f"on {len(found['tuning']) // len(at)} settings with one other seed."
    )
    return _table(header, rows) + text + _origin(found)


def _mean_and_error(values: list[float], form: str = ".3f") -> str:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):{form}} ± {error:.3f}"


def on_policy() -> str:
    """The last policy of every method of `benchmarks/on_policy.py`, over its seeds."""
    found = load_on_policy()

    def spread(values: list[float], digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    def line(name: str, lasts: list[dict], beta: float) -> tuple[object, ...]:
        low, high = (statistics.mean(row["fraction"][end] for row in lasts) for end in (0, 1))
        ends = dict.fromkeys((f"{low:.0%}", f"{high:.0%}"))
        return (
            name,
            f"{beta:g}",
            f"{statistics.mean(row['labels'] for row in lasts):,.0f}",
            spread([row["reward"] for row in lasts], 3),
            spread([row["kl"] for row in lasts], 2),
            " to ".join(ends),
            f"{statistics.mean(row['seconds'] for row in lasts):.0f}",
        )

    rows = []
    for name in found["methods"]:
        runs = [run for run in found["runs"] if run["method"] == name]
        if len(runs) > 1:
            rows.append(line(name, [run["rows"][-1] for run in runs], runs[0]["beta"]))
    header = (
        "method | beta | labeled completions | reward | sequence KL (nats) "
        "| fraction of the optimal gain | seconds of one core"
    )
    return _table(header, rows) + _origin(found)


def more_labels() -> str:
    """What DPO offline reaches with more labels at the same KL, from the shipped repeats."""
    result = load_sweep(REPEATS[0])
    runs = [rows for run, rows in result.runs().items() if run.method == "dpo"]
    config = json.loads((REPEATS[0] / "frontier.json").read_text(encoding="utf-8"))["config"]
    k = config["task"]["completions"]
    labels_per_step = config["batch_pairs"] / (k * (k - 1) / 2) * k

    # the same steps of every seed, and the last one
    shared = set.intersection(*({row["step"] for row in rows} for rows in runs))
    ends = [[row for row in rows if row["step"] == s] for s in sorted(shared) for rows in runs]
    groups = [sum(ends[i : i + len(runs)], []) for i in range(0, len(ends), len(runs))]
    groups.append([rows[-1] for rows in runs])

    lines = []
    for group in groups:
        step = statistics.mean(row["step"] for row in group)
        if step < 32:
            continue
        rewards, kls = ([row[name] for row in group] for name in ("reward", "kl"))
        reward, kl = statistics.mean(rewards), statistics.mean(kls)
        ends = dict.fromkeys(f"{part:.0%}" for part in result.fraction_bounds(reward, kl))
        lines.append(
            (
                f"{step * labels_per_step:,.0f}",
                f"{reward:.3f} ± {statistics.stdev(rewards):.3f}",
                f"{kl:.2f} ± {statistics.stdev(kls):.2f}",
                " to ".join(ends),
            )
        )
    header = (
        "labeled completions so far | reward | sequence KL (nats) | fraction of the optimal gain"
    )
    return _table(header, lines) + _origin(result.provenance)


def embedded_model() -> str:
    """A sentence from the card of the embedded model."""
    folder = ROOT / "dpo_lab" / "assets" / "gpt2-imdb"
    card = json.loads((folder / "card.json").read_text())
    held_out, size = card["held_out"], (folder / "model.safetensors").stat().st_size
    return (
        f"It has {card['parameters'] / 1e6:.1f} M parameters ({size / 1e6:.1f} MB), GPT-2's "
        f"architecture and a byte-level BPE of {card['config']['vocabulary']:,} tokens, and was "
        f"trained from scratch on the 22,500 training reviews in {card['minutes']:.0f} minutes on "
        f"two CPU cores. On the {held_out['reviews']:,} held-out reviews it needs "
        f"{held_out['bits_per_byte']:.3f} bits per byte "
        f"({held_out['nats_per_token']:.3f} nats per token)."
    )


# The chat model


def _chat() -> dict:
    """What `benchmarks/chat.py` recorded."""
    return json.loads((ROOT / "dpo_lab" / "assets" / "chat.json").read_text(encoding="utf-8"))


def chat() -> str:
    """Before and after DPO, seed by seed, with what it took."""
    result, task = _chat(), _chat()["config"]["task"]
    header = (
        "seed | reward before | reward after | P(label) before, after | words before, after "
        "| sequence KL (nats) | win rate by reward | by P(label) | P(label), length-controlled"
    )
    rows = []
    for row in result["rows"]:
        before, after, rates = row["before"], row["after"], row["win_rates"]
        rows.append(
            (
                row["seed"],
                _reward(before),
                _reward(after),
                f"{row['label_before']:.2f}, {row['label_after']:.2f}",
                f"{before['words']:.0f}, {after['words']:.0f}",
                _kl(after),
                *(_interval(rates[name]["rate"], rates[name]) for name in ("reward", "label")),
                _ends(*(rates["label"]["length_controlled"] or [math.nan] * 3)),
            )
        )

    # what was run, and what it took
    dpo, one = result["config"]["dpo"], result["rows"][0]
    took = ", ".join(f"{name} {seconds:.0f}" for name, seconds in one["seconds"].items())
    asked = (
        f"\n\n{task['prefixes']} training reviews, {task['completions']} summaries each of at most "
        f"{task['max_new_tokens']} tokens, {one['pairs']} pairs, {one['steps']} steps of "
        f"{dpo['batch_pairs']} pairs; beta {dpo['beta']:g}, LoRA rank {dpo['lora_rank']}, learning "
        f"rate {dpo['loop']['learning_rate']:g}. Evaluated on {task['eval_prefixes']} held-out "
        "reviews, ± one standard error, win rates against the model before with 95% intervals. "
        f"Seconds of seed {one['seed']}: {took}; peak memory {one['peak_memory_mb']:,} MB. Other "
        "work ran on the same cores meanwhile."
    )
    return _table(header, rows) + asked + _origin(result["provenance"])


def _interval(rate: float, found: dict) -> str:
    return _ends(rate, found["low"], found["high"])


def _ends(value: float, low: float, high: float) -> str:
    """A fraction with the ends of its interval; empty where it is NaN."""
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if value == value else "none"


def chat_samples(n: int = 5) -> str:
    """The first recorded summaries of the first seed, as text."""
    rows = [
        (
            row["review"],
            "positive" if row["label"] else "negative",
            f"{for_markdown(row['before'])} ({row['reward_before']:.2f})",
            f"{for_markdown(row['after'])} ({row['reward_after']:.2f})",
        )
        for row in _chat()["rows"][0]["samples"][:n]
    ]
    return _table("held-out review | label | before (reward) | after (reward)", rows)


def gguf() -> str:
    """Seconds in which SmolLM2 and its tokenizer load."""
    result = _result("gguf")
    names = {
        "transformers": "`from_pretrained` of transformers",
        "first": "`load_model`, `load_tokenizer`, the first time",
        "again": "the same, afterwards",
    }
    rows = [
        (name, " to ".join(f"{end:.1f}" for end in (min(times), max(times))))
        for name, times in ((names[key], result["seconds"][key]) for key in names)
    ]
    return _table("model and tokenizer by | seconds", rows) + _origin(result["provenance"])


# Speed on a CPU


def _ours_and_trl(name: str) -> dict[str, tuple[list[dict], dict, dict]]:
    """For each workload: the rows of `dpo_lab`, TRL's with its defaults, and TRL's at its best."""
    found: dict[str, dict[str, list[dict]]] = {}
    for row in _result(name)["table"]:
        if row["job"] == "dpo":
            found.setdefault(row["workload"], {}).setdefault(row["contender"], []).append(row)

    def fastest(rows: list[dict]) -> dict:
        return max(rows, key=lambda row: row["pairs_per_second"])

    return {
        workload: (of["dpo_lab"], fastest(of["trl_default"]), fastest(of["trl_best"]))
        for workload, of in found.items()
    }


def _times(ours: dict, theirs: dict, field: str) -> float:
    return ours[field] / theirs[field]


def _processes(result: dict) -> str:
    """In how many processes each point was measured."""
    counts = Counter(
        tuple(run[k] for k in ("job", "workload", "contender", "precision"))
        for run in result["runs"]
    )
    return " or ".join(map(str, sorted(set(counts.values()))))


def ratios(name: str = "cpu") -> str:
    """Pairs per second and peak memory against TRL, one line per workload."""
    header = (
        "workload | precision | pairs/s | against TRL's defaults | against TRL's best "
        "| peak memory against the two"
    )
    rows = []
    for workload, (ours, *theirs) in _ours_and_trl(name).items():
        for row in ours:
            times = [_times(row, other, "pairs_per_second") for other in theirs]
            memory = [_times(row, other, "peak_memory_mb") for other in theirs]
            rows.append(
                (
                    WORKLOADS[workload],
                    row["precision"],
                    f"{row['pairs_per_second']:.2f}",
                    *(f"{ratio:.1f}x" for ratio in times),
                    ", ".join(f"{ratio:.2f}x" for ratio in memory),
                )
            )
    result = _result(name)
    more = f", processes per implementation: {_processes(result)}"
    return _table(header, rows) + _origin(result["provenance"], more)


def speed(name: str = "cpu") -> str:
    """Every implementation on every workload."""
    result = _result(name)
    header = (
        "job, workload | implementation | precision | pairs/s (least, most) "
        "| without the reference | completion tokens/s | reference tokens/s | peak memory "
        "| fraction of the limit | difference in loss"
    )

    # the losses that the others are compared with
    ours = [
        row
        for row in result["table"]
        if (row["contender"], row["precision"]) == ("dpo_lab", "float32")
    ]
    exact = {(row["job"], row["workload"]): row["loss"] for row in ours}

    rows = []
    for row in result["table"]:
        least, most = row["spread"]
        reference = row["reference_tokens_per_second"]
        difference = abs(row["loss"] - exact[row["job"], row["workload"]])
        rows.append(
            (
                f"{row['job']}, {row['workload']}",
                row["contender"],
                row["precision"],
                f"{row['pairs_per_second']:.2f} ({least:.2f}, {most:.2f})",
                f"{row['pairs_per_second_without_reference']:.2f}",
                f"{row['completion_tokens_per_second']:,.0f}",
                f"{reference:,.0f}" if reference else "",
                f"{row['peak_memory_mb'] / 1e3:.1f} GB",
                f"{row['share_of_limit']:.0%}",
                "" if row in ours else f"{difference:.0e}",
            )
        )
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {precision}"
        for precision, rate in result["matmul_flops_per_second"].items()
    )
    more = f" ({rates}), processes per implementation: {_processes(result)}"
    return _table(header, rows) + _origin(result["provenance"], more)


def savings() -> str:
    """Each saving left out alone, and all of them."""
    result = _result("cost")
    names = {"all": "nothing", "none": "any of them"}
    rows = []
    for name in result["savings"]["paper"]:
        cells = []
        for runs in result["savings"].values():
            seconds = _times(runs[name], runs["all"], "training_seconds")
            memory = _times(runs[name], runs["all"], "peak_memory_mb")
            cells.append(f"{seconds:.2f}x time, {memory:.2f}x memory")
        rows.append((names.get(name, name), *cells))
    header = " | ".join(["without", *(WORKLOADS[workload] for workload in result["savings"])])
    return _table(header, rows) + _origin(result["provenance"])


def sampling() -> str:
    """Sampling and labeling on the embedded GPT-2."""
    result = _result("sampling")
    ours, theirs = (
        statistics.median(result["tokens_per_second"][name]) for name in ("dpo_lab", "generate")
    )
    return (
        f"`sample_completions` draws {ours:,.0f} completion tokens per second from the embedded "
        f"GPT-2; transformers' `generate` draws {theirs:,.0f}. That is {result['ratio']:.1f} times "
        f"as many. The TF-IDF reward labels {result['labels_per_second']:,.0f} of the completions "
        "per second." + _origin(result["provenance"])
    )


def long_prompts() -> str:
    """Sampling after long prompts, which are read once."""
    result = _result("sampling")
    rows = []
    for one in result["long"]:
        ours, before, theirs = one["tokens_per_second"].values()
        rows.append(
            (
                one["shape"],
                f"{one['prompt_tokens'] // 2} to {one['prompt_tokens']}",
                f"{ours:,.0f}",
                f"{before:,.0f} ({ours / before:.1f}x)",
                f"{theirs:,.0f} ({ours / theirs:.1f}x)",
            )
        )
    header = "shape | prompt tokens | `sample_completions` | as it was | `generate`"
    return _table(header, rows) + _origin(result["long_provenance"])


def shared_prompts() -> str:
    """Log-probs and training after long prompts, beside one row per completion."""
    result, rows = _result("long_prompts"), []
    for point in result["points"]:
        apart, masked, shared = point["contenders"].values()

        def beside(field: str, unit: float, digits: int, apart=apart, shared=shared) -> str:
            ratio = apart[field] / shared[field]
            return f"{shared[field] / unit:,.{digits}f} ({ratio:.1f}x)"

        rows.append(
            (
                point["shape"],
                f"{point['prompt_tokens']:,}",
                str(point["completions"]),
                beside("logps_cpu", 1, 2),
                beside("train_cpu", 1, 2),
                f"{masked['train_cpu'] / shared['train_cpu']:.2f}x",
                beside("saved_bytes", 1e6, 0),
                beside("peak_bytes", 1e6, 0),
            )
        )
    header = (
        "shape | prompt tokens | K | log-probs, s | forward and backward, s | under a mask | "
        "saved, MB | peak, MB"
    )
    return _table(header, rows) + _origin(result["provenance"])


def limit() -> str:
    """What a step's seconds go to, and what that leaves on the processor with matrix units."""
    result = _result("limit")
    steps = result["steps"]
    parts = {
        name: {kind: s / sum(step["kinds"].values()) for kind, s in step["kinds"].items()}
        for name, step in steps.items()
    }
    kinds = sorted(parts["bfloat16"], key=lambda kind: -parts["bfloat16"][kind])
    rows = [(kind, *(f"{part.get(kind, 0):.0%}" for part in parts.values())) for kind in kinds]
    for name, field in (("CPU seconds", "seconds"), ("its matmuls alone, s", "limit_seconds")):
        rows.append((name, *(f"{step[field]:.1f}" for step in steps.values())))
    fractions = (s["limit_seconds"] / s["seconds"] for s in steps.values())
    rows.append(("fraction of the limit", *(f"{fraction:.0%}" for fraction in fractions)))
    rates = ", ".join(
        f"{rate / 1e9:,.0f} GFLOP/s in {name}"
        for name, rate in result["matmul_flops_per_second"].items()
    )
    table = _table(" | ".join(["of the step", *steps]), rows)
    origin = _origin(result["provenance"], f" ({rates})")
    paragraphs = (_compiled_block(), _on_the_first_machine())
    return "\n\n".join([f"{table}{origin}", *filter(None, paragraphs)])


def _compiled_block() -> str:
    """What torch.compile makes of a block of the same model."""
    block = _result("limit")["block"]
    ratios = " and ".join(
        f"{ways['compiled'] / ways['as it is']:.2f} times the CPU time in {name}"
        for name, ways in block["cpu_seconds"].items()
    )
    return (
        f"A block alone, forward and backward on {block['tokens']:,} tokens, takes {ratios} when "
        "torch.compile has fused it."
    )


def _on_the_first_machine() -> str:
    """The same step on the processor of cpu.json, if all but its matmuls takes as long there.

    Nothing where float32 is the faster precision there, in which the step was then measured.
    """
    step, fast = _result("limit")["steps"]["bfloat16"], _result("cpu")
    wanted = {"job": "dpo", "workload": "short", "contender": "dpo_lab", "precision": "bfloat16"}
    row = next((row for row in fast["table"] if wanted.items() <= row.items()), None)
    if row is None:
        return ""
    pairs = next(run["pairs"] for run in fast["runs"] if wanted.items() <= run.items())

    # core-seconds of the step there and at its limit, and those of the rest here
    cores = 2
    whole = cores * pairs / row["pairs_per_second"]
    least = row["share_of_limit"] * whole
    fraction = {kind: s / sum(step["kinds"].values()) for kind, s in step["kinds"].items()}
    rest = (1 - fraction["matmuls"]) * step["seconds"]
    light = ("casts and copies", "activation", "layer norm", "other")
    elementwise = sum(fraction[kind] for kind in light) * step["seconds"]
    rate = fast["matmul_flops_per_second"]["bfloat16"] / 1e9
    return (
        f"On the first machine of the speed tables, whose bfloat16 matmuls reach {rate:,.0f} "
        f"GFLOP/s, this step takes {whole:.1f} core-seconds, {least / whole:.0%} of the limit. If "
        f"all but the matmuls takes as long there as here, {rest:.1f} s, then {whole - rest:.1f} s "
        f"are left for the matmuls, which so reach {least / (whole - rest):.0%} of their full "
        f"rate. A block whose elementwise work took no time at all ({elementwise:.1f} s less) "
        f"would reach {least / (whole - elementwise):.0%}."
    )


def latency() -> str:
    """From a slider's event, or a move of the landscape's point, to the new picture."""
    result = _result("latency")
    apart, row = result["apart"], result["in a row"]
    point = ""
    if "landscape" in result:
        one, other = result["landscape"]["apart"], result["landscape"]["in a row"]
        point = (
            f" When the policy is dragged over its landscape, the four are {one['median']:.0f}, "
            f"{one['p95']:.0f}, {other['median']:.0f} and {other['p95']:.0f} ms."
        )
    return (
        f"Over {len(apart['milliseconds'])} drags of beta's slider {result['pause']} s apart, with "
        f"ipykernel {result['ipykernel']}, the new picture is in the page after a median of "
        f"{apart['median']:.0f} ms, and within {apart['p95']:.0f} ms for 95% of them. When each "
        f"move follows as soon as the last picture is there, the two are {row['median']:.0f} and "
        f"{row['p95']:.0f} ms." + point + _origin(result["provenance"])
    )


# Judges


def judge_biases() -> str:
    """Planted biases and what was measured of them."""
    result = _result("judge_biases")
    header = "planted | in their intervals together | mean estimate | 95% intervals that hold it"
    names = {"accuracy": "accuracy", "position_bias": "position", "length_bias": "length"}
    rows = [
        (
            ", ".join(f"{names[name]} {value:g}" for name, value in row["planted"].items()),
            f"{row['held']} of {row['seeds']} seeds",
            ", ".join(f"{round(row['mean'][name], 3) + 0:.3f}" for name in names),
            ", ".join(f"{row['coverage'][name]:.1%}" for name in names),
        )
        for row in result["rows"]
    ]
    first, config = result["rows"][0], result["config"]
    error = math.sqrt(0.95 * 0.05 / first["more_seeds"])
    text = (
        f"\n\n{config['prompts']} pairs per seed, in both orders. The second column is at "
        f"{first['level']:.3%} per interval, so that all {3 * first['seeds']} of a row hold "
        "together with probability 95% (Bonferroni). The last two are over "
        f"{first['more_seeds']:,} further seeds; a coverage of 95% has a standard error of "
        f"{error:.1%} there."
    )
    return _table(header, rows) + text + _origin(result["provenance"])


def prompts_and_power() -> str:
    """What a number of prompts can say about a win rate."""
    header = "prompts | half-width at 50% | chance to tell 55% from 50% | chance to tell 60%"
    rows = [
        (
            f"{n:,}",
            f"± {100 * half_width(n):.1f} points",
            f"{power(n, 0.55):.0%}",
            f"{power(n, 0.6):.0%}",
        )
        for n in (50, 100, 200, 400, 800, 2_000)
    ]
    return _table(header, rows)


# On a GPU


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def gpu_exactness() -> str:
    """How far each form of a batch is from the float64 loop, and the other checks of that stage.

    Each value is that of the newest run that measured it.
    """
    if not _gpu():
        return UNMEASURED
    runs = [_gpu(), _result("gpu-exactness")]
    found: dict[str, tuple[dict, str]] = {}
    for result in runs:
        for name, value in result["stages"]["exactness"]["results"].items():
            if name != "tests" and (name not in found or "error" in found[name][0]):
                found[name] = value, result["provenance"]["commit"]

    errors, others = [], []
    for name, (value, commit) in found.items():
        kind, _, what = name.partition("/")
        failed = f"failed: {value['error']}" if "error" in value else ""
        if kind == "errors":
            cells = [failed, ""]
            if not failed:
                cells = [f"{value['logps_nats']:.1e}", f"{value['gradient']:.1e}"]
            errors.append((what.replace("/", ", "), *cells, commit))
        else:
            cells = (f"{key.replace('_', ' ')}: {_short(x)}" for key, x in value.items())
            others.append((name.replace("/", ", "), failed or ", ".join(cells), commit))

    header = (
        "model, precision, form of the batch | log-prob, off by (nats) | gradient, off by | commit"
    )
    tables = _table(header, errors) + "\n\n" + _table("check | result | commit", others)
    return tables + _on_card(runs[0])


def gpu_dpo() -> str:
    """The paper's protocol, for each reference."""
    result = _gpu()
    if not result:
        return UNMEASURED
    found = result["stages"]["dpo"]["results"]
    header = (
        "reference | prefixes | pairs | steps | reward before | reward after "
        "| sequence KL (nats) | sampling (s) | training (s) | seconds per step | peak memory"
    )
    rows = []
    for name, label in (("protocol", "trained here"), ("protocol, embedded", "embedded")):
        run = found[name]
        rows.append(
            (
                label,
                f"{run['config']['prefixes']:,}",
                f"{run['pairs']:,}",
                run["steps"],
                _reward(run["before"]),
                _reward(run["after"]),
                _kl(run["after"]),
                f"{run['seconds']['sample']:.0f}",
                f"{run['seconds']['train']:.0f}",
                f"{run['seconds_per_step']:.3f}",
                f"{run['peak_memory_mb']:,} MB",
            )
        )
    made = found["from scratch"]
    held_out = made["held_out"]
    return (
        "A model of GPT-2 small's shape with the tokenizer of 8,192 tokens "
        f"({made['parameters'] / 1e6:.0f}M parameters), trained from scratch for "
        f"{made['seconds']['train']:.0f} seconds ({made['steps']:,} steps, "
        f"{made['tokens'] / 1e6:.0f}M tokens), needs {held_out['bits_per_byte']:.3f} bits per byte "
        f"on {held_out['reviews']:,} held-out reviews. DPO with the paper's settings on it and on "
        "the embedded model, with as many prefixes as the time allowed:\n\n"
        + _table(header, rows)
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
    header = (
        "workload | GPT-2 | implementation | pairs/s | against TRL's best | seconds per step "
        "| of them for the reference | peak memory | against TRL's best "
        "| fraction of the matmul rate | forward passes | loss"
    )
    rows = []
    ours_first = sorted(runs.items(), key=lambda item: (item[0][:2], item[0][2] != "dpo_lab"))
    for (workload, size, who), run in ours_first:
        best = runs.get((workload, size, "trl_best"))
        rows.append(
            (
                workload,
                size,
                who,
                f"{run['pairs_per_second']:,.0f}",
                f"{_times(run, best, 'pairs_per_second'):.2f}x" if best else "",
                f"{statistics.median(run['step_seconds']):.3f}",
                f"{run['reference_seconds_per_step']:.3f}",
                f"{run['peak_memory_mb'] / 1e3:.1f} GB",
                f"{_times(run, best, 'peak_memory_mb'):.2f}x" if best else "",
                f"{run['fraction_of_matmul_rate']:.1%}",
                run["passes"],
                f"{run['loss']:.4f}",
            )
        )
    profile = found["profile"]
    waits = profile["waits_per_step"].get("cudaStreamSynchronize", 0)
    return (
        _table(header, rows)
        + f"\n\nThe matmul rate, {found['matmul_flops_per_second'] / 1e12:,.0f} TFLOP/s, is that "
        "of a product of two 8,192 x 8,192 matrices. Under the profiler a step of the paper's "
        f"protocol on GPT-2 large launches {profile['launches_per_step']:,.0f} kernels and waits "
        f"for the GPU {waits:.0f} times, at its end." + _on_card(result)
    )


def gpu_summary() -> str:
    """A paragraph on what was measured on a GPU."""
    result = _gpu()
    if not result:
        return UNMEASURED
    found = result["stages"]["speed"]["results"]
    ours, best = (found[f"paper/large/{who}"] for who in ("dpo_lab", "trl_best"))
    ratios = [
        _times(row, found[name.replace("dpo_lab", "trl_best")], "pairs_per_second")
        for name, row in found.items()
        if name.endswith("/dpo_lab")
    ]
    run = result["stages"]["dpo"]["results"]["protocol"]
    return (
        f"On one {result['card']['name']}, the paper's protocol on GPT-2 large's shape in bfloat16 "
        f"runs at {ours['pairs_per_second']:,.0f} pairs/s, reference log-probs included: "
        f"{_times(ours, best, 'pairs_per_second'):.1f} times TRL's best, in "
        f"{_times(ours, best, 'peak_memory_mb'):.2f}x of its memory. Over {len(ratios)} workloads "
        f"and sizes it is between {min(ratios):.2f} and {max(ratios):.2f} times TRL's best, with "
        "the lowest ratios on small models. DPO on a model of GPT-2 small's shape, "
        f"{run['pairs']:,} pairs in {run['seconds']['train']:.0f} seconds, moves the reward of "
        f"held-out completions from {run['before']['reward']:.3f} to {run['after']['reward']:.3f} "
        f"at a sequence KL of {run['after']['kl']:.2f} nats. [The whole report](gpu.md)."
        + _on_card(result)
    )


# The README's results, one sentence each


def results() -> str:
    """Each result in one sentence, with a link to the page that holds all of it."""
    lines = [_experiment_result(), _methods_result(), _speed_result(), _gpu_result()]
    return "\n".join(f"- {line}" for line in lines)


def _experiment_result() -> str:
    mean, runs = _result("main_job")["mean"], _result("main_job")["rows"]
    return (
        f"DPO raises the reward of held-out completions from {mean['reward_before']:.2f} to "
        f"{mean['reward_after']:.2f} at a sequence KL of {mean['kl_after']:.1f} nats "
        f"({len(runs)} seeds): [results](docs/results.md)."
    )


def _methods_result() -> str:
    found = {row["name"]: row for folder in REPEATS for row in load_sweep(folder).spread()}
    dpo, ppo = (
        next(row for name, row in found.items() if name.startswith(method))
        for method in ("DPO", "PPO, learned reward")
    )
    return (
        f"DPO reaches {_percent(dpo['fraction'])} of the gain that is possible at its KL of "
        f"{dpo['kl']:.1f} nats, and PPO with a learned reward {_percent(ppo['fraction'])} at "
        f"{ppo['kl']:.1f} nats (bounds; {dpo['seeds']} and {ppo['seeds']} seeds): "
        "[methods compared](docs/results.md#methods-on-one-task)."
    )


def _speed_result() -> str:
    ours, _, best = _ours_and_trl("cpu")["paper"]
    fast = " and ".join(
        f"{_times(row, best, 'pairs_per_second'):.1f} times ({row['precision']})" for row in ours
    )
    memory = " and ".join(f"{_times(row, best, 'peak_memory_mb'):.2f}x" for row in ours)
    return (
        f"On two CPU cores GPT-2 trains {fast} as fast as with TRL's best settings, in {memory} of "
        "the memory: [speed](docs/speed.md)."
    )


def _gpu_result() -> str:
    result = _gpu()
    if not result:
        return UNMEASURED
    found = result["stages"]["speed"]["results"]
    ours, best = (found[f"paper/large/{who}"] for who in ("dpo_lab", "trl_best"))
    return (
        f"On one {result['card']['name']}, GPT-2 large trains "
        f"{_times(ours, best, 'pairs_per_second'):.1f} times as fast as with TRL's best settings, "
        f"in {_times(ours, best, 'peak_memory_mb'):.2f}x of the memory: [GPU](docs/gpu.md)."
    )


# The reference pages


def front_door() -> str:
    """The names of `from dpo_lab import ...`, by the module in which each lives."""
    names = {}
    for name, home in dpo_lab._HOME.items():
        names.setdefault(home, []).append(f"`{name}`")
    rows = ((", ".join(found), f"`{home}`") for home, found in names.items())
    return _table("`from dpo_lab import ...` | lives in", rows)


def equations() -> str:
    """The equation index, with the notebook cells that show each proof and the test of each."""
    code = {
        f"{path.stem}, cell {number}": "".join(cell["source"])
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
        for number, cell in enumerate(
            json.loads(path.read_text(encoding="utf-8"))["cells"], start=1
        )
        if cell["cell_type"] == "code"
    }
    rows = []
    for row in equation_index():
        # the first cell that calls each proof
        names = row["proved by"].split(", ")
        shown = [
            next(place for place, source in code.items() if re.search(rf"\b{name}\(", source))
            for name in names
        ]
        function, _, field = row["computed by"].partition(" ")
        computed = f"`{function}` {field}".strip() if function else "(no number: an identity)"
        rows.append(
            (
                row["equation"],
                row["here"],
                ", ".join(f"`{name}`" for name in names),
                "; ".join(dict.fromkeys(shown)),
                computed,
                f"`{EQUATION_TESTS[row['equation']]}`",
            )
        )
    return _table("equation | here | proved by `symbolic.` | shown in | computed by | test", rows)


# Homework


def exercises() -> str:
    """What each exercise measures, from the first cell of its notebook."""
    header = "notebook | exercise | what it measures | difficulty | minutes | points"
    rows = []
    for path in sorted((ROOT / "notebooks" / "exercises").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        graded = (cell["metadata"].get("nbgrader", {}) for cell in cells)
        points = {meta["grade_id"]: meta["points"] for meta in graded if meta.get("grade")}
        link = f"[{path.stem[:4]}](../notebooks/exercises/{path.name})"
        for line in re.findall(r"^\| `.*$", "".join(cells[0]["source"]), re.MULTILINE):
            name, *rest = (part.strip() for part in line.strip("|").split(" | "))
            rows.append((link, name, *rest, points["check_" + name.strip("`")[len("my_") :]]))
    return _table(header, rows)


def mistakes_origin(part: str) -> str:
    """Where one part of `benchmarks/mistakes.py` was measured."""
    found = mistake_tables.results()[part]
    origin = _origin(found["provenance"]).lstrip()
    if part == "exact":
        return origin
    config = found["config"]
    counts = f"{config['prefixes']} prompts with 4 completions each, {config['held_out']} held out."
    return f"{counts} {origin}"


def faults() -> str:
    """What one sees of each fault, its cause and its cure."""
    rows = [
        (f"`{name}`", fault.title, fault.sees, fault.cause, fault.cure)
        for name, fault in FAULTS.items()
    ]
    return _table("fault | in words | what one sees | cause | cure", rows)


def diagnosis() -> str:
    """How many runs with each fault `diagnose` finds it in, and what else it says."""
    found = load_diagnosis_table()
    rows, missed = [], 0
    for planted, counts in found["matrix"].items():
        others = {name: n for name, n in counts["found"].items() if name != planted}
        right = counts["found"].get(planted, 0)
        if planted == "healthy":
            right = sum(not row["found"] for row in found["runs"] if row["planted"] == "healthy")
        missed += counts["runs"] - right
        also = ", ".join(f"`{name}` {n}" for name, n in others.items())
        rows.append((f"`{planted}`", counts["runs"], right, also or "-"))
    planted, healthy = len(found["runs"]), found["matrix"]["healthy"]["runs"]
    by_trl = sum(row["source"] == "trl" for row in found["runs"])
    return "\n".join(
        [
            f"{planted} runs, {healthy} of them healthy, {by_trl} by TRL; {missed} verdicts are "
            "wrong: a planted fault that is not named, or a healthy run with an error or a "
            "warning.",
            "",
            _table("planted | runs | found (healthy: without a finding) | also found", rows),
            "",
            "A fault brings others with it: a learning rate that is too high also makes samples "
            f"repeat themselves. {_origin(found)}",
        ]
    )


BLOCKS = {
    "faults": faults,
    "diagnosis": diagnosis,
    "main job": main_job,
    "main job origin": main_job_origin,
    "main job in avx": partial(main_job, "main_job-avx2"),
    "main job in avx origin": partial(main_job_origin, "main_job-avx2"),
    "sweep": sweep,
    "methods": methods,
    "spread": spread,
    "goodhart": goodhart,
    "relatives": relatives,
    "on policy": on_policy,
    "more labels": more_labels,
    "embedded model": embedded_model,
    "chat": chat,
    "chat samples": chat_samples,
    "gguf": gguf,
    "results": results,
    "ratios": ratios,
    "ratios of the second machine": partial(ratios, "cpu-avx2"),
    "speed": speed,
    "speed of the second machine": partial(speed, "cpu-avx2"),
    "savings": savings,
    "sampling": sampling,
    "long prompts": long_prompts,
    "shared prompts": shared_prompts,
    "limit": limit,
    "latency": latency,
    "judge biases": judge_biases,
    "prompts and power": prompts_and_power,
    "tax before": tax_tables.before,
    "tax kl": partial(tax_tables.sweep, "kl"),
    "tax ptx": partial(tax_tables.sweep, "ptx"),
    "tax dpo": partial(tax_tables.sweep, "dpo"),
    "tax at equal reward": tax_tables.equal_reward,
    "tax rude": lambda: tax_tables.rude() + _origin(load_tax()),
    "gpu": gpu_summary,
    "gpu exactness": gpu_exactness,
    "gpu dpo": gpu_dpo,
    "gpu speed": gpu_speed,
    "scale": table,
    "front door": front_door,
    "equations": equations,
    "exercises": exercises,
    "origin of mistakes": partial(mistakes_origin, "exact"),
    "origin of trained mistakes": partial(mistakes_origin, "model"),
    **{
        f"{verb} {exercise.replace('_', ' ')}": partial(tables, exercise)
        for verb, tables, exercises in (
            ("driven", mistake_tables.driven, table_of_mistakes()),
            ("trained", mistake_tables.trained, MISTAKES_TRAINED_WITH),
        )
        for exercise in exercises
    },
}


def pages() -> list[Path]:
    """Every page that may hold a block."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """A page with its blocks filled."""
    for name in re.findall(r"<!-- (?!end)([a-z ]+) -->", text):
        start = text.index(f"<!-- {name} -->")
        end = text.index("<!-- end -->", start)
        text = f"{text[:start]}<!-- {name} -->\n{BLOCKS[name]()}\n{text[end:]}"
    return text


if __name__ == "__main__":
    for page in pages():
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
    shipped = load_sweep()
    figure = plot_sweep(shipped.by_method(), shipped.optimal, shipped.band)
    figure.savefig(ROOT / "docs" / "frontier.png")
