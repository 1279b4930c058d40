"""Figures are products: rounded numbers, provenance, no date, the same bytes."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gear import data, figures, load_tokenizer
from gear.config import UserError, from_dict
from gear.runs.run import Run

CONFIG = {
    "recipe": "r",
    "seed": 3,
    "steps": 20,
    "batch_size": 4,
    "data": {"source": "/a/b/pets/", "image_size": 32},
    "tokenizer": {"channel_mult": [1, 2, 2], "codebook_size": 64},
}


def draw(home, monkeypatch, folder):
    monkeypatch.setenv("GEAR_FIGURES", str(home / folder))
    run = Run.create("r", CONFIG)
    table = figures.rounded(pd.DataFrame({"x": [1, 2], "y": [1 / 3, 2 / 3]}))
    fig, axes = figures.panels("ab")
    axes[0].plot(table.x, table.y)
    figures.save(fig, "test", [run], table, n="2 points", interval="none", null="zero")
    return {
        str(p.relative_to(home / folder)): p.read_bytes()
        for p in (home / folder).rglob("*")
        if p.is_file()
    }


def test_rounding_keeps_six_significant_digits():
    table = figures.rounded(
        pd.DataFrame({"a": [123456.789, 0.000123456789, 0.0, np.nan, -9.87654321]})
    )
    assert (
        table.a.tolist()[:3] == [123457.0, 0.000123457, 0.0]
        and table.a[4] == -9.87654
        and np.isnan(table.a[3])
    )


def test_twice_the_same_bytes(home, monkeypatch):
    assert draw(home, monkeypatch, "one") == draw(home, monkeypatch, "two")


def test_provenance_names_runs_steps_and_hashes_and_no_date(home, monkeypatch):
    files = draw(home, monkeypatch, "one")
    run = Run.open("r")
    wanted = {"figure": "test", "runs": {"r": {"step": 0, "config": run.config_hash}}}
    wanted["statistics"] = {"n": "2 points", "interval": "none", "null": "zero"}
    assert set(files) == {"test.png", "pdf/test.pdf", "data/test.csv"}
    assert json.loads(files["data/test.csv"].decode().splitlines()[0].removeprefix("# ")) == wanted
    assert json.loads(Image.open(home / "one" / "test.png").info["Description"]) == wanted
    assert b"CreationDate" not in files["pdf/test.pdf"]


def test_a_panel_is_cut_into_its_rows(tiny):
    """Inputs as validation has them; then what the loop put below them; and only the steps there
    are.
    """
    run = Run.open("tiny-joint")
    inputs, reconstructions, *samples = figures.panel_rows(run)
    images, _ = data.load(from_dict(data.DataConfig, run.config["data"]), "val", 12)
    assert np.array_equal((inputs * 255).round(), data.to_uint8(images).numpy())
    again = data.to_uint8(load_tokenizer("tiny-joint")(images).reconstruction.detach())
    assert np.array_equal((reconstructions * 255).round(), again.numpy())
    assert [len(s) for s in samples] == [12, 12]
    assert not np.array_equal(figures.panel_rows(run, 6)[1], reconstructions)
    with pytest.raises(UserError, match="no sample panel of step 7: it has 6, 12, 18, 24"):
        figures.panel_rows(run, 7)


def test_the_scale_names_every_size(home):
    half = CONFIG | {
        "seed": 4,
        "steps": 10,
        "tokenizer": CONFIG["tokenizer"] | {"codebook_size": 32},
    }
    runs = [Run.create("r", CONFIG), Run.create("h", half)]
    assert figures.scale(runs).endswith("K = 64 and 32, 20 and 10 steps, batch 4; 2 seeds (3, 4)")


def test_the_scale_is_on_the_figures_face(home):
    assert (
        figures.scale([Run.create("r", CONFIG)])
        == "Small scale: pets 32 px, 8x8 tokens, K = 64, 20 steps, batch 4; 1 seed (3)"
    )


@pytest.mark.parametrize(
    "far, limits, text",
    (
        ([115.0, 117.0], (3.25, 4.75), ["116 →"]),
        ([-50.0, -50.0], (3.25, 4.75), ["← -50"]),
        ([7.5, 8.0], None, []),  # not far
        ([4.0, 117.0], (3.25, 4.75), ["60.5 →"]),  # a line is far or near as a whole
    ),
)
def test_a_line_far_off_does_not_set_the_axis(far, limits, text):
    fig, (axis,) = figures.panels("a")
    values, heights = (
        np.array([3.5, 3.7, 4.0, 4.2, 4.4, 4.5, *far]),
        np.array([0, 0, 1, 1, 2, 2, 3, 3]),
    )
    axis.scatter(values, heights)
    before = axis.get_xlim()
    figures.focus(axis, values, heights)
    assert [t.get_text() for t in axis.texts if t.get_text() != "(a)"] == text
    assert axis.get_xlim() == (before if limits is None else pytest.approx(limits))
    fig, (axis,) = figures.panels("a")
    figures.focus(axis, values[2:], heights[2:])  # one line of three is not few
    assert len(axis.texts) == 1
