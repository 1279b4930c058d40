"""gear: how an image tokenizer and an autoregressive generator shape each other (GEAR, arXiv 2606.32039)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve beside any other load

from gear import _torchvision  # noqa: F401  first: torchvision may not import without it

__version__ = "0.1.0"

from gear.checkpoints import load_generator, load_tokenizer
from gear.config import UserError
from gear.generator.sampling import sample
from gear.run import Run, load_runs, open_runs

__all__ = ["Run", "UserError", "load_generator", "load_runs", "load_tokenizer", "open_runs", "sample"]
