"""Every loss against 50-digit arithmetic, a loop or autograd; wrong arguments against messages."""

import math
from itertools import permutations

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpmath import mpf

from dpo_lab.losses import (
    MARGIN_LOSSES,
    bradley_terry_nll,
    check_beta,
    check_pairs,
    check_rankings,
    clipped_value_loss,
    dpo_loss,
    dpo_loss_from_pairs,
    plackett_luce_loss,
    ppo_clip_loss,
    reward_model_loss,
    unlikelihood_loss,
)

KINDS = [
    ("sigmoid", 0.0),
    ("sigmoid", 0.2),
    ("robust", 0.0),
    ("robust", 0.2),
    ("ipo", 0.0),
    ("hinge", 0.0),
    ("exo_pair", 1e-3),
    ("exo_pair", 0.2),
]
INF, NAN = math.inf, math.nan
every_kind = pytest.mark.parametrize("kind, smoothing", KINDS)
margins_and_betas = given(margin=st.floats(-700, 700), log_beta=st.floats(-3, 3))


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def index(*values):
    return torch.tensor(values, dtype=torch.int64)


def terms(kind, log_ratio, beta, e):
    """The loss as numbers of 50 digits to add up; their sizes say how much rounding is fair."""
    m = mpf(beta) * mpf(log_ratio)
    if kind == "sigmoid":
        return [(1 - mpf(e)) * mpmath.log1p(mpmath.exp(-m)), mpf(e) * mpmath.log1p(mpmath.exp(m))]
    if kind == "robust":
        scale = 1 - 2 * mpf(e)
        return [
            (1 - mpf(e)) * mpmath.log1p(mpmath.exp(-m)) / scale,
            -mpf(e) * mpmath.log1p(mpmath.exp(m)) / scale,
        ]
    if kind == "ipo":
        return [mpf(log_ratio) ** 2, -mpf(log_ratio) / mpf(beta), 1 / (2 * mpf(beta)) ** 2]
    if kind == "exo_pair":
        # a divergence written out: sum of q log (q / p) over the two outcomes
        q, p = (1 / (1 + mpmath.exp(-m)), 1 / (1 + mpmath.exp(m))), (1 - mpf(e), mpf(e))
        return [sign * a * mpmath.log(b) for sign, ps in ((1, q), (-1, p)) for a, b in zip(q, ps)]
    return [mpf(1), -m] if m < 1 else [mpf(1), mpf(-1), m, -m]


def pair_loss(log_ratio, beta, kind, smoothing, dtype=torch.float64):
    policy = torch.tensor([log_ratio, 0.0], dtype=dtype)
    return dpo_loss(
        policy,
        torch.zeros(2, dtype=dtype),
        index(0),
        index(1),
        beta,
        loss_type=kind,
        label_smoothing=smoothing,
    )


def random_completions(n=6, seed=0, dtype=torch.float64):
    """Policy and reference log-probs of n completions, of the size that reviews have."""
    generator = torch.Generator().manual_seed(seed)
    reference = -200 * torch.rand(n, generator=generator, dtype=torch.float64)
    return (reference + 3 * torch.randn(n, generator=generator, dtype=torch.float64)).to(
        dtype
    ), reference.to(dtype)


@every_kind
@settings(deadline=None, max_examples=40)
@margins_and_betas
@example(margin=700.0, log_beta=-3.0)
@example(margin=-700.0, log_beta=-3.0)
@example(margin=700.0, log_beta=3.0)
@example(margin=-700.0, log_beta=3.0)
@example(margin=0.0, log_beta=0.0)
def test_the_loss_agrees_with_50_digits(kind, smoothing, margin, log_beta):
    beta = 10**log_beta
    with mpmath.workdps(50):
        exact = terms(kind, margin / beta, beta, smoothing)
        difference = abs(
            mpf(pair_loss(margin / beta, beta, kind, smoothing).losses.item()) - sum(exact)
        )
        assert difference <= 1e-12 * sum(map(abs, exact))


@every_kind
@pytest.mark.parametrize("margin", [-80.0, -3.0, 0.0, 0.25, 3.0, 80.0])
def test_the_loss_agrees_with_50_digits_in_float32(kind, smoothing, margin):
    with mpmath.workdps(50):
        exact = terms(kind, margin / 0.125, 0.125, smoothing)
        difference = abs(
            mpf(pair_loss(margin / 0.125, 0.125, kind, smoothing, torch.float32).losses.item())
            - sum(exact)
        )
        assert difference <= 1e-6 * sum(map(abs, exact))


@every_kind
@settings(deadline=None, max_examples=40)
@margins_and_betas
@example(margin=700.0, log_beta=0.0)
@example(margin=-700.0, log_beta=0.0)
def test_gradient_weights_are_minus_the_derivative_by_the_margin(kind, smoothing, margin, log_beta):
    beta = 10**log_beta
    policy = doubles(margin / beta, 0.0).requires_grad_()
    result = dpo_loss(
        policy, doubles(0, 0), index(0), index(1), beta, loss_type=kind, label_smoothing=smoothing
    )
    result.losses.sum().backward()
    derivative = policy.grad[0].item() / beta  # d margin / d policy_logps[chosen] = beta
    assert result.gradient_weights.item() == pytest.approx(
        -derivative, rel=1e-9, abs=0 if not smoothing else 1e-14
    )
    assert policy.grad[1] == -policy.grad[0]


@pytest.mark.parametrize("margin", [-700.0, -1.0, 0.0, 1.0, 700.0])
def test_the_gradient_weight_of_dpo_is_sigma_of_minus_the_margin(margin):
    with mpmath.workdps(50):
        exact = 1 / (1 + mpmath.exp(mpf(margin)))
        assert (
            abs(mpf(pair_loss(margin, 1.0, "sigmoid", 0.0).gradient_weights.item()) - exact)
            <= 1e-13 * exact
        )


@every_kind
def test_gradients_with_respect_to_the_policy_pass_gradcheck(kind, smoothing):
    policy, reference = random_completions()
    chosen, rejected = index(0, 0, 1, 3, 5), index(1, 2, 2, 4, 0)

    def losses(policy):
        return dpo_loss(
            policy, reference, chosen, rejected, 0.3, loss_type=kind, label_smoothing=smoothing
        ).losses

    assert torch.autograd.gradcheck(losses, policy.requires_grad_())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_and_one_value_a_pair_are_kept(kind, smoothing, dtype):
    policy, reference = random_completions(dtype=dtype)
    result = dpo_loss(
        policy, reference, index(0, 1), index(2, 3), 0.1, loss_type=kind, label_smoothing=smoothing
    )
    assert [tuple(part.shape) for part in result] == [(2,), (6,), (2,), (2,)]
    assert {part.dtype for part in result} == {dtype}


def test_completions_stacked_chosen_first_give_the_textbook_loss():
    policy, reference = random_completions(8)
    result = dpo_loss(policy, reference, torch.arange(4), torch.arange(4, 8), 0.1)
    policy_chosen, policy_rejected = policy.chunk(2)
    reference_chosen, reference_rejected = reference.chunk(2)
    logits = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
    torch.testing.assert_close(
        result.losses, -torch.log(torch.sigmoid(0.1 * logits)), rtol=1e-10, atol=0
    )
    torch.testing.assert_close(result.rewards[:4], 0.1 * (policy_chosen - reference_chosen))
    torch.testing.assert_close(result.rewards[4:], 0.1 * (policy_rejected - reference_rejected))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.1, 0.33, 2.0])
def test_four_vectors_give_the_index_form_to_the_bit(kind, smoothing, dtype, beta):
    policy, reference = random_completions(10, seed=3, dtype=dtype)
    names = {"loss_type": kind, "label_smoothing": smoothing}
    leaves = [
        policy.clone().requires_grad_(),
        *(x.clone().requires_grad_() for x in policy.chunk(2)),
    ]
    stacked = dpo_loss(leaves[0], reference, torch.arange(5), torch.arange(5, 10), beta, **names)
    four = dpo_loss_from_pairs(leaves[1], leaves[2], *reference.chunk(2), beta, **names)
    for ours, theirs in zip(four, stacked):
        assert torch.equal(ours, theirs) and ours.dtype == dtype
    stacked.losses.sum().backward()
    four.losses.sum().backward()
    assert torch.equal(torch.cat([leaves[1].grad, leaves[2].grad]), leaves[0].grad)
    assert not four.rewards.requires_grad and four.rewards.shape == (10,)


def exponential(margins, beta, label_smoothing):
    """A loss of a user's own, whose derivative is its negative."""
    losses = torch.exp(-margins)
    return losses, losses


def test_a_loss_that_is_added_to_the_table_is_taken_by_its_name(monkeypatch):
    monkeypatch.setitem(MARGIN_LOSSES, "exponential", exponential)
    policy, reference = random_completions()
    policy = (reference + (policy - reference) / 10).requires_grad_()
    chosen, rejected = index(0, 2, 4), index(1, 3, 5)
    found = dpo_loss(policy, reference, chosen, rejected, 0.1, loss_type="exponential")
    assert torch.equal(found.losses, torch.exp(-found.margins))
    assert torch.equal(found.gradient_weights, found.losses)
    gradient = torch.autograd.grad(found.losses.sum(), policy)[0]
    torch.testing.assert_close(gradient[chosen], -0.1 * found.gradient_weights)
    dpo_loss(policy, reference, chosen, rejected, 0.1, loss_type="exponential", label_smoothing=0.1)


def test_a_loss_that_is_not_in_the_table_is_named_with_those_that_are(monkeypatch):
    monkeypatch.setitem(MARGIN_LOSSES, "exponential", exponential)
    for name in ("dpo", None, ["sigmoid"]):
        says(
            GOOD | {"loss_type": name},
            dpo_loss,
            ValueError,
            [f"loss_type is {name!r}", "sigmoid, ipo, hinge, robust, exo_pair, exponential"],
        )


def test_a_ranking_of_k_completions_is_a_loop_over_its_pairs():
    policy, reference = random_completions(5)
    pairs = [(a, b) for a in range(5) for b in range(a + 1, 5)]
    result = dpo_loss(
        policy, reference, index(*(a for a, _ in pairs)), index(*(b for _, b in pairs)), 0.2
    )
    for k, (a, b) in enumerate(pairs):
        margin = 0.2 * ((policy[a] - reference[a]) - (policy[b] - reference[b])).item()
        assert result.margins[k].item() == pytest.approx(margin, rel=1e-12)
        assert result.losses[k].item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-12)


def test_only_the_losses_carry_a_gradient():
    policy, reference = random_completions()
    result = dpo_loss(policy.requires_grad_(), reference, index(0), index(1), 0.1)
    assert [part.requires_grad for part in result] == [True, False, False, False]
    assert torch.equal(result.rewards, 0.1 * (policy - reference).detach())


def test_dpo_is_bradley_terry_on_implicit_rewards():
    policy, reference = random_completions()
    chosen, rejected = index(0, 2, 4), index(1, 3, 5)
    result = dpo_loss(policy, reference, chosen, rejected, 0.1)
    assert torch.equal(result.losses, bradley_terry_nll(result.rewards, chosen, rejected))


@given(margin=st.floats(-30, 30), flipped=st.floats(0, 0.45))
@settings(deadline=None)
def test_the_robust_loss_is_unbiased_under_flipped_labels(margin, flipped):
    def loss(m):
        return pair_loss(m, 1.0, "robust", flipped).losses.item()

    clean = pair_loss(margin, 1.0, "sigmoid", 0.0).losses.item()
    expected = (1 - flipped) * loss(margin) + flipped * loss(-margin)
    assert expected == pytest.approx(
        clean, rel=1e-12, abs=1e-13 * (1 + abs(margin)) / (1 - 2 * flipped)
    )


def test_the_robust_loss_of_one_label_falls_without_end():
    """At -e / (1-2e) per unit of margin, where DPO's and cDPO's are bounded below."""
    first, second = (pair_loss(m, 1.0, "robust", 0.2) for m in (300.0, 700.0))
    slope = (second.losses - first.losses).item() / 400
    assert slope == pytest.approx(-0.2 / 0.6, rel=1e-12)
    assert second.gradient_weights.item() == pytest.approx(0.2 / 0.6, rel=1e-12)
    for smoothing in (0.0, 0.2):
        assert pair_loss(700.0, 1.0, "sigmoid", smoothing).losses.item() >= 0


@pytest.mark.parametrize("beta", [0.125, 0.5, 4.0])
def test_ipo_is_least_where_the_log_ratio_is_one_over_two_beta(beta):
    best = pair_loss(1 / (2 * beta), beta, "ipo", 0.0)
    assert best.margins.item() == 0.5
    assert best.losses.item() == best.gradient_weights.item() == 0
    assert pair_loss(1 / (2 * beta) - 0.1, beta, "ipo", 0.0).gradient_weights.item() > 0
    assert pair_loss(1 / (2 * beta) + 0.1, beta, "ipo", 0.0).gradient_weights.item() < 0


@pytest.mark.parametrize("margin", [-700.0, -1.5, 0.0, 1.5, 700.0])
def test_bradley_terry_agrees_with_50_digits(margin):
    with mpmath.workdps(50):
        exact = mpmath.log1p(mpmath.exp(-mpf(margin)))
        assert (
            abs(mpf(bradley_terry_nll(doubles(0, margin), index(1), index(0)).item()) - exact)
            <= 1e-14 * exact
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plackett_luce_of_two_is_dpo_to_the_bit(dtype):
    policy, reference = random_completions(dtype=dtype)
    chosen, rejected = index(0, 2, 4), index(1, 3, 5)
    leaves = [policy.clone().requires_grad_() for _ in range(2)]
    pairs = dpo_loss(leaves[0], reference, chosen, rejected, 0.3).losses
    found = plackett_luce_loss(leaves[1], reference, torch.stack([chosen, rejected], 1), 0.3)
    assert torch.equal(found, pairs) and found.dtype == dtype
    pairs.sum().backward()
    found.sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_likelihoods_of_all_rankings_sum_to_one(k):
    policy, reference = random_completions(k, seed=k)
    every = index(*permutations(range(k)))
    total = torch.exp(-plackett_luce_loss(policy, reference, every, 0.7)).sum()
    assert total.item() == pytest.approx(1, rel=1e-13)


@given(
    rewards=st.lists(st.floats(-300, 300), min_size=2, max_size=6),
    log_beta=st.floats(-3, 3),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
@example(rewards=[300.0, -300.0, 299.0], log_beta=0.0, seed=0)
@example(rewards=[-300.0, 300.0, 0.0], log_beta=0.0, seed=0)
def test_plackett_luce_is_a_loop_over_places_in_50_digits(rewards, log_beta, seed):
    """The choice at each place is made with probability exp(r) over the sum of those that remain.

    Rewards are rounded to 2^-20, so that their quotient by beta and its product are one rounding.
    """
    beta, n = 2.0 ** round(log_beta), len(rewards)
    policy = doubles(*(round(r * 2**20) / 2**20 / beta for r in rewards))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    found = plackett_luce_loss(policy, torch.zeros_like(policy), order[None], beta).item()
    with mpmath.workdps(50):
        r = [mpf(policy[i].item()) * mpf(beta) for i in order.tolist()]
        exact = mpf(0)
        for k in range(n - 1):
            rest = mpmath.fsum(mpmath.exp(x - r[k]) for x in r[k + 1 :])
            exact += mpmath.log1p(rest)
        # a difference of rewards of up to 600 is rounded to 1e-13
        assert abs(mpf(found) - exact) <= 1e-12 * exact


def test_plackett_luce_passes_gradcheck_and_takes_rankings_that_share_completions():
    policy, reference = random_completions()
    rankings = index((0, 3, 1, 2), (5, 0, 4, 3), (2, 1, 0, 5))

    def losses(policy):
        return plackett_luce_loss(policy, reference, rankings, 0.3)

    assert losses(policy).shape == (3,)
    assert torch.autograd.gradcheck(losses, policy.requires_grad_())
    assert torch.equal(losses(policy), plackett_luce_loss(policy, reference, rankings.int(), 0.3))


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_reward_model_loss_is_the_mean_over_the_pairs_of_a_ranking(k):
    rewards = torch.randn(4, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    losses = reward_model_loss(rewards)
    assert losses.shape == (4,)
    for row, loss in zip(rewards.tolist(), losses.tolist()):
        total = sum(
            math.log1p(math.exp(row[b] - row[a])) for a in range(k) for b in range(a + 1, k)
        )
        assert loss == pytest.approx(total / math.comb(k, 2), rel=1e-13)


def test_the_reward_model_loss_of_two_is_bradley_terry():
    rewards = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = bradley_terry_nll(rewards, index(0, 2, 4), index(1, 3, 5))
    torch.testing.assert_close(reward_model_loss(rewards.view(3, 2)), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reward_model_loss_keeps_the_dtype_and_passes_gradcheck(dtype):
    rewards = torch.randn(2, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert reward_model_loss(rewards).dtype == dtype
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(reward_model_loss, rewards.requires_grad_())


@pytest.mark.parametrize("alpha", [0, 0.25, 1.0])
def test_unlikelihood_raises_the_chosen_and_lowers_the_rejected(alpha):
    policy, _ = random_completions()
    losses = unlikelihood_loss(policy.requires_grad_(), index(0, 3), index(1, 1), alpha)
    assert losses.tolist() == [-policy[0] + alpha * policy[1], -policy[3] + alpha * policy[1]]
    losses.sum().backward()
    assert policy.grad.tolist() == [-1, 2 * alpha, 0, -1, 0, 0]


def test_unlikelihood_weighs_the_rejected_by_one_unless_told():
    assert unlikelihood_loss(doubles(-2, -5), index(0), index(1)).tolist() == [-3]


GOOD = {
    "policy_logps": doubles(-1, -2, -3),
    "reference_logps": doubles(-1, -2, -3),
    "chosen": index(0, 1),
    "rejected": index(1, 2),
    "beta": 0.1,
}
BAD = [  # what is changed in GOOD, the error, words that its message must hold
    ({"chosen": index(0, 3)}, ValueError, ["chosen[1] is 3", "3 completions", "0..2"]),
    ({"rejected": index(-1, 2)}, ValueError, ["rejected[0] is -1", "0..2"]),
    ({"rejected": index(1, 1)}, ValueError, ["pair 1", "completion 1", "chosen and as rejected"]),
    ({"chosen": doubles(0, 1)}, TypeError, ["chosen is torch.float64", "integer"]),
    ({"rejected": torch.tensor([True, False])}, TypeError, ["rejected is torch.bool", "integer"]),
    # torch reads it as a mask
    ({"chosen": index(0, 1).to(torch.uint8)}, TypeError, ["chosen is torch.uint8", "integer"]),
    # torch cannot index with it
    ({"chosen": index(0, 1).to(torch.int16)}, TypeError, ["chosen is torch.int16", "integer"]),
    (
        {"chosen": index(0, 1).to(torch.complex64)},
        TypeError,
        ["chosen is torch.complex64", "integer"],
    ),
    ({"chosen": [0, 1]}, TypeError, ["chosen is list", "tensor of integer indices"]),
    ({"chosen": index(0, 1)[None]}, ValueError, ["chosen has shape (1, 2)", "(P,)"]),
    ({"chosen": index(0)}, ValueError, ["chosen has 1", "rejected 2"]),
    (
        {"reference_logps": doubles(-1, -2)},
        ValueError,
        ["policy_logps has shape (3,)", "reference_logps (2,)"],
    ),
    (
        {"policy_logps": doubles(-1, -2, -3)[None]},
        ValueError,
        ["policy_logps has shape (1, 3)", "(N,)"],
    ),
    (
        {"reference_logps": index(-1, -2, -3)},
        TypeError,
        ["reference_logps", "torch.int64", "floating-point"],
    ),
    ({"policy_logps": [-1.0, -2.0, -3.0]}, TypeError, ["policy_logps", "list", "floating-point"]),
    (
        {"policy_logps": doubles(-1, -2, NAN)},
        ValueError,
        ["policy_logps[2]", "rejected of pair 1", "nan", "finite"],
    ),
    (
        {"policy_logps": doubles(-1, INF, -3)},
        ValueError,
        ["policy_logps[1]", "chosen of pair 1", "rejected of pair 0", "inf"],
    ),
    (
        {"reference_logps": doubles(-INF, -2, -3)},
        ValueError,
        ["reference_logps[0]", "chosen of pair 0", "-inf"],
    ),
    (
        {"policy_logps": doubles(-1, -2, -3, NAN), "reference_logps": doubles(-1, -2, -3, -4)},
        ValueError,
        ["policy_logps[3]", "in no pair", "nan"],
    ),
    *(
        ({"beta": beta}, ValueError, [f"beta is {beta!r}", "positive, finite"])
        for beta in (0, -1, INF, NAN, True, "0.1")
    ),
    *(
        ({"label_smoothing": e}, ValueError, [f"label_smoothing is {e!r}", "[0, 0.5)"])
        for e in (0.5, -0.1, NAN, "0.1")
    ),
    *(
        (
            {"label_smoothing": 0.1, "loss_type": kind},
            ValueError,
            ["label_smoothing is 0.1", f"loss_type='{kind}'", "sigmoid, robust and exo_pair"],
        )
        for kind in ("ipo", "hinge")
    ),
    ({"loss_type": "dpo"}, ValueError, ["loss_type is 'dpo'", "sigmoid, ipo, hinge, robust"]),
]


def says(arguments, call, error, words):
    with pytest.raises(error) as caught:
        call(**arguments)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("change, error, words", BAD, ids=[" ".join(words) for _, _, words in BAD])
def test_dpo_loss_names_the_wrong_argument(change, error, words):
    says(GOOD | change, dpo_loss, error, words)


FOUR = {
    "policy_chosen": doubles(-1, -2),
    "policy_rejected": doubles(-3, -4),
    "reference_chosen": doubles(-1, -2),
    "reference_rejected": doubles(-3, -4),
    "beta": 0.1,
}


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"policy_chosen": [-1.0, -2.0]}, TypeError, ["policy_chosen", "list", "(P,)"]),
        ({"reference_rejected": index(1, 2)}, TypeError, ["reference_rejected", "torch.int64"]),
        (
            {"policy_rejected": doubles(-1, -2)[None]},
            ValueError,
            ["policy_rejected has shape (1, 2)", "(P,), one value per pair"],
        ),
        (
            {"reference_chosen": doubles(-1)},
            ValueError,
            ["policy_chosen (2,)", "reference_chosen (1,)", "one value per pair"],
        ),
        (
            {"reference_chosen": doubles(-1, NAN)},
            ValueError,
            ["reference_chosen[1] is nan", "finite"],
        ),
        ({"policy_rejected": doubles(-INF, -1)}, ValueError, ["policy_rejected[0] is -inf"]),
        ({"beta": 0}, ValueError, ["beta is 0", "positive, finite"]),
        ({"loss_type": "dpo"}, ValueError, ["loss_type is 'dpo'", "sigmoid, ipo, hinge, robust"]),
        ({"label_smoothing": 0.5}, ValueError, ["label_smoothing is 0.5", "[0, 0.5)"]),
    ],
)
def test_the_four_vector_form_names_its_own_arguments(change, error, words):
    says(FOUR | change, dpo_loss_from_pairs, error, words)


def test_indices_of_32_bits_are_as_good_as_those_of_64():
    small = GOOD | {"chosen": GOOD["chosen"].int(), "rejected": GOOD["rejected"].int()}
    assert torch.equal(dpo_loss(**small).losses, dpo_loss(**GOOD).losses)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"rewards": doubles(1, NAN)}, ValueError, ["rewards[1]", "rejected of pair 0", "nan"]),
        ({"rewards": index(1, 2)}, TypeError, ["rewards", "torch.int64", "floating-point"]),
        ({"rewards": doubles(1, 2)[None]}, ValueError, ["rewards has shape (1, 2)", "(N,)"]),
        ({"rejected": index(2)}, ValueError, ["rejected[0] is 2", "0..1"]),
    ],
)
def test_bradley_terry_names_the_wrong_argument(change, error, words):
    says(
        {"rewards": doubles(1, 0), "chosen": index(0), "rejected": index(1)} | change,
        bradley_terry_nll,
        error,
        words,
    )


@pytest.mark.parametrize(
    "rewards, error, words",
    [
        (doubles(1, 2), ValueError, ["ranked_rewards has shape (2,)", "(B, K)", "K >= 2"]),
        (doubles(1, 2)[:, None], ValueError, ["ranked_rewards has shape (2, 1)", "K >= 2"]),
        (
            torch.tensor([[2.0, 1.0], [NAN, 1.0]]),
            ValueError,
            ["ranked_rewards[1]", "nan", "finite"],
        ),
        (torch.tensor([[2.0, -INF]]), ValueError, ["ranked_rewards[0]", "-inf", "finite"]),
        (index(2, 1)[None], TypeError, ["ranked_rewards", "torch.int64", "floating-point"]),
        ([[2.0, 1.0]], TypeError, ["ranked_rewards", "list", "floating-point"]),
    ],
)
def test_the_reward_model_loss_names_what_is_wrong(rewards, error, words):
    says({"ranked_rewards": rewards}, reward_model_loss, error, words)


RANKED = {
    "policy_logps": doubles(-1, -2, -3),
    "reference_logps": doubles(-1, -2, -3),
    "rankings": index((0, 1), (2, 0)),
    "beta": 0.1,
}


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"rankings": [[0, 1]]}, TypeError, ["rankings is list", "tensor of integer indices"]),
        ({"rankings": doubles(0, 1)[None]}, TypeError, ["rankings is torch.float64"]),
        ({"rankings": index(0, 1)}, ValueError, ["rankings has shape (2,)", "(R, K)", "K >= 2"]),
        ({"rankings": index(0)[None]}, ValueError, ["rankings has shape (1, 1)", "K >= 2"]),
        ({"rankings": index((0, 1), (2, 3))}, ValueError, ["rankings[1, 1] is 3", "0..2"]),
        ({"rankings": index((0, -1))}, ValueError, ["rankings[0, 1] is -1", "0..2"]),
        (
            {"rankings": index((0, 1, 2), (2, 0, 2))},
            ValueError,
            ["ranking 1 is [2, 0, 2]", "completion 2 twice"],
        ),
        (
            {"policy_logps": doubles(NAN, -2, -3)},
            ValueError,
            ["policy_logps[0]", "place 0 of ranking 0", "place 1 of ranking 1", "nan"],
        ),
        (
            {"reference_logps": doubles(-1, -2, INF), "rankings": index((0, 1))},
            ValueError,
            ["reference_logps[2]", "in no ranking", "inf"],
        ),
        ({"reference_logps": doubles(-1)}, ValueError, ["policy_logps has shape (3,)", "(1,)"]),
        ({"beta": 0}, ValueError, ["beta is 0", "positive, finite"]),
    ],
)
def test_plackett_luce_names_the_wrong_argument(change, error, words):
    says(RANKED | change, plackett_luce_loss, error, words)


@pytest.mark.parametrize(
    "change, error, words",
    [
        *(
            ({"alpha": alpha}, ValueError, [f"alpha is {alpha!r}", "[0, 1]"])
            for alpha in (-0.1, 1.1, NAN, "1")
        ),
        (
            {"policy_logps": doubles(-INF, -1)},
            ValueError,
            ["policy_logps[0]", "chosen of pair 0", "-inf"],
        ),
        ({"chosen": index(1)}, ValueError, ["pair 0", "completion 1"]),
    ],
)
def test_unlikelihood_names_the_wrong_argument(change, error, words):
    says(
        {"policy_logps": doubles(-1, -2), "chosen": index(0), "rejected": index(1)} | change,
        unlikelihood_loss,
        error,
        words,
    )


def test_the_checks_are_silent_on_good_arguments():
    check_beta(1)
    check_beta(1e-300)
    check_pairs(index(), index(), 0)
    check_pairs(index(0, 2), index(1, 0), 3)
    check_rankings(torch.empty(0, 2, dtype=torch.int64), 0)
    check_rankings(index((0, 1, 2), (2, 0, 1)), 3)


@given(st.floats(-3, 0), st.floats(-3, 0), st.floats(-5, 5), st.floats(0.01, 0.9))
def test_ppo_s_loss_is_the_worse_of_the_plain_and_the_clipped_gain(logp, old, advantage, clip):
    ratio = math.exp(logp - old)
    clipped = 1 + clip if ratio > 1 + clip else 1 - clip if ratio < 1 - clip else ratio
    found = ppo_clip_loss(
        *(torch.tensor([x], dtype=torch.float64) for x in (logp, old, advantage)), clip
    )
    assert float(found) == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-12)


@pytest.mark.parametrize(
    "ratio, advantage, moves", [(1.3, 1, False), (1.3, -1, True), (0.7, 1, True), (0.7, -1, False)]
)
def test_ppo_has_no_gradient_where_the_clip_holds_an_action_back(ratio, advantage, moves):
    logps = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    ppo_clip_loss(
        logps, torch.zeros(1, dtype=torch.float64), torch.tensor([float(advantage)]), 0.2
    ).sum().backward()
    assert (logps.grad.item() != 0) == moves


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.floats(0.01, 1))
def test_the_value_loss_is_the_larger_of_two_squares(value, old, target, clip):
    near = old + clip if value > old + clip else old - clip if value < old - clip else value
    found = clipped_value_loss(
        *(torch.tensor([x], dtype=torch.float64) for x in (value, old, target)), clip
    )
    assert float(found) == pytest.approx(
        max((value - target) ** 2, (near - target) ** 2) / 2, abs=1e-12
    )


@pytest.mark.parametrize("loss", [ppo_clip_loss, clipped_value_loss])
def test_ppo_s_losses_name_a_bad_clip_and_shapes_that_differ(loss):
    ones = torch.ones(3)
    for clip in (0, -0.1, INF, NAN, "wide"):
        with pytest.raises(ValueError, match="clip is .* positive, finite"):
            loss(ones, ones, ones, clip)
    with pytest.raises(ValueError, match=r"shapes are .*\(3,\).*\(2,\).* must be the same"):
        loss(ones, ones, torch.ones(2))
