"""The health of a training run: which faults it shows, with evidence, severity and what to do.

Names are imported when they are first used, so that `import dpo_lab.health` loads no library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# for editors and type checkers, which do not run `__getattr__`
if TYPE_CHECKING:
    from dpo_lab.health.catalog import FAULTS, Fault, FaultName
    from dpo_lab.health.diagnosis import Diagnosis, Finding, diagnose
    from dpo_lab.health.faults import plant
    from dpo_lab.health.gallery import (
        GROUPS,
        Curves,
        load_failures,
        panel_of,
        panels_of,
        read_curves,
    )
    from dpo_lab.health.record import RunRecord, read_run
    from dpo_lab.health.run_size import RunSize
    from dpo_lab.health.small_runs import healthy, small_config
    from dpo_lab.health.table import load_diagnosis_table

__all__ = [
    "Curves",
    "Diagnosis",
    "FAULTS",
    "Fault",
    "FaultName",
    "Finding",
    "GROUPS",
    "RunRecord",
    "RunSize",
    "diagnose",
    "healthy",
    "load_diagnosis_table",
    "load_failures",
    "panel_of",
    "panels_of",
    "plant",
    "read_curves",
    "read_run",
    "small_config",
]

# where each name lives
_HOME = {
    "Curves": "health.gallery",
    "Diagnosis": "health.diagnosis",
    "FAULTS": "health.catalog",
    "Fault": "health.catalog",
    "FaultName": "health.catalog",
    "Finding": "health.diagnosis",
    "GROUPS": "health.gallery",
    "RunRecord": "health.record",
    "RunSize": "health.run_size",
    "diagnose": "health.diagnosis",
    "healthy": "health.small_runs",
    "load_diagnosis_table": "health.table",
    "load_failures": "health.gallery",
    "panel_of": "health.gallery",
    "panels_of": "health.gallery",
    "plant": "health.faults",
    "read_curves": "health.gallery",
    "read_run": "health.record",
    "small_config": "health.small_runs",
}


def __getattr__(name: str) -> Any:
    """Import the module in which a public name lives, and keep the name here."""
    if name not in _HOME:
        raise AttributeError(
            f"module 'dpo_lab.health' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    globals()[name] = found = getattr(import_module(f"dpo_lab.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
