"""Paired differences against the closed forms of Student's t with two degrees of freedom;
corrections against values computed by hand.
"""

import math

import numpy as np
import pytest

from gear.measures.paired import (
    LEVEL,
    benjamini_hochberg,
    effect,
    equivalence,
    holm,
    p_value,
)

THREE = [-0.21, -0.25, -0.23]  # mean -0.23, standard deviation 0.02
ERROR = 0.02 / math.sqrt(3)  # standard error of the mean


def test_an_interval_is_that_of_students_t():
    """With two degrees of freedom the quantile at q is (2 q - 1) / sqrt(2 q (1 - q)); at 0.975 it
    is 4.30.
    """
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) * ERROR
    assert effect(THREE) == pytest.approx((3, -0.23, 0.02, -0.23 - half, -0.23 + half), abs=1e-12)
    assert str(effect(THREE)) == "-0.23 [-0.28, -0.18]"


def two_sided(t):
    """Return P(|T| > |t|) for two degrees of freedom: 1 - |t| / sqrt(2 + t^2)."""
    return 1 - abs(t) / math.sqrt(2 + t * t)


@pytest.mark.parametrize("bound", [0.0, -0.2, -0.25, 1.0])
def test_a_p_value_is_that_of_the_bound(bound):
    assert p_value(THREE, bound) == pytest.approx(two_sided((-0.23 - bound) / ERROR), abs=1e-12)


def test_a_p_value_is_below_the_level_where_the_interval_excludes_the_bound():
    size = effect(THREE)
    for bound in (size.low - 1e-6, size.high + 1e-6, 0):
        assert p_value(THREE, bound) <= LEVEL
    for bound in (size.low + 1e-6, size.high - 1e-6, size.mean):
        assert p_value(THREE, bound) > LEVEL


def test_equivalence_is_two_one_sided_tests_at_half_the_level():
    differences = [0.1, 0.14, 0.18]  # mean 0.14, standard deviation 0.04
    error = 0.04 / math.sqrt(3)
    above = two_sided((0.14 + 0.3) / error) / 2
    below = two_sided((0.14 - 0.3) / error) / 2
    assert equivalence(differences, 0.3) == pytest.approx(2 * max(above, below), abs=1e-12)
    edge = effect(differences).high  # 0.239
    assert equivalence(differences, edge + 1e-6) < LEVEL < equivalence(differences, edge - 1e-6)
    assert LEVEL < equivalence(differences, 0.22) < 2 * LEVEL, (
        "only the 90 % interval is inside the margin"
    )
    assert equivalence(differences, 0.01) < LEVEL, "entirely outside the margin: not equivalent"
    negative = [-difference for difference in differences]
    assert equivalence(negative, 0.3) == pytest.approx(equivalence(differences, 0.3))


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1, which is raised to the value before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8]) and holm([0.9, 0.8, 0.7]).max() == 1
    assert len(holm([])) == 0


def test_a_test_that_was_not_made_does_not_count():
    corrected = holm([math.nan, 0.02, 0.03, math.nan])
    assert corrected == pytest.approx([math.nan, 0.04, 0.04, math.nan], nan_ok=True)


def test_one_difference_has_no_interval_and_none_has_no_mean():
    one = effect([0.5])
    none = effect([])
    assert (one.n, one.mean, str(one)) == (1, 0.5, "+0.5") and np.isnan(one[2:]).all()
    assert none.n == 0 and np.isnan(none[1:]).all()
    assert np.isnan([p_value([0.5]), p_value([]), equivalence([0.5], 1), equivalence([], 1)]).all()


def test_equal_differences_have_an_interval_without_width():
    differences = [-0.5, -0.5, -0.5]
    assert (
        effect(differences) == (3, -0.5, 0, -0.5, -0.5)
        and p_value(differences) == equivalence(differences, 1) == 0
    )


def test_benjamini_hochberg_by_hand():
    """Each value is n p / rank, or the least such value of a larger p; NaN stays NaN."""
    corrected = benjamini_hochberg([0.01, 0.04, 0.03, math.nan, 0.005])
    assert corrected[[0, 1, 2, 4]] == pytest.approx([0.02, 0.04, 0.04, 0.02]) and math.isnan(
        corrected[3]
    )
    assert len(benjamini_hochberg([])) == 0 and np.isnan(benjamini_hochberg([math.nan])).all()
    assert (benjamini_hochberg([0.2, 0.3, 0.4]) <= holm([0.2, 0.3, 0.4])).all()
