"""The paper's controlled-sentiment experiment: reviews, reward, task, run, sweep."""
