"""Public preference data by name, as rows that `from_rows` reads.

`load_preferences("hh", "train")` reads the data set's own files from a folder, the Hugging Face
cache or the hub, drops what is no pair, and counts it. No prompt is in two splits.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo_lab.data.catalog import DataSet, Split, find_dataset
from dpo_lab.data.hub import read_files
from dpo_lab.data.hygiene import count_repeats, is_test, not_held_out
from dpo_lab.data.schemas import Pair, Turns, Unusable
from dpo_lab.engine.arguments import checked

Style = Literal["text", "messages"]
Bad = Literal["error", "drop"]


@dataclass(frozen=True)
class LoadReport:
    """What became of the rows of a split."""

    rows: int = 0
    """rows read"""
    pairs: int = 0
    """pairs kept"""
    filtered: int = 0
    """rows or pairs of another split, and news articles among posts"""
    missing: int = 0
    """rows with nothing in a column that is read"""
    odd: int = 0
    """rows that contradict themselves, or whose conversation is not one of a user and an assistant
    in turn that the assistant ends"""
    unknown_role: int = 0
    """rows with a turn of somebody else"""
    no_common_prompt: int = 0
    """rows whose two answers are to different prompts"""
    empty: int = 0
    """pairs with an empty answer"""
    identical: int = 0
    """pairs of equal answers"""
    ties: int = 0
    """pairs of which neither is preferred"""
    leaked: int = 0
    """pairs dropped because a later split has their prompt, up to case, spaces and punctuation"""
    near_leaked: int = 0
    """those of them whose prompt there is not the same to the letter"""
    same_opening: int = 0
    """pairs kept though a later split has a conversation with the same first message"""
    trimmed: int = 0
    """pairs with space around an answer, beyond one in front; it is taken away"""
    duplicated: int = 0
    """pairs kept that were there before"""
    reversed: int = 0
    """pairs kept whose reverse is there too: raters who disagree"""

    def __str__(self) -> str:
        counts = {name: value for name, value in asdict(self).items() if value or name == "pairs"}
        return ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items())


@dataclass(frozen=True)
class Loaded(Sequence[dict[str, Any]]):
    """The pairs of a split, a sequence of rows, and what became of the others."""

    dataset: DataSet
    rows: list[dict[str, Any]] = field(repr=False)
    """with the columns prompt, chosen, rejected; and further ones, such as scores or the rater"""
    report: LoadReport

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]


@checked
def load_preferences(
    name: str,
    split: Split = "train",
    *,
    style: Style = "text",
    folder: Path | str | None = None,
    bad: Bad = "drop",
    hygiene: bool = True,
) -> Loaded:
    """The pairs of a split of a public data set, as rows that `from_rows` reads.

    Rows have the columns prompt, chosen and rejected, and what else the data set says: scores,
    their margin, the rater and their confidence, the number of turns, the source.

    Args:
        name: a key of `DATASETS`, or the id on the hub; after a colon the part, as in
            "hh:helpful-base", "shp:explainlikeimfive" or "hc3:prefer-human".
        split: "train", "validation" or "test", as `DATASETS[name].splits` says. Of a data set
            without a split (webgpt, hc3) one prompt in 20 is held out, by its hash.
        style: "text": a dialogue is "\\n\\nHuman: ...\\n\\nAssistant:", as in the paper's code, and
            answers begin with a space; "messages": lists of `role` and `content`.
        folder: laid out as the data set is on the hub; by default the Hugging Face cache, and what
            is not there comes from the hub.
        bad: "drop" and count rows that are no pair, or "error". Ties and prompts that a later
            split has are dropped and counted in either case.
        hygiene: drop pairs whose prompt a later split has, up to case, spaces and punctuation. The
            later splits are read for it.

    Raises:
        ValueError: a name, part, split or style that does not exist, a missing column, no pair
            left, or with bad="error" a row that is no pair.
        FileNotFoundError: the files are not on this machine and the hub did not give them.
    """
    dataset, part = find_dataset(name)
    if split not in dataset.splits:
        raise ValueError(
            f"split is {split!r}; {dataset.name} has {', '.join(map(repr, dataset.splits))}"
        )

    # the pairs, but for those whose prompt is held out
    counts: Counter[str] = Counter()
    pairs = list(_read_pairs(dataset, part, split, folder, bad, counts))
    if hygiene and not dataset.unsplit:
        later = dataset.splits[dataset.splits.index(split) + 1 :]
        held_out = [
            pair.prompt
            for one in later
            for pair in _read_pairs(dataset, part, one, folder, "drop", Counter())
        ]
        pairs = not_held_out(pairs, held_out, counts)

    count_repeats(pairs, counts)
    rows = [_row(pair, dataset.dialogue, style) for pair in pairs]
    report = LoadReport(pairs=len(rows), **counts)
    if not rows:
        raise ValueError(
            f"no pair is left of {name} ({split}): {report}. Are these the files of {dataset.hub}?"
        )
    return Loaded(dataset, rows, report)


def _read_pairs(
    dataset: DataSet,
    part: str,
    split: str,
    folder: Path | None,
    bad: Bad,
    counts: Counter[str],
) -> Iterator[Pair]:
    """The pairs of a split, stripped; the rest is counted, or an error."""
    patterns = dataset.parts[part][split]
    table = read_files(dataset.hub, patterns, folder=folder, revision=dataset.revision)
    columns = (*dataset.columns, *dataset.more)
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{dataset.hub} has no column {', '.join(map(repr, missing))} in {patterns[0]}, which "
            f"has {', '.join(table.column_names)}; these are not its files"
        )

    # rows in batches, for one by one takes long
    table = table.select_columns(list(columns))
    for batch in table.iter(batch_size=1_000):
        for values in zip(*(batch[name] for name in columns)):
            row = dict(zip(columns, values))
            counts["rows"] += 1
            for found in _pairs_of(dataset, part, split, row):
                if isinstance(found, Unusable):
                    where = f"row {counts['rows'] - 1} of {dataset.hub} ({split})"
                    _count(found, where, bad, counts)
                else:
                    pair, trimmed = found
                    counts["trimmed"] += trimmed
                    yield pair


def _count(reason: Unusable, where: str, bad: Bad, counts: Counter[str]) -> None:
    """Count a row or pair that is not kept, or raise where it is to be an error."""
    counts[reason.kind] += 1
    if bad == "error" and reason.kind not in ("ties", "filtered"):
        raise ValueError(
            f"{where} is no pair: {reason}. Pass bad='drop' to drop and count such rows"
        )


def _pairs_of(
    dataset: DataSet, part: str, split: str, row: Mapping[str, Any]
) -> Iterator[tuple[Pair, bool] | Unusable]:
    """The pairs of a row, stripped, and whether that took anything away; or why there is none."""
    try:
        if nothing := [name for name in dataset.columns if row[name] is None]:
            raise Unusable("missing", f"there is nothing in {nothing[0]!r}")
        for pair in dataset.reader(row, part, split):
            yield _of_this_split(dataset, split, pair)
    except Unusable as reason:
        yield reason
    # a reader takes for granted what is inside a column
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield Unusable("odd", f"it has another shape than a row of this data set ({error!r})")


def _of_this_split(dataset: DataSet, split: str, pair: Pair) -> tuple[Pair, bool] | Unusable:
    """A pair, stripped; or why it is none, or another split's where the data set is split here.

    One of several pairs of a row does not speak for the others.
    """
    try:
        pair, trimmed = _stripped(pair)
    except Unusable as reason:
        return reason
    if dataset.unsplit and is_test(pair.prompt) != (split == "test"):
        return Unusable("filtered", "a row of another split")
    return pair, trimmed


def _stripped(pair: Pair) -> tuple[Pair, bool]:
    """A pair without space around its texts, and whether the answers had any beyond one in front.

    Raises:
        Unusable: a prompt or an answer is empty, or both answers are the same.
    """
    prompt = tuple((role, said.strip()) for role, said in pair.prompt)
    chosen, rejected = pair.chosen.strip(), pair.rejected.strip()
    if not prompt[-1][1]:
        raise Unusable("odd", "its prompt is empty")
    if not chosen or not rejected:
        raise Unusable("empty", f"its {'rejected' if chosen else 'chosen'} answer is empty")
    if chosen == rejected:
        raise Unusable("identical", f"both answers are {chosen!r}")
    given = pair.chosen.removeprefix(" "), pair.rejected.removeprefix(" ")
    return Pair(prompt, chosen, rejected, pair.more), given != (chosen, rejected)


def _row(pair: Pair, dialogue: bool, style: Style) -> dict[str, Any]:
    """A pair in the columns of `from_rows`."""
    if style == "messages":
        prompt: Any = [{"role": role, "content": said} for role, said in pair.prompt]
        chosen, rejected = (
            [{"role": "assistant", "content": answer}] for answer in (pair.chosen, pair.rejected)
        )
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **pair.more}
    prompt = _as_text(pair.prompt) if dialogue else pair.prompt[-1][1]
    answers = {"chosen": f" {pair.chosen}", "rejected": f" {pair.rejected}"}
    return {"prompt": prompt, **answers, **pair.more}


def _as_text(turns: Turns) -> str:
    """A conversation as HH writes it, up to where the assistant is to answer."""
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "\n\nSystem: "}
    return "".join(names[role] + said for role, said in turns) + "\n\nAssistant:"
