"""Verdicts on claims and on studies are computed from the runs, and change with their numbers."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from helpers import record_study, recorded

from gear.experiments import verdicts
from gear.experiments.claims import CLAIMS, PAIRED, STATISTICS, Claim
from gear.experiments.recipes import recipe
from gear.experiments.results import results
from gear.experiments.studies import Scoring
from gear.experiments.verdicts import by_chance, compare, directions, family, tally
from gear.measures.paired import benjamini_hochberg
from gear.runs.folder import runs_dir
from gear.runs.names import RunName
from gear.runs.run import Run

BASELINE = ("llamagen-repa",)
LOSS = "next-token loss (nats per token)"
SENTENCE = "Loss is lower than for the baseline (LlamaGen-REPA)"
LOWER = Claim("Loss is lower than for {against}", "Fig. 3", LOSS, "gear", BASELINE, -1)
ABOVE = Claim("Loss is above {against}", "", LOSS, "gear", ("",), +1)
# sign and margin of a claim
DIRECTION = (-1, 0.0)
ALIKE = (0, 0.3)
COLLAPSE = (-1, 1.0)


@pytest.mark.parametrize("claim, differences, verdict", (
    (DIRECTION, [-0.21, -0.25, -0.23], "reproduced"),
    (DIRECTION, [-0.21, -0.25, +0.01], "undecided"),  # one seed has the opposite sign
    (DIRECTION, [-0.01, -0.90, -0.02], "undecided"),  # all seeds agree, the interval contains zero
    (DIRECTION, [+0.21, +0.25, +0.23], "contradicted"),
    (DIRECTION, [-1.0, -1.1, -0.9, -1.0, -1.0, +0.1], "reproduced"),  # one of six seeds may differ
    (DIRECTION, [-0.2, math.nan, -0.2], "undecided"),
    (DIRECTION, [-0.2, -0.2], "not testable: 2 seeds"),
    (DIRECTION, [-0.2], "not testable: 1 seed"),
    (DIRECTION, [], "not testable: 0 seeds"),
    (ALIKE, [-0.01, 0.02, 0.00], "reproduced"),
    (ALIKE, [-0.31, -0.32, -0.33], "undecided"),  # all seeds outside, the interval reaches inside
    (ALIKE, [-0.41, -0.42, -0.43], "contradicted"),
    (ALIKE, [+0.41, +0.42, +0.43], "contradicted"),
    (ALIKE, [-0.9, 0.9, 0.0], "undecided"),  # equal only on average
    (COLLAPSE, [-2.7, -2.6, -2.8], "reproduced"),
    (COLLAPSE, [-1.7, -3.9, -3.1], "undecided"),  # all seeds beyond the margin, which the interval contains
    (COLLAPSE, [-0.9, -0.8, -0.9], "undecided"),
    (COLLAPSE, [-0.3, -0.2, -0.3], "contradicted"),  # lower, but by less than the margin
))  # fmt: skip
def test_verdict(claim, differences, verdict):
    assert compare(pd.Series(differences, dtype=float), *claim)["verdict"] == verdict


def test_a_verdict_is_that_of_the_interval():
    """Random differences: the verdict says whether the interval lies in the claimed region."""
    claims_and_ranges = ((1, 0.0, (0, np.inf)), (-1, 0.5, (-np.inf, -0.5)), (0, 0.5, (-0.5, 0.5)))
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        differences = rng.normal(rng.normal(), 0.2, rng.integers(3, 6))
        for sign, margin, claimed in claims_and_ranges:
            row = compare(differences, sign, margin)
            within = claimed[0] < row["low"] and row["high"] < claimed[1]
            outside = row["high"] < claimed[0] or claimed[1] < row["low"]
            verdict = "reproduced" if within else "contradicted" if outside else "undecided"
            assert row["verdict"] == verdict
            seen.add((sign, verdict))
            if len(differences) < 5 and verdict == "reproduced" and sign:
                assert row["agree"] == row["seeds"], "of three or four seeds all agree"
    assert len(seen) == 9


def test_what_the_paper_does_not_print_has_no_verdict():
    row = compare(pd.Series([-0.2, -0.3, -0.2]), None)
    assert row["verdict"] == "" and math.isnan(row["p"]) and math.isnan(row["agree"])
    assert row["low"] < row["difference"] < row["high"] < 0


def test_a_family_is_corrected_for_its_size():
    """p = 0.0025, 0.035, 0.38: the second verdict holds in a family of two tests (0.035 x 1), but
    not in one of three (0.035 x 2).
    """
    rows = [
        compare(pd.Series(differences), sign)
        for differences, sign in (
            ([-0.21, -0.25, -0.23], -1),
            ([0.1, 0.2, 0.15], -1),
            ([0.1, 0.2, 0.15], None),
            ([0.1, 0.2], 1),
        )
    ]
    alone, two = family(rows[1:]), family(rows)
    unchanged = ["contradicted", "", "not testable: 2 seeds"]
    assert alone.verdict.tolist() == alone.verdict_corrected.tolist() == unchanged
    assert two.p_corrected[:2].tolist() == pytest.approx([2 * two.p[0], two.p[1]])
    three = family([*rows, compare(pd.Series([-0.1, 0.2, 0.3]), 1)])
    assert three.verdict[1] == "contradicted" and three.verdict_corrected[1] == "undecided"
    assert three.p_corrected[1] == 2 * three.p[1]
    assert tally(three) == (
        "Of 3 claimed directions chance alone would reproduce about 0.1 and contradict as many. "
        "Of all 3 comparisons 1 are reproduced, 1 after Holm's correction; 1 contradicted, 0 after it; "
        "1 not testable: 2 seeds; 1 undecided"
    )


def test_what_chance_decides_is_counted():
    """Without any difference, one direction in forty is reproduced and one in forty contradicted;
    claims with a margin are not counted.
    """
    rng = np.random.default_rng(0)
    rows = [compare(rng.normal(size=3), 1) for _ in range(4_000)]
    table = family(rows)
    assert by_chance(table) == 100 and by_chance(family([compare(rng.normal(size=3), 0, 9.0)])) == 0
    for verdict in ("reproduced", "contradicted"):
        assert abs(sum(table.verdict == verdict) - 100) < 40
        assert sum(table.verdict_corrected == verdict) <= 1


def test_a_study_is_corrected_for_false_discoveries():
    """p = 0.0025, 0.035, 0.035: Holm's correction undoes the last two verdicts, Benjamini and
    Hochberg's does not.
    """
    rows = [
        compare(pd.Series(differences), 1)
        for differences in ([0.21, 0.25, 0.23], [0.1, 0.2, 0.15], [0.1, 0.2, 0.15])
    ]
    by_holm, by_rate = family(rows), family(rows, benjamini_hochberg)
    assert by_holm.verdict_corrected.tolist() == ["reproduced", "undecided", "undecided"]
    assert by_rate.verdict_corrected.tolist() == ["reproduced"] * 3
    assert by_rate.p_corrected.tolist() == pytest.approx([3 * rows[0]["p"], *[rows[1]["p"]] * 2])


def record(recipe, seed, ntp):
    run = Run.create(
        f"scenes-{recipe}-s{seed}", {"recipe": f"scenes-{recipe}", "seed": seed, "steps": 1}
    )
    (run.path / "metrics.jsonl").unlink(missing_ok=True)
    run.append({"step": 1, "val/ntp_loss": ntp})


def test_changing_the_runs_changes_the_verdict(monkeypatch):
    monkeypatch.setattr(verdicts, "CLAIMS", [LOWER])
    for seed in range(3):
        record("llamagen-repa", seed, 3.5 + 0.1 * seed)
        record("gear", seed, 3.3 + 0.1 * seed + 0.001 * seed)
    record("gear", 7, 9.9)  # the baseline has no seed 7: left out
    (row,) = verdicts.claims().to_dict("records")
    assert row["verdict"] == "reproduced" and row["seeds"] == 3
    assert row["difference"] == pytest.approx(-0.199)
    assert row["low"] < row["difference"] < row["high"] < 0 and row["p"] < 0.05
    assert row["claim"] == SENTENCE
    record("gear", 1, 3.7)
    assert verdicts.claims().verdict[0] == "undecided"


def test_without_runs_nothing_is_testable():
    table = verdicts.claims()
    judged = table[table.verdict != ""]
    assert set(judged.verdict) == set(judged.verdict_corrected) == {"not testable: 0 seeds"}
    assert tally(table).endswith(f"; {len(judged)} not testable: 0 seeds")
    assert len(verdicts.claims_in_words(table).splitlines()) == len(table)


def test_a_claim_stands_alone():
    """A claim's sentence begins with the statistic and names what is compared; all are unique."""
    table = verdicts.claims()
    assert table.claim.is_unique and not table.claim.str.contains("[{}]").any()
    assert all(against in sentence for sentence, against in zip(table.claim, table.against))
    nouns = (
        "Next-token loss", "H - NTP", "Alignment loss", "Usage entropy", "Posterior", "PSNR", "SSIM",
        "Fréchet distance", "Patch CKNNA", "Patch CKA", "Content CKA", "Image CKNNA", "Image CKA",
        "Moran's I", "High-frequency ratio",
    )  # fmt: skip
    assert all(claim.sentence.startswith(nouns) for claim in CLAIMS)


def test_what_the_paper_claims_and_runs_contradict_comes_first(monkeypatch):
    monkeypatch.setattr(verdicts, "CLAIMS", [LOWER, ABOVE])
    for seed in range(3):
        record("llamagen-repa", seed, 3.5)
        record("gear", seed, 3.7 + 0.001 * seed)
    table = verdicts.claims()
    size = "+0.201 [+0.199, +0.203]"
    expected = f"- {SENTENCE} (Fig. 3). Here the {LOSS} differs by {size}; contradicted after Holm's correction."
    assert verdicts.contradictions_as_markdown(table) == expected
    page = verdicts.results_page(table, label="mine")  # a label has no studies
    assert page.index(expected) < page.index("## How a claim is judged") < page.index("## Claims")
    assert page.index(verdicts.tally(table)) < page.index(expected)
    ours = table.assign(paper="")
    assert (
        verdicts.contradictions_as_markdown(ours)
        == "Nothing that the paper claims is contradicted."
    )


def test_claims_in_markdown_and_in_words(monkeypatch):
    monkeypatch.setattr(verdicts, "CLAIMS", [LOWER, ABOVE])
    for seed in range(3):
        record("llamagen-repa", seed, 3.5)
        record("gear", seed, 3.3 + 0.001 * seed)
    table = verdicts.claims()
    lines = verdicts.claims_as_markdown(table).splitlines()
    size, end = "-0.199 [-0.201, -0.197]", "reproduced | reproduced |"
    lower = f"Fig. 3 | {LOSS} | {size} | 3 of 3 | 8.4e-06 | {end}"
    assert verdicts.tally(table).endswith(
        "Of all 2 comparisons 2 are reproduced, 2 after Holm's correction; 0 contradicted, 0 after it"
    )
    assert lines[2] == f"| {SENTENCE} | {lower}"
    above = f" | {LOSS} | +3.3 [+3.3, +3.3] | 3 of 3 | 3.1e-08 | {end}"
    assert lines[3:] == [f"| Loss is above the floor | {above}"]
    words = verdicts.claims_in_words(table).splitlines()
    assert words[0].startswith("reproduced  ")
    assert words[0].endswith(f"  {SENTENCE} (Fig. 3)")
    values = f"{LOSS}: 3.301 against 3.5, {size}, 3 of 3 seeds agree"
    assert words[1].strip() == f"{values}, p = 8.4e-06, reproduced after Holm's correction"


def test_statistics_read_the_layer_and_the_level_they_name():
    """Statistics average the layers from the tap layer on, or read one layer; they subtract the
    null, the teacher's value or the lowest floor.
    """
    generator = {"tap_layer": 1, "layers": 2}
    run = Run.create("r", {"recipe": "r", "seed": 0, "steps": 1, "generator": generator})
    run.append({"step": 1, "val/align_loss": -0.7})
    rows = [
        (layer, metric, level, 0.1 * layer + value, 0.05, n)
        for layer in (0, 1, 2)
        for metric, level, value, n in (
            ("cka", "patch", 0.5, 10),
            ("cka", "image", 0.8, 10),
            ("cka", "content", 0.4, 10),
            ("cknna", "patch", 0.3, 10),
        )
    ]
    rows += [
        (layer, metric, "map", value, float("nan"), 10)
        for layer, metric, value in (
            (-1, "moran", 0.9),
            (0, "moran", 0.1),
            (1, "moran", 0.6),
            (2, "moran", 1.0),
            (-1, "high_frequency", 0.2),
            (1, "high_frequency", 0.5),
            (2, "high_frequency", 0.1),
        )
    ]
    columns = ["layer", "metric", "level", "value", "null", "n"]
    run.table(
        "layer_profile", {"images": 1000, "k": 10}, lambda: pd.DataFrame(rows, columns=columns)
    )
    tokenizer_rows = [
        (layer, "cka", "patch", value, 0.1, 10)
        for layer, value in (("pre", 0.6), ("post", 0.3), ("teacher", 9.9))
    ]
    run.table(
        "tokenizer_profile",
        {"images": 1000, "k": 10},
        lambda: pd.DataFrame(tokenizer_rows, columns=columns),
    )
    floors = pd.DataFrame({"predictor": ["position", "class and position"], "value": [-0.3, -0.2]})
    run.table("alignment_floors", {"per_class": 100}, lambda: floors)
    expected = {
        "patch CKA above null": 0.6,
        "patch CKA above null, layer 0": 0.45,
        "image CKA above null": 0.9,
        "image CKA above null, tap layer": 0.85,
        "content CKA above null": 0.5,
        "patch CKNNA above null": 0.4,
        "Moran's I, distance to teacher": 0.2,
        "high-frequency ratio, distance to teacher": 0.2,
        "tokenizer's patch CKA above null, before quantisation": 0.5,
        "tokenizer's patch CKA above null, after quantisation": 0.2,
        "alignment loss minus the floor": -0.4,
    }
    for name, value in expected.items():
        assert STATISTICS[name](run, Scoring()) == pytest.approx(value), name


def test_a_speed_up_is_of_a_run_and_its_baseline():
    """The logarithm of a speed-up is positive if the run is faster and negative if the baseline
    is.
    """
    steps = np.arange(1, 101)
    for name, ntp in (("fast", 4 - 0.02 * steps), ("slow", 4 - 0.01 * steps)):
        run = Run.create(name, {"recipe": name, "seed": 0, "steps": 100})
        for step, value in zip(steps.tolist(), ntp.tolist()):
            run.append({"step": step, "ntp_loss": value})
    fast, slow = (Run.open(name) for name in ("fast", "slow"))
    log_speedup = PAIRED["log speed-up of next-token loss"]
    assert log_speedup(fast, slow, Scoring()) == pytest.approx(math.log(2), abs=0.02)
    assert log_speedup(slow, fast, Scoring()) == pytest.approx(-math.log(2), abs=0.02)


def test_a_score_that_is_missing_is_asked_for(monkeypatch):
    """A missing score leaves one row without a verdict; the row names the command to compute it."""
    claim = Claim("SSIM is lower than {against}'s", "", "SSIM", "joint", ("tokenizer",), -1)
    monkeypatch.setattr(verdicts, "CLAIMS", [claim, LOWER])
    for seed in range(3):
        for method in ("joint", "tokenizer"):
            name = f"scenes-{method}-s{seed}"
            recorded(name, recipe(name), [(0, 0, {"ssim": 0.5 - 0.1 * (method == "joint")})])
    assert verdicts.claims().verdict[0] == "reproduced" and verdicts.claims().needs[0] == ""
    (runs_dir() / "scenes-tokenizer-s1" / "metrics.json").unlink()
    row = verdicts.claims().iloc[0]
    assert row.verdict == "not testable: 0 seeds"
    assert row.needs == "gear evaluate scenes-tokenizer-s1 --network scenes --reconstruction"
    table = verdicts.claims()
    assert f"needs: {row.needs}" in verdicts.claims_in_words(table)
    assert f"| needs `{row.needs}` |" in verdicts.claims_as_markdown(table)


def test_a_curve_of_samples_has_three_points(monkeypatch):
    """GEAR reaches the baseline's last Fréchet distance at half of the steps. A run with one score
    only gets no verdict; the row names the command for more scores.
    """
    statistic = "log speed-up of Fréchet distance"
    speed_up = Claim("Samples of {against}", "", statistic, "joint", BASELINE, +1)
    monkeypatch.setattr(verdicts, "CLAIMS", [speed_up])
    curves = {"joint": (8, 4, 3, 2), "llamagen-repa": (16, 8, 6, 4)}
    for method, values in curves.items():
        for seed in range(3):
            config = recipe(f"scenes-{method}-s{seed}")
            scores = [(50 * (k + 1), 1.0, {"fd_scenes": v}) for k, v in enumerate(values)]
            run = recorded(f"scenes-{method}-s{seed}", config, scores)
            records = json.loads((run.path / "metrics.json").read_text())
            for record in records:
                record["protocol"] |= {"count": 1000} if "cfg_scale" in record["protocol"] else {}
            (run.path / "metrics.json").write_text(json.dumps(records))
    row = verdicts.claims().iloc[0]
    assert row.difference == pytest.approx(math.log(2)) and row.seeds == 3
    recorded("scenes-joint-s1", recipe("scenes-joint-s1"), [(200, 1.0, {"fd_scenes": 2.0})])
    row = verdicts.claims().iloc[0]
    assert row.seeds == 0 and row.needs.startswith("gear evaluate scenes-joint-s1 --network scenes")
    assert row.needs.endswith(" --steps 50 100 150 200")


def test_a_slower_method_is_contradicted(monkeypatch):
    """A method that never reaches the end of the baseline's curve has a negative statistic."""
    claim = Claim("x {against}", "", "log speed-up of next-token loss", "gear", BASELINE, +1)
    monkeypatch.setattr(verdicts, "CLAIMS", [claim])
    for seed in range(3):
        for method, rate in (("gear", 0.01 + 0.0002 * seed), ("llamagen-repa", 0.02)):
            run = Run.create(
                f"scenes-{method}-s{seed}",
                {"recipe": f"scenes-{method}", "seed": seed, "steps": 60},
            )
            for step in range(1, 61):
                run.append({"step": step, "ntp_loss": 4 - rate * step})
    assert verdicts.claims().verdict[0] == "contradicted"


def test_only_finished_runs_are_judged_and_labels_are_told_apart():
    for seed in (0, 10):
        record("gear", seed, 3.0)
        record("llamagen-repa", seed, 3.1)
    Run.create("scenes-gear-s10", {"recipe": "scenes-gear", "seed": 10, "steps": 2})  # not finished
    Run.create("scenes-gear-s0-mine", {"recipe": "scenes-gear", "seed": 0, "steps": 1}).append(
        {"step": 1, "val/ntp_loss": 9.0}
    )
    assert list(verdicts._by_seed(RunName("scenes", "gear"))) == [0]
    assert list(verdicts._by_seed(RunName("scenes", "llamagen-repa"))) == [0, 10]
    assert verdicts._by_seed(RunName("scenes", "gear", "mine"))[0].name == "scenes-gear-s0-mine"


def study_verdicts(name, **options):
    table = results(name, "tiny", scoring=Scoring(100), **options)
    return directions(table, name, "tiny")


def test_directions_follow_the_numbers():
    """A Fréchet distance of GEAR that is lower by 1 on each seed, as in the paper, is reproduced; one
    that is higher is contradicted.
    """
    for effect, verdict in ((-1.0, "reproduced"), (1.0, "contradicted")):
        record_study("depth", effect=effect)
        table = study_verdicts("depth").query("metric == 'fd'")
        assert set(table.verdict) == {verdict} and len(table) == 3 and set(table.seeds) == {3}
        assert np.allclose(table.paper, [16.961 - 23.102, 16.837 - 22.371, 17.988 - 22.455])
        assert (table.agree == (3 if effect < 0 else 0)).all()
        assert (np.sign(table.difference) == effect).all()


def test_a_reference_is_the_papers_and_is_not_compared_with_itself():
    record_study("temperature")
    table = study_verdicts("temperature")
    assert set(table.against) == {"tau = 0.1"} and "tau = 0.1" not in set(table.cell)
    unpublished = table[table.cell == "tau = 0.02"]
    assert len(unpublished) and unpublished.paper.isna().all()
    assert set(unpublished.verdict) == {""}, "the paper has no such row"
    row = table[(table.cell == "tau = 0.5") & (table.metric == "fd")].iloc[0]
    assert row.paper == pytest.approx(9.153 - 10.630)
    assert set(table[table.metric == "ntp_loss"].verdict) == {""}, "the paper prints no such column"


def test_from_nothing_is_compared_with_the_frozen_baseline_too():
    """Table 12 also prints the baseline (LlamaGen-REPA), with which both cells are compared."""
    record_study("initialisation")
    table = study_verdicts("initialisation").query("metric == 'fd'").set_index(["cell", "against"])
    assert set(table.index) == {
        ("from nothing", "from the warm-up"),
        ("from nothing", "LlamaGen-REPA"),
        ("from the warm-up", "LlamaGen-REPA"),
    }
    assert table.paper["from nothing", "LlamaGen-REPA"] == pytest.approx(13.435 - 14.719)
    assert table.verdict["from nothing", "LlamaGen-REPA"] == "reproduced"


def test_two_seeds_are_no_verdict():
    record_study("depth")
    assert set(study_verdicts("depth", seeds=(0, 1)).query("metric == 'fd'").verdict) == {
        "not testable: 2 seeds"
    }


def test_a_study_in_words_and_in_markdown():
    record_study("depth")
    table = study_verdicts("depth")
    judged = table[table.verdict != ""]
    lines = verdicts.directions_in_words(table).splitlines()
    assert lines[0].startswith(tally(table, benjamini_hochberg))
    count = judged.p.notna().sum()
    assert f"Of all {count} comparisons {sum(judged.verdict == 'reproduced')} are" in lines[0]
    assert f"Of {count} claimed directions chance alone would reproduce about " in lines[0]
    assert "layer 1 of 3 against its baseline: " in "\n".join(lines) and " [" in "\n".join(lines)
    text = verdicts.studies_as_markdown(["depth"], "tiny", Scoring(100))
    head = "| study | in the paper | by chance | reproduced | contradicted | undecided |\n|---"
    assert text.startswith(head)
    cells = text.splitlines()[2].split(" | ")
    assert cells[:3] == ["| `depth`", "Table 11", f"{by_chance(judged):.1f} of {len(judged)}"]
    assert cells[5] == f"{(table.verdict == 'undecided').sum()} |"
    agreed = table[table.verdict == "reproduced"]
    corrected = sum(table.verdict_corrected == "reproduced")
    assert len(agreed) and cells[3].startswith(f"{len(agreed)}, {corrected} corrected (")
    assert all(cell in cells[3] for cell in agreed.cell)
