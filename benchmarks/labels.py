"""Sample what notebook 06 asks its reader to label: 30 pairs of completions, and 10 to rate.

    python benchmarks/labels.py

Writes dpo_lab/assets/labels.json. The recorded labels of these items lie beside it, in
labels.jsonl, and name each item by a hash of its texts; so while they are there, no other items are
drawn. A minute on one core.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_lab.assets import ASSETS
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.runs import provenance, write_json
from dpo_lab.models import end_tokens
from dpo_lab.sampling import sample_completions, texts_of
from dpo_lab.sentiment.task import Task, TaskConfig

LABELS = ASSETS / "labels.json"


@dataclass(frozen=True)
class ItemsConfig:
    """Which completions are drawn."""

    pairs: int = 30
    """prompts with two completions each, to be compared"""
    rated: int = 2
    """prompts with `completions` each, to be rated one by one"""
    completions: int = 5
    """completions of a prompt that is rated"""
    seed: int = 6
    """of the prompts and the completions"""
    task: TaskConfig = field(
        default_factory=lambda: TaskConfig(max_new_tokens=32, precision="float32")
    )
    """the reference that draws them, and the reviews that the prompts begin"""


def main(config: ItemsConfig = ItemsConfig(), path: Path = LABELS) -> None:
    if path.with_suffix(".jsonl").exists():
        raise SystemExit(f"{path} has labels, which other items would lose; move both files away")
    items = draw_items(config)
    write_json(path, {"items": items, "config": asdict(config), "made": provenance()})
    rated = sum(len(row["completions"]) for row in items["rated"])
    print(f"{path}: {len(items['pairs'])} pairs, {rated} completions to rate")


def draw_items(config: ItemsConfig) -> dict[str, list[dict[str, Any]]]:
    """The items with their texts and token ids: `pairs`, and `rated`."""
    task = Task(config.task, Path("unused"))
    reference, tokenizer = task.reference, task.tokenizer
    prompts = task.training_prefixes(config.pairs + config.rated, config.seed)
    compared, rated = prompts[: config.pairs], prompts[config.pairs :]

    def drawn(some: list[list[int]], k: int, seed: int) -> list[dict[str, Any]]:
        """For each prompt its text, its ids, and `k` completions as texts and as ids."""
        limits = {"max_new_tokens": config.task.max_new_tokens, "seed": seed}
        ends = end_tokens(reference, tokenizer)
        ids = sample_completions(reference, some, k, eos_token_id=ends, **limits)
        begun = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in some]
        whole = texts_of(tokenizer, some, ids)
        return [
            {
                "prompt": text,
                "prompt_ids": prompt,
                "completions": [each.removeprefix(text) for each in texts],
                "completion_ids": rows,
            }
            for prompt, text, rows, texts in zip(some, begun, ids, whole)
        ]

    pairs = drawn(compared, 2, config.seed)
    single = drawn(rated, config.completions, config.seed + 1)
    named = [{"id": f"pair-{i:02}"} | row for i, row in enumerate(pairs)]
    return {"weights": weights_hash(reference), "pairs": named, "rated": single}


if __name__ == "__main__":
    main()
