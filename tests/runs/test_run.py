"""A run directory keeps its files complete, and reports missing and damaged ones."""

import json
import math
import os

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from gear.__main__ import main
from gear.config import MissingRuns, UserError, config_hash
from gear.runs.folder import runs_dir
from gear.runs.run import Run, load_runs, open_runs, run_names

CONFIG = {"recipe": "r", "seed": 0, "steps": 4, "tau": 0.1, "version": "1"}


def test_open_suggests_the_nearest_name():
    Run.create("scenes-gear-s0", CONFIG)
    with pytest.raises(
        MissingRuns, match="(?s)^no run 'scenes-gaer-s0'.*Did you mean 'scenes-gear-s0'"
    ) as error:
        Run.open("scenes-gaer-s0")
    assert (error.value.runs, error.value.command) == (
        ["scenes-gaer-s0"],
        "gear train scenes-gaer-s0",
    )


def test_another_config_under_the_same_name_is_an_error_that_names_the_fields():
    run = Run.create("r", CONFIG)
    run.check_config(CONFIG | {"version": "2"})  # the version does not determine results
    with pytest.raises(UserError, match=r"tau: 0.1 -> 0.2"):
        run.check_config(CONFIG | {"tau": 0.2})
    run.check_config(
        CONFIG | {"new": 1}, complete=lambda old: {"new": 1} | old
    )  # a configuration of a version without the field `new`
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
    assert (run.path / "metrics.jsonl").read_text() == "".join(
        json.dumps({"step": s, "loss": s / 3}) + "\n" for s in (1, 2)
    )


def test_checkpoint_round_trip_keeps_the_newest_two():
    run = Run.create("r", CONFIG)
    for step in (1, 2, 3):
        run.save_checkpoint(
            step, {"networks": {"a.w": torch.full((2,), float(step))}}, {"step": step}
        )
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
    with pytest.raises(MissingRuns, match="^run 'r' has no weights. Train it: gear train r\n"):
        Run.create("r", CONFIG).load_checkpoint("networks")


def test_table_is_computed_once_and_again_when_its_parameters_change():
    run = Run.create("r", CONFIG)
    calls = []

    def compute():
        calls.append(1)
        return pd.DataFrame({"x": [1.0, 2.0]})

    first = run.table("t", {"k": 10}, compute)
    assert run.table("t", {"k": 10}, compute).equals(first) and len(calls) == 1
    run.table("t", {"k": 5}, compute)
    assert len(calls) == 2
    run.append({"step": 7, "loss": 0.0})  # training continued: the table is of another step
    run.table("t", {"k": 5}, compute)
    assert len(calls) == 3


def test_load_runs_is_tidy():
    for seed in (0, 1):
        Run.create(f"r-s{seed}", CONFIG | {"seed": seed}).append(
            {"step": 1, "loss": 0.5 + seed, "psnr": 20.0}
        )
    table = load_runs("r-s*")
    assert (
        list(table.columns) == ["run", "recipe", "seed", "step", "metric", "value"]
        and len(table) == 4
    )
    assert table.query("metric == 'loss' and seed == 1").value.item() == 1.5
    assert [run.name for run in open_runs("r-s*")] == ["r-s0", "r-s1"]
    with pytest.raises(UserError, match="no run 'q'"):
        load_runs("q")


def test_a_table_cut_short_is_computed_again_and_other_parameters_do_not_replace_it():
    run = Run.create("r", {"recipe": "r", "steps": 1})
    table_of = lambda value: lambda: pd.DataFrame({"a": [value]})  # noqa: E731
    run.table("t", {"n": 1}, table_of(1))
    assert run.table("t", {"n": 2}, table_of(2)).a.item() == 2  # computed, but not kept
    assert run.table("t", {"n": 1}, table_of(9)).a.item() == 1
    path = run.path / "analysis" / "t.parquet"
    path.write_bytes(path.read_bytes()[:50])
    assert (
        run.table("t", {"n": 1}, table_of(3)).a.item() == 3 and pd.read_parquet(path).a.item() == 3
    )


def test_a_file_that_is_no_configuration_is_reported():
    run = Run.create("r", {})
    with pytest.raises(
        UserError,
        match="config.json cannot be read .it is not the configuration of a run.*Restore it",
    ):
        _ = run.config


FOREIGN = {  # kind of a folder that is no run: (function that makes it, part of the message)
    "of something else": (
        lambda p: (p / "config.json").write_text('{"model_type": "vit"}'),
        "has a recipe and steps",
    ),
    "steps in words": (
        lambda p: (p / "config.json").write_text('{"recipe": "r", "steps": "4"}'),
        "'steps' is '4'",
    ),
    "a list": (lambda p: (p / "config.json").write_text("[1]"), "has a recipe and steps"),
    "nothing": (lambda p: (p / "config.json").write_text("null"), "has a recipe and steps"),
    "empty": (lambda p: (p / "config.json").touch(), "Expecting value"),
    "no JSON": (lambda p: (p / "config.json").write_text("recipe: r"), "Expecting value"),
    "no text": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\0"), "is not in UTF-16-LE"),
    "nested without end": (
        lambda p: (p / "config.json").write_text("[" * 100_000),
        "nested too deeply",
    ),
    "a folder": (lambda p: (p / "config.json").mkdir(), "Is a directory"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_is_no_run_does_not_hide_runs(kind, home, capsys):
    """The folder is reported once, without the advice to remove it, because it is not gear's;
    opening it by name is an error.
    """
    spoil, message = FOREIGN[kind]
    for name in ("a", "z"):
        Run.create(name, CONFIG).append({"step": 1, "loss": 0.5})
    (runs_dir() / "m").mkdir()
    spoil(runs_dir() / "m")
    for _ in range(2):
        assert (
            run_names()
            == [run.name for run in open_runs("*")]
            == list(load_runs().run.unique())
            == ["a", "z"]
        )
    output = capsys.readouterr().err
    assert (
        output.count(f"{runs_dir() / 'm'}: not a run of gear (config.json: ") == 1
        and message in output
        and "left out" in output
    )
    for open_it in (Run.open, open_runs, load_runs):
        with pytest.raises(UserError, match="config.json cannot be read") as error:
            open_it("m")
        assert message in str(error.value) and "remove" not in str(error.value)


def test_other_files_among_the_runs_are_ignored(home, capsys):
    run = Run.create("a", CONFIG)
    (runs_dir() / "file").touch()
    (runs_dir() / "broken").symlink_to("nowhere")
    (runs_dir() / "empty").mkdir()
    assert run_names() == ["a"] and capsys.readouterr().err == ""
    Run.create("b", CONFIG)
    (runs_dir() / "b" / "metrics.jsonl").mkdir()
    assert (
        run_names() == ["a"]
        and "b: not a run of gear (metrics.jsonl: it is a folder)" in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="metrics.jsonl cannot be read .Is a directory"):
        Run.open("b").metrics()
    for foreign in ("old", "best", ".0000009.tmp"):
        (run.path / "checkpoints" / foreign).mkdir(parents=True)
    (run.path / "checkpoints" / "0000007").touch()
    assert run.checkpoint_steps() == [] and run.step == 0


NAMES = "a b,a[1],x*y,what?,-s0,it's,ä日,{x},two\nlines,$HOME,5%,#,~".split(",")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_may_have_any_name(name, home):
    """An exact name takes precedence over its matches as a pattern."""
    for other_name in ("a1", "xzy", "whats", name):
        Run.create(other_name, CONFIG).append({"step": 1, "loss": 0.5})
    assert (
        [run.name for run in open_runs(name)]
        == run_names(name)
        == list(load_runs(name).run.unique())
        == [name]
    )
    assert name in run_names() and len(run_names()) == 4
    run = Run.open(name)
    run.save_checkpoint(1, {"networks": {"a.w": torch.ones(2)}}, {"step": 1})
    assert torch.equal(run.load_checkpoint("networks")["a.w"], torch.ones(2))


def test_a_list_of_digits_requires_each_run_unless_a_run_has_that_name(home):
    for name in ("r-s0", "r-s1"):
        Run.create(name, CONFIG)
    assert [run.name for run in open_runs("r-s[10]")] == ["r-s1", "r-s0"]
    with pytest.raises(UserError, match="no run 'r-s2'"):
        open_runs("r-s[012]")
    Run.create("r-s[012]", CONFIG)
    assert [run.name for run in open_runs("r-s[012]")] == ["r-s[012]"]


@pytest.mark.parametrize("name", ("", ".", "..", "a/b", "/a", "a/", "n" * 256, "\udcff"))
def test_paths_and_invalid_names_are_refused(name, home):
    for use in (Run.open, lambda name: Run.create(name, CONFIG)):
        with pytest.raises(UserError, match="a run is opened by name"):
            use(name)
    assert list(home.iterdir()) == []


def test_a_folder_whose_name_is_no_utf8_is_reported(home, capsys):
    Run.create("a", CONFIG)
    os.rename(os.fsencode(runs_dir() / "a"), os.fsencode(runs_dir()) + b"/caf\xe9")
    assert run_names() == [] and "its name is no UTF-8" in capsys.readouterr().err


def test_the_path_of_runs_need_not_be_utf8(home, monkeypatch):
    """The safetensors library opens paths in UTF-8 alone; gear writes the same bytes elsewhere."""
    tensors = {"networks": {"a.w": torch.arange(6.0).view(2, 3), "a.b": torch.zeros(())}}
    written = []
    for folder in (b"plain", b"caf\xe9 {x} [0]*"):
        monkeypatch.setenv("GEAR_RUNS", os.fsdecode(os.fsencode(home) + b"/" + folder))
        run = Run.create("r", CONFIG)
        run.save_checkpoint(1, tensors, {"step": 1})
        assert torch.equal(
            run.load_checkpoint("networks")["a.w"], tensors["networks"]["a.w"]
        ) and run_names() == ["r"]
        written.append((run.path / "checkpoints" / "0000001" / "networks.safetensors").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_a_value_that_is_not_finite_is_not_logged(value, home):
    run = Run.create("r", CONFIG)
    run.append({"step": 1, "loss": 0.5})
    with pytest.raises(FloatingPointError, match=f"'val/psnr' is {value} at step 2"):
        run.append({"step": 2, "loss": 0.25, "val/psnr": value})
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def rewritten(path, metadata):
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | metadata), path)


@pytest.mark.parametrize(
    "damage",
    (
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: rewritten(path, {b"gear": b"{"}),
        lambda path: rewritten(path, {b"gear": b"[1]"}),
        lambda path: rewritten(path, {b"gear": b"\xff"}),
        lambda path: rewritten(path, {b"gear": b"[" * 100_000}),
        lambda path: rewritten(path, {b"pandas": b"{"}),
        lambda path: path.write_bytes(b"<html>"),
        lambda path: pd.DataFrame({"a": [7]}).to_parquet(path),
    ),
)
def test_a_damaged_table_is_computed_again(damage):
    run = Run.create("r", CONFIG)
    run.table("t", {"n": 1}, lambda: pd.DataFrame({"a": [1.5]}))
    damage(run.path / "analysis" / "t.parquet")
    assert run.table("t", {"n": 1}, lambda: pd.DataFrame({"a": [2.5]})).a.item() == 2.5
    assert run.table("t", {"n": 1}, lambda: pd.DataFrame({"a": [3.5]})).a.item() == 2.5


def test_a_bit_that_changed_in_a_table_is_noticed():
    run = Run.create("r", CONFIG)
    values = [float(i) for i in range(100)]
    run.table("t", {}, lambda: pd.DataFrame({"a": values}))
    path = run.path / "analysis" / "t.parquet"
    content = path.read_bytes()
    for i in range(4, content.index(b"pandas"), 7):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        assert run.table("t", {}, lambda: pd.DataFrame({"a": values})).a.tolist() == values, i
        path.write_bytes(content)


BAD_LINES = (
    "{",
    "[1]",
    "3",
    '"a"',
    "{}",
    '{"step": NaN}',
    '{"step": "2"}',
    '{"step": true}',
    '{"step": 1e3}',
    '{"step": -1e400}',
    f'{{"step": {10**30}}}',
    f'{{"step": 2, "loss": {10**400}}}',
    '{"step": 2, "loss": "low"}',
    '{"step": 2, "loss": [1]}',
    '{"step": 2, "\\ud800": 1}',
    "\0\0",
    "\xff",
    "[" * 100_000,
)


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_damaged_log_is_one_message_and_a_last_line_cut_short_is_no_fault(line):
    run = Run.create("r", CONFIG)
    path = run.path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + line.encode("latin-1") + b"\n")
    assert run.metrics().to_dict("list") == {"step": [1], "loss": [0.5]} and run.logged_step == 1
    path.write_bytes(path.read_bytes() + b'{"step": 3, "loss": 0.25}\n')
    for read in (run.metrics, lambda: run.logged_step, lambda: load_runs("r")):
        with pytest.raises(
            UserError,
            match="metrics.jsonl can be read up to step 1 only: line 2 is damaged: .* Restore the file",
        ):
            read()


def test_a_folder_in_place_of_a_file_is_reported():
    run = Run.create("r", CONFIG)
    for name, read in (("metrics.jsonl", run.metrics), ("config.json", lambda: run.config)):
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).mkdir()
        with pytest.raises(UserError, match=f"{name} cannot be read .*Is a directory"):
            read()


def test_a_log_with_a_byte_order_mark_is_read():
    run = Run.create("r", CONFIG)
    (run.path / "metrics.jsonl").write_bytes(
        b'\xef\xbb\xbf{"step": 1, "loss": NaN}\r\n{"step": 2, "loss": null}\r\n'
    )
    assert run.metrics().step.tolist() == [1, 2]


@pytest.mark.parametrize("encoding", ("utf-8", "utf-8-sig", "utf-16"))
def test_a_configuration_saved_by_an_editor_is_read(encoding):
    run = Run.create("r", CONFIG)
    path = run.path / "config.json"
    path.write_bytes(path.read_text().replace("\n", "\r\n").encode(encoding))
    assert run.config == CONFIG and run.config_hash == config_hash(
        {k: v for k, v in CONFIG.items() if k != "version"}
    )


WRONG_FIELDS = (
    dict(steps="4"),
    dict(steps=True),
    dict(steps=float("nan")),
    dict(steps=10**30),
    dict(recipe=None),
    dict(data=[]),
    dict(stage=3),
    dict(tokenizer="x"),
    dict(seed=1.5),
    dict(steps=0),
    dict(eval_images=-1),
)


@pytest.mark.parametrize("changes", WRONG_FIELDS, ids=str)
def test_a_field_of_another_type_or_range_is_reported(changes):
    (name,) = changes
    with pytest.raises(
        UserError,
        match=f"config.json cannot be read .it is not the configuration of a run: '{name}' is ",
    ):
        _ = Run.create("r", CONFIG | changes).config


def test_a_missing_field_is_named():
    run = Run.create("r", CONFIG | {"data": {"image_size": 32}})
    assert run.config["data"]["image_size"] == 32 and run.config.get("stage") is None
    for read, name in (
        (lambda: run.config["stage"], "stage"),
        (lambda: run.config["data"]["source"], "source"),
    ):
        with pytest.raises(UserError, match=f"config.json lacks '{name}': restore it"):
            read()


STATES = (
    "[",
    "null",
    "[" * 100_000,
    "\0",
    '{"meter": 3}',
    '{"meter": {"sums": 3, "counts": {}}}',
    '{"skipped": "no"}',
    '{"classes": 3}',
    '{"meter": {"sums": {"a": "b"}, "counts": {}}}',
)


@pytest.mark.parametrize("text", STATES, ids=range(len(STATES)))
def test_a_damaged_state_is_reported(text):
    run = Run.create("r", CONFIG)
    good = {
        "step": 1,
        "config": run.config_hash,
        "meter": {"sums": {"a": 1.0}, "counts": {"a": 1}},
        "skipped": 0,
    }
    run.save_checkpoint(1, {"networks": {"a.w": torch.zeros(1)}}, good)
    assert run.load_state() == good
    path = run.path / "checkpoints" / "0000001" / "state.json"
    path.write_text(json.dumps(good | json.loads(text)) if text.startswith("{") else text)
    with pytest.raises(UserError, match="state.json does not fit this run .*Remove the folder"):
        run.load_state()


def test_a_damaged_log_does_not_hide_other_runs(capsys):
    for name in ("a", "b"):
        Run.create(name, CONFIG).append({"step": 1, "loss": 0.5})
    (Run.open("b").path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    assert list(load_runs().run.unique()) == ["a"]
    assert (
        "left out: " in (message := capsys.readouterr().err)
        and "b/metrics.jsonl can be read up to step 1 only" in message
    )
    main(["runs"])
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["a", "1"],
        ["b", "?"],
    ]
    with pytest.raises(UserError, match="can be read up to step 1 only"):
        load_runs("b")
