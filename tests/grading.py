"""Submissions of a made-up class, and both graders run on them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat

RIGHT = {
    "dpo_loss": """\
import torch.nn.functional as F
def my_dpo_loss(policy_logps, reference_logps, chosen, rejected, beta):
    rewards = beta * (policy_logps - reference_logps)
    return -F.logsigmoid(rewards[chosen] - rewards[rejected])
""",
    "kl": """\
def my_kl(p, q):
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
""",
}

# what stands in the cell of `my_dpo_loss`; the points of the two graders; the diagnosis
BODY = "def my_dpo_loss(policy_logps, reference_logps, chosen, rejected, beta):\n    "


def submission(source: Path, target: Path, answers: dict[str, str]) -> None:
    """A student's copy of a notebook, with these answers in its cells."""
    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        if name in answers:
            cell.source = answers[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


def run(course: Path, *command: str, seconds: float = 300) -> subprocess.CompletedProcess:
    """A command of this environment in the folder of a course."""
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"}
    return subprocess.run(
        command, cwd=course, env=environment, capture_output=True, text=True, timeout=seconds
    )
