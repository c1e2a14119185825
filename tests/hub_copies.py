"""Small made-up copies of the public preference data sets, laid out as they are on the hub."""

import gzip
import hashlib
import json
from pathlib import Path

from datasets import Dataset

WORDS = "this film was truly a joy dull bore and the acting plot of great terrible story".split()


def says(*numbers):
    """Made-up text of which no two are the same."""
    return " ".join(WORDS[n % len(WORDS)] for n in numbers) + f" {'-'.join(map(str, numbers))}"


def hh_row(i, k=0):
    """A row of Anthropic/hh-rlhf: two transcripts; every second one has two questions."""
    asked = f"\n\nHuman: {says(i, k, 1)}"
    if i % 2:
        asked += f"\n\nAssistant: {says(i, k, 2)}\n\nHuman: {says(i, k, 3)}"
    return {
        "chosen": f"{asked}\n\nAssistant: {says(i, k, 4)} great joy",
        "rejected": f"{asked}\n\nAssistant: {says(i, k, 5)} dull bore",
    }


def tldr_row(i, k=0, split="train"):
    """A row of openai/summarize_from_feedback, config comparisons."""
    texts = [f" {says(i, k, n)} {word}" for n, word in enumerate(("joy", "bore"))]
    choice = i % 2
    if choice:
        texts.reverse()
    return {
        "info": {
            "id": f"t3_{i}_{k}",
            "post": f"{says(i, k, 7)}\n\n{says(i, k, 8)}",
            "title": says(i, k),
            "subreddit": "relationships",
            "site": None,
            "article": None,
        },
        "summaries": [{"text": text, "policy": "sup1", "note": None} for text in texts],
        "choice": choice,
        "worker": f"w{i % 3}",
        "batch": "batch3",
        "split": split,
        "extra": {"confidence": i % 9 + 1},
    }


def tldr_trl_row(i, k=0):
    """The same comparison in the columns of trl-lib/tldr-preference."""
    row = tldr_row(i, k)
    info, choice = row["info"], row["choice"]
    post = info["post"].replace("\n\n", "\n")
    prompt = f"SUBREDDIT: r/relationships\n\nTITLE: {info['title']}\n\nPOST: {post}\n\nTL;DR:"
    texts = [summary["text"] for summary in row["summaries"]]
    return {"prompt": prompt, "chosen": texts[choice], "rejected": texts[1 - choice]}


def webgpt_row(i, k=0):
    """A row of openai/webgpt_comparisons."""
    score = (-1.0, -0.5, 0.5, 1.0)[i % 4]
    quotes = {"title": ["A page"], "extract": [says(i)]}
    row = {"question": {"dataset": "eli5", "id": str(i), "full_text": says(i, k, 9)}}
    for side, sign in ((0, 1), (1, -1)):
        row |= {
            f"quotes_{side}": quotes,
            f"answer_{side}": f"{says(i, k, side)} {'joy' if sign * score > 0 else 'bore'} [1].",
            f"tokens_{side}": {"prefix": [1, 2], "completion": [3]},
            f"score_{side}": sign * score,
        }
    return row


def shp_row(i, k=0, domain="explainlikeimfive_train"):
    """A row of stanfordnlp/SHP."""
    label = i % 2
    scores = (20 + i, 5) if label else (5, 20 + i)
    sides = {"A": ("bore", "joy")[label], "B": ("joy", "bore")[label]}
    row = {"post_id": f"p{i}", "domain": domain, "upvote_ratio": 0.98, "history": says(i, k, 6)}
    for (side, word), score in zip(sides.items(), scores):
        row |= {
            f"c_root_id_{side}": f"c{i}{side}",
            f"created_at_utc_{side}": 1_636_822_112,
            f"score_{side}": score,
            f"human_ref_{side}": f"{says(i, k, ord(side))} {word}",
        }
    ratio = max(scores) / min(scores)
    return row | {"labels": label, "seconds_difference": 2.0, "score_ratio": ratio}


def hc3_row(i, k=0):
    """A row of Hello-SimpleAI/HC3; some questions have two answers by people."""
    people = [f"{says(i, k, n)} human" for n in range(1 + i % 2)]
    answers = {"human_answers": people, "chatgpt_answers": [f"{says(i, k, 3)} generated"]}
    return {"question": says(i, k), **answers, "index": i, "source": "reddit_eli5"}


def ultrafeedback_row(i, k=0):
    """A row of HuggingFaceH4/ultrafeedback_binarized."""
    prompt = says(i, k)
    asked = {"role": "user", "content": prompt}
    chosen, rejected = (
        [asked, {"role": "assistant", "content": f"{says(i, k, n)} {word}"}]
        for n, word in enumerate(("joy", "bore"))
    )
    scores = {"score_chosen": 8.0 + i % 2, "score_rejected": 4.0}
    row = {"prompt": prompt, "prompt_id": f"{i:04x}", "chosen": chosen, "rejected": rejected}
    return row | {"messages": chosen} | scores


def write(folder, path, rows):
    """Rows as the file `path`: Parquet, JSON lines, or JSON lines compressed."""
    file = Path(folder) / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(file))
        return
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)


def write_copy(folder, name, n=24, held_out=8):
    """The data set `name` of `DATASETS` in `folder`, with so many rows in each file."""
    train, test = range(n), range(held_out)
    if name == "tldr":
        write(
            folder,
            "comparisons/train/0000.parquet",
            [tldr_row(i) for i in train],
        )
        halves = [tldr_row(i, 1, f"valid{i % 2 + 1}") for i in range(2 * held_out)]
        write(folder, "comparisons/validation/0000.parquet", halves)
    elif name == "tldr-trl":
        write(folder, "data/train-00000-of-00001.parquet", [tldr_trl_row(i) for i in train])
        write(folder, "data/validation-00000-of-00001.parquet", [tldr_trl_row(i, 1) for i in test])
    elif name == "hh":
        tranches = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
        for k, part in enumerate(tranches):
            write(folder, f"{part}/train.jsonl.gz", [hh_row(i, k) for i in train])
            write(folder, f"{part}/test.jsonl.gz", [hh_row(i, 10 + k) for i in test])
        red_team = [{"transcript": "\n\nHuman: hi", "rating": 4.0}]
        write(folder, "red-team-attempts/red_team_attempts.jsonl.gz", red_team)
    elif name == "webgpt":
        write(folder, "default/train/0000.parquet", [webgpt_row(i) for i in range(10 * n)])
    elif name == "shp":
        for k, domain in enumerate(("explainlikeimfive", "askculinary")):
            for m, split in enumerate(("train", "validation", "test")):
                rows = [shp_row(i, 10 * k + m, f"{domain}_{split}") for i in (test if m else train)]
                write(folder, f"{domain}/{split}.json", rows)
    elif name == "hc3":
        write(folder, "all.jsonl", [hc3_row(i) for i in range(10 * n)])
        write(folder, "HC3.py", [])
    elif name == "ultrafeedback":
        for kind in ("prefs", "sft"):
            for k, (split, rows) in enumerate((("train", train), ("test", test))):
                file = f"data/{split}_{kind}-00000-of-00001.parquet"
                write(folder, file, [ultrafeedback_row(i, k) for i in rows])
    elif name == "ultrafeedback-trl":
        kept = ("chosen", "rejected", "score_chosen", "score_rejected")
        for k, (split, rows) in enumerate((("train", train), ("test", test))):
            made = [ultrafeedback_row(i, k) for i in rows]
            rows = [{column: row[column] for column in kept} for row in made]
            write(folder, f"data/{split}-00000-of-00001.parquet", rows)
    return folder


def into_cache(hub, name, folder, revision="main"):
    """Lay `folder` into the cache of the hub as `hf download` does: a snapshot of a revision."""
    repository = Path(hub) / f"datasets--{name.replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    ref = repository / "refs" / revision
    ref.parent.mkdir(parents=True)
    ref.write_text(commit)
    (repository / "snapshots").mkdir()
    Path(folder).rename(repository / "snapshots" / commit)
