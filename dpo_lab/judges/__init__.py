"""Judges: who says which of two answers is better, and what a win rate by their verdicts means.

Names are imported when they are first used, so that `import dpo_lab.judges` loads no library.
"""
