"""On-policy DPO, iterated DPO and self-play on a bandit, exactly, many independent runs at once.

One prompt has n completions, and the policy is a table of logits, one per completion. In each round
pairs are drawn from the current policy and labeled, and DPO's loss on them is minimized. One round
is offline DPO, whose pairs come from the reference.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpo_lab.engine.arguments import checked, floats, integer, number
from dpo_lab.losses import check_beta, dpo_loss
from dpo_lab.theory.bandit import all_pairs, minimize, pair_weights
from dpo_lab.theory.objective import value_gap


class OnPolicyRuns(NamedTuple):
    """What `on_policy_runs` returns."""

    policies: Tensor
    """(rounds + 1, seeds, n) before the first round and after each"""
    labels: Tensor
    """(rounds, seeds, n, n) of each round, how often the first was preferred to the second"""


class TunedRuns(NamedTuple):
    """What `tuned_runs` returns."""

    policies: Tensor
    """(rounds + 1, seeds, n) before the first round and after each"""
    labels: Tensor
    """(rounds, seeds, n, n) of each round, how often the first was preferred to the second"""
    gaps: Tensor
    """(seeds,) J(pi*) - J(pi) at the end, in units of the reward"""
    learning_rate: float
    """the one that was chosen"""


@checked
def on_policy_runs(
    reference: Tensor,
    reward: Tensor,
    beta: float,
    *,
    labels: int,
    rounds: int,
    seeds: int,
    generator: torch.Generator,
    moved: bool = False,
    pairs: Literal["all", "newest"] = "all",
    label: Literal["bradley_terry", "reward"] = "bradley_terry",
    learning_rate: float | Tensor = 1.0,
    steps: int = 300,
) -> OnPolicyRuns:
    """DPO in rounds of sample, label and train: `seeds` runs with `labels` labels each.

    A round draws labels / rounds pairs of different completions from the current policy (equal ones
    need no label), and goes on from that policy by gradient descent on DPO's mean loss (Eq. 7 of
    Rafailov et al. 2023). One round is offline DPO. Online DPO is in Guo et al. 2024,
    https://arxiv.org/abs/2402.04792; iterated DPO in Xiong et al. 2023,
    https://arxiv.org/abs/2312.11456.

    Args:
        reference: (n,) probabilities, all positive.
        reward: (n,) rewards.
        beta: as in `dpo_loss`. With a moved reference, R rounds at R beta have the optimum of one
            reference at beta (see `exact_rounds`).
        labels: of a whole run, a multiple of `rounds`.
        rounds: of sample, label and train.
        seeds: independent runs.
        generator: draws the pairs and their labels.
        moved: whether the reference of a round is the policy that the round began with.
        pairs: whether a round trains on the pairs of all rounds so far, or on its own alone.
        label: "bradley_terry" prefers the first with probability sigma(r - r'), "reward" always the
            one with the higher reward; between equal ones either decides by a fair coin.
        learning_rate: of gradient descent on the implicit rewards; or (seeds,), one for each run.
        steps: of it per round, each on all pairs.
    """
    beta, rates = check_beta(beta), _rates(learning_rate, seeds)
    sizes = {"labels": labels, "rounds": rounds, "seeds": seeds, "steps": steps}
    per_round = _check_sizes(**sizes)

    # the probability that the first of two is preferred, (n, n)
    gaps = reward[:, None] - reward
    prefers = torch.sigmoid(gaps) if label == "bradley_terry" else (1 + gaps.sign()) / 2

    log_reference = reference.log().repeat(seeds, 1)
    logps, path, found = log_reference, [log_reference.exp()], []
    for _ in range(rounds):
        # sample and label
        found.append(_label(logps.exp(), prefers, per_round, generator))

        # train
        counts = torch.stack(found).sum(0) if pairs == "all" else found[-1]
        base = logps if moved else log_reference
        logps = _descend(logps, base, counts, beta, steps, rates.to(logps))
        path.append(logps.exp())
    return OnPolicyRuns(torch.stack(path), torch.stack(found))


def tuned_runs(
    reference: Tensor,
    reward: Tensor,
    beta: float,
    *,
    rounds: int,
    learning_rates: Sequence[float] = (0.25, 1.0, 4.0, 16.0),
    seeds: int = 20,
    moved: bool = False,
    **options: Any,
) -> TunedRuns:
    """`on_policy_runs` at its best learning rate, in `seeds` runs that did not choose it.

    The rate with the least mean gap in as many other runs is taken. Rounds with a moved reference
    are at rounds * beta, so that all comparisons are about the optimum of `beta`. Other options are
    those of `on_policy_runs`.
    """
    rates = torch.tensor(floats("learning_rates", learning_rates)).to(reward)
    runs = on_policy_runs(
        *(reference, reward, beta * integer("rounds", rounds) if moved else beta),
        rounds=rounds,
        seeds=2 * integer("seeds", seeds) * len(rates),
        learning_rate=rates.repeat_interleave(2 * seeds),
        moved=moved,
        **options,
    )

    # choose by the first half of the runs of each rate, and show the second
    gaps = value_gap(runs.policies[-1], reference, reward, beta).view(len(rates), 2, seeds)
    best = int(gaps[:, 0].mean(1).argmin())
    shown = slice((2 * best + 1) * seeds, (2 * best + 2) * seeds)
    policies, labels = runs.policies[:, shown], runs.labels[:, shown]
    return TunedRuns(policies, labels, gaps[best, 1], float(rates[best]))


def exact_rounds(
    reference: Tensor, reward: Tensor, beta: float, *, rounds: int, moved: bool = False
) -> Tensor:
    """The policies of `rounds` rounds with infinitely many labels, (rounds + 1, n), by L-BFGS.

    Each round minimizes DPO's loss over all pairs as the current policy draws them. Its minimum is
    where the implicit rewards are the rewards up to a constant, whoever draws the pairs, so with a
    fixed reference every round is at pi_ref exp(r / beta) / Z (Eq. 4). A moved reference takes one
    such step from the last policy: R rounds end at pi_ref exp(R r / beta) / Z, the optimum of
    beta / R.
    """
    beta, path = check_beta(beta), [reference]
    for _ in range(integer("rounds", rounds)):
        weights = pair_weights(path[-1], reward)
        path.append(_minimize_dpo(weights, path[-1] if moved else reference, beta))
    return torch.stack(path)


def self_play_rounds(policy: Tensor, data: Tensor, beta: float, *, rounds: int) -> Tensor:
    """The policies of self-play (SPIN) with infinitely many samples, (rounds + 1, ..., n).

    Each round minimizes DPO's loss where the chosen completions come from `data`, the rejected ones
    from the current policy, which is also the reference. Of completions i and j the first is chosen
    with the odds data_i policy_j / (data_j policy_i), so the minimum has the implicit rewards
    log(data / policy): the new policy is policy (data / policy)^(1 / beta) / Z. With beta = 1 one
    round ends at `data`, with beta above 1/2 the rounds converge to it, and below they diverge.

    Theorem 5.4 of Chen et al. 2024, https://arxiv.org/abs/2401.01335, whose lambda is beta.

    Args:
        policy: (..., n) probabilities, all positive.
        data: (n,) or (..., n) probabilities of the demonstrations, all positive.
        beta: as in `dpo_loss`.
        rounds: of self-play.
    """
    beta, logps = check_beta(beta), policy.log()
    path = [policy]
    for _ in range(integer("rounds", rounds)):
        logps = torch.log_softmax(logps + (data.log() - logps) / beta, -1)
        path.append(logps.exp())
    return torch.stack(path)


def _minimize_dpo(weights: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The policy (n,) that minimizes DPO's loss over `all_pairs` with these weights."""
    chosen, rejected = all_pairs(len(reference))

    def loss(logps: Tensor) -> Tensor:
        return weights @ dpo_loss(logps, reference.log(), chosen, rejected, beta).losses

    return minimize(loss, reference)


def _label(policy: Tensor, prefers: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw `n` pairs of different completions from each policy, label and count them.

    (seeds, n, n): how often the first was preferred to the second.
    """
    seeds, completions = policy.shape
    drawn = (policy[:, :, None] * policy[:, None]) * (1 - torch.eye(completions)).to(policy)
    pairs = torch.multinomial(drawn.flatten(1), n, replacement=True, generator=generator)
    first, second = pairs // completions, pairs % completions

    # who is preferred
    coins = torch.rand(pairs.shape, generator=generator, dtype=policy.dtype)
    won = coins < prefers[first, second]
    ordered = torch.where(won, pairs, second * completions + first)
    counts = policy.new_zeros(seeds, completions**2)
    counts.scatter_add_(1, ordered, torch.ones_like(coins))
    return counts.view(seeds, completions, completions)


def _descend(
    logps: Tensor, base: Tensor, counts: Tensor, beta: float, steps: int, rates: Tensor
) -> Tensor:
    """Log-probs after gradient descent on the mean DPO loss of each row, (seeds, n).

    The reference has the log-probs `base`. The gradient in the implicit rewards u = beta log(pi /
    pi_ref) is written out: each pair pulls its two completions apart with the weight sigma(u_l -
    u_w). The normalizer cancels in every margin.
    """
    fractions = counts / counts.sum((1, 2), keepdim=True)
    rewards = beta * (logps - base)
    for _ in range(steps):
        # (seeds, n, n): chosen, rejected
        pulls = fractions * torch.sigmoid(rewards[:, None] - rewards[:, :, None])
        rewards = rewards + rates * (pulls.sum(2) - pulls.sum(1))
    return torch.log_softmax(base + rewards / beta, -1)


def _rates(learning_rate: float | Tensor, seeds: int) -> Tensor:
    """The learning rate of each run, (seeds, 1), or of all of them, (1, 1)."""
    several = isinstance(learning_rate, Tensor) and learning_rate.ndim
    values = learning_rate if several else [number("learning_rate", learning_rate)]
    found = torch.tensor(floats("learning_rate", values)).reshape(-1, 1)
    if len(found) not in (1, seeds):
        raise ValueError(
            f"learning_rate has {len(found)} values for {seeds} seeds; give one, or one for each"
        )
    return found


def _check_sizes(**sizes: int) -> int:
    """Labels per round. Raises ValueError unless all are positive and the labels divide evenly."""
    for name, value in sizes.items():
        if integer(name, value) < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    labels, rounds = sizes["labels"], sizes["rounds"]
    if labels % rounds:
        raise ValueError(
            f"labels is {labels} with {rounds} rounds; it must be a multiple of the rounds, such "
            f"as {labels // rounds * rounds or rounds}"
        )
    return labels // rounds
