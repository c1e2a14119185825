"""DPO's relatives against 50-digit loops, finite differences, each other, and in training."""

import json
import math
from dataclasses import replace
from functools import partial

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf
from test_train import CONFIG, make_preferences, same, state, timeless

from dpo_lab.losses import dpo_loss
from dpo_lab.models import load_model
from dpo_lab.own_loss import loss_record
from dpo_lab.train import train_dpo
from dpo_lab.variants.relatives import (
    AOT,
    CPO,
    ORPO,
    SimPO,
    aot_loss,
    cpo_loss,
    kto_loss,
    kto_reference_point,
    orpo_loss,
    simpo_loss,
)
from dpo_lab.widgets.states import on_curve

CHOSEN, REJECTED = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 4, 5, 4])
LENGTHS = torch.tensor([5, 16, 7, 3, 40, 9])
DESIRABLE = torch.tensor([True, False, True, True, False, False])


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def sampled(seed=0, n=6):
    """Policy and reference log-probs of completions with the lengths above."""
    generator = torch.Generator().manual_seed(seed)
    per_token = 0.2 + 4 * torch.rand(n, generator=generator, dtype=torch.float64)
    reference = -per_token * LENGTHS
    noise = 2 * torch.randn(n, generator=generator, dtype=torch.float64)
    return torch.minimum(reference + noise, torch.tensor(-0.01)), reference


# against the papers' formulas, pair by pair, in 50 digits


def nll_of_sigmoid(x):
    return mpmath.log1p(mpmath.exp(-x))


def simpo_by_loop(policy, reference, beta, knob):
    for w, r in zip(CHOSEN.tolist(), REJECTED.tolist()):
        average = [policy[i] / int(LENGTHS[i]) for i in (w, r)]
        yield nll_of_sigmoid(beta * average[0] - beta * average[1] - knob)


def orpo_by_loop(policy, reference, beta, knob):
    for w, r in zip(CHOSEN.tolist(), REJECTED.tolist()):
        p = [mpmath.exp(policy[i] / int(LENGTHS[i])) for i in (w, r)]
        odds = [one / (1 - one) for one in p]
        yield -mpmath.log(p[0]) + knob * nll_of_sigmoid(mpmath.log(odds[0] / odds[1]))


def cpo_by_loop(policy, reference, beta, knob):
    for w, r in zip(CHOSEN.tolist(), REJECTED.tolist()):
        yield nll_of_sigmoid(beta * policy[w] - beta * policy[r]) - knob * policy[w]


def aot_by_loop(policy, reference, beta, knob):
    pairs = list(zip(CHOSEN.tolist(), REJECTED.tolist()))
    of_policy = sorted(policy[w] - policy[r] for w, r in pairs)
    of_reference = sorted(reference[w] - reference[r] for w, r in pairs)
    for mine, its in zip(of_policy, of_reference):
        yield nll_of_sigmoid(beta * (mine - its))


def kto_by_loop(policy, reference, beta, knob):
    for i, good in enumerate(DESIRABLE.tolist()):
        reward, z0 = policy[i] - reference[i], mpf("0.7")
        value = 1 / (1 + mpmath.exp(-beta * (reward - z0 if good else z0 - reward)))
        weight = knob if good else 2 * knob
        yield weight - weight * value


def of(kind, policy, reference, beta, knob):
    """The loss of this package."""
    pairs = (CHOSEN, REJECTED)
    return {
        "simpo": lambda: simpo_loss(policy, LENGTHS, *pairs, beta, knob),
        "orpo": lambda: orpo_loss(policy, LENGTHS, *pairs, knob),
        "cpo": lambda: cpo_loss(policy, LENGTHS, *pairs, beta, alpha=knob, nll="sum"),
        "aot": lambda: aot_loss(policy, reference, *pairs, beta),
        "kto": lambda: kto_loss(
            *(policy, reference, DESIRABLE, 0.7, beta),
            desirable_weight=knob,
            undesirable_weight=2 * knob,
        ),
    }[kind]()


BY_LOOP = {
    "simpo": simpo_by_loop,
    "orpo": orpo_by_loop,
    "cpo": cpo_by_loop,
    "aot": aot_by_loop,
    "kto": kto_by_loop,
}
KINDS = list(BY_LOOP)
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@settings(deadline=None, max_examples=25)
@given(
    per_token=st.lists(st.floats(-8, -0.01), min_size=6, max_size=6),
    shifts=st.lists(st.floats(-30, 30), min_size=6, max_size=6),
    beta=st.floats(0.01, 10),
    knob=st.floats(0.1, 3),
)
def test_a_loss_is_its_paper_s_formula_in_50_digits(kind, per_token, shifts, beta, knob):
    policy = doubles(per_token) * LENGTHS
    reference = policy + doubles(shifts)
    found = of(kind, policy, reference, beta, knob).losses
    with mpmath.workdps(50):
        exact = BY_LOOP[kind](
            *([mpf(x) for x in side.tolist()] for side in (policy, reference)),
            mpf(beta),
            mpf(knob),
        )
        exact = [float(one) for one in exact]
    if kind == "aot":
        # ours stand in the order of the pairs
        found, exact = found.sort().values, sorted(exact)
    assert found.tolist() == pytest.approx(exact, rel=1e-10, abs=1e-12)


@every_kind
def test_the_gradient_is_that_of_finite_differences(kind):
    policy, reference = sampled()
    policy = policy.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logps: of(kind, logps, reference, 0.4, 0.6).losses, policy, atol=1e-7
    )
    found = of(kind, policy, reference, 0.4, 0.6)
    assert [part.requires_grad for part in found] == [True] + [False] * (len(found) - 1)
    assert all(part.dtype == torch.float64 for part in found)
    single = of(kind, policy.detach().float(), reference.float(), 0.4, 0.6)
    assert all(part.dtype == torch.float32 for part in single)


@every_kind
def test_the_gradient_weight_is_the_slope_in_the_reward(kind):
    policy, reference = sampled(1)
    beta, knob, step = 0.4, 0.6, 1e-6
    weights = of(kind, policy, reference, beta, knob).gradient_weights
    per_reward = {"simpo": beta / LENGTHS, "kto": torch.full((6,), beta)}.get(kind)
    for i in range(len(weights)):
        # move one completion that no other pair has
        row = int(REJECTED[i]) if kind != "kto" else i
        if kind != "kto" and (REJECTED == row).sum() > 1:
            continue
        moved = policy.clone()
        moved[row] += step
        after, before = (of(kind, p, reference, beta, knob) for p in (moved, policy))
        scale = step * (beta if per_reward is None else float(per_reward[row]))
        if kind == "orpo":
            scale = float(after.rewards[row] - before.rewards[row])
        sign = -1 if kind == "kto" and DESIRABLE[row] else 1
        slope = float(after.losses[i] - before.losses[i]) / scale
        assert slope == pytest.approx(sign * float(weights[i]), rel=1e-4, abs=1e-8)


# limits that connect them


def test_simpo_of_equal_lengths_without_a_target_is_dpo_with_a_uniform_reference():
    policy, _ = sampled()
    pairs, lengths = (CHOSEN, REJECTED), torch.full((6,), 8)
    found = simpo_loss(policy, lengths, *pairs, 2.0, 0.0)
    expected = dpo_loss(policy, torch.full((6,), -3.0).double(), *pairs, 2.0 / 8)
    assert found.losses.tolist() == pytest.approx(expected.losses.tolist(), rel=1e-12)
    assert found.margins.tolist() == pytest.approx(expected.margins.tolist(), rel=1e-12)
    assert found.gradient_weights.tolist() == pytest.approx(expected.gradient_weights.tolist())
    # and a target margin is a shift of the margin
    wanted = simpo_loss(policy, lengths, *pairs, 2.0, 0.7)
    shifted = -torch.nn.functional.logsigmoid(found.margins - 0.7)
    assert wanted.losses.tolist() == pytest.approx(shifted.tolist(), rel=1e-12)


@pytest.mark.parametrize("nll", ["sum", "mean"])
def test_cpo_is_dpo_with_a_constant_reference_plus_the_likelihood(nll):
    policy, _ = sampled(2)
    pairs = (CHOSEN, REJECTED)
    found = cpo_loss(policy, LENGTHS, *pairs, 0.3, alpha=0.5, nll=nll)
    expected = dpo_loss(policy, torch.full((6,), -50.0).double(), *pairs, 0.3)
    likelihood = policy / LENGTHS if nll == "mean" else policy
    total = expected.losses - 0.5 * likelihood[CHOSEN]
    assert found.losses.tolist() == pytest.approx(total.tolist(), rel=1e-12)
    assert found.gradient_weights.tolist() == pytest.approx(expected.gradient_weights.tolist())
    alone = cpo_loss(policy, LENGTHS, *pairs, 0.3, alpha=0.0)
    assert alone.losses.tolist() == pytest.approx(expected.losses.tolist(), rel=1e-12)


def test_orpo_without_its_odds_ratio_is_sft_and_odds_of_rare_completions_are_probabilities():
    policy, _ = sampled(3)
    found = orpo_loss(policy, LENGTHS, CHOSEN, REJECTED, 0.0)
    assert found.losses.tolist() == pytest.approx((-policy / LENGTHS)[CHOSEN].tolist())
    rare = orpo_loss(10 * policy - 20 * LENGTHS, LENGTHS, CHOSEN, REJECTED)
    margins = simpo_loss(10 * policy - 20 * LENGTHS, LENGTHS, CHOSEN, REJECTED, 1.0, 0.0).margins
    assert rare.margins.tolist() == pytest.approx(margins.tolist(), abs=1e-7)


def test_aot_is_dpo_on_a_pair_alone_and_where_both_orders_agree():
    policy, reference = sampled(4)
    for p in range(4):
        pair = (CHOSEN[p : p + 1], REJECTED[p : p + 1])
        one, dpo = (f(policy, reference, *pair, 0.3) for f in (aot_loss, dpo_loss))
        for a, b in zip(one, dpo):
            assert a.tolist() == pytest.approx(b.tolist(), rel=1e-12)
    # a policy whose ratios are those of the reference, stretched
    stretched = 1.7 * reference
    found, dpo = (f(stretched, reference, CHOSEN, REJECTED, 0.3) for f in (aot_loss, dpo_loss))
    assert found.losses.tolist() == pytest.approx(dpo.losses.tolist(), rel=1e-12)
    # elsewhere it is not, and the best matching is cheaper than any other
    other = reference.flip(0)
    mixed, dpo = (f(other, reference, CHOSEN, REJECTED, 0.3) for f in (aot_loss, dpo_loss))
    assert mixed.losses.sum() < dpo.losses.sum() - 1e-3


def test_kto_saturates_on_both_sides_and_is_steepest_at_its_reference_point():
    ratios = doubles([-200.0, -1.0, 0.0, 0.7, 1.0, 200.0])
    arguments = (ratios, torch.zeros(6).double())
    for wanted in (True, False):
        found = kto_loss(*arguments, torch.full((6,), wanted), 0.7, 0.5, desirable_weight=2.0)
        most = 2.0 if wanted else 1.0
        ends = [most, 0.0] if wanted else [0.0, most]
        assert found.losses[[0, -1]].tolist() == pytest.approx(ends, abs=1e-12)
        assert found.gradient_weights[[0, -1]].tolist() == pytest.approx([0, 0], abs=1e-12)
        assert int(found.gradient_weights.argmax()) == 3
        assert float(found.gradient_weights[3]) == pytest.approx(most / 4)
    # an undesirable completion is a desirable one seen from the other side of z0
    mirrored = kto_loss(1.4 - ratios, arguments[1], torch.zeros(6, dtype=torch.bool), 0.7, 0.5)
    desired = kto_loss(*arguments, torch.ones(6, dtype=torch.bool), 0.7, 0.5)
    assert mirrored.losses.tolist() == pytest.approx(desired.losses.tolist(), rel=1e-12)


def test_the_reference_point_is_a_mean_that_is_never_negative_and_has_no_gradient():
    policy, reference = sampled(5)
    policy = policy.requires_grad_()
    ratios = (policy - reference).tolist()
    found = kto_reference_point(policy, reference)
    assert float(found) == pytest.approx(max(0.0, math.fsum(ratios) / 6)) and not found.ndim
    assert not found.requires_grad
    higher, lower = (kto_reference_point(reference + x, reference) for x in (2.0, -2.0))
    assert float(higher) == pytest.approx(2) and float(lower) == 0


@pytest.mark.parametrize("e", [1e-3, 0.1, 0.4])
def test_exo_has_the_optimum_of_bradley_terry_and_is_the_divergence_the_other_way_round(e):
    margins = torch.linspace(-12, 12, 4_801, dtype=torch.float64)
    pairs = (torch.arange(4_801), torch.full((4_801,), 4_801))
    policy = torch.cat([margins, doubles([0.0])])
    options = {"beta": 1.0, "label_smoothing": e}
    arguments = (policy, torch.zeros_like(policy), *pairs)
    exo, cdpo = (
        dpo_loss(*arguments, loss_type=kind, **options) for kind in ("exo_pair", "sigmoid")
    )
    best = math.log((1 - e) / e)
    for found in (exo, cdpo):
        assert float(margins[found.losses.argmin()]) == pytest.approx(best, abs=0.005)
    assert float(exo.losses.min()) == pytest.approx(0, abs=1e-6)

    # forward divergence is cross-entropy minus entropy; both are alike near the optimum
    entropy = -(e * math.log(e) + (1 - e) * math.log(1 - e))
    near = abs(margins - best) < 0.02
    forward = (cdpo.losses - entropy)[near]
    assert exo.losses[near].tolist() == pytest.approx(forward.tolist(), rel=0.05, abs=1e-6)
    # a badly ordered pair pulls hard in DPO, and hardly at all in EXO
    assert float(cdpo.gradient_weights[0]) > 0.5 > 1e-3 > float(exo.gradient_weights[0])


# wrong arguments

GOOD = {
    "policy_logps": doubles([-5.0, -9, -7, -3, -40, -9]),
    "lengths": LENGTHS,
    "chosen": CHOSEN,
    "rejected": REJECTED,
    "beta": 0.5,
}
WRONG = [
    (simpo_loss, {"gamma": -1.0}, ValueError, "gamma is -1.0; .* 0 or more"),
    (simpo_loss, {"gamma": 0.5, "beta": 0.0}, ValueError, "beta is 0.0; it must be a positive"),
    (simpo_loss, {"gamma": 0.5, "lengths": LENGTHS[:5]}, ValueError, r"lengths has shape \(5,\)"),
    (simpo_loss, {"gamma": 0.5, "lengths": 0 * LENGTHS}, ValueError, r"lengths\[0\] is 0; .*EOS"),
    (simpo_loss, {"gamma": 0.5, "lengths": [1] * 6}, TypeError, "lengths is list; .* integers"),
    (simpo_loss, {"gamma": 0.5, "chosen": REJECTED}, ValueError, "pair 0 has completion 3 as cho"),
    (cpo_loss, {"alpha": math.nan}, ValueError, "alpha is nan; it must be a finite number"),
    (cpo_loss, {"nll": "median"}, ValueError, "nll is 'median'; it must be one of 'mean', 'sum'"),
    (cpo_loss, {"policy_logps": doubles([math.nan] * 6)}, ValueError, r"policy_logps\[0\] \(chos"),
]


@pytest.mark.parametrize("loss, change, error, message", WRONG)
def test_a_wrong_argument_is_named(loss, change, error, message):
    with pytest.raises(error, match=message):
        loss(**GOOD | change)


def test_wrong_arguments_of_the_others_are_named():
    policy, reference = GOOD["policy_logps"], GOOD["policy_logps"] - 1
    orpo, aot = partial(orpo_loss, policy, LENGTHS), partial(aot_loss, policy)
    kto = partial(kto_loss, policy, reference)
    dpo = partial(dpo_loss, policy, reference, CHOSEN, REJECTED, 0.1)
    cases = [
        (lambda: orpo(CHOSEN, REJECTED, -1), ValueError, "weight is -1; "),
        (lambda: orpo_loss(0 * policy, LENGTHS, CHOSEN, REJECTED), ValueError, "below 0, since"),
        (lambda: aot(reference[:5], CHOSEN, REJECTED, 0.1), ValueError, "reference_logps"),
        (lambda: aot(reference * math.inf, CHOSEN, REJECTED, 0.1), ValueError, "must be finite"),
        (lambda: kto(DESIRABLE.long(), 0.0, 0.1), TypeError, "desirable is torch.int64; .*boolea"),
        (lambda: kto(DESIRABLE[:5], 0.0, 0.1), ValueError, r"desirable has shape \(5,\)"),
        (lambda: kto(DESIRABLE, reference, 0.1), ValueError, r"reference_point has shape \(6,\)"),
        (lambda: kto(DESIRABLE, 0.0, -0.1), ValueError, "beta is -0.1"),
        (lambda: SimPO(gamma_ratio=-1), ValueError, "gamma_ratio is -1; "),
        (lambda: CPO(nll="both"), ValueError, "nll is 'both'"),
        (lambda: CPO(alpha="1"), ValueError, "alpha is '1'"),
        (lambda: ORPO(weight=math.inf), ValueError, "weight is inf"),
        (lambda: kto_reference_point(policy[:0], reference[:0]), ValueError, "is empty"),
        (lambda: dpo(loss_type="exo_pair"), ValueError, "label_smoothing is 0 with .*1e-3"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    weights = {"desirable_weight": 0, "undesirable_weight": 0}
    with pytest.raises(ValueError, match="are both 0; at least one must be positive"):
        kto(DESIRABLE, 0.0, 0.1, **weights)


# training


@pytest.fixture(scope="module")
def preferences(tiny):
    return make_preferences(tiny)


def trained(tiny, preferences, loss, **options):
    policy = load_model(str(tiny))
    return policy, train_dpo(policy, preferences, CONFIG, loss=loss, progress=None, **options)


FREE = [SimPO(gamma_ratio=0.3), ORPO(weight=2.0), CPO(alpha=0.2), CPO(alpha=0.2, nll="sum")]


@pytest.mark.parametrize("loss", [*FREE, AOT()], ids=repr)
def test_a_relative_trains(tiny, preferences, loss):
    _, metrics = trained(tiny, preferences, loss)
    # two passes over the same pairs
    first, second = np.array_split([line["loss"] for line in metrics], 2)
    assert len(first) == len(second) and second.mean() < first.mean()
    assert 0 < metrics[0]["gradient_weight/mean"] < 2.5


@pytest.mark.parametrize("loss", FREE, ids=repr)
def test_a_relative_without_a_reference_needs_none(tiny, preferences, loss, tmp_path):
    bare = replace(preferences, reference_logps=None, reference_key="")
    whole, with_it = trained(tiny, preferences, loss)
    other, without = trained(tiny, bare, loss, run=tmp_path)
    assert same(state(whole), state(other))
    known = ("reference_logps/chosen", "reference_logps/rejected")
    bare_lines = [{k: v for k, v in line.items() if k not in known} for line in timeless(with_it)]
    assert bare_lines == timeless(without) and all(name in with_it[-1] for name in known)
    for needing in (AOT(), None):
        with pytest.raises(ValueError, match="preferences has no reference_logps"):
            trained(tiny, bare, needing)


def test_the_lengths_that_a_loss_asks_for_are_those_of_its_completions(tiny, preferences):
    seen = []

    def spying(policy_logps, reference_logps, chosen, rejected, beta, *, lengths):
        seen.append((reference_logps.tolist(), lengths.tolist()))
        return dpo_loss(policy_logps, reference_logps, chosen, rejected, beta)

    trained(tiny, preferences, spying)
    known = preferences.reference_logps.tolist()
    for logps, lengths in seen:
        expected = [len(preferences.completions[known.index(one)]) for one in logps]
        assert lengths == expected and len(set(lengths)) > 1


def test_a_relative_is_recorded_and_its_run_goes_on_bit_identically(tiny, preferences, tmp_path):
    class Stop(Exception):
        pass

    def stop(model, step):
        if step == 3:
            raise Stop
        return {}

    whole, expected = trained(tiny, preferences, SimPO(0.3))
    with pytest.raises(Stop):
        trained(tiny, preferences, SimPO(0.3), run=tmp_path, callback=stop)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["loss"]["name"] == "dpo_lab.variants.relatives.SimPO"
    for other in (SimPO(0.4), AOT()):
        assert loss_record(other) != record["loss"]
        with pytest.raises(ValueError, match="holds another run"):
            trained(tiny, preferences, other, run=tmp_path, resume=True)
    again, metrics = trained(tiny, preferences, SimPO(0.3), run=tmp_path, resume=True)
    assert same(state(again), state(whole))
    assert [line for line in timeless(metrics) if "loss" in line] == timeless(expected)


def test_the_explorer_of_gradient_weights_shows_exo_with_its_paper_s_smoothing():
    found = on_curve(1.0, doubles([1.0, -3.0]), "exo_pair")
    assert found["curve"]["margins"][[0, -1]].tolist() == [-10, 10]
    optimum = math.log((1 - 1e-3) / 1e-3)
    signs = np.sign(found["curve"]["weights"])
    assert (signs == np.sign(optimum - found["curve"]["margins"])).all()
