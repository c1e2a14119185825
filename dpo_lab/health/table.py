"""What `diagnose` said of planted faults and of healthy runs, as it comes with the package."""

import json
from typing import Any

from dpo_lab.assets import ASSETS


def load_diagnosis_table() -> dict[str, Any]:
    """The confusion matrix of `diagnose` (benchmarks/diagnose.py), as it comes with the package.

    `runs` holds one row per run: the `planted` fault or "healthy", the `found` faults (errors and
    warnings, the worst first), the `notes`, `source` ("dpo-lab" or "trl") and what decided the run.
    `faults` are the names in the order of the rows. `matrix` holds for each planted fault, and for
    "healthy", how many of its `runs` showed each fault.
    """
    return json.loads((ASSETS / "diagnose.json").read_text(encoding="utf-8"))
