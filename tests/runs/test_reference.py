"""A record without weights returns the same values as its run, to the last bit; methods that need
weights raise a message with the command to train them.
"""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers import record_scored
from PIL import Image

import gear
from gear.__main__ import main
from gear.config import MissingRuns, UserError
from gear.evaluation.evaluate import evaluate_run, metrics_table, scores
from gear.experiments.recipes import recipe
from gear.figures import panel_rows, sheet_rows
from gear.interactive import monitor
from gear.runs.folder import runs_dir
from gear.runs.reference import Record, reference
from gear.runs.run import Run, load_runs, open_runs, run_names

VALUES = [0.1, 1 / 3, -1e-310, 1e300, np.nextafter(1, 2), float("nan")]


def pack(*words):
    main(["pack", str(runs_dir() / "reference"), *words])


@pytest.fixture
def runs(home):
    """Create two finished runs with everything that a record keeps, and an unfinished one.

    Returns the values that the finished runs give, {run: {name: value}}.
    """
    values_of_runs = {}
    for seed in (0, 1):
        run = record_scored(f"tiny-gear-s{seed}", recipe(f"tiny-gear-s{seed}"))
        run.append({"step": 30, "b": 1 / 3 + seed, "dead": 0} | ({"a": 0.1} if seed else {}))
        run.append({"step": 30, "late": 1e-310})
        run.table(
            "layer_profile",
            {"k": 5},
            lambda seed=seed: pd.DataFrame({"layer": range(6), "x": VALUES, "y": VALUES}),
        )
        (run.path / "samples").mkdir()
        Image.new("RGB", (12 * 34 + 2, 70)).save(run.path / "samples" / "0000024.png")
        values_of_runs[run.name] = {
            "config": run.config,
            "hash": run.config_hash,
            "step": run.step,
            "metrics": run.metrics(),
            "scores": run.scores(),
            "score_table": scores(run),
            "log": load_runs(run.name),
            "table": run.table("layer_profile", {"k": 5}, None),
        }
    Run.create("tiny-half", {"recipe": "tiny-half", "seed": 0, "steps": 9}).append(
        {"step": 8, "b": 1.0}
    )
    return values_of_runs


def only_records(*words):
    pack(*words)
    for folder in runs_dir().iterdir():
        if folder.name != "reference":
            shutil.rmtree(folder)


def test_a_record_reads_as_its_run_did_to_the_last_bit(runs):
    only_records()
    assert (
        run_names()
        == [run.name for run in open_runs("tiny-gear-s[01]")]
        == ["tiny-gear-s0", "tiny-gear-s1"]
    )
    for name, run in runs.items():
        record = gear.Run.open(name)
        assert isinstance(record, Record) and not isinstance(record, Run) and record.name == name
        assert (record.config, record.config_hash, record.step) == (
            run["config"],
            run["hash"],
            run["step"],
        )
        pd.testing.assert_frame_equal(
            record.metrics(), run["metrics"], check_exact=True, check_dtype=False
        )
        pd.testing.assert_frame_equal(load_runs(name), run["log"], check_exact=True)
        pd.testing.assert_frame_equal(scores(record), run["score_table"], check_exact=True)
        table = record.table("layer_profile", {"k": 5}, lambda: pytest.fail("the record holds it"))
        pd.testing.assert_frame_equal(table, run["table"], check_exact=True)
        assert (
            record.scores() == run["scores"]
            and record.checkpoint_steps() == []
            and record.metrics("timing.jsonl").empty
        )
    assert metrics_table(open_runs("tiny*"))[0].index.tolist() == list(runs)


def test_the_folder_holds_a_few_files_and_an_index_of_the_runs(runs):
    pack("tiny-gear-s*")
    folder = runs_dir() / "reference"
    assert {path.name for path in folder.iterdir()} == {
        "runs.csv", "configs.json", "metrics.parquet", "scores.parquet", "layer_profile.parquet",
    }  # fmt: skip
    index = pd.read_csv(folder / "runs.csv", keep_default_na=False)
    assert index.columns.tolist() == ["run", "preset", "method", "cell", "seed", "parent", "config"]
    assert index.iloc[1].tolist()[:6] == ["tiny-gear-s1", "tiny", "gear", "", 1, "tiny-joint-s1"]
    assert index.config.tolist() == [run["hash"] for run in runs.values()]


def test_a_score_keeps_its_interval(runs):
    path = runs_dir() / "tiny-gear-s0" / "metrics.json"
    records = json.loads(path.read_text())
    records[0]["interval"] = [0.1, 1 / 3]
    path.write_text(json.dumps(records))
    only_records()
    assert Run.open("tiny-gear-s0").scores() == records


def test_a_table_with_other_parameters_is_computed_and_not_kept(runs):
    only_records()
    before = sorted(path.name for path in runs_dir().rglob("*"))
    table = Run.open("tiny-gear-s0").table(
        "layer_profile", {"k": 6}, lambda: pd.DataFrame({"x": [7.0]})
    )
    assert (
        table.x.tolist() == [7.0] and sorted(path.name for path in runs_dir().rglob("*")) == before
    )


def test_functions_that_need_weights_raise_and_leave_no_files(runs):
    only_records()
    before = sorted(runs_dir().rglob("*"))
    for use in (gear.load_tokenizer, gear.load_generator, evaluate_run):
        with pytest.raises(
            MissingRuns,
            match="^'tiny-gear-s0' is a record without weights. Train it: gear train tiny-gear-s0$",
        ):
            use("tiny-gear-s0")
    assert sorted(runs_dir().rglob("*")) == before


def test_a_run_takes_precedence_over_the_record_of_its_name(runs):
    pack("tiny-gear-s1")
    assert isinstance(Run.open("tiny-gear-s1"), Run) and run_names("tiny-gear*") == list(runs)
    shutil.rmtree(runs_dir() / "tiny-gear-s1")
    assert isinstance(Run.open("tiny-gear-s1"), Record) and run_names("tiny-gear*") == list(runs)


def test_only_the_requested_panels_are_packed(runs):
    only_records("--panels", "tiny-gear-s1")
    with_panel = Run.open("tiny-gear-s1")
    without = Run.open("tiny-gear-s0")
    assert list(with_panel.panels()) == [24] and without.panels() == {}
    assert [row.shape for row in panel_rows(with_panel)] == [(12, 32, 32, 3)] * 2
    with pytest.raises(
        UserError, match="'tiny-gear-s0' has no sample panel of step 0: it has none"
    ):
        panel_rows(without)


def test_the_monitor_shows_records(runs):
    only_records()
    assert monitor.overview(["tiny-gear-s0"]).weights.tolist() == [False]
    assert (
        monitor.metrics("tiny-gear-s0").step.tolist()
        == runs["tiny-gear-s0"]["metrics"].step.tolist()
    )
    progress = monitor.progress(Run.open("tiny-gear-s0"))
    assert progress["step"] == 30 and not monitor.is_training(Run.open("tiny-gear-s0"))


def test_a_pack_that_is_written_again_is_read_again_and_replaces_the_old_one(runs, capsys):
    pack("--panels", "tiny-gear-s1")
    assert reference().names == ["tiny-gear-s0", "tiny-gear-s1"] and len(reference().panels) == 1
    pack("tiny-gear-s0")
    index = runs_dir() / "reference" / "runs.csv"
    os.utime(index, ns=(1, index.stat().st_mtime_ns + 1))
    assert reference().names == ["tiny-gear-s0"] and reference().panels == {}
    assert "1 records" in capsys.readouterr().out


def test_runs_are_added_to_an_earlier_pack(runs):
    """Records stay as they are, with their pictures; a run replaces the record of its name."""
    sheet = Run.open("tiny-gear-s0").path / "sheets" / "0000024-1.5.png"
    sheet.parent.mkdir()
    Image.new("RGB", (12 * 34 + 2, 70), (9, 9, 9)).save(sheet)
    only_records("tiny-gear-s0", "--panels", "tiny-gear-s0")
    record = Run.open("tiny-gear-s0")
    assert isinstance(record, Record) and list(record.sheets()) == [(24, 1.5)]
    second = record_scored("tiny-gear-s1", recipe("tiny-gear-s1"))
    pack("--add")
    assert reference().names == ["tiny-gear-s0", "tiny-gear-s1"]
    shutil.rmtree(second.path)
    for name in ("tiny-gear-s0", "tiny-gear-s1"):
        assert len(Run.open(name).scores()) > 5
    record, values = Run.open("tiny-gear-s0"), runs["tiny-gear-s0"]
    assert record.config_hash == values["hash"] and record.scores() == values["scores"]
    pd.testing.assert_frame_equal(record.metrics(), values["metrics"])
    pd.testing.assert_frame_equal(record.table("layer_profile", {"k": 5}, None), values["table"])
    assert list(record.panels()) == [24]
    assert [row.shape for row in sheet_rows(record, 24, 1.5)] == [(12, 32, 32, 3)] * 2
    assert sheet_rows(record, 24, 1.5)[0].max() == pytest.approx(9 / 255, abs=1e-6)
    with pytest.raises(UserError, match="at guidance 2: it has 24 at 1.5. Make it: gear evaluate"):
        sheet_rows(record, 24, 2.0)

    again = record_scored("tiny-gear-s0", recipe("tiny-gear-s0"), effect=-3.0)
    new_scores = again.scores()
    pack("tiny-gear-s0", "--add")
    shutil.rmtree(again.path)
    assert Run.open("tiny-gear-s0").scores() == new_scores != values["scores"]
    pack_names = reference().names
    assert pack_names == ["tiny-gear-s0", "tiny-gear-s1"]


@pytest.mark.parametrize(
    "file",
    ("runs.csv", "configs.json", "metrics.parquet", "scores.parquet", "layer_profile.parquet"),
)
def test_a_damaged_file_of_the_pack_is_one_message(file, runs):
    only_records()
    path = runs_dir() / "reference" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\xff\0")
    with pytest.raises(UserError, match=f"{file} cannot be read .*git checkout.*make reference"):
        run = Run.open("tiny-gear-s0")
        run.config, run.metrics(), run.scores(), run.table("layer_profile", {"k": 5}, lambda: None)


def test_packing_nothing_is_an_error(runs, capsys):
    for words, message in (
        (["pack"], "name a folder"),
        (["pack", "x", "tiny-half"], "none of these runs is trained to its end"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(UserError, match="'reference' is no name of a run"):
        Run.open("reference")
