"""Figures are products: rounded numbers, provenance, no date, the same bytes."""

import json

import numpy as np
import pandas as pd
from PIL import Image

from gear import figures
from gear.run import Run

CONFIG = {
    "recipe": "r", "seed": 3, "steps": 20, "batch_size": 4, "data": {"source": "/a/b/pets/", "image_size": 32},
    "tokenizer": {"channel_mult": [1, 2, 2], "codebook_size": 64},
}  # fmt: skip


def draw(home, monkeypatch, folder):
    monkeypatch.setenv("GEAR_FIGURES", str(home / folder))
    run = Run.create("r", CONFIG)
    table = figures.rounded(pd.DataFrame({"x": [1, 2], "y": [1 / 3, 2 / 3]}))
    fig, axes = figures.panels(1, 2)
    axes[0].plot(table.x, table.y)
    figures.save(fig, "test", [run], table)
    return {p.name: p.read_bytes() for p in (home / folder).iterdir()}


def test_rounding_keeps_six_significant_digits():
    table = figures.rounded(pd.DataFrame({"a": [123456.789, 0.000123456789, 0.0, np.nan, -9.87654321]}))
    assert table.a.tolist()[:3] == [123457.0, 0.000123457, 0.0] and table.a[4] == -9.87654 and np.isnan(table.a[3])


def test_twice_the_same_bytes(home, monkeypatch):
    assert draw(home, monkeypatch, "one") == draw(home, monkeypatch, "two")


def test_provenance_names_runs_steps_and_hashes_and_no_date(home, monkeypatch):
    files = draw(home, monkeypatch, "one")
    run = Run.open("r")
    wanted = {"figure": "test", "runs": {"r": {"step": 0, "config": run.config_hash}}}
    assert json.loads(files["test.csv"].decode().splitlines()[0].removeprefix("# ")) == wanted
    assert json.loads(Image.open(home / "one" / "test.png").info["Description"]) == wanted
    assert b"CreationDate" not in files["test.pdf"]


def test_the_scale_is_on_the_figures_face(home):
    assert figures.scale([Run.create("r", CONFIG)]) == "Small scale: pets 32 px, 8x8 tokens, K = 64, 20 steps of 4; 1 seed (3)"
