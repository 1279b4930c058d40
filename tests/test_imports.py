"""A process imports only the packages that it uses. Training needs torch, torchvision, numpy,
safetensors, tyro and the packages for tables.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.utils import make_grid

import gear
from gear import cli
from gear.__main__ import COMMANDS
from gear.checkpoints import load_generator
from gear.generator.sampling import sample
from gear.images import image_grid
from gear.runs.run import Run

# Packages that training does not need: some are large, others are missing on a machine with a GPU.
NEEDLESS = (
    "braceexpand",
    "ipywidgets",
    "jupyter_client",
    "lpips",
    "matplotlib",
    "papermill",
    "scipy",
    "seaborn",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch_fidelity",
    "torchvision",
)
TRAIN = """
import sys
for name in {missing}:
    sys.modules[name] = None  # importing it raises ImportError
from gear.__main__ import main
main(["train", "tiny-joint", "--quiet", "--device", "cpu", "--steps", "6", "--label", "short"])
print(sorted(name for name in {needless} if sys.modules.get(name)))
"""


def run(code):
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def loaded(code, names):
    """Return which of the modules `names` a new process has loaded after it ran `code`."""
    out = run(
        f"{code}\nimport sys; print(*[name for name in {list(names)} if name in sys.modules])"
    )
    return out.removesuffix("\n").split("\n")[-1].split()


def test_help_and_version_import_none_of_what_takes_time():
    code = "from gear.__main__ import main\nfor word in ('--help', '--version'): main([word])"
    assert loaded(code, ["numpy", "pandas", "torch", "tyro"]) == []


def test_listing_runs_imports_no_torch():
    assert loaded("import gear.cli.runs", ["pandas", "torch", "tyro"]) == ["pandas"]


def test_commands_import_what_they_use():
    """Importing all commands loads the training loop, but no package that draws or compiles."""
    names = [
        path.stem
        for path in Path(cli.__file__).parent.glob("[a-z]*.py")
        if path.stem not in ("arguments", "console", "health", "usage")
    ]
    assert sorted(names) == sorted(COMMANDS)
    code = (
        f"import importlib\nfor name in {names}: assert importlib.import_module('gear.cli.' + "
        "name).command"
    )
    assert loaded(code, ["gear.training.loop", "torch", *NEEDLESS]) == [
        "gear.training.loop",
        "torch",
    ]


def test_public_names_are_there_when_they_are_asked_for():
    code = (
        "import sys, gear\ngear.UserError, gear.__version__\nassert not {'numpy', 'torch'} & "
        "set(sys.modules)\n"
    )
    code += (
        "for name in (*gear.__all__, 'data'): assert name in dir(gear) and getattr(gear, "
        "name)\ngear.runs.run.Run"
    )
    assert loaded(code, ["torch", *NEEDLESS]) == ["torch"]
    assert gear.Run is Run and gear.load_generator is load_generator and gear.sample is sample
    with pytest.raises(AttributeError, match="^module 'gear' has no attribute 'rum'$"):
        _ = gear.rum


def test_torchvision_imports_after_gear():
    """A torchvision wheel built for CUDA fails to import beside a CPU-only torch, unless
    `gear._torchvision` is imported first.
    """
    assert make_grid.__module__ == "torchvision.utils" and "gear._torchvision" in sys.modules


@pytest.mark.slow
def test_torchvision_imports_after_gear_that_has_loaded_no_torch():
    code = "import sys, gear\nassert 'torch' not in sys.modules\nimport torchvision.transforms"
    assert loaded(code, ["gear._torchvision"]) == ["gear._torchvision"]


@pytest.mark.slow
def test_training_works_where_what_it_does_not_use_is_not_installed():
    missing = [
        "braceexpand",
        "ipywidgets",
        "jupyter_client",
        "lpips",
        "matplotlib",
        "papermill",
        "seaborn",
        "torch_fidelity",
    ]
    out = run(
        TRAIN.format(
            missing=missing, needless=["ipywidgets", "lpips", "papermill", "torch_fidelity"]
        )
    )
    assert "tiny-joint-short: step 6" in out and out.strip().endswith("[]")


def test_a_grid_of_images_is_torchvisions():
    torch.manual_seed(0)
    for count, columns, gap in ((24, 12, 2), (5, 3, 1), (2, 8, 2), (1, 1, 0)):
        images = torch.rand(count, 3, 6, 4)
        expected = make_grid(images, nrow=columns, padding=gap, pad_value=1.0)
        assert torch.equal(image_grid(images, columns, gap), expected)


@pytest.mark.parametrize("old, new", [("alignment", "alignment"), ("codes", "codes"), ("spatial", "spatial"),
                                      ("dynamics", "speedup")])  # fmt: skip
def test_the_old_paths_of_measures_work_until_the_next_release(old, new):
    module = importlib.import_module(f"gear.measures.{new}")
    assert importlib.import_module(f"gear.analysis.{old}") is module
    assert getattr(importlib.import_module("gear.analysis"), old) is module
