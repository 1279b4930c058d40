"""Fixtures: every test has its own folders for runs, figures and caches; the runs of the recipe
`tiny` are trained once and shared.
"""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear  # noqa: F401  before torch: sets variables that torch's libraries read when they load

# isort: split

import matplotlib
import pytest
import torch
from filelock import FileLock

from gear.experiments.recipes import plan, recipe, train_with_parents
from gear.training.loop import Runtime

matplotlib.use("Agg")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Set $GEAR_RUNS, $GEAR_FIGURES and $GEAR_CACHE to folders in the test's own folder; returns
    that folder.
    """
    for name in ("runs", "figures", "cache"):
        monkeypatch.setenv(f"GEAR_{name.upper()}", str(tmp_path / name))
    return tmp_path


@pytest.fixture(params=("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
def device(request):
    """The name of a device: one test per kind of device on this machine."""
    return request.param


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory):
    """The folder of the runs tiny-tokenizer, tiny-joint and tiny, which tests must not change."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny_runs"
    # one pytest-xdist worker trains, the others wait
    with FileLock(folder.with_suffix(".lock")), pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEAR_RUNS", str(folder))
        train_with_parents(plan(recipe("tiny"), "tiny"), Runtime(device="cpu", quiet=True))
    return folder


@pytest.fixture
def tiny(tiny_runs, home, monkeypatch):
    """A copy of the tiny runs as the test's own runs folder; returns it."""
    shutil.copytree(tiny_runs, home / "runs")
    return home / "runs"
