"""How it is fast and safe: attention, the LM head, CPU settings, processes, run directories. No student need enter."""
