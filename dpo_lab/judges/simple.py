"""Judges that cost nothing: a true reward, a learned reward, and a judge with planted biases."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from dpo_lab.engine.arguments import floats, integer, number
from dpo_lab.judges.verdicts import Judge, Verdicts

Reward = Callable[[Sequence[str]], Sequence[float]]
"""Gives the rewards (N,) of N texts, prompt and answer together"""

# tokens of a text: as many as there are, since the model's own check names one that is too long
NO_LIMIT = 2**40


def reward_judge(reward: Reward, *, tie_within: float = 0.0) -> Judge:
    """A judge for whom the answer with the higher reward wins. It states no confidence.

    Args:
        reward: called with N texts, each a prompt and directly behind it an answer; gives N
            numbers. `SentimentReward` is one.
        tie_within: rewards that differ by no more than this are a tie.

    Raises:
        ValueError, TypeError: `tie_within` is negative or no number; when asked: the reward does
            not give one finite number per text.
    """
    tie_within = _checked_tie(tie_within)

    def judge(prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Verdicts:
        gaps = _reward_gaps(reward, prompts, a, b)
        return Verdicts(np.where(np.abs(gaps) <= tie_within, 0, np.sign(gaps)))

    return judge


def learned_reward_judge(
    reward: Callable[..., np.ndarray], tokenizer: object, *, tie_within: float = 0.0
) -> Judge:
    """A judge that asks a reward model, such as `rlhf.LearnedReward`.

    Its confidence is sigma(r_A - r_B), as Bradley-Terry has it (Eq. 1 of Rafailov et al. 2023). The
    model reads each answer as a completion that ended, with EOS behind it.

    Args:
        reward: called with prompts and completions as token ids, N each; gives N rewards in nats.
        tokenizer: the reward model's.
        tie_within: rewards that differ by no more than this are a tie.

    Raises:
        ValueError, TypeError: as `reward_judge`.
    """
    tie_within = _checked_tie(tie_within)

    def judge(prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Verdicts:
        ids, completions = token_pairs(tokenizer, [*prompts, *prompts], [*a, *b])
        rewards = _checked_rewards(reward(ids, completions), len(ids))
        gaps = rewards[: len(a)] - rewards[len(a) :]
        winner = np.where(np.abs(gaps) <= tie_within, 0, np.sign(gaps))
        return Verdicts(winner, sigmoid(gaps))

    return judge


def biased_judge(
    truth: Reward,
    *,
    accuracy: float = 0.8,
    position_bias: float = 0.0,
    length_bias: float = 0.0,
    seed: int = 0,
) -> Judge:
    """A noisy judge whose biases are known, to check measurements of bias against.

    It says A with probability

        1/2 + (accuracy - 1/2) s + position_bias + length_bias d

    where s is the sign of truth(A) - truth(B), and d is the sign of len(A) - len(B), in characters.
    So, at equal lengths and over both orders, the better answer wins with probability `accuracy`;
    the answer that is shown first wins in a fraction 1/2 + `position_bias` of all verdicts; and
    the longer of two equally good answers wins with probability 1/2 + `length_bias` over both
    orders. `judge_biases` estimates these three numbers.

    A verdict depends on the seed and the three texts alone: the same pair gets the same verdict
    again, in any batch. The other order of a pair is another draw.

    Args:
        truth: the true reward, called with N texts, prompt and answer together; gives N numbers.
        accuracy: in [0, 1].
        position_bias: in [-1/2, 1/2]; positive where the first answer is favored.
        length_bias: in [-1/2, 1/2]; positive where the longer answer is favored.
        seed: of the noise.

    Raises:
        ValueError, TypeError: the probability would leave [0, 1] for some pair, that is
            the distances of accuracy from 1/2 and of both biases from 0 exceed 1/2 together.
    """
    accuracy, position_bias = number("accuracy", accuracy), number("position_bias", position_bias)
    length_bias, seed = number("length_bias", length_bias), integer("seed", seed)
    reach = abs(accuracy - 0.5) + abs(position_bias) + abs(length_bias)
    if not reach <= 0.5 + 1e-12:
        raise ValueError(
            f"|accuracy - 1/2| + |position_bias| + |length_bias| is {reach:.3g} for accuracy "
            f"{accuracy:g}, position_bias {position_bias:g} and length_bias {length_bias:g}; it "
            "must be at most 1/2, since a judge that is nearly always right has no room for a bias"
        )

    def judge(prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Verdicts:
        better = np.sign(_reward_gaps(truth, prompts, a, b))
        longer = np.sign([len(one) - len(other) for one, other in zip(a, b)])
        p = 0.5 + (accuracy - 0.5) * better + position_bias + length_bias * longer
        noise = [content_uniform(seed, *texts) for texts in zip(prompts, a, b)]
        return Verdicts(np.where(np.array(noise) < p, 1, -1))

    return judge


def content_uniform(seed: int, *texts: str) -> float:
    """A number in [0, 1) that depends on the seed and the texts alone."""
    parts = [text.encode("utf-8", "surrogatepass") for text in (str(seed), *texts)]
    told = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    drawn = int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big")
    return (drawn >> 11) / 2**53


def token_pairs(
    tokenizer: object, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of N prompts and of the answer to each, as preferences have them: BOS before a
    prompt where the tokenizer adds it, EOS behind an answer."""
    from dpo_lab.engine.tokenizing import TokenCollector  # loads transformers

    collector = TokenCollector(tokenizer, NO_LIMIT, None)
    pairs = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        p = collector.prompt(prompt, where=f"prompt {i}")
        pairs.append((p, collector.completion(p, answer, where=f"answer {i}")))

    asked, said = list(collector.prompts), [ids for _, ids in collector.completions]
    return [list(asked[p]) for p, _ in pairs], [list(said[c]) for _, c in pairs]


def _reward_gaps(
    reward: Reward, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]
) -> np.ndarray:
    """(P,) reward of A minus reward of B."""
    texts = [prompt + answer for some in (a, b) for prompt, answer in zip(prompts, some)]
    rewards = _checked_rewards(reward(texts), len(texts))
    return rewards[: len(a)] - rewards[len(a) :]


def _checked_rewards(found: object, n: int) -> np.ndarray:
    """Rewards (N,) in float64, one finite number per text."""
    rewards = floats("reward", found)
    if rewards.shape != (n,) or not np.isfinite(rewards).all():
        raise ValueError(
            f"the reward gave {rewards.size} values of shape {rewards.shape}, "
            f"{np.count_nonzero(~np.isfinite(rewards))} of them not finite, for {n} texts; it must "
            "give one finite number each"
        )
    return rewards


def _checked_tie(tie_within: float) -> float:
    tie_within = number("tie_within", tie_within)
    if not 0 <= tie_within < np.inf:
        raise ValueError(f"tie_within is {tie_within}; it must be a distance of rewards, 0 or more")
    return tie_within


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0, -x))
