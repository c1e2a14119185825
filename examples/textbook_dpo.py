"""DPO in plain PyTorch, top to bottom: log-probs, loss, training loop.

    python examples/textbook_dpo.py

Written as most tutorials write it: chosen and rejected apart, padded, logits of every position, the
reference asked at every step. `dpo_lab.train_dpo` gets the same losses with less time and memory.
"""

import copy

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lab import from_rows
from dpo_lab.assets import EMBEDDED

BETA, LEARNING_RATE, BATCH_PAIRS, EPOCHS = 0.1, 3e-5, 2, 4
TEXTS = [
    ("This movie", " was a joy from start to end.", " was a bore."),
    ("The plot", " is clever and moving.", " makes no sense at all."),
    ("The actors", " are wonderful.", " read their lines like a list."),
    ("In the end", " I laughed and cried.", " I wanted my money back."),
]


def completion_logps(model, prompts, completions):
    """log pi(y|x) of N completions in nats, (N,): the sum over the completion's own tokens."""
    # a row is prompt, completion, padding
    rows = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions)]
    ids = pad_sequence(rows, batch_first=True).to(model.device)  # (N, L)
    starts, ends = (torch.tensor([[len(x)] for x in xs]).to(ids) for xs in (prompts, rows))
    places = torch.arange(ids.shape[1], device=model.device)

    # the logits at one position predict the token at the next
    logits = model(input_ids=ids, attention_mask=(places < ends).long()).logits[:, :-1]
    token_logps = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    own = (starts <= places) & (places < ends)
    return (token_logps * own[:, 1:]).sum(1)


def dpo_losses(policy, reference, prompts, chosen, rejected, beta=BETA):
    """-log sigma(beta (log-ratio of chosen minus log-ratio of rejected)) of P pairs, (P,)."""

    def difference(model):
        return completion_logps(model, prompts, chosen) - completion_logps(model, prompts, rejected)

    with torch.no_grad():
        reference_difference = difference(reference)
    return -F.logsigmoid(beta * (difference(policy) - reference_difference))


def token_ids(data, pairs):
    """Prompts, chosen and rejected completions of pairs, P lists of token ids each."""
    chosen, rejected = data.chosen[pairs], data.rejected[pairs]
    prompts = [data.prompts[data.prompt_of[i]] for i in chosen]
    return prompts, [data.completions[i] for i in chosen], [data.completions[i] for i in rejected]


def train(policy, data, steps):
    """Train in place, without dropout; yields the loss of each step, whose pairs `steps` gives."""
    reference = copy.deepcopy(policy.eval()).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for pairs in steps:
        loss = dpo_losses(policy, reference, *token_ids(data, pairs)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


if __name__ == "__main__":
    rows = [dict(zip(("prompt", "chosen", "rejected"), texts)) for texts in TEXTS]
    data = from_rows(rows, AutoTokenizer.from_pretrained(EMBEDDED), context=128)
    policy = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    losses = train(policy, data, data.steps(BATCH_PAIRS, epochs=EPOCHS))
    for step, loss in enumerate(losses, start=1):
        print(f"step {step:2}  loss {loss:.4f}")
