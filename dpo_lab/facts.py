"""Facts about a run's data, model and first scores, kept beside its metrics.

A fault may leave no trace in the loss, but one in what the run was given: `dpo_lab.health` reads
these facts. `facts.json` holds numbers, `pairs.safetensors` a hash of each training pair, and
`held_out.safetensors` one of each pair that the policy is evaluated on.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from dpo_lab.engine.arguments import checked, integers, token_lists
from dpo_lab.engine.distributed import world_size
from dpo_lab.engine.runs import atomic_write, write_json
from dpo_lab.engine.structure import unwrapped
from dpo_lab.evaluate import distinct_n
from dpo_lab.logprobs import Precision, score_completions
from dpo_lab.preferences import Preferences

FACTS, PAIRS, HELD_OUT = "facts.json", "pairs.safetensors", "held_out.safetensors"

# completions that are scored again before the first step
PROBED = 16


@checked
def record_facts(
    run: Path | str, policy: nn.Module, preferences: Preferences, *, steps: int
) -> dict[str, Any]:
    """Write `facts.json` and `pairs.safetensors` into `run` before the first step; the facts.

    `train_dpo(run=...)` calls it.
    """
    scored = preferences.reference_logps is not None and world_size() == 1
    facts = {
        "steps": steps,
        "data": data_facts(preferences, end_tokens=_end_tokens(policy)),
        "model": model_facts(policy),
        "start": start_facts(policy, preferences) if scored else None,
    }
    write_json(Path(run) / FACTS, facts)
    _write_hashes(Path(run) / PAIRS, preferences)
    return facts


@checked
def record_held_out(run: Path | str, preferences: Preferences) -> None:
    """Write which pairs the policy of `run` is evaluated on, so that a leak from training is seen.

    `dpo-lab train --data NAME` calls it; call it where your callback evaluates on pairs.
    """
    _write_hashes(Path(run) / HELD_OUT, preferences)


# the data


def data_facts(preferences: Preferences, *, end_tokens: Sequence[int] = ()) -> dict[str, Any]:
    """Counts and means over the pairs; lengths are in tokens.

    `end_tokens` are the ids that end a completion; without them nothing is said of ends.
    """
    p = preferences
    chosen = [p.completions[i] for i in p.chosen]
    rejected = [p.completions[i] for i in p.rejected]
    lengths = np.array([[len(a), len(b)] for a, b in zip(chosen, rejected)])
    shared = np.array([_shared(a, b) for a, b in zip(chosen, rejected)])
    used = np.unique(np.concatenate([p.chosen, p.rejected]))
    rounds, cyclic = _rankings(p)
    keys = pair_hashes(p)
    beats = {(p.prompt_of[a], *map(tuple, pair)) for a, *pair in zip(p.chosen, chosen, rejected)}
    return {
        "pairs": len(chosen),
        "completions": len(used),
        "identical": int(np.sum([a == b for a, b in zip(chosen, rejected)])),
        "repeated": len(keys) - len(np.unique(keys)),
        "contradicted": sum((prompt, b, a) in beats for prompt, a, b in beats if a != b),
        "rankings": rounds,
        "cyclic_rankings": cyclic,
        "chosen_length": float(lengths[:, 0].mean()),
        "rejected_length": float(lengths[:, 1].mean()),
        "chosen_longer": int((lengths[:, 0] > lengths[:, 1]).sum()),
        "rejected_longer": int((lengths[:, 0] < lengths[:, 1]).sum()),
        "prompt_length": float(np.mean([len(p.prompts[p.prompt_of[i]]) for i in used])),
        "begins_with_prompt": int(np.sum([_begins_with_prompt(p, i) for i in used])),
        "shared_prefix": float(shared.mean()),
        "share_a_prefix": int((shared > 0).sum()),
        **_score_facts(p),
        **_end_facts(p, end_tokens),
        "report": {name: n for name, n in asdict(p.report).items() if name != "unread"},
    }


def _score_facts(p: Preferences) -> dict[str, int]:
    """How many pairs have two different scores, and how many of them prefer the lower."""
    if p.scores is None:
        return {}
    gap = p.scores[p.chosen] - p.scores[p.rejected]
    return {"scored": int((gap != 0).sum()), "scored_other_way": int((gap < 0).sum())}


def _end_facts(p: Preferences, end_tokens: Sequence[int]) -> dict[str, int]:
    """How many completions stop short without an end token.

    A completion that was truncated has the greatest length; one that is shorter and has no end
    token has lost it. The report counts those without by the tokenizer that they were made with;
    where there is no report, `end_tokens` say which tokens end a completion.
    """
    longest = max(map(len, p.completions))
    at_limit = sum(len(ids) == longest for ids in p.completions)
    if p.report.pairs:
        return {"short_without_end": max(0, p.report.without_eos - at_limit)}
    if not end_tokens:
        return {}
    # chat templates write a line break after the end token
    ends = set(end_tokens)
    short = [len(ids) < longest and not ends & set(ids[-2:]) for ids in p.completions]
    return {"short_without_end": sum(short)}


def _shared(a: list[int], b: list[int]) -> int:
    """Tokens with which both begin."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def _begins_with_prompt(p: Preferences, i: int) -> bool:
    """Whether completion `i` begins with its prompt, of at least two tokens after BOS."""
    asked = p.prompts[p.prompt_of[i]][1:]
    return len(asked) >= 2 and p.completions[i][: len(asked)] == asked


def _rankings(p: Preferences) -> tuple[int, int]:
    """Groups of at least three linked completions, and those among them with a cycle.

    Labels by a score have no cycle: a beats b, b beats c and c beats a.
    """
    groups = [group for group in p.linked_pairs() if len(group) >= 3]
    cyclic = sum(_has_cycle(p.chosen[group], p.rejected[group]) for group in groups)
    return len(groups), cyclic


def _has_cycle(chosen: np.ndarray, rejected: np.ndarray) -> bool:
    """Whether some completion beats itself along the pairs."""
    losers: dict[int, set[int]] = {}
    for winner, loser in zip(chosen.tolist(), rejected.tolist()):
        losers.setdefault(winner, set()).add(loser)

    # take away completions that beat none of the rest, as long as there are any
    rest = set(losers)
    while ends := {one for one in rest if not losers[one] & rest}:
        rest -= ends
    return bool(rest)


# the model, and its scores before the first step


def model_facts(policy: nn.Module) -> dict[str, Any]:
    """Parameters, those that are trained, and the dtypes of the trained ones by their number."""
    parameters = list(unwrapped(policy).parameters())
    trained = [p for p in parameters if p.requires_grad]
    dtypes: dict[str, int] = {}
    for p in trained:
        name = str(p.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + p.numel()
    return {"parameters": sum(p.numel() for p in parameters), "trained": dtypes}


@torch.no_grad()
def start_facts(policy: nn.Module, preferences: Preferences) -> dict[str, Any]:
    """By which way of scoring the policy's log-probs are the reference's, before the first step.

    For each way the root mean square difference to `reference_logps`, in nats per completion, over
    some completions spread over the data. A policy that begins as the reference has `sum` near 0.
    `again` is the difference between scoring them twice, which dropout makes large. `noise` is
    what rounding in the recorded precision may do.
    """
    p, precision = preferences, preferences.reference_precision
    used = np.unique(np.concatenate([p.chosen, p.rejected]))
    some = used[np.linspace(0, len(used) - 1, min(PROBED, len(used))).astype(int)]
    prompts = [p.prompts[p.prompt_of[i]] for i in some]
    completions = [p.completions[i] for i in some]
    reference = p.reference_logps[some]
    lengths = np.array([len(ids) for ids in completions])

    # the loop trains it in this mode
    policy = unwrapped(policy).eval()

    def scored(
        prompts: list[list[int]], completions: list[list[int]], precision: Precision
    ) -> np.ndarray:
        found = score_completions(
            policy, prompts, completions, range(len(prompts)), precision=precision
        )
        return found.double().cpu().numpy()

    logps = scored(prompts, completions, precision)
    again = scored(prompts, completions, precision)
    found = {"sum": _rms(logps - reference), "again": _rms(again - logps)}
    found["log_ratio"] = float(np.mean(logps - reference))

    # where they are not the same, other ways of scoring may be
    if found["sum"] > PROBE_LIMIT[precision]:
        other: Precision = "bfloat16" if precision == "float32" else "float32"
        found["other_precision"] = _rms(scored(prompts, completions, other) - reference)
        found["mean"] = _rms(logps / lengths - reference)
        heads = [ids[:1] for ids in prompts]
        wholes = [prompt[1:] + ids for prompt, ids in zip(prompts, completions)]
        found["prompt_too"] = _rms(scored(heads, wholes, precision) - reference)
    return {"precision": precision, "completions": len(some), **found}


PROBE_LIMIT = {"float32": 1e-2, "bfloat16": 0.75}
"""nats by which log-probs of one completion may differ between batches of other shapes, as
`preferences.SAME_LOGPS`"""


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _end_tokens(policy: nn.Module) -> list[int]:
    """The ids at which the model's `generate` stops."""
    model = unwrapped(policy)
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        named = getattr(config, "eos_token_id", None)
        if named is not None:
            return [int(i) for i in np.ravel(named)]
    return []


# completions of an evaluation


def completion_facts(
    completions: Sequence[Sequence[int]], *, max_new_tokens: int, end_tokens: Iterable[int]
) -> dict[str, float]:
    """What an evaluation says of sampled completions, beside reward and KL.

    `completions` is their number, `length` their mean in tokens, `truncated` the fraction that
    reached `max_new_tokens` without an end token, `distinct_2` the distinct fraction of their
    two-token sequences. A callback of `train_dpo` that returns them has them in the metrics, under
    `eval/`.
    """
    completions, ends = token_lists("completions", completions), set(end_tokens)
    lengths = [len(ids) for ids in completions]
    truncated = [
        len(ids) >= max_new_tokens and not (ids and ids[-1] in ends) for ids in completions
    ]
    long_enough = [ids for ids in completions if len(ids) >= 2]
    found = {
        "completions": float(len(lengths)),
        "length": float(np.mean(lengths)),
        "truncated": float(np.mean(truncated)),
    }
    return found | ({"distinct_2": distinct_n(long_enough, 2)} if long_enough else {})


# which pairs


def pair_hashes(preferences: Preferences) -> np.ndarray:
    """(P,) int64: each pair by the tokens of its prompt and of both completions, in any order."""
    p = preferences
    found = [
        _hash([p.prompts[p.prompt_of[a]], *sorted([p.completions[a], p.completions[b]])])
        for a, b in zip(p.chosen, p.rejected)
    ]
    return integers("pairs", found)


def _hash(lists: list[list[int]]) -> int:
    digest = hashlib.blake2b(repr(lists).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _write_hashes(path: Path, preferences: Preferences) -> None:
    with atomic_write(path) as temporary:
        save_file({"pairs": torch.from_numpy(pair_hashes(preferences))}, temporary)
