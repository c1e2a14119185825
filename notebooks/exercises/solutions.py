"""Solutions of the exercises, one function each. Write your own first.

The library has most of these too, in another form: `dpo_lab.losses`,
`dpo_lab.logprobs`, `dpo_lab.theory`, `dpo_lab.rlhf`.
"""

import torch
import torch.nn.functional as F

# notebook 01


def my_kl(p, q):
    """KL(p || q) over the last dimension, in nats."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def my_optimal_policy(reference, reward, beta):
    """The policy of Eq. 4: reference * exp(reward / beta) / Z."""
    return torch.softmax(reference.log() + reward / beta, dim=-1)


def my_log_partition(reference, reward, beta):
    """log Z(x) of Eq. 4 for each prompt, (B,)."""
    return torch.logsumexp(reference.log() + reward / beta, dim=-1)


def my_implicit_reward(policy, reference, beta):
    """beta log(pi / pi_ref), (n,)."""
    return beta * (policy.log() - reference.log())


# notebook 02


def my_bt_nll(rewards, chosen, rejected):
    """-log p(chosen beats rejected) under Bradley-Terry, (P,)."""
    return -F.logsigmoid(rewards[chosen] - rewards[rejected])


def my_bt_gradient(rewards, chosen, rejected):
    """The gradient of the summed loss with respect to the rewards, (N,)."""
    weights = torch.sigmoid(rewards[rejected] - rewards[chosen])  # (P,)
    gradient = torch.zeros_like(rewards)
    gradient.index_add_(0, chosen, -weights)
    gradient.index_add_(0, rejected, weights)
    return gradient


def my_plackett_luce_nll(ranked_rewards):
    """-log p(ranking) under Plackett-Luce, (B,), from rewards (B, K), best first."""
    # of each place: log of the sum of exp(reward) over the items that are left
    left = ranked_rewards.flip(1).logcumsumexp(1).flip(1)  # (B, K)
    return (left - ranked_rewards).sum(1)


def my_pairs(scores):
    """Every pair of unequal scores of a prompt, as indices into B * K completions."""
    k = scores.shape[1]
    better = scores[:, :, None] > scores[:, None, :]  # (B, K, K)
    prompt, i, j = better.nonzero().T
    return prompt * k + i, prompt * k + j


# notebook 03


def my_dpo_loss(policy_logps, reference_logps, chosen, rejected, beta):
    """-log sigma(margin) of each pair, (P,)."""
    rewards = beta * (policy_logps - reference_logps)  # (N,)
    return -F.logsigmoid(rewards[chosen] - rewards[rejected])


def my_gradient_weights(policy_logps, reference_logps, chosen, rejected, beta):
    """sigma(-margin) of each pair, (P,)."""
    rewards = beta * (policy_logps - reference_logps)  # (N,)
    return torch.sigmoid(rewards[rejected] - rewards[chosen])


def my_dpo_gradient(policy_logps, reference_logps, chosen, rejected, beta):
    """The gradient of the summed DPO loss by policy_logps, (N,), by hand."""
    rewards = beta * (policy_logps - reference_logps)  # (N,)
    weights = beta * torch.sigmoid(rewards[rejected] - rewards[chosen])  # (P,)
    gradient = torch.zeros_like(policy_logps)
    gradient.index_add_(0, chosen, -weights)
    gradient.index_add_(0, rejected, weights)
    return gradient


def my_ipo_loss(policy_logps, reference_logps, chosen, rejected, beta):
    """(difference of log-ratios - 1 / (2 beta))^2 of each pair, (P,)."""
    log_ratios = policy_logps - reference_logps  # (N,)
    return (log_ratios[chosen] - log_ratios[rejected] - 1 / (2 * beta)) ** 2


def my_smoothed_loss(margins, e):
    """cDPO: the mean loss when each label is wrong with probability e, (P,)."""
    return -(1 - e) * F.logsigmoid(margins) - e * F.logsigmoid(-margins)


# notebook 04


def my_reinforce_gradient(logits, actions, returns, baseline):
    """An estimate of the gradient of E[return] with respect to the logits, (n,)."""
    taken = F.one_hot(actions, len(logits))  # (S, n)
    scores = taken - torch.softmax(logits, dim=0)  # d log pi(action) / d logits
    return ((returns - baseline)[:, None] * scores).mean(0)


def my_gae(rewards, values, mask, gamma, lam):
    """Generalized advantages of tokens, (N, L); zero where the mask is False."""
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(
            mask[:, t], surprise + gamma * lam * next_advantage, 0.0
        )
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages


def my_ppo_clip(logps, old_logps, advantages, clip):
    """PPO's clipped loss per action, (N,)."""
    ratios = torch.exp(logps - old_logps)
    clipped = ratios.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * ratios, -advantages * clipped)


# notebook 05


def my_sequence_logps(logits, input_ids, completion_mask):
    """log pi(y|x) of each row, (B,): logits (B, L, V), ids and mask (B, L)."""
    logps = torch.log_softmax(
        logits[:, :-1], dim=-1
    )  # (B, L - 1, V): of tokens 1 to L - 1
    tokens = logps.gather(2, input_ids[:, 1:, None])[..., 0]  # (B, L - 1)
    return torch.where(completion_mask[:, 1:], tokens, 0.0).sum(1)


def my_sequence_kl(policy_logps, reference_logps):
    """KL(pi || pi_ref) of sequences, estimated from samples of pi, ()."""
    return (policy_logps - reference_logps).mean()


def my_dpo_step(policy, reference, prompts, chosen, rejected, beta):
    """The mean DPO loss of pairs given as token ids, ()."""
    policy.eval()
    reference.eval()

    # all texts as padded rows, chosen first
    starts = [len(x) for x in prompts * 2]
    rows = [x + y for x, y in zip(prompts * 2, chosen + rejected)]
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, starts)):
        input_ids[i, : len(row)] = torch.tensor(row)
        mask[i, start : len(row)] = True

    def logps(model):
        table = torch.log_softmax(model(input_ids)[:, :-1], dim=-1)
        tokens = table.gather(2, input_ids[:, 1:, None])[..., 0]
        return torch.where(mask[:, 1:], tokens, 0.0).sum(1)  # (2P,)

    with torch.no_grad():
        reference_logps = logps(reference)
    on_chosen, on_rejected = (beta * (logps(policy) - reference_logps)).chunk(2)
    return -F.logsigmoid(on_chosen - on_rejected).mean()
