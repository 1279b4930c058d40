"""gear: how an image tokenizer and an autoregressive generator shape each other (GEAR, arXiv 2606.32039)."""

import os
import sys

try:
    os.getcwd()
except FileNotFoundError:  # torch's libraries would end the process with a message of their own
    print("gear: the working directory is gone. Change to one that is there: cd", file=sys.stderr)
    sys.exit(2)

# Read by torch's libraries when they load. Spinning threads starve beside any other load; and without the second, a matrix
# product may depend on where its memory lies, so that a resumed run would differ in the last bit.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MKL_CBWR", "AUTO")

from gear import _torchvision  # noqa: F401  first: torchvision may not import without it

# isort: split

from gear.checkpoints import load_generator, load_tokenizer
from gear.config import UserError, __version__
from gear.generator.sampling import sample
from gear.run import Run, load_runs, open_runs

__all__ = ["Run", "UserError", "__version__", "load_generator", "load_runs", "load_tokenizer", "open_runs", "sample"]
