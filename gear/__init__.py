"""gear: how an image tokenizer and an autoregressive generator shape each other (GEAR, arXiv
2606.32039).
"""

import importlib.util
import os
import sys

try:
    os.getcwd()
except FileNotFoundError:  # torch's libraries would end the process with an obscure message
    print(
        "gear: the working directory is gone. Change to one that exists, with cd.", file=sys.stderr
    )
    sys.exit(2)

# torch's libraries read these two variables when they load. Threads that spin while they wait slow
# down as soon as another process uses the same cores. Without MKL_CBWR a matrix product may depend
# on the alignment of its memory, and a resumed run would differ in the last bit.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MKL_CBWR", "AUTO")

from gear.config import UserError, __version__

# public name -> the module that defines it, imported at first use because torch takes a second
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
    """Import a public name (gear.Run) or a module of the package (gear.data) at its first use."""
    if name in MODULES:
        return getattr(importlib.import_module(f"gear.{MODULES[name]}"), name)
    if name.isidentifier() and importlib.util.find_spec(f"gear.{name}"):
        return importlib.import_module(f"gear.{name}")
    raise AttributeError(f"module 'gear' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__, "data"})


class BeforeTorchvision:
    """Import `gear._torchvision` just before any code imports torchvision.

    Beside a CPU-only torch, torchvision cannot be imported without it. This finder itself finds
    nothing.
    """

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            importlib.import_module("gear._torchvision")


sys.meta_path.insert(0, BeforeTorchvision())
