"""Each of the five bugs leaves the loss at log 2, scores the wrong tokens, and shows in a check."""

import math
import re

import pytest
import torch
from test_train import make_preferences

from dpo_lab.batching import completion_batch
from dpo_lab.logprobs import completion_logps
from dpo_lab.losses import dpo_loss
from dpo_lab.silent_bugs import SILENT_BUGS, scored_html, scored_tokens, with_bug

PAIRS = [0, 1, 7]


@pytest.fixture(scope="module")
def preferences(tiny):
    return make_preferences(tiny)


@torch.no_grad()
def loop(model, prompt, completion):
    """log pi of a completion, token by token, each after a forward pass over what precedes it."""
    read, total = list(prompt), 0.0
    for token in completion:
        logits = model(torch.tensor([read])).logits[0, -1].double()
        total += logits.log_softmax(-1)[token].item()
        read.append(token)
    return total


def sides(preferences, pair):
    """Prompt and tokens of the chosen and of the rejected completion."""
    for i in (preferences.chosen[pair], preferences.rejected[pair]):
        yield preferences.prompts[preferences.prompt_of[i]], preferences.completions[i]


def scores(model, batch):
    """The log-probs (P, 2) that a batch gives to chosen and rejected."""
    with torch.no_grad():
        logps = completion_logps(model, batch.completions)
    return torch.stack([logps[batch.chosen], logps[batch.rejected]], 1)


def test_without_a_bug_the_loop_finds_what_is_scored(model, preferences):
    batch = preferences.batch(PAIRS)
    by_hand = [[loop(model, *side) for side in sides(preferences, pair)] for pair in PAIRS]
    assert torch.allclose(scores(model, batch), torch.tensor(by_hand).double(), atol=1e-4)


@pytest.mark.parametrize("bug", SILENT_BUGS)
def test_the_loss_does_not_see_a_bug_and_the_loop_does(model, preferences, bug):
    batch = with_bug(preferences, PAIRS, bug)
    with torch.no_grad():
        logps = completion_logps(model, batch.completions)
    start = dpo_loss(logps, logps.clone(), batch.chosen, batch.rejected, 0.5)
    assert start.losses.tolist() == pytest.approx([math.log(2)] * len(PAIRS), rel=1e-12)

    by_hand = [[loop(model, *side) for side in sides(preferences, pair)] for pair in PAIRS]
    apart = (scores(model, batch) - torch.tensor(by_hand)).abs()
    assert (apart > 0.01).all()


def expected(preferences, pair, bug):
    """What a program with this bug scores, on both sides: the tokens read before, and those."""
    for prompt, ids in sides(preferences, pair):
        yield {
            "the prompt is scored too": (prompt[:1], prompt[1:] + ids),
            "the last token is dropped": (prompt, ids[:-1]),
            "labels are not shifted": (prompt, [prompt[-1], *ids[:-1]]),
            "chosen and rejected are swapped": (prompt, ids),
        }[bug]


@pytest.mark.parametrize("bug", sorted(set(SILENT_BUGS) - {"the prompt is another one"}))
def test_a_bug_scores_the_tokens_that_it_says(preferences, bug):
    batch = with_bug(preferences, PAIRS, bug)
    for place, pair in enumerate(PAIRS):
        found = [
            scored_tokens(batch.completions, int(side[place]))
            for side in (batch.chosen, batch.rejected)
        ]
        wanted = list(expected(preferences, pair, bug))
        assert found == (wanted[::-1] if bug == "chosen and rejected are swapped" else wanted)


def test_another_prompt_is_one_of_the_batch_and_never_the_own(preferences):
    batch = with_bug(preferences, PAIRS, "the prompt is another one")
    prompts = {tuple(prompt) for pair in PAIRS for prompt, _ in sides(preferences, pair)}
    for place, pair in enumerate(PAIRS):
        (own, ids), _ = sides(preferences, pair)
        read, scored = scored_tokens(batch.completions, int(batch.chosen[place]))
        assert scored == ids and read != own and tuple(read) in prompts
    with pytest.raises(ValueError, match="^pairs are of one prompt alone; take pairs of at least"):
        with_bug(preferences, [0], "the prompt is another one")


def test_what_is_scored_in_a_batch_without_a_bug():
    prompts, completions = [[0, 5], [0, 6, 7, 8]], [[9], [3, 4, 0], [2, 2]]
    batch = completion_batch(prompts, completions, [1, 0, 1])
    found = [scored_tokens(batch, i) for i in range(3)]
    assert found == [([0, 6, 7, 8], [9]), ([0, 5], [3, 4, 0]), ([0, 6, 7, 8], [2, 2])]


def test_the_tokens_that_are_scored_have_a_color(preferences, tokenizer):
    batch = preferences.batch(PAIRS)
    i = int(batch.chosen[1])
    shown = scored_html(batch, i, tokenizer, "the title")
    colors = re.findall(r"rgba\([^)]*,([\d.]+)\)", shown)
    read, scored = scored_tokens(batch.completions, i)
    assert colors == ["0.00"] * len(read) + ["0.40"] * len(scored) and "<b>the title</b>" in shown


def test_bad_arguments_are_named(preferences):
    with pytest.raises(ValueError, match="^bug is 'dropout'; it must be one of 'the prompt is"):
        with_bug(preferences, PAIRS, "dropout")
    batch = completion_batch([[0, 1]], [[2], [3]], [0, 0])
    with pytest.raises(ValueError, match=r"^i is 2; with 2 completions it must be in 0\.\.1"):
        scored_tokens(batch, 2)
    shared = completion_batch([[0, 1, 2, 3]], [[2, 5], [3, 6]], [0, 0], compact=True)
    with pytest.raises(ValueError, match="^batch is compact; lay it out with compact=False"):
        scored_tokens(shared, 0)
