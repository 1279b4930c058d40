"""Measurements are read at their step and protocol; errors name the runs that are missing."""

import json
import math
import shutil
from dataclasses import replace

import pytest
from helpers import record_judged, record_scored, record_study

from gear.analysis.code_length import code_length, nats_per_image
from gear.config import UserError, to_dict
from gear.evaluation import judge
from gear.experiments import results
from gear.experiments.presets import change
from gear.experiments.recipes import recipe
from gear.experiments.studies import Scoring
from gear.runs.folder import runs_dir
from gear.runs.run import Run
from gear.tokenizer.config import token_grid


def test_scores_are_read_at_their_step_and_guidance():
    run = record_scored("tiny-gear-s0", recipe("tiny-gear-s0"))
    records = json.loads((run.path / "metrics.json").read_text())
    expected = {
        (r["protocol"].get("step"), r["protocol"].get("cfg_scale"), r["metric"]): r["value"]
        for r in records
    }
    values = results.measured("tiny-gear-s0", "tiny", Scoring(100), 1.5, 12)
    assert values["fd"] == expected[12, 1.5, "fd_scenes"]
    assert values["precision"] == expected[12, 1.5, "precision"]
    assert values["psnr"] == expected[24, None, "psnr"]
    assert values["rfd"] == expected[24, None, "rfd_scenes"]
    assert "ntp_loss" not in values, "nothing was logged at that step"
    last = results.measured("tiny-gear-s0", "tiny", Scoring(100))
    assert last["ntp_loss"] < 5, "the value in the log, not that of the evaluation"
    assert last["predictable"] == pytest.approx(last["usage_entropy"] - last["ntp_loss"])
    assert "fd" not in results.measured("tiny-gear-s0", "tiny", Scoring(99)), (
        "another number of samples is another score"
    )
    table = results.quality("tiny-gear-s[0]", Scoring(100), steps=(12, 24), scales=(1.0, 2.0))
    assert set(zip(table.step, table.cfg_scale)) == {(12, 1.0), (24, 1.0), (24, 2.0)}
    lacks = "^no run 'tiny-gear-s0' with scores of "
    for arguments, message in (
        (
            (7,),
            (
                "7 samples at step 24, guidance 1: gear evaluate tiny-gear-s0 --network scenes "
                "--both --count 7"
            ),
        ),
        ((100, (6, 24)), "100 samples at step 6, guidance 1: .*--steps 6"),
        ((100, (), (1.0, 9.0)), "100 samples at step 24, guidance 9: .*--sweep cfg_scale=1,9"),
    ):
        with pytest.raises(UserError, match=lacks + message):
            results.quality("tiny-gear-s0", Scoring(arguments[0]), *arguments[1:])
    record_study("size", seeds=(0,))
    table = results.by_size("tiny", (0,), Scoring(100), (1.0, 2.0))
    assert (
        len(table.run.unique()) == 6
        and set(table.width) == {16, 32, 48}
        and set(table.role) == {"gear", "baseline"}
    )
    with pytest.raises(
        UserError,
        match="no run ('tiny-[^']*', ){5}'tiny-[^']*' with .* evaluate (tiny-[^ ]* ){6}--network",
    ):
        results.by_size("tiny", (0,), Scoring(100), (1.0, 9.0))


@pytest.mark.parametrize(
    "other", ({"reference_count": 50, "images": 50}, {"reference": "zoo.zip", "split": "train"})
)
def test_scores_of_another_protocol_do_not_count(other):
    """They count neither beside scores of the right protocol, in either order, nor without these."""
    run = record_scored("tiny-gear-s0", recipe("tiny-gear-s0"))
    right = results.measured("tiny-gear-s0", "tiny", Scoring(100))
    records = json.loads((run.path / "metrics.json").read_text())
    wrong = [r | {"value": -1.0, "protocol": r["protocol"] | other} for r in records]
    for both in (records + wrong, wrong + records):
        (run.path / "metrics.json").write_text(json.dumps(both))
        assert results.measured("tiny-gear-s0", "tiny", Scoring(100)) == right
    (run.path / "metrics.json").write_text(json.dumps(wrong))
    assert not results.SCORED & results.measured("tiny-gear-s0", "tiny", Scoring(100)).keys()


def test_a_missing_or_unscored_run_is_named():
    record_study("depth")
    assert len(results.results("depth", "tiny", scoring=Scoring(100))) > 50
    shutil.rmtree(runs_dir() / "tiny-joint-s1-tap-2")
    (runs_dir() / "tiny-llamagen-repa-s0" / "metrics.json").unlink()
    with pytest.raises(UserError) as error:
        results.results("depth", "tiny", scoring=Scoring(100))
    message = (
        "needs tiny-llamagen-repa-s0, tiny-joint-s1-tap-2, trained and scored: gear sweep depth "
        "--preset tiny --seeds 0,1,2"
    )
    assert f"{message} --count 100" in str(error.value)


def test_a_table_of_means_and_spreads():
    record_study("depth")
    summary = results.summary(results.results("depth", "tiny", scoring=Scoring(100)))
    assert summary.loc[("layer 1 of 3", "gear"), "Fréchet distance"].count("+-") == 1


def test_resized_samples_are_scores_of_their_own():
    """Scores of resized samples and of samples at their own size do not replace each other."""
    config = change(recipe("tiny-joint-s0"), dict(data=dict(image_size=48)))
    run = record_scored("tiny-joint-s0", config)
    plain = results.measured("tiny-joint-s0", "tiny", Scoring(100))
    assert "fd" not in results.measured("tiny-joint-s0", "tiny", Scoring(100, sample_size=32))
    records = json.loads((run.path / "metrics.json").read_text())
    resized = [
        r | {"value": 99.0, "protocol": r["protocol"] | {"samples_resized": 32}}
        for r in records
        if "cfg_scale" in r["protocol"]
    ]
    (run.path / "metrics.json").write_text(json.dumps(records + resized))
    assert results.measured("tiny-joint-s0", "tiny", Scoring(100)) == plain
    assert results.measured("tiny-joint-s0", "tiny", Scoring(100, sample_size=32))["fd"] == 99
    same = results.measured("tiny-joint-s0", "tiny", Scoring(100, sample_size=48))
    assert same == plain, "samples that have the requested size are not resized"


def test_scores_against_a_reference_are_read_back():
    """Scores against a reference are found by its file name, apart from those against the run's
    training images.
    """
    run = record_scored("tiny-joint-s0", recipe("tiny-joint-s0"))
    scoring = Scoring(100, reference="/data/adm.npz")
    assert "fd" not in results.measured("tiny-joint-s0", "tiny", scoring)
    records = json.loads((run.path / "metrics.json").read_text())
    for entry in records:
        if entry["metric"] == "fd_scenes":
            protocol = entry["protocol"] | {"reference": "adm.npz", "reference_count": 10_000}
            records = [*records, entry | {"value": 7.0, "protocol": protocol}]
    (run.path / "metrics.json").write_text(json.dumps(records))
    assert results.measured("tiny-joint-s0", "tiny", scoring)["fd"] == 7
    assert results.measured("tiny-joint-s0", "tiny", Scoring(100))["fd"] != 7
    words = results.scoring_words("tiny", run.config, scoring)
    assert words == [
        "--network", "scenes", "--both", "--count", "100", "--reference", "/data/adm.npz",
    ]  # fmt: skip
    with pytest.raises(
        UserError, match="gear sweep depth .* --count 100 --reference /data/adm.npz"
    ):
        results.results("depth", "tiny", scoring=scoring)


def test_a_run_of_another_step_does_not_count():
    config = recipe("tiny-gear-s0")
    run = record_scored("tiny-gear-s0", config)
    Run.create(run.name, run.config | {"steps": 999})
    assert not results.measured("tiny-gear-s0", "tiny", Scoring(100))


def test_a_source_with_fewer_images_gives_all_it_has():
    """The validation split of `tiny` has 128 images: scores of 128 count, scores of 127 do not."""
    run = record_scored("tiny-gear-s0", recipe("tiny-gear-s0"))
    assert {"fd", "psnr"} <= results.measured("tiny-gear-s0", "tiny", Scoring(100)).keys()
    records = json.loads((run.path / "metrics.json").read_text())
    assert {r["protocol"]["images"] for r in records if r["metric"] == "psnr"} == {128}
    for r in records:
        r["protocol"] |= {"images": 127} if "images" in r["protocol"] else {}
    (run.path / "metrics.json").write_text(json.dumps(records))
    assert "psnr" not in results.measured("tiny-gear-s0", "tiny", Scoring(100))


def test_images_are_counted_from_the_scores():
    runs = [record_scored(name, recipe(name)) for name in ("tiny-gear-s0", "scenes-gear-s0")]
    assert results.counted(runs[:1]) == ("2000", "128") and results.counted(runs) == (
        "2000",
        "128 and 2000",
    )


def test_rate_and_distortion_by_hand(home):
    """64 tokens of log 2 nats are 64 bits; a run of 16 px has a quarter of the tokens."""
    config = recipe("tiny-gear-s0")
    run = Run.create("tiny-gear-s0", to_dict(config))
    run.append({"step": 12, "loss": 1.0})
    run.append({"step": 24, "val/ntp_loss": math.log(2), "val/psnr": 20.5})
    table = results.rate_distortion("tiny-gear-s0")
    assert table.to_dict("records") == [
        {"run": "tiny-gear-s0", "seed": 0, "step": 24, "bits": pytest.approx(64), "psnr": 20.5}
    ]
    small = to_dict(replace(config, data=replace(config.data, image_size=16)))
    assert math.prod(token_grid(small)) == 16
    assert results.rate_distortion([]).empty


def test_what_the_detector_said_is_a_table(home):
    run = record_scored("tiny-gear-s0", recipe("tiny-gear-s0"))
    assert judge.judged([run]).empty
    record_judged(run)
    table = judge.judged("tiny-gear-s0")
    assert set(table.of) == {"samples", "reconstructions"}
    assert set(table.metric) == {*judge.ATOMS, "fd"}
    at_scale = table[(table.step == 24) & (table.cfg_scale == 3) & (table.metric == "class")]
    expected = [
        r["value"]
        for r in run.scores()
        if r["metric"] == "judge_class"
        and r["protocol"] == {"step": 24, "cfg_scale": 3.0, "of": "samples"}
    ]
    assert at_scale.value.tolist() == expected and len(expected) == 1
    assert table[table.of == "reconstructions"].cfg_scale.isna().all()


def test_code_lengths_are_those_of_the_tokenizer(tiny):
    """A generator's is its tokenizer's; without weights and without the table there is none."""
    table = results.code_lengths([Run.open("tiny"), Run.open("tiny-joint")], images=64)
    own = nats_per_image(code_length(Run.open("tiny-joint"), 64))
    assert table.nats.tolist() == [own, own] and table.run.tolist() == ["tiny", "tiny-joint"]
    orphan = record_scored("tiny-gear-s0", recipe("tiny-gear-s0"))
    assert results.code_lengths([orphan], images=64).nats.isna().all()
