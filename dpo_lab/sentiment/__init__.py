"""The paper's controlled-sentiment experiment: reviews, reward, task, plan, run, sweep and its
results.

Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# for editors and type checkers, which do not run `__getattr__`
if TYPE_CHECKING:
    from dpo_lab.sentiment.cost import plan
    from dpo_lab.sentiment.precision import measure_precision
    from dpo_lab.sentiment.pretrain import held_out_loss
    from dpo_lab.sentiment.probes import TaxItems, tax_items
    from dpo_lab.sentiment.results import (
        LABELS,
        REPEATS,
        Run,
        load_chat,
        load_goodhart,
        load_hacking,
        load_labels,
        load_on_policy,
        load_relatives,
        load_sweep,
        load_tax,
        load_win_rates,
        paper_runs,
        repeats,
    )
    from dpo_lab.sentiment.reviews import (
        load_imdb,
        load_rotten_tomatoes,
        sample_continuations,
        sample_prefixes,
        text_batches,
    )
    from dpo_lab.sentiment.reward import SentimentReward, cache_directory
    from dpo_lab.sentiment.run import (
        CONFIGS,
        ExperimentConfig,
        plan_run,
        read_snapshots,
        save_figures,
        save_samples,
        save_snapshot,
        train,
    )
    from dpo_lab.sentiment.summaries import (
        SummaryRequests,
        SummaryReward,
        brevity,
        chat_prompt,
        dialogue_prompts,
        ranked_summaries,
        replies,
        summary_judge,
        summary_requests,
    )
    from dpo_lab.sentiment.sweep import FrontierConfig, frontier
    from dpo_lab.sentiment.task import Task, TaskConfig, save_policy, task_config
    from dpo_lab.sentiment.tax import (
        Ratio,
        Tax,
        at_equal_reward,
        end_over_seeds,
        measure_rudeness,
        measure_tax,
    )

__all__ = [
    "CONFIGS",
    "ExperimentConfig",
    "FrontierConfig",
    "LABELS",
    "REPEATS",
    "Ratio",
    "Run",
    "SentimentReward",
    "SummaryRequests",
    "SummaryReward",
    "Task",
    "TaskConfig",
    "Tax",
    "TaxItems",
    "at_equal_reward",
    "brevity",
    "cache_directory",
    "chat_prompt",
    "dialogue_prompts",
    "end_over_seeds",
    "frontier",
    "held_out_loss",
    "load_chat",
    "load_goodhart",
    "load_hacking",
    "load_imdb",
    "load_labels",
    "load_on_policy",
    "load_relatives",
    "load_rotten_tomatoes",
    "load_sweep",
    "load_tax",
    "load_win_rates",
    "measure_precision",
    "measure_rudeness",
    "measure_tax",
    "paper_runs",
    "plan",
    "plan_run",
    "ranked_summaries",
    "read_snapshots",
    "repeats",
    "replies",
    "sample_continuations",
    "sample_prefixes",
    "save_figures",
    "save_policy",
    "save_samples",
    "save_snapshot",
    "summary_judge",
    "summary_requests",
    "task_config",
    "tax_items",
    "text_batches",
    "train",
]

# where each name lives
_NAMES = {
    "cost": ("plan",),
    "precision": ("measure_precision",),
    "pretrain": ("held_out_loss",),
    "probes": ("TaxItems", "tax_items"),
    "results": (
        "LABELS",
        "REPEATS",
        "Run",
        "load_chat",
        "load_goodhart",
        "load_hacking",
        "load_labels",
        "load_on_policy",
        "load_relatives",
        "load_sweep",
        "load_tax",
        "load_win_rates",
        "paper_runs",
        "repeats",
    ),
    "reviews": (
        "load_imdb",
        "load_rotten_tomatoes",
        "sample_continuations",
        "sample_prefixes",
        "text_batches",
    ),
    "reward": ("SentimentReward", "cache_directory"),
    "run": (
        "CONFIGS",
        "ExperimentConfig",
        "plan_run",
        "read_snapshots",
        "save_figures",
        "save_samples",
        "save_snapshot",
        "train",
    ),
    "summaries": (
        "SummaryRequests",
        "SummaryReward",
        "brevity",
        "chat_prompt",
        "dialogue_prompts",
        "ranked_summaries",
        "replies",
        "summary_judge",
        "summary_requests",
    ),
    "sweep": ("FrontierConfig", "frontier"),
    "task": ("Task", "TaskConfig", "save_policy", "task_config"),
    "tax": (
        "Ratio",
        "Tax",
        "at_equal_reward",
        "end_over_seeds",
        "measure_rudeness",
        "measure_tax",
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module in which a name lives, and keep the name here."""
    if name not in _HOME:
        raise AttributeError(
            f"module 'dpo_lab.sentiment' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    found = getattr(import_module(f"dpo_lab.sentiment.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
