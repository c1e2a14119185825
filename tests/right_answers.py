"""Right answers to every exercise, each written in its own way: loops, libraries, by autograd."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributions

RIGHT_ANSWERS: list[tuple[str, Callable[..., Any]]] = []


def right(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add a function to the list; its name is `exercise_by_way`."""
    RIGHT_ANSWERS.append((function.__name__.rsplit("_by_", 1)[0], function))
    return function


# objective


@right
def kl_by_loop(p, q):
    rows = [sum(a * torch.log(a / b) for a, b in zip(x, y) if a > 0) for x, y in zip(p, q)]
    return torch.stack(rows) if p.ndim > 1 else kl_by_loop(p[None], q[None])[0]


@right
def kl_by_entropies(p, q):
    cross = -torch.xlogy(p, q).sum(-1)
    return cross - torch.special.entr(p).sum(-1)


@right
def kl_by_library(p, q):
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


@right
def kl_by_where(p, q):
    safe = torch.where(p > 0, p, torch.ones_like(p))
    return torch.einsum("...i,...i->...", p, torch.log(safe / q))


@right
def optimal_policy_by_hand(reference, reward, beta):
    exponents = (reward - reward.max()) / beta
    weights = reference * exponents.exp()
    return weights / weights.sum()


@right
def optimal_policy_by_logsumexp(reference, reward, beta):
    x = reward / beta + torch.log(reference)
    return torch.exp(x - torch.logsumexp(x, 0))


@right
def optimal_policy_by_distribution(reference, reward, beta):
    return distributions.Categorical(logits=reference.log() + reward / beta).probs


@right
def optimal_policy_by_gradient(reference, reward, beta):
    # beta log Z has the optimal policy as its gradient
    with torch.enable_grad():
        r = reward if reward.requires_grad else reward.detach().clone().requires_grad_()
        value = beta * torch.logsumexp(reference.log() + r / beta, 0)
        return torch.autograd.grad(value, r, create_graph=True)[0]


@right
def log_partition_by_largest(reference, reward, beta):
    top = reward.max(-1, keepdim=True).values
    return (reference * ((reward - top) / beta).exp()).sum(-1).log() + top[:, 0] / beta


@right
def log_partition_by_loop(reference, reward, beta):
    rows = [torch.logsumexp(x.log() + r / beta, 0) for x, r in zip(reference, reward)]
    return torch.stack(rows)


@right
def log_partition_by_logaddexp(reference, reward, beta):
    terms = reference.log() + reward / beta
    total = terms[:, 0]
    for i in range(1, terms.shape[1]):
        total = torch.logaddexp(total, terms[:, i])
    return total


@right
def log_partition_by_normalizer(reference, reward, beta):
    terms = reference.log() + reward / beta
    return (terms - terms.log_softmax(-1))[:, 0]


@right
def implicit_reward_by_ratio(policy, reference, beta):
    return beta * torch.log(policy / reference)


@right
def implicit_reward_by_loop(policy, reference, beta):
    return torch.stack([beta * (a.log() - b.log()) for a, b in zip(policy, reference)])


@right
def implicit_reward_by_power(policy, reference, beta):
    return torch.log((policy / reference) ** beta)


@right
def implicit_reward_by_log1p(policy, reference, beta):
    return beta * torch.log1p((policy - reference) / reference)


# preferences


@right
def bt_nll_by_softmax(rewards, chosen, rejected):
    return -torch.stack([rewards[chosen], rewards[rejected]], 1).log_softmax(1)[:, 0]


@right
def bt_nll_by_softplus(rewards, chosen, rejected):
    return F.softplus(rewards[rejected] - rewards[chosen])


@right
def bt_nll_by_loop(rewards, chosen, rejected):
    losses = []
    for w, l in zip(chosen.tolist(), rejected.tolist()):  # noqa: E741
        both = torch.stack([rewards[w], rewards[l]])
        losses.append(both.logsumexp(0) - both[0])
    return torch.stack(losses)


@right
def bt_nll_by_cross_entropy(rewards, chosen, rejected):
    logits = rewards[torch.stack([chosen, rejected], 1)]
    return F.cross_entropy(logits, torch.zeros_like(chosen), reduction="none")


@right
def bt_gradient_by_autograd(rewards, chosen, rejected):
    r = rewards.clone().requires_grad_()
    loss = -F.logsigmoid(r[chosen] - r[rejected]).sum()
    return torch.autograd.grad(loss, r)[0]


@right
def bt_gradient_by_loop(rewards, chosen, rejected):
    gradient = torch.zeros_like(rewards)
    for w, l in zip(chosen, rejected):  # noqa: E741
        weight = torch.sigmoid(rewards[l] - rewards[w])
        gradient[w] -= weight
        gradient[l] += weight
    return gradient


@right
def bt_gradient_by_matrix(rewards, chosen, rejected):
    n = len(rewards)
    signs = F.one_hot(chosen, n) - F.one_hot(rejected, n)  # (P, N)
    signs = signs.to(rewards.dtype)
    return -signs.T @ torch.sigmoid(-signs @ rewards)


@right
def bt_gradient_by_bincount(rewards, chosen, rejected):
    weights = torch.sigmoid(rewards[rejected] - rewards[chosen])
    n = len(rewards)
    lost = torch.bincount(rejected, weights, n) - torch.bincount(chosen, weights, n)
    return lost.to(rewards.dtype)


@right
def plackett_luce_nll_by_loop(ranked_rewards):
    k = ranked_rewards.shape[1]
    places = [torch.log_softmax(ranked_rewards[:, i:], 1)[:, 0] for i in range(k)]
    return -torch.stack(places, 1).sum(1)


@right
def plackett_luce_nll_by_mask(ranked_rewards):
    k = ranked_rewards.shape[1]
    left = torch.ones(k, k, dtype=torch.bool).triu()
    table = ranked_rewards[:, None, :].masked_fill(~left, -torch.inf)  # (B, K, K)
    return (table.logsumexp(2) - ranked_rewards).sum(1)


@right
def plackett_luce_nll_by_logaddexp(ranked_rewards):
    total, left = 0.0, ranked_rewards[:, -1]
    for i in reversed(range(ranked_rewards.shape[1] - 1)):
        left = torch.logaddexp(left, ranked_rewards[:, i])
        total = total + left - ranked_rewards[:, i]
    return total


@right
def plackett_luce_nll_by_rows(ranked_rewards):
    rows = []
    for row in ranked_rewards:
        losses = [row[i:].logsumexp(0) - row[i] for i in range(len(row) - 1)]
        rows.append(torch.stack(losses).sum())
    return torch.stack(rows)


@right
def pairs_by_loop(scores):
    b, k = scores.shape
    found = [
        (p * k + i, p * k + j)
        for p in range(b)
        for i in range(k)
        for j in range(k)
        if scores[p, i] > scores[p, j]
    ]
    return torch.tensor([i for i, _ in found]), torch.tensor([j for _, j in found])


@right
def pairs_by_combinations(scores):
    b, k = scores.shape
    within = torch.combinations(torch.arange(k))
    i, j = (torch.arange(b)[:, None, None] * k + within).reshape(-1, 2).T
    flat = scores.reshape(-1)
    i, j = i[flat[i] != flat[j]], j[flat[i] != flat[j]]
    better = flat[i] > flat[j]
    return torch.where(better, i, j), torch.where(better, j, i)


@right
def pairs_by_mesh(scores):
    flat, k = scores.flatten(), scores.shape[1]
    prompt = torch.arange(len(flat)) // k
    wins = (flat[:, None] > flat) & (prompt[:, None] == prompt)
    chosen, rejected = torch.where(wins)
    return chosen, rejected


@right
def pairs_by_sorting(scores):
    k, chosen, rejected = scores.shape[1], [], []
    for prompt, row in enumerate(scores):
        order = row.argsort(descending=True).tolist()
        for place, i in enumerate(order):
            worse = [j for j in order[place + 1 :] if row[j] < row[i]]
            chosen += [prompt * k + i] * len(worse)
            rejected += [prompt * k + j for j in worse]
    return [torch.tensor(chosen), torch.tensor(rejected)]


# DPO


@right
def dpo_loss_by_softplus(policy_logps, reference_logps, chosen, rejected, beta):
    ratio = policy_logps - reference_logps
    return F.softplus(beta * (ratio[rejected] - ratio[chosen]))


@right
def dpo_loss_by_bce(policy_logps, reference_logps, chosen, rejected, beta):
    margins = beta * (policy_logps - reference_logps)[torch.stack([chosen, rejected])]
    logits = margins[0] - margins[1]
    ones = torch.ones_like(logits)
    return F.binary_cross_entropy_with_logits(logits, ones, reduction="none")


@right
def dpo_loss_by_loop(policy_logps, reference_logps, chosen, rejected, beta):
    losses = []
    for w, l in zip(chosen.tolist(), rejected.tolist()):  # noqa: E741
        ours = policy_logps[w] - policy_logps[l]
        theirs = reference_logps[w] - reference_logps[l]
        margin = beta * (ours - theirs)
        losses.append(torch.logaddexp(torch.zeros_like(margin), -margin))
    return torch.stack(losses)


@right
def dpo_loss_by_softmax(policy_logps, reference_logps, chosen, rejected, beta):
    rewards = beta * (policy_logps - reference_logps)
    both = torch.stack([rewards[chosen], rewards[rejected]])
    return -both.log_softmax(0)[0]


@right
def gradient_weights_by_complement(policy_logps, reference_logps, chosen, rejected, beta):
    r = beta * (policy_logps - reference_logps)
    return 1 - torch.sigmoid(r[chosen] - r[rejected])


@right
def gradient_weights_by_softmax(policy_logps, reference_logps, chosen, rejected, beta):
    r = beta * (policy_logps - reference_logps)
    return torch.stack([r[chosen], r[rejected]]).softmax(0)[1]


@right
def gradient_weights_by_tanh(policy_logps, reference_logps, chosen, rejected, beta):
    r = beta * (policy_logps - reference_logps)
    return (1 + torch.tanh((r[rejected] - r[chosen]) / 2)) / 2


@right
def gradient_weights_by_autograd(policy_logps, reference_logps, chosen, rejected, beta):
    r = beta * (policy_logps.detach() - reference_logps)
    margins = (r[chosen] - r[rejected]).requires_grad_()
    return -torch.autograd.grad((-F.logsigmoid(margins)).sum(), margins)[0]


@right
def dpo_gradient_by_autograd(policy_logps, reference_logps, chosen, rejected, beta):
    x = policy_logps.detach().clone().requires_grad_()
    loss = dpo_loss_by_softplus(x, reference_logps, chosen, rejected, beta).sum()
    return torch.autograd.grad(loss, x)[0]


@right
def dpo_gradient_by_loop(policy_logps, reference_logps, chosen, rejected, beta):
    r = beta * (policy_logps - reference_logps)
    gradient = torch.zeros_like(r)
    for w, l in zip(chosen, rejected):  # noqa: E741
        weight = beta * torch.sigmoid(r[l] - r[w])
        gradient[w] -= weight
        gradient[l] += weight
    return gradient


@right
def dpo_gradient_by_matrix(policy_logps, reference_logps, chosen, rejected, beta):
    n = len(policy_logps)
    signs = (F.one_hot(chosen, n) - F.one_hot(rejected, n)).to(policy_logps.dtype)
    margins = beta * signs @ (policy_logps - reference_logps)
    return -beta * (signs * torch.sigmoid(-margins)[:, None]).sum(0)


@right
def dpo_gradient_by_scatter(policy_logps, reference_logps, chosen, rejected, beta):
    r = beta * (policy_logps - reference_logps)
    weights = beta * torch.sigmoid(r[rejected] - r[chosen])
    index, values = torch.cat([chosen, rejected]), torch.cat([-weights, weights])
    return torch.zeros_like(r).scatter_add(0, index, values)


@right
def ipo_loss_by_square(policy_logps, reference_logps, chosen, rejected, beta):
    ours = policy_logps[chosen] - policy_logps[rejected]
    theirs = reference_logps[chosen] - reference_logps[rejected]
    return torch.square((ours - theirs) - 0.5 / beta)


@right
def ipo_loss_by_mse(policy_logps, reference_logps, chosen, rejected, beta):
    ratios = policy_logps - reference_logps
    gaps = ratios[chosen] - ratios[rejected]
    return F.mse_loss(gaps, torch.full_like(gaps, 1 / (2 * beta)), reduction="none")


@right
def ipo_loss_by_beta_outside(policy_logps, reference_logps, chosen, rejected, beta):
    r = beta * (policy_logps - reference_logps)
    return (r[chosen] - r[rejected] - 1 / 2) ** 2 / beta**2


@right
def ipo_loss_by_loop(policy_logps, reference_logps, chosen, rejected, beta):
    losses = []
    for w, l in zip(chosen, rejected):  # noqa: E741
        gap = policy_logps[w] - reference_logps[w] - policy_logps[l] + reference_logps[l]
        losses.append((gap - 1 / (2 * beta)).pow(2))
    return torch.stack(losses)


@right
def smoothed_loss_by_softplus(margins, e):
    return (1 - e) * F.softplus(-margins) + e * F.softplus(margins)


@right
def smoothed_loss_by_linear(margins, e):
    # log sigma(-m) = log sigma(m) - m
    return e * margins - F.logsigmoid(margins)


@right
def smoothed_loss_by_bce(margins, e):
    target = torch.full_like(margins, 1 - e)
    return F.binary_cross_entropy_with_logits(margins, target, reduction="none")


@right
def smoothed_loss_by_cross_entropy(margins, e):
    logits = torch.stack([margins, torch.zeros_like(margins)], 1)
    target = torch.tensor([1 - e, e], dtype=margins.dtype).expand_as(logits)
    return F.cross_entropy(logits, target, reduction="none")


# policy gradient


@right
def reinforce_gradient_by_autograd(logits, actions, returns, baseline):
    x = logits.detach().clone().requires_grad_()
    surrogate = ((returns - baseline) * x.log_softmax(0)[actions]).mean()
    return torch.autograd.grad(surrogate, x)[0]


@right
def reinforce_gradient_by_loop(logits, actions, returns, baseline):
    pi, total = logits.softmax(0), torch.zeros_like(logits)
    for action, gain in zip(actions.tolist(), returns - baseline):
        total -= gain * pi
        total[action] += gain
    return total / len(actions)


@right
def reinforce_gradient_by_bincount(logits, actions, returns, baseline):
    gains = returns - baseline
    taken = torch.bincount(actions, gains, len(logits)).to(logits.dtype)
    return (taken - gains.sum() * logits.softmax(0)) / len(actions)


@right
def reinforce_gradient_by_distribution(logits, actions, returns, baseline):
    x = logits.detach().clone().requires_grad_()
    logps = distributions.Categorical(logits=x).log_prob(actions)
    (logps @ (returns - baseline) / len(actions)).backward()
    return x.grad


@right
def gae_by_sums(rewards, values, mask, gamma, lam):
    n, length = rewards.shape
    after = torch.cat([values * mask, torch.zeros_like(values[:, :1])], 1)[:, 1:]
    deltas = (rewards + gamma * after - values) * mask
    powers = (gamma * lam) ** torch.arange(length, dtype=values.dtype)
    columns = [(deltas[:, t:] * powers[: length - t]).sum(1) * mask[:, t] for t in range(length)]
    return torch.stack(columns, 1)


@right
def gae_by_rows(rewards, values, mask, gamma, lam):
    result = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        n, running = int(mask[i].sum()), 0.0
        for t in reversed(range(n)):
            following = values[i, t + 1] if t + 1 < n else 0.0
            running = rewards[i, t] + gamma * following - values[i, t] + gamma * lam * running
            result[i, t] = running
    return result


@right
def gae_by_matrix(rewards, values, mask, gamma, lam):
    length = rewards.shape[1]
    values = values * mask
    deltas = (rewards - values + gamma * F.pad(values, (0, 1))[:, 1:]) * mask
    steps = torch.arange(length)[:, None] - torch.arange(length)  # later - earlier
    decay = torch.where(steps >= 0, (gamma * lam) ** steps.clamp(min=0).to(values.dtype), 0.0)
    return (deltas @ decay) * mask


@right
def gae_by_returns(rewards, values, mask, gamma, lam):
    # lambda-returns less the values
    columns, later, later_value = [], torch.zeros_like(rewards[:, 0]), 0.0
    for t in reversed(range(rewards.shape[1])):
        inside = mask[:, t].to(rewards.dtype)
        target = rewards[:, t] + gamma * ((1 - lam) * later_value + lam * later)
        later, later_value = target * inside, values[:, t] * inside
        columns.append(later - later_value)
    return torch.stack(columns[::-1], 1)


@right
def ppo_clip_by_where(logps, old_logps, advantages, clip):
    ratios = (logps - old_logps).exp()
    bound = torch.where(advantages > 0, 1 + clip, 1 - clip)
    chosen = torch.where(advantages > 0, torch.minimum(ratios, bound), torch.maximum(ratios, bound))
    return -advantages * chosen


@right
def ppo_clip_by_minimum(logps, old_logps, advantages, clip):
    ratios = torch.exp(logps) / torch.exp(old_logps)
    clipped = torch.clamp(ratios, 1 - clip, 1 + clip)
    return -torch.min(ratios * advantages, clipped * advantages)


@right
def ppo_clip_by_bound(logps, old_logps, advantages, clip):
    # Spinning Up's form: min(A w, g(clip, A))
    ratios = (logps - old_logps).exp()
    bound = torch.where(advantages >= 0, (1 + clip) * advantages, (1 - clip) * advantages)
    return -torch.minimum(ratios * advantages, bound)


@right
def ppo_clip_by_stack(logps, old_logps, advantages, clip):
    ratios = (logps - old_logps).exp()
    both = torch.stack([ratios, ratios.clip(1 - clip, 1 + clip)])
    return (-advantages * both).amax(0)


# language model


@right
def sequence_logps_by_cross_entropy(logits, input_ids, completion_mask):
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
    return -(losses * completion_mask[:, 1:]).sum(1)


@right
def sequence_logps_by_loop(logits, input_ids, completion_mask):
    rows = []
    for row, ids, mask in zip(logits, input_ids, completion_mask):
        total = 0.0
        for t in range(1, len(ids)):
            if mask[t]:
                total = total + row[t - 1][ids[t]] - torch.logsumexp(row[t - 1], 0)
        rows.append(total)
    return torch.stack(rows)


@right
def sequence_logps_by_ignored_labels(logits, input_ids, completion_mask):
    labels = input_ids.masked_fill(~completion_mask, -100)[:, 1:]
    table = logits[:, :-1]
    losses = F.cross_entropy(
        table.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    )
    return -losses.view(labels.shape).sum(1)


@right
def sequence_logps_by_roll(logits, input_ids, completion_mask):
    targets, mask = input_ids.roll(-1, 1), completion_mask.roll(-1, 1).clone()
    mask[:, -1] = False
    picked = logits.gather(2, targets[..., None])[..., 0] - logits.logsumexp(2)
    return (picked * mask).sum(1)


@right
def sequence_kl_by_means(policy_logps, reference_logps):
    return policy_logps.mean() - reference_logps.mean()


@right
def sequence_kl_by_loop(policy_logps, reference_logps):
    total = 0.0
    for ours, theirs in zip(policy_logps.tolist(), reference_logps.tolist()):
        total += ours - theirs
    return total / len(policy_logps)


@right
def sequence_kl_by_sum(policy_logps, reference_logps):
    return torch.sum(policy_logps - reference_logps) / policy_logps.shape[0]


@right
def sequence_kl_by_ratio(policy_logps, reference_logps):
    return -torch.log(torch.exp(reference_logps - policy_logps)).mean()


def _pair_losses(policy, reference, prompts, chosen, rejected, beta, logps):
    policy.eval()
    reference.eval()
    losses = []
    for x, w, l in zip(prompts, chosen, rejected):  # noqa: E741
        with torch.no_grad():
            theirs = logps(reference, x, w) - logps(reference, x, l)
        ours = logps(policy, x, w) - logps(policy, x, l)
        losses.append(F.softplus(-beta * (ours - theirs)))
    return torch.stack(losses).mean()


@right
def dpo_step_by_pairs(policy, reference, prompts, chosen, rejected, beta):
    def logps(model, x, y):
        table = model(torch.tensor([x + y]))[0].log_softmax(-1)
        return table[range(len(x) - 1, len(x + y) - 1), y].sum()

    return _pair_losses(policy, reference, prompts, chosen, rejected, beta, logps)


@right
def dpo_step_by_cross_entropy(policy, reference, prompts, chosen, rejected, beta):
    def logps(model, x, y):
        logits = model(torch.tensor([x + y]))[0, len(x) - 1 : -1]
        return -F.cross_entropy(logits, torch.tensor(y), reduction="sum")

    return _pair_losses(policy, reference, prompts, chosen, rejected, beta, logps)


def _padded(prompts, completions, padding):
    texts = [torch.tensor(x + y) for x, y in zip(prompts, completions)]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=padding)
    labels = [torch.tensor([-100] * len(x) + y) for x, y in zip(prompts, completions)]
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return ids, labels


def _by_labels(model, prompts, completions, padding):
    ids, labels = _padded(prompts, completions, padding)
    logits = model(ids)[:, :-1].transpose(1, 2)
    return -F.cross_entropy(logits, labels[:, 1:], reduction="none").sum(1)


@right
def dpo_step_by_labels(policy, reference, prompts, chosen, rejected, beta):
    policy.eval()
    reference.eval()
    with torch.no_grad():
        theirs = [_by_labels(reference, prompts, side, 1) for side in (chosen, rejected)]
    ours = [_by_labels(policy, prompts, side, 1) for side in (chosen, rejected)]
    margins = beta * ((ours[0] - theirs[0]) - (ours[1] - theirs[1]))
    return -F.logsigmoid(margins).mean()


@right
def dpo_step_by_detaching(policy, reference, prompts, chosen, rejected, beta):
    policy.eval()
    reference.eval()
    everything = prompts * 2, chosen + rejected
    theirs = _by_labels(reference, *everything, 0).detach()
    rewards = beta * (_by_labels(policy, *everything, 0) - theirs)
    n = len(prompts)
    return F.softplus(rewards[n:] - rewards[:n]).sum() / n
