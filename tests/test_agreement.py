"""Agreement: published examples, plain loops, and other libraries where they are installed."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from dpo_lab.data.agreement import (
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    position_bias,
    rater_agreement,
    raw_agreement,
    seconds_per_item,
)
from dpo_lab.data.ratings import Rating, RatingStore, as_items

NAN = math.nan

# how many of 14 raters put each of 10 subjects into each of 5 categories: the worked example of
# Wikipedia's article on Fleiss' kappa, which gives 0.210
FLEISS = """0 0 0 0 14, 0 2 6 4 2, 0 0 3 5 6, 0 3 9 2 0, 2 2 8 1 1, 7 7 0 0 0, 3 2 6 3 0, 2 5 3 2 2,
6 5 2 1 0, 0 2 2 3 7"""

# four observers, twelve units: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011),
# whose alphas are nominal 0.743, ordinal 0.815 and interval 0.849
ALPHA = """1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 ."""

# two readers of 50 grant proposals: 20 times both say yes, 15 times both no, 5 and 10 they differ;
# the worked example of Wikipedia's article on Cohen's kappa, which gives 0.4
COHEN = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15

FEW = {"resamples": 20}
TABLES = st.lists(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, NAN]), min_size=3, max_size=3), min_size=2, max_size=9
).map(np.array)


def test_published_examples():
    counts = [list(map(int, row.split())) for row in FLEISS.split(",")]
    fleiss = np.array([np.repeat(np.arange(5), row) for row in counts])
    assert fleiss_kappa(fleiss, **FEW).value == pytest.approx(0.210, abs=5e-4)
    alpha = [[NAN if one == "." else int(one) for one in row.split()] for row in ALPHA.split("\n")]
    for level, value in {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849}.items():
        found = krippendorff_alpha(np.array(alpha).T, level, **FEW)
        assert found.value == pytest.approx(value, abs=5e-4) and found.n == 11
    one, other = np.array(COHEN, float).T
    assert cohen_kappa(one, other, **FEW).value == pytest.approx(0.4)
    assert raw_agreement(COHEN, **FEW).value == pytest.approx(0.7)


@settings(max_examples=60, deadline=None)
@given(table=TABLES)
def test_kappas_and_raw_agreement_are_those_of_plain_loops_and_scikit_learn(table):
    both = table[~np.isnan(table[:, :2]).any(1), :2]
    found = cohen_kappa(*table[:, :2].T, **FEW)
    assert found.n == len(both)
    if len(np.unique(both)) < 2:
        assert math.isnan(found.value)
    else:
        expected = cohen_kappa_score(*both.astype(int).T)
        assert found.value == pytest.approx(expected, abs=1e-12)

    # raw agreement: every two raters of every item
    same = [a == b for row in table for a, b in combinations(row, 2) if not math.isnan(a + b)]
    found = raw_agreement(table, **FEW)
    assert found.value == pytest.approx(np.mean(same)) if same else math.isnan(found.value)
    assert not same or found.low <= found.high

    # Fleiss, of the items that most rated
    raters = (~np.isnan(table)).sum(1)
    r = raters[raters >= 2].max(initial=0)
    rows = [[x for x in row if not math.isnan(x)] for row in table[raters == r]] if r else []
    found = fleiss_kappa(table, **FEW)
    assert found.n == len(rows)
    flat = [x for row in rows for x in row]
    if len(set(flat)) < 2:
        assert math.isnan(found.value)
    else:
        agree = np.mean([np.mean([a == b for a, b in combinations(row, 2)]) for row in rows])
        chance = sum((flat.count(x) / len(flat)) ** 2 for x in set(flat))
        assert found.value == pytest.approx((agree - chance) / (1 - chance))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator, covered = np.random.default_rng(0), 0
    for seed in range(60):
        truth = generator.integers(2, size=150)
        flip = generator.random((150, 2)) < 0.2
        one, other = (truth ^ flip[:, k] for k in range(2))
        # they agree with probability 0.8**2 + 0.2**2 = 0.68, by chance 0.5
        found = cohen_kappa(one, other, resamples=300, seed=seed)
        covered += found.low <= (0.68 - 0.5) / 0.5 <= found.high
    assert 51 <= covered <= 60


@pytest.mark.parametrize("measure", [raw_agreement, fleiss_kappa, krippendorff_alpha])
def test_what_is_not_defined_says_so(measure):
    for table in ([[1.0, NAN], [NAN, 2.0]], np.empty((0, 2))):
        found = measure(table, **FEW)
        assert math.isnan(found.value) and str(found) == "not defined (n = 0)"
    if measure is not raw_agreement:
        assert math.isnan(measure([[1.0, 1.0], [1.0, 1.0]], **FEW).value)
    for wrong in ([1.0, 2.0], [[1.0], [2.0]]):
        with pytest.raises(ValueError, match=r"labels has shape .* it must be \(M, R\)"):
            measure(wrong)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="one has shape"):
        cohen_kappa([1, 0], [1])
    with pytest.raises(ValueError, match="level is 'x'"):
        krippendorff_alpha([[1, 2]], "x")


def rated(path, answers):
    """A store of ratings: (item, rater, pass, choice, seconds)."""
    store = RatingStore(path)
    for item, rater, number, choice, seconds in answers:
        store.add(Rating(item.key, rater, number, (0, 1), choice, seconds=seconds))
    return store


ITEMS = as_items([("p", f"a{i}", f"b{i}") for i in range(10)])


def test_position_bias_and_time(tmp_path):
    sides = ["left"] * 8 + ["right", "tie"]
    answers = [(item, "A", 1, side, i + 1.0) for i, (item, side) in enumerate(zip(ITEMS, sides))]
    ratings = rated(tmp_path / "r", answers).ratings()
    bias = position_bias(ratings)
    assert (bias.left.value, bias.left.n, bias.ties) == (8 / 9, 9, 1)
    # 8 or 9 of 9, or 0 or 1
    assert bias.p_value == pytest.approx(2 * (1 + 9) / 2**9)
    # Wilson's interval, written out
    z, p, n = 1.959964, 8 / 9, 9
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert (bias.left.low, bias.left.high) == pytest.approx((center - half, center + half))
    assert seconds_per_item(ratings, **FEW).value == 5.5
    assert math.isnan(position_bias([]).p_value) and seconds_per_item([], **FEW).n == 0


def test_raters_and_passes_are_told_apart(tmp_path):
    flipped = {"left": "right", "right": "left"}
    sides = ["left", "right"] * 5
    answers = []
    for i, (item, side) in enumerate(zip(ITEMS, sides)):
        answers.append((item, "A", 1, side, 1.0))
        answers.append((item, "A", 2, side if i else flipped[side], 1.0))
        answers.append((item, "B", 1, flipped[side], 1.0))
    store = rated(tmp_path / "r", answers)
    found = rater_agreement(store, ITEMS, **FEW)
    assert found.raters == ("A", "B") and found.labels.shape == (10, 2)
    assert found.cohen["A", "B"].value == pytest.approx(-1) and found.raw.value == 0
    assert list(found.with_themselves) == ["A"]
    raw, kappa = found.with_themselves["A"]
    assert raw.value == 0.9 and kappa.value == pytest.approx(0.8)
    assert found.fleiss.value == pytest.approx(-1)
    assert rater_agreement(store, ITEMS, ["A"], **FEW).raw.n == 0
    with pytest.raises(ValueError, match="has no ratings"):
        rater_agreement(RatingStore(tmp_path / "none"), ITEMS)
