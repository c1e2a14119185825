"""The controlled-sentiment task (Section 6 of the paper): reference, prompts, completions, labels.

A `Task` is opened once, in a folder. It loads what it needs on first use, and keeps every result:

    task = Task.open(TaskConfig(prefixes=1_000), Path("runs/data"))
    policy = task.new_policy()
    train_dpo(policy, task.preferences, DPOConfig())
    task.evaluate(policy)
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import DatasetDict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_lab.batching import CompletionBatch, completion_batch, pack
from dpo_lab.engine.arguments import at_least, checked, finite_positive
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.cpu import return_freed_memory
from dpo_lab.engine.distributed import from_main, print0, setup
from dpo_lab.engine.runs import (
    atomic_write,
    check_run,
    open_run,
    read_config,
    require_space,
    require_writable,
)
from dpo_lab.engine.structure import context_of
from dpo_lab.engine.tokenizing import begun
from dpo_lab.evaluate import Evaluation, evaluate_policy
from dpo_lab.logprobs import Precision
from dpo_lab.loop import LoopConfig
from dpo_lab.models import check_sampling, end_tokens, load_model, load_tokenizer, save_policy
from dpo_lab.preferences import Preferences, from_scores
from dpo_lab.sampling import sample_completions, sample_with_logps, texts_of
from dpo_lab.sentiment.precision import measure_precision
from dpo_lab.sentiment.reviews import load_imdb, sample_prefixes
from dpo_lab.sentiment.reward import HUB_CLASSIFIER, SentimentReward
from dpo_lab.sentiment.summaries import SummaryReward, short_reviews, summary_requests
from dpo_lab.theory.frontier import OptimalFrontier, optimal_frontier
from dpo_lab.train import DPOConfig, plan_prompts, train_sft

# tokens; the paper's prefixes have 2 to 8
LONGEST_PREFIX = 8

# rows per step of SFT, and the forward passes that a step is done in
SFT_ROWS, SFT_ACCUMULATE = 64, 8

# what the optimal frontier is estimated from: held-out prompts, and completions of each
FRONTIER = {"prefix": (32, 64), "summary": (8, 16)}

# pairs whose log-ratios are kept at every evaluation of a run
SNAPSHOT_PAIRS = {"prefix": 128, "summary": 16}


@dataclass(frozen=True)
class TaskConfig:
    """The data: prefixes, completions, and the reward that labels them."""

    device: Literal["cpu", "cuda"] = "cpu"
    """where models run"""
    model: str = "embedded"
    """reference and initial policy: "embedded", a folder or a hub id"""
    reward: str = "tfidf"
    """"tfidf", or a sequence classifier: a folder or a hub id"""
    imdb: Literal["package", "hub"] = "package"
    """where the reviews come from"""
    prompt: Literal["prefix", "summary"] = "prefix"
    """beginnings of reviews to continue, or requests to a chat model to summarize a review"""
    prefixes: int = 6_200
    """training reviews whose first 2 to 8 tokens are prompts, or which are to be summarized"""
    completions: int = 4
    """completions sampled per prefix; 4 give 6 pairs"""
    max_new_tokens: int = 48
    """longest completion, in tokens"""
    eval_prefixes: int = 1_024
    """held-out prefixes, or reviews, of the evaluation before and after; a quarter of them during
    training"""
    sft_epochs: int = 0
    """epochs of SFT on the training reviews; the embedded model has had them"""
    sft_learning_rate: float = 1e-5
    """of SFT; falls to zero"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of sampling and training; auto: bfloat16 where this machine is fast in it"""
    seed: int = 0
    """decides everything random"""


# the task of each `--config`
LARGE: dict[str, Any] = {
    "device": "cuda",
    "model": "openai-community/gpt2-large",
    "reward": HUB_CLASSIFIER,
}
TASKS = {
    "laptop": TaskConfig(),
    "gpu": TaskConfig(**LARGE, prefixes=7_500),
    "paper": TaskConfig(**LARGE, imdb="hub", prefixes=25_000, sft_epochs=1),
    "chat": TaskConfig(
        model="smollm2", prompt="summary", prefixes=32, max_new_tokens=32, eval_prefixes=48
    ),
}


def task_config(name: str = "laptop", **changes: Any) -> TaskConfig:
    """The task of `--config laptop`, `gpu`, `paper` or `chat`, with some fields changed.

    Raises:
        ValueError: there is no config of this name.
    """
    if name not in TASKS:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(map(repr, TASKS))}")
    return replace(TASKS[name], **changes)


@checked
def check_task(config: TaskConfig) -> None:
    """Raise ValueError for a value that no task can have, named with what is allowed."""
    least = {
        "completions": 2,
        "max_new_tokens": 1,
        "prefixes": 1,
        "eval_prefixes": 8,
        "sft_epochs": 0,
        "seed": 0,
    }
    at_least(config, least)
    finite_positive("sft_learning_rate", config.sft_learning_rate)
    if config.prompt == "summary" and config.sft_epochs:
        raise ValueError(
            f"sft_epochs is {config.sft_epochs} with prompt='summary'; SFT on reviews would make a "
            "chat model forget to chat, so it must be 0"
        )


@checked
def located(config: TaskConfig) -> TaskConfig:
    """`config` with absolute paths for a model and a reward that lie on this machine.

    Its record is read from other working directories.
    """

    def place(name: str, *own: str) -> str:
        path = Path(name).expanduser()
        return str(path.absolute()) if name not in own and path.exists() else name

    return replace(
        config,
        model=place(config.model, "embedded", "smollm2"),
        reward=place(config.reward, "tfidf"),
    )


@checked
def recorded_settings(config: TaskConfig, *directories: Path, prefixes: bool = False) -> TaskConfig:
    """`config` with the precision that the first of `directories` was begun in, where it asks for
    "auto".

    With `prefixes` also with the number of prefixes that is recorded there.
    """
    for directory in directories:
        if not (directory / "config.json").exists():
            continue
        found = read_config(directory)
        found = found.get("task", found)

        if config.precision == "auto":
            config = replace(config, precision=found.get("precision", "auto"))
        if prefixes and "prefixes" in found:
            config, prefixes = replace(config, prefixes=found["prefixes"]), False
    return config


@checked
def data_config(config: TaskConfig) -> dict[str, Any]:
    """What decides samples and labels: the task without the size of its evaluation."""
    return {name: value for name, value in asdict(config).items() if name != "eval_prefixes"}


def prefixes_during(eval_prefixes: int) -> int:
    """How many held-out prefixes an evaluation during training takes."""
    return max(8, eval_prefixes // 4)


class Task:
    """The controlled-sentiment task in a folder.

    It is settled when it is made, loads what it needs on first use, and keeps every result.
    `reviews`, `tokenizer`, `initial` (the model before any SFT) and `reward` are loaded;
    `samples`, `preferences` and `reference` (the model after SFT) are made, and lie in the folder.

    Args:
        config: its "auto" precision is the recorded one, or else measured when it is first needed.
        folder: where samples, preferences and the SFT model go, and are read from.
        run: the directory of a run on this task, whose recorded settings come first.
        beta: of the run; it only says what bfloat16 costs in the units of its loss.
        any_size: take the recorded number of prefixes where there is one.
    """

    @checked
    def __init__(
        self,
        config: TaskConfig,
        folder: Path,
        *,
        run: Path | None = None,
        beta: float = DPOConfig.beta,
        any_size: bool = False,
    ):
        setup(config.device)
        self.folder, self.beta = folder, beta
        directories = [folder] if run is None else [run, folder]
        self.asked = recorded_settings(located(config), *directories, prefixes=any_size)

    @classmethod
    @checked
    def open(cls, config: TaskConfig, folder: Path) -> "Task":
        """The task in `folder`, which may be new; nothing is loaded or written yet.

        Raises:
            ValueError: a number that no task can have, or a folder that holds another task.
            OSError: a folder that cannot be written, and holds no finished task.
        """
        task = cls(config, folder)
        task.check()
        return task

    def check(self) -> None:
        """Raise the errors of `open`."""
        check_task(self.asked)
        if not (self.folder / "preferences").exists():
            require_writable(self.folder)
        check_run(self.folder, data_config(self.asked), resume=True)

    def variant(self, folder: Path, **changes: Any) -> "Task":
        """The task with some fields changed, in another folder, with the models loaded here."""
        task = Task.open(replace(self.asked, **changes), folder)
        for name in ("reviews", "tokenizer", "initial", "reward"):
            if name in self.__dict__:
                setattr(task, name, self.__dict__[name])
        return task

    # what is loaded

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(self.asked.model)

    @cached_property
    def initial(self) -> PreTrainedModel:
        """The model that the task begins with.

        Raises:
            ValueError: it cannot sample so long a completion.
        """
        model = load_model(self.asked.model, device=self.asked.device)
        check_sampling(model, self.tokenizer)

        longest, what = LONGEST_PREFIX + 1, f"a prefix of {LONGEST_PREFIX} tokens and BOS"
        if self.asked.prompt == "summary":
            longest = max(map(len, self.labels))
            what = f"a request of {longest} tokens"
        most = context_of(model) - longest
        if self.asked.max_new_tokens > most:
            raise ValueError(
                f"max_new_tokens is {self.asked.max_new_tokens}; with {what} "
                f"the model's context of {context_of(model)} allows at most {most}"
            )
        return model

    @cached_property
    def reviews(self) -> DatasetDict:
        """The reviews, split.

        Raises:
            ValueError: fewer are held out than the evaluation asks for.
        """
        reviews = load_imdb(self.asked.imdb)
        held_out, kind = len(reviews["test"]), "held-out"
        if self.asked.prompt == "summary":
            held_out, kind = len(short_reviews(reviews["test"])), "short held-out"
        if self.asked.eval_prefixes > held_out:
            raise ValueError(
                f"eval_prefixes is {self.asked.eval_prefixes}, and there are {held_out} {kind} "
                "reviews; ask for at most as many"
            )
        return reviews

    @cached_property
    def reward(self) -> SentimentReward:
        """P(positive) of a text: the reward of a review, and a part of that of a summary."""
        if self.asked.reward != "tfidf":
            return SentimentReward.hub(self.asked.reward, device=self.asked.device)
        reviews = self.reviews["train"]
        return SentimentReward.tfidf(reviews["text"][:], reviews["label"][:])

    def load(self) -> None:
        """Load and check everything now, before anything is written."""
        for name in ("initial", "reviews", "reward"):
            getattr(self, name)
        return_freed_memory()

    def release(self) -> None:
        """Forget what is loaded and made; the next use loads it again."""
        for name in ("initial", "reference", "reviews", "reward", "samples", "preferences"):
            self.__dict__.pop(name, None)

    # what is settled

    @cached_property
    def config(self) -> TaskConfig:
        """The config with the precision that was asked for or recorded, or else is faster here."""
        if self.asked.precision != "auto":
            return self.asked
        self.load()
        return replace(self.asked, precision=self._measured_precision())

    def resize(self, prefixes: int) -> None:
        """Take another number of training prefixes; for before anything is made."""
        settled = replace(self.config, prefixes=prefixes)
        self.asked = replace(self.asked, prefixes=prefixes)
        self.__dict__["config"] = settled
        self.__dict__.pop("prompts", None)

    @property
    def precision(self) -> Precision:
        """The precision of sampling and training."""
        return self.config.precision  # type: ignore[return-value]

    def _measured_precision(self) -> Precision:
        """The precision that scores reviews faster; prints the measurement."""
        rows = self.tokenizer(self.reviews["train"]["text"][:64])["input_ids"]
        prompts = [row[:1] for row in rows]
        completions = [row[1 : 1 + self.asked.max_new_tokens] for row in rows]

        # a few first: all of them take minutes where the processor has no bfloat16
        for n, repeats in ((2, 1), (len(rows), 2)):
            batch = completion_batch(prompts[:n], completions[:n], range(n)).to(self.asked.device)
            measure = partial(measure_precision, repeats=repeats)
            test = from_main(measure, self.initial, batch, self.beta)
            if test.speedup < 0.5:
                break
        print0(test)
        return test.choice

    # prompts

    @cached_property
    def prompts(self) -> list[list[int]]:
        """The training prefixes, as token ids after BOS."""
        return self.training_prefixes(self.asked.prefixes, self.asked.seed)

    def training_prefixes(self, n: int, seed: int) -> list[list[int]]:
        """`n` prefixes of training reviews, or requests to summarize them."""
        return self._drawn_prompts("train", n, seed)

    @cached_property
    def held_out(self) -> list[list[int]]:
        """Prefixes of held-out reviews, or requests, drawn with the task's seed."""
        return self._drawn_prompts("test", self.asked.eval_prefixes, self.asked.seed)

    def _drawn_prompts(self, part: str, n: int, seed: int) -> list[list[int]]:
        """`n` prompts from the reviews of one side of the split."""
        if self.asked.prompt == "summary":
            return summary_requests(self.reviews[part], self.tokenizer, n, seed=seed).prompts
        return sample_prefixes(self.reviews[part]["text"][:], self.tokenizer, n, seed=seed)

    @cached_property
    def labels(self) -> dict[tuple[int, ...], int]:
        """The label of the review that a request asks to summarize, by the request's tokens."""
        found = [summary_requests(part, self.tokenizer) for part in self.reviews.values()]
        return {
            tuple(prompt): int(label)
            for requests in found
            for prompt, label in zip(requests.prompts, requests.labels)
        }

    def rewards(self, prompts: list[list[int]], texts: Sequence[str]) -> np.ndarray:
        """The rewards (N,) of N texts, each a prompt and its completion.

        Of a review its P(positive), and of a summary `SummaryReward`.
        """
        if self.asked.prompt == "prefix":
            return self.reward(texts)
        asked = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        summaries = [text[len(request) :].strip() for request, text in zip(asked, texts)]
        return SummaryReward(self.reward)(summaries, [self.labels[tuple(p)] for p in prompts])

    # what is made, and kept in the folder

    @cached_property
    def reference(self) -> PreTrainedModel:
        """The model that samples and is the reference: the initial one, after `sft_epochs` of SFT
        on the reviews.

        Rows of `sft_length` tokens, 64 per step. Interrupted SFT continues at its last checkpoint.
        """
        if not self.asked.sft_epochs:
            return self.initial
        tuned = Path(self.reference_name)
        if not tuned.exists():
            self._open_folder()
            self._fine_tune(self.folder / "sft")
            save_policy(self.initial, self.tokenizer, tuned)
        self.__dict__.pop("initial", None)
        return load_model(str(tuned), device=self.asked.device)

    @property
    def reference_name(self) -> str:
        """Where the reference's weights are: the task's model, or what SFT made of it."""
        if self.asked.sft_epochs:
            return str((self.folder / "sft" / "model").absolute())
        return self.asked.model

    def new_policy(self) -> PreTrainedModel:
        """A new model with the reference's weights, to be trained."""
        return load_model(self.reference_name, device=self.asked.device)

    @cached_property
    def samples(self) -> dict[str, Any]:
        """Completions drawn from the reference; kept in `samples.json`.

        `prompts` and `completions` as token ids, `logps` in nats, and `texts`.
        """
        path = self.folder / "samples.json"
        if self._holds("samples.json"):
            return json.loads(path.read_text(encoding="utf-8"))

        # everything is loaded and checked before the folder is begun
        self.load()
        config, prompts = self.config, self.prompts
        require_space(self.folder, 4_000 * config.prefixes * config.completions)
        self._open_folder()

        # sampling knows the log-probs of what it draws
        completions, logps = sample_with_logps(
            self.reference,
            prompts,
            config.completions,
            eos_token_id=end_tokens(self.reference, self.tokenizer),
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            precision=self.precision,
            progress="sample",
        )
        texts = texts_of(self.tokenizer, prompts, completions)
        samples = {"prompts": prompts, "completions": completions, "logps": logps, "texts": texts}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
        return samples

    @cached_property
    def preferences(self) -> Preferences:
        """Every two samples of one prompt that differ, ranked by the reward.

        With their reference log-probs; kept in the folder `preferences`.
        """
        if self._holds("preferences"):
            return Preferences.load(self.folder / "preferences")

        # score every sample; each two of one prompt make a pair
        self.load()
        samples = self.samples
        flat = [text for row in samples["texts"] for text in row]
        owners = [prompt for prompt in samples["prompts"] for _ in range(self.asked.completions)]
        preferences = from_scores(
            samples["prompts"],
            samples["completions"],
            self.rewards(owners, flat).reshape(-1, self.asked.completions),
            self.tokenizer,
            context=context_of(self.reference),
        )

        # the reference drew them, so their log-probs are known
        drawn = _logps_by_tokens(samples)
        owners = [tuple(preferences.prompts[p]) for p in preferences.prompt_of]
        known = [drawn[row] for row in zip(owners, map(tuple, preferences.completions))]
        preferences = preferences.with_reference(
            self.reference, known=np.array(known), precision=self.precision
        )
        preferences.save(self.folder / "preferences")
        return preferences

    def check_reference(self) -> None:
        """Raise ValueError unless the reference has the weights that labeled the data."""
        if self.preferences.reference_key.split("-")[0] != weights_hash(self.reference):
            raise ValueError(
                f"{self.folder} was made with other weights than those of "
                f"{self.reference.name_or_path!r} now. Put those back, choose another directory "
                "(--data, --out), or delete this one to sample again"
            )

    # how good a policy is

    def evaluate(
        self, policy: nn.Module, n: int | None = None, *, progress: str | None = None
    ) -> Evaluation:
        """`evaluate_policy` on the first `n` held-out prompts, or on all of them."""
        prompts = self.held_out[:n]
        return evaluate_policy(
            policy,
            self.reference,
            prompts,
            partial(self.rewards, prompts),
            self.tokenizer,
            max_new_tokens=self.asked.max_new_tokens,
            seed=self.asked.seed,
            precision=self.precision,
            progress=progress,
        )

    @cached_property
    def frontier(self) -> OptimalFrontier:
        """The optimal reward-KL frontier, from reference completions of some held-out prompts."""
        n, k = FRONTIER[self.asked.prompt]
        scores, _ = self.score_reference(self.held_out[:n], k, progress="optimal frontier")
        return optimal_frontier(scores, np.geomspace(10, 0.02, 40))

    def score_reference(
        self, prompts: list[list[int]], k: int, *, progress: str | None = None
    ) -> tuple[np.ndarray, list[list[list[int]]]]:
        """Rewards (N, k) of `k` reference completions per prompt, and the completions."""
        completions = sample_completions(
            self.reference,
            prompts,
            k,
            eos_token_id=end_tokens(self.reference, self.tokenizer),
            max_new_tokens=self.asked.max_new_tokens,
            seed=self.asked.seed + 1,
            precision=self.precision,
            progress=progress,
        )
        texts = texts_of(self.tokenizer, prompts, completions)
        owners = [prompt for prompt in prompts for _ in range(k)]
        scores = self.rewards(owners, [text for row in texts for text in row])
        return scores.reshape(len(prompts), k), completions

    # the folder, and SFT

    def _holds(self, name: str) -> bool:
        """Whether the folder is this task's and holds a finished result of this name."""
        return (self.folder / "config.json").exists() and (self.folder / name).exists()

    def _open_folder(self) -> None:
        """Record the config in the folder, or check that it is the one recorded there."""
        open_run(self.folder, data_config(self.config), resume=True)

    def _fine_tune(self, run: Path) -> None:
        """Train the initial model on the training reviews."""
        rows = _sft_rows(self.reviews["train"]["text"][:], self.tokenizer, self.initial)
        steps = plan_prompts([[0]] * len(rows), self.asked.sft_epochs, SFT_ROWS, self.asked.seed)
        loop = LoopConfig(
            learning_rate=self.asked.sft_learning_rate, gradient_accumulation_steps=SFT_ACCUMULATE
        )
        open_run(run, asdict(loop) | {"steps": len(steps)}, resume=True)

        def batches(step: int) -> list[CompletionBatch]:
            some = [rows[i] for i in steps[step]]
            prompts, completions = [row[:1] for row in some], [row[1:] for row in some]
            return [completion_batch(prompts, completions, range(len(some)))]

        train_sft(
            self.initial,
            batches,
            len(steps),
            loop,
            precision=self.precision,
            run=run,
            resume=True,
            progress="SFT",
        )

    def planned_sft(self) -> tuple[CompletionBatch | None, int]:
        """A batch as SFT reads them, and how many it will read, by the rows that some 500 reviews
        fill.

        None and 0 without SFT.
        """
        if not self.asked.sft_epochs:
            return None, 0
        texts = self.reviews["train"]["text"][:]
        some = texts[:: max(1, len(texts) // 500)]
        rows = len(_sft_rows(some, self.tokenizer, self.initial)) * len(texts) / len(some)

        # full rows, as many as a forward pass takes
        n, length = SFT_ROWS // SFT_ACCUMULATE, sft_length(self.initial)
        batch = completion_batch([[0]] * n, [[0] * (length - 1)] * n, range(n))
        return batch, round(rows * self.asked.sft_epochs / n)


def sft_length(model: PreTrainedModel) -> int:
    """Tokens of a row that SFT reads."""
    return min(256, context_of(model))


def _sft_rows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> list[list[int]]:
    """Reviews end to end in rows of `sft_length`, each begun with BOS, or else EOS."""
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    begun_rows = [begun(ids, end if start is None else start) for ids in encoded]
    return pack(begun_rows, sft_length(model), end)


def _logps_by_tokens(
    samples: dict[str, Any],
) -> dict[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """The log-prob of each sampled completion, by the tokens of its prompt and its own."""
    return {
        (tuple(prompt), tuple(ids)): logp
        for prompt, rows, logps in zip(samples["prompts"], samples["completions"], samples["logps"])
        for ids, logp in zip(rows, logps)
    }
