"""The public preference data sets that can be loaded by name, and what is known of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_lab.data.hub import PARQUET
from dpo_lab.data.schemas import (
    Pair,
    read_comparison,
    read_hc3,
    read_hh,
    read_messages,
    read_shp,
    read_texts,
    read_webgpt,
)

Split = Literal["train", "validation", "test"]

Reader = Callable[[Mapping[str, Any], str, str], Iterator[Pair]]
"""From a row, the part and the split to the pairs of the row."""

# a split gives up the prompts that a later one has
SPLITS = ("train", "validation", "test")

# strength of the KL constraint in the paper (Appendix B), and in its summaries
BETA, BETA_SUMMARIES = 0.1, 0.5


@dataclass(frozen=True)
class DataSet:
    """What is known of a public data set before it is read."""

    name: str
    """short name, that of `load_preferences` and of `dpo-lab train --data`"""
    hub: str
    """id on the Hugging Face hub"""
    prompts: str
    """where the prompts come from"""
    answers: str
    """who wrote the answers"""
    judges: str
    """who judged, and how"""
    source: str
    """the paper"""
    license: str
    """as its card on the hub says"""
    size: str
    """rows on the hub"""
    drops: str
    """what `load_preferences` leaves out, and why; malformed rows and ties in every set"""
    columns: tuple[str, ...]
    """columns that are read, in which a row must have something"""
    reader: Reader = field(repr=False)
    """from a row to its pairs"""
    parts: Mapping[str, Mapping[str, tuple[str, ...]]] = field(repr=False)
    """files by part and split"""
    default: str | None
    """the part of the short name alone, or None where the user must choose"""
    more: tuple[str, ...] = ()
    """columns that say what else is known of a pair, in which a row may have nothing"""
    revision: str = "main"
    """branch of its files"""
    dialogue: bool = True
    """as text, prompts are "\\n\\nHuman: ...\\n\\nAssistant:"; else they are left as they are"""
    beta: float = BETA
    """strength of the KL constraint in the paper's Appendix B"""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that can be loaded."""
        files = next(iter(self.parts.values()))
        return tuple(split for split in SPLITS if split in files)  # type: ignore[misc]

    @property
    def unsplit(self) -> bool:
        """Whether it comes without a split: then one prompt in 20 is held out, by its hash."""
        files = next(iter(self.parts.values()))
        return "validation" not in files and files["train"] == files["test"]


def _split_files(folders: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The files of HH in some of its folders."""
    return {
        split: tuple(f"{name}/{split}.jsonl.gz" for name in folders) for split in ("train", "test")
    }


HELPFUL = ("helpful-base", "helpful-online", "helpful-rejection-sampled")

SUBREDDITS = (
    "askacademia askanthropology askbaking askcarguys askculinary askdocs askengineers "
    "askhistorians askhr askphilosophy askphysics askscience asksciencefiction asksocialscience "
    "askvet changemyview explainlikeimfive legaladvice"
).split()

_ALL = (
    # summaries of Reddit posts
    DataSet(
        name="tldr",
        hub="openai/summarize_from_feedback",
        prompts="Reddit posts",
        answers="models of the paper, and the posts' own authors",
        judges="people under contract: the better of two summaries",
        source="Stiennon et al. 2020, arXiv 2009.01325",
        license="none stated; the posts are CC BY 4.0",
        size="92,858 train, 86,086 validation",
        drops="news articles (CNN and Daily Mail)",
        columns=("info", "summaries", "choice", "split"),
        more=("worker", "extra"),
        reader=read_comparison,
        parts={
            "": {
                "train": ("comparisons/train/*.parquet",),
                "validation": ("comparisons/validation/*.parquet",),
                "test": ("comparisons/validation/*.parquet",),
            }
        },
        default="",
        revision=PARQUET,
        dialogue=False,
        beta=BETA_SUMMARIES,
    ),
    # the same summaries, as TRL prepared them
    DataSet(
        name="tldr-trl",
        hub="trl-lib/tldr-preference",
        prompts="Reddit posts",
        answers="models of the paper, and the posts' own authors",
        judges="people under contract: the better of two summaries",
        source="Stiennon et al. 2020, arXiv 2009.01325; prepared by TRL",
        license="none stated; the posts are CC BY 4.0",
        size="92,858 train, 86,086 validation",
        drops="news articles (CNN and Daily Mail)",
        columns=("prompt", "chosen", "rejected"),
        reader=read_texts,
        parts={
            "": {
                "train": ("data/train-*.parquet",),
                "test": ("data/validation-*.parquet",),
            }
        },
        default="",
        dialogue=False,
        beta=BETA_SUMMARIES,
    ),
    # conversations with an assistant
    DataSet(
        name="hh",
        hub="Anthropic/hh-rlhf",
        prompts="crowdworkers in conversation with a model",
        answers="models of 52 billion parameters, at several stages of training",
        judges="the crowdworker: the more helpful, or the less harmful, of two answers",
        source="Bai et al. 2022, arXiv 2204.05862",
        license="MIT",
        size="160,800 train, 8,552 test",
        drops="red-team attempts, which are no preferences; pairs that differ before the last turn",
        columns=("chosen", "rejected"),
        reader=read_hh,
        parts={
            "all": _split_files((*HELPFUL, "harmless-base")),
            "helpful": _split_files(HELPFUL),
            **{name: _split_files((name,)) for name in (*HELPFUL, "harmless-base")},
        },
        default="all",
    ),
    # answers with quotes from the web
    DataSet(
        name="webgpt",
        hub="openai/webgpt_comparisons",
        prompts="questions, most of them from ELI5",
        answers="models that search the web, and people",
        judges="people under contract: a score from -1 to 1",
        source="Nakano et al. 2021, arXiv 2112.09332",
        license="none stated",
        size="19,578, no split",
        drops="ties (score 0); the quotes, so that an answer's [1] refers to nothing",
        columns=("question", "answer_0", "answer_1", "score_0", "score_1"),
        reader=read_webgpt,
        parts={"": {split: ("default/train/*.parquet",) for split in ("train", "test")}},
        default="",
        revision=PARQUET,
    ),
    # comments that voters preferred
    DataSet(
        name="shp",
        hub="stanfordnlp/SHP",
        prompts="Reddit posts in 18 subreddits, ELI5 among them",
        answers="commenters",
        judges="voters: the comment with the higher score, though written no earlier",
        source="Ethayarajh et al. 2022, ICML (PMLR 162)",
        license="its own: the texts are those of Reddit's users",
        size="348,718 train, 18,436 validation, 18,409 test",
        drops="nothing more",
        columns=(
            "history",
            "human_ref_A",
            "human_ref_B",
            "labels",
            "score_A",
            "score_B",
        ),
        more=("score_ratio", "domain"),
        reader=read_shp,
        parts={
            "all": {split: (f"*/{split}.json",) for split in SPLITS},
            **{name: {split: (f"{name}/{split}.json",) for split in SPLITS} for name in SUBREDDITS},
        },
        default="all",
    ),
    # answers by people and by ChatGPT
    DataSet(
        name="hc3",
        hub="Hello-SimpleAI/HC3",
        prompts="questions from ELI5, WikiQA, Wikipedia, medicine and finance",
        answers="people, and ChatGPT",
        judges="nobody: that one side is better is an assumption, which you make",
        source="Guo et al. 2023, arXiv 2301.07597",
        license="CC BY-SA 4.0, or that of the questions' source where it is stricter",
        size="24,322 questions, no split",
        drops="nothing more",
        columns=("question", "human_answers", "chatgpt_answers"),
        more=("source",),
        reader=read_hc3,
        parts={
            part: {split: ("all.jsonl",) for split in ("train", "test")}
            for part in ("prefer-human", "prefer-chatgpt")
        },
        default=None,
    ),
    # answers of many models, judged by GPT-4
    DataSet(
        name="ultrafeedback",
        hub="HuggingFaceH4/ultrafeedback_binarized",
        prompts="instructions from several collections",
        answers="four of 17 models for each",
        judges="GPT-4: a score; the best answer against one of the others at random",
        source="Cui et al. 2023, arXiv 2310.01377; Tunstall et al. 2023, arXiv 2310.16944",
        license="MIT",
        size="61,135 train, 2,000 test",
        drops="ties in the score",
        columns=("chosen", "rejected", "score_chosen", "score_rejected"),
        reader=read_messages,
        parts={
            "": {split: (f"data/{split}_prefs-*.parquet",) for split in ("train", "test")},
        },
        default="",
    ),
    # the same answers, as TRL prepared them
    DataSet(
        name="ultrafeedback-trl",
        hub="trl-lib/ultrafeedback_binarized",
        prompts="instructions from several collections",
        answers="four of 17 models for each",
        judges="GPT-4: a score of each answer",
        source="Cui et al. 2023, arXiv 2310.01377; prepared by TRL",
        license="none stated",
        size="about 62,100 train, 1,000 test",
        drops="ties in the score",
        columns=("chosen", "rejected", "score_chosen", "score_rejected"),
        reader=read_messages,
        parts={"": {split: (f"data/{split}-*.parquet",) for split in ("train", "test")}},
        default="",
    ),
)

DATASETS: Mapping[str, DataSet] = {dataset.name: dataset for dataset in _ALL}
"""The data sets that have a loader, by their short names."""


def find_dataset(name: str) -> tuple[DataSet, str]:
    """The data set of a name such as "hh" or "hh:helpful-base", and the part.

    Raises:
        ValueError, TypeError: no data set of this name, no such part, or none where it must be
            named.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r} ({type(name).__name__}); it must be a string")
    short, _, part = name.partition(":")
    known = {**{one.hub: one for one in DATASETS.values()}, **DATASETS}
    if short not in known:
        raise ValueError(
            f"name is {name!r}; there is no data set of this name, only {', '.join(DATASETS)}"
        )
    dataset = known[short]
    if not part and dataset.default is not None:
        return dataset, dataset.default
    if part not in dataset.parts:
        parts = ", ".join(f"{dataset.name}:{one}" for one in dataset.parts if one)
        why = f"it must be {parts}" if parts else "this one has no parts"
        if not part:
            why = f"nobody compared its answers, so say which side is chosen: {parts}"
        raise ValueError(f"name is {name!r}; {why}")
    return dataset, part
