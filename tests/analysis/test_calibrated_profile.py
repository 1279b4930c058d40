"""Which layers are aligned above chance: the same values as the profile, tests that see a planted
alignment and not what position gives, and a figure's table also where no test can be made.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from gear.analysis import calibration
from gear.analysis.calibration import (
    calibrated_profile,
    calibration_table,
    layer_calibration,
)
from gear.analysis.profiles import alignments, layer_profile
from gear.config import MissingRuns, UserError
from gear.runs.run import Run

N, L, K = 40, 16, 5
PLACE = ["layer", "level", "metric"]


@pytest.fixture(scope="module")
def noise():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N, L, 6, generator=generator) for _ in range(3)]


def table(features, target, **choices):
    return calibration_table(features, target, K, **choices).set_index(PLACE)


@pytest.mark.parametrize(
    "choices",
    (
        {},
        {"estimator": "biased"},
        {"normalise": "standard", "pairing": "sees"},
    ),
)
def test_values_are_those_of_the_profile(choices, noise):
    rows = noise[0] + noise[1]
    profile = pd.DataFrame(
        alignments(rows, noise[0], K, **choices),
        columns=["metric", "level", "value", "spread", "null", "null_spread", "n"],
    )
    tests = table({0: rows, 1: noise[1]}, noise[0], draws=20, **choices).loc[0]
    for line in profile.itertuples():
        test = tests.loc[line.level, line.metric]
        assert test.value == pytest.approx(line.value, abs=1e-9)
        assert test.null == pytest.approx(line.null, abs=0.04)


def test_the_layer_with_the_teachers_content_is_above_chance_and_position_alone_is_not(noise):
    """Layer 2 holds the teacher's content; layers 0 and 1 share only where they vary with it, which
    aligns any two images as much.
    """
    position = 3 * noise[2][:1]
    target = position + noise[0]
    features = {0: position + noise[1], 1: position + noise[2], 2: target + 0.3 * noise[1]}
    tests = table(features, target)
    for level in ("image", "patch", "content"):
        for metric in ("cknna", "cka"):
            part = tests.xs((level, metric), level=["level", "metric"])
            assert (part.corrected_p <= 0.05).tolist() == [False, False, True], (level, metric)
            assert ((part.corrected_score > 0) == (part.corrected_p <= 0.05)).all()
            assert (part.corrected_p >= part.p).all()
    assert tests.value[0, "patch", "cka"] > 0.5  # and is no evidence


def test_a_collapsed_layer_is_missing_and_does_not_count(noise):
    collapsed = torch.ones(N, L, 6) + noise[2][:1]
    aligned = noise[0] + 0.3 * noise[1]
    tests = table({0: collapsed, 1: aligned}, noise[0])
    assert np.isnan(tests.p[0, "image", "cka"])
    assert np.isnan(tests.corrected_p[0, "content", "cknna"])
    alone = table({1: aligned}, noise[0]).loc[1]
    # the image level of CKNNA is defined for layer 0: its rows are equal and not zero
    tested_alone = [("image", "cka"), ("content", "cknna"), ("content", "cka")]
    pd.testing.assert_frame_equal(tests.loc[1].loc[tested_alone], alone.loc[tested_alone])
    assert alone.corrected_p.equals(alone.p)


def test_the_table_stays_with_the_run_and_marks_its_profile(tiny, monkeypatch):
    run = Run.open("tiny")
    tests = layer_calibration(run, 40, 5, draws=19)
    assert list(tests) == calibration.COLUMNS and len(tests) == 4 * 2 * 3
    assert set(tests.layer) == {0, 1, 2, 3} and tests.corrected_p.min() >= 1 / 20
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "_layer_calibration", lambda *_: pytest.fail("computed again"))
        assert layer_calibration(run, 40, 5, draws=19).equals(tests)
    marked = calibrated_profile(run, 40, 5)
    profile = layer_profile(run, 40, 5)
    pd.testing.assert_frame_equal(marked[profile.columns], profile)
    is_aligned = marked.level.isin(["image", "patch", "content"])
    assert marked.corrected_p[is_aligned].notna().any()
    assert marked.corrected_p[~is_aligned].isna().all()


def test_a_profile_without_weights_is_still_there_and_has_no_marks(tiny):
    run = Run.open("tiny")
    profile = layer_profile(run, 40, 5)
    (tiny / "tiny" / "checkpoints").rename(tiny / "tiny" / "gone")
    with pytest.raises(MissingRuns):
        layer_calibration(run, 40, 5)
    marked = calibrated_profile(run, 40, 5)
    pd.testing.assert_frame_equal(marked[profile.columns], profile)
    assert marked.corrected_p.isna().all() and marked.corrected_score.isna().all()


def test_refuses(tiny):
    run = Run.open("tiny")
    with pytest.raises(UserError, match="draws is 0"):
        layer_calibration(run, 40, 5, draws=0)
    with pytest.raises(UserError, match="unknown pairing 'next'"):
        layer_calibration(run, 40, 5, pairing="next")
    with pytest.raises(UserError, match="images is 3"):
        layer_calibration(run, 3, 1)
