"""What may go wrong in a run of DPO."""
