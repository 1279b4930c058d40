"""The panels of the notebook `runs`: listing, comparing and following runs, on runs without
weights.
"""

import asyncio
import json
import math
import os
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from gear.config import UserError
from gear.interactive import monitor
from gear.interactive.widgets import Table
from gear.runs.run import Run

BASE = {
    "recipe": "a",
    "stage": "generator",
    "seed": 0,
    "steps": 10,
    "batch_size": 4,
    "objective": {"tau": 0.02, "bridge": "soft"},
}


def make(name, steps=10, losses=("ntp_loss", "align_loss"), **changes):
    """Create a run that has logged `steps` steps at 8 images/s."""
    run = Run.create(name, BASE | changes)
    for step in range(1, steps + 1):
        run.append(
            {
                "step": step,
                **{loss: 1 / step for loss in losses},
                **({"val/ntp_loss": 2 / step} if step % 5 == 0 else {}),
            }
        )
        run.append({"step": step, "seconds": 0.5, "images_per_second": 8.0}, "timing.jsonl")
    return run


@pytest.fixture
def runs(home):
    make("a-s0")
    make("a-s1", seed=1)
    make("b-s0", recipe="b", stage="joint", objective={"tau": 0.1, "bridge": "soft"})
    make("c-s0", recipe="c", stage="tokenizer", losses=("recon_loss",))


def age(run, seconds):
    """Set the times of a run's files to `seconds` ago."""
    for path in run.path.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def test_progress_states_speed_and_time_left(home):
    run = make("a", steps=4)
    state = monitor.progress(run)
    assert state["step"] == 4 and state["steps"] == 10 and state["speed"] == pytest.approx(8)
    assert state["seconds_left"] == pytest.approx(6 * 4 / 8) and 0 <= state["seconds_since"] < 60
    assert monitor.describe(state).startswith(
        "step 4 of 10: 8 images/s, 0:03 left, last line 0 s ago"
    )


def test_speed_is_averaged_over_time_and_not_over_lines(home):
    run = Run.create("a", BASE)
    run.append({"step": 1, "ntp_loss": 1.0})
    run.append({"step": 1, "seconds": 9.0, "images_per_second": 10.0}, "timing.jsonl")
    run.append({"step": 2, "seconds": 1.0, "images_per_second": 100.0}, "timing.jsonl")
    assert monitor.progress(run)["speed"] == pytest.approx(190 / 10)


def test_a_tracked_run_has_no_speed_and_is_finished(home):
    run = make("a")
    (run.path / "timing.jsonl").unlink()
    state = monitor.progress(run)
    assert math.isnan(state["speed"]) and monitor.describe(state) == "step 10 of 10: finished"


def test_only_a_recent_unfinished_run_is_training(home):
    unfinished, finished = make("unfinished", steps=4), make("finished")
    assert monitor.is_training(unfinished) and not monitor.is_training(finished)
    age(unfinished, 2 * monitor.ALIVE)
    assert not monitor.is_training(unfinished)


def test_only_differing_fields_are_listed(runs):
    table = monitor.differing(["a-s0", "b-s0"])
    assert table.index.tolist() == ["objective.tau", "recipe", "stage"]
    assert table.loc["objective.tau"].tolist() == [0.02, 0.1]
    make("old", extra={"field": 1})
    assert monitor.differing(["a-s0", "old"]).loc["extra.field"].tolist() == ["", 1]
    assert monitor.differing([]).empty and monitor.differing(["a-s0"]).empty


def test_smoothing_averages_neighbours_in_steps():
    steps, values = np.arange(10.0), np.arange(10.0) ** 2
    assert np.allclose(monitor.smoothed(steps, values, 0), values)
    assert np.allclose(monitor.smoothed(steps, values, 2)[1:-1], values[1:-1] + 2 / 3)
    assert np.allclose(monitor.smoothed(steps, np.ones(10), 7), 1)
    # points further apart than the window stay unchanged
    assert np.allclose(monitor.smoothed(steps * 100, values, 50), values)
    assert len(monitor.smoothed(np.array([]), np.array([]), 5)) == 0


def test_curves_are_drawn_as_logged_and_smoothed(runs):
    fig = monitor.draw_curves(
        ("a-s0", "a-s1", "b-s0", "c-s0"), "ntp_loss", "recon_loss", 3, "log value"
    )
    above, below = fig.axes
    thin, thick = above.lines[:2]
    assert (
        np.allclose(thin.get_ydata(), 1 / np.arange(1, 11))
        and (thick.get_ydata() != thin.get_ydata()).any()
    )
    assert [len(line.get_xdata()) for line in below.lines] == [0] * 6 + [10, 10]
    assert above.get_yscale() == "log" and above.get_title(loc="left") == "ntp_loss"
    seeds, recipes = (above.lines[1], above.lines[3]), (above.lines[1], above.lines[5])
    assert (
        seeds[0].get_color() == seeds[1].get_color()
        and seeds[0].get_linestyle() != seeds[1].get_linestyle()
    )
    assert recipes[0].get_color() != recipes[1].get_color()
    plt.close(fig)


def test_filters_list_runs_and_keep_the_choice(runs):
    plt.close("all")
    panel = monitor.Compare("*", "val/ntp_loss")
    names, filters = panel.controls["names"], panel.filters
    assert names.options == ("a-s0", "a-s1", "b-s0", "c-s0") and panel.picture.value
    names.value = ("a-s1", "b-s0")
    filters["pattern"].value = "*-s0"
    assert names.options == ("a-s0", "b-s0", "c-s0") and names.value == ("b-s0",)
    filters["stage"].value = "tokenizer"
    assert names.options == names.value == ("c-s0",)
    assert (
        "recon_loss" in panel.controls["below"].options
        and "ntp_loss" not in panel.controls["below"].options
    )
    filters["stage"].value = monitor.ALL
    filters["recipe"].value = "a"
    filters["pattern"].value = "*"
    assert names.options == ("a-s0", "a-s1")
    assert not plt.get_fignums()


def test_a_filter_that_matches_no_run_shows_a_message_and_recovers(runs):
    panel = monitor.Compare("*")
    panel.filters["pattern"].value = "nothing*"
    assert "No run is selected" in panel.message.value and panel.picture.layout.display == "none"
    panel.filters["pattern"].value = "a-*"
    assert panel.message.value == "" and panel.picture.layout.display is None


def test_one_change_draws_once_and_so_do_several_at_once(runs, monkeypatch):
    panel = monitor.Compare("a-*")
    calls = []
    draw = panel.draw
    monkeypatch.setattr(panel, "draw", lambda **values: (calls.append(values), draw(**values))[1])
    before = panel.picture.value
    panel.controls["smooth"].value = 5.0
    assert panel.picture.value != before and len(calls) == 1
    panel.filters["pattern"].value = "b-*"
    assert len(calls) == 2 and calls[-1]["names"] == ("b-s0",)


def test_a_table_follows_the_choice(runs):
    panel = monitor.Compare("*")
    table = Table(monitor.differing, panel.controls["names"])
    panel.controls["names"].value = ("a-s0", "a-s1")
    assert "seed" in table.value and "objective.tau" not in table.value
    panel.controls["names"].value = ("a-s0", "b-s0")
    assert (
        "objective.tau" in table.value and "objective.tau" in table._repr_mimebundle_()["text/html"]
    )


def test_overview_lists_settings_and_progress(runs):
    table = monitor.overview(("b-s0", "c-s0"))
    assert table.loc["b-s0"].to_dict() == {
        "stage": "joint", "recipe": "b", "seed": 0, "steps": 10, "step": 10, "weights": False,
    }  # fmt: skip


def test_a_run_shows_all_losses_and_its_newest_samples(home):
    run = make("a", losses=("ntp_loss", "align_loss", "recon_loss", "gan_loss"))
    (run.path / "samples").mkdir()
    for step, colour in ((5, 0), (10, 255)):
        Image.new("RGB", (12, 4), (colour,) * 3).save(run.path / "samples" / f"{step:07d}.png")
    fig = monitor.draw_run("a")
    assert [axis.get_title(loc="left") for axis in fig.axes[:4]] == [
        "ntp_loss",
        "align_loss",
        "recon_loss",
        "gan_loss",
    ]
    assert fig.axes[4].get_title(loc="left").startswith("step 10:")
    assert fig.axes[4].get_images()[0].get_array().min() == 255
    # only ntp_loss has a validation curve
    assert len(fig.axes[0].lines) == 2 and len(fig.axes[1].lines) == 1
    plt.close(fig)
    Run.create("fresh", BASE)
    with pytest.raises(UserError, match="no losses yet"):
        monitor.draw_run("fresh")


async def watched(panel, until):
    """Switch the toggle on and wait for a condition; return how often the event loop was free."""
    panel.toggle.value = True
    turns = 0
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
        turns += 1
    return turns


def test_following_shows_new_lines_and_ends_with_the_toggle(home, monkeypatch):
    monkeypatch.setattr(monitor, "SECONDS", 0.05)
    run = make("a", steps=3)

    async def scenario():
        panel = monitor.Follow("*")
        first = panel.picture.value
        assert panel.bar.value == 3 and panel.task is None
        await watched(panel, lambda: panel.task is not None)
        run.append({"step": 4, "ntp_loss": 0.2, "align_loss": 0.1})
        with open(run.path / "metrics.jsonl", "a") as out:
            out.write('{"step": 5, "ntp_l')  # half a line, as while another process writes it
        assert await watched(panel, lambda: panel.bar.value == 4) > 0
        await watched(panel, lambda: panel.picture.value != first)
        task = panel.task
        panel.toggle.value = False
        await asyncio.sleep(0)
        assert task.cancelled() and panel.task is None
        with open(run.path / "metrics.jsonl", "a") as out:
            out.write('oss": 0.1, "align_loss": 0.1}\n')
        await asyncio.sleep(0.2)
        assert panel.bar.value == 4  # the panel is no longer updated
        panel.look()
        assert panel.bar.value == 5

    asyncio.run(scenario())


def test_following_changes_to_the_run_that_is_training(home, monkeypatch):
    monkeypatch.setattr(monitor, "SECONDS", 0.05)
    parent = make("parent", steps=9)

    async def scenario():
        panel = monitor.Follow("*")
        await watched(panel, lambda: panel.controls["name"].value == "parent")
        parent.append({"step": 10, "ntp_loss": 0.1, "align_loss": 0.1})
        await watched(panel, lambda: "finished" in panel.status.value)
        make("child", steps=1)
        await watched(panel, lambda: panel.controls["name"].value == "child")
        panel.toggle.value = False

    asyncio.run(scenario())


def test_an_unchanged_run_is_not_drawn_again(home, monkeypatch):
    make("a")
    panel = monitor.Follow("*")
    names = []
    monkeypatch.setattr(panel, "draw", lambda name: names.append(name))
    panel.look()
    assert names == []


def test_following_waits_for_the_first_run(home):
    panel = monitor.Follow("scenes-*")
    assert "no run 'scenes-*'" in panel.message.value.replace("&#x27;", "'")
    assert "image/png" not in panel._repr_mimebundle_()
    make("scenes-a", steps=2)
    panel.look()
    assert panel.controls["name"].value == "scenes-a" and panel.message.value == ""


def test_metrics_are_read_again_when_their_file_has_grown(home):
    run = make("a", steps=2)
    assert monitor.metrics("a") is monitor.metrics("a") and len(monitor.metrics("a")) == 2
    run.append(json.loads('{"step": 3, "ntp_loss": 0.5}'))
    assert len(monitor.metrics("a")) == 3


def test_a_folder_that_is_no_run_is_ignored(home):
    for name in ("a", "b"):
        make(name)
    (home / "runs" / "vit").mkdir()
    (home / "runs" / "vit" / "config.json").write_text('{"model_type": "vit"}')
    assert list(monitor.overview(monitor.run_names()).index) == ["a", "b"]
    assert list(monitor.Compare().controls["names"].options) == ["a", "b"]
    assert sorted(monitor.Follow().controls["name"].options) == ["a", "b"]
