"""gear: how an image tokenizer and an autoregressive generator shape each other (GEAR, arXiv
2606.32039).
"""

import importlib.util
import os
import sys

try:
    os.getcwd()
except FileNotFoundError:  # torch's libraries would end the process with a message of their own
    print("gear: the working directory is gone. Change to one that is there: cd", file=sys.stderr)
    sys.exit(2)

# Read by torch's libraries when they load. Spinning threads starve beside any other load; and
# without the second, a matrix product may depend on where its memory lies, so that a resumed run
# would differ in the last bit.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MKL_CBWR", "AUTO")

from gear.config import UserError, __version__

# of public names, which are imported when they are first asked for: torch takes a second
MODULES = {
    "Run": "runs.run",
    "load_generator": "checkpoints",
    "load_runs": "runs.run",
    "load_tokenizer": "checkpoints",
    "open_runs": "runs.run",
    "sample": "generator.sampling",
}
__all__ = ["UserError", "__version__", *MODULES]


def __getattr__(name):
    """Return a public name, or a module of the package: gear.Run, gear.data."""
    if name in MODULES:
        return getattr(importlib.import_module(f"gear.{MODULES[name]}"), name)
    if name.isidentifier() and importlib.util.find_spec(f"gear.{name}"):
        return importlib.import_module(f"gear.{name}")
    raise AttributeError(f"module 'gear' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__, "data"})


class BeforeTorchvision:
    """Import `gear._torchvision` just before torchvision, which may not import without it, whoever
    asks for that.
    """

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            importlib.import_module("gear._torchvision")


sys.meta_path.insert(0, BeforeTorchvision())
