"""A run directory keeps what it is given, whole, and says what it misses."""

import json

import pandas as pd
import pytest
import torch

from gear.config import UserError
from gear.run import Run, load_runs, open_runs

CONFIG = {"recipe": "r", "seed": 0, "steps": 4, "tau": 0.1, "version": "1"}


def test_open_suggests_the_nearest_name():
    Run.create("scenes-gear-s0", CONFIG)
    with pytest.raises(UserError, match="no run 'scenes-gaer-s0'.*Did you mean 'scenes-gear-s0'"):
        Run.open("scenes-gaer-s0")


def test_another_config_under_the_same_name_is_an_error_that_names_the_fields():
    run = Run.create("r", CONFIG)
    run.check_config(CONFIG | {"version": "2"})  # the library's version is not science
    with pytest.raises(UserError, match=r"tau: 0.1 -> 0.2"):
        run.check_config(CONFIG | {"tau": 0.2})
    run.check_config(CONFIG | {"new": 1}, complete=lambda old: {"new": 1} | old)  # written before `new` was a field
    assert Run.open("r").config["tau"] == 0.1


def test_rewind_drops_later_lines_and_a_line_cut_short():
    run = Run.create("r", CONFIG)
    for step in (1, 2, 3):
        run.append({"step": step, "loss": step / 3})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    run.table("t", {}, lambda: pd.DataFrame({"x": [1]}))
    run.rewind(2)
    assert not (run.path / "analysis").exists()
    assert (run.path / "metrics.jsonl").read_text() == "".join(json.dumps({"step": s, "loss": s / 3}) + "\n" for s in (1, 2))


def test_checkpoint_round_trip_keeps_the_newest_two():
    run = Run.create("r", CONFIG)
    for step in (1, 2, 3):
        run.save_checkpoint(step, {"networks": {"a.w": torch.full((2,), float(step))}}, {"step": step})
    assert run.checkpoint_steps() == [2, 3]
    assert torch.equal(run.load_checkpoint("networks")["a.w"], torch.full((2,), 3.0))
    assert torch.equal(run.load_checkpoint("networks", 2)["a.w"], torch.full((2,), 2.0))


def test_an_interrupted_save_is_no_checkpoint():
    run = Run.create("r", CONFIG)
    run.save_checkpoint(1, {"networks": {"a.w": torch.zeros(1)}}, {"step": 1})
    (run.path / "checkpoints" / ".0000002.tmp").mkdir()
    assert run.checkpoint_steps() == [1]
    run.save_checkpoint(2, {"networks": {"a.w": torch.ones(1)}}, {"step": 2})
    assert run.checkpoint_steps() == [1, 2]


def test_a_truncated_checkpoint_says_what_to_do():
    run = Run.create("r", CONFIG)
    run.save_checkpoint(1, {"networks": {"a.w": torch.zeros(64)}}, {"step": 1})
    path = run.path / "checkpoints" / "0000001" / "networks.safetensors"
    path.write_bytes(path.read_bytes()[:-32])
    with pytest.raises(UserError, match="networks.safetensors cannot be read.*Remove the folder"):
        run.load_checkpoint("networks")


def test_a_run_without_weights_says_how_to_get_them():
    with pytest.raises(UserError, match="has no weights.*gear train r"):
        Run.create("r", CONFIG).load_checkpoint("networks")


def test_table_is_computed_once_and_again_when_its_parameters_change():
    run, calls = Run.create("r", CONFIG), []

    def compute():
        calls.append(1)
        return pd.DataFrame({"x": [1.0, 2.0]})

    first = run.table("t", {"k": 10}, compute)
    assert run.table("t", {"k": 10}, compute).equals(first) and len(calls) == 1
    run.table("t", {"k": 5}, compute)
    assert len(calls) == 2
    run.append({"step": 7, "loss": 0.0})  # the run went on: the table no longer fits
    run.table("t", {"k": 5}, compute)
    assert len(calls) == 3


def test_load_runs_is_tidy():
    for seed in (0, 1):
        Run.create(f"r-s{seed}", CONFIG | {"seed": seed}).append({"step": 1, "loss": 0.5 + seed, "psnr": 20.0})
    table = load_runs("r-s*")
    assert list(table.columns) == ["run", "recipe", "seed", "step", "metric", "value"] and len(table) == 4
    assert table.query("metric == 'loss' and seed == 1").value.item() == 1.5
    assert [run.name for run in open_runs("r-s*")] == ["r-s0", "r-s1"]
    with pytest.raises(UserError, match="no run 'q'"):
        load_runs("q")


def test_a_table_cut_short_is_made_again_and_other_parameters_do_not_replace_it():
    run = Run.create("r", {"recipe": "r", "steps": 1})
    made = lambda value: lambda: pd.DataFrame({"a": [value]})  # noqa: E731
    run.table("t", {"n": 1}, made(1))
    assert run.table("t", {"n": 2}, made(2)).a.item() == 2  # and not kept: the first is still there
    assert run.table("t", {"n": 1}, made(9)).a.item() == 1
    path = run.path / "analysis" / "t.parquet"
    path.write_bytes(path.read_bytes()[:50])
    assert run.table("t", {"n": 1}, made(3)).a.item() == 3 and pd.read_parquet(path).a.item() == 3


def test_what_is_no_configuration_is_said():
    run = Run.create("r", {})
    with pytest.raises(UserError, match="config.json cannot be read .it is not the configuration of a run.*Restore it"):
        _ = run.config
