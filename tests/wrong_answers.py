"""Wrong answers, written without a look at the table of mistakes, with what a teacher would say.

They are the kinds that students hand in and that public code has; tests/test_checks.py holds that
each is caught, and how many come back with the teacher's name for the mistake.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class WrongAnswer(NamedTuple):
    """A function handed in for an exercise, and what is wrong with it in a teacher's words."""

    exercise: str
    mistake: str
    names: tuple[str, ...]
    """those of the check, for the same mistake"""
    function: Callable[..., Any]


WRONG_ANSWERS: list[WrongAnswer] = []


def mistake(
    exercise: str, words: str, *names: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the function below to the list."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        WRONG_ANSWERS.append(WrongAnswer(exercise, words, names, function))
        return function

    return add


# objective


@mistake("kl", "KL(q || p): the arguments are the wrong way round", "KL in the other direction")
def _(p, q):
    return (q * (q.log() - p.log())).sum(-1)


@mistake(
    "kl",
    "F.kl_div takes log-probabilities of the second argument: probabilities were given",
    "KL in the other direction",
    "second logarithm missing",
)
def _(p, q):
    return F.kl_div(p, q, reduction="none").sum(-1)


@mistake("kl", "cross-entropy: the entropy of p is not subtracted", "cross-entropy")
def _(p, q):
    return -(p * q.log()).sum(-1)


@mistake("optimal_policy", "not normalized", "not normalized")
def _(reference, reward, beta):
    return reference * torch.exp(reward / beta)


@mistake("optimal_policy", "multiplied by beta instead of divided", "times beta")
def _(reference, reward, beta):
    weights = reference * torch.exp(beta * reward)
    return weights / weights.sum(-1, keepdim=True)


@mistake(
    "optimal_policy",
    "softmax of the probabilities: the reference's logarithm is missing",
    "reference not logged",
)
def _(reference, reward, beta):
    return F.softmax(reference + reward / beta, dim=-1)


@mistake("log_partition", "Z, not its logarithm", "Z, not log Z")
def _(reference, reward, beta):
    return (reference * (reward / beta).exp()).sum(-1)


@mistake("log_partition", "the reference is left out", "reference omitted")
def _(reference, reward, beta):
    return torch.logsumexp(reward / beta, -1)


@mistake(
    "log_partition",
    "a mean where the expectation under the reference is meant",
    "mean over completions",
)
def _(reference, reward, beta):
    return (reference * torch.exp(reward / beta)).mean(-1).log()


@mistake("implicit_reward", "ratio without the logarithm", "ratio not logged")
def _(policy, reference, beta):
    return beta * policy / reference


@mistake("implicit_reward", "weighted by the policy: a term of the KL", "weighted by the policy")
def _(policy, reference, beta):
    return beta * policy * torch.log(policy / reference)


# preferences


@mistake("bt_nll", "the minus sign is missing", "sign")
def _(rewards, chosen, rejected):
    return torch.log(torch.sigmoid(rewards[chosen] - rewards[rejected]))


@mistake(
    "bt_nll", "the probability's complement instead of its negative logarithm", "1 - probability"
)
def _(rewards, chosen, rejected):
    return 1 - torch.sigmoid(rewards[chosen] - rewards[rejected])


@mistake("bt_nll", "a hinge loss", "hinge loss")
def _(rewards, chosen, rejected):
    return torch.relu(1 - (rewards[chosen] - rewards[rejected]))


@mistake(
    "bt_gradient",
    "repeated indices: assignment keeps the last pair of an item only",
    "repeated indices lost",
)
def _(rewards, chosen, rejected):
    w = torch.sigmoid(rewards[rejected] - rewards[chosen])
    g = torch.zeros_like(rewards)
    g[chosen] -= w
    g[rejected] += w
    return g


@mistake(
    "bt_gradient",
    "the weight is sigma(margin): largest where the pair is right already",
    "sigma(m) for sigma(-m)",
)
def _(rewards, chosen, rejected):
    w = torch.sigmoid(rewards[chosen] - rewards[rejected])
    g = torch.zeros_like(rewards)
    g = g.index_add(0, chosen, -w)
    return g.index_add(0, rejected, w)


@mistake(
    "plackett_luce_nll",
    "each place is compared with all items, also those before",
    "normalizer over all",
)
def _(ranked_rewards):
    return -F.log_softmax(ranked_rewards, dim=1).sum(1)


@mistake("plackett_luce_nll", "worst first: the ranking is read backwards", "order reversed")
def _(ranked_rewards):
    left = torch.logcumsumexp(ranked_rewards, dim=1)
    return (left - ranked_rewards).sum(1)


@mistake("pairs", "ties are kept", "ties kept")
def _(scores):
    B, K = scores.shape
    chosen, rejected = [], []
    for b in range(B):
        for i in range(K):
            for j in range(i + 1, K):
                first, second = (i, j) if scores[b, i] >= scores[b, j] else (j, i)
                chosen.append(b * K + first)
                rejected.append(b * K + second)
    return torch.tensor(chosen), torch.tensor(rejected)


@mistake(
    "pairs",
    "indices into the prompt's own completions: the offset is missing",
    "indices within the prompt",
)
def _(scores):
    chosen, rejected = [], []
    for row in scores:
        for i in range(len(row)):
            for j in range(len(row)):
                if row[i] > row[j]:
                    chosen.append(i)
                    rejected.append(j)
    return torch.tensor(chosen), torch.tensor(rejected)


# DPO


@mistake("dpo_loss", "the reference is left out", "reference omitted")
def _(policy_logps, reference_logps, chosen, rejected, beta):
    return -F.logsigmoid(beta * (policy_logps[chosen] - policy_logps[rejected]))


@mistake("dpo_loss", "beta stands outside of the sigmoid", "beta outside")
def _(policy_logps, reference_logps, chosen, rejected, beta):
    pi = policy_logps[chosen] - policy_logps[rejected]
    ref = reference_logps[chosen] - reference_logps[rejected]
    return -beta * F.logsigmoid(pi - ref)


@mistake("dpo_loss", "chosen and rejected are exchanged", "margin upside down")
def _(policy_logps, reference_logps, chosen, rejected, beta):
    ratios = policy_logps - reference_logps
    return -F.logsigmoid(beta * (ratios[rejected] - ratios[chosen]))


@mistake("gradient_weights", "sigma(margin): the sign of the margin", "sigma(m) for sigma(-m)")
def _(policy_logps, reference_logps, chosen, rejected, beta):
    r = beta * (policy_logps - reference_logps)
    return torch.sigmoid(r[chosen] - r[rejected])


@mistake(
    "gradient_weights", "the derivative of the sigmoid, not that of its logarithm", "slope of sigma"
)
def _(policy_logps, reference_logps, chosen, rejected, beta):
    r = beta * (policy_logps - reference_logps)
    s = torch.sigmoid(r[chosen] - r[rejected])
    return s * (1 - s)


@mistake("dpo_gradient", "the factor beta is missing", "beta of the chain rule")
def _(policy_logps, reference_logps, chosen, rejected, beta):
    r = beta * (policy_logps - reference_logps)
    w = torch.sigmoid(r[rejected] - r[chosen])
    return torch.zeros_like(policy_logps).index_add(0, chosen, -w).index_add(0, rejected, w)


@mistake(
    "dpo_gradient",
    "the gradient of the mean loss: divided by the number of pairs",
    "mean over pairs",
)
def _(policy_logps, reference_logps, chosen, rejected, beta):
    x = policy_logps.detach().clone().requires_grad_()
    r = beta * (x - reference_logps)
    loss = -F.logsigmoid(r[chosen] - r[rejected]).mean()
    return torch.autograd.grad(loss, x)[0]


@mistake("ipo_loss", "the target is 1 / beta: a factor 2 is missing", "target 1 / beta")
def _(policy_logps, reference_logps, chosen, rejected, beta):
    ratios = policy_logps - reference_logps
    return (ratios[chosen] - ratios[rejected] - 1 / beta) ** 2


@mistake("ipo_loss", "beta times the difference of log-ratios, as in DPO", "beta on the difference")
def _(policy_logps, reference_logps, chosen, rejected, beta):
    ratios = beta * (policy_logps - reference_logps)
    return (ratios[chosen] - ratios[rejected] - 1 / (2 * beta)).square()


@mistake("ipo_loss", "1 / 2 * beta is beta / 2: parentheses are missing", "target beta / 2")
def _(policy_logps, reference_logps, chosen, rejected, beta):
    ratios = policy_logps - reference_logps
    return (ratios[chosen] - ratios[rejected] - 1 / 2 * beta) ** 2


@mistake("smoothed_loss", "e and 1 - e are exchanged", "e and 1 - e exchanged")
def _(margins, e):
    return -e * F.logsigmoid(margins) - (1 - e) * F.logsigmoid(-margins)


@mistake("smoothed_loss", "robust DPO: debiased rather than smoothed", "robust for cDPO")
def _(margins, e):
    return (-(1 - e) * F.logsigmoid(margins) + e * F.logsigmoid(-margins)) / (1 - 2 * e)


# policy gradient


@mistake("reinforce_gradient", "the baseline is not subtracted", "baseline omitted")
def _(logits, actions, returns, baseline):
    scores = F.one_hot(actions, len(logits)) - logits.softmax(0)
    return (returns[:, None] * scores).mean(0)


@mistake("reinforce_gradient", "the gradient of the loss: the sign is that of descent", "sign")
def _(logits, actions, returns, baseline):
    x = logits.detach().clone().requires_grad_()
    loss = -((returns - baseline) * torch.log_softmax(x, 0)[actions]).mean()
    return torch.autograd.grad(loss, x)[0]


@mistake("gae", "the value after the last token of a row is not masked", "padding counted")
def _(rewards, values, mask, gamma, lam):
    out = torch.zeros_like(rewards)
    last = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(last)
        delta = rewards[:, t] + gamma * following - values[:, t]
        last = delta + gamma * lam * last
        out[:, t] = last
    return out * mask


@mistake(
    "gae",
    "the advantage decays by lambda alone: gamma is missing",
    "gamma missing in the recursion",
)
def _(rewards, values, mask, gamma, lam):
    m = mask.to(rewards.dtype)
    rewards, values = rewards * m, values * m
    last, steps = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + lam * last
        steps.append(last)
    return torch.stack(steps[::-1], 1) * m


@mistake("gae", "the returns: the values are added again", "returns for advantages")
def _(rewards, values, mask, gamma, lam):
    m = mask.to(rewards.dtype)
    rewards, values = rewards * m, values * m
    last, steps = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        steps.append(last)
    return (torch.stack(steps[::-1], 1) + values) * m


@mistake(
    "ppo_clip",
    "the smaller of the two losses: max and min are exchanged with the sign",
    "max for min",
)
def _(logps, old_logps, advantages, clip):
    r = (logps - old_logps).exp()
    return torch.min(-advantages * r, -advantages * torch.clamp(r, 1 - clip, 1 + clip))


@mistake("ppo_clip", "the clipped term alone, without the minimum", "clip without min")
def _(logps, old_logps, advantages, clip):
    r = (logps - old_logps).exp()
    return -advantages * torch.clamp(r, 1 - clip, 1 + clip)


@mistake("ppo_clip", "difference of log-probabilities instead of a ratio", "log-ratio for ratio")
def _(logps, old_logps, advantages, clip):
    r = logps - old_logps
    return -torch.min(advantages * r, advantages * r.clamp(1 - clip, 1 + clip))


# language model


@mistake(
    "sequence_logps",
    "not shifted: each position's logits are read at its own token",
    "labels not shifted",
)
def _(logits, input_ids, completion_mask):
    logps = logits.log_softmax(-1).gather(2, input_ids.unsqueeze(-1)).squeeze(-1)
    return (logps * completion_mask).sum(-1)


@mistake("sequence_logps", "the mask is shifted the wrong way", "mask not shifted")
def _(logits, input_ids, completion_mask):
    logps = logits[:, :-1].log_softmax(-1)
    logps = logps.gather(2, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (logps * completion_mask[:, :-1]).sum(-1)


@mistake("sequence_logps", "mean per token instead of the sum", "mean over tokens")
def _(logits, input_ids, completion_mask):
    logps = logits[:, :-1].log_softmax(-1)
    logps = logps.gather(2, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    mask = completion_mask[:, 1:]
    return (logps * mask).sum(-1) / mask.sum(-1)


@mistake(
    "sequence_kl",
    "weighted by exp(log-prob): the samples are drawn from pi already",
    "weighted by pi, summed",
)
def _(policy_logps, reference_logps):
    return (policy_logps.exp() * (policy_logps - reference_logps)).sum()


@mistake("sequence_kl", "F.kl_div takes its arguments the other way round", "F.kl_div of samples")
def _(policy_logps, reference_logps):
    return F.kl_div(policy_logps, reference_logps, log_target=True, reduction="batchmean")


def _pair_loss(policy, reference, prompts, chosen, rejected, beta, **how):
    """The DPO loss of pairs, one text at a time; `how` makes the mistakes below."""

    def logp(model, prompt, completion):
        logits = model(torch.tensor([prompt + completion]))[0]
        table = logits.log_softmax(-1)
        first = 1 if how.get("prompt") else len(prompt)
        text = prompt + completion
        return sum(table[t - 1, text[t]] for t in range(first, len(text)))

    if not how.get("dropout"):
        policy.eval()
        reference.eval()
    losses = []
    for x, w, loser in zip(prompts, chosen, rejected):
        of_policy = logp(policy, x, w) - logp(policy, x, loser)
        if how.get("no_reference"):
            losses.append(-F.logsigmoid(beta * of_policy))
            continue
        if how.get("graph"):
            of_reference = logp(reference, x, w) - logp(reference, x, loser)
        else:
            with torch.no_grad():
                of_reference = logp(reference, x, w) - logp(reference, x, loser)
        losses.append(-F.logsigmoid(beta * (of_policy - of_reference)))
    total = torch.stack(losses)
    return total.sum() if how.get("sum") else total.mean()


@mistake("dpo_step", "dropout is left on: the models are not put into eval mode", "dropout on")
def _(policy, reference, prompts, chosen, rejected, beta):
    return _pair_loss(policy, reference, prompts, chosen, rejected, beta, dropout=True)


@mistake(
    "dpo_step", "a graph through the reference: no_grad is missing", "reference has a gradient"
)
def _(policy, reference, prompts, chosen, rejected, beta):
    return _pair_loss(policy, reference, prompts, chosen, rejected, beta, graph=True)


@mistake("dpo_step", "summed over the pairs", "sum over pairs")
def _(policy, reference, prompts, chosen, rejected, beta):
    return _pair_loss(policy, reference, prompts, chosen, rejected, beta, sum=True)
