"""A process imports what it uses: training needs torch, torchvision, numpy, safetensors, tyro and what tables are made of."""

import os
import subprocess
import sys

import pytest
import torch
from torchvision.utils import make_grid

from gear.images import image_grid

NEEDLESS = (  # to train with: some are large, others are not on a machine with a GPU
    "braceexpand", "jupyter_client", "lpips", "papermill", "sklearn", "torch._dynamo", "torch_fidelity", "torchvision",
)  # fmt: skip
TRAIN = """
import sys
for name in {missing}:
    sys.modules[name] = None  # importing it raises ImportError
from gear.__main__ import main
main(["train", "tiny-joint", "--quiet", "--device", "cpu", "--steps", "6", "--label", "short"])
print(sorted(name for name in {needless} if sys.modules.get(name)))
"""


def run(code):
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_public_face_and_the_command_line_import_little():
    code = "import sys, gear, gear.__main__; print([name for name in {} if name in sys.modules])"
    assert run(code.format(NEEDLESS)).strip() == "[]"


@pytest.mark.slow
def test_training_works_where_what_it_does_not_use_is_not_installed():
    missing = ["ipywidgets", *NEEDLESS]
    missing = [name for name in missing if name not in ("sklearn", "torch._dynamo", "torchvision")]
    out = run(TRAIN.format(missing=missing, needless=["ipywidgets", "lpips", "papermill", "torch_fidelity"]))
    assert "tiny-joint-short: step 6" in out and out.strip().endswith("[]")


def test_a_grid_of_images_is_torchvisions():
    torch.manual_seed(0)
    for count, columns, gap in ((24, 12, 2), (5, 3, 1), (2, 8, 2), (1, 1, 0)):
        images = torch.rand(count, 3, 6, 4)
        want = make_grid(images, nrow=columns, padding=gap, pad_value=1.0)
        assert torch.equal(image_grid(images, columns, gap), want)
