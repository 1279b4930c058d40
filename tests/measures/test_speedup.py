"""The speed-up of one loss curve over another: analytic curves, the golden noisy pair, intervals."""

import json
from pathlib import Path

import numpy as np
import pytest

from gear.measures.speedup import speedup

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["speedup"]["expected"]
CURVES = np.load(GOLDEN / "speedup.npz")
STEPS = CURVES["steps"]


def loss(t):
    return 6 + 3 * np.asarray(t, dtype=np.float64) ** -0.3


def noisy(curve, sigma, seed):
    return curve + sigma * np.random.default_rng(seed).normal(size=len(curve))


def test_golden_clean():
    result = speedup(STEPS, CURVES["baseline_clean"], CURVES["method_clean"], tail=0)
    assert result.value == pytest.approx(
        EXPECTED["clean_exact_target_last_point"]["speedup"], abs=1e-9
    )
    assert result.low == pytest.approx(result.value) and result.high == pytest.approx(
        result.value
    )  # without residuals the interval has no width


def test_golden_noisy():
    result = speedup(STEPS, CURVES["baseline_noisy"], CURVES["method_noisy"])
    expected = EXPECTED["noisy_primary"]
    assert result.value == pytest.approx(expected["speedup"], abs=1e-6)
    assert abs(result.value - EXPECTED["noisy_raw_first_crossing_WRONG"]) > 0.5
    assert 1 < result.low < result.value < result.high < 4
    assert result == speedup(STEPS, CURVES["baseline_noisy"], CURVES["method_noisy"])


@pytest.mark.parametrize("factor", (1.0, 2.0, 4.0, 10.0))
def test_rescaled_curve_is_exact(factor):
    steps = np.arange(1, 401) * 100
    result = speedup(steps, loss(steps), loss(factor * steps), tail=0)
    assert result.value == pytest.approx(factor, abs=1e-9)


def test_uneven_steps_interpolate():
    steps = np.array([10, 20, 50, 100])
    assert speedup(steps, [9, 8, 7, 3], [8, 4, 2, 1], tail=0).value == pytest.approx(100 / 35)
    assert speedup(steps, [9, 8, 7, 3], [8, 4, 2, 1], tail=0.5).value == pytest.approx(
        100 / 35
    )  # the tail is the steps after 50
    assert speedup(steps, [9, 8, 7, 3], [8, 4, 2, 1], tail=0.6).value == pytest.approx(
        100 / 17.5
    )  # the tail is the steps 50 and 100


def test_a_curve_against_itself():
    steps = np.arange(1, 401) * 100
    assert 1 < speedup(steps, loss(steps), loss(steps)).value < 1.02


def test_invariances():
    base = speedup(STEPS, CURVES["baseline_noisy"], CURVES["method_noisy"])
    affine = speedup(STEPS, 4.0 * CURVES["baseline_noisy"] - 7, 4.0 * CURVES["method_noisy"] - 7)
    units = speedup(STEPS / 1000, CURVES["baseline_noisy"], CURVES["method_noisy"])
    for variant in (affine, units):
        assert (variant.value, variant.low, variant.high) == pytest.approx(
            (base.value, base.low, base.high), rel=1e-4
        )


def test_a_method_that_never_reaches_the_target_has_no_speedup():
    result = speedup(STEPS, CURVES["baseline_clean"], CURVES["baseline_clean"] + 1)
    assert (result.value, result.low, result.high) == (None, None, None)


def test_a_draw_that_never_reaches_the_target_counts_as_one():
    steps = np.arange(1, 401) * 100
    result = speedup(steps, noisy(loss(steps), 0.05, 0), noisy(loss(steps), 0.05, 0))
    assert result.low == 1 and 1 < result.value < result.high


def test_reaching_the_target_at_the_first_point_is_a_lower_bound():
    result = speedup(STEPS, CURVES["baseline_clean"], np.full(len(STEPS), 1.0))
    assert result.value == pytest.approx(STEPS[-1] / STEPS[0]) and result.high == float("inf")


def test_one_outlier_is_not_a_crossing():
    steps = np.arange(1, 401) * 100
    method = loss(2 * steps)
    method[20] -= 0.15  # far below the target
    assert method[20] < loss(steps[-1]) - 0.02
    assert speedup(steps, loss(steps), method, tail=0).value == pytest.approx(
        2, rel=0.05
    )  # the first crossing of the raw curve would give 19


def test_interval_covers_the_truth():
    steps = np.arange(1, 401) * 100
    draws = [
        speedup(steps, noisy(loss(steps), 0.01, seed), noisy(loss(2.5 * steps), 0.01, 99 + seed))
        for seed in range(12)
    ]
    assert np.mean([draw.value for draw in draws]) == pytest.approx(2.5, rel=0.1)
    assert sum(0.95 * draw.low <= 2.5 <= 1.05 * draw.high for draw in draws) >= 9


@pytest.mark.parametrize(
    "steps, baseline, method, tail",
    (
        ([1, 2, 3], [3, 2, 1], [3, 2], 0),
        ([1], [1], [1], 0),
        ([1, 2], [1, np.nan], [1, 0], 0),
        ([0, 1], [1, 0], [1, 0], 0),
        ([2, 1], [1, 0], [1, 0], 0),
        ([1, 2], [1, 0], [1, 0], 1),
    ),
)
def test_refuses(steps, baseline, method, tail):
    with pytest.raises(ValueError):
        speedup(steps, baseline, method, tail)
