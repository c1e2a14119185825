"""How it is fast and safe: attention, the LM head, CPU settings, processes, run directories.

Students need not enter here.
"""
