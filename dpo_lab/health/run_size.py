"""How large a small run is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunSize:
    """Numbers of prompts, completions and pairs."""

    prefixes: int = 48
    """prompts that pairs are made of"""
    completions: int = 4
    """completions per prompt; 4 give 6 pairs"""
    max_new_tokens: int = 24
    """longest completion, in tokens; sentences have half as many more"""
    eval_prefixes: int = 48
    """held-out prompts of each evaluation"""
    held_out: int = 24
    """held-out prompts that pairs are made of"""
    batch_pairs: int = 24
    """pairs per step"""


SMALL = RunSize()

GALLERY = RunSize(prefixes=24, max_new_tokens=16, held_out=16, batch_pairs=12)
"""Of the recorded runs, and of those that notebook 08 makes."""

TINY = RunSize(prefixes=6, max_new_tokens=8, eval_prefixes=8, held_out=4, batch_pairs=12)
"""For tests of what a run leaves, not of what it learns."""
