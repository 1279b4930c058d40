"""A verdict is computed from the runs: change their numbers and it changes."""

import pandas as pd
import pytest

from gear.experiments import claims
from gear.experiments.claims import Claim, verdict
from gear.runs.names import RunName
from gear.runs.run import Run

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
    loss = "*next-token loss (nats a token)*"
    assert lines[2] == f"| lower: {loss} | Fig. 3 | reproduced: -0.199 [-0.201, -0.197], 3 of 3 |  |  |  |"
    assert lines[3] == f"| so: {loss} |  |  |  |  | reproduced: +3.3 [+3.3, +3.3], 3 of 3 (floor) |"


def test_statistics_read_the_layer_and_the_level_they_name():
    """The last layer above its null; how far its maps are from the teacher's; the tokenizer after quantisation; the floor."""
    run = Run.create("r", {"recipe": "r", "seed": 0, "steps": 1})
    run.append({"step": 1, "val/align_loss": -0.7})
    rows = [
        (layer, m, level, 0.1 * layer + v, 0.05, n)
        for layer in (0, 1)
        for m, level, v, n in (
            ("cka", "patch", 0.5, 10),
            ("cka", "image", 0.8, 10),
            ("cka", "content", 0.4, 10),
            ("cknna", "patch", 0.3, 10),
        )
    ]
    rows += [
        (layer, m, "map", value, float("nan"), 10)
        for layer, m, value in (
            (-1, "moran", 0.9),
            (0, "moran", 0.1),
            (1, "moran", 0.6),
            (-1, "high_frequency", 0.2),
            (1, "high_frequency", 0.5),
        )
    ]
    columns = ["layer", "metric", "level", "value", "null", "n"]
    run.table("layer_profile", {"images": 1000, "k": 10}, lambda: pd.DataFrame(rows, columns=columns))
    own = [(layer, "cka", "patch", value, 0.1, 10) for layer, value in (("pre", 0.6), ("post", 0.3), ("teacher", 9.9))]
    run.table("tokenizer_profile", {"images": 1000, "k": 10}, lambda: pd.DataFrame(own, columns=columns))
    floors = pd.DataFrame({"predictor": ["position", "class and position"], "value": [-0.2, -0.3]})
    run.table("alignment_floors", {"images": 4000}, lambda: floors)
    expected = {
        "patch CKA above null": 0.55, "image CKA above null": 0.85, "content CKA above null": 0.45,
        "patch CKNNA above null": 0.35,
        "Moran's I, distance to teacher": 0.3, "high-frequency ratio, distance to teacher": 0.3,
        "tokenizer's patch CKA, before": 0.5, "tokenizer's patch CKA, after": 0.2, "alignment loss minus the floor": -0.4,
    }  # fmt: skip
    for name, value in expected.items():
        assert claims.STATISTICS[name](run) == pytest.approx(value), name


def test_only_finished_runs_are_judged_and_labels_are_told_apart():
    for seed in (0, 10):
        record("gear", seed, 3.0)
        record("llamagen-repa", seed, 3.1)
    Run.create("scenes-gear-s10", {"recipe": "scenes-gear", "seed": 10, "steps": 2})  # on its way
    Run.create("scenes-gear-s0-mine", {"recipe": "scenes-gear", "seed": 0, "steps": 1}).append({"step": 1, "val/ntp_loss": 9.0})
    assert list(claims._by_seed(RunName("scenes", "gear"))) == [0]
    assert list(claims._by_seed(RunName("scenes", "llamagen-repa"))) == [0, 10]
    assert claims._by_seed(RunName("scenes", "gear", "mine"))[0].name == "scenes-gear-s0-mine"
