"""What a rule says: a finding with its evidence, nothing, or why it could not look."""

from dataclasses import dataclass
from typing import Literal

from dpo_lab.engine.arguments import one_of

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Seen:
    """A rule's finding."""

    severity: Severity
    """error: the result is wrong or worthless; warning: it is likely worse than it could be; note:
    worth a look"""
    evidence: str
    """one sentence with the numbers"""
    could_be: tuple[str, ...] = ()
    """other faults that would leave the same trace"""

    def __post_init__(self) -> None:
        one_of("severity", self.severity, Severity)


@dataclass(frozen=True)
class Unknown:
    """A rule that could not look."""

    reason: str
    """which data are missing, in a few words"""


Verdict = Seen | Unknown | None
