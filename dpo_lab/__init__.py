"""DPO Lab: learn, feel and reuse Direct Preference Optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290)."""

import os

# Linux hands memory out in pieces of 4 kB; torch asks for 2 MB at a time, where this is set before the first tensor is made
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
