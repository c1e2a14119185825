"""`diagnose`: every rule on a run, and what they found as a text and as JSON."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lab.engine.arguments import folder, one_of
from dpo_lab.health.catalog import FAULTS, FaultName
from dpo_lab.health.finding import SEVERITIES, Seen, Severity, Unknown, Verdict
from dpo_lab.health.in_data import (
    flipped_labels,
    identical_pairs,
    leaked_pairs,
    length_exploitation,
    swapped_columns,
    truncated_eos,
)
from dpo_lab.health.over_time import (
    bfloat16_weights,
    chosen_logps_fall,
    learning_rate_too_high,
    loss_stuck_frozen,
    loss_stuck_tiny_beta,
    overtraining,
    reward_hacking,
)
from dpo_lab.health.record import RunRecord, read_run
from dpo_lab.health.scoring import (
    dropout_on,
    mean_instead_of_sum,
    other_precision,
    prompt_scored,
    wrong_reference,
)

RULES: Mapping[FaultName, Callable[[RunRecord], Verdict]] = {
    "loss_stuck_frozen": loss_stuck_frozen,
    "loss_stuck_tiny_beta": loss_stuck_tiny_beta,
    "identical_pairs": identical_pairs,
    "dropout_on": dropout_on,
    "other_precision": other_precision,
    "wrong_reference": wrong_reference,
    "chosen_logps_fall": chosen_logps_fall,
    "length_exploitation": length_exploitation,
    "mean_instead_of_sum": mean_instead_of_sum,
    "truncated_eos": truncated_eos,
    "overtraining": overtraining,
    "reward_hacking": reward_hacking,
    "flipped_labels": flipped_labels,
    "leaked_pairs": leaked_pairs,
    "learning_rate_too_high": learning_rate_too_high,
    "bfloat16_weights": bfloat16_weights,
    "swapped_columns": swapped_columns,
    "prompt_scored": prompt_scored,
}
"""What looks for each fault: a pure function of the record."""


@dataclass(frozen=True)
class Finding:
    """A fault that was seen in a run."""

    fault: FaultName
    """its key in `FAULTS`"""
    severity: Severity
    """error, warning or note"""
    evidence: str
    """one sentence with the numbers"""
    advice: str
    """what to do"""
    could_be: tuple[str, ...] = ()
    """other faults that would leave the same trace"""

    def __post_init__(self) -> None:
        one_of("fault", self.fault, FaultName)
        one_of("severity", self.severity, Severity)


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` says of a run."""

    run: str
    """the directory"""
    source: str
    """who wrote the run: "dpo-lab" or "trl" """
    steps: int
    """lines of training metrics"""
    findings: tuple[Finding, ...]
    """the faults that were seen, the worst first"""
    not_looked: Mapping[str, str]
    """the faults that could not be looked for, and why"""
    notes: tuple[str, ...] = ()
    """what was wrong with the files"""

    @property
    def faults(self) -> tuple[FaultName, ...]:
        """The faults that were seen as an error or a warning."""
        return tuple(f.fault for f in self.findings if f.severity != "note")

    @property
    def healthy(self) -> bool:
        """Whether no error and no warning was found."""
        return not self.faults

    def summary(self, most: int = 3) -> str:
        """One line per finding, at most `most` lines."""
        if not self.findings:
            looked = len(FAULTS) - len(self.not_looked)
            return f"none of {looked} faults that could be looked for"
        lines = [safe(f"{f.severity}: {_title(f)}: {f.evidence}") for f in self.findings]
        if len(lines) > most:
            lines = [*lines[: most - 1], f"and {len(lines) - most + 1} more findings"]
        return "\n".join(lines)

    def __str__(self) -> str:
        who = {"dpo-lab": "a run of dpo-lab", "trl": "a run of TRL"}[self.source]
        parts = [f"{self.run}: {who}, {self.steps:,} lines of metrics"]
        parts += [f"note on the files: {note}" for note in self.notes]
        for f in self.findings:
            parts.append(f"\n{f.severity.upper()}  {_title(f)} ({f.fault})")
            parts.append(f"  seen: {f.evidence}")
            parts += [f"  may also be: {', '.join(f.could_be)}"] if f.could_be else []
            parts.append(f"  what to do: {f.advice}")
        if not self.findings:
            parts.append("\nno fault seen")
        if self.not_looked:
            parts.append("\nnot looked for:")
            parts += [f"  {name}: {reason}" for name, reason in self.not_looked.items()]
        return safe("\n".join(parts))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "run": self.run,
            "source": self.source,
            "steps": self.steps,
            "healthy": self.healthy,
            "findings": [
                {**vars(finding), "could_be": list(finding.could_be)} for finding in self.findings
            ],
            "not_looked": dict(self.not_looked),
            "notes": list(self.notes),
        }


def _title(finding: Finding) -> str:
    return FAULTS[finding.fault].title


def safe(text: str) -> str:
    """`text` for a terminal: of control characters only line breaks stay as they are."""
    return re.sub(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]",
        lambda found: f"\\u{ord(found[0]):04x}",
        text,
    )


def diagnose(run: Path | str | RunRecord) -> Diagnosis:
    """Which of the faults of `FAULTS` a training run shows, with evidence and what to do.

    Args:
        run: the directory of `train_dpo(run=...)` or `dpo-lab train`; TRL's output_dir, or a
            checkpoint in it; or a `RunRecord`.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds no DPO run, or one that cannot be read.
    """
    name = ""
    if not isinstance(run, RunRecord):
        name = str(run := folder("run", run))
        run = read_run(run)

    # every rule, the worst findings first
    verdicts = {fault: rule(run) for fault, rule in RULES.items()}
    findings = [
        Finding(fault, seen.severity, seen.evidence, FAULTS[fault].cure, seen.could_be)
        for fault, seen in verdicts.items()
        if isinstance(seen, Seen)
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    unknown = {f: v.reason for f, v in verdicts.items() if isinstance(v, Unknown)}
    return Diagnosis(name, run.source, len(run.steps), tuple(findings), unknown, run.notes)
