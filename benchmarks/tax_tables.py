"""The tables of docs/tax.md, from the runs that benchmarks/tax.py recorded."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from dpo_lab.sentiment.results import load_tax
from dpo_lab.sentiment.tax import at_equal_reward, end_over_seeds

MEASURES = (
    ("nats_per_byte", "reviews", "nats per byte, reviews"),
    ("nats_per_byte", "rotten_tomatoes", "Rotten Tomatoes"),
    ("nats_per_byte", "license", "license"),
    ("accuracy", "next_sentence", "accuracy, next sentence"),
    ("accuracy", "agreement", "agreement"),
    ("accuracy", "article", "article"),
)
REQUESTS = {"respect": "respect", "none": "nothing", "disrespect": "the opposite"}
METHODS = {"dpo": "DPO", "dpo-sft": "DPO and SFT"}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(pair: Sequence[float]) -> str:
    """A value and its standard error."""
    return f"{pair[0]:.3f} ± {pair[1]:.3f}"


def _change(pair: Sequence[float]) -> str:
    """A difference, with its sign, and its standard error."""
    return f"{pair[0]:+.3f} ± {pair[1]:.3f}"


def _settings(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What a reader calls each setting, and the values its runs have; in order of coefficients."""
    runs = found["runs"]
    kls = sorted({r["kl_coefficient"] for r in runs if r["method"] == "ppo"})
    gammas = sorted({r["ptx_coefficient"] for r in runs} - {0.0})
    ptx = [
        (f"PPO-ptx, gamma {gamma:g}", {"kl_coefficient": kls[0], "ptx_coefficient": gamma})
        for gamma in gammas
    ]
    kl = [
        (f"PPO, KL coefficient {each:g}", {"kl_coefficient": each, "ptx_coefficient": 0.0})
        for each in kls
    ]
    methods = {run["method"] for run in runs}
    dpo = [(label, {"method": name}) for name, label in METHODS.items() if name in methods]
    return [(label, {"method": "ppo"} | setting) for label, setting in kl + ptx] + dpo


def _chosen(runs: list[dict[str, Any]], setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs with these values."""
    return [run for run in runs if all(run[key] == value for key, value in setting.items())]


def before() -> str:
    """What the model does before training, and on how much it was measured."""
    found = load_tax()
    sizes, rows = found["sizes"], []
    for group, name, label in MEASURES:
        words = label if ", " in label else f"{_unit(group)}, {label}"
        n = sizes["texts" if group == "nats_per_byte" else "probes"][name]
        rows.append([words, _value(found["before"][group][name]), f"{n:,}"])
    for name, asked in REQUESTS.items():
        label = f"fraction of rude completions, asked for {asked}"
        n = sizes["prompts"][name]
        rows.append([label, _value(found["before"]["rude"][name]), f"{n:,} prompts"])
    return _table(["measure", "before training", "texts or questions"], rows)


def _unit(group: str) -> str:
    """What a group of measures counts."""
    return group.replace("_", " ")


def sweep(kind: str) -> str:
    """The changes at the end of runs: of the "ptx" sweep, the "kl" sweep or of "dpo"."""
    found = load_tax()
    first = found["config"]["kl_coefficients"][0]
    wanted: dict[str, Callable[[dict[str, Any]], bool]] = {
        "ptx": lambda s: s["method"] == "ppo" and s["kl_coefficient"] == first,
        "kl": lambda s: s["method"] == "ppo" and not s["ptx_coefficient"],
        "dpo": lambda s: s["method"] != "ppo",
    }
    rows = []
    for label, setting in _settings(found):
        if wanted[kind](setting):
            label = (
                label.replace(f"KL coefficient {first:g}", "gamma 0") if kind == "ptx" else label
            )
            ends = [run["rows"][-1] for run in _chosen(found["runs"], setting)]
            changes = [
                _change(end_over_seeds(found["runs"], group, name, **setting)[:2])
                for group, name, _ in MEASURES
            ]
            rows.append([label, _mean(ends, "reward", 3), _mean(ends, "kl", 1), *changes])
    header = ["run", "reward", "KL (nats)", *(label for _, _, label in MEASURES)]
    return _table(header, rows)


def _mean(rows: list[dict[str, Any]], name: str, digits: int) -> str:
    """Mean and standard deviation between seeds."""
    values = [row[name] for row in rows]
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def equal_reward() -> str:
    """Changes minus those of other runs at the same reward."""
    found = load_tax()
    runs, before = found["runs"], found["before"]["reward"]
    ppo = [run for run in runs if run["method"] == "ppo" and not run["ptx_coefficient"]]
    dpo = [run for run in runs if run["method"] == "dpo"]

    rows = []
    for label, setting in _settings(found):
        chosen = _chosen(runs, setting)
        others, name_of_others = (ppo, "PPO") if setting.get("ptx_coefficient") else (dpo, "DPO")
        cells, seeds = [], 0
        for group, name, _ in MEASURES if others[0] not in chosen else ():
            try:
                *pair, seeds = at_equal_reward(chosen, others, group, name, before)
                cells.append(_change(pair))
            except ValueError:
                break
        if seeds:
            rows.append([f"{label}, minus {name_of_others}", str(seeds), *cells])
    return _table(["run", "seeds compared", *(label for _, _, label in MEASURES)], rows)


def rude() -> str:
    """The fraction of rude completions at the end of runs, by request."""
    found = load_tax()
    rows = [["before", *(_value(found["before"]["rude"][name]) for name in REQUESTS)]]
    for label, setting in _settings(found):
        cells = []
        for name in REQUESTS:
            change, error, _ = end_over_seeds(found["runs"], "rude", name, **setting)
            ends = [run["rows"][-1]["rude"][name][0] for run in _chosen(found["runs"], setting)]
            cells.append(f"{statistics.mean(ends):.3f} ({change:+.3f} ± {error:.3f})")
        rows.append([label, *cells])
    return _table(["run", *(f"asked for {asked}" for asked in REQUESTS.values())], rows)
