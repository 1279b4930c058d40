"""A verdict is computed from the runs: change their numbers and it changes."""

import pandas as pd
import pytest

from gear.analysis import claims
from gear.analysis.claims import Claim, verdict
from gear.run import Run

LOWER = Claim("lower", "Fig. 3", "next-token loss (nats a token)", "gear", "llamagen-repa", -1)
ALIKE = Claim("alike", "Table 8", "PSNR (dB)", "gear", "llamagen-repa", 0, 0.3)
COLLAPSE = Claim("collapse", "Fig. 1", "usage entropy (nats)", "gear", "llamagen-repa", -1, 1.0)


@pytest.mark.parametrize("claim, differences, said", (
    (LOWER, [-0.21, -0.25, -0.23], "reproduced"),
    (LOWER, [-0.21, -0.25, +0.01], "not reproduced"),  # one seed the other way
    (LOWER, [-0.01, -0.90, -0.02], "not reproduced"),  # the right way on all, but the interval holds zero
    (LOWER, [+0.21, +0.25, +0.23], "not reproduced"),
    (LOWER, [-0.2, -0.2], "not testable: 2 seeds"),
    (LOWER, [], "not testable: 0 seeds"),
    (ALIKE, [-0.01, 0.02, 0.00], "reproduced"),
    (ALIKE, [-0.31, -0.32, -0.33], "not reproduced"),
    (ALIKE, [-0.9, 0.9, 0.0], "not reproduced"),  # equal on average only
    (COLLAPSE, [-2.7, -2.6, -2.8], "reproduced"),
    (COLLAPSE, [-1.7, -3.9, -3.1], "reproduced"),  # the margin is asked of each seed, the interval of zero
    (COLLAPSE, [-0.9, -0.8, -0.9], "not reproduced"),
))  # fmt: skip
def test_verdict(claim, differences, said):
    assert verdict(claim, pd.Series(differences, dtype=float)) == said


def record(recipe, seed, ntp):
    run = Run.create(f"scenes-{recipe}-s{seed}", {"recipe": f"scenes-{recipe}", "seed": seed, "steps": 1})
    (run.path / "metrics.jsonl").unlink(missing_ok=True)
    run.append({"step": 1, "val/ntp_loss": ntp})


def test_changing_the_runs_changes_the_verdict(monkeypatch):
    monkeypatch.setattr(claims, "CLAIMS", [LOWER])
    for seed in range(3):
        record("llamagen-repa", seed, 3.5 + 0.1 * seed)
        record("gear", seed, 3.3 + 0.1 * seed + 0.001 * seed)
    record("gear", 7, 9.9)  # no partner: left out
    (row,) = claims.evaluate().to_dict("records")
    assert row["verdict"] == "reproduced" and row["seeds"] == 3 and row["difference"] == pytest.approx(-0.199)
    assert row["low"] < row["difference"] < row["high"] < 0
    record("gear", 1, 3.7)
    assert claims.evaluate().verdict[0] == "not reproduced"


def test_without_runs_nothing_is_testable():
    assert set(claims.evaluate().verdict) == {"not testable: 0 seeds"}


def test_the_markdown_table_says_what_the_verdicts_are(monkeypatch):
    monkeypatch.setattr(claims, "CLAIMS", [LOWER, Claim("so", "", LOWER.statistic, "gear", "", +1)])
    for seed in range(3):
        record("llamagen-repa", seed, 3.5)
        record("gear", seed, 3.3 + 0.001 * seed)
    lines = claims.markdown(claims.evaluate()).splitlines()
    assert lines[2] == "| lower | Fig. 3 | reproduced: -0.199 [-0.201, -0.197], 3 of 3 |  |  |  |"
    assert lines[3] == "| so |  |  |  |  | reproduced: +3.3 [+3.3, +3.3], 3 of 3 (floor) |"
