"""What DPO replaces: the learned reward model, and PPO for language models."""
