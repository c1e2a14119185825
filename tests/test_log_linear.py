"""With shared parameters and few labels per pair, DPO is a logistic regression."""

import math

import pytest
import torch

from dpo_lab.losses import MARGIN_LOSSES
from dpo_lab.theory.log_linear import (
    draw_prompts,
    label_pairs,
    labeled_loss,
    log_linear_descent,
    log_linear_policy,
)
from dpo_lab.theory.objective import kl, optimal_policy


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


TRUTH = torch.randn(2, 3, generator=seeded(1), dtype=torch.float64)
PROMPTS = draw_prompts(TRUTH, 5, 4, seeded())
THETA = torch.randn(2, 3, generator=seeded(2), dtype=torch.float64)


def differences(prompts):
    """phi(first) - phi(second) by a plain loop, as nested lists [S][P] of (d,)."""
    runs, count = prompts.first.shape
    return [
        [
            prompts.features[s, p, prompts.first[s, p]]
            - prompts.features[s, p, prompts.second[s, p]]
            for p in range(count)
        ]
        for s in range(runs)
    ]


def test_prompts_are_what_they_are_said_to_be():
    assert PROMPTS.features.shape == (2, 5, 4, 3)
    assert PROMPTS.features.dtype == PROMPTS.reference.dtype == torch.float64
    torch.testing.assert_close(PROMPTS.reference.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    for s in range(2):
        for p in range(5):
            for y in range(4):
                by_hand = sum(TRUTH[s, j] * PROMPTS.features[s, p, y, j] for j in range(3))
                assert math.isclose(PROMPTS.reward[s, p, y], by_hand, abs_tol=1e-14)


def test_completions_of_a_pair_differ_and_come_from_the_reference():
    prompts = draw_prompts(TRUTH[:1], 20_000, 3, seeded())
    assert (prompts.first != prompts.second).all()
    for y in range(3):
        drawn = (prompts.first == y).double().mean()
        assert abs(drawn - prompts.reference[..., y].mean()) < 4 * 0.5 / 20_000**0.5
        # q is drawn second with probability p q / (1 - p), summed over the first ones p
        q, others = prompts.reference[..., y], [i for i in range(3) if i != y]
        second = sum(
            prompts.reference[..., i] * q / (1 - prompts.reference[..., i]) for i in others
        )
        assert abs((prompts.second == y).double().mean() - second.mean()) < 0.015


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_the_optimal_policy_is_log_linear_in_the_truth_over_beta(beta):
    expected = optimal_policy(PROMPTS.reference, PROMPTS.reward, beta).log()
    torch.testing.assert_close(log_linear_policy(TRUTH / beta, PROMPTS), expected)


def test_labels_follow_bradley_terry():
    prompts = draw_prompts(TRUTH[:1], 4_000, 4, seeded())
    exact = label_pairs(prompts, None, seeded())
    for p in range(50):
        first, second = prompts.first[0, p], prompts.second[0, p]
        gap = prompts.reward[0, p, first] - prompts.reward[0, p, second]
        assert math.isclose(exact[0, p], 1 / (1 + math.exp(-gap)))
    for labels in (1, 4):
        found = label_pairs(prompts, labels, seeded())
        assert set((found * labels).unique().tolist()) == set(range(labels + 1))
        # in bins of what is expected, so that a label that ignores its pair would be seen
        for low in (0.0, 0.25, 0.5, 0.75):
            inside = (exact >= low) & (exact < low + 0.25)
            error = (exact * (1 - exact))[inside].mean().div(labels * inside.sum()).sqrt()
            assert abs((found - exact)[inside].mean()) < 4 * error


@pytest.mark.parametrize("kind", list(MARGIN_LOSSES))
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_loss_is_that_of_the_margins_in_both_orders(kind, beta):
    """The normalizer of every prompt cancels: the margin is beta theta . (phi - phi')."""
    e = 0.0 if kind in ("ipo", "hinge") else 0.1
    wins = torch.rand(2, 5, generator=seeded(3), dtype=torch.float64)
    logps = log_linear_policy(THETA, PROMPTS)
    losses, margins = labeled_loss(logps, PROMPTS, wins, beta, loss_type=kind, label_smoothing=e)
    for s, row in enumerate(differences(PROMPTS)):
        for p, difference in enumerate(row):
            margin, w = beta * THETA[s] @ difference, wins[s, p]
            ahead, behind = (MARGIN_LOSSES[kind](m, beta, e)[0] for m in (margin, -margin))
            torch.testing.assert_close(losses[s, p], w * ahead + (1 - w) * behind)
            torch.testing.assert_close(margins[s, p], margin if w > 0.5 else -margin)


def test_descent_is_that_of_a_logistic_regression_in_every_run():
    """Two steps by hand: the gradient is the mean of beta (sigma(m) - w) (phi - phi')."""
    beta, wins = 0.7, label_pairs(PROMPTS, 1, seeded())

    def loss(logps):
        return labeled_loss(logps, PROMPTS, wins, beta)[0]

    path = log_linear_descent(loss, PROMPTS, steps=2, learning_rate=0.3)
    assert path.shape == (3, 2, 3) and not path[0].any() and not path.requires_grad
    theta = torch.zeros(2, 3, dtype=torch.float64)
    for step in (1, 2):
        for s, row in enumerate(differences(PROMPTS)):
            slopes = [
                beta * (torch.sigmoid(beta * theta[s] @ d) - wins[s, p]) * d
                for p, d in enumerate(row)
            ]
            theta[s] = theta[s] - 0.3 * sum(slopes) / 5
        torch.testing.assert_close(path[step], theta)


def test_beta_changes_the_step_and_not_what_is_learned():
    """Rewards beta theta take one path where beta^2 times the learning rate is the same."""
    wins = label_pairs(PROMPTS, 1, seeded())
    paths = [
        beta
        * log_linear_descent(
            lambda logps: labeled_loss(logps, PROMPTS, wins, beta)[0],  # noqa: B023
            PROMPTS,
            steps=20,
            learning_rate=0.4 / beta**2,
        )
        for beta in (0.5, 2.0)
    ]
    torch.testing.assert_close(*paths)


def ends(wins, prompts, steps=400, **options):
    return log_linear_descent(
        lambda logps: labeled_loss(logps, prompts, wins, 0.5, **options)[0],
        prompts,
        steps=steps,
        learning_rate=2.0,
    )


def test_labels_without_end_lead_to_the_optimum_and_one_per_pair_does_not():
    truth = torch.randn(3, 6, generator=seeded(), dtype=torch.float64) / 2
    prompts, held_out = (draw_prompts(truth, 12, 4, seeded(seed)) for seed in (1, 2))
    best = log_linear_policy(truth / 0.5, held_out).exp()
    gaps = {
        labels: kl(log_linear_policy(path[-1], held_out).exp(), best).mean()
        for labels in (1, None)
        for path in [ends(label_pairs(prompts, labels, seeded()), prompts, steps=500)]
    }
    assert gaps[None] < 5e-3 and gaps[1] > 0.1


def test_one_label_per_pair_has_no_optimum_for_dpo_and_robust():
    """With more parameters than pairs each pair's margin goes where one pair's alone would."""
    truth = torch.randn(2, 30, generator=seeded(), dtype=torch.float64) / 5
    prompts = draw_prompts(truth, 8, 4, seeded(1))
    wins = label_pairs(prompts, 1, seeded())

    def margins(step, path, **options):
        return labeled_loss(log_linear_policy(path[step], prompts), prompts, wins, 0.5, **options)

    dpo = ends(wins, prompts)
    assert (margins(400, dpo)[1] > margins(200, dpo)[1] + 0.5).all()

    # cDPO stops at log((1 - e) / e), IPO at one half
    cdpo = ends(wins, prompts, label_smoothing=0.1)
    expected = torch.full((2, 8), math.log(9), dtype=torch.float64)
    torch.testing.assert_close(margins(400, cdpo)[1], expected, rtol=0, atol=1e-3)
    ipo = log_linear_descent(
        lambda logps: labeled_loss(logps, prompts, wins, 0.5, loss_type="ipo")[0],
        prompts,
        steps=400,
        learning_rate=0.05,
    )
    torch.testing.assert_close(
        margins(400, ipo)[1], torch.full_like(expected, 0.5), rtol=0, atol=1e-3
    )

    # robust falls without end, by as much in the second half as in the first
    options = {"loss_type": "robust", "label_smoothing": 0.1}
    robust = ends(wins, prompts, **options)
    halfway, end = (margins(step, robust, **options)[0].mean() for step in (200, 400))
    assert end < -1 and math.isclose(end - halfway, halfway, rel_tol=0.15)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: draw_prompts(TRUTH, 0, 4, seeded()), "prompts is 0; it must be 1 or more"),
        (lambda: draw_prompts(TRUTH, 5, 1, seeded()), "completions is 1; it must be 2 or more"),
        (lambda: label_pairs(PROMPTS, 0, seeded()), "labels is 0; it must be 1 or more"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()
