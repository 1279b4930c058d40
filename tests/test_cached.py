"""A cached run writes the bytes of an uncached one; what does not belong to it, or is cut short, is computed again."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_run
from PIL import Image

from gear.config import Interrupted, TrainingStopped, UserError
from gear.data import DataConfig, Stream
from gear.recipes import recipe
from gear.run import Run
from gear.training import cached
from gear.training.cached import Cached
from gear.training.loop import Runtime, train
from gear.training.state import State

CACHED = Runtime(device="cpu", quiet=True, cached=True)


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(cached, "FILE", 128)


def test_a_cached_run_equals_an_uncached_one_and_its_weights_too(tiny, tiny_runs, home, monkeypatch):
    shutil.rmtree(tiny / "tiny")
    train(recipe("tiny"), "tiny", CACHED)
    assert_same_run(tiny / "tiny", tiny_runs / "tiny")
    monkeypatch.setattr(State, "observe", lambda *batch: pytest.fail("looks at images") if len(batch) < 4 else OBSERVE(*batch))
    monkeypatch.setattr(cached.Rows, "keep", lambda *_: pytest.fail("computes again"))
    train(replace(recipe("tiny"), seed=7), "other-seed", CACHED)  # the same variants, in another order


OBSERVE = State.observe
